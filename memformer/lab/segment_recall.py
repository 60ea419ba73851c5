"""Reach of a memory between segments: exact match of one question against the number of pairs before it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.plots import Lines
from memformer.lab.runs import longest_trained
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, percent
from memformer.tasks import Remember
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.input import make_loader
from memformer.training.losses import count_batch

__all__ = ["SEGMENT_RECALL", "run_name"]

# Rows per batch: two batches for each number of pairs, one where there are many.
ROWS, MANY = 256, 100


def run_name(model: Row) -> str:
    """The display name of a model.

    Example:
      >>> run_name({"type": "armt", "correction": False})
      'ARMT without gamma'
    """
    if model["type"] == "rmt":
        return "RMT"
    return "ARMT" if model["correction"] else "ARMT without gamma"


def _measure(runs: Runs, settings: Settings) -> Result:
    """Asks each run of configs/remember.py or configs/rewrite.py one question after 2 to 500 pairs."""
    rows, values = [], {}
    for run in runs.values():
        exact, name = _exact_by_pairs(run, _task_of(run)), run_name(run.config["model"])
        row = {"task": run.task.name, "model": name, "trained on": longest_trained(run)}
        rows.append(row | {f"{pairs} pairs": percent(share) for pairs, share in exact.items()})
        values[f"{run.task.name} {name}"] = {str(n): round(x, 4) for n, x in exact.items()}
    return Result([Table("Exact match of one question (test split), by the pairs before it", rows)], values)


def _task_of(run: LoadedRun) -> Remember:
    if not isinstance(run.task, Remember):
        raise RunError(f"segment_recall measures runs of remember and rewrite, got {run.folder} of {run.task.name}.")
    return dataclasses.replace(run.task, queries=1)


def _exact_by_pairs(run: LoadedRun, task: Remember) -> dict[int, float]:
    """Share of sequences whose answer is correct in every symbol, by the number of pairs."""
    size = task.segment_length

    # one segment per call, with the state of the last: one program serves any number of pairs
    @jax.jit
    def read(params: Any, rest: Any, state: Any, inputs: Any) -> Any:
        output = run.model.module(params, rest, jax.random.key(0))(inputs, state=state)
        return output.logits, output.state

    exact = {}
    for pairs in task.eval_lengths:
        loader = make_loader(task.with_length(pairs), "test", batch_size=ROWS, seed=run.config["seed"])
        right = []
        for _ in range(1 if pairs >= MANY else 2):
            module: Any = run.module()
            batch, state = next(loader), module.init_state(ROWS)
            for start in range(0, batch["inputs"].shape[1], size):
                logits, state = read(*run.weights, state, batch["inputs"][:, start : start + size])
            asked = (jnp.asarray(batch[name][:, -size:]) for name in ("targets", "loss_weights"))
            sums = count_batch(logits, *asked)
            right.append(float(sums["sequences_correct"]) / ROWS)
        loader.close()
        exact[pairs] = float(np.mean(right))
    return exact


def _judge(result: Result) -> Verdict:
    most = str(max(int(n) for scores in result.values.values() for n in scores))
    tasks: dict[str, dict[str, float]] = {}
    for label, scores in result.values.items():
        task, _, name = label.partition(" ")
        tasks.setdefault(task, {})[name] = scores.get(most, 0.0)
    exact = [found.get("ARMT", 0.0) > 0.999 for found in tasks.values()]
    best = [found.get("ARMT", 0.0) == max(found.values()) for found in tasks.values()]
    kind = "confirmed" if all(exact) and all(best) else "partly confirmed" if any(best) else "not reproduced"
    scores = "; ".join(
        f"{task} " + ", ".join(f"{name} {percent(value)}" for name, value in found.items())
        for task, found in tasks.items()
    )
    missed = "" if all(exact) else "; exact answers were not reproduced"
    return Verdict(kind, f"Exact match after {most} pairs: {scores}{missed}.")


SEGMENT_RECALL = Study(
    name="segment_recall",
    title="Memory between segments",
    claim="Trained on up to 50 pairs, ARMT answers exactly after 500; without the gamma correction it does not "
    "generalise beyond its training, and memory tokens alone (RMT) hold less.",
    source="arXiv 2407.04841",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="model",
        points="{} pairs",
        panel="task",
        x="pairs before the question",
        y="exact match",
        limits=(0, 1.04),
        options={"x_base": 10},
    ),
    caption="Exact match of one question by the number of pairs before it, test split; trained on up to 50 pairs.",
    reads="configs/remember.py and configs/rewrite.py",
)
