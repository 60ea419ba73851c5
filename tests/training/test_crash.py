"""train.py, killed and restarted: it resumes and ends with the same bits as an uninterrupted run."""

import functools
import signal

import numpy as np
import pytest

from memformer.training.config import RunError
from memformer.training.loop import train
from tests.processes import launch
from tests.training import runs
from tests.training.small import small_config

STEPS = 42
start = functools.partial(runs.start, launch=launch)


@pytest.fixture
def settings(tmp_path):
    """All processes share one cache of compiled programs."""
    return {"train.steps": STEPS, "train.compile_cache": tmp_path / "compiled"}


@pytest.fixture
def unbroken(settings, tmp_path):
    """The folder of an uninterrupted run."""
    folder = tmp_path / "whole"
    runs.finish(start(folder, settings), f"{folder}.log")
    assert runs.last_step(folder) == STEPS
    return folder


def half_written(folder):
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any("tmp" in path.name for path in checkpoints.iterdir())


def freeze_in_a_save(process, folder):
    """Stops the process while a step is being written."""
    while True:
        runs.wait_until(lambda: half_written(folder), process, every=0.002)
        process.send_signal(signal.SIGSTOP)
        if half_written(folder):
            return
        process.send_signal(signal.SIGCONT)


def test_killed_then_terminated_then_damaged(settings, unbroken, tmp_path):
    """kill -9 before the first checkpoint and in the middle of a save, at a random step; twenty of them are tried by
    `python -m benchmarks.reliability`. Then SIGTERM saves the current step and exits cleanly; that checkpoint is
    damaged, and the one before is used."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    process = start(folder, settings)
    runs.wait_until(lambda: runs.last_step(folder) >= 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    process, least = start(folder, settings), 5 + int(rng.integers(5))
    runs.wait_until(lambda: runs.last_step(folder) >= least, process)
    freeze_in_a_save(process, folder)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    process, killed = start(folder, settings), runs.last_step(folder)
    runs.wait_until(lambda: runs.last_step(folder) >= killed + 2, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, f"{folder}.log")
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert killed + 2 <= steps[-1] < STEPS and steps[-2] == 3 * ((steps[-1] - 1) // 3)

    state = folder / "checkpoints" / str(steps[-1]) / "state"
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said = runs.finish(start(folder, settings), f"{folder}.log")
    assert f"Checkpoint {steps[-1]} in" in said and "skipped" in said
    assert said.count("resuming from step") >= 2 and f"resuming from step {steps[-2]}" in said
    runs.assert_same_run(folder, unbroken)
    assert not half_written(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_text(""), "must be a folder of checkpoints, and is a file"),
        (lambda path: (path / "4" / "state").mkdir(parents=True), "4 is not complete.*move them away to start anew"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_no_fresh_start(tmp_path, harm, message):
    """Reported before the first step, not when the first checkpoint is due."""
    harm(tmp_path / "checkpoints")
    with pytest.raises(RunError, match=f"the checkpoints in .* cannot be used: .*{message}"):
        train(small_config(mesh__data=-1), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
