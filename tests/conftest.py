import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytorch_rnn_models as rnn  # noqa: E402

# the command line, with empty figures
SCRIPT = [sys.executable, str(ROOT / "tests" / "without_figures.py")]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors are slower on many threads, and much slower where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _coarse_figures():
    """Figures are looked at in tests for what they hold, not pixel by pixel."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(rnn.STYLE, "figure.dpi", 30)
        yield


@pytest.fixture(scope="session")
def data():
    """The data of every task in the quick configuration, seed 0."""
    return {name: task.build_data(rnn.QUICK[name], 0) for name, task in rnn.TASKS.items()}


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The output folder of one run of the quick experiment."""
    directory = tmp_path_factory.mktemp("quick")
    assert quick(directory) == 0
    return directory


def leave_out_figures(monkeypatch):
    """Make every figure an empty one: drawing them takes longer than a tiny run."""
    for name in dir(rnn):
        if name.endswith("_figure") and name != "new_figure":
            monkeypatch.setattr(rnn, name, lambda *_: Figure(figsize=(1, 1)))
    for figures in rnn.TASK_FIGURES.values():
        for name in figures:
            monkeypatch.setitem(figures, name, lambda *_: Figure(figsize=(1, 1)))


@pytest.fixture
def no_figures(monkeypatch):
    leave_out_figures(monkeypatch)


def quick(folder, *arguments):
    """The exit status of a quick run into `folder`."""
    return rnn.main(["--quick", *map(str, arguments), "--output-dir", str(folder)])


def table(folder, name):
    """One of the tables in an output folder."""
    return pd.read_csv(folder / f"pytorch_rnn_{name}.csv")


def summary(folder):
    """The summary in an output folder, its lines joined."""
    return " ".join((folder / "pytorch_rnn_summary.md").read_text(encoding="utf-8").split())


def copy_records(source, folder, ignore=None):
    """Copy what a report is made from, but for the records that `ignore` names."""
    shutil.copytree(source / "runs", folder / "runs", ignore=ignore)
    shutil.copy(source / "config.json", folder)


def refusal(arguments, capsys):
    """The answer to a command line that cannot be followed: status 2 and one line."""
    assert rnn.main(arguments) == 2
    printed, error = capsys.readouterr()
    assert not printed and error.startswith("pytorch_rnn_models.py: ") and error.endswith("\n")
    assert error[:-1].isprintable() and len(error) <= len("pytorch_rnn_models.py: ") + 300 + 1
    return error


def new_model(task, name, data, **changes):
    """An untrained model of the quick configuration for the data of that name."""
    config = replace(rnn.QUICK[task], **changes)
    return rnn.build_model(rnn.TASKS[task], name, config, data[task], 0)


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
