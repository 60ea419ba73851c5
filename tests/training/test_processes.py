"""Two processes on CPU, two devices each: a signal to one stops both, and a restart has the same bits."""

import shutil
import signal
import socket

import pytest

from memformer.training.config import RunError
from memformer.training.distributed import join_processes
from tests.training import runs

SETTINGS = {"train.log_every": 1, "train.eval_every": 0, "mesh.data": 2, "mesh.fsdp": 2}


def start_both(folder, steps):
    """Both processes of a run; the second writes to <folder>-second.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # no cache of compiled programs: one process would wait for the other's compiler, longer than Gloo allows
    settings = {**SETTINGS, "train.steps": steps}
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
    """Output of the first process; the second prints nothing of its own."""
    said = runs.finish(processes[0], f"{folder}.log")
    assert "step" not in runs.finish(processes[1], f"{folder}-second.log")
    return said


def test_two_processes(tmp_path):
    """The step saved at Ctrl-C is reached again from the checkpoint before it."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    processes = start_both(whole, 1000)
    runs.wait_until(lambda: runs.last_step(whole) >= 5, processes[0])
    # JAX handles SIGTERM of one process of several; Ctrl-C takes the same way
    processes[1].send_signal(signal.SIGINT)
    said = finish_both(processes, whole)
    assert "data 2, fsdp 2" in said and "saved; rerun the command to resume" in said

    stopped, arrays, data, _ = runs.last_checkpoint(whole)
    assert stopped == runs.last_step(whole) < 1000
    before = 3 * ((stopped - 1) // 3)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / str(stopped))
    assert f"resuming from step {before}" in finish_both(start_both(folder, stopped), folder)
    again, arrays_again, data_again, _ = runs.last_checkpoint(folder)
    assert (again, data_again["position"]) == (stopped, data["position"])
    runs.assert_same_arrays(arrays_again, arrays)
    assert [record for record in runs.records_of(folder) if record["kind"] == "train"] == runs.records_of(whole)


@pytest.mark.parametrize("where", ["automatic", "host,2,0", "host:1,2", "host:1,two,0", "127.0.0.1:1,2,5"])
def test_processes_that_cannot_be(where):
    with pytest.raises(RunError, match="--processes"):
        join_processes(where)
