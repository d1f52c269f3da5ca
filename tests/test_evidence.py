"""Statistics, matched sizes, costs, gradient flow and free-running forecasts."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import CPU, new_model


def record(model, seed, scores, task="classifier"):
    def examples(scores):
        return {"score": np.asarray(scores, dtype=float), "loss": 1 - np.asarray(scores, dtype=float)}

    never, half = np.zeros(len(scores)), np.arange(len(scores)) % 2
    references = [
        {"name": "never", "kind": "baseline", "accuracy": 0.0, "examples": examples(never)},
        {"name": "half", "kind": "baseline", "accuracy": 0.5, "examples": examples(half)},
        {"name": "always", "kind": "ceiling", "accuracy": 1.0, "examples": examples(never + 1)},
    ]
    run = {"task": task, "model": model, "seed": seed, "unit": 1.0, "references": references}
    return run | {"examples": examples(scores)}


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        seeds = [rng.normal(rng.normal(0, 0.3), 1, 50) for _ in range(10)]
        low, high = np.quantile(rnn.bootstrap_means(seeds, rng, resamples=200), [0.025, 0.975])
        covered += low <= 0 <= high
    assert 0.85 <= covered / 200 <= 0.99


def test_bootstrap_of_one_seed_is_the_ordinary_one():
    values = np.random.default_rng(0).normal(2, 1, 400)
    means = rnn.bootstrap_means([values], np.random.default_rng(1))
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.15)


def test_comparisons_pair_by_seed_and_speak_plainly():
    rng = np.random.default_rng(0)
    records = []
    for seed in (1, 2, 3):
        right = rng.random(500) < 0.6
        records.append(record("RNN", seed, right))
        records.append(record("LSTM", seed, right | (rng.random(500) < 0.3)))
        records.append(record("GRU", seed, rng.random(500) < 0.6))
    records.append(record("RNN", 9, np.zeros(500)))  # no other model has this seed
    table = rnn.compare_models(records)
    assert list(table) == "task,metric,a,b,difference,low,high,verdict".split(",")
    rows = table[table["metric"] == "accuracy"].set_index(["a", "b"])
    row = rows.loc[("RNN", "LSTM")]
    assert row["low"] < row["difference"] < row["high"] < 0
    expected = f"LSTM above RNN by {-100 * row['difference']:.1f} points "
    assert row["verdict"] == expected + f"[{-100 * row['high']:.1f}, {-100 * row['low']:.1f}]"
    assert rows.loc[("RNN", "GRU"), "verdict"].startswith("RNN and GRU: no clear difference [-")
    half = rows.loc[("LSTM", "half")]
    assert half["verdict"].startswith(f"LSTM above half by {100 * half['difference']:.1f} points [")
    assert set(rows.index.get_level_values("b")) == {"LSTM", "GRU", "half"}, "of the baselines only the best"


def test_a_pair_with_one_seed_in_common_is_said_to_be_so():
    scores = np.random.default_rng(0).random(100)
    records = [record("RNN", 1, scores < 0.9), record("RNN", 2, scores < 0.9), record("GRU", 2, scores < 0.5)]
    verdicts = rnn.compare_models(records).query("metric == 'accuracy'").set_index(["a", "b"])["verdict"]
    assert re.fullmatch(r"RNN above GRU by [\d.]+ points \[.*\] on one seed", verdicts["RNN", "GRU"])
    assert re.fullmatch(r"RNN above half by [\d.]+ points \[.*\]", verdicts["RNN", "half"])


@pytest.mark.parametrize("task", rnn.TASKS)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_matched_models_have_the_lstms_recurrent_parameters_within_2_percent(task, name):
    config = getattr(rnn.Config(), task)
    arguments = rnn.model_arguments(config, vocab_size=50, output_dim=1, input_dim=1)
    arguments = {k: v for k, v in arguments.items() if k in rnn.TASKS[task].models["LSTM"].__init__.__annotations__}
    sizes = [
        rnn.count_parameters(rnn.build_model(rnn.TASKS[task], model, arguments, 0)[0])["recurrent"]
        for model in ("LSTM", name + rnn.MATCHED)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_match_params_adds_its_rows_to_the_equal_hidden_size_ones(tmp_path, no_figures):
    arguments = ["--quick", "--tasks", "forecaster", "--models", "RNN", "--output-dir", str(tmp_path)]
    assert rnn.main(arguments) == 0
    assert rnn.main([*arguments, "--match", "params"]) == 0
    runs = pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")
    assert runs["model"].tolist() == ["RNN", "RNN-matched"]
    assert runs["recurrent_parameters"].iloc[1] > 3 * runs["recurrent_parameters"].iloc[0]
    model = rnn.load_checkpoint(tmp_path / "models" / "forecaster_RNN-matched_seed42.pt").model
    assert rnn.count_parameters(model)["recurrent"] == runs["recurrent_parameters"].iloc[1]


def test_costs_table(quick_run):
    table = pd.read_csv(quick_run / "pytorch_rnn_costs.csv")
    columns = "task,model,parameters,recurrent_parameters,ms_per_step,samples_per_second,activation_bytes,kernel"
    assert list(table) == columns.split(",")
    assert len(table) == 9 and (table["ms_per_step"] > 0).all() and (table["activation_bytes"] > 0).all()
    if torch.backends.mkldnn.is_available():
        kernels = set(zip(table["model"], table["kernel"]))
        assert kernels == {("LSTM", "oneDNN"), ("RNN", "generic"), ("GRU", "generic")}


def test_activation_bytes_grow_with_the_batch_and_leave_the_weights_out(data):
    task, own = rnn.TASKS["predictor"], data["predictor"]
    model = new_model("predictor", "RNN", data)
    small, large = (rnn.activation_bytes(model, task, own.train.__getitems__(range(n))) for n in (10, 100))
    assert 8 < large / small < 11


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


def test_free_running_feeds_each_forecast_back(data):
    own, task = data["forecaster"], rnn.TASKS["forecaster"]
    model = new_model("forecaster", "LSTM", data).eval()
    result = rnn.free_running(model, task, own, horizon=5, stride=7)
    window, forecasts = own.test.inputs[:1], []
    with torch.no_grad():
        for _ in range(5):
            forecasts.append(model(window).item())
            window = torch.cat([window[:, 1:], torch.full((1, 1, 1), forecasts[-1])], dim=1)
    assert result["forecast"] == pytest.approx(forecasts, abs=1e-5)
    assert result["truth"] == pytest.approx(own.test.targets[:5, 0].tolist())
    assert len(result["mse"]) == 5


def test_a_perfect_model_runs_free_without_error(data):
    class Oracle(torch.nn.Module):
        """Continues a period-two series exactly."""

        def forward(self, windows):
            return windows[:, -2]

    rows = rnn.SeriesDataset([0.0, 1.0] * 100, 10)
    own = rnn.TaskData("", rows, rows, rows, {}, {}, [], {})
    assert rnn.free_running(Oracle(), rnn.TASKS["forecaster"], own)["mse"] == [0.0] * 95


def test_evidence_is_in_the_records(quick_run):
    records = rnn.read_records(quick_run, rnn.QUICK)
    assert all(rnn.EVIDENCE[r["task"]].keys() == r["evidence"].keys() for r in records)
    first = next(r for r in records if r["task"] == "classifier")["evidence"]
    assert first["gradient"] != first["initial_gradient"]


def test_costs_are_those_of_the_loop_beside_the_bare_one(data):
    task, own = rnn.TASKS["predictor"], data["predictor"]
    costs = rnn.measure_costs(task, ["RNN", "GRU"], rnn.QUICK.predictor, own, CPU, steps=4, rounds=3)
    assert list(costs) == ["RNN", "GRU"]
    for cost in costs.values():
        assert cost["samples_per_second"] == pytest.approx(64 / cost["ms_per_step"] * 1000, rel=0.05)
        ratio = cost["ms_per_step"] / cost["bare_ms_per_step"] - 1
        assert cost["overhead"] == pytest.approx(ratio, abs=0.5) and cost["overhead"] < 2


def test_summary_says_when_one_seed_is_all_there_is_and_when_a_baseline_wins(quick_run):
    text = (quick_run / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    assert text.count("One seed supports no ranking") == 3
    for name in rnn.MODEL_NAMES:
        assert re.search(rf"- linear autoregression below {name} by [\d.]+ \[.*\] on one seed\.\n", text)
    assert "- On linear autoregression: a sum of K sines obeys" in text
    assert "gap closed" in text


def test_summary_says_which_models_lack_a_seed(quick_run):
    own = [r for r in rnn.read_records(quick_run, rnn.QUICK) if r["task"] == "predictor"]
    own += [r | {"seed": 43} for r in own[:2]]
    text = rnn.summary_text(sorted(own, key=lambda r: r["model"]), rnn.compare_models(own))
    assert "over the seeds 42 (GRU); 42, 43 (LSTM); 42, 43 (RNN)." in text


def test_gap_closed_is_the_way_from_best_baseline_to_ceiling(quick_run):
    own = json.loads(json.dumps(rnn.read_records(quick_run, rnn.QUICK)))
    own = [r for r in own if r["task"] == "classifier"]
    for r in own:
        r["test"]["accuracy"] = 0.8
        for reference, value in zip(r["references"], (0.5, 0.7, 0.9)):
            reference["accuracy"] = value
    table = rnn.performance_table(own, rnn.TASKS["classifier"]).set_index("")
    assert set(table.loc[["RNN", "LSTM", "GRU"], "gap closed"]) == {"50 %"}
