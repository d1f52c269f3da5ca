"""A user's own files and questions: spreadsheets, doubts in words, labels."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import pytorch_rnn_models as rnn
from conftest import ROOT, summary
from test_own_data import BAD, GOOD, reviews_csv, series_csv

ONE = ["--quick", "--models", "GRU", "--epochs", "1", "--workers", "1", "--output-dir"]


def stars_csv(n=150):
    """Reviews with ratings 1 to 5, each with words of its own."""
    words = ["awful", "poor", "fair", "good", "superb"]
    rows = [f"It was {words[i % 5]}, number {i};{i % 5 + 1}.0" for i in range(n)]
    return "review;stars\n" + "\n".join(rows)


def monthly_csv(n=144):
    """A short series with a trend, a season of twelve and a decimal comma."""
    months = pd.period_range("1949-01", periods=n, freq="M")
    values = 100 + 2 * np.arange(n) + 30 * np.sin(np.arange(n) * 2 * np.pi / 12)
    rows = [f"{month};{value:.1f}".replace(".", ",") for month, value in zip(months, values)]
    return "month;passengers\n" + "\n".join(rows)


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
        (
            "review,sentiment\na,Positive\nb,negative\nc,positive\n",
            (),
            ["negative", "positive"],
        ),
        ("review;stars\na;5\nb;1\nc;10\n", (), ["1", "5", "10"]),
        ("id,body,mark\n1,a,0\n2,b,1.0\n3,c,1\n", ("body", "mark"), ["0", "1"]),
    ],
)
def test_reviews_under_the_usual_names_or_the_named_ones(text, columns, names):
    reviews, _ = rnn.read_reviews(text, *columns)
    assert list(reviews.names) == names and reviews.texts[:2] == ["a", "b"]
    assert sorted(set(reviews.labels)) == list(range(len(names)))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("day;t\nmon;1,5\ntue;-2,25\nwed;3\n", [1.5, -2.25, 3]),
        ("wert\n1,5\n2,5\n", [1.5, 2.5]),
        ("Datum;Umsatz, EUR\n01.01.2020;0,5\n02.01.2020;1,5\n", [0.5, 1.5]),
        ("2020-01-01;1,5;\n2020-01-02;2,5;\n", [1.5, 2.5]),
        ("date,\n2020-01-01,5\n2020-01-02,6\n", [5, 6]),
        ("d;x\na;1\nb;2\n;\n;\n", [1, 2]),
    ],
)
def test_decimal_commas_columns_without_a_name_and_rows_of_nothing(text, values):
    found, doubts = rnn.read_series(text)
    assert found.tolist() == values and not doubts


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("1.5,1\n2.5,2\n", "", "2 numeric columns among 1, 2 (separated by commas)"),
        ("date,value\n", "value", "no row below the header"),
    ],
)
def test_what_is_ambiguous_or_empty_is_refused(text, column, message):
    with pytest.raises(rnn.InputError, match=re.escape(message)):
        rnn.read_series(text, column)


def test_predict_puts_the_answer_beside_each_text_of_a_csv(run_on, capsys, tmp_path):
    _, out = run_on("reviews", reviews_csv())
    checkpoint = out / "models" / "classifier_GRU_seed42.pt"
    new = 'id,Text\n1,"It was fine,\nall of it"\n2,dull\n3,\n'
    (tmp_path / "new.csv").write_text(new, encoding="utf-8")
    assert rnn.main(["--predict", str(checkpoint), str(tmp_path / "new.csv")]) == 0
    (tmp_path / "answers.csv").write_text(capsys.readouterr().out)
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert list(answers) == ["label", "probability", "text"]
    assert answers["text"].tolist()[:2] == ["It was fine,\nall of it", "dull"]
    assert answers["label"].isna().tolist() == [False, False, True]


# --- what may mislead -----------------------------------------------------------------


def dated(days):
    return "\n".join(["day,t", *(f"{day:%d/%m/%Y},{i % 7}" for i, day in enumerate(days))])


def test_dates_that_fall_are_refused_and_turned_round_where_all_do():
    days = list(pd.date_range("2020-01-01", periods=60))
    assert rnn.read_series(dated(days))[1] == []
    swapped = [*days[:39], days[40], days[39], *days[41:]]
    with pytest.raises(rnn.InputError, match="row 42"):
        rnn.read_series(dated(swapped))
    for content, column in ((dated(days[::-1]), ""), ("year,n\n2001,5\n2000,6\n", "n")):
        assert "turned round" in rnn.read_series(content, column)[1][0]
    assert rnn.read_series("year,n\n2001,5\n2000,6\n", "n")[0].tolist() == [6, 5]
    for few in ("2020-03-28T00:00:00+01:00,1\n2020-03-30T00:00:00+02:00,2", "Feb,1\nJan,2"):
        assert rnn.read_series("when,t\n" + few)[1] == []


def test_a_test_part_outside_the_training_range_is_said_on_terminal_and_in_the_summary(run_on):
    trend = "t\n" + "\n".join(f"{i + np.sin(i):.3f}" for i in range(600))
    (_, progress), out = run_on("series", trend)
    said = "100% of the test part's values lie outside those of the training part"
    assert f"note: {said}" in progress and said in summary(out)


def test_a_model_used_on_values_far_from_its_training_says_so(run_on, capsys, tmp_path):
    _, out = run_on("series", series_csv())
    checkpoint = out / "models" / "forecaster_GRU_seed42.pt"
    for content, notes in ((series_csv(), 0), ("t\n" + "9999\n10000\n" * 30, 1)):
        (tmp_path / "other.csv").write_text(content)
        arguments = ["--predict", str(checkpoint), str(tmp_path / "other.csv"), "--length", "2"]
        assert rnn.main(arguments) == 0
        assert capsys.readouterr().err.count("far from those of training") == notes


def test_a_classifier_no_better_than_the_majority_and_a_cap_on_epochs_are_said(run_on):
    rows = []
    for i in range(200):
        words, label = (BAD, "neg") if i % 20 == 0 else (GOOD, "pos")
        rows.append(f"It was {words[i % 4]}, number {i};{label}")
    (printed, _), out = run_on("reviews", "text;label\n" + "\n".join(rows))
    for text in (" ".join(printed.split()), summary(out)):
        assert "GRU knows little more than how frequent the labels are" in text
        assert "1 of 1 runs ended at the cap on epochs" in text


def test_the_terminal_shows_the_data_before_training(run_on):
    (printed, progress), _ = run_on("series", monthly_csv())
    assert "season (steps) 12" in progress and "window (steps) 14" in progress
    assert "note: 144 values are few: windows of 14 steps in place of 50" in progress
    assert progress.index("season") < progress.index("epoch  1")
    assert "Time-series forecasting: my.csv" in printed


def test_the_season_is_the_lag_of_the_most_even_differences():
    walk = np.cumsum(np.random.default_rng(0).normal(size=2000))
    days = np.sin(np.arange(2000) * 2 * np.pi / 24) + 0.01 * walk
    assert rnn.season_of(rnn.SeriesDataset(days, 50)) == 24
    months = rnn.SeriesDataset(np.sin(np.arange(84) * 2 * np.pi / 12), 12)
    assert rnn.season_of(months) == 12, "a lag of the window's length"
    trend = 0.05 * np.arange(2000) + np.sin(np.arange(2000) * 2 * np.pi / 24)
    assert rnn.season_of(rnn.SeriesDataset(trend, 50)) == 24, "a trend hides no season"
    half = len(trend) // 2
    monthly = [rnn.SeriesDataset(part, 50) for part in (trend[:half], trend[half:])]
    assert "seasonal naive" in rnn.series_baselines(*monthly[:1] * 2, monthly[1])
    for values in (walk, np.diff(walk), np.linspace(0, 1, 500), np.ones(500)):
        windows = rnn.SeriesDataset(values, 50)
        assert rnn.season_of(windows) == 1, "none"
        baselines = rnn.series_baselines(*[windows] * 3)
        assert list(baselines) == ["persistence", "linear autoregression", "nearest neighbours"]


def test_the_season_of_a_long_series_takes_little_memory(monkeypatch):
    windows = rnn.SeriesDataset(np.sin(np.arange(2000) * 2 * np.pi / 24), 50)
    monkeypatch.setattr(rnn, "MOST_WINDOWS", 100)
    assert len(rnn.on_cpu(windows, 100)) == 98, "every twentieth window"
    assert rnn.season_of(windows) == 24


# --- the answer first -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "clear", "said"),
    [
        (
            {"RNN": 0.6, "GRU": 0.8, "words": 0.7},
            {("RNN", "GRU"), ("GRU", "words")},
            "the GRU (80.0 % ± 1.4) is best; it is better than words (70.0 % ± 1.4).",
        ),
        (
            {"RNN": 0.79, "GRU": 0.8, "words": 0.7},
            {("GRU", "words"), ("RNN", "words")},
            "GRU (80.0 % ± 1.4), RNN (79.0 % ± 1.4) do not differ clearly, and the RNN takes least "
            "time; it is better than words (70.0 % ± 1.4).",
        ),
        (
            {"RNN": 0.6, "GRU": 0.8, "words": 0.9},
            {("RNN", "GRU"), ("GRU", "words")},
            "the GRU (80.0 % ± 1.4) is best; it is worse than words (90.0 % ± 1.4): use the "
            "latter, or more data.",
        ),
        (
            {"RNN": 0.6, "GRU": 0.71, "words": 0.7},
            {("RNN", "GRU")},
            "the GRU (71.0 % ± 1.4) is best; it is not clearly better than words (70.0 % ± 1.4): "
            "use the latter, or more data.",
        ),
    ],
)
def test_the_answer_names_the_best_model_and_whether_it_is_worth_it(accuracies, clear, said):
    rows = [
        ("classifier", name, "baseline" if name == "words" else "model", seed, "accuracy", value)
        for name, mean in accuracies.items()
        for seed, value in enumerate((mean - 0.01, mean + 0.01))
    ]
    scores = pd.DataFrame(rows, columns=["task", "name", "kind", "seed", "metric", "value"])
    pairs = [("RNN", "GRU"), ("RNN", "words"), ("GRU", "words")]
    comparisons = pd.DataFrame(pairs, columns=["a", "b"]).assign(metric="accuracy")
    comparisons["is_clear"] = [pair in clear for pair in pairs]
    runs = pd.DataFrame({"file": "my.csv", "model": ["RNN", "GRU"], "seconds": [1, 2]})
    found = rnn.answer(rnn.CLASSIFIER, runs, scores, comparisons)
    assert found == f"On my.csv, by accuracy: {said}"


def test_summary_and_terminal_begin_with_the_answer(run_on):
    (printed, _), out = run_on("series", monthly_csv())
    head = "# RNN, LSTM and GRU: results\n\n## Time-series forecasting: my.csv\n\nOn my.csv, by MSE"
    for text in (printed, (out / "pytorch_rnn_summary.md").read_text(encoding="utf-8")):
        assert text.startswith(head) and "One seed supports no ranking" in text
    (out / "runs" / "forecaster_baselines_seed42.json").unlink()
    assert rnn.main(["--report", "--output-dir", str(out)]) == 0, "there is no answer without them"


def test_the_answer_comes_before_the_results_on_generated_data(tmp_path, no_figures):
    (tmp_path / "my.csv").write_text(monthly_csv())
    arguments = ["--tasks", "classifier", "forecaster", "--series", str(tmp_path / "my.csv")]
    assert rnn.main([*ONE, str(tmp_path / "out"), *arguments]) == 0
    headings = re.findall(r"## (T.*)", (tmp_path / "out" / "pytorch_rnn_summary.md").read_text())
    assert headings == ["Time-series forecasting: my.csv", "Text classification"]


# --- labels ---------------------------------------------------------------------------


def test_five_labels_go_from_file_to_figures(tmp_path):
    (tmp_path / "stars.csv").write_text(stars_csv())
    results = rnn.run(
        tasks=["classifier"],
        models=["GRU"],
        reviews=tmp_path / "stars.csv",
        quick=True,
        epochs=30,
        learning_rate=0.02,
        output_dir=tmp_path / "out",
        workers=1,
    )
    assert results.failed == 0 and "classifier_errors" in results.figures
    model = rnn.load_checkpoint(tmp_path / "out" / "models" / "classifier_GRU_seed42.pt")
    assert model.head[0].out_features == 5
    assert model.preprocessing["labels"] == ["1", "2", "3", "4", "5"]
    assert [model.predict(f"It was {word}")[0][0] for word in ("superb", "awful")] == ["5", "1"]
    first = results.scores.query("metric == 'accuracy'").set_index("name")["value"]
    assert (
        first["GRU"] > 0.9 and first["naive Bayes, words"] > 0.9 and first["majority class"] <= 0.25
    )
    assert "mean of the labels" in summary(tmp_path / "out")


def test_every_split_has_its_share_of_each_label(tmp_path):
    rows = [f"{' '.join(GOOD)} {i};{'usual' if i % 10 else 'rare'}" for i in range(200)]
    (tmp_path / "my.csv").write_text("text;label\n" + "\n".join(rows))
    config = replace(rnn.QUICK["classifier"], file=rnn.user_data("reviews", tmp_path / "my.csv"))
    for seed in range(3):
        data = rnn.build_reviews(config, seed)
        for split in (data.train, data.validation, data.test):
            assert (split.targets == 0).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_precision_recall_and_f1_are_those_of_the_definition():
    counts = {("a", "a"): 8, ("a", "b"): 2, ("b", "a"): 1, ("b", "b"): 9}
    rows = [pair for pair, n in counts.items() for _ in range(n)]
    answers = pd.DataFrame(rows, columns=["truth", "answer"]).assign(name="GRU")
    scores = rnn.label_scores(answers, ["a", "b", "never tested"]).set_index("label")
    expected = pytest.approx([8 / 9, 0.8, 16 / 19], abs=1e-3)
    assert scores.loc["a", ["precision", "recall", "F1"]].astype(float).tolist() == expected
    assert float(scores.loc["mean of the labels", "recall"]) == pytest.approx(0.85, abs=1e-3)


# --- knobs, folders, Python -----------------------------------------------------------


def test_knobs_decide_the_model_and_stand_in_the_configuration(tmp_path, no_figures):
    knobs = ["--tasks", "forecaster", "--hidden-dim", "7", "--window", "20"]
    assert rnn.main([*ONE, str(tmp_path), *knobs, "--learning-rate", "0.05"]) == 0
    config = rnn.read_config(tmp_path)["forecaster"]
    assert (config["hidden_dim"], config["window"], config["epochs"]) == (7, 20, 1)
    model = rnn.load_checkpoint(tmp_path / "models" / "forecaster_GRU_seed42.pt")
    assert model.recurrent.rnn.hidden_size == 7 and model.preprocessing["window"] == 20
    runs = pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")
    assert runs["learning_rate"].tolist() == [0.05]


def test_activations_do_not_depend_on_the_seed():
    task = rnn.CLASSIFIER
    config = rnn.QUICK["classifier"]
    found = set()
    for seed in (1, 2):
        data = task.build_data(config, seed)
        models = {"GRU": rnn.build_model(task, "GRU", config, data, 0)}
        costs = rnn.measure_costs(task, models, config.training, data)
        found.add(costs["GRU"]["activation_bytes"])
    assert len(found) == 1


def test_a_script_without_a_guard_is_one_clear_line(tmp_path):
    script = tmp_path / "script.py"
    arguments = ["--quick", "--tasks", "forecaster", "--workers", "2"]
    script.write_text(f"import pytorch_rnn_models as m, sys\nsys.exit(m.main({arguments}))")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count(" runs on cpu") == 1, "everything begins once"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pytorch_rnn_models.py: ") and '`if __name__ == "__main__":`' in last
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "outputs")
