"""Statistics, matched sizes, costs, gradient flow and forecasts that feed on themselves."""

import json
import math
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import pytorch_rnn_models as rnn
from conftest import new_model, quick, summary, table


def results(task="classifier", metric="accuracy", baselines=(), ceilings=(), **values):
    """A table of results: a value per seed, from seed 1 on, for each name."""
    kinds = dict.fromkeys(values, "model") | dict.fromkeys(baselines, "baseline") | dict.fromkeys(ceilings, "ceiling")
    rows = [
        (task, name, kinds[name], seed, "all", metric, value)
        for name, by_seed in values.items()
        for seed, value in enumerate(by_seed, start=1)
    ]
    return pd.DataFrame(rows, columns=["task", "name", "kind", "seed", "subset", "metric", "value"])


# --- statistics -----------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (200, 1.972)])
def test_critical_values_of_students_t(degrees, value):
    assert rnn.student_t(degrees) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says(seeds):
    rng, covered = np.random.default_rng(seeds), 0
    for _ in range(400):
        data = rng.normal(0, 0.2, seeds)  # what makes a seed easy or hard for both
        scores = results(RNN=0.6 + data + rng.normal(0, 0.02, seeds), LSTM=0.7 + data + rng.normal(0, 0.03, seeds))
        row = rnn.compare(scores).iloc[0]
        assert row["low"] < row["difference"] < row["high"]
        covered += row["low"] <= -0.1 <= row["high"]
    assert 0.92 < covered / 400 < 0.98


def test_comparisons_pair_by_seed_and_speak_plainly():
    models = {"RNN": [0.60, 0.71, 0.52, 0.1], "LSTM": [0.70, 0.83, 0.61], "GRU": [0.61, 0.70, 0.52]}
    scores = results(**models, half=[0.5] * 4, never=[0.0], baselines=["half", "never"])
    rows = rnn.compare(scores).set_index(["a", "b"])
    assert set(rows.index) == {
        *[("RNN", "LSTM"), ("RNN", "GRU"), ("LSTM", "GRU")],
        *[(name, "half") for name in rnn.MODEL_NAMES],  # of the baselines only the best
    }
    row = rows.loc[("RNN", "LSTM")]  # seeds 1 to 3: -10, -12 and -9 points
    half = 4.303 * np.std([10, 12, 9], ddof=1) / math.sqrt(3)
    found, expected = 100 * row[["low", "difference", "high"]], [-31 / 3 - half, -31 / 3, -31 / 3 + half]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    assert row["verdict"] == f"LSTM better than RNN by 10.3 points [{31 / 3 - half:.1f}, {31 / 3 + half:.1f}]"
    assert rows.loc[("RNN", "GRU"), "verdict"] == "RNN and GRU: no clear difference, 0.0 points [-2.5, 2.5]"
    assert rows.loc[("LSTM", "half"), "verdict"].startswith("LSTM and half: no clear difference, 21.3 points [-6.1")


def test_of_an_error_the_lower_is_better_and_the_best_baseline_is_the_lowest():
    errors = {"RNN": [2.0, 2.1], "line": [1.0, 1.01], "flat": [9.0, 9.1]}
    row = rnn.compare(results("forecaster", "mse", **errors, baselines=["line", "flat"])).iloc[0]
    assert (row["b"], row["difference"]) == ("line", pytest.approx(1.045))
    assert re.fullmatch(r"line better than RNN by 1\.0 in MSE \[0\.\d+, 1\.\d+\]", row["verdict"])


def test_one_seed_in_common_gives_no_interval_and_is_said_to_be_so():
    rows = rnn.compare(results(RNN=[0.9, 0.8], GRU=[0.5], half=[0.5, 0.5], baselines=["half"])).set_index(["a", "b"])
    assert rows.loc[("RNN", "GRU"), "verdict"] == "RNN better than GRU by 40.0 points on one seed"
    assert rows.loc[("RNN", "GRU"), ["low", "high"]].isna().all()
    assert rows.loc[("GRU", "half"), "verdict"] == "GRU and half: no clear difference, 0.0 points on one seed"
    assert rows.loc[("RNN", "half"), "verdict"].endswith("points [-28.5, 98.5]")


def test_a_summary_of_one_seed_says_so_and_sets_models_beside_the_best_baseline(quick_run):
    text = summary(quick_run)
    assert text.count("One seed supports no ranking") == 3
    for name in rnn.MODEL_NAMES:
        pair = f"linear autoregression better than {name}|{name} better than linear autoregression"
        assert re.search(rf"- ({pair}) by [\d.]+ in MSE on one seed\.", text)
    assert "- Accuracy, ending contradicts the label: RNN " in text
    assert "- Accuracy, cue 5 or more words back: RNN " in text


@pytest.mark.parametrize(("baseline", "expected"), [(0.7, "50 %"), (0.5, "75 %"), (0.9, None), (0.95, None)])
def test_gap_closed_is_the_way_from_best_baseline_to_ceiling_where_there_is_one(baseline, expected):
    kinds = {"baselines": ["worst", "best"], "ceilings": ["it"]}
    accuracy = results(RNN=[0.8], worst=[0.1], best=[baseline], it=[0.9], **kinds)
    loss = accuracy.assign(metric="loss", value=1 - accuracy["value"])
    run = {"task": "classifier", "model": "RNN", "learning_rate": 0.1, "best_epoch": 1, "epochs": 4, "seconds": 2.0}
    _, training = rnn.performance_tables(pd.concat([accuracy, loss]), pd.DataFrame([run]), rnn.CLASSIFIER)
    assert training.get("gap closed", pd.Series([None])).tolist() == [expected]


# --- sizes and costs ------------------------------------------------------------------


@pytest.mark.parametrize("task", rnn.TASKS)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_matched_models_have_the_lstms_recurrent_parameters_within_2_percent(task, name, data):
    sizes = [
        rnn.count_parameters(rnn.build_model(rnn.TASKS[task], model, rnn.DEFAULT[task], data[task], 0)[0])["recurrent"]
        for model in ("LSTM", f"{name}-matched")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_match_params_adds_its_rows_to_the_equal_hidden_size_ones(tmp_path, no_figures):
    for match in ("hidden", "params"):
        assert quick(tmp_path, "--tasks", "forecaster", "--models", "RNN", "--match", match) == 0
    runs = table(tmp_path, "runs")
    assert runs["model"].tolist() == ["RNN", "RNN-matched"]
    assert runs["recurrent_parameters"].iloc[1] > 3 * runs["recurrent_parameters"].iloc[0]
    model = rnn.load_checkpoint(tmp_path / "models" / "forecaster_RNN-matched_seed42.pt")
    assert rnn.count_parameters(model)["recurrent"] == runs["recurrent_parameters"].iloc[1]


def test_costs_table(quick_run):
    costs = table(quick_run, "costs")
    columns = "task,model,parameters,recurrent_parameters,ms_per_step,samples_per_second,activation_bytes,kernel"
    assert ",".join(costs) == columns
    assert len(costs) == 9 and (costs[["ms_per_step", "activation_bytes"]] > 0).all(axis=None)
    if torch.backends.mkldnn.is_available():
        kernels = set(zip(costs["model"], costs["kernel"]))
        assert kernels == {("LSTM", "oneDNN"), ("RNN", "generic"), ("GRU", "generic")}


def test_activation_bytes_grow_with_the_batch_and_leave_the_weights_out(data):
    task, own = rnn.TASKS["predictor"], data["predictor"]
    model = new_model("predictor", "RNN", data)
    small, large = (rnn.activation_bytes(model, task, own.train.__getitems__(range(n))) for n in (10, 100))
    assert 8 < large / small < 11


def test_costs_are_those_of_the_loop_beside_the_bare_one(data):
    task, own = rnn.TASKS["predictor"], data["predictor"]
    models = {name: new_model("predictor", name, data) for name in ("RNN", "GRU")}
    costs = rnn.measure_costs(task, models, rnn.Training(batch_size=64), own, steps=4, rounds=3)
    assert list(costs) == ["RNN", "GRU"]
    for cost in costs.values():
        assert cost["samples_per_second"] == pytest.approx(64 / cost["ms_per_step"] * 1000, rel=0.05)
        ratio = cost["ms_per_step"] / cost["bare_ms_per_step"] - 1
        assert cost["overhead"] == pytest.approx(ratio, abs=0.5) and cost["overhead"] < 2


# --- gradients and forecasts ----------------------------------------------------------


def test_gradient_by_step_is_the_gradient_counted_from_the_last_word(data):
    own, task = data["classifier"], rnn.TASKS["classifier"]
    model = new_model("classifier", "GRU", data, dropout=0.5)
    sizes = rnn.gradient_by_step(model, task, own, n=1)
    row = own.test.lengths.topk(1).indices
    inputs, targets = own.test.__getitems__(row)
    length = int(own.test.lengths[row])
    assert len(sizes) == length and all(size > 0 for size in sizes)
    embedded = model.embedding(inputs).detach().requires_grad_()
    model.eval()
    state = model.recurrent(embedded, torch.tensor([length - 1]))
    task.loss(model.head(state), targets).sum().backward()
    assert sizes == pytest.approx(embedded.grad[0].norm(dim=1).flip(0).tolist(), rel=1e-4)


def test_a_free_running_forecast_is_fed_back_and_in_the_units_of_the_series(data):
    own = data["forecaster"]
    model = new_model("forecaster", "LSTM", data).eval()
    found = rnn.forecasts(model, own, shown=4, horizon=5, stride=7)
    window, values = own.test.inputs[:1], []
    with torch.no_grad():
        for _ in range(5):
            values.append((window[:, -1] + model(rnn.centred(window))).item())
            window = torch.cat([window[:, 1:], torch.full((1, 1, 1), values[-1])], dim=1)
    assert (np.array(found["free_forecast"]) - own.offset) / own.unit == pytest.approx(np.array(values), abs=1e-4)
    truth = own.test.targets[:5, 0].double().numpy() * own.unit + own.offset
    assert found["free_truth"] == pytest.approx(truth, abs=1e-5)
    assert found["truth"] == pytest.approx(truth[:4], abs=1e-5)
    assert len(found["free_mse"]) == 5 and found["forecast"][0] == pytest.approx(found["free_forecast"][0], abs=1e-5)


def test_a_perfect_model_runs_free_without_error():
    class Oracle(rnn.Forecaster):
        """Continues a series of period two exactly."""

        layer = nn.RNN

        def forward(self, windows):
            return windows[:, -2] - windows[:, -1]

    rows = rnn.SeriesDataset([0.0, 1.0] * 100, 10)
    own = rnn.TaskData(rows, rows, rows, {}, {}, {}, list, [], pd.DataFrame, [])
    assert rnn.forecasts(Oracle(1, 4, 1), own)["free_mse"] == [0.0] * 95


def test_evidence_is_in_the_records(quick_run):
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (quick_run / "runs").iterdir()]
    evidence = [(r["task"], tuple(r["evidence"])) for r in records if r["model"] in rnn.MODEL_NAMES]
    assert Counter(evidence) == {
        ("classifier", ("gradient", "initial_gradient", "labels", "confusion")): 3,
        ("predictor", ()): 3,
        ("forecaster", ("forecasts",)): 3,
    }
    first = next(r for r in records if "gradient" in r.get("evidence", ()))["evidence"]
    assert first["gradient"] != first["initial_gradient"]
