"""A run on another device, without one: all happens there, nothing mixes devices, no step waits.

PyTorch leaves one device type to others ("PrivateUse1"). Here the CPU does its arithmetic, behind
a tensor class that hides the values. An operation that gets tensors of both devices fails, as on
CUDA, and whatever would make the CPU wait for CUDA is written down.
"""

import json
from dataclasses import replace

import pytest
import torch

import pytorch_rnn_models as rnn

pytree = pytest.importorskip("torch.utils._pytree")
decompositions = pytest.importorskip("torch._decomp.decompositions")
registration = pytest.importorskip("torch.utils.backend_registration")
if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch cannot simulate a device", allow_module_level=True)

TINY = {
    "classifier": {"n_reviews": 60, "phrases": (3, 12)},
    "predictor": {"n_words": 250, "window": 4},
    "forecaster": {"n_steps": 150, "window": 5},
}
CONFIG = {
    name: replace(config, hidden_dim=5, epochs=1, batch_size=16, updates=3, **TINY[name])
    for name, config in rnn.QUICK.items()
}
operations = []  # what ran on the device, by name
waits = []  # those of them that the CPU would have had to wait for


class DeviceTensor(torch.Tensor):
    """A tensor on the device; its values are a tensor on the CPU that only `run_operator` sees."""

    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            device="elsewhere:0",
        )
        tensor.values_there = values
        return tensor

    @property
    def tolist(self):  # torch's own refuses subclasses
        return self.cpu().tolist

    @classmethod
    def __torch_dispatch__(cls, operator, _types, args=(), kwargs=None):
        return run_operator(operator, args, kwargs or {})


def run_operator(operator, args, kwargs):
    """Do on the CPU what the device is asked for; refuse what mixes devices, note what waits."""
    name = operator._schema.name.removeprefix("aten::")
    tensors = [
        leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
    ]
    to_cpu = torch.device(kwargs.get("device") or "elsewhere").type == "cpu"
    leaves = to_cpu or name == "_local_scalar_dense"  # the values come back, as of .item()
    mixes = any(tensor.dim() for tensor in tensors if not isinstance(tensor, DeviceTensor))
    index_from_cpu = name == "index" and not args[0].requires_grad  # CUDA takes these, and waits
    assert not mixes or index_from_cpu or name == "copy_", f"{name} mixes devices"
    is_mask = name == "index" and any(tensor.dtype == torch.bool for tensor in tensors)
    is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
    operations.append(name)
    if (leaves or mixes or is_mask) and not is_asynchronous:
        waits.append(name)

    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    values = pytree.tree_map_only(DeviceTensor, lambda tensor: tensor.values_there, (args, kwargs))
    result = operator(*values[0], **values[1])
    if torch.Tag.inplace_view in operator.tags:  # the shape changes outside as well
        with torch._C._DisableTorchDispatch():
            operator(*args, **kwargs)
    if operator._schema.is_mutable:
        return args[0] if operator._schema.returns else None
    return result if leaves else pytree.tree_map_only(torch.Tensor, DeviceTensor, result)


@pytest.fixture(scope="module")
def device():
    """The device, with what makes tensors of nothing and what copies between devices.

    Its recurrent layers are PyTorch's own decompositions into small operators.
    """
    registration._setup_privateuseone_for_python_backend("elsewhere")
    library = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, **_options):
        return DeviceTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, dtype=None, **_options):
        return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))

    def arange(end, dtype=None, **_options):
        return DeviceTensor(torch.arange(end, dtype=dtype))

    def copy_from(values, target, non_blocking=False):
        return run_operator(torch.ops.aten.copy_.default, (target, values, non_blocking), {})

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("arange", arange, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    layers = {"lstm": "lstm_impl", "gru": "gru_impl", "rnn_tanh": "rnn_tanh_input"}
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        for layer, decomposition in layers.items():
            patch.setattr(torch._VF, layer, getattr(decompositions, decomposition), raising=False)
        # what is kept for the backward pass is counted by addresses, which there are none of there
        patch.setattr(rnn, "activation_bytes", lambda *_: 0)
        yield torch.device("elsewhere")


def record_of(run, device, folder):
    """Do a run on a device; returns its record, without what must differ."""
    experiment = rnn.Experiment(CONFIG, {run[:2]: (0.01, 0.0)}, [0], folder, device)
    rnn.make_folder(experiment)
    rnn.train_run(run, experiment)
    record = json.loads((folder / f"runs/{run}.json").read_text())
    del record["environment"]
    for row in record["history"]:
        del row["seconds"], row["ms_per_step"]
    return record


def same_numbers(found, expected):
    """Whether two records have the same structure, and numbers that differ by rounding only."""
    found, structure = pytree.tree_flatten(found)
    expected, expected_structure = pytree.tree_flatten(expected)
    assert structure == expected_structure
    for one, other in zip(found, expected):
        assert one == (
            pytest.approx(other, rel=1e-3, abs=1e-4) if isinstance(other, float) else other
        )


@pytest.mark.parametrize("model", rnn.CELLS)
@pytest.mark.parametrize("task", rnn.TASKS)
def test_a_run_elsewhere_is_the_run_on_the_cpu_and_no_step_waits(
    task, model, device, tmp_path, monkeypatch
):
    run = rnn.Run(task, model, 0, 0.01, 0.0)
    waits_by_step = []
    train_step = rnn.train_step

    def counted_step(*arguments):
        waits_by_step.append(list(waits))
        return train_step(*arguments)

    expected = record_of(run, rnn.CPU, tmp_path / "cpu")
    monkeypatch.setattr(rnn, "train_step", counted_step)
    operations.clear()
    waits.clear()
    found = record_of(run, device, tmp_path / "elsewhere")
    same_numbers(found, expected)
    assert "_fused_adam_" in operations, "training happens elsewhere"
    first, *_, last = waits_by_step
    assert first == last, f"between two batches the CPU waits for {last[len(first) :]}"
    rnn.load_checkpoint(tmp_path / "elsewhere" / f"models/{run}.pt")  # on the CPU


def test_a_rank_of_torchrun_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(rnn, "is_usable", lambda name: True)
    assert rnn.choose_device("auto") == torch.device("cuda:1")
