"""The whole pipeline on the quick configuration: files, tables, figures, checkpoints, errors."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT, SCRIPT, quick, refusal, summary, table

README = (ROOT / "README_pytorch.md").read_text(encoding="utf-8")
FIGURES = "time_series_predictions parameter_counts architectures performance_summary long_range classifier_errors"
PNGS = {f"pytorch_rnn_{name}.png" for name in (*FIGURES.split(), *(f"{task}_training_history" for task in rnn.TASKS))}
CSVS = {f"pytorch_rnn_{name}.csv" for name in ("runs", "summary", "comparisons", "costs", "history")}
TABLES = CSVS | {"pytorch_rnn_summary.md"}
ONE_RUN = ["--quick", "--tasks", "forecaster", "--models", "RNN", "--output-dir"]
TITLES = tuple(task.title for task in rnn.TASKS.values())
RUNS = [f"{task}_{name}_seed42" for task in rnn.TASKS for name in rnn.MODEL_NAMES]


def test_a_run_leaves_every_file_of_the_contract_and_no_other(quick_run):
    found = {str(path.relative_to(quick_run)) for path in quick_run.rglob("*") if path.is_file()}
    runs = {f"runs/{name}.json" for name in [*RUNS, *(f"{task}_baselines_seed42" for task in rnn.TASKS)]}
    runs |= {name for run in RUNS for name in (f"models/{run}.pt", f"predictions/{run}.csv")}
    assert found == PNGS | TABLES | runs
    for name in PNGS:
        content = (quick_run / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_runs_table(quick_run):
    runs = table(quick_run, "runs")
    columns = "task,model,seed,learning_rate,parameters,recurrent_parameters,epochs,best_epoch,seconds"
    assert ",".join(runs) == f"{columns},val_loss,test_loss,test_accuracy,test_mse,test_mae"
    assert [f"{r.task}_{r.model}_seed{r.seed}" for r in runs.itertuples()] == RUNS
    text, series = runs[runs["task"] != "forecaster"], runs[runs["task"] == "forecaster"]
    assert text["test_accuracy"].between(0, 1).all() and text["test_mse"].isna().all()
    assert series["test_accuracy"].isna().all() and (series["test_mse"] > 0).all() and (series["test_mae"] > 0).all()
    assert dict(zip(text["model"], text["recurrent_parameters"])) == {"RNN": 15_200, "LSTM": 60_800, "GRU": 45_600}


def test_summary_table(quick_run):
    scores = table(quick_run, "summary")
    assert ",".join(scores) == "task,name,kind,metric,mean,std,n"
    assert set(scores["kind"]) == {"model", "baseline", "ceiling"}
    assert set(scores["metric"]) == {"accuracy", "loss", "mse", "mae"}
    assert (scores["n"] == 1).all() and scores["std"].isna().all()
    assert set(scores[scores["kind"] != "model"]["name"]) == {
        *("majority class", "naive Bayes", "Bayes decision"),
        *("unigram", "bigram", "trigram", "full state"),
        *("persistence", "seasonal naive", "linear autoregression", "exact filter"),
    }
    runs = table(quick_run, "runs").set_index(["task", "model"])
    for row in scores[scores["kind"] == "model"].itertuples():
        assert row.mean == pytest.approx(runs.loc[(row.task, row.name), f"test_{row.metric}"])


def test_comparisons_table(quick_run):
    found = table(quick_run, "comparisons")
    assert ",".join(found) == "task,metric,a,b,difference,low,high,verdict"
    assert found[["low", "high"]].isna().all(axis=None) and found["verdict"].str.endswith("one seed").all()
    means = table(quick_run, "summary").set_index(["task", "metric", "name"])["mean"]
    for row in found[found["metric"] != "perplexity"].itertuples():
        expected = means[row.task, row.metric, row.a] - means[row.task, row.metric, row.b]
        assert row.difference == pytest.approx(expected, abs=1e-12)
    pairs = found.groupby(["task", "metric"]).size().to_dict()  # three pairs of models, and each with a baseline
    assert pairs == {(task.name, metric.name): 6 for task in rnn.TASKS.values() for metric in task.metrics}


def test_markdown_summary_names_every_model_and_reference(quick_run):
    words = ["RNN", "LSTM", "GRU", "naive Bayes", "trigram", "persistence", "perplexity", torch.__version__]
    for word in (*words, *(task.question for task in rnn.TASKS.values())):
        assert word in summary(quick_run)


def test_checkpoints_give_the_outputs_of_the_run(quick_run):
    for name in RUNS:
        record = json.loads((quick_run / "runs" / f"{name}.json").read_text())
        model = rnn.load_checkpoint(quick_run / "models" / f"{name}.pt")
        task = rnn.TASKS[record["task"]]
        data = task.build_data(rnn.QUICK[task.name], 42)
        again = task.measure(**rnn.evaluate(model, task, data.test), unit=data.unit)
        assert again == pytest.approx(record["test"], rel=1e-5) and model.metrics == record["test"]
        assert type(model) is task.models[record["model"]]


def test_one_model_alone_repeats_its_row_of_the_full_run(quick_run, tmp_path, no_figures):
    assert quick(tmp_path, "--tasks", "predictor", "--models", "GRU") == 0
    alone, full = (table(folder, "runs").drop(columns="seconds") for folder in (tmp_path, quick_run))
    expected = full.query("task == 'predictor' and model == 'GRU'").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, expected, check_exact=True, check_dtype=False)


def test_the_number_of_workers_changes_nothing(quick_run, tmp_path, no_figures, capfd):
    assert quick(tmp_path, "--tasks", "predictor", "--workers", 2) == 0
    error = capfd.readouterr().err
    for name in (name for name in RUNS if name.startswith("predictor")):
        parallel, alone = (json.loads((d / "runs" / f"{name}.json").read_text()) for d in (tmp_path, quick_run))
        for record in (parallel, alone):
            del record["cost"]
            for row in record["history"]:
                del row["seconds"]
        assert parallel == alone
        label = "{task} {model} seed {seed}  epoch ".format(**alone)
        assert error.count(label) == 2, "workers tell of their progress"


def make_the_forecaster_diverge(monkeypatch):
    rates = rnn.LearningRates(1e30, 1e30, 1e30)
    monkeypatch.setitem(rnn.QUICK, "forecaster", replace(rnn.QUICK["forecaster"], learning_rates=rates))


@pytest.mark.slow
def test_runs_that_fail_in_workers_are_named_and_the_others_go_on(capsys, tmp_path, monkeypatch, no_figures):
    make_the_forecaster_diverge(monkeypatch)
    tasks = ["--tasks", "predictor", "forecaster", "--models", "RNN", "GRU"]
    assert quick(tmp_path, *tasks, "--seeds", 7, "--workers", 2) == 1
    error = capsys.readouterr().err
    for name in ("RNN", "GRU"):
        assert f"failed: forecaster {name} seed 7: {name}Forecaster (forecaster), seed 7: the loss is not" in error
    assert sorted(table(tmp_path, "runs")["model"]) == ["GRU", "RNN"], "the others went on"
    assert not multiprocessing.active_children()


def test_benchmark_prints_and_writes_the_loop_beside_the_bare_one(tmp_path, capsys):
    assert quick(tmp_path, "--benchmark", "--tasks", "predictor", "--models", "RNN", "GRU") == 0
    costs = table(tmp_path, "benchmark")
    columns = "task,model,ms_per_step,samples_per_second,bare_ms_per_step,bare_samples_per_second,overhead,kernel"
    assert ",".join(costs) == columns and costs["model"].tolist() == ["RNN", "GRU"]
    assert re.search(r"predictor +GRU .*[+-][\d.]+% +generic", capsys.readouterr().out)
    assert not list((tmp_path / "runs").iterdir()), "nothing is trained"


def test_report_is_made_from_the_records_alone(quick_run, tmp_path):
    shutil.copytree(quick_run / "runs", tmp_path / "runs")
    assert quick(tmp_path, "--report") == 0
    for name in PNGS | TABLES:
        assert (tmp_path / name).read_bytes() == (quick_run / name).read_bytes()


def test_a_report_without_the_baselines_leaves_them_out(quick_run, tmp_path):
    """As after an interruption: the baselines of a seed may be the last to be measured."""
    shutil.copytree(quick_run / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*baselines*", "forecaster*"))
    assert quick(tmp_path, "--report") == 0
    assert set(table(tmp_path, "summary")["kind"]) == {"model"}
    assert not list(tmp_path.glob("*forecaster*")) and (tmp_path / "pytorch_rnn_long_range.png").exists()


def test_no_cost_is_measured_where_no_run_is_left(quick_run, tmp_path, monkeypatch, no_figures):
    folder = shutil.copytree(quick_run, tmp_path / "done")
    monkeypatch.setattr(rnn, "measure_costs", None)
    assert quick(folder, "--resume") == 0


def test_seeds_run_later_are_added_to_the_earlier_ones(tmp_path, no_figures):
    for seed in (5, 3):
        assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN", "GRU", "--seeds", seed) == 0
    runs, scores = table(tmp_path, "runs"), table(tmp_path, "summary")
    assert runs["seed"].tolist() == [3, 5, 3, 5]
    assert "over the seeds 3, 5." in summary(tmp_path) and "One seed" not in summary(tmp_path)
    expected = runs.groupby("model")["test_mse"].agg(["mean", "std", "count"])
    found = scores[scores["metric"] == "mse"].set_index("name")[["mean", "std", "n"]]
    assert found.loc[expected.index].to_numpy() == pytest.approx(expected.to_numpy())
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "GRU", "--seeds", 4) == 0
    assert "over the seeds 3, 5 (RNN); 3, 4, 5 (GRU)." in summary(tmp_path)


def test_records_of_another_configuration_are_left_out(quick_run, tmp_path, capsys):
    shutil.copytree(quick_run / "runs", tmp_path / "runs")
    arguments = ["--quick", "--epochs", "3", "--report", "--output-dir", str(tmp_path)]
    assert "train first (the folder holds runs of: --quick)" in refusal(arguments, capsys)
    assert not list(tmp_path.glob("pytorch_rnn_*"))


def test_terminal_output(capsys, tmp_path, no_figures):
    assert quick(tmp_path, "--tasks", "forecaster") == 0
    printed, progress = capsys.readouterr()
    assert all(word in printed for word in ("Time-series forecasting", "persistence", "recurrent", str(tmp_path)))
    assert re.search(r"forecaster GRU seed 42  epoch  2  train/val loss [\d.]+/[\d.]+, mse [\d.]+/", progress)
    assert "\r" not in progress, "no bar where there is no terminal"


def test_a_folder_that_cannot_be_written_is_one_line_and_status_1(capsys, tmp_path):
    (tmp_path / "FILE").write_text("")
    assert quick(tmp_path / "FILE" / "below") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "below: cannot be written (Not a directory); choose another" in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_bars_fit_a_terminal_of_80_columns(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    parent, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([*SCRIPT, *ONE_RUN, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(parent, 4096):
            seen += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", seen.decode()))
    bars = [line for line in lines if "|" in line]
    assert any(re.match(r"all runs +\d+%\|.*\| \d\d:\d\d passed, \S+ left", line) for line in bars)
    assert any(line.startswith("forecaster RNN seed 42") and "validation loss" in line for line in bars)
    assert max(map(len, bars)) <= 80 and not any("train/val" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "clasifier"], "invalid choice: 'clasifier' (choose from "),
        (["--models", "lstm"], "invalid choice: 'lstm' (choose from "),
        (["--model", "GRU"], "unrecognized arguments: --model GRU"),
        (["--seeds", "1", "x" * 10_000], "..."),
        (["--corpus", "a\x1b[31m\r\nb\u202e"], "a\\x1b[31m\\r\\nb\\u202e: no such file"),
        (["--corpus", ""], "not a regular file"),
        (["--seed", "3"], "--seed goes with --predict; for training there is --seeds"),
        (["--report", "--benchmark"], "cannot go together"),
        (["--seeds", "-1"], "'-1' is not a whole number of 0 or more"),
        (["--seeds", "1.5"], "'1.5' is not a whole number"),
        (["--epochs", "0"], "'0' is not a whole number of 1 or more"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--device", "mps"], "there is none here"),
        (["--report", "--output-dir", "EMPTY"], "train first"),
        (["--learning-rate", "0"], "'0' is not a number from 1e-06 to 1"),
        (["--learning-rate", "fast"], "'fast' is not a number"),
        (["--hidden-dim", "0"], "'0' is not a whole number of 1 or more"),
        (["--tune", "--learning-rate", "0.1"], "--tune and --learning-rate cannot go together"),
        (["--tune", "--report"], "--report and --tune cannot go together"),
        (["--tune", "--benchmark"], "--benchmark and --tune cannot go together"),
        (["--tune", "--predict", "a.pt", "b"], "--predict and --tune cannot go together"),
        (["--text-column", "x"], "--text-column goes with --reviews or --predict"),
        (["--series-column", "x"], "--series-column goes with --series or --predict"),
        (["--window", "5", "--tasks", "classifier"], "--window is for predictor and forecaster"),
        (["--tasks", "predictor", "--reviews", "f.csv"], "--reviews is for the task classifier, which --tasks leaves"),
        (["--quick", "--series", "FILE", "--series-column", "u"], "no column 'u'; its columns are day, temperature"),
        (["--reviews", "."], "not a regular file"),
        (["--series", "PIPE"], "not a regular file; a run needs one that can be read again"),
        (["--series", "a" * 252 + ".csv"], "aaa.csv: cannot be read"),
        (["--corpus", "broken.gz"], "broken.gz: cannot be read"),
        ("--quick", "the options are a list, as in main(['--quick'])"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rnn, "run_jobs", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("day,temperature\nmon,1\ntue,2\n")
    (tmp_path / "broken.gz").write_bytes(b"no gzip at all")
    if hasattr(os, "mkfifo"):
        os.mkfifo("PIPE")
    elif "PIPE" in arguments:
        pytest.skip("no pipes with names here")
    assert message in refusal(arguments, capsys)


def test_a_failed_run_is_status_1_and_keeps_what_was_finished(capsys, tmp_path, monkeypatch, no_figures):
    make_the_forecaster_diverge(monkeypatch)
    assert quick(tmp_path, "--tasks", "predictor", "forecaster") == 1
    said = "failed: forecaster GRU seed 42: GRUForecaster (forecaster), seed 42: the loss is not finite"
    assert said in capsys.readouterr().err
    assert table(tmp_path, "runs")["model"].tolist() == ["RNN", "LSTM", "GRU"]


def test_an_interrupted_run_is_status_130_and_still_names_what_failed(tmp_path, monkeypatch, capsys):
    errors = iter([RuntimeError("beyond all bounds"), KeyboardInterrupt])

    def interrupted(*_):
        raise next(errors)

    monkeypatch.setattr(rnn, "fit", interrupted)
    assert quick(tmp_path, "--tasks", "classifier", "--models", "RNN", "GRU") == 130
    *_, failed, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"failed: classifier (RNN|GRU) seed 42: beyond all bounds", failed)
    assert last.startswith("pytorch_rnn_models.py: interrupted") and "--resume" in last and "--report" in last


def test_a_container_may_grant_less_than_the_machine_has(tmp_path):
    cores, quota = rnn.usable_cores(tmp_path / "absent"), tmp_path / "cpu.max"
    assert cores >= 1
    for text, granted in (("max 100000", cores), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", cores)):
        quota.write_text(text)
        assert rnn.usable_cores(quota) == granted, text


def test_a_terminal_that_knows_ascii_only_and_a_file_name_that_is_no_utf_8(tmp_path):
    series = os.fsencode(tmp_path) + b"/no-\xff.csv"
    with open(series, "w") as file:  # noqa: PTH123 (a name in bytes)
        file.writelines(f"{i % 7}\n" for i in range(500))
    command = [*SCRIPT, *ONE_RUN, tmp_path / "out", "--epochs", "1", "--series", series]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert "no-" in summary(tmp_path / "out")


def test_help_returns(capsys):
    assert rnn.main(["--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(rnn.os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: {str(target)!r}")):
        rnn.write_whole(target, "half of the n")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_import_does_nothing():
    script = "import sys, pytorch_rnn_models; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# --- the README -----------------------------------------------------------------------


def test_readme_shows_the_committed_results():
    blocks = re.findall(r"<!-- (outputs/\S+) -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
    assert "outputs/reference/pytorch_rnn_summary.md" in [path for path, _ in blocks]
    for path, shown in blocks:
        sections = re.split(r"^## ", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
        sections = [section for section in sections if section.startswith(TITLES)]
        tables = [re.search(r"(^\|.*\n)+", section, flags=re.MULTILINE)[0] for section in sections]
        assert re.findall(r"(?:^\|.*\n)+", shown, flags=re.MULTILINE) == tables and len(tables) == 3, path


@pytest.mark.parametrize("folder", ["outputs/reference", "outputs/unseen_seeds"])
def test_committed_results_lie_in_the_promised_bands(folder):
    means, runs = (
        table(ROOT / folder, "summary").set_index(["task", "metric", "name"])["mean"],
        table(ROOT / folder, "runs"),
    )
    accuracy = means["classifier"]["accuracy"]
    for name, low, high in (("LSTM", 0.75, 0.85), ("GRU", 0.70, 0.80), ("RNN", 0.60, 0.70)):
        singles = runs.query("task == 'classifier' and model == @name")["test_accuracy"]
        assert low <= accuracy[name] <= high, name
        assert singles.between(low - 0.04, high + 0.04).all(), name
    assert min(accuracy["LSTM"], accuracy["GRU"]) > accuracy["naive Bayes"]
    accuracy = means["predictor"]["accuracy"]
    assert 0.40 <= accuracy["LSTM"] <= 0.60 and accuracy["GRU"] >= accuracy["LSTM"] - 0.03
    assert accuracy["RNN"] < min(accuracy["LSTM"], accuracy["GRU"])
    verdicts = " ".join(table(ROOT / folder, "comparisons")["verdict"])
    assert all(f"{name} better than linear autoregression by" in verdicts for name in rnn.MODEL_NAMES)


@pytest.mark.parametrize("folder", ["outputs/reference", "outputs/unseen_seeds"])
def test_no_committed_model_beats_a_ceiling(folder):
    for (_, metric), rows in table(ROOT / folder, "summary").groupby(["task", "metric"]):
        ceiling = rows[rows["kind"] == "ceiling"]["mean"].item()
        others = rows[rows["kind"] != "ceiling"]["mean"]
        assert (others < ceiling).all() if metric == "accuracy" else (others > ceiling).all()


def test_readme_links_exist_and_documents_every_option_and_file():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for word in (*PNGS, *TABLES, *re.findall(r'"(--[a-z-]+)"', (ROOT / "pytorch_rnn_models.py").read_text("utf-8"))):
        assert word in README, word
