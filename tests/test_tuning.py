"""--tune: each model's learning rate by its validation loss, with the test part out of reach."""

from dataclasses import replace

import numpy as np
import pytest

import pytorch_rnn_models as rnn
from conftest import ROOT, summary, table

TINY = ["--quick", "--tune", "--tasks", "forecaster", "--models", "RNN", "GRU", "--seeds", "1", "2", "--output-dir"]
KEY = ["task", "model", "learning_rate"]


def chosen_rates(tried):
    """The chosen rate of each (task, model)."""
    chosen = tried[tried["chosen"]].drop_duplicates(["task", "model"])
    return chosen.set_index(["task", "model"])["learning_rate"].to_dict()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    assert rnn.main([*TINY, str(folder)]) == 0
    return folder


def test_the_rate_of_the_lowest_mean_validation_loss_is_chosen_and_used(tuned):
    tried, runs = table(tuned, "tuning"), table(tuned, "runs")
    assert ",".join(tried) == "task,model,learning_rate,seed,val_loss,best_epoch,epochs,chosen"
    assert set(tried["seed"]) == {1, 2} and len(runs) == 4
    means = tried.groupby(KEY)["val_loss"].mean()
    for (task, model), rate in chosen_rates(tried).items():
        assert means[task, model].idxmin() == rate
    assert chosen_rates(runs.assign(chosen=True)) == chosen_rates(tried)
    assert "| learning rate |" in summary(tuned)
    assert (tuned / "pytorch_rnn_learning_rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_tuning_run_is_the_run_that_the_comparison_makes_with_its_rate(tuned):
    tried, runs = table(tuned, "tuning"), table(tuned, "runs")
    both = runs.merge(tried[tried["chosen"]], on=[*KEY, "seed"], suffixes=("", "_tuning"))
    assert len(both) == len(runs) and (both["val_loss"] == both["val_loss_tuning"]).all()


def test_a_rate_at_the_edge_of_the_grid_is_followed_one_step_outwards(tuned):
    grid = rnn.RATES[2:4]
    for _, rows in table(tuned, "tuning").groupby(["task", "model"]):
        inner = rows[rows["learning_rate"].isin(grid)].groupby("learning_rate")["val_loss"].mean().idxmin()
        outer = {rnn.RATES[1]} if inner == grid[0] else {rnn.RATES[4]}
        assert set(rows["learning_rate"]) == {*grid, *outer}


def test_the_test_part_is_out_of_reach_while_tuning(tmp_path, monkeypatch):
    class OutOfReach:
        def __getattribute__(*_):
            raise AssertionError("the test part was looked at")

        __len__ = __getattribute__

    data = rnn.build_series(rnn.QUICK["forecaster"], 0)
    monkeypatch.setattr(rnn, "cached_data", lambda *_: replace(data, test=OutOfReach()))
    rnn.make_folders(tmp_path, "runs/tuning")
    job = rnn.Job("forecaster", "RNN", 0, 1e-3, tuning=True)
    arguments = {"config": rnn.QUICK, "device": rnn.CPU, "output_dir": tmp_path, "costs": {"forecaster": {"RNN": {}}}}
    rnn.carry_out(job, lambda *_: None, **arguments)
    assert job.file(tmp_path).exists() and not list((tmp_path / "models").iterdir())
    with pytest.raises(AssertionError, match="looked at"):
        rnn.carry_out(job._replace(tuning=False), lambda *_: None, **arguments)


def test_resume_repeats_no_tuning_run(tuned, capsys):
    def state():
        content = (tuned / "pytorch_rnn_tuning.csv").read_bytes()
        return content, {path: path.stat().st_mtime_ns for path in (tuned / "runs" / "tuning").iterdir()}

    before = state()
    assert rnn.main([*TINY, str(tuned), "--resume"]) == 0
    assert state() == before
    assert "8 of 8 runs are finished" in capsys.readouterr().err


def test_a_rate_that_diverges_is_named_and_not_chosen(tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.setattr(rnn, "RATES", (1e-4, 3e-4, 1e-3, 1e30, 1e31))
    assert rnn.main([*TINY, str(tmp_path)]) == 0
    tried = table(tmp_path, "tuning")
    assert np.isinf(tried[tried["learning_rate"] == 1e30]["val_loss"]).all()
    assert set(chosen_rates(tried).values()) <= {1e-3, 3e-4}
    assert "failed: forecaster RNN seed 1 rate 1e+30: RNNForecaster" in capsys.readouterr().err


def test_where_all_rates_diverge_the_model_fails_and_the_others_go_on(tmp_path, monkeypatch, capsys, no_figures):
    honest = rnn.fit

    def rnn_diverges(model, *arguments):
        if isinstance(model, rnn.RNNForecaster):
            raise RuntimeError("the loss is not finite")
        return honest(model, *arguments)

    monkeypatch.setattr(rnn, "fit", rnn_diverges)
    assert rnn.main([*TINY, str(tmp_path)]) == 1
    assert "learning rate of forecaster RNN: none" in capsys.readouterr().err
    assert set(table(tmp_path, "runs")["model"]) == {"GRU"}


def test_the_configured_rates_are_those_of_the_committed_table():
    tried = table(ROOT / "outputs" / "tuning", "tuning")
    assert set(tried["seed"]) == {0, 1, 2, 3, 4}
    for (task, model), rate in chosen_rates(tried).items():
        assert getattr(rnn.DEFAULT[task].learning_rates, model) == rate, (task, model)
    assert len(chosen_rates(tried)) == 9
