"""Two processes on CPU, two devices each: a signal to one stops both, and a restart has the same bits."""

import json
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from memformer.training.config import RunError
from memformer.training.distributed import join_processes
from memformer.training.evaluation import evaluate_checkpoint
from memformer.training.lock import run_lock
from tests.processes import launch
from tests.training import process_steps, runs

SETTINGS = {"train.log_every": 1, "train.eval_every": 0, "mesh.data": 2, "mesh.fsdp": 2}


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def in_both(start, folder):
    """Calls start(flags, environment, log) for both processes; the second writes to <folder>-second.log."""
    address, environment = free_address(), {"JAX_NUM_CPU_DEVICES": "2"}
    return [
        start([f"--processes={address},2,{index}"], environment, log)
        for index, log in enumerate((f"{folder}.log", f"{folder}-second.log"))
    ]


def start_both(folder, steps):
    """Both processes of a run."""
    # no cache of compiled programs: one process would wait for the other's compiler, longer than Gloo allows
    settings = {**SETTINGS, "train.steps": steps}
    return in_both(
        lambda flags, environment, log: runs.start(
            folder, settings, environment=environment, log=log, flags=flags, launch=launch
        ),
        folder,
    )


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
    sums = (whole / "checkpoints" / str(stopped) / "state" / "checksums.json").read_text()
    assert "ocdbt.process_0/d/" in sums and "ocdbt.process_1/d/" in sums
    before = 3 * ((stopped - 1) // 3)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / str(stopped))
    assert f"resuming from step {before}" in finish_both(start_both(folder, stopped), folder)
    again, arrays_again, data_again, _ = runs.last_checkpoint(folder)
    assert (again, data_again["position"]) == (stopped, data["position"])
    runs.assert_same_arrays(arrays_again, arrays)
    assert [record for record in runs.records_of(folder) if record["kind"] == "train"] == runs.records_of(whole)

    command = ["eval.py", f"--workdir={whole}", "--lengths=8", "--batches=1", f"--out={tmp_path}/both.json"]
    scores = tmp_path / "scores"
    said = finish_both(
        in_both(lambda flags, environment, log: launch(command + flags, log, environment), scores), scores
    )
    assert said.count("linear_attention on swap") == 1
    got = json.loads((tmp_path / "both.json").read_text())["lengths"]["8"]
    want = evaluate_checkpoint(str(whole), lengths=[8], batches=1, out=str(tmp_path / "one.json"))["lengths"]["8"]
    assert got == pytest.approx(want, rel=1e-5)


def test_a_killed_process_ends_the_other(tmp_path):
    """kill -9 of process 0, which holds JAX's coordination service and the lock."""
    folder = tmp_path / "run"
    processes = start_both(folder, 100_000)
    # the second save, of step 6, has waited for the first
    runs.wait_until(lambda: runs.last_step(folder) >= 8, processes[0])
    processes[0].kill()
    processes[0].wait()
    started = time.monotonic()
    assert processes[1].wait(60) == 1
    assert time.monotonic() - started < 30
    last = pathlib.Path(f"{folder}-second.log").read_text().splitlines()[-1]
    assert last.startswith("error: process 0 on host ") and "was lost: it was killed" in last
    with run_lock(str(folder)):
        assert runs.last_checkpoint(folder)[0] >= 3


def test_axes_across_processes(tmp_path):
    """Tensor and context axes span two processes: each reads what its devices hold; losses match one process."""
    address, logs = free_address(), [str(tmp_path / f"{index}.log") for index in range(2)]
    processes = [
        launch(["tests.training.process_steps", f"{address},2,{index}"], log, {"JAX_NUM_CPU_DEVICES": "2"})
        for index, log in enumerate(logs)
    ]
    want = process_steps.losses({"data": 1}, jax.devices()[:1])
    said = [runs.finish(process, log) for process, log in zip(processes, logs, strict=True)]
    found = json.loads(said[0].splitlines()[-1])
    np.testing.assert_allclose(found, [want] * len(process_steps.MESHES), rtol=1e-5)


@pytest.mark.parametrize("where", ["automatic", "host,2,0", "host:1,2", "host:1,two,0", "127.0.0.1:1,2,5"])
def test_processes_that_cannot_be(where):
    with pytest.raises(RunError, match="--processes"):
        join_processes(where)
