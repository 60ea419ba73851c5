"""How far a memory between segments reaches: exact match of one question against the number of pairs before it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.study import Study, new_figure, training_records
from memformer.tasks import Remember, Rewrite
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.input import make_loader
from memformer.training.losses import count_batch
from memformer.training.plots import COLOURS

__all__ = ["measure", "run_name"]

# Rows a batch: two of them for each number of pairs, one where there are many.
ROWS, MANY = 256, 100
CLAIM = (
    "Trained on up to 50 pairs, ARMT answers exactly after 500; without the gamma correction it does not go past "
    "what it was trained on, and memory tokens alone (RMT) hold less (arXiv 2407.04841)."
)


def run_name(model: dict[str, Any]) -> str:
    """What tables and plots call a model.

    Example:
      >>> run_name({"type": "armt", "correction": False})
      'ARMT without gamma'
    """
    if model["type"] == "rmt":
        return "RMT"
    return "ARMT" if model["correction"] else "ARMT without gamma"


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Asks each run of configs/remember.py or configs/rewrite.py one question behind 2 to 500 pairs.

    Raises:
      RunError: a run of another task.
    """
    found = [(run, _exact_by_pairs(run, _task_of(run))) for run in runs]
    rows = []
    for run, exact in found:
        row = {"task": run.task.name, "model": run_name(run.config["model"]), "trained on": _trained(run)}
        rows.append(row | {f"{pairs} pairs": f"{100 * share:.1f}%" for pairs, share in exact.items()})
    study.claim = CLAIM
    study.add_table("Exact match of one question (test split), by the pairs before it", rows)
    study.outcome = "; ".join(_say(run, exact) for run, exact in found) + "."
    study.values = {
        f"{run.task.name} {run_name(run.config['model'])}": {str(n): round(x, 4) for n, x in exact.items()}
        for run, exact in found
    }
    _draw(found, study)


def _task_of(run: LoadedRun) -> Remember:
    if not isinstance(run.task, Remember):
        raise RunError(f"segments measures runs of remember and rewrite, got {run.folder} of {run.task.name}.")
    return dataclasses.replace(run.task, queries=1)


def _trained(run: LoadedRun) -> int:
    """The most pairs that the run was trained on: where its curriculum came to."""
    return max(record["length"] for record in training_records(run))


def _exact_by_pairs(run: LoadedRun, task: Remember) -> dict[int, float]:
    """Share of sequences whose answer is right in every symbol, by the number of pairs."""
    size = task.segment_length

    # One segment a call, with the state of the last: one program serves any number of pairs.
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


def _say(run: LoadedRun, exact: dict[int, float]) -> str:
    trained, most = _trained(run), max(exact)
    near = max(n for n in exact if n <= max(trained, min(exact)))
    name = run_name(run.config["model"])
    told = f"{exact[near]:.1%} at {near} and {exact[most]:.1%} at {most}"
    return f"{run.task.name}: {name}, trained to {trained} pairs, {told}"


def _draw(found: Sequence[tuple[LoadedRun, dict[int, float]]], study: Study) -> None:
    tasks = [task for task in (Remember.name, Rewrite.name) if any(run.task.name == task for run, _ in found)]
    figure, axes = new_figure(1, len(tasks), width=4.0 * len(tasks) + 1.2)
    colours = dict(zip(("ARMT", "ARMT without gamma", "RMT"), COLOURS, strict=False))
    markers = {"ARMT": "o", "ARMT without gamma": "s", "RMT": "^"}
    for axis, task in zip(axes[0], tasks, strict=True):
        for run, exact in found:
            if run.task.name == task:
                name = run_name(run.config["model"])
                axis.plot(list(exact), list(exact.values()), color=colours[name], marker=markers[name], label=name)
        trained = max(_trained(run) for run, _ in found if run.task.name == task)
        axis.axvspan(axis.get_xlim()[0], trained, color="0.93", zorder=0)
        axis.axhline(found[0][0].task.chance, color="0.4", linestyle=":", label="guess")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.03)
        ticks = [2, 5, 10, 20, 50, 100, 200, 500]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_title(task)
        axis.set_xlabel("pairs before the question")
    axes[0, 0].set_ylabel("exact match")
    # one legend for all panels: a task may have fewer models than the other
    named = {name: line for axis in axes[0] for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), frameon=False)
    grey = "grey: up to the most pairs that any of the runs was trained on"
    caption = f"Exact match of one question behind n pairs; {grey}. Claim: {CLAIM}"
    study.save_figure(figure, "pairs", caption)
