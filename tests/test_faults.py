"""Nothing lost: killed and interrupted runs, damaged records, folders that cannot be written."""

import itertools
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pytorch_rnn_models as rnn
from conftest import SCRIPT, copy_records, leave_out_figures

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")
TINY = ["--quick", "--tasks", "forecaster", "--seeds", "1", "2"]
TWO = ["--workers", "2"]
TABLES = ("runs", "summary", "comparisons", "tuning")


def tables(folder):
    """The tables of a folder, without times."""
    found = {}
    for name in TABLES:
        path = folder / f"pytorch_rnn_{name}.csv"
        if path.exists():
            found[name] = pd.read_csv(path).drop(columns="seconds", errors="ignore").to_csv()
    return found


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def records(folder, models="[RGL]*"):
    """The records of models, or of "baselines"."""
    return list((folder / "runs").glob(f"*_{models}_seed*.json"))


def hear_interrupts():
    """A shell makes what it starts in the background deaf to Ctrl-C, and its children with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*arguments):
    """The script, with empty figures, in a process group of its own."""
    command = [*SCRIPT, *map(str, arguments)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    return subprocess.Popen(command, preexec_fn=hear_interrupts, **options)


def wait_for(condition, seconds=60.0):
    """Wait until `condition` holds; returns how long that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - begin


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The output folder of a tiny run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_out_figures(monkeypatch)
        assert rnn.main([*TINY, "--output-dir", str(folder)]) == 0
    return folder


# --- killed, interrupted, ended -------------------------------------------------------


def kill_and_resume(folder, options, kills, expected):
    """Start, kill the whole process group at a random moment, resume, and so on to the end."""
    rng = np.random.default_rng(len(options))
    command = [*TINY, *options, "--resume", "--output-dir"]
    begin = time.monotonic()
    assert start(*command, folder / "timing").wait() == 0
    duration = time.monotonic() - begin
    fresh = itertools.count()
    current = folder / str(next(fresh))
    while kills:
        process = start(*command, current)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.6) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills -= 1
        else:  # it came to its end: begin anew
            assert process.returncode == 0 and tables(current) == expected
            shutil.rmtree(current)
            current = folder / str(next(fresh))
    assert start(*command, current).wait() == 0
    assert tables(current) == expected
    assert len(records(current)) == 6 and len(records(current, "baselines")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("tune", [[], ["--tune"]])
def test_killed_at_random_moments_and_resumed_it_ends_as_if_undisturbed(
    tune, tmp_path, no_figures, request
):
    """As often as `--kills` says, half of them with one worker, half with two."""
    assert rnn.main([*TINY, *tune, "--output-dir", str(tmp_path / "undisturbed")]) == 0
    expected = tables(tmp_path / "undisturbed")
    kills = request.config.getoption("--kills") // 2
    with ThreadPoolExecutor() as pool:
        chains = []
        for workers in ("1", "2"):
            options = [*tune, "--workers", workers]
            folder = tmp_path / workers
            chains.append(pool.submit(kill_and_resume, folder, options, kills, expected))
        for chain in chains:
            chain.result()


def resume(folder, capsys):
    """Resume the tiny run; returns what was said."""
    capsys.readouterr()
    assert rnn.main([*TINY, "--resume", "--output-dir", str(folder)]) == 0
    return capsys.readouterr().err


def times(folder):
    """When each record and model was written."""
    paths = [*folder.glob("runs/*.json"), *folder.glob("models/*")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_resume_does_only_what_is_missing_and_names_what_is_damaged(
    undisturbed, tmp_path, capsys, no_figures
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    name = "forecaster_{}_seed{}.{}".format
    runs = tmp_path / "runs"
    models = tmp_path / "models"
    (runs / name("RNN", 1, "json")).unlink()
    content = (runs / name("GRU", 1, "json")).read_bytes()
    (runs / name("GRU", 1, "json")).write_bytes(content[:-9])  # cut
    shutil.copy(runs / name("RNN", 2, "json"), runs / name("GRU", 2, "json"))  # of another run
    (models / name("LSTM", 1, "pt")).unlink()
    flip_a_bit(models / name("LSTM", 2, "pt"))
    (runs / name("baselines", 2, "json")).unlink()
    before = times(tmp_path)
    error = resume(tmp_path, capsys)
    assert "resuming: 2 of 8 runs are finished" in error
    for damaged in (name("GRU", 1, "json"), name("GRU", 2, "json"), name("LSTM", 2, "json")):
        assert f"{damaged}, or its model, is damaged" in error
    after = times(tmp_path)
    untouched = {"forecaster_RNN_seed2.json", "forecaster_RNN_seed2.pt"}
    untouched.add("forecaster_baselines_seed1.json")
    assert {file for file in before if before[file] == after[file]} == untouched
    assert tables(tmp_path) == tables(undisturbed) and not leftovers(tmp_path)
    assert "resuming: 8 of 8 runs are finished" in resume(tmp_path, capsys)
    assert times(tmp_path) == after


def test_what_a_report_makes_is_made_again(undisturbed, tmp_path, no_figures):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "predictions")
    (tmp_path / "pytorch_rnn_runs.csv").unlink()
    assert rnn.main([*TINY, "--resume", "--output-dir", str(tmp_path)]) == 0
    assert len(list((tmp_path / "predictions").iterdir())) == 2
    assert tables(tmp_path) == tables(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("pause", "times"), [(0.0, 1), (0.1, 1), (0.5, 1), (1.0, 1), (0.7, 2)])
def test_ctrl_c_while_the_workers_start_is_one_line_and_leaves_nothing(pause, times, tmp_path):
    process = start(*TINY, *TWO, "--seeds", *range(30), "--output-dir", tmp_path)
    wait_for(lambda: children(process.pid))
    time.sleep(pause)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    _, error = process.communicate(timeout=60)
    lines = error.decode().splitlines()
    assert process.returncode == 130 and lines[-1].startswith(
        "pytorch_rnn_models.py: interrupted; "
    )
    assert error.count(b"interrupted") == 1 and b"Traceback" not in error
    wait_for(lambda: group_is_gone(process), seconds=5)


def test_processes_started_where_signals_are_blocked_do_not_hear_ctrl_c():
    script = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    with ThreadPoolExecutor(1, initializer=rnn.block_signals) as pool:
        done = pool.submit(subprocess.run, [sys.executable, "-S", "-c", script]).result()
    assert done.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_ends_the_run_and_its_workers_and_keeps_what_is_finished(
    number, to_all, status, tmp_path
):
    process = start(*TINY, *TWO, "--seeds", *range(30), "--output-dir", tmp_path)
    wait_for(lambda: records(tmp_path))
    (os.killpg if to_all else os.kill)(
        process.pid, number
    )  # a terminal sends Ctrl-C to the whole group
    seconds = wait_for(lambda: process.poll() is not None)
    _, error = process.communicate(timeout=60)
    last = error.decode().splitlines()[-1]
    assert process.returncode == status and seconds < 5 and b"Traceback" not in error
    assert (
        last.startswith("pytorch_rnn_models.py: interrupted; ")
        and "--resume" in last
        and "--report" in last
    )
    wait_for(lambda: group_is_gone(process), seconds=5)
    finished = len(records(tmp_path))
    assert 0 < finished < 90 and not (tmp_path / "pytorch_rnn_runs.csv").exists()
    assert start(*TINY, "--report", "--output-dir", tmp_path).wait() == 0
    assert len(pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")) == finished


def children(pid):
    """The processes that the threads of `pid` have started and that have not ended."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found.extend(path.read_text().split())
    return found


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = start(*TINY, *TWO, "--seeds", *range(30), "--output-dir", tmp_path)
    wait_for(lambda: records(tmp_path))
    process.kill()
    process.communicate()
    wait_for(lambda: group_is_gone(process), seconds=15)


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_run_only(tmp_path, capsys, no_figures):
    def kill_a_worker():
        wait_for(lambda: records(tmp_path))
        time.sleep(0.3)  # what is killed is in the middle of its run
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    options = [
        *TINY,
        "--seeds",
        "0",
        "1",
        "2",
        "3",
        "--epochs",
        "30",
        "--output-dir",
        str(tmp_path),
    ]
    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    status = rnn.main([*options, *TWO])
    thread.join()
    lines = capsys.readouterr().err.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert status == 1 and len(failed) == 1 and "status -9" in failed[0]
    assert len(records(tmp_path)) + len(records(tmp_path, "baselines")) == 15
    assert not multiprocessing.active_children()
    assert rnn.main([*options, "--resume"]) == 0
    assert len(records(tmp_path)) == 12 and len(records(tmp_path, "baselines")) == 4


@pytest.mark.slow
def test_the_death_of_the_fork_server_costs_the_runs_under_way_only(tmp_path):
    process = start(*TINY, *TWO, "--seeds", *range(8), "--output-dir", tmp_path)
    wait_for(lambda: records(tmp_path))
    servers = [pid for pid in children(process.pid) if children(pid)]
    os.kill(int(servers[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    lines = error.decode().splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    # of the two under way, those that need longer than a second to see that their server is gone
    assert process.returncode == (1 if failed else 0) and len(failed) <= 2
    assert b"Traceback" not in error
    assert len(records(tmp_path)) + len(records(tmp_path, "baselines")) == 32 - len(failed)
    wait_for(lambda: group_is_gone(process), seconds=5)


# --- side by side ---------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_fill_one_folder_with_slices(undisturbed, tmp_path):
    slices = [
        start(*TINY[:3], "--models", name, "--seeds", 1, 2, "--output-dir", tmp_path)
        for name in ("RNN", "GRU")
    ]
    slices.append(
        start(
            *TINY[:3], "--models", "LSTM", "--seeds", 1, 2, "--workers", 2, "--output-dir", tmp_path
        )
    )
    assert [process.wait() for process in slices] == [0, 0, 0]
    assert rnn.main(["--quick", "--report", "--output-dir", str(tmp_path)]) == 0
    assert tables(tmp_path) == tables(undisturbed) and not leftovers(tmp_path)


# --- disks and folders ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_that_vanishes_ends_the_run_in_one_line(workers, tmp_path, capsys):
    def vanish():
        wait_for(lambda: records(tmp_path / "out"))
        (tmp_path / "out").rename(
            tmp_path / "elsewhere"
        )  # at one stroke, whatever is being written

    thread = threading.Thread(target=vanish)
    thread.start()
    arguments = [
        *TINY,
        "--workers",
        workers,
        "--seeds",
        *map(str, range(9)),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert rnn.main(arguments) == 1
    thread.join()
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("pytorch_rnn_models.py: [Errno 2] No such file or directory: ")
    assert not any("Traceback" in line for line in error) and not multiprocessing.active_children()


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_is_finished(
    tmp_path, capsys, monkeypatch, no_figures
):
    def nearly_full(path, content):
        if len(records(tmp_path)) == 2 and path.parent.name == "runs":
            raise OSError(28, "No space left on device", str(path))
        return honest(path, content)

    honest = rnn.write_whole
    monkeypatch.setattr(rnn, "write_whole", nearly_full)
    assert rnn.main([*TINY, "--output-dir", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(rnn, "write_whole", honest)
    assert rnn.main(["--quick", "--report", "--output-dir", str(tmp_path)]) == 0
    assert len(pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")) == 2


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(
    undisturbed, tmp_path, capsys, monkeypatch, no_figures
):
    def broken(_records):
        raise ZeroDivisionError("no such luck")

    copy_records(undisturbed, tmp_path)
    monkeypatch.setattr(rnn, "parameters_figure", broken)
    assert rnn.main(["--quick", "--report", "--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error == "failed: pytorch_rnn_parameter_counts.png could not be drawn: no such luck\n"
    for path in undisturbed.glob("pytorch_rnn_*"):
        assert (tmp_path / path.name).exists() == (path.name != "pytorch_rnn_parameter_counts.png")


def test_a_record_that_was_changed_anywhere_is_named_and_left_out(
    undisturbed, tmp_path, capsys, no_figures
):
    copy_records(undisturbed, tmp_path)
    path = tmp_path / "runs" / "forecaster_GRU_seed2.json"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(5):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1
        path.write_bytes(damaged)
        assert rnn.main([*TINY, "--report", "--output-dir", str(tmp_path)]) == 0
        assert f"{path} is not the whole record of a run" in capsys.readouterr().err
        assert len(pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")) == 5
    path.unlink()
    os.mkfifo(path)
    assert rnn.main([*TINY, "--report", "--output-dir", str(tmp_path)]) == 0
    assert f"{path} is not the whole record of a run" in capsys.readouterr().err


def test_what_killed_writers_left_is_removed_by_the_next_run(
    undisturbed, tmp_path, capsys, no_figures
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    left = [tmp_path / "runs" / ".a.json.12.tmp", tmp_path / "models" / ".b.pt.34.tmp"]
    for path in left:
        path.touch()
        os.utime(path, (0, 0))
    beside = tmp_path / "runs" / ".c.json.56.tmp"  # of a writer that is at work
    beside.touch()
    resume(tmp_path, capsys)
    assert leftovers(tmp_path) == [beside]


# --- who listens, and what may be said ------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">/dev/null 2>&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
        (">&-", 1, "standard output is closed"),
        (">/dev/full", 1, "No space left on device"),
    ],
)
def test_a_report_does_not_need_listeners_but_says_if_it_was_not_heard(
    redirection, status, said, undisturbed, tmp_path
):
    copy_records(undisturbed, tmp_path)
    command = f"{shlex.join([*SCRIPT, *TINY, '--report', '--output-dir', str(tmp_path)])}"
    done = subprocess.run(["sh", "-c", f"{command} {redirection}"], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert said in done.stderr and (tmp_path / "pytorch_rnn_runs.csv").exists()


def test_what_others_wrote_commands_neither_terminal_nor_spreadsheet_nor_figure(tmp_path, capsys):
    names = ["=1+1\x1b[31m", "$a$\u202e|b"]
    rows = [f'"@it was {names[i % 2]}\a {i}","{names[i % 2]}"' for i in range(60)]
    path = tmp_path / "my$_$.csv"
    path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    arguments = ["--quick", "--tasks", "classifier", "--models", "GRU", "--reviews", str(path)]
    assert rnn.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    markdown = (tmp_path / "out" / "pytorch_rnn_summary.md").read_text(encoding="utf-8")
    for text in (said.out, said.err, markdown):
        assert all(c.isprintable() or c in "\n\r\t" for c in text)
    predictions = pd.read_csv(tmp_path / "out" / "predictions" / "classifier_seed42.csv")
    for cells in (predictions["truth"], predictions["text"], predictions["GRU"]):
        assert not cells.str.startswith(("=", "@")).any() and cells.str.startswith("'").any()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"task": "chess"}',
        b"\xff\xfe",
        b'{"task": "pre',
        b"[" * 100_000,
    ],
)
def test_whatever_lies_among_the_records_is_named_and_left_out(
    content, undisturbed, tmp_path, capsys, no_figures
):
    copy_records(undisturbed, tmp_path)
    path = tmp_path / "runs" / "forecaster_RNN_seed1.json"
    path.write_bytes(content)
    assert rnn.main([*TINY, "--report", "--output-dir", str(tmp_path)]) == 0
    said = f"{path} is not the whole record of a run; it is left out"
    assert set(capsys.readouterr().err.splitlines()) == {said}
    assert len(pd.read_csv(tmp_path / "pytorch_rnn_runs.csv")) == 5
