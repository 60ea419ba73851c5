"""Runs of train.py in separate processes: start, watch, stop and compare them."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from memformer.training.checkpoint import Checkpoints
from memformer.training.metrics import read_records
from memformer.training.paths import nest

ROOT = pathlib.Path(__file__).parents[2]
MEASURED = ("step_seconds", "tokens_per_second", "mfu")
SMALL = {
    "task.length": 8,
    "task.objects": 3,
    "model.memory": "linear_attention",
    "model.width": 16,
    "model.heads": 2,
    "train.batch_size": 8,
    "train.log_every": 2,
    "train.eval_every": 20,
    "train.eval_batches": 1,
    # no multiple of log_every: a resumed run must bring half a log's sums with it
    "train.checkpoint_every": 3,
    "train.final_batches": 1,
    "train.final_lengths": "(8,)",
    "train.tensorboard": False,
    "train.stop_accuracy": 0.0,
}


def start(folder: pathlib.Path, settings=(), *, environment=(), log="", flags=(), launch=None):
    """Starts a small swap run in `folder`; its output goes to `log`, by default <folder>.log.

    `launch` starts the process: the function of this name, or that of tests/processes.py, which forks one.
    """
    values = {**SMALL, **dict(settings)}
    command = ["train.py", *flags, "--config=configs/swap.py", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    return (launch or launch_python)(command, log or f"{folder}.log", environment)


def launch_python(command, log, environment=()) -> subprocess.Popen:
    """Starts a script of the repository with its arguments; appends its output to `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **dict(environment)},
        )


def finish(process, log: str, seconds: float = 180) -> str:
    """Waits for a clean exit; returns the content of `log`."""
    code = process.wait(seconds)
    said = pathlib.Path(log).read_text()
    assert code == 0, said
    return said


def wait_until(condition, process, *, every: float = 0.02, seconds: float = 180) -> None:
    """Asks again and again, `every` so many seconds, until the condition holds; fails if the process exits first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(every)


def records_of(folder: pathlib.Path) -> list[dict]:
    """The run's records without measured times."""
    records = read_records(str(folder / "metrics.jsonl"))
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def last_step(folder: pathlib.Path) -> int:
    records = records_of(folder)
    return records[-1]["step"] if records else 0


def last_checkpoint(folder: pathlib.Path) -> tuple[int, dict[str, np.ndarray], dict, dict]:
    """Step, arrays by path, data and metrics of the newest checkpoint."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        assert step is not None, f"no checkpoint in {folder}"
        shapes = json.loads((folder / "checkpoints" / str(step) / "arrays" / "metadata").read_text())
        target = {tuple(name.split("/")): jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in shapes.items()}
        restored = checkpoints.restore(nest(target))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored.state)}
    return step, arrays, restored.data, restored.metrics


def assert_same_arrays(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Compares bits: NaN equals itself, and 0 differs from -0."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].tobytes() == array.tobytes(), f"{name} differs"


def result_of(folder: pathlib.Path) -> dict:
    return {**json.loads((folder / "result.json").read_text()), "seconds": None}


def assert_same_run(folder: pathlib.Path, whole: pathlib.Path) -> None:
    """Both runs ended with the same bits, records and result."""
    step, arrays, *rest = last_checkpoint(folder)
    whole_step, whole_arrays, *whole_rest = last_checkpoint(whole)
    assert_same_arrays(arrays, whole_arrays)
    assert (step, rest) == (whole_step, whole_rest)
    assert records_of(folder) == records_of(whole)
    assert result_of(folder) == result_of(whole)
