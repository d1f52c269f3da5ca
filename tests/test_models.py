"""The classes: shapes, gradients, parameters, padding, initial weights, descriptions."""

import itertools
import pickle

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
def test_shapes_gradients_and_layers(name, kind):
    model, inputs, shape = build(name, kind)
    output = model(inputs)
    assert output.shape == shape
    output.sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters()
    )
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    assert [type(layer) for layer in layers] == [LAYERS[name]], "each wraps the stock layer"
    assert layers[0].num_layers == (2 if kind == "Forecaster" else 1)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_parameter_counts_add_up(name, kind):
    model, inputs, _ = build(name, kind)
    total = sum(p.numel() for p in model.parameters())
    counts = rnn.count_parameters(model)
    assert sum(counts.values()) == total
    assert sum(layer["parameters"] for layer in rnn.describe_layers(model, inputs)) == total
    if kind != "Forecaster":
        assert counts["recurrent"] == TEXT_PARAMETERS[name]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_models_can_be_pickled_and_have_a_docstring_of_their_own(name, kind):
    model, inputs, _ = build(name, kind)
    copy = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(copy(inputs), model(inputs))
    assert vars(type(model))["__doc__"]


@pytest.mark.parametrize("name", rnn.CELLS)
def test_classifier_gives_probabilities_that_padding_does_not_change(name):
    model, ids, _ = build(name, "Classifier")
    model.eval()
    padded = torch.cat([ids, torch.zeros(4, 80, dtype=torch.long)], dim=1)
    output = model(ids)
    assert ((output >= 0) & (output <= 1)).all()
    torch.testing.assert_close(model(padded), output)
    mixed = padded.clone()
    mixed[1, 5:] = 0  # a shorter review beside longer ones
    torch.testing.assert_close(model(mixed)[1:2], model(ids[1:2, :5]))
    assert model(torch.zeros(1, 7, dtype=torch.long)).isfinite().all(), (
        "a review without words has an answer too"
    )


@pytest.mark.parametrize("name", rnn.CELLS)
def test_initial_weights(name):
    model, *_ = build(name, "Forecaster")
    layer = model.recurrent.rnn
    for gate in layer.weight_hh_l1.detach().split(32):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), atol=1e-4, rtol=0)
        assert torch.equal(gate, torch.eye(32)) == (name == "IRNN")
    model, *_ = build(name, "Classifier")
    layer = model.recurrent.rnn
    for gate in layer.weight_hh_l0.detach().split(100):
        assert torch.equal(gate, torch.eye(100) * (1 if name == "IRNN" else 0.9))
    assert not (layer.bias_ih_l0.any() or layer.bias_hh_l0.any()), "no cell is helped by its biases"
    assert getattr(layer, "nonlinearity", "tanh") == ("relu" if name == "IRNN" else "tanh")
    assert not model.embedding.weight[0].any()
    assert model.embedding.weight[1:].std().item() == pytest.approx(0.1, rel=0.05)


def test_description_follows_the_live_model(data):
    inputs = data["classifier"].train.inputs[:3]
    model = new_model("classifier", "GRU", data, n_layers=2, dropout=0.4)
    model.head = nn.Sequential(nn.Linear(100, 7), nn.Linear(7, 1), nn.Sigmoid())
    layers = rnn.describe_layers(model, inputs)
    kinds = [layer["kind"] for layer in layers]
    assert kinds == ["Embedding", "GRU", "Recurrent", "Dropout", "Linear", "Linear", "Sigmoid"]
    assert layers[1]["shape"] == [inputs.shape[1], 100] and "num_layers=2" in layers[1]["settings"]
    assert layers[4]["shape"] == [7] and layers[4]["parameters"] == 707
