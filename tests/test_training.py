"""The training loop: memory, stopping, rates, accumulation, clipping, evaluation."""

import math
from dataclasses import replace

import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import new_model

CONFIG = rnn.TaskConfig(epochs=3)
RATE = 1e-3
NINE = [(task, name) for task in rnn.TASKS for name in rnn.CELLS]


def scripted_fit(monkeypatch, data, losses, learning_rate=RATE, **changes):
    """Fit a model while the validation loss is read from a list.

    Returns the history, the weights by epoch, and the model.
    """
    model = new_model("forecaster", "RNN", data)
    task = rnn.TASKS["forecaster"]
    weights = []
    script = iter(losses)
    honest = rnn.evaluate

    def scripted(model, task, dataset):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return honest(model, task, dataset).assign(loss=next(script))

    monkeypatch.setattr(rnn, "evaluate", scripted)
    config = rnn.TaskConfig(updates=1, **changes)
    history = rnn.fit(model, task, data["forecaster"], config, learning_rate, seed=0)
    return history, weights, model


@pytest.mark.parametrize(
    ("losses", "changes"),
    [
        ([3, 2, 4, 2, 6], {"patience": 3, "lr_patience": 1, "epochs": 9}),
        ([3, 2, 4, 4, 4, 4], {"patience": 2, "min_epochs": 4, "epochs": 9}),
        ([3, 2, 4], {"epochs": 3}),
    ],
)
def test_best_weights_are_restored_after_early_stopping_and_when_the_epochs_run_out(
    losses, changes, monkeypatch, data
):
    history, weights, model = scripted_fit(monkeypatch, data, losses, **changes)
    assert [row["validation_loss"] for row in history] == losses
    found = model.state_dict()
    assert all(torch.equal(value, weights[1][name]) for name, value in found.items())
    assert any(not torch.equal(value, weights[-1][name]) for name, value in found.items())


@pytest.mark.parametrize("min_epochs", [0, 3])
def test_learning_rate_falls_on_a_plateau_and_is_recorded(min_epochs, monkeypatch, data):
    changes = {"epochs": 8, "patience": 7, "lr_patience": 1, "min_epochs": min_epochs}
    history, *_ = scripted_fit(monkeypatch, data, [3] * 8, learning_rate=0.01, **changes)
    rates = [0.01] * (3 + min_epochs) + [0.005] * 2 + [0.0025] * 2 + [0.00125]
    assert [row["learning_rate"] for row in history] == rates[:8]


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("task", rnn.TASKS)
def test_accumulation_equals_the_large_batch(task, steps, data):
    batch = data[task].train[range(30)]
    models = [new_model(task, "GRU", data, dropout=0.0) for _ in range(2)]
    for model, accumulate_steps in zip(models, (1, steps)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = replace(CONFIG, accumulate_steps=accumulate_steps, clip_norm=1e9)
        rnn.train_step(model, rnn.TASKS[task], optimizer, batch, config)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gradients_are_clipped_and_the_norm_before_is_returned(data):
    model = new_model("forecaster", "RNN", data)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    inputs, targets = data["forecaster"].train[range(8)]
    batch = (inputs, targets + 100)
    config = replace(CONFIG, clip_norm=0.01)
    *_, norm = rnn.train_step(model, rnn.TASKS["forecaster"], optimizer, batch, config)
    moves = [new - old for new, old in zip(model.parameters(), before)]
    step = math.sqrt(sum(move.square().sum().item() for move in moves))
    assert norm > 1 and step == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("task", "name"), NINE)
def test_every_class_can_overfit_one_batch(task, name, data):
    model = new_model(task, name, data, dropout=0.0)
    inputs, targets = data[task].train[range(8)]
    steps, rate = 150, 0.01
    if name == "IRNN":  # explodes at that rate on reviews, and needs more steps
        steps, rate = 600, rnn.CELLS[name].learning_rates[task]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    while len(losses) < steps and min(losses, default=1) >= 0.05:
        step = rnn.train_step(model, rnn.TASKS[task], optimizer, (inputs[:, :20], targets), CONFIG)
        losses.append(step[0].item())
    assert min(losses) < 0.05


@pytest.mark.parametrize(("task", "name"), NINE)
def test_evaluation_does_not_depend_on_batch_size(task, name, data):
    model = new_model(task, name, data)
    test = data[task].test
    results = [rnn.evaluate(model, rnn.TASKS[task], test, batch_size=b) for b in (7, 512)]
    for key in ("loss", "score"):
        assert results[0][key].tolist() == pytest.approx(results[1][key].tolist(), abs=1e-5)
    assert len(results[0]) == len(test)


def test_epoch_means_are_weighted_by_examples(data):
    """With a learning rate of next to nothing, an epoch's running mean is the evaluation's mean."""
    model = new_model("predictor", "RNN", data, dropout=0.0)
    task = rnn.TASKS["predictor"]
    own = data["predictor"]
    config = replace(CONFIG, epochs=1, updates=1)
    size = config.batch_size_for(len(own.train))
    assert len(own.train) % size, "the last batch must be a smaller one"
    row = rnn.fit(model, task, own, config, learning_rate=1e-12, seed=0)[0]
    result = rnn.evaluate(model, task, own.train)
    assert row["train_loss"] == pytest.approx(result["loss"].mean(), rel=1e-4)
    assert row["train_accuracy"] == pytest.approx(result["score"].mean(), rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_message(data):
    model = new_model("forecaster", "GRU", data)
    with pytest.raises(rnn.Diverged, match=r"GRUForecaster \(forecaster\), seed 5.*epoch 1"):
        rnn.fit(model, rnn.FORECASTER, data["forecaster"], CONFIG, learning_rate=1e30, seed=5)


@pytest.mark.parametrize("task", rnn.TASKS)
def test_training_learns_and_repeats(task, data):
    config = replace(rnn.QUICK[task], epochs=4)
    rate = rnn.CELLS["GRU"].learning_rates[task]
    histories = []
    told = []
    for _ in range(2):
        model = new_model(task, "GRU", data)
        fitted = rnn.fit(model, rnn.TASKS[task], data[task], config, rate, 0, on_epoch=told.append)
        histories.append(fitted)
    assert told == histories[0] + histories[1], "each epoch is told of as it ends"
    losses = [[row["train_loss"] for row in history] for history in histories]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert all(row["gradient_norm"] > 0 and row["ms_per_step"] > 0 for row in histories[0])
