"""Seconds to the first training step of a config: python -m benchmarks.cpu.first_step configs/swap.py [--quick]

Runs in a process of its own, since the second run of a program in one process is faster, and prints one JSON object:

    import, build, trace, compile   seconds to load the trainer and its libraries; to build the run, its first batch
            and its state; to trace and lower the train step; to compile it, without a persistent cache
    first   seconds from the start of Python's imports to the end of the first step
    cpu     CPU seconds of all that, which other programs on the machine change less
    step    milliseconds per step afterwards, a median
"""

import argparse
import itertools
import json
import pathlib
import runpy
import statistics
import subprocess
import sys
import time
from typing import Any

__all__ = ["CONFIGS", "first_step"]

ROOT = pathlib.Path(__file__).parents[2]

# The configs of the README's first run and of its language model.
CONFIGS = ("configs/swap.py", "configs/text.py")

# Steps after the first.
STEPS = 10


def first_step(config: str, quick: bool = False) -> dict[str, Any]:
    """Measures one config in a new process.

    Args:
      config: path of a config file, relative to the repository.
      quick: a small model, which checks the program and measures nothing.

    Raises:
      RuntimeError: the process failed; the message ends with its last lines.
    """
    command = [sys.executable, "-m", __name__, config] + ["--quick"] * quick
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{config}: {done.stderr[-1000:]}")
    return {"config": config, **json.loads(done.stdout.splitlines()[-1])}


def measure(path: str, quick: bool) -> dict[str, float]:
    """Seconds by phase, in this process."""
    marks = {"start": time.perf_counter()}
    # Loading them is a part of what is measured.
    import jax

    from memformer.training.build import build_run
    from memformer.training.input import make_loader
    from memformer.training.sharding import mesh_scope
    from memformer.training.step import init_state, make_train_step

    marks["import"] = time.perf_counter()
    config = runpy.run_path(path)["get_config"]()
    if quick:
        config.model.memory, config.model.width = "linear_attention", 16
        config.task.length, config.train.batch_size = 16, 2
    run = build_run(config.to_dict())
    train, ema, seed = run.config["train"], run.config["optimizer"]["ema"], run.config["seed"]
    loader = make_loader(run.task, "train", batch_size=train["batch_size"], seed=seed, prefetch=0)
    with mesh_scope(run.mesh):
        state, batch = init_state(run.model, run.tx, run.mesh, seed=seed, ema=ema), next(loader)
        jax.block_until_ready(state)
        marks["build"] = time.perf_counter()
        lowered = make_train_step(run.model, run.tx, run.schedule, run.mesh, train, ema).lower(state, batch)
        marks["trace"] = time.perf_counter()
        step = lowered.compile()
        marks["compile"] = time.perf_counter()
        samples = []
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            state, report = step(state, batch)
            jax.block_until_ready(report)
            samples.append(time.perf_counter() - began)
            marks.setdefault("first", time.perf_counter())
            marks.setdefault("cpu", time.process_time())
    order = ("start", "import", "build", "trace", "compile")
    row = {name: marks[name] - marks[before] for before, name in itertools.pairwise(order)}
    row |= {"first": marks["first"] - marks["start"], "cpu": marks["cpu"]}
    return row | {"step": 1e3 * statistics.median(samples[1:])}


def main(arguments: list[str]) -> None:
    """Prints the measurement of one config as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="path of a config file")
    parser.add_argument("--quick", action="store_true", help="a small model, which measures nothing")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.config, options.quick)))


if __name__ == "__main__":
    main(sys.argv[1:])
