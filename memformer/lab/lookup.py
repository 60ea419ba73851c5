"""Content-addressable lookup: accuracy and attention on the right pair, by where it stands, for runs of one head."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx

from memformer.lab.study import Study, new_figure
from memformer.tasks.lookup import Lookup
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["Answers", "ask", "measure"]

EXAMPLES = 2048


class Answers(NamedTuple):
    """What a model made of questions.

    Attributes:
      places: [N], where the pair asked for stands.
      right: [N], is the likeliest value that pair's?
      weights: [N, T], attention from the question to each step, mean over heads, of the last layer.
    """

    places: np.ndarray
    right: np.ndarray
    weights: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """[N], attention from the question to the pair asked for."""
        return np.take_along_axis(self.weights, self.places[:, None], axis=1)[:, 0]

    def by_place(self, values: np.ndarray) -> np.ndarray:
        """Mean of `values` [N] over the questions about each step."""
        pairs = self.weights.shape[1] - 1
        return np.array([values[self.places == place].mean() for place in range(pairs)])


def ask(model: Any, task: Lookup, seed: int, count: int = EXAMPLES) -> Answers:
    """Answers and attention on `count` test examples.

    Args:
      model: an encoder with `attention_weights`.
      task: whose examples.
      seed: of the source.
      count: how many.
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


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Measures runs of configs/lookup.py, one trained on pairs in random order, others beside it."""
    tasks = [_task_of(run) for run in runs]
    by_order = {task.asked: run for task, run in zip(tasks, runs, strict=True)}
    if set(by_order) != {"anywhere", "first"}:
        raise RunError("lookup measures two runs: configs/lookup.py:anywhere and configs/lookup.py:first.")
    table, answers = [], {}
    for trained, run in by_order.items():
        for asked in ("first", "anywhere"):
            one = ask(run.module(), dataclasses.replace(_task_of(run), asked=asked), run.config["seed"])
            table.append(_row(trained, asked, one))
            if asked == "anywhere":
                answers[trained] = one
    pairs, guess = tasks[0].length - 1, 1 / tasks[0].values
    study.add_table(f"{pairs} pairs, test examples; guessing a value is right in {guess:.1%}", table)
    free, bound = answers["anywhere"], answers["first"]
    _plot_places(study, free, bound)
    _plot_map(study, by_order["anywhere"])
    low = free.by_place(free.mass)
    study.values.update(
        {
            "accuracy": float(free.right.mean()),
            "mass": float(free.mass.mean()),
            "least mass of a place": float(low.min()),
            "accuracy of the control": float(bound.right.mean()),
            "mass of the control": float(bound.mass.mean()),
        }
    )
    study.claim = (
        "Attention is a memory addressed by content: one head finds a key it has never seen, wherever its pair stands."
    )
    study.outcome = (
        f"Trained on pairs in random order: {free.right.mean():.1%} right, {free.mass.mean():.2f} of the attention on "
        f"the right pair, at no place below {low.min():.2f} (even shares: {1 / (pairs + 1):.2f}). Trained where the "
        f"right pair stands first, and then shuffled: {bound.right.mean():.1%} and {bound.mass.mean():.2f}."
    )


def _task_of(run: LoadedRun) -> Lookup:
    if not isinstance(run.task, Lookup) or not hasattr(run.module(), "attention_weights"):
        raise RunError(f"lookup measures runs of the task lookup by an encoder, {run.folder} is none.")
    return run.task


def _row(trained: str, asked: str, one: Answers) -> dict[str, Any]:
    mass = one.by_place(one.mass) if asked == "anywhere" else np.array([one.mass.mean()])
    return {
        "trained on the pair": "anywhere" if trained == "anywhere" else "at the first step",
        "tested on the pair": "anywhere" if asked == "anywhere" else "at the first step",
        "accuracy": f"{one.right.mean():.1%}",
        "attention on the right pair": float(one.mass.mean()),
        "least at a place": float(mass.min()),
        "count": len(one.right),
    }


def _plot_places(study: Study, free: Answers, bound: Answers) -> None:
    figure, axes = new_figure()
    axis = axes[0, 0]
    names = {"random order": free, "right pair first": bound}
    for (name, one), colour, mark in zip(names.items(), COLOURS, "os", strict=False):
        mass = one.by_place(one.mass)
        axis.plot(range(1, len(mass) + 1), mass, mark + "-", color=colour, label=f"trained on: {name}", markersize=4)
    axis.axhline(1 / free.weights.shape[1], color="0.4", linestyle=":", label="even shares")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("place of the pair asked for (step)")
    axis.set_ylabel("attention on that pair\n(share of 1)")
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    study.save_figure(
        figure,
        "places",
        "Attention from the question to the pair asked for, by where it stands, on test examples in random order: the "
        "head trained on random order finds it by content at every place, the control looks at the first step.",
    )


def _plot_map(study: Study, run: LoadedRun) -> None:
    """The question's attention in examples that are one example, its pairs in other orders."""
    task, model, rng = _task_of(run), cast(Any, run.module()), np.random.default_rng(0)
    first = task.source("test", run.config["seed"])[0]["inputs"]
    pairs = task.length - 1
    orders = np.stack([rng.permutation(pairs) for _ in range(12)])
    inputs = np.stack([np.concatenate([first[order], first[-1:]]) for order in orders])
    weights = np.asarray(model.attention_weights(inputs))[:, -1, :, -1].mean(axis=1)
    figure, axes = new_figure(height=3.6)
    axis = axes[0, 0]
    image = axis.imshow(weights, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, x in enumerate(inputs):
        axis.plot(task.asked_place(x), row, "s", markerfacecolor="none", markeredgecolor=COLOURS[1], markersize=13)
    axis.set_xticks(range(task.length), [*range(1, pairs + 1), "?"])
    axis.set_yticks(range(len(orders)), range(1, len(orders) + 1))
    axis.set_xlabel("step (? is the question)")
    axis.set_ylabel("order of the same pairs")
    figure.colorbar(image, ax=axis, label="attention (share of 1)")
    study.save_figure(
        figure,
        "map",
        "One set of pairs in twelve random orders: each row is the question's attention over the steps, the square "
        "marks where the pair asked for stands. Attention follows the pair, not the place.",
    )
