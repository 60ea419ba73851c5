"""End of a run: the printed table, result.json and the learning curve."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from memformer.tasks import Task
from memformer.training.evaluation import Scorer, format_score
from memformer.training.files import replace_file
from memformer.training.metrics import format_table, log, read_records
from memformer.training.plots import plot_learning_curve
from memformer.training.step import Arrays

__all__ = ["draw_curve", "final_scores", "result_table", "write_report"]


def final_scores(
    score: Scorer, parameters: tuple[Arrays, Arrays], task: Task, options: Mapping[str, Any]
) -> dict[int, dict[str, float]]:
    """Scores on the test split at the task's length and at `train.final_lengths`, by length."""
    lengths = sorted({task.length, *options["final_lengths"]})
    batches = options["final_batches"]
    return {n: score(parameters, task.with_length(n), split="test", batches=batches) for n in lengths}


def write_report(folder: str, result: dict[str, Any]) -> None:
    """Prints the table of a run and writes result.json to its folder.

    Args:
      folder: the run's folder.
      result: the return value of `Trainer.train`.
    """
    log("")
    log(f"{result['task']}, test split:")
    log(result_table([result]))
    if jax.process_index() == 0:
        with replace_file(os.path.join(folder, "result.json")) as file:
            json.dump(result, file, indent=2)


def draw_curve(folder: str, memory: str, task: Task) -> None:
    """Draws <folder>/curve.png from its metrics.jsonl; `task` has its final length."""
    if jax.process_index():
        return
    records = read_records(os.path.join(folder, "metrics.jsonl"))
    chance = task.chance if "accuracy" in task.scores else None
    plot_learning_curve(records, os.path.join(folder, "curve.png"), title=f"{memory} on {task.name}", chance=chance)


def result_table(results: list[dict[str, Any]]) -> str:
    """One row per run: memory, steps, loss and scores, then the first score at each other length.

    Example:
      >>> lengths = {"8": {"loss": 0.1, "accuracy": 0.97}, "16": {"loss": 0.2, "accuracy": 0.95}}
      >>> print(result_table([{"memory": "delta_rule", "steps": 70, "length": 8, "lengths": lengths}]))
      memory      steps    loss  accuracy  at 16
      delta_rule     70  0.1000     97.0%  95.0%
    """
    first = results[0]
    own = str(first["length"])
    names = list(first["lengths"][own])
    others = [n for n in first["lengths"] if n != own]
    shown = names[1] if len(names) > 1 else names[0]
    header = ["memory", "steps", *names, *(f"at {n}" for n in others)]
    rows = []
    for result in results:
        by_length = result["lengths"]
        scores = [format_score(name, by_length[own][name]) for name in names]
        rows.append(
            [result["memory"], result["steps"], *scores, *(format_score(shown, by_length[n][shown]) for n in others)]
        )
    return format_table(header, rows)
