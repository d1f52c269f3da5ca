import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytorch_rnn_models as rnn  # noqa: E402

SCRIPT = [sys.executable, str(ROOT / "pytorch_rnn_models.py")]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors are slower on many threads, and much slower where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _coarse_figures():
    """Here figures are not looked at pixel by pixel."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(rnn.STYLE, "figure.dpi", 25)
        yield


@pytest.fixture(scope="session")
def data():
    """The data of every task in the quick configuration, seed 0."""
    return {name: task.build_data(rnn.QUICK[name], 0) for name, task in rnn.TASKS.items()}


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The output folder of one run of the quick experiment, on two seeds."""
    folder = tmp_path_factory.mktemp("quick")
    assert quick(folder, "--seeds", 1, 2) == 0
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than a tiny run."""
    monkeypatch.setattr(rnn, "FIGURES", {})


def quick(folder, *arguments):
    """The exit status of a quick run into `folder`."""
    return rnn.main(["--quick", *map(str, arguments), "--output-dir", str(folder)])


def table(folder, name):
    """One of the tables in an output folder."""
    return pd.read_csv(folder / f"pytorch_rnn_{name}.csv")


def tables(folder, task=""):
    """The tables of a folder without times, as texts; of one task, if it is named."""
    found = {}
    for name in ("runs", "summary", "comparisons", "history"):
        rows = table(folder, name).drop(columns=["seconds", "ms_per_step"], errors="ignore")
        rows = rows[rows["task"].str.contains(task)].dropna(axis="columns", how="all")
        found[name] = rows.to_csv(index=False)
    return found


def new_model(task, cell, data, **changes):
    """An untrained model of the quick configuration for the data of that name."""
    config = replace(rnn.QUICK[task], **changes)
    return rnn.build_model(rnn.TASKS[task], cell, config, data[task], 0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--kills", type=int, default=10, help="of each of two runs, with --slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; runs with --slow, as in CI")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))
