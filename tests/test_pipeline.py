"""The whole pipeline on the quick configuration: files, tables, page, resuming, refusals, use."""

import inspect
import multiprocessing
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT, SCRIPT, quick, table, tables

README = (ROOT / "README_pytorch.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "outputs" / "reference"
FIGURES = """performance_summary long_range time_series_predictions classifier_errors
    classifier_training_history predictor_training_history forecaster_training_history
    parameter_counts architectures""".split()
ONE_RUN = ["--tasks", "forecaster", "--models", "RNN"]
RUNS = [f"{t}_{m}_seed{s}" for t in rnn.TASKS for m in rnn.DEFAULT_MODELS for s in (1, 2)]


def test_a_run_leaves_every_file_of_the_contract_and_no_other(quick_run):
    found = {str(path.relative_to(quick_run)) for path in quick_run.rglob("*") if path.is_file()}
    seeds = [f"{task}_{{}}seed{seed}" for task in rnn.TASKS for seed in (1, 2)]
    expected = {f"pytorch_rnn_{name}.png" for name in FIGURES}
    for name in ("runs", "history", "summary", "comparisons", "costs"):
        expected.add(f"pytorch_rnn_{name}.csv")
    expected |= {"pytorch_rnn_report.html", "pytorch_rnn_summary.md"}
    expected |= {f"runs/{name}.json" for name in RUNS}
    expected |= {f"runs/{name.format('baselines_')}.json" for name in seeds}
    expected |= {f"models/{name}.pt" for name in RUNS}
    expected |= {f"predictions/{name.format('')}.csv" for name in seeds}
    assert found == expected
    for name in FIGURES:
        assert (quick_run / f"pytorch_rnn_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_have_their_columns_and_agree(quick_run):
    runs = table(quick_run, "runs")
    columns = "task,model,seed,learning_rate,parameters,recurrent_parameters,epochs,best_epoch"
    tests = "test_loss,test_accuracy,test_mse,test_mae"
    assert ",".join(runs) == f"{columns},seconds,val_loss,{tests}"
    assert [f"{run.task}_{run.model}_seed{run.seed}" for run in runs.itertuples()] == RUNS
    assert runs.groupby("task")["test_mse"].count().to_dict() == {
        "classifier": 0,
        "predictor": 0,
        "forecaster": 6,
    }
    history = table(quick_run, "history")
    first = "task,model,seed,epoch,learning_rate,seconds,ms_per_step,gradient_norm"
    assert ",".join(history).startswith(f"{first},train_loss,validation_loss,train_accuracy,")
    best = history.groupby(["task", "model", "seed"])["validation_loss"].min()
    expected = runs.set_index(["task", "model", "seed"])["val_loss"]
    assert best[expected.index].tolist() == pytest.approx(expected.tolist())

    scores = table(quick_run, "summary")
    assert ",".join(scores) == "task,name,kind,metric,mean,std,n"
    assert set(scores["metric"]) == {"accuracy", "loss", "mse", "mae"} and (scores["n"] == 2).all()
    names = scores[scores["kind"] != "model"].groupby("task")["name"].unique().map(set)
    expected = {"majority class", "naive Bayes", "recency network", "Bayes decision"}
    assert names["classifier"] == expected
    text = {"unigram", "bigram", "trigram", "log-bilinear", "full state"}
    assert names["predictor"] == text
    series = {"persistence", "linear autoregression", "feed-forward", "exact filter"}
    assert names["forecaster"] - {"seasonal naive"} == series
    means = scores.set_index(["task", "name", "metric"])["mean"]
    for (task, model), of_model in runs.groupby(["task", "model"]):
        for metric in (*rnn.TASKS[task].metrics, "loss"):
            expected = pytest.approx(of_model[f"test_{metric}"].mean())
            assert means[task, model, metric] == expected

    comparisons = table(quick_run, "comparisons")
    assert ",".join(comparisons) == "task,metric,a,b,difference,low,high,wins,verdict"
    assert comparisons.groupby("task").size().tolist() == [6, 6, 6]
    for row in comparisons.itertuples():
        expected = means[row.task, row.a, row.metric] - means[row.task, row.b, row.metric]
        assert row.difference == pytest.approx(expected, abs=1e-6)
        better = {True: "undecided"}.get(row.low <= 0 <= row.high)
        assert row.verdict == better or row.verdict in (f"{row.a} better", f"{row.b} better")
    costs = table(quick_run, "costs")
    sizes = "task,model,parameters,recurrent_parameters,ms_per_step"
    assert ",".join(costs) == f"{sizes},samples_per_second,activation_bytes" and len(costs) == 9


def test_the_page_begins_with_what_was_found_and_needs_no_other_file(quick_run):
    page = (quick_run / "pytorch_rnn_report.html").read_text(encoding="utf-8")
    titles = [task.title for task in rnn.TASKS.values()]
    assert re.findall(r"<h2>(.*?)</h2>", page)[:4] == [*titles, "Figures"]
    sources = re.findall(r"src='(.{22})", page)
    assert sources == ["data:image/png;base64,"] * len(FIGURES)
    markdown = (quick_run / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*?\]\((.*?)\)", markdown)[0] == "pytorch_rnn_performance_summary.png"
    for word in ("naive Bayes", "persistence", "ceiling", "undecided", torch.__version__):
        assert word in markdown


def test_the_terminal_shows_progress_the_small_tables_and_where_the_page_is(
    tmp_path, capsys, no_figures
):
    assert quick(tmp_path, "--tasks", "forecaster") == 0
    printed, progress = capsys.readouterr()
    line = r"forecaster_GRU_seed42  epoch  2  train/val loss [\d.]+/[\d.]+ mae [\d.]+/"
    assert re.search(line, progress) and "forecaster_RNN_seed42  done (4 of 4)" in progress
    assert "\r" not in progress, "no bar where there is no terminal"
    assert str(tmp_path / "pytorch_rnn_report.html") in printed and "exact filter" in printed
    assert len(printed.splitlines()) <= 20


def test_workers_slices_and_resuming_change_nothing(quick_run, tmp_path, no_figures, capfd):
    """Of one task, beside the same task of the whole run."""
    settings = ["--seeds", 1, 2, "--tasks", "forecaster", "--models"]
    assert quick(tmp_path, *settings, "RNN", "LSTM", "--workers", 2) == 0
    assert quick(tmp_path, *settings, "GRU") == 0
    error = capfd.readouterr().err
    assert error.count("forecaster_RNN_seed1  epoch ") == 2
    assert not multiprocessing.active_children() and "GLIBC_TUNABLES" not in os.environ
    assert tables(tmp_path) == tables(quick_run, "forecaster")

    (tmp_path / "runs" / "forecaster_RNN_seed1.json").unlink()
    record = tmp_path / "runs" / "forecaster_GRU_seed2.json"
    record.write_text(record.read_text()[:-9])
    (tmp_path / "models" / "forecaster_LSTM_seed1.pt").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("models/*.pt")}
    assert quick(tmp_path, *settings, *rnn.DEFAULT_MODELS, "--resume") == 0
    written = {path.stem for path in before if path.stat().st_mtime_ns != before[path]}
    assert written == {"forecaster_RNN_seed1", "forecaster_GRU_seed2"}
    assert (tmp_path / "models" / "forecaster_LSTM_seed1.pt").exists()
    assert tables(tmp_path) == tables(quick_run, "forecaster")
    assert quick(tmp_path, *settings, "GRU") == 0
    assert "finished runs are trained again; --resume would keep them" in capfd.readouterr().err


def made_up_fit(monkeypatch, losses):
    """Make `fit` return a history with the loss that `losses(rate, seed)` gives."""
    fitted = []

    def fit(model, task, data, config, learning_rate, seed, weight_decay=0.0, on_epoch=None):
        loss = losses(learning_rate, seed)
        fitted.append((type(model).__name__, learning_rate, seed))
        if loss is None:
            raise rnn.Diverged("the loss is not finite")
        row = {"epoch": 1, "learning_rate": learning_rate, "validation_loss": loss}
        times = {"seconds": 1.0, "ms_per_step": 1.0, "gradient_norm": 1.0}
        return [{**row, **times, "train_loss": loss, "train_mae": 1.0, "validation_mae": 1.0}]

    monkeypatch.setattr(rnn, "fit", fit)
    return fitted


def test_the_rate_with_the_lowest_mean_validation_loss_is_chosen(tmp_path, monkeypatch, no_figures):
    table_of_losses = {3e-4: (5, 5), 1e-3: (1, 6), 3e-3: (3, 3), 1e-2: (0, None)}
    fitted = made_up_fit(monkeypatch, lambda rate, seed: table_of_losses[rate][seed])
    settings = {"tasks": ["forecaster"], "models": ["RNN"], "seeds": [0, 1], "tune": True}
    results = rnn.run(quick=True, output_dir=tmp_path, **settings)
    assert results.runs["learning_rate"].tolist() == [3e-3, 3e-3] and results.failed == 0
    chosen = table(tmp_path, "tuning").query("chosen")
    assert chosen["learning_rate"].tolist() == [3e-3, 3e-3] and len(results.tuning) == 8
    trained = [run for run in fitted if run[0] == "RNNForecaster"]
    assert len(trained) == 8, "what tuning has trained is not trained again"
    rnn.run(quick=True, output_dir=tmp_path, resume=True, **settings)
    again = [run for run in fitted if run[0] == "RNNForecaster"][8:]
    assert again == [("RNNForecaster", 1e-2, 1)], "only what failed is tried again"


def test_a_failed_run_is_named_and_costs_the_others_nothing(
    tmp_path, monkeypatch, no_figures, capsys
):
    losses = {"RNNForecaster": None}
    honest = rnn.fit

    def fit(model, *arguments):
        if losses.get(type(model).__name__, 1) is None:
            raise rnn.Diverged("the loss is not finite")
        return honest(model, *arguments)

    monkeypatch.setattr(rnn, "fit", fit)
    arguments = ["--tasks", "predictor", "forecaster", "--models", "RNN"]
    assert quick(tmp_path, *arguments) == 1
    assert "failed: forecaster_RNN_seed42: the loss is not finite" in capsys.readouterr().err
    assert table(tmp_path, "runs")["task"].tolist() == ["predictor"]
    assert quick(tmp_path / "alone", *ONE_RUN) == 1
    assert "no run is finished" in capsys.readouterr().err.splitlines()[-1]


def test_another_configuration_in_the_same_folder_is_refused(quick_run, tmp_path, capsys):
    shutil.copytree(quick_run / "runs", tmp_path / "runs")
    assert quick(tmp_path, *ONE_RUN, "--window", 20) == 2
    assert "window (50, not 20)" in capsys.readouterr().err
    assert not (tmp_path / "pytorch_rnn_runs.csv").exists()


def test_a_report_is_made_from_the_records_alone(quick_run, tmp_path, no_figures):
    shutil.copytree(quick_run / "runs", tmp_path / "runs")
    (tmp_path / "predictions").mkdir()
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    for path in quick_run.glob("pytorch_rnn_*.csv"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be_written_or_drawn_costs_the_others_nothing(
    quick_run, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(quick_run, tmp_path / "out")
    for path in folder.glob("pytorch_rnn_*"):
        path.unlink()
    (folder / "pytorch_rnn_runs.csv").mkdir()  # as a table that is open in a spreadsheet

    def broken(_results):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setitem(rnn.FIGURES, "parameter_counts", (broken, "", ""))
    assert rnn.main(["--report", "--output-dir", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "parameter_counts could not be drawn: no such luck" in error
    assert "pytorch_rnn_runs.csv could not be written" in error and error.count("\n") == 2
    missing = {p.name for p in quick_run.glob("pytorch_rnn_*")} - {p.name for p in folder.iterdir()}
    assert missing == {"pytorch_rnn_parameter_counts.png"}


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"task": "chess"}', '{"task": "pre'])
def test_whatever_lies_among_the_records_is_named_and_left_out(
    content, quick_run, tmp_path, capsys, no_figures
):
    shutil.copytree(quick_run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "forecaster_RNN_seed1.json"
    path.write_text(content)
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    assert path.name in capsys.readouterr().err
    assert len(table(tmp_path, "runs")) == len(RUNS) - 1


REFUSED = [
    (["--tasks", "clasifier"], "'clasifier'"),
    (["--models", "lstm"], "'RNN', 'LSTM', 'GRU'"),
    (["--seeds", "-1"], "-1"),
    (["--epochs", "0"], "epochs 0"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--device", "tpu"], "tpu"),
    (["--report", "--output-dir", "EMPTY"], "no run is finished"),
    (["--learning-rate", "fast"], "'fast'"),
    (["--dropout", "1.5"], "dropout 1.5"),
    (["--tune", "--learning-rate", "0.1"], "--tune cannot go together"),
    (["--tune", "--predict", "a.pt", "b"], "tune: cannot go together with --predict"),
    (["--length", "3"], "length"),
    (["--text-column", "x"], "--reviews"),
    (["--window", "5", "--tasks", "classifier"], "window: no setting of classifier"),
    (["--tasks", "predictor", "--reviews", "FILE"], "reviews: no setting of predictor"),
    (["--predict", "none.pt", "b"], "none.pt"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("text,label\na,1\nb,2\n")
    assert rnn.main(arguments) == 2
    printed, error = capsys.readouterr()
    assert not printed and error.startswith("pytorch_rnn_models.py: ") and message in error
    assert error.count("\n") == 1 and len(error) < 320


@pytest.mark.parametrize(
    "settings",
    [
        {"models": "IRNN"},
        {"tasks": []},
        {"no_such_setting": 1},
    ],
)
def test_run_refuses_arguments_of_the_wrong_kind(settings, tmp_path):
    with pytest.raises(rnn.InputError, match=next(iter(settings))):
        rnn.run(quick=True, output_dir=tmp_path, **settings)


def test_numbers_of_numpy_are_numbers(tmp_path, no_figures):
    settings = {"tasks": ["forecaster"], "models": ["RNN"], "quick": True, "output_dir": tmp_path}
    results = rnn.run(
        seeds=np.arange(2), hidden_dim=np.int64(4), clip_norm=np.float32(2), **settings
    )
    assert results.runs["seed"].tolist() == [0, 1]


def test_help_names_every_option_of_run_and_every_setting(capsys):
    assert rnn.main(["--help"]) == 0
    text = capsys.readouterr().out
    options = [*inspect.signature(rnn.run).parameters][:-1]
    for config in rnn.DEFAULT.values():
        options += config.numbers()
    for option in options:
        assert f"--{option.replace('_', '-')}" in text


def test_predict_answers_for_texts_and_files(quick_run, tmp_path, capsys):
    models = quick_run / "models"
    (tmp_path / "reviews.csv").write_text("id,text\n1,I found plot moving\n2,nothing\n")
    (tmp_path / "series.csv").write_text("y\n" + "\n".join(map(str, np.sin(range(60)))))
    calls = {
        "classifier": (
            "I found plot moving",
            r"negative,positive,knows,text\n0\.\d+,0\.\d+,4 of 4 words,I",
        ),
        "predictor": ("the sailor near the", r"(\S+ +0\.\d+\s+){5}\S+"),
        "forecaster": (tmp_path / "series.csv", r"step,value\n1,-?\d"),
    }
    for task, (source, expected) in calls.items():
        assert rnn.main(["--predict", str(models / f"{task}_GRU_seed1.pt"), str(source)]) == 0
        assert re.match(expected, capsys.readouterr().out)
    path = str(tmp_path / "reviews.csv")
    assert rnn.main(["--predict", str(models / "classifier_GRU_seed1.pt"), path]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "negative,positive,knows,text"


def test_the_same_seed_gives_the_same_numbers_whatever_the_hash_seed_and_the_threads(tmp_path):
    processes = []
    for name, environment in (("1", {"PYTHONHASHSEED": "1"}), ("2", {"OMP_NUM_THREADS": "1"})):
        command = [*SCRIPT, "--quick", "--models", "GRU", "--tasks", "classifier", "forecaster"]
        command += ["--output-dir", str(tmp_path / name)]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, env={**os.environ, **environment}, **options))
    assert [process.wait() for process in processes] == [0, 0]
    assert tables(tmp_path / "1") == tables(tmp_path / "2")


# --- what is committed ----------------------------------------------------------------


def test_the_readme_fits_its_limit_and_shows_the_committed_tables():
    assert len(README.splitlines()) <= 110
    summary = (REFERENCE / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if re.search(r"\d ± \d", line)]
    assert len(rows) >= 18
    for row in rows:
        assert row in summary, row


def test_committed_results_hold_every_run_and_lie_in_the_expected_bands():
    runs = table(REFERENCE, "runs")
    assert len(runs) == 120 and runs["seed"].nunique() == 10
    accuracy = 100 * runs.groupby(["task", "model"])["test_accuracy"].mean()
    assert 60 <= accuracy["classifier", "RNN"] <= 70 and 75 <= accuracy["classifier", "LSTM"] <= 85
    assert 70 <= accuracy["classifier", "GRU"] <= 80 and 40 <= accuracy["predictor", "LSTM"] <= 60
    sizes = runs.query("task != 'forecaster'").groupby("model")["recurrent_parameters"].max()
    assert sizes.to_dict() == {"RNN": 15_200, "LSTM": 60_800, "GRU": 45_600, "IRNN": 15_200}


def test_the_readmes_commands_are_options_of_the_script(capsys):
    assert rnn.main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = re.findall(r"pytorch_rnn_models\.py (--.*)|`(--[^`]*)`", README)
    flags = set(re.findall(r"--[a-z-]+", " ".join(map("".join, lines))))
    assert len(flags) > 10
    for flag in flags:
        assert flag in text, flag
