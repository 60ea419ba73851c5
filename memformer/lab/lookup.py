"""Content-addressable lookup: accuracy and attention on the queried pair, by its place, for runs of one head."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from memformer.lab.plots import Bars
from memformer.lab.runs import measure_seeds
from memformer.lab.study import (
    Result,
    Row,
    Runs,
    Settings,
    Study,
    Table,
    Verdict,
    grade,
    percent,
    spread,
    spread_numbers,
)
from memformer.tasks.lookup import Lookup
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun

__all__ = ["LOOKUP", "Answers", "ask"]

EXAMPLES = 2048
PLACES = {"anywhere": "anywhere", "first": "at the first step"}
# Stated before the runs, of every seed: accuracy on shuffled pairs, and attention on the pair at its worst place.
EXACT, ATTENDED = 0.99, 0.5


class Answers(NamedTuple):
    """Answers of a model to questions.

    Attributes:
      places: [N], the step of the queried pair.
      correct: [N], whether the likeliest value is that of the pair.
      weights: [N, T], attention from the question to each step, mean over heads, of the last layer.
    """

    places: np.ndarray
    correct: np.ndarray
    weights: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """[N], attention from the question to the queried pair."""
        return np.take_along_axis(self.weights, self.places[:, None], axis=1)[:, 0]

    def by_place(self, values: np.ndarray) -> np.ndarray:
        """Mean of `values` [N] over the questions about each step."""
        pairs = self.weights.shape[1] - 1
        return np.array([values[self.places == place].mean() for place in range(pairs)])


def ask(model: Any, task: Lookup, seed: int, count: int = EXAMPLES) -> Answers:
    """Answers and attention on `count` test examples.

    Args:
      model: an encoder with `attention_weights`.
      task: of the examples.
      seed: of the source.
      count: number of examples.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def call(inputs):
        module = nnx.merge(graph, state)
        return module(inputs).logits[:, -1], module.attention_weights(inputs)[:, -1, :, -1].mean(axis=1)

    source = task.source("test", seed)
    examples = [source[i] for i in range(count)]
    inputs = np.stack([e["inputs"] for e in examples])
    logits, weights = call(inputs)
    wanted = np.array([e["targets"][-1] for e in examples])
    places = np.array([task.asked_place(x) for x in inputs])
    return Answers(places, np.asarray(logits).argmax(axis=-1) == wanted, np.asarray(weights))


@measure_seeds
def _measure(runs: Runs, settings: Settings) -> Result:
    by_order = _by_order(runs)
    rows, answers = [], {}
    for trained, run in by_order.items():
        for asked in ("first", "anywhere"):
            one = ask(run.module(), dataclasses.replace(_task_of(run), asked=asked), run.config["seed"])
            rows.append(_row(trained, asked, one))
            if asked == "anywhere":
                answers[trained] = one
    task, free, bound = _task_of(by_order["anywhere"]), answers["anywhere"], answers["first"]
    title = f"{task.length - 1} pairs, test examples; chance {percent(1 / task.values)}"
    values = {
        "accuracy": float(free.correct.mean()),
        "mass": float(free.mass.mean()),
        "least mass of a place": float(free.by_place(free.mass).min()),
        "accuracy of the control": float(bound.correct.mean()),
        "mass of the control": float(bound.mass.mean()),
    }
    return Result([Table(title, rows)], values)


def _by_order(runs: Runs) -> dict[str, LoadedRun]:
    found = {_task_of(run).asked: run for run in runs.values()}
    if set(found) != set(PLACES):
        raise RunError("lookup measures two runs of each seed: configs/lookup.py:anywhere and configs/lookup.py:first.")
    return found


def _task_of(run: LoadedRun) -> Lookup:
    if not isinstance(run.task, Lookup) or not hasattr(run.module(), "attention_weights"):
        raise RunError(f"lookup measures runs of the task lookup by an encoder, {run.folder} is none.")
    return run.task


def _row(trained: str, asked: str, one: Answers) -> Row:
    mass = one.by_place(one.mass) if asked == "anywhere" else np.array([one.mass.mean()])
    return {
        "trained on the pair": PLACES[trained],
        "tested on the pair": PLACES[asked],
        "accuracy": percent(one.correct.mean()),
        "attention on the pair": float(one.mass.mean()),
        "least at a place": float(mass.min()),
        "count": len(one.correct),
    }


def _judge(result: Result) -> Verdict:
    found = result.values
    exact, least = found["accuracy"], found["least mass of a place"]
    return Verdict(
        grade(min(exact) > EXACT and min(least) > ATTENDED),
        f"Trained on pairs in random order the head answers {spread(exact)} and gives the pair at least "
        f"{spread_numbers(least)} of its attention at every place (needed in every seed: {percent(EXACT, 0)} and "
        f"{ATTENDED}); a control trained on the first step answers {spread(found['accuracy of the control'])} once "
        "pairs are shuffled.",
    )


LOOKUP = Study(
    name="lookup",
    title="Lookup by content",
    claim="Attention is a memory addressed by content: one head finds a key it has never seen, wherever its pair "
    "stands.",
    source="the reading of attention as a soft dictionary, arXiv 1410.5401 and 1706.03762",
    measure=_measure,
    judge=_judge,
    draw=Bars(
        index=("trained on the pair", "tested on the pair"),
        columns=("accuracy", "attention on the pair"),
        label="share of 1",
        joint=",\n",
    ),
    caption="Accuracy and attention of one head on the queried pair; each group names where the pair stands in "
    "training, then in test. Mean of three seeds, least to greatest.",
    reads="configs/lookup.py:anywhere and configs/lookup.py:first, three seeds of each",
)
