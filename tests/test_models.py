"""The classes: shapes, gradients, parameters, padding, initial weights, saving, use."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pytorch_rnn_models as rnn
from conftest import new_model

ALL = list(itertools.product(rnn.CELLS, ("Classifier", "Predictor", "Forecaster")))
TEXT_PARAMETERS = {"RNN": 15_200, "GRU": 45_600, "LSTM": 60_800, "IRNN": 15_200}
LAYERS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU, "IRNN": nn.RNN}


def build(name, kind):
    """A model of the default sizes, inputs for it, and the shape that its output should have."""
    torch.manual_seed(0)
    model_class = getattr(rnn, name + kind)
    if kind == "Classifier":
        return model_class(300, 50, 100, 1), torch.randint(1, 300, (4, 12)), (4, 1)
    if kind == "Predictor":
        return model_class(300, 50, 100), torch.randint(1, 300, (4, 10)), (4, 300)
    return model_class(2, 32, 3), torch.randn(4, 50, 2), (4, 3)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_shapes_gradients_parameters_and_pickles(name, kind):
    model, inputs, shape = build(name, kind)
    output = model(inputs)
    assert output.shape == shape
    output.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    [layer] = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    assert type(layer) is LAYERS[name], "each wraps the stock layer"
    assert layer.num_layers == (2 if kind == "Forecaster" else 1)
    counts = rnn.count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    if kind != "Forecaster":
        assert counts["recurrent"] == TEXT_PARAMETERS[name]
    copy = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(copy(inputs), model(inputs))
    assert vars(type(model))["__doc__"]


@pytest.mark.parametrize("name", [*rnn.CELLS, "Recency"])
def test_classifier_gives_probabilities_that_padding_does_not_change(name):
    model = rnn.Recency(300, 50, 3) if name == "Recency" else build(name, "Classifier")[0]
    ids = torch.randint(1, 300, (4, 12))
    model.eval()
    padded = torch.cat([ids, torch.zeros(4, 80, dtype=torch.long)], dim=1)
    output = model(ids)
    assert ((output >= 0) & (output <= 1)).all()
    torch.testing.assert_close(model(padded), output)
    mixed = padded.clone()
    mixed[1, 5:] = 0  # a shorter review beside longer ones
    torch.testing.assert_close(model(mixed)[1:2], model(ids[1:2, :5]))
    assert model(torch.zeros(1, 7, dtype=torch.long)).isfinite().all(), "without words, too"


@pytest.mark.parametrize("name", rnn.CELLS)
def test_initial_weights(name):
    layer = build(name, "Forecaster")[0].recurrent
    for gate in layer.weight_hh_l1.detach().split(32):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), atol=1e-4, rtol=0)
        assert torch.equal(gate, torch.eye(32)) == (name == "IRNN")
    model = build(name, "Classifier")[0]
    layer = model.recurrent
    for gate in layer.weight_hh_l0.detach().split(100):
        assert torch.equal(gate, torch.eye(100) * (1 if name == "IRNN" else 0.9))
    assert not (layer.bias_ih_l0.any() or layer.bias_hh_l0.any()), "no cell is helped by its biases"
    assert getattr(layer, "nonlinearity", "tanh") == ("relu" if name == "IRNN" else "tanh")
    assert not model.embedding.weight[0].any()
    assert model.embedding.weight[1:].std().item() == pytest.approx(0.3, rel=0.05)


class MinimalGated(nn.Module):
    """A cell of one's own on `nn.Linear` (minimal gated unit, Zhou et al. 2016)."""

    def __init__(self, input_dim, hidden_dim, n_layers, batch_first, dropout):
        super().__init__()
        self.gate = nn.Linear(input_dim + hidden_dim, hidden_dim)
        self.new = nn.Linear(input_dim + hidden_dim, hidden_dim)

    def forward(self, inputs):
        state = inputs.new_zeros(len(inputs), self.gate.out_features)
        states = []
        for values in inputs.unbind(1):
            share = torch.sigmoid(self.gate(torch.cat([values, state], dim=1)))
            new = torch.tanh(self.new(torch.cat([values, share * state], dim=1)))
            state = (1 - share) * state + share * new
            states.append(state)
        return torch.stack(states, dim=1), state


def test_a_cell_of_ones_own_starts_as_it_likes_and_is_trained_and_its_error_is_shown(
    tmp_path, monkeypatch, no_figures
):
    cell = rnn.Cell(MinimalGated, "#000000", {"forecaster": 0.01})
    monkeypatch.setitem(rnn.CELLS, "MGU", cell)

    class MGUForecaster(rnn.Forecaster):
        """A forecaster on the cell."""

        cell = "MGU"

    settings = {"tasks": ["forecaster"], "quick": True, "output_dir": tmp_path}
    torch.manual_seed(0)
    weights = MGUForecaster(1, 16, 1).recurrent.gate.weight
    torch.manual_seed(0)
    assert torch.equal(weights, MinimalGated(1, 16, 2, True, 0.0).gate.weight)
    runs = rnn.run(models=["MGU"], epochs=4, **settings).runs
    assert runs["model"].tolist() == ["MGU"] and runs["recurrent_parameters"][0] == 2 * 17 * 16 + 32
    monkeypatch.setattr(MinimalGated, "forward", lambda self, inputs: inputs.no_such_thing)
    arguments = ["--quick", "--tasks", "forecaster", "--models", "MGU", "--output-dir"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        rnn.main([*arguments, str(tmp_path / "broken")])


# --- trained models in use ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(quick_run):
    """A trained model of each task."""
    folder = quick_run / "models"
    return {name: rnn.load_checkpoint(folder / f"{name}_GRU_seed1.pt") for name in rnn.TASKS}


def test_checkpoints_give_the_outputs_of_the_run(quick_run, trained):
    runs = rnn.pd.read_csv(quick_run / "pytorch_rnn_runs.csv").query("model == 'GRU' and seed == 1")
    for name, model in trained.items():
        task = rnn.TASKS[name]
        answers = rnn.evaluate(model, task, task.build_data(rnn.QUICK[name], 1).test)
        expected = runs.set_index("task")["test_loss"][name]
        assert answers["loss"].mean() == pytest.approx(expected, rel=1e-5)


def test_a_classifier_gives_probabilities_and_says_how_many_words_it_knows(trained):
    found = trained["classifier"].predict(["I found plot moving.", "xyzzy", ""])
    assert found["knows"].tolist() == ["4 of 4 words", "0 of 1 words", "0 of 0 words"]
    assert found["negative"][0] + found["positive"][0] == pytest.approx(1)
    assert found[["negative", "positive"]].iloc[2].isna().all()
    long = "critics found plot dull " * 200
    most = trained["classifier"].preprocessing["max_words"]
    last = " ".join(long.split()[-most:])
    assert found.columns.tolist() == ["negative", "positive", "knows"]
    one, other = trained["classifier"].predict([long, last])["positive"]
    assert one == other, "the last words are read, as in training"


def test_a_predictor_gives_words_and_continues(trained):
    model = trained["predictor"]
    likeliest = model.predict("the sailor", n=3)
    assert len(likeliest) == 3 and likeliest.is_monotonic_decreasing
    assert not {rnn.PAD, rnn.UNK} & set(likeliest.index)
    drawn = model.continue_text("the sailor", length=6, seed=1)
    assert drawn == model.continue_text("the sailor", length=6, seed=1)
    first = model.continue_text("the sailor", length=1, temperature=0.0)
    assert first.strip(" .") in (likeliest.index[0], "")


def test_a_forecaster_is_right_at_any_level_and_refuses_what_is_no_number(trained):
    model = trained["forecaster"]
    values = np.sin(np.arange(80))
    found = model.predict(values, length=3)
    assert model.predict(values + 100, length=3) == pytest.approx(found + 100, abs=1e-3)
    for wrong in ([], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(rnn.InputError, match="finite values, in one dimension"):
            model.predict(wrong)


def test_damaged_and_foreign_files_are_no_models(quick_run, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(pytest.raises, path)
    code = path.read_bytes()
    content = (quick_run / "models" / "forecaster_GRU_seed1.pt").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[:-100], b"", b"no model", code, flipped):
        path.write_bytes(damaged)
        with pytest.raises(rnn.InputError, match="not a trained model"):
            rnn.load_checkpoint(path)


def test_a_free_running_forecast_is_fed_back_and_in_the_units_of_the_series(data):
    own = data["forecaster"]
    mean = own.preprocessing["mean"]
    model = new_model("forecaster", "LSTM", data).eval()
    found = rnn.forecasts(model, own, shown=4, horizon=5)
    window = own.test.inputs[:1]
    values = []
    with torch.no_grad():
        for _ in range(5):
            values.append((window[:, -1] + model(rnn.centred(window))).item())
            window = torch.cat([window[:, 1:], torch.full((1, 1, 1), values[-1])], dim=1)
    scaled = (np.array(found["free_forecast"]) - mean) / own.unit
    assert scaled == pytest.approx(np.array(values), abs=1e-4)
    truth = own.test.targets[:5, 0].double().numpy() * own.unit + mean
    assert found["free_truth"] == pytest.approx(truth, abs=1e-5)
    assert found["truth"] == pytest.approx(truth[:4], abs=1e-5)
    assert found["forecast"][0] == pytest.approx(found["free_forecast"][0], abs=1e-5)
