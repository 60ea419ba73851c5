"""Runs of a study: trained from a table of configs or read from their folders, and what they recorded."""

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from memformer.lab.study import Result, Row, Runs, Settings, Table, merge_seeds, percent, spread
from memformer.training.build import build_run
from memformer.training.config import RunError, complete_config
from memformer.training.evaluation import LoadedRun, load_run
from memformer.training.folder import read_run_config, schedule_steps
from memformer.training.loop import train
from memformer.training.metrics import log, read_records

__all__ = [
    "accuracies",
    "accuracies_by_seed",
    "accuracy_by_length",
    "columns_by_length",
    "longest_trained",
    "make_config",
    "measure_seeds",
    "repeat_rows",
    "runs_by_row",
    "scores_by_length",
    "seconds_in",
    "spread_by_length",
    "train_runs",
    "trained_table",
    "training_records",
    "training_seconds",
]

Run = TypeVar("Run")

# Defaults of every run of a study: no files but those that are read.
COMMON: Row = {"train.tensorboard": False, "train.eval_every": 0, "checkpoint.keep_last": 1}
# The end of the label of a run: that of `repeat_rows`, or of a folder of train.py.
_SEEDED = re.compile(r"( seed |_seed)\d+$")


def make_config(*changes: Row) -> ml_collections.ConfigDict:
    """The default config with `changes` (dotted key to value) applied in order.

    Args:
      changes: such as {"task": {"name": "swap"}, "model.memory": "delta_rule"}; a section given whole is merged in,
        except `task` and `model.memory_options`, which are replaced.

    Raises:
      RunError: a key that no config has.

    Example:
      >>> config = make_config({"task": {"name": "swap", "length": 32}}, {"task.length": 8, "train.steps": 5})
      >>> config.task.name, config.task.length, config.train.steps
      ('swap', 8, 5)
    """
    nested: dict[str, Any] = {}
    for key, value in ((key, value) for part in changes for key, value in part.items()):
        *parents, last = key.split(".")
        section = nested
        for name in parents:
            section = section.setdefault(name, {})
        merged = isinstance(value, Mapping) and key not in ("task", "model.memory_options")
        # copied, for later keys change it
        section[last] = {**section.get(last, {}), **value} if merged else copy.deepcopy(value)
    return complete_config(nested)


def repeat_rows(rows: Mapping[str, Row], seeds: int) -> Mapping[str, Row]:
    """The rows once per seed 0, 1, ..., one seed after the other, labelled "<label> seed <number>".

    Args:
      rows: label to changes of the config.
      seeds: 1 leaves the rows as they are.

    Example:
      >>> repeat_rows({"a": {"train.steps": 5}}, 2)
      {'a seed 0': {'train.steps': 5, 'seed': 0}, 'a seed 1': {'train.steps': 5, 'seed': 1}}
    """
    if seeds == 1:
        return rows
    return {f"{label} seed {n}": {**row, "seed": n} for n in range(seeds) for label, row in rows.items()}


def runs_by_row(runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """The label of each row to its runs, one per seed: what `repeat_rows` took apart.

    Example:
      >>> runs_by_row({"a seed 0": "x", "b seed 0": "y", "a seed 1": "z"})
      {'a': ['x', 'z'], 'b': ['y']}
      >>> runs_by_row({"lookup-first": "x", "lookup-first_seed1": "y"})
      {'lookup-first': ['x', 'y']}
    """
    found: dict[str, list[Run]] = {}
    for label, run in runs.items():
        found.setdefault(_SEEDED.sub("", label), []).append(run)
    return found


def measure_seeds(measure: Callable[[Runs, Settings], Result]) -> Callable[[Runs, Settings], Result]:
    """Makes a measurement of the runs of one seed one of those of several seeds: `merge_seeds` of all.

    The seed of a run is that of its config. In a study that reads finished runs, runs/NAME_seed1 and so on are those of
    other seeds; their labels are "NAME" in the measurement.

    Args:
      measure: (runs of one seed by label, settings) -> result.

    Raises:
      RunError: two runs of a label with the same seed, or a label without some seed of the others.
    """

    @functools.wraps(measure)
    def merged(runs: Runs, settings: Settings) -> Result:
        return merge_seeds([measure(one, settings) for one in _runs_by_seed(runs)])

    return merged


def _runs_by_seed(runs: Runs) -> list[dict[str, LoadedRun]]:
    """The runs of each seed by the label of their row, seeds in order."""
    rows = runs_by_row(runs)
    found: dict[int, dict[str, LoadedRun]] = {}
    for label, row in rows.items():
        seeds = [run.config["seed"] for run in row]
        for seed, run in zip(seeds, row, strict=True):
            found.setdefault(seed, {})[label] = run
        if len(set(seeds)) < len(seeds):
            raise RunError(f"the runs of {label!r} must differ in their seed, got {', '.join(map(str, seeds))}.")
    lacking = sorted({f"{label} seed {seed}" for label in rows for seed, one in found.items() if label not in one})
    if lacking:
        raise RunError(f"every row must have the same seeds; missing: {', '.join(lacking)}.")
    # a study may refuse to measure nothing
    return [found[seed] for seed in sorted(found)] or [{}]


def train_runs(
    folder: str, rows: Mapping[str, Row], *, base: Row, changes: Row | None = None, fresh: bool = False
) -> tuple[dict[str, LoadedRun], float]:
    """Trains the runs of a table, each in <folder>/<label>.

    A run that has finished there with the same config is read; one that was stopped resumes.

    Args:
      folder: of all runs.
      rows: label to what sets this run apart from the others, by dotted key.
      base: what all runs share, by dotted key; applied before the row.
      changes: applied after the row.
      fresh: delete the folder first.

    Returns:
      (the finished runs by label, seconds of training that they had behind them before this call).

    Raises:
      RunError: a config that no run can have, or a run that was asked to stop (rerun the command to resume).
    """
    configs = {label: make_config(COMMON, base, row, changes or {}).to_dict() for label, row in rows.items()}
    resolved = {}
    for label, config in configs.items():
        # a mistake in the last row is reported before the first run is trained
        built = build_run(config).config
        # a run records what it found out about its data
        resolved[label] = {**config, "task": built["task"], "data": built["data"]}
        if os.sep in label:
            raise RunError(f"the label of a run names its folder, so it must not hold {os.sep!r}, got {label!r}.")
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    runs, earlier = {}, 0.0
    for number, (label, config) in enumerate(configs.items(), start=1):
        path = os.path.join(folder, label.replace(" ", "_"))
        earlier += seconds_in(path)
        if not _finished(path, resolved[label]):
            log(f"\nrun {number} of {len(configs)}: {label}")
            if not train(config, path)["finished"]:
                raise RunError(f"the run {label!r} was stopped; rerun the command to resume.")
        runs[label] = load_run(path)
    return runs, earlier


def _finished(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a run with exactly this config has ended there."""
    saved = read_run_config(path)
    if saved is None or not os.path.exists(os.path.join(path, "result.json")):
        return False
    # training fills in the horizon of the schedule
    optimizer = {**config["optimizer"], "schedule_steps": schedule_steps(config, saved)}
    return json.dumps(saved, sort_keys=True) == json.dumps({**config, "optimizer": optimizer}, sort_keys=True)


def training_records(run: LoadedRun) -> list[dict[str, Any]]:
    """The records that the run logged of its training steps, in order."""
    return _records(run.folder)


def _records(folder: str) -> list[dict[str, Any]]:
    records = read_records(os.path.join(folder, "metrics.jsonl"))
    return [record for record in records if record["kind"] == "train"]


def longest_trained(run: LoadedRun) -> int:
    """The greatest length that the run was trained on: where its curriculum ended."""
    return max(record["length"] for record in training_records(run))


def training_seconds(run: LoadedRun) -> float:
    """Seconds in training steps, over all parts of a resumed run, without compilation and evaluation."""
    return seconds_in(run.folder)


def seconds_in(folder: str) -> float:
    """`training_seconds` of the run in a folder, which may be unfinished or empty."""
    seconds, before = 0.0, 0
    for record in _records(folder):
        seconds += (record["step"] - before) * (record["step_seconds"] or 0.0)
        before = record["step"]
    return seconds


def scores_by_length(run: LoadedRun) -> dict[int, dict[str, float]]:
    """All scores on the test split at the run's length and its `train.final_lengths`.

    Raises:
      RunError: an unfinished run.
    """
    if run.result is None:
        raise RunError(f"{run.folder} has no result.json yet: the run is unfinished.")
    lengths = run.result["lengths"]
    return {int(length): lengths[length] for length in sorted(lengths, key=int)}


def accuracy_by_length(run: LoadedRun, score: str = "accuracy") -> dict[int, float]:
    """One score of `scores_by_length`."""
    return {length: scores[score] for length, scores in scores_by_length(run).items()}


def accuracies(runs: Mapping[str, LoadedRun]) -> dict[str, dict[str, float]]:
    """`accuracy_by_length` of each run, rounded for the JSON."""
    return {
        label: {str(n): round(value, 4) for n, value in accuracy_by_length(run).items()} for label, run in runs.items()
    }


def accuracies_by_seed(runs: Mapping[str, LoadedRun], score: str = "accuracy") -> dict[str, dict[str, list[float]]]:
    """One score of each row by length, a number per seed, rounded for the JSON."""
    return {
        label: {str(n): [round(value, 4) for value in values] for n, values in _by_length(row, score).items()}
        for label, row in runs_by_row(runs).items()
    }


def spread_by_length(runs: Sequence[LoadedRun], heading: str, score: str = "accuracy") -> dict[str, str]:
    """One score of the runs of one row as columns: `spread` over the seeds; `heading` as in `columns_by_length`."""
    return {heading.format(n): spread(values) for n, values in _by_length(runs, score).items()}


def _by_length(runs: Sequence[LoadedRun], score: str) -> dict[int, list[float]]:
    found = [accuracy_by_length(run, score) for run in runs]
    # a curriculum may end at another length in each seed
    shared = [n for n in found[0] if all(n in values for values in found)]
    return {n: [values[n] for values in found] for n in shared}


def columns_by_length(run: LoadedRun, heading: str) -> dict[str, str]:
    """`accuracy_by_length` as the columns of a row; `heading` holds {}, such as "{} swaps"."""
    return {heading.format(n): percent(value) for n, value in accuracy_by_length(run).items()}


def trained_table(runs: Mapping[str, LoadedRun]) -> Table:
    """A table of the runs: parameters, steps, seconds of training steps, seed."""
    return Table(
        "Training",
        [
            {
                "run": label,
                "parameters": run.model.size(),
                "steps": run.step,
                "seconds": round(training_seconds(run), 1),
                "seed": run.config["seed"],
            }
            for label, run in runs.items()
        ],
    )
