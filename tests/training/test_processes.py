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
from tests.training import runs

# heads and time steps that a mesh axis of four divides
SETTINGS = {"train.log_every": 1, "train.eval_every": 0, "model.heads": 4, "task.start": "none"}
SETTINGS["model.memory_options.linear_attention.conv_width"] = 0
# rows are divided between the processes, or time
ROWS = {"mesh.data": 2, "mesh.fsdp": 2}
TIME = {"mesh.data": 1, "mesh.context": 2, "mesh.tensor": 2}


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


def start_both(folder, steps, mesh):
    """Both processes of a run."""
    # no cache of compiled programs: one process would wait for the other's compiler, longer than Gloo allows
    settings = {**SETTINGS, **mesh, "train.steps": steps}
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


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run with Ctrl-C to its second process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    processes = start_both(folder, 1000, ROWS)
    runs.wait_until(lambda: runs.last_step(folder) >= 5, processes[0])
    # JAX handles SIGTERM of one process of several; Ctrl-C takes the same way
    processes[1].send_signal(signal.SIGINT)
    said = finish_both(processes, folder)
    assert "data 2, fsdp 2" in said and "saved; rerun the command to resume" in said
    return folder


def test_two_processes(interrupted, tmp_path):
    """The step saved at Ctrl-C is reached again from the checkpoint before it."""
    folder = tmp_path / "run"
    stopped, arrays, data, _ = runs.last_checkpoint(interrupted)
    assert stopped == runs.last_step(interrupted) < 1000
    sums = (interrupted / "checkpoints" / str(stopped) / "state" / "checksums.json").read_text()
    assert "ocdbt.process_0/d/" in sums and "ocdbt.process_1/d/" in sums
    before = 3 * ((stopped - 1) // 3)
    shutil.copytree(interrupted, folder)
    shutil.rmtree(folder / "checkpoints" / str(stopped))
    assert f"resuming from step {before}" in finish_both(start_both(folder, stopped, ROWS), folder)
    again, arrays_again, data_again, _ = runs.last_checkpoint(folder)
    assert (again, data_again["position"]) == (stopped, data["position"])
    runs.assert_same_arrays(arrays_again, arrays)
    train = [record for record in runs.records_of(folder) if record["kind"] == "train"]
    assert train == runs.records_of(interrupted)


def test_both_evaluate_what_one_does(interrupted, tmp_path, monkeypatch):
    """With a tensor axis over both processes."""
    command = ["eval.py", f"--workdir={interrupted}", "--lengths=8", "--batches=1", f"--out={tmp_path}/both.json"]
    command += [f"--set={setting}" for setting in ("mesh.fsdp=1", "mesh.tensor=4")]
    scores = tmp_path / "scores"
    said = finish_both(
        in_both(lambda flags, environment, log: launch(command + flags, log, environment), scores), scores
    )
    assert said.count("linear_attention on swap") == 1
    got = json.loads((tmp_path / "both.json").read_text())["lengths"]["8"]
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    want = evaluate_checkpoint(str(interrupted), lengths=[8], batches=1, out=str(tmp_path / "one.json"))
    assert got == pytest.approx(want["lengths"]["8"], rel=1e-5)


def test_a_killed_process_ends_the_other(interrupted, tmp_path):
    """kill -9 of process 0, which holds JAX's coordination service and the lock; until then time over both processes
    has given the losses of rows over both."""
    folder = tmp_path / "run"
    processes = start_both(folder, 100_000, TIME)
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
    got, want = ([record["loss"] for record in runs.records_of(run)][:4] for run in (folder, interrupted))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("where", ["automatic", "host,2,0", "host:1,2", "host:1,two,0", "127.0.0.1:1,2,5"])
def test_processes_that_cannot_be(where):
    with pytest.raises(RunError, match="--processes"):
        join_processes(where)
