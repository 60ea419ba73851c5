"""How a measurement trains models of its own: a table of runs, each in its folder, finished once and then read."""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import ml_collections

from memformer.lab.study import Study, seconds_in, training_seconds
from memformer.training.build import build_run
from memformer.training.config import RunError, default_config, unknown_key
from memformer.training.evaluation import LoadedRun, load_run
from memformer.training.loop import train
from memformer.training.metrics import say

__all__ = ["accuracies", "accuracy_by_length", "make_config", "run_rows", "train_runs"]

# What every run of a measurement has unless its table says otherwise: no files but those that are read.
COMMON: Mapping[str, Any] = {"train.tensorboard": False, "train.eval_every": 0, "checkpoint.keep_last": 1}


def make_config(*changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The default config with each of `changes` upon it, in order: dotted key to value.

    Args:
      changes: such as {"task": {"name": "swap"}, "model.memory": "delta_rule"}; a section given whole is merged in,
        except `task`, which is replaced.

    Raises:
      RunError: a key that no config has.

    Example:
      >>> config = make_config({"task": {"name": "swap", "length": 32}}, {"task.length": 8, "train.steps": 5})
      >>> config.task.name, config.task.length, config.train.steps
      ('swap', 8, 5)
    """
    merged = {key: value for part in changes for key, value in part.items()}
    config = default_config(merged.get("model.type", "memory_lm"))
    for key, value in merged.items():
        head, _, last = key.rpartition(".")
        message = unknown_key(config, head or key) or (None if head == "task" else unknown_key(config, key))
        if message:
            raise RunError(message)
        section = config
        for name in head.split(".") if head else ():
            section = section[name]
        if key == "task":
            config.task = ml_collections.ConfigDict(dict(value))
        elif isinstance(value, Mapping) and key != "model.memory_options":
            section[last].update(value)
        else:
            section[last] = value
    return config


def train_runs(
    study: Study,
    table: Mapping[str, Mapping[str, Any]],
    *,
    base: Mapping[str, Any],
    quick: bool = False,
    smaller: Mapping[str, Any] | None = None,
) -> dict[str, LoadedRun]:
    """Trains each row of a table and returns the finished runs, by label.

    A run lies in <study.runs>/<study.name>/<label>. One that has finished there with the same config is read, one that
    was stopped goes on; quick runs lie in <study.name>-quick and start anew each time.

    Args:
      study: names the folder.
      table: label to what sets this run apart from the others, by dotted key.
      base: what all runs have in common, by dotted key; a row goes before it.
      quick: train the smaller version.
      smaller: what a quick run changes, by dotted key; it goes before rows.

    Raises:
      RunError: a config that no run can have, or a run that was asked to stop (the same command goes on with it).
    """
    folder = os.path.join(study.runs, f"{study.name}-quick" if quick else study.name)
    configs = {
        label: make_config(COMMON, base, row, (smaller or {}) if quick else {}).to_dict()
        for label, row in table.items()
    }
    for label, config in configs.items():
        # a mistake in the last row is told before the first is trained
        build_run(config)
        if os.sep in label:
            raise RunError(f"a run's label is the name of its folder, got {label!r}.")
    if quick:
        shutil.rmtree(folder, ignore_errors=True)
    runs = {}
    for number, (label, config) in enumerate(configs.items(), start=1):
        path = os.path.join(folder, label.replace(" ", "_"))
        study.earlier += seconds_in(path)
        if not _finished(path, config):
            say(f"\n{study.name}: run {number} of {len(configs)}: {label}")
            if not train(config, path)["finished"]:
                raise RunError(f"{study.name} was stopped in its run {label!r}; the same command goes on from there.")
        runs[label] = load_run(path)
    return runs


def _finished(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a run of this very config has ended there."""
    saved = os.path.join(path, "config.json")
    if not os.path.exists(os.path.join(path, "result.json")) or not os.path.exists(saved):
        return False
    with open(saved, encoding="utf-8") as file:
        return json.load(file) == json.loads(json.dumps(config))


def accuracy_by_length(run: LoadedRun, score: str = "accuracy") -> dict[int, float]:
    """A score on the test split at the run's length and its `train.final_lengths`, as the run ended.

    Raises:
      RunError: a run that has not ended.
    """
    if run.result is None:
        raise RunError(f"{run.folder} has no result.json yet: the run has not ended.")
    return {int(length): values[score] for length, values in sorted(run.result["lengths"].items(), key=_length)}


def _length(item: tuple[str, Any]) -> int:
    return int(item[0])


def accuracies(runs: Mapping[str, LoadedRun]) -> dict[str, dict[str, float]]:
    """What `accuracy_by_length` says of each run, rounded for a study's JSON."""
    return {
        label: {str(n): round(value, 4) for n, value in accuracy_by_length(run).items()} for label, run in runs.items()
    }


def run_rows(runs: Mapping[str, LoadedRun]) -> list[dict[str, Any]]:
    """Rows that tell what was trained: parameters, steps, seconds of training steps, seed."""
    return [
        {
            "run": label,
            "parameters": run.model.size(),
            "steps": run.step,
            "seconds": round(training_seconds(run), 1),
            "seed": run.config["seed"],
        }
        for label, run in runs.items()
    ]
