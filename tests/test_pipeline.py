"""The whole pipeline on the quick configuration: files, tables, figures, checkpoints, errors."""

import errno
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT, SCRIPT, copy_records, quick, refusal, summary, table

README = (ROOT / "README_pytorch.md").read_text(encoding="utf-8")
FIGURES = [
    "time_series_predictions",
    "parameter_counts",
    "architectures",
    "performance_summary",
    "long_range",
    "classifier_errors",
    *(f"{task}_training_history" for task in rnn.TASKS),
]
PNGS = {f"pytorch_rnn_{name}.png" for name in FIGURES}
CSVS = {
    f"pytorch_rnn_{name}.csv" for name in ("runs", "summary", "comparisons", "costs", "history")
}
TABLES = CSVS | {"pytorch_rnn_summary.md"}
ONE_RUN = ["--quick", "--tasks", "forecaster", "--models", "RNN", "--output-dir"]
RUNS = [f"{task}_{name}_seed42" for task in rnn.TASKS for name in rnn.DEFAULT_MODELS]


def record_of(folder, name):
    return json.loads((folder / "runs" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_run_leaves_every_file_of_the_contract_and_no_other(quick_run):
    found = {str(path.relative_to(quick_run)) for path in quick_run.rglob("*") if path.is_file()}
    baselines = [f"{task}_baselines_seed42" for task in rnn.TASKS]
    expected = PNGS | TABLES | {"config.json"}
    expected |= {f"runs/{name}.json" for name in [*RUNS, *baselines]}
    expected |= {f"models/{name}.pt" for name in RUNS}
    expected |= {f"predictions/{task}_seed42.csv" for task in rnn.TASKS}
    assert found == expected
    for name in PNGS:
        assert (quick_run / name).read_bytes().startswith(b"\x89PNG")


def test_runs_table(quick_run):
    runs = table(quick_run, "runs")
    columns = (
        "task,model,seed,learning_rate,parameters,recurrent_parameters,epochs,best_epoch,seconds"
    )
    assert ",".join(runs) == f"{columns},val_loss,test_loss,test_accuracy,test_mse,test_mae"
    assert [f"{run.task}_{run.model}_seed{run.seed}" for run in runs.itertuples()] == RUNS
    text = runs[runs["task"] != "forecaster"]
    series = runs[runs["task"] == "forecaster"]
    assert text["test_accuracy"].between(0, 1).all() and text["test_mse"].isna().all()
    assert series["test_accuracy"].isna().all()
    assert (series[["test_mse", "test_mae"]] > 0).all(axis=None)
    sizes = dict(zip(text["model"], text["recurrent_parameters"]))
    assert sizes == {"RNN": 15_200, "LSTM": 60_800, "GRU": 45_600}


def test_summary_table(quick_run):
    scores = table(quick_run, "summary")
    assert ",".join(scores) == "task,name,kind,metric,mean,std,n"
    assert set(scores["kind"]) == {"model", "baseline", "ceiling"}
    assert set(scores["metric"]) == {"accuracy", "loss", "mse", "mae"}
    assert (scores["n"] == 1).all() and scores["std"].isna().all()
    assert set(scores[scores["kind"] != "model"]["name"]) == {
        *("majority class", "naive Bayes, words", "naive Bayes, word pairs", "Bayes decision"),
        *("unigram", "bigram", "trigram", "log-linear", "full state"),
        *("persistence", "linear autoregression", "nearest neighbours", "exact filter"),
    }
    runs = table(quick_run, "runs").set_index(["task", "model"])
    for row in scores[scores["kind"] == "model"].itertuples():
        assert row.mean == pytest.approx(runs.loc[(row.task, row.name), f"test_{row.metric}"])


def test_comparisons_table(quick_run):
    found = table(quick_run, "comparisons")
    assert ",".join(found) == "task,metric,a,b,difference,low,high,verdict"
    assert found[["low", "high"]].isna().all(axis=None)
    means = table(quick_run, "summary").set_index(["task", "metric", "name"])["mean"]
    for row in found.itertuples():
        expected = means[row.task, row.metric, row.a] - means[row.task, row.metric, row.b]
        assert row.difference == pytest.approx(expected, abs=1e-6)
    pairs = found.groupby(["task", "metric"]).size().to_dict()
    expected = [
        *[
            (task, metric)
            for task in ("classifier", "predictor")
            for metric in ("accuracy", "loss")
        ],
        *[("forecaster", metric) for metric in ("mse", "mae")],
    ]
    assert pairs == dict.fromkeys(expected, 6)  # three pairs of models, each with a baseline


def test_history_is_a_table(quick_run):
    history = table(quick_run, "history")
    runs = table(quick_run, "runs").set_index(["task", "model"])
    assert list(history) == ["task", "model", "seed", "epoch", "split", "metric", "value"]
    losses = history.query("split == 'validation' and metric == 'loss'")
    best = losses.groupby(["task", "model"])["value"].min()
    assert best.to_numpy() == pytest.approx(runs.loc[best.index, "val_loss"].to_numpy())


def test_predictions_agree_with_the_scores(quick_run):
    runs = table(quick_run, "runs").set_index(["task", "model"])
    for task in rnn.TASKS:
        found = pd.read_csv(quick_run / "predictions" / f"{task}_seed42.csv")
        assert {"truth", *rnn.DEFAULT_MODELS} < set(found)
        for model in rnn.DEFAULT_MODELS:
            tested = runs.loc[(task, model)]
            if task == "forecaster":
                errors = (found[model] - found["truth"]) ** 2
                assert errors.mean() == pytest.approx(tested["test_mse"], rel=1e-4)
            else:
                hits = found[model] == found["truth"]
                assert hits.mean() == pytest.approx(tested["test_accuracy"])
                assert found[f"{model} probability"].between(0, 1).all()


def test_markdown_summary_names_every_model_and_reference(quick_run):
    words = ["RNN", "LSTM", "GRU", "naive Bayes", "trigram", "persistence", "perplexity"]
    for word in (*words, torch.__version__, *(task.question for task in rnn.TASKS.values())):
        assert word in summary(quick_run)


def test_checkpoints_give_the_outputs_of_the_run(quick_run, data):
    for name in RUNS:
        model = rnn.load_checkpoint(quick_run / "models" / f"{name}.pt")
        task = rnn.TASKS[name.partition("_")[0]]
        assert type(model) is task.models[name.split("_")[1]]
        tested = task.build_data(rnn.QUICK[task.name], 42)
        answers = rnn.evaluate(model, task, tested.test)
        again = task.measure(answers["loss"], answers["score"], tested.unit)
        assert again == pytest.approx(model.metrics, rel=1e-5)


def test_workers_and_slices_change_nothing_and_tell_of_their_progress(
    quick_run, tmp_path, no_figures, capfd
):
    models = ["--models", "RNN", "GRU"]
    assert quick(tmp_path, "--tasks", "predictor", *models, "--workers", 2) == 0
    error = capfd.readouterr().err
    for name in ("predictor_RNN_seed42", "predictor_GRU_seed42"):
        parallel = record_of(tmp_path, name)
        alone = record_of(quick_run, name)
        for record in (parallel, alone):
            del record["cost"], record["digest"]  # of the times as well
            for row in record["history"]:
                del row["seconds"]
        assert parallel == alone
        label = f"predictor_{alone['model']}_seed42  epoch "
        assert error.count(label) == 2
    assert not multiprocessing.active_children()


def diverge(monkeypatch):
    """Make every run of the forecaster diverge."""
    honest = rnn.fit

    def fit(model, task, *arguments):
        if task is rnn.FORECASTER:
            raise rnn.Diverged("the loss is not finite")
        return honest(model, task, *arguments)

    monkeypatch.setattr(rnn, "fit", fit)


def test_a_failed_run_is_status_1_and_keeps_what_was_finished(
    capsys, tmp_path, monkeypatch, no_figures
):
    diverge(monkeypatch)
    assert quick(tmp_path, "--tasks", "predictor", "forecaster", "--models", "RNN") == 1
    assert "failed: forecaster_RNN_seed42: the loss is not finite" in capsys.readouterr().err
    assert table(tmp_path, "runs")["task"].tolist() == ["predictor"]


def test_where_all_runs_fail_there_is_a_line_and_no_table(capsys, tmp_path, monkeypatch):
    diverge(monkeypatch)
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("pytorch_rnn_models.py: no run")
    assert not list(tmp_path.glob("pytorch_rnn_*"))


def test_report_is_made_from_the_records_alone(quick_run, tmp_path):
    copy_records(quick_run, tmp_path)
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    for name in PNGS | TABLES:
        assert (tmp_path / name).read_bytes() == (quick_run / name).read_bytes()


def test_a_report_without_the_baselines_leaves_them_out(quick_run, tmp_path):
    """As after an interruption, or where slices of the runs come from several machines."""
    absent = shutil.ignore_patterns("*baselines*", "forecaster*")
    copy_records(quick_run, tmp_path, absent)
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    assert set(table(tmp_path, "summary")["kind"]) == {"model"}
    assert not list(tmp_path.glob("*forecaster*"))
    assert (tmp_path / "pytorch_rnn_long_range.png").exists()


def test_no_cost_is_measured_where_no_model_is_left(quick_run, tmp_path, monkeypatch, no_figures):
    folder = shutil.copytree(quick_run, tmp_path / "done")
    monkeypatch.setattr(rnn, "measure_costs", None)
    assert quick(folder, "--resume") == 0
    (folder / "runs" / "forecaster_baselines_seed42.json").unlink()
    assert quick(folder, "--resume") == 0


def test_seeds_run_later_are_added_to_the_earlier_ones(tmp_path, no_figures):
    for seed in (5, 3):
        assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN", "--seeds", seed) == 0
    runs = table(tmp_path, "runs")
    assert runs["seed"].tolist() == [3, 5]
    assert "3, 5" in summary(tmp_path) and "One seed" not in summary(tmp_path)
    scores = table(tmp_path, "summary").query("metric == 'mse'").set_index("name")
    expected = runs["test_mse"].agg(["mean", "std", "count"])
    assert scores.loc["RNN", ["mean", "std", "n"]].tolist() == pytest.approx(expected.tolist())
    again = ["--tasks", "forecaster", "--models", "RNN", "--seeds", 3, "--learning-rate", 0.5]
    assert quick(tmp_path, *again) == 0
    assert "mix runs at different learning rates" in summary(tmp_path)


def test_terminal_output(capsys, tmp_path, no_figures):
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "GRU") == 0
    printed, progress = capsys.readouterr()
    assert all(
        word in printed for word in ("Time-series forecasting", "persistence", str(tmp_path))
    )
    line = r"forecaster_GRU_seed42  epoch  2  train/val loss [\d.]+/[\d.]+, mse [\d.]+/"
    assert re.search(line, progress)
    assert re.search(r"forecaster_GRU_seed42  done \(2 of 2, \S+ left\)", progress)
    assert "\r" not in progress, "no bar where there is no terminal"


def test_a_folder_that_cannot_be_written_is_one_line_and_status_1(capsys, tmp_path):
    (tmp_path / "FILE").write_text("")
    assert quick(tmp_path / "FILE" / "below", "--tasks", "forecaster") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "below: cannot be written" in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_one_bar_fits_a_terminal_of_80_columns(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    parent, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [*SCRIPT, *ONE_RUN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal)
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
    assert any(re.match(r"all runs +\d+%\|.*\| \S+ passed, \S+ left", line) for line in bars)
    assert max(map(len, bars)) <= 80
    assert any("forecaster_RNN_seed42  epoch  1  train/val loss" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "clasifier"], "'clasifier': choose from classifier, predictor, forecaster"),
        (["--models", "lstm"], "'lstm': choose from RNN, LSTM, GRU"),
        (["--model", "GRU"], "--model GRU"),
        (["--seeds", "1", "x" * 10_000], "..."),
        (["--corpus", "a\x1b[31m\r\nb\u202e"], "a\\x1b[31m\\r\\nb\\u202e: cannot be read (No such"),
        (["--corpus", ""], ": cannot be read (No such file"),
        (["--seed", "3"], "--seed goes with --predict"),
        (["--seeds", "-1"], "--seeds -1"),
        (["--seeds", "1.5"], "'1.5'"),
        (["--seeds", str(2**64)], "--seeds"),
        (["--epochs", "0"], "--epochs 0"),
        (["--epochs", "9" * 308], "--epochs"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--device", "mps"], "there is none here"),
        (["--report", "--output-dir", "EMPTY"], "train first"),
        (["--learning-rate", "0"], "--learning-rate 0"),
        (["--learning-rate", "fast"], "'fast'"),
        (["--hidden-dim", "0"], "--hidden-dim 0"),
        (["--hidden-dim", str(2**63)], "--hidden-dim"),
        (["--tune", "--learning-rate", "0.1"], "--tune cannot go together with --report or --l"),
        (["--tune", "--report"], "--tune cannot go together with --report or --learning-rate"),
        (["--tune", "--predict", "a.pt", "b"], "--predict cannot go together"),
        (["--text-column", "x"], "a column goes with --reviews or --predict"),
        (["--series-column", "x"], "a column goes with --series or --predict"),
        (["--window", "5", "--tasks", "classifier"], "--window is for predictor and forecaster"),
        (["--tasks", "predictor", "--reviews", "f.csv"], "--reviews is for the classifier"),
        (["--quick", "--series", "FILE", "--series-column", "u"], "no column 'u'"),
        (["--reviews", "."], ".: cannot be read (Is a directory)"),
        (["--series", "a" * 252 + ".csv"], "aaa.csv: cannot be read"),
        (["--corpus", "broken.gz"], "broken.gz: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rnn, "complete_runs", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("day,temperature\nmon,1\ntue,2\n")
    (tmp_path / "broken.gz").write_bytes(b"no gzip at all")
    assert message in refusal(arguments, capsys)


def test_an_interrupted_run_is_status_130_and_still_names_what_failed(
    tmp_path, monkeypatch, capsys
):
    errors = iter([RuntimeError("beyond all bounds"), KeyboardInterrupt])

    def interrupted(*_):
        raise next(errors)

    monkeypatch.setattr(rnn, "fit", interrupted)
    assert quick(tmp_path, "--tasks", "classifier", "--models", "RNN", "GRU") == 130
    *_, failed, last = capsys.readouterr().err.splitlines()
    assert re.match(r"failed: classifier_(RNN|GRU)_seed42: beyond all bounds \(2 of 3, ", failed)
    assert "interrupted" in last and "--resume" in last and "--report" in last


def test_a_container_may_grant_less_than_the_machine_has(monkeypatch):
    def cores(quota):
        monkeypatch.setattr(rnn.Path, "read_text", lambda _: quota)
        return rnn.usable_cores()

    all_cores = cores("max 100000")
    assert all_cores >= 1 and cores("9900000 100000") == all_cores
    assert cores("50000 100000") == 1
    monkeypatch.undo()
    assert 1 <= rnn.usable_cores() <= all_cores


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are bytes")
def test_a_file_name_that_is_no_utf_8_goes_from_option_to_summary_and_figures(tmp_path):
    series = os.fsdecode(os.fsencode(tmp_path) + b"/no-\xff.csv")
    with open(series, "w") as file:  # noqa: PTH123 (a name in bytes)
        file.writelines(f"{i % 7}\n" for i in range(500))
    models = ["--tasks", "forecaster", "--models", "RNN"]
    assert quick(tmp_path / "out", *models, "--epochs", 1, "--series", series) == 0
    assert "no-" in summary(tmp_path / "out")


def test_help_names_every_option_of_run(capsys):
    assert rnn.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in inspect.signature(rnn.run).parameters:
        assert f"--{name.replace('_', '-')}" in text


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(rnn.os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: {str(target)!r}")):
        rnn.write_whole(target, "half of the n")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_run_returns_the_scores_the_examples_and_the_figures(tmp_path, no_figures):
    results = rnn.run(
        tasks=["forecaster"], models=["RNN"], seeds=[1, 2], quick=True, output_dir=tmp_path
    )
    assert list(results.scores) == ["task", "name", "kind", "seed", "metric", "value"]
    assert set(results.scores["seed"]) == {1, 2} and results.failed == 0
    model = results.examples.query("name == 'RNN' and seed == 1")
    expected = results.scores.query("name == 'RNN' and seed == 1 and metric == 'mae'")["value"]
    errors = (model["answer"].astype(float) - model["truth"]).abs()
    assert errors.mean() == pytest.approx(expected.item(), rel=1e-4)
    assert set(results.figures) >= {"performance_summary", "time_series_predictions"}
    with pytest.raises(rnn.InputError, match="'forecast'"):
        rnn.run(tasks=["forecast"])


# --- devices ---------------------------------------------------------------------------


def test_auto_takes_no_device_that_is_visible_and_does_not_work(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rnn.choose_device("auto") == rnn.CPU
    assert "CUDA is there" in capsys.readouterr().err


def test_settings_are_put_back_after_a_run(tmp_path, no_figures):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN") == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before[0])
    assert torch.are_deterministic_algorithms_enabled() == before[1]


def test_runs_of_different_devices_in_one_folder_are_said(quick_run, tmp_path, no_figures):
    shutil.copytree(quick_run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "forecaster_GRU_seed42.json"
    record = json.loads(path.read_text())
    record["environment"]["device"] = "some GPU"
    del record["digest"]
    path.write_text(rnn.with_digest(record))
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    assert "device: cpu, some GPU" in summary(tmp_path)


# --- the README and the committed results ---------------------------------------------


def plain(text):
    """A table without its bold marks and padding."""
    return re.sub(r" +", " ", re.sub(r"-{3,}", "---", text.replace("*", "")))


def test_the_readme_fits_its_limit_and_shows_the_committed_tables():
    assert len(README.splitlines()) <= 155
    parts = re.findall(r"<!-- (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert len(parts) == 2, "the scores, and what is commonly said"
    for path, part in parts:
        committed = plain((ROOT / path).read_text(encoding="utf-8"))
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert len(rows) > 10
        for row in rows:
            assert plain(row) in committed, row


def test_bold_in_the_readme_are_the_models_that_are_better_than_the_best_baseline():
    found = table(ROOT / "outputs" / "reference", "comparisons")
    first = found["metric"].isin(["accuracy", "mse"]) & ~found["b"].isin(rnn.CELLS)
    better = [
        row.a for row in found[first].itertuples() if row.verdict.startswith(f"{row.a} better")
    ]
    bold = re.findall(r"^\| (\w+) +\| model +\| \*\*[^*]+\*\*", README, re.MULTILINE)
    assert bold == better


def test_the_readme_names_the_command_of_the_committed_runs():
    seeds = table(ROOT / "outputs" / "reference", "runs")["seed"].unique()
    assert " ".join(map(str, seeds)) in README


@pytest.mark.parametrize(("folder", "seeds"), [("reference", 10), ("unseen_seeds", 5)])
def test_committed_results_hold_every_run_and_lie_in_the_expected_bands(folder, seeds):
    runs = table(ROOT / "outputs" / folder, "runs")
    assert (
        len(runs) == 12 * seeds
        and runs.groupby(["task", "model"])["seed"].nunique().eq(seeds).all()
    )
    accuracy = runs.groupby(["task", "model"])["test_accuracy"].mean()
    assert 0.75 <= accuracy["classifier", "LSTM"] <= 0.85
    assert 0.70 <= accuracy["classifier", "GRU"] <= 0.82
    assert 0.60 <= accuracy["classifier", "RNN"] <= 0.70
    assert 0.40 <= accuracy["predictor", "LSTM"] <= 0.60
    assert accuracy["predictor", "RNN"] < accuracy["predictor", "LSTM"]
    scores = table(ROOT / "outputs" / folder, "summary")
    for task, rows in scores[scores["metric"].isin(["accuracy", "mse"])].groupby("task"):
        values = rows.set_index("name")["mean"] * (-1 if task == "forecaster" else 1)
        ceiling = values[rows[rows["kind"] == "ceiling"]["name"]].max()
        assert (values <= ceiling).all(), f"a score above the ceiling of the {task}"
