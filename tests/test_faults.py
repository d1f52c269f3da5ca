"""Nothing lost: killed and interrupted runs, workers that die. All slow: run with --slow."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import SCRIPT, tables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX"),
]
TINY = ["--quick", "--tasks", "forecaster", "--seeds", "1", "2"]
MANY = ["--seeds", *map(str, range(12)), "--workers", "2"]


def hear_interrupts():
    """A shell makes what it starts in the background deaf to Ctrl-C, and its children with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*arguments):
    """The script in a process group of its own."""
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


def children(process):
    """The processes that `process` has started and that have not ended."""
    paths = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for path in paths for pid in path.read_text().split()]


def records(folder):
    return list((folder / "runs").glob("*.json"))


@pytest.mark.parametrize("tune", [[], ["--tune"]])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_random_moments_and_resumed_it_ends_as_if_undisturbed(
    tune, workers, tmp_path, request
):
    """As often as `--kills` says in all, with and without tuning, with one worker and with two."""
    command = [*TINY, *tune, "--workers", workers, "--resume", "--output-dir"]
    begin = time.monotonic()
    assert start(*command, tmp_path / "undisturbed").wait() == 0
    duration = time.monotonic() - begin
    expected = tables(tmp_path / "undisturbed")
    rng = np.random.default_rng(len(tune))
    folder = tmp_path / "killed"
    kills = request.config.getoption("--kills") // 2
    while kills:
        process = start(*command, folder)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.7) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills -= 1
        else:  # it came to its end: begin anew
            assert process.returncode == 0 and tables(folder) == expected
            shutil.rmtree(folder)
    assert start(*command, folder).wait() == 0
    assert tables(folder) == expected and len(records(folder)) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0.5, 2.0, None])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_ends_all_in_one_line_and_keeps_what_is_finished(number, pause, workers, tmp_path):
    process = start(*TINY, *MANY, "--workers", workers, "--output-dir", tmp_path)
    if pause is None:
        wait_for(lambda: any((tmp_path / "runs").glob("*GRU*.json")))
    else:
        wait_for(lambda: children(process) or workers == "1")
        time.sleep(pause)
    if number == signal.SIGINT:  # a terminal sends Ctrl-C to the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    seconds = wait_for(lambda: process.poll() is not None)
    wait_for(lambda: group_is_gone(process), seconds=2)
    error = process.communicate()[1].decode()
    if pause == 0.5 and "interrupted" not in error:
        return  # it had not come to its `main` yet
    assert process.returncode == 128 + number and seconds < 2.5 and "Traceback" not in error
    assert error.count("interrupted; finished runs are kept") == 1
    if pause is None:
        assert start("--report", "--output-dir", tmp_path).wait() == 0


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = start(*TINY, *MANY, "--output-dir", tmp_path)
    wait_for(lambda: records(tmp_path))
    process.kill()
    process.communicate()
    wait_for(lambda: group_is_gone(process), seconds=5)


def test_a_worker_that_is_killed_ends_the_command_in_one_line_and_resuming_does_the_rest(tmp_path):
    arguments = [*TINY, "--workers", "2", "--output-dir", tmp_path]
    process = start(*arguments, "--epochs", "30")
    wait_for(lambda: records(tmp_path))
    os.kill(children(process)[-1], signal.SIGKILL)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and "Traceback" not in error
    assert "--resume does the rest" in error.splitlines()[-1]
    wait_for(lambda: group_is_gone(process), seconds=2)
    assert start(*arguments, "--epochs", "30", "--resume").wait() == 0
    assert len(records(tmp_path)) == 8


def test_two_machines_do_what_one_does_and_say_once_what_is_wrong(tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]

    def two_machines(*arguments):
        command = [*torchrun, SCRIPT[1], *TINY, "--tune", *arguments]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        machines = [subprocess.Popen(command, **options) for _ in range(2)]
        errors = [machine.communicate(timeout=120)[1] for machine in machines]
        return {machine.returncode for machine in machines}, "".join(errors)

    assert start(*TINY, "--tune", "--output-dir", tmp_path / "one").wait() == 0
    assert two_machines("--output-dir", tmp_path / "two")[0] == {0}
    assert tables(tmp_path / "two") == tables(tmp_path / "one")
    statuses, error = two_machines("--window", "20", "--output-dir", tmp_path / "two")
    assert statuses == {1} and error.count("window (50, not 20)") == 1
