"""--tune: each model's learning rate by its validation loss, with the test part out of reach."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pytorch_rnn_models as rnn
from conftest import ROOT, leave_out_figures, quick, refusal, summary, table

TINY = ["--tune", "--tasks", "forecaster", "--models", "RNN", "GRU", "--seeds", "1", "2"]
KEY = ["task", "model", "learning_rate"]
LOSSES = {  # by model and learning rate, of seeds 1 and 2; a rate that is not here diverges
    "RNN": {3e-4: (3, 3), 1e-3: (2, 2), 3e-3: (1, 4), 1e-2: (5, 0)},  # 3e-3 is best on seed 1
    "GRU": {3e-4: (4, 4), 1e-3: (3, 1), 3e-3: (2, 2), 1e-2: (1, 2), 3e-2: (6, 0)},
}


def made_up_fit(monkeypatch, losses, other=rnn.Diverged):
    """Training that takes no time and finds the validation losses given; else raises `other`."""

    def fit(model, task, data, training, learning_rate, seed, on_epoch):
        name = type(model).__name__.removesuffix("Forecaster")
        if learning_rate not in losses[name]:
            raise other(f"{name} failed at {learning_rate:g}")
        best = losses[name][learning_rate][seed - 1]
        history = []
        for epoch, loss in enumerate((9, best, 8), start=1):
            metrics = {"loss": float(loss), "mse": float(loss), "mae": 1.0, "accuracy": 0.5}
            row = {
                "epoch": epoch,
                "learning_rate": learning_rate,
                "gradient_norm": 1.0,
                "clipped": 0.5,
                "seconds": 0.1,
                "train": metrics,
                "validation": metrics,
            }
            history.append(row)
            on_epoch(row)
        return history

    monkeypatch.setattr(rnn, "fit", fit)


def chosen_rates(tried):
    """The chosen rate of each (task, model)."""
    chosen = tried[tried["chosen"]].drop_duplicates(["task", "model"])
    return chosen.set_index(["task", "model"])["learning_rate"].to_dict()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a tuning with losses made up."""
    folder = tmp_path_factory.mktemp("tuned")
    drawn = rnn.learning_rates_figure
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_out_figures(monkeypatch)
        monkeypatch.setattr(rnn, "learning_rates_figure", drawn)
        made_up_fit(monkeypatch, LOSSES)
        assert quick(folder, *TINY) == 0
    return folder


def test_the_rate_of_the_lowest_mean_validation_loss_is_chosen_and_used(tuned):
    tried = table(tuned, "tuning")
    columns = "task,model,seed,learning_rate,epochs,best_epoch,val_loss,chosen"
    assert ",".join(tried) == columns
    assert chosen_rates(tried) == {("forecaster", "RNN"): 1e-3, ("forecaster", "GRU"): 1e-2}
    for row in tried.itertuples():
        assert row.val_loss == LOSSES[row.model][row.learning_rate][row.seed - 1]
        assert (row.best_epoch, row.epochs) == (2, 3)
    runs = table(tuned, "runs")
    assert len(runs) == 4
    assert chosen_rates(runs.assign(chosen=True)) == chosen_rates(tried)
    assert "| learning_rate |" in summary(tuned)
    assert (tuned / "pytorch_rnn_learning_rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_at_the_edge_is_followed_outwards_until_the_loss_rises(tuned):
    tried = table(tuned, "tuning")
    rates = tried.groupby("model")["learning_rate"].agg(set)
    assert rates["RNN"] == {3e-4, 1e-3, 3e-3, 1e-2}, "1e-2 on seed 1, 3e-4 when 1e-3 had won"
    assert rates["GRU"] == {1e-3, 3e-3, 1e-2, 3e-2}


def test_the_better_half_of_the_rates_goes_on_to_the_other_seeds(tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(rnn, "DEFAULT", rnn.QUICK)  # the whole grid, on tiny data
    made_up_fit(monkeypatch, LOSSES)
    assert rnn.main([*TINY, "--workers", "1", "--output-dir", str(tmp_path)]) == 0
    tried = table(tmp_path, "tuning")
    seeds = tried.groupby(["model", "learning_rate"])["seed"].nunique()
    assert seeds["RNN"].to_dict() == {3e-4: 2, 1e-3: 2, 3e-3: 2, 1e-2: 1}, "1e-3 was at the edge"
    assert seeds["GRU"].to_dict() == {1e-3: 1, 3e-3: 2, 1e-2: 2, 3e-2: 1}
    # of the rates that all seeds tried: 1e-2 would be best on seed 2 alone
    assert chosen_rates(tried) == {("forecaster", "RNN"): 1e-3, ("forecaster", "GRU"): 1e-2}


def test_no_run_is_trained_twice_and_the_result_is_that_of_its_rate(
    tmp_path, monkeypatch, no_figures
):
    honest = rnn.fit
    trained = []

    def fit(model, task, data, training, learning_rate, seed, on_epoch):
        trained.append((learning_rate, seed))
        return honest(model, task, data, training, learning_rate, seed, on_epoch)

    monkeypatch.setattr(rnn, "fit", fit)
    arguments = ["--tasks", "forecaster", "--models", "GRU", "--seeds", 1, 2]
    assert quick(tmp_path / "tuned", "--tune", *arguments) == 0
    assert len(trained) == len(set(trained)) == len(table(tmp_path / "tuned", "tuning"))
    runs = table(tmp_path / "tuned", "runs")
    rate = runs["learning_rate"].iloc[0]
    assert quick(tmp_path / "alone", "--learning-rate", rate, *arguments) == 0
    alone = table(tmp_path / "alone", "runs")
    assert runs.drop(columns="seconds").equals(alone.drop(columns="seconds"))
    tuned, other = (
        torch.load(tmp_path / folder / "models" / "forecaster_GRU_seed2.pt", weights_only=True)
        for folder in ("tuned", "alone")
    )
    for name, weight in tuned["weights"].items():
        assert torch.equal(weight, other["weights"][name])
    assert not list((tmp_path / "tuned" / "models").glob("*_rate*")), "not needed any more"


def test_the_test_part_is_out_of_reach_while_tuning(tmp_path, monkeypatch):
    class OutOfReach:
        def __getattribute__(*_):
            raise AssertionError("the test part was looked at")

        __len__ = __getattribute__

    data = rnn.build_series(rnn.QUICK["forecaster"], 0)
    monkeypatch.setattr(rnn, "load_data", lambda *_: replace(data, test=OutOfReach()))
    rnn.make_folder(tmp_path, ["forecaster"], rnn.QUICK)
    experiment = rnn.Experiment(rnn.QUICK, ["forecaster"], ["RNN"], [0], tmp_path)
    tuning = rnn.Run("forecaster", "RNN", 0, 1e-3, is_tuning=True)
    rnn.complete_run(tuning, experiment, lambda row: None)
    assert tuning.record_path(tmp_path).exists()
    assert not (tmp_path / "models" / "forecaster_RNN_seed0.pt").exists()
    with pytest.raises(AssertionError, match="looked at"):
        rnn.complete_run(tuning._replace(is_tuning=False), experiment, lambda row: None)


def test_resume_repeats_no_tuning_run(tuned, monkeypatch, no_figures):
    def state():
        content = (tuned / "pytorch_rnn_tuning.csv").read_bytes()
        records = (tuned / "runs" / "tuning").iterdir()
        return content, {path: path.stat().st_mtime_ns for path in records}

    before = state()
    monkeypatch.setattr(rnn, "fit", lambda *_: pytest.fail("a run was done again"))
    assert quick(tuned, *TINY, "--resume") == 0
    assert state() == before


def test_a_rate_that_diverges_is_named_and_not_chosen(tmp_path, monkeypatch, capsys, no_figures):
    made_up_fit(monkeypatch, {"RNN": {1e-3: (2, 2)}, "GRU": LOSSES["GRU"]})
    assert quick(tmp_path, *TINY) == 0
    tried = table(tmp_path, "tuning")
    of_rnn = tried[tried["model"] == "RNN"].groupby("learning_rate")["val_loss"].max()
    assert of_rnn.to_dict() == {3e-4: np.inf, 1e-3: 2, 3e-3: np.inf}
    assert chosen_rates(tried) == {("forecaster", "RNN"): 1e-3, ("forecaster", "GRU"): 1e-2}
    assert "forecaster_RNN_seed1_rate0.003: RNN failed at 0.003" in capsys.readouterr().err


def test_a_rate_that_was_not_tried_to_its_end_may_be_the_best_so_none_is_chosen(
    tmp_path, monkeypatch, capsys, no_figures
):
    """As where a run was killed: unlike divergence, that says nothing about the rate."""
    losses = {"RNN": {1e-3: (2, 2)}, "GRU": LOSSES["GRU"]}
    made_up_fit(monkeypatch, losses, other=RuntimeError)
    assert quick(tmp_path, *TINY) == 1
    error = capsys.readouterr().err
    assert "forecaster_RNN_seed1_rate0.003: RNN failed at 0.003" in error
    assert "learning rate of forecaster RNN: none" in error
    assert "learning rate of forecaster GRU: 0.01" in error
    assert set(table(tmp_path, "runs")["model"]) == {"GRU"}
    # the same command with --resume tries again what failed, and is done
    made_up_fit(monkeypatch, LOSSES)
    assert quick(tmp_path, *TINY, "--resume") == 0
    assert chosen_rates(table(tmp_path, "tuning"))["forecaster", "RNN"] == 1e-3


def test_where_all_rates_diverge_the_model_fails_and_the_others_go_on(
    tmp_path, monkeypatch, capsys, no_figures
):
    made_up_fit(monkeypatch, {"RNN": {}, "GRU": LOSSES["GRU"]})
    assert quick(tmp_path, *TINY) == 1
    assert "learning rate of forecaster RNN: none" in capsys.readouterr().err
    assert set(table(tmp_path, "runs")["model"]) == {"GRU"}


@pytest.mark.parametrize(
    ("options", "tuned_tasks"),
    [
        ([], {"forecaster"}),
        (["--no-tune"], set()),
        (["--learning-rate", "0.01"], set()),
        (["--tune"], {"forecaster", "predictor"}),
    ],
)
def test_rates_are_chosen_for_a_users_own_data_unless_told_otherwise(
    options, tuned_tasks, tmp_path, monkeypatch, capsys, no_figures
):
    monkeypatch.setattr(rnn, "DEFAULT", rnn.QUICK)
    made_up_fit(monkeypatch, dict.fromkeys(["GRU", "GRUPredictor"], LOSSES["GRU"]))
    (tmp_path / "my.csv").write_text("\n".join(str(i * i % 17) for i in range(500)))
    arguments = ["--tasks", "predictor", "forecaster", "--series", str(tmp_path / "my.csv")]
    arguments += ["--models", "GRU", "--seeds", "1", "2", "--workers", "1", *options]
    assert rnn.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    said = "learning rates are chosen first"
    assert capsys.readouterr().err.count(said) == bool(tuned_tasks)
    path = tmp_path / "out" / "pytorch_rnn_tuning.csv"
    assert path.exists() == bool(tuned_tasks)
    if tuned_tasks:
        assert set(table(tmp_path / "out", "tuning")["task"]) == tuned_tasks
    rates = table(tmp_path / "out", "runs").groupby("task")["learning_rate"].first()
    expected = dict.fromkeys(tuned_tasks, 0.01) or {"forecaster": 0.01}
    assert {task: rates[task] for task in expected} == expected


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (["--hidden-dim", "7"], "hidden_dim 16, not 7"),
        (["--epochs", "9"], "epochs 2, not 9"),
        (["--window", "30"], "window 50, not 30"),
        (["--series", "my.csv"], "file None, not my.csv"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused_in_one_line(
    changes, difference, tuned, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").write_text("\n".join(str(i % 7) for i in range(500)))
    monkeypatch.setattr(rnn, "fit", lambda *_: pytest.fail("trained"))

    def state():
        files = [path for path in tuned.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    error = refusal(["--quick", *TINY, *changes, "--output-dir", str(tuned)], capsys)
    assert error.count("\n") == 1
    assert "forecaster" in error and difference in error and "--output-dir" in error
    assert state() == before


def test_the_configured_rates_are_those_of_the_committed_table():
    tried = table(ROOT / "outputs" / "tuning", "tuning")
    assert set(tried["seed"]) == {0, 1, 2, 3, 4}
    for (task, model), rate in chosen_rates(tried).items():
        assert rnn.CELLS[model].learning_rates[task] == rate, (task, model)
    assert len(chosen_rates(tried)) == 12
