"""Two processes on CPU, two devices each: one told to end ends both, and they go on to the bits of an unbroken run."""

import signal
import socket

import pytest

from memformer.training.config import RunError
from memformer.training.distributed import join_processes
from tests.training import runs

SETTINGS = {"train.log_every": 1, "train.eval_every": 0, "mesh.data": 2, "mesh.fsdp": 2}


def start_both(folder, compiled, steps):
    """Both processes of a run; the second writes to <folder>-second.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {**SETTINGS, "train.compile_cache": compiled, "train.steps": steps}
    return [
        runs.start(
            folder,
            settings,
            environment={"JAX_NUM_CPU_DEVICES": "2"},
            log=log,
            flags=[f"--processes={address},2,{index}"],
        )
        for index, log in enumerate((f"{folder}.log", f"{folder}-second.log"))
    ]


def finish_both(processes, folder):
    """What the first process said; the second has nothing of its own to say."""
    said = runs.finish(processes[0], f"{folder}.log")
    assert "step" not in runs.finish(processes[1], f"{folder}-second.log")
    return said


def test_two_processes(tmp_path):
    compiled, folder, whole = tmp_path / "compiled", tmp_path / "run", tmp_path / "whole"
    processes = start_both(folder, compiled, 1000)
    runs.wait_until(lambda: runs.last_step(folder) >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    said = finish_both(processes, folder)
    assert "data 2, fsdp 2" in said and "saved; the same command goes on" in said
    stopped = runs.last_step(folder)
    assert 3 <= stopped < 1000

    assert f"going on from step {stopped}" in finish_both(start_both(folder, compiled, stopped + 3), folder)
    finish_both(start_both(whole, compiled, stopped + 3), whole)
    runs.assert_same_run(folder, whole)


@pytest.mark.parametrize("where", ["automatic", "host,2,0", "host:1,2", "host:1,two,0", "127.0.0.1:1,2,5"])
def test_processes_that_cannot_be(where):
    with pytest.raises(RunError, match="--processes"):
        join_processes(where)
