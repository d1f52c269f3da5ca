"""A user's own files and questions: spreadsheets, doubts in words, labels, predictions, results in Python."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import pytorch_rnn_models as rnn
from conftest import ROOT, quick, refusal, summary, table
from test_own_data import BAD, GOOD, reviews_csv, series_csv

ONE = ["--quick", "--models", "GRU", "--epochs", "1", "--workers", "1", "--output-dir"]


def stars_csv(n=150):
    """Reviews with ratings 1 to 5, each with words of its own."""
    words = ["awful", "poor", "fair", "good", "superb"]
    return "review;stars\n" + "\n".join(f"It was {words[i % 5]}, number {i};{i % 5 + 1}.0" for i in range(n))


def monthly_csv(n=144):
    """A short series with a trend, a season of twelve and a decimal comma."""
    months = pd.period_range("1949-01", periods=n, freq="M")
    values = 100 + 2 * np.arange(n) + 30 * np.sin(np.arange(n) * 2 * np.pi / 12)
    return "month;passengers\n" + "\n".join(f"{m};{v:.1f}".replace(".", ",") for m, v in zip(months, values))


@pytest.fixture
def run_on(tmp_path, capsys, no_figures):
    """Runs one quick model on a file; returns what was printed and the output folder."""

    def go(option, content, *more):
        (tmp_path / "my.csv").write_text(content, encoding="utf-8")
        task = {"reviews": "classifier", "series": "forecaster", "corpus": "predictor"}[option]
        arguments = [f"--{option}", str(tmp_path / "my.csv"), "--tasks", task, *more]
        assert rnn.main([*ONE, str(tmp_path / "out"), *arguments]) == 0
        return capsys.readouterr(), tmp_path / "out"

    return go


# --- spreadsheets as they come --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "columns", "names"),
    [
        ("Text,Label\na,pos\nb,neg\n", (), ["neg", "pos"]),
        ("review,sentiment\na,Positive\nb,negative\nc,positive\n", (), ["negative", "positive"]),
        ("review;stars\na;5\nb;1\nc;10\n", (), ["1", "5", "10"]),
        ("id,body,mark\n1,a,0\n2,b,1.0\n3,c,1\n", ("body", "mark"), ["0", "1"]),
    ],
)
def test_reviews_under_the_usual_names_or_the_named_ones(text, columns, names):
    reviews = rnn.read_reviews(text, *columns)
    assert list(reviews.names) == names and reviews.texts[:2] == ["a", "b"]
    assert sorted(set(reviews.labels)) == list(range(len(names)))


def test_decimal_commas_need_another_separator():
    values, doubts = rnn.read_series("day;t\nmon;1,5\ntue;-2,25\nwed;3\n")
    assert values.tolist() == [1.5, -2.25, 3] and not doubts
    assert rnn.read_series("wert\n1,5\n2,5\n")[0].tolist() == [1.5, 2.5]
    assert rnn.read_series("Datum;Umsatz, EUR\n01.01.2020;0,5\n02.01.2020;1,5\n")[0].tolist() == [0.5, 1.5]
    assert rnn.read_series("2020-01-01;1,5;\n2020-01-02;2,5;\n")[0].tolist() == [1.5, 2.5]
    _, [doubt] = rnn.read_series("d\tn\na\t990\nb\t1,000\nc\t1,005\n")
    assert doubt.startswith("'1,000' is read with a decimal comma")
    with pytest.raises(rnn.InputError, match=re.escape("2 numeric columns among 1, 2 (separated by commas)")):
        rnn.read_series("1.5,1\n2.5,2\n")


def test_a_column_without_a_name_a_header_alone_and_rows_of_nothing():
    assert rnn.read_series("date,\n2020-01-01,5\n2020-01-02,6\n")[0].tolist() == [5, 6]
    assert rnn.read_series("d;x\na;1\nb;2\n;\n;\n")[0].tolist() == [1, 2]
    with pytest.raises(rnn.InputError, match="no row below the header"):
        rnn.read_series("date,value\n", "value")


def test_predict_puts_the_answer_beside_each_text_of_a_csv(run_on, capsys, tmp_path):
    _, out = run_on("reviews", reviews_csv())
    checkpoint = out / "models" / "classifier_GRU_seed42.pt"
    (tmp_path / "new.csv").write_text('id,Text\n1,"It was fine,\nall of it"\n2,dull\n3,\n', encoding="utf-8")
    assert rnn.main(["--predict", str(checkpoint), str(tmp_path / "new.csv")]) == 0
    (tmp_path / "answers.csv").write_text(capsys.readouterr().out)
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert list(answers) == ["label", "probability", "text"]
    assert answers["text"].tolist()[:2] == ["It was fine,\nall of it", "dull"] and answers["label"].tolist()[2] == "-"


# --- what may mislead -----------------------------------------------------------------


def test_dates_that_fall_and_a_last_row_of_totals_are_said():
    rows = [f"{day:%d/%m/%Y},{i % 7}" for i, day in enumerate(pd.date_range("2020-01-01", periods=60))]
    assert rnn.read_series("\n".join(["day,t", *rows]))[1] == []
    _, [fall] = rnn.read_series("\n".join(["day,t", *rows[::-1]]))
    assert "the dates fall at row 3;" in fall
    for few in (
        ["2020-03-28T00:00:00+01:00,1", "2020-03-30T00:00:00+02:00,2"],
        ["12:00,1", "11:00,2"],
        ["Feb,1", "Jan,2"],
    ):
        assert rnn.read_series("\n".join(["when,t", *few]))[1] == []
    rows[40], rows[41] = rows[41], rows[40]
    _, [fall] = rnn.read_series("\n".join(["day,t", *rows]))
    assert "the dates fall at row 43;" in fall
    _, [fall] = rnn.read_series("year,n\n2001,5\n2000,6\n", "n")
    assert "the dates fall at row 3;" in fall
    rows[40], rows[41] = rows[41], rows[40]
    _, [total] = rnn.read_series("\n".join(["day,t", *rows, "Total,180"]))
    assert "the last row says 'Total'" in total


def test_a_test_part_outside_the_training_range_is_said_on_terminal_and_in_the_summary(run_on):
    trend = "t\n" + "\n".join(f"{i + np.sin(i):.3f}" for i in range(600))
    (_, progress), out = run_on("series", trend)
    said = "100% of the test part's values lie outside those of the training part"
    assert f"note: {said}" in progress and f"- Note: {said}" in summary(out)


def test_a_model_used_on_values_far_from_its_training_says_so(run_on, capsys, tmp_path):
    _, out = run_on("series", series_csv())
    checkpoint = out / "models" / "forecaster_GRU_seed42.pt"
    for content, notes in ((series_csv(), 0), ("t\n" + "9999\n10000\n" * 30, 1)):
        (tmp_path / "other.csv").write_text(content)
        assert rnn.main(["--predict", str(checkpoint), str(tmp_path / "other.csv"), "--length", "2"]) == 0
        assert capsys.readouterr().err.count("far from those of training") == notes


def test_a_classifier_no_better_than_the_majority_and_a_cap_on_epochs_are_said(run_on):
    rows = [f"It was {(GOOD, BAD)[i % 20 == 0][i % 4]}, number {i};{('pos', 'neg')[i % 20 == 0]}" for i in range(200)]
    printed, out = run_on("reviews", "text;label\n" + "\n".join(rows))
    for text in (" ".join(printed.out.split()), summary(out)):
        assert "GRU knows little more than how frequent the labels are" in text
        assert "1 of 1 runs ended at the cap on epochs" in text


# --- labels ---------------------------------------------------------------------------


def test_five_labels_go_from_file_to_figures(tmp_path, capsys):
    (tmp_path / "stars.csv").write_text(stars_csv())
    results = rnn.run(tasks=["classifier"], models=["LSTM", "GRU"], reviews=tmp_path / "stars.csv", quick=True,
                      epochs=30, learning_rate=0.02, output_dir=tmp_path / "out", workers=1)  # fmt: skip
    assert results.failed == 0 and isinstance(results.figures["classifier_errors"], Figure)
    model = rnn.load_checkpoint(tmp_path / "out" / "models" / "classifier_GRU_seed42.pt")
    assert model.head[0].out_features == 5 and model.preprocessing["labels"] == ["1", "2", "3", "4", "5"]
    assert model.predict("It was superb")[0][0] == "5" and model.predict("It was awful")[0][0] == "1"
    first = results.table.query("subset == 'all' and metric == 'accuracy'").set_index("name")["value"]
    assert first["GRU"] > 0.9 and first["naive Bayes"] > 0.9 and first["majority class"] <= 0.25
    text = (tmp_path / "out" / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert re.search(r"\| GRU +\| 5 +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\|", text) and "mean of the labels" in text


def test_every_split_has_its_share_of_each_label(tmp_path):
    rows = [f"{' '.join(GOOD)} {i};{'rare' if i % 10 == 0 else 'usual'}" for i in range(200)]
    (tmp_path / "my.csv").write_text("text;label\n" + "\n".join(rows))
    config = replace(rnn.QUICK["classifier"], file=rnn.user_file(str(tmp_path / "my.csv")))
    for seed in range(3):
        data = rnn.build_reviews(config, seed)
        for split in (data.train, data.validation, data.test):
            assert (split.targets == 0).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_precision_recall_and_f1_are_those_of_the_definition():
    evidence = {"labels": ["a", "b", "never tested"], "confusion": [[8, 2, 0], [1, 9, 0], [0, 0, 0]]}
    scores = rnn.label_scores(pd.DataFrame([{"model": "GRU", "evidence": evidence}])).set_index("label")
    assert scores.loc["a"].tolist()[1:] == pytest.approx([8 / 9, 0.8, 16 / 19])
    assert scores.loc["mean of the labels", "recall"] == pytest.approx(0.85), "nothing is known of a label never tested"


# --- results to work with -------------------------------------------------------------


def test_predictions_agree_with_the_scores(quick_run):
    for path in sorted((quick_run / "runs").glob("*_[RLG]*.json")):
        record, found = json.loads(path.read_text()), pd.read_csv(quick_run / "predictions" / f"{path.stem}.csv")
        if record["task"] == "forecaster":
            assert list(found) == ["window", "truth", "answer", "error"]
            assert (found["error"] ** 2).mean() == pytest.approx(record["test"]["mse"], rel=1e-4)
            assert len(found["window"][0].split()) == 50
        else:
            assert list(found) == ["text", "truth", "answer", "probability"]
            assert (found["truth"] == found["answer"]).mean() == pytest.approx(record["test"]["accuracy"])
            assert found["probability"].between(0, 1).all()


def test_history_is_a_table(quick_run):
    history, runs = table(quick_run, "history"), table(quick_run, "runs").set_index(["task", "model"])
    assert list(history) == ["task", "model", "seed", "epoch", "split", "metric", "value"]
    best = history.query("split == 'validation' and metric == 'loss'").groupby(["task", "model"])["value"].min()
    assert best.to_numpy() == pytest.approx(runs.loc[best.index, "val_loss"].to_numpy())


def test_numbers_are_written_as_people_write_them():
    for x, digits, shown in ((110.4, 2, "110"), (0.03905, 3, "0.0391"), (1234.4, 4, "1234"), (0.5, 2, "0.50")):
        assert rnn.plain(x, digits) == shown
    accuracy, perplexity = rnn.PREDICTOR.metrics[0], rnn.PREDICTOR.metrics[2]
    assert accuracy.show(0.761, 0.0123) == "76.1 % ± 1.2" and accuracy.show(0.5, 0.0) == "50.0 %"
    assert perplexity.show(212.3, 1e-13) == "212"


def test_perplexity_and_baselines_have_their_verdicts(quick_run):
    found = table(quick_run, "comparisons").query(
        "task == 'predictor' and metric == 'perplexity' and b in ['bigram', 'trigram']"
    )
    assert found["a"].tolist() == ["RNN", "LSTM", "GRU"] and found["verdict"].str.contains("in perplexity").all()


def test_the_terminal_shows_the_data_and_fits_80_columns(run_on):
    (printed, progress), out = run_on("series", monthly_csv())
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "season (steps) 12" in progress and "window (steps) 14" in progress
    assert "144 values are few: windows of 14 steps in place of 50" in progress
    assert "run 1 of 1, " in progress and "100 117 130" in progress
    assert "Time-series forecasting: my.csv" in printed


def test_a_smooth_series_has_no_season_of_two_steps():
    walk = np.cumsum(np.random.default_rng(0).normal(size=2000))
    days = np.sin(np.arange(2000) * 2 * np.pi / 24) + 0.01 * walk
    assert rnn.season_of(rnn.SeriesDataset(days, 50)) == 24
    months = rnn.SeriesDataset(np.sin(np.arange(84) * 2 * np.pi / 12), 12)
    assert rnn.season_of(months) == 12, "a peak at the window's length"
    trend = 0.05 * np.arange(2000) + np.sin(np.arange(2000) * 2 * np.pi / 24)
    assert rnn.season_of(rnn.SeriesDataset(trend, 50)) == 24, "a trend hides no season"
    for random in (walk, np.diff(walk)):
        assert rnn.season_of(rnn.SeriesDataset(random, 50)) is None
    line = rnn.SeriesDataset(np.linspace(0, 1, 500), 50)
    assert rnn.season_of(line) is None
    assert [r.name for r in rnn.series_baselines(line, line)] == ["persistence", "linear autoregression"]


def test_activations_do_not_depend_on_the_seed():
    task, config = rnn.CLASSIFIER, rnn.QUICK["classifier"]
    found = set()
    for seed in (1, 2):
        data = task.build_data(config, seed)
        models = {"GRU": rnn.build_model(task, "GRU", config, data, 0)[0]}
        found.add(rnn.measure_costs(task, models, config.training, data, 1, 1)["GRU"]["activation_bytes"])
    assert len(found) == 1


# --- knobs, folders, Python -----------------------------------------------------------


def test_knobs_are_in_the_record_and_in_what_a_folder_is_said_to_hold(tmp_path, capsys, no_figures):
    arguments = ["--tasks", "forecaster", "--hidden-dim", "7", "--window", "20", "--learning-rate", "0.05"]
    assert rnn.main([*ONE, str(tmp_path), *arguments]) == 0
    record = json.loads((tmp_path / "runs" / "forecaster_GRU_seed42.json").read_text())
    assert record["configuration"]["hidden_dim"] == 7 and record["configuration"]["window"] == 20
    assert record["learning_rate"] == 0.05 and record["input_shape"] == [20, 1]
    capsys.readouterr()
    error = refusal(["--quick", "--report", "--output-dir", str(tmp_path)], capsys)
    assert "the folder holds runs of: --quick --epochs 1 --hidden-dim 7 --window 20" in error
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN") == 0
    assert "note: the folder also holds runs of: --quick --epochs 1 --hidden-dim 7" in capsys.readouterr().err
    assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN", "--seeds", 3, "--learning-rate", 0.5) == 0
    assert "The means of RNN mix runs at different learning rates." in " ".join(capsys.readouterr().out.split())


def test_run_returns_the_scores_and_the_figures(tmp_path, capsys):
    results = rnn.run(tasks=["forecaster"], models=["RNN"], seeds=[1, 2], quick=True, output_dir=tmp_path)
    assert list(results.table) == ["task", "name", "kind", "seed", "subset", "metric", "value"]
    assert set(results.table["seed"]) == {1, 2} and results.failed == 0
    assert set(results.figures) >= {"performance_summary", "time_series_predictions"}
    with pytest.raises(rnn.InputError, match="invalid choice"):
        rnn.run(tasks=["forecast"])


def test_a_script_without_a_guard_is_one_clear_line(tmp_path):
    script = tmp_path / "script.py"
    arguments = ["--quick", "--tasks", "forecaster", "--workers", "2"]
    script.write_text(f"import pytorch_rnn_models as m, sys\nsys.exit(m.main({arguments}))")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("9 runs") + done.stderr.count("3 runs") == 1, "everything begins once"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pytorch_rnn_models.py: ") and '`if __name__ == "__main__":`' in last
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "outputs")


def test_rounding_takes_no_bar_past_its_end(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    jobs = {rnn.Job("forecaster", "RNN", seed, 0.1): (0.1 + seed / 7, 11) for seed in range(200)}
    progress = rnn.Progress(jobs)
    for job in jobs:
        for batch in range(1, 8):
            progress.update(job, batch, None)
        progress.finish(job, "")
        assert progress.overall.n <= progress.overall.total  # tqdm warns, in the middle of the bars
    assert progress.overall.n == pytest.approx(progress.overall.total)
    progress.close()
