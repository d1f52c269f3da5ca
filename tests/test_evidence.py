"""Statistics, numbers in text, sizes and costs, gradients, forecasts, distance, claims."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import copy_records, new_model, quick, summary, table


def results(task="classifier", source="score", baselines=(), **values):
    """A table of test examples: a value, or a list of them, per seed from 1 on, for each name."""
    parts = []
    for name, by_seed in values.items():
        for seed, value in enumerate(by_seed, start=1):
            part = pd.DataFrame({source: np.atleast_1d(value)}).rename_axis("example").reset_index()
            kind = "baseline" if name in baselines else "model"
            parts.append(part.assign(task=task, name=name, kind=kind, seed=seed, unit=1.0))
    return pd.concat(parts).assign(**{{"score": "loss", "loss": "score"}[source]: math.nan})


# --- statistics -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (200, 1.972)]
)
def test_critical_values_of_students_t(degrees, value):
    angles, shares = rnn.student_t(degrees)
    assert np.interp(math.atan(value / math.sqrt(degrees)), angles, shares) == pytest.approx(
        0.95, abs=1e-4
    )


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says(seeds):
    rng = np.random.default_rng(seeds)
    covered = 0
    for _ in range(400):
        ease = rng.normal(0, 0.2, seeds)  # what makes a seed easy or hard for both
        weaker = 0.6 + ease + rng.normal(0, 0.02, seeds)
        stronger = 0.7 + ease + rng.normal(0, 0.03, seeds)
        places = pd.MultiIndex.from_product([range(seeds), [0]], names=["seed", "example"])
        scores = (pd.Series(values, places) for values in (weaker, stronger))
        mean, low, high, _ = rnn.paired_difference(*scores)
        assert low < mean < high
        covered += low <= -0.1 <= high
    assert 0.92 < covered / 400 < 0.98


def test_comparisons_pair_by_seed_and_speak_plainly():
    models = {
        "RNN": [0.60, 0.71, 0.52, 0.1],
        "LSTM": [0.70, 0.83, 0.61],
        "GRU": [0.61, 0.70, 0.52],
    }
    scores = results(**models, half=[0.5] * 4, never=[0.0], baselines=["half", "never"])
    rows = rnn.compare(scores).set_index(["a", "b"])
    assert set(rows.index) == {
        *[("RNN", "LSTM"), ("RNN", "GRU"), ("LSTM", "GRU")],
        *[(name, "half") for name in rnn.DEFAULT_MODELS],  # of the baselines only the best
    }
    row = rows.loc[("RNN", "LSTM")]  # seeds 1 to 3: -10, -12 and -9 points
    half = 4.303 * np.std([10, 12, 9], ddof=1) / math.sqrt(3)
    found = 100 * row[["low", "difference", "high"]]
    expected = [-31 / 3 - half, -31 / 3, -31 / 3 + half]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    ends = f"[{31 / 3 - half:.1f}, {31 / 3 + half:.1f}]"
    assert row["verdict"] == f"LSTM better than RNN by 10.3 points {ends}"
    unclear = "RNN and GRU: no clear difference, 0.0 points [-2.5, 2.5]"
    assert rows.loc[("RNN", "GRU"), "verdict"] == unclear
    unclear = "LSTM and half: no clear difference, 21.3 points [-6.1"
    assert rows.loc[("LSTM", "half"), "verdict"].startswith(unclear)


def test_of_an_error_the_lower_is_better_and_the_best_baseline_is_the_lowest():
    errors = {"RNN": [2.0, 2.1], "line": [1.0, 1.01], "flat": [9.0, 9.1]}
    row = rnn.compare(results("forecaster", "loss", **errors, baselines=["line", "flat"])).iloc[0]
    assert (row["b"], row["difference"]) == ("line", pytest.approx(1.045))
    assert row["verdict"] == "line better than RNN by 1.0 in MSE [0.5, 1.6]"


def test_two_seeds_that_agree_by_chance_do_not_make_a_difference_certain():
    hits = np.tile([1.0, 0.0, 1.0, 1.0, 0.0], 30)
    more = hits.copy()
    more[:20] = 1.0
    row = rnn.compare(results(RNN=[hits, hits], GRU=[more, more])).iloc[0]  # the same on both
    error = (hits - more).std(ddof=1) / math.sqrt(150) / math.sqrt(2)
    assert row["difference"] == pytest.approx(-8 / 150)
    assert row["high"] - row["difference"] == pytest.approx(12.706 * error, rel=1e-3)
    assert row["verdict"].startswith("RNN and GRU: no clear difference")


def test_holms_correction():
    p = pd.Series([0.01, 0.04, math.nan, 0.03, 0.005])
    adjusted = rnn.holm(p)
    assert adjusted.index.tolist() == [4, 0, 3, 1]
    assert adjusted.tolist() == pytest.approx([0.02, 0.03, 0.06, 0.06])


def test_interval_and_p_value_of_a_paired_difference():
    places = pd.MultiIndex.from_product([range(3), [0]], names=["seed", "example"])
    a = pd.Series([0.60, 0.71, 0.52], places)
    b = pd.Series([0.70, 0.83, 0.61], places)
    for sign, (first, second) in ((-1, (a, b)), (1, (b, a))):
        mean, low, high, p = rnn.paired_difference(first, second)
        assert mean == pytest.approx(sign * 0.103333, abs=1e-6)
        assert sorted([sign * low, sign * high]) == pytest.approx([0.065388, 0.141279], abs=1e-5)
        assert p == pytest.approx(0.007205, abs=1e-6)  # 1 - t / sqrt(2 + t²), of two degrees
    assert rnn.paired_difference(a, a)[3] == 1


def test_a_difference_that_does_not_survive_the_correction_is_not_called_clear():
    values = {"RNN": [0.5, 0.5, 0.5, 0.5], "LSTM": [0.52, 0.53, 0.51, 0.545]}
    alone = rnn.compare(results(**values))
    assert alone.iloc[0]["verdict"].startswith("LSTM better than RNN")
    others = {f"X{i}": 0.5 + 0.1 * np.sin(np.arange(4) * (i + 2)) for i in range(6)}
    many = rnn.compare(results(**values, **others)).iloc[0]
    assert many["high"] < 0 and many["verdict"].startswith("RNN and LSTM: no clear difference")


def test_one_seed_in_common_gives_no_interval_and_is_said_to_be_so():
    scores = results(RNN=[0.9, 0.8], GRU=[0.5], half=[0.5, 0.5], baselines=["half"])
    rows = rnn.compare(scores).set_index(["a", "b"])
    assert rows.loc[("RNN", "GRU"), ["low", "high"]].isna().all()
    verdicts = rows["verdict"]
    assert verdicts["RNN", "GRU"] == "RNN and GRU: no clear difference, 40.0 points on one seed"
    assert verdicts["GRU", "half"] == "GRU and half: no clear difference, 0.0 points on one seed"
    assert verdicts["RNN", "half"].endswith("points [-28.5, 98.5]")


def test_a_summary_of_one_seed_says_so_and_sets_models_beside_the_best_baseline(quick_run):
    text = summary(quick_run)
    assert text.count("One seed supports no ranking") == 3
    for name in rnn.DEFAULT_MODELS:
        line = "(?:linear autoregression|nearest neighbours)"
        unclear = rf"- {name} and {line}: no clear difference, -?[\d.]+ in MSE on one seed\."
        assert re.search(unclear, text)
    assert "By words after the opinion that counts, accuracy: " in text
    assert "By steps back to the shifted value, shift of the forecast" in text


# --- numbers in text ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "places"),
    [
        (0.0123, 3),  # begins with 1 to 3.54: two digits
        (0.00354, 4),
        (0.00356, 3),  # else one
        (0.00497, 3),
        (0.96, 1),
        (0.1, 2),
        (1.0, 1),
        (0.001, 4),
        (7.0, 0),
        (12.0, 0),
        (4321.0, 0),
    ],
)
def test_a_spread_has_two_digits_if_it_begins_with_1_to_3_54_and_else_one(spread, places):
    assert rnn.decimals(0.5, spread) == places
    assert rnn.decimals(-0.5, spread) == places


@pytest.mark.parametrize(
    ("value", "places"),
    [(0.0387, 4), (-0.0387, 4), (1.0, 2), (110.0, 0), (0.0, 0), (math.nan, 0), (math.inf, 0)],
)
def test_a_number_without_a_spread_has_three_digits(value, places):
    assert rnn.decimals(value) == rnn.decimals(value, 0.0) == places


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ((0.03874, 0.00497), "0.039 ± 0.005"),
        ((0.03874, 0.00123), "0.0387 ± 0.0012"),
        ((1234.6, 30.2), "1235 ± 30"),
        ((110.2,), "110"),
        ((0.03874,), "0.0387"),
        ((2.0, 0.0), "2.00"),  # the same on all seeds
        ((-1e-9, 0.5), "0.0 ± 0.5"),  # no minus before nothing
        ((0.7612, 0.0123, True), "76.1 % ± 1.2"),
        ((0.7612, math.nan, True), "76.1 %"),
        ((0.5, 1e-5, True), "50.0 %"),
    ],
)
def test_a_number_has_the_digits_that_its_spread_supports(number, shown):
    assert rnn.show(*number) == shown


# --- sizes and costs ------------------------------------------------------------------


@pytest.mark.parametrize("task", rnn.TASKS)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_matched_models_have_the_lstms_recurrent_parameters_within_2_percent(task, name, data):
    sizes = []
    for model_name in ("LSTM", f"{name}-matched"):
        model = rnn.build_model(rnn.TASKS[task], model_name, rnn.DEFAULT[task], data[task], seed=0)
        sizes.append(rnn.count_parameters(model)["recurrent"])
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
    sizes = "task,model,parameters,recurrent_parameters"
    assert ",".join(costs) == f"{sizes},ms_per_step,samples_per_second,activation_bytes,kernel"
    assert len(costs) == 9 and (costs[["ms_per_step", "activation_bytes"]] > 0).all(axis=None)
    if torch.backends.mkldnn.is_available():
        kernels = set(zip(costs["model"], costs["kernel"]))
        assert kernels == {("LSTM", "oneDNN"), ("RNN", "generic"), ("GRU", "generic")}


def test_activation_bytes_grow_with_the_batch_and_leave_the_weights_out(data):
    task = rnn.TASKS["predictor"]
    model = new_model("predictor", "RNN", data)
    batches = [data["predictor"].train.batch(range(n)) for n in (10, 100)]
    small, large = (rnn.activation_bytes(model, task, batch) for batch in batches)
    assert 8 < large / small < 11


def test_the_parts_of_a_cost_agree(data):
    own = data["predictor"]
    models = {name: new_model("predictor", name, data) for name in ("RNN", "GRU")}
    training = rnn.Training(batch_size=32)
    costs = rnn.measure_costs(rnn.TASKS["predictor"], models, training, own)
    assert list(costs) == ["RNN", "GRU"]
    for cost in costs.values():
        seconds = cost["ms_per_step"] / 1000
        assert cost["samples_per_second"] == pytest.approx(32 / seconds, rel=0.05)
        steps = max(50, math.ceil(len(own.train) / 32))
        assert cost["seconds_per_epoch"] == pytest.approx(steps * seconds, rel=0.05)


# --- gradients and forecasts ----------------------------------------------------------


def test_gradient_by_step_is_the_gradient_counted_from_the_last_word(data):
    own = data["classifier"]
    task = rnn.TASKS["classifier"]
    model = new_model("classifier", "GRU", data, dropout=0.5)
    sizes = rnn.gradient_by_step(model, task, own, n=1)
    row = own.test.lengths.topk(1).indices
    inputs, targets = own.test.batch(row)
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
    window = own.test.inputs[:1]
    values = []
    with torch.no_grad():
        for _ in range(5):
            values.append((window[:, -1] + model(rnn.centred(window))).item())
            window = torch.cat([window[:, 1:], torch.full((1, 1, 1), values[-1])], dim=1)
    scaled = (np.array(found["free_forecast"]) - own.offset) / own.unit
    assert scaled == pytest.approx(np.array(values), abs=1e-4)
    truth = own.test.targets[:5, 0].double().numpy() * own.unit + own.offset
    assert found["free_truth"] == pytest.approx(truth, abs=1e-5)
    assert found["truth"] == pytest.approx(truth[:4], abs=1e-5)
    assert len(found["free_mse"]) == 5
    assert found["forecast"][0] == pytest.approx(found["free_forecast"][0], abs=1e-5)


def test_a_perfect_model_runs_free_without_error(data):
    class Oracle(rnn.Forecaster):
        """Continues a series of period two exactly."""

        cell = rnn.CELLS["RNN"]

        def forward(self, windows):
            return windows[:, -2] - windows[:, -1]

    rows = rnn.SeriesDataset([0.0, 1.0] * 100, 10)
    own = replace(data["forecaster"], test=rows, unit=1.0, offset=0.0)
    assert rnn.forecasts(Oracle(1, 4, 1), own)["free_mse"] == [0.0] * 95


def test_evidence_is_in_the_records(quick_run):
    def evidence(task, model):
        path = quick_run / "runs" / f"{task}_{model}_seed42.json"
        return json.loads(path.read_text(encoding="utf-8"))["evidence"]

    for model in rnn.DEFAULT_MODELS:
        found = evidence("classifier", model)
        assert found["gradient"] != found["initial_gradient"]
        assert not evidence("predictor", model), "its evidence is in the test examples"
        found = evidence("forecaster", model)
        assert len(found["truth"]) == len(found["forecast"]) > 0
        horizon = len(found["free_truth"])
        assert horizon == len(found["free_forecast"]) == len(found["free_mse"]) > 0
        assert horizon == len(found["persistence_mse"]) and found["variance"] > 0


# --- by distance, and what is commonly said -------------------------------------------


def test_means_by_distance_are_those_of_the_intervals():
    examples = pd.DataFrame(
        {"distance": [0, 9, 10, 24, 300, math.nan], "score": [1, 0, 1, 1, 0, 9]}
    ).assign(name="GRU", kind="model", unit=1.0, effect=math.nan)
    means, effects = rnn.by_distance(rnn.CLASSIFIER, examples)
    assert means["GRU", "model"].to_dict() == {"0-9": 0.5, "10-24": 1, "100+": 0}
    assert effects.empty


def test_what_is_commonly_said_is_held_against_the_results(quick_run, tmp_path, no_figures):
    assert "commonly said" not in summary(quick_run), "one seed says nothing"
    copy_records(quick_run, tmp_path)
    for path in list((tmp_path / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["seed"] = 43
        del record["digest"]
        record["history"] = [
            {**row, "validation": {**row["validation"], "loss": 1 / row["epoch"]}}
            for row in record.get("history", [])
        ]
        if not record["history"]:
            del record["history"]
        path.with_name(path.name.replace("42", "43")).write_text(rnn.with_digest(record))
    assert rnn.main(["--report", "--output-dir", str(tmp_path)]) == 0
    text = (tmp_path / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) +\| (.*?) +\| (yes|no) +\|$", text, re.M)
    found = {said: (measured, holds) for said, measured, holds in rows}
    sizes = "recurrent parameters: about 15K (RNN), 45K (GRU), 60K (LSTM)"
    assert found[sizes] == ("RNN 15,200, LSTM 60,800, GRU 45,600", "yes")
    memory, holds = found["memory: RNN < GRU < LSTM (MiB a batch)"]
    assert memory.startswith("classifier RNN ") and holds == "yes"
    accuracy = table(tmp_path, "runs").query("task == 'classifier' and model == 'LSTM'")
    measured, holds = found["classifier: LSTM 75 to 85 % right"]
    assert measured == f"{100 * accuracy['test_accuracy'].mean():.1f} %" and holds == "no"
