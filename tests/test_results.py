"""Statistics and text: paired differences, their intervals, scores, digits, distances."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

import pytorch_rnn_models as rnn

STUDENT = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}  # 97.5 % quantiles, from any table


def examples_of(accuracy, seeds=3, n=200, noise=0.0):
    """Test examples of a classifier's models and baselines with given shares of right answers."""
    rng = np.random.default_rng(0)
    parts = []
    for name, share in accuracy.items():
        for seed in range(seeds):
            right = np.arange(n) < n * (share + noise * rng.normal())
            part = pd.DataFrame({"truth": "yes", "answer": np.where(right, "yes", "no")})
            kind = "model" if name in rnn.CELLS else "baseline"
            parts.append(part.assign(task="classifier", seed=seed, name=name, kind=kind, loss=0.5))
    return pd.concat(parts).rename_axis("example").reset_index()


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_of_a_difference_is_students(seeds):
    rng = np.random.default_rng(seeds)
    index = pd.MultiIndex.from_product([range(seeds), range(4000)], names=["seed", "example"])
    by_seed = np.repeat(rng.normal(1.0, 0.3, seeds), 4000)
    a = pd.Series(by_seed + rng.normal(0, 1e-3, len(index)), index)
    means, low, high = rnn.paired_difference(a, 0.0 * a)
    half = STUDENT[seeds - 1] * by_seed[::4000].std(ddof=1) / math.sqrt(seeds)
    assert [low, high] == pytest.approx([means.mean() - half, means.mean() + half], rel=1e-3)


@pytest.mark.parametrize("is_shared", [False, True])
def test_seeds_that_agree_by_chance_do_not_make_a_difference_certain(is_shared):
    """The floor is right whether the seeds share the test examples or each has its own."""
    rng = np.random.default_rng(1)
    n = 900
    of_example = rng.normal(size=(1 if is_shared else 3, n))
    of_example -= of_example.mean(axis=1, keepdims=True)
    values = pd.DataFrame(np.broadcast_to(of_example, (3, n)) + 0.05)
    values = values.rename_axis("seed").rename_axis("example", axis=1).stack()
    _, low, high = rnn.paired_difference(values, 0.0 * values)
    error = 1 / math.sqrt(n if is_shared else 3 * n)
    assert (high - low) / 2 == pytest.approx(STUDENT[2] * error, rel=0.1)


def test_verdicts_are_the_sign_of_the_interval():
    accuracy = {"LSTM": 0.8, "GRU": 0.8, "RNN": 0.6, "naive Bayes": 0.62, "majority": 0.5}
    found = rnn.compare(examples_of(accuracy, noise=0.004)).set_index(["a", "b"])
    assert found["verdict"]["LSTM", "RNN"] == "LSTM better"
    assert found["verdict"]["GRU", "RNN"] == "GRU better"
    assert found["verdict"]["LSTM", "GRU"] == "undecided"
    assert set(found.index.get_level_values("b")) == {"RNN", "GRU", "naive Bayes"}
    assert found["wins"]["LSTM", "RNN"] == "3 of 3"
    assert found["difference"]["LSTM", "RNN"] == pytest.approx(0.2, abs=0.02)
    alone = rnn.compare(examples_of(accuracy, seeds=1))
    assert set(alone["verdict"]) == {""} and alone[["low", "high"]].isna().all(axis=None)


def test_of_an_error_the_lower_is_better():
    parts = []
    for name, error in (("LSTM", 1.0), ("RNN", 2.0), ("persistence", 3.0), ("far", 9.0)):
        for seed in range(3):
            answers = error + 0.01 * np.random.default_rng(seed).normal(size=50)
            part = pd.DataFrame({"truth": 0.0, "answer": answers, "loss": 0.0})
            kind = "model" if name in rnn.CELLS else "baseline"
            parts.append(part.assign(task="forecaster", seed=seed, name=name, kind=kind))
    examples = pd.concat(parts).rename_axis("example").reset_index()
    found = rnn.compare(examples).set_index(["a", "b"])["verdict"]
    assert found["LSTM", "RNN"] == "LSTM better" and found["RNN", "persistence"] == "RNN better"


@pytest.mark.parametrize(
    ("mean", "std", "shown"),
    [
        (0.0392, 0.0048, "0.0392 ± 0.0048"),
        (76.14, 1.23, "76.1 ± 1.2"),
        (0.123456, math.nan, "0.123"),
    ],
)
def test_a_number_has_two_digits_of_its_spread(mean, std, shown):
    assert rnn.show(mean, std) == shown


def test_means_by_distance_are_those_of_the_intervals():
    examples = examples_of({"GRU": 1.0}, seeds=1, n=6).assign(
        distance=[0, 9, 10, 24, 300, math.nan], lag=math.nan, effect=math.nan
    )
    examples["answer"] = ["yes", "no", "yes", "yes", "no", "no"]
    [(task, _, label, found)] = rnn.distance_tables(examples)
    assert (task, label) == ("classifier", "accuracy (%)")
    assert found["GRU", "model"].to_dict() == {0: 50, 10: 100, 100: 0}


def test_a_run_that_did_not_learn_is_named(quick_run, tmp_path, no_figures):
    shutil.copytree(quick_run / "runs", tmp_path / "runs")
    for path in list((tmp_path / "runs").glob("classifier*seed2.json")):
        record = json.loads(path.read_text())
        for name, answers in record["answers"].items():
            loss = {"majority class": 0.69}.get(name, 0.3)
            answers["loss"] = [loss] * len(answers["loss"])
        for seed in (1, 2, 3):
            lost = record["model"] == "LSTM" and seed == 3
            if lost:
                record["answers"]["LSTM"]["loss"] = [0.68] * len(answers["loss"])
            record["seed"] = seed
            path.with_name(path.name.replace("seed2", f"seed{seed}")).write_text(json.dumps(record))
    rnn.run(report=True, output_dir=tmp_path)
    text = (tmp_path / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert text.count("did not learn") == 1 and "LSTM, seed 3: did not learn" in text


def test_what_is_commonly_said_holds_only_if_the_intervals_say_so():
    """Of three seeds: a gap that all share, one that falls, and one that they do not agree on."""
    rows = []
    for seed, (lstm, gru) in enumerate([(0.80, 0.74), (0.81, 0.76), (0.79, 0.77)]):
        for model, share in (("RNN", 0.61), ("GRU", gru), ("LSTM", lstm)):
            run = {"task": "classifier", "model": model, "seed": seed, "test_accuracy": share}
            rows.append(run | {"ms_per_step": {"LSTM": 3.0, "GRU": 4.0 + seed / 2}.get(model, 1.0)})
    runs = pd.DataFrame(rows, columns=[*{**rows[0], **rnn.CLAIMS}])
    found = rnn.common_claims(runs).set_index("what")
    assert found["holds"]["test_accuracy"] == "yes, not decided"
    assert found["holds"]["ms_per_step"] == "no"
    assert found["measured"]["test_accuracy"] == "0.61, 0.757, 0.8"
