"""Loss by position: whether a memory uses the context that it has."""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memformer.data.source import SPLITS
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun, load_run, score_batches
from memformer.training.files import replace_file
from memformer.training.input import batch_shapes, make_loader
from memformer.training.metrics import format_table, log, model_name
from memformer.training.plots import plot_positions
from memformer.training.sharding import batch_layout, mesh_scope

__all__ = ["PositionLoss", "evaluate_positions", "loss_by_position"]


class PositionLoss(NamedTuple):
    """Loss of the targets at a range of positions.

    Attributes:
      first, last: positions, counted from 0 in each document; a target at position p has p + 1 inputs before it.
      tokens: number of targets scored.
      loss: mean loss in nats.
      perplexity: exp(loss).
    """

    first: int
    last: int
    tokens: int
    loss: float
    perplexity: float


def loss_by_position(loaded: LoadedRun, *, split: str = "test", batches: int = 16) -> list[PositionLoss]:
    """Mean loss at positions 0, 1, 2-3, 4-7, ... of the documents in the examples of a split.

    A document that is cut by the end of an example starts again at position 0 in the next one, so that a position is
    the context that the model has.

    Args:
      loaded: a run on classes (its task's loss is "classes").
      split: "train", "validation" or "test".
      batches: number of batches; 0 for all examples of a stored split.

    Raises:
      RunError: a task whose targets are no classes, or an unknown split.
    """
    if split not in SPLITS:
        raise RunError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}.")
    task, mesh = loaded.task, loaded.run.mesh
    if task.loss != "classes":
        raise RunError(f"loss by position needs targets that are classes, and task {task.name!r} has {task.loss}.")
    size = loaded.config["train"]["batch_size"]
    layout = batch_layout(batch_shapes(task, size), mesh)
    loader = make_loader(
        task,
        split,
        batch_size=size,
        seed=loaded.config["seed"],
        rows=layout.rows,
        place=layout.place,
        repeat=batches > 0,
    )
    step = jax.jit(functools.partial(_sum_positions, loaded.model))
    with mesh_scope(mesh):
        sums = score_batches(functools.partial(step, *loaded.weights), loader, batches)
    loader.close()
    total = np.stack(sums).astype(np.float64).sum(axis=0)
    return _bin_positions(total[0], total[1])


def _bin_positions(loss: np.ndarray, weight: np.ndarray) -> list[PositionLoss]:
    """Means over ranges whose length doubles, of the sums at each position."""
    found, first = [], 0
    while first < len(loss):
        last = min(max(first * 2, first + 1), len(loss))
        count = float(weight[first:last].sum())
        if count:
            mean = float(loss[first:last].sum()) / count
            found.append(PositionLoss(first, last - 1, round(count), mean, float(np.exp(mean))))
        first = last
    return found


def _sum_positions(model, params, rest, batch):
    """Sums of loss and weight at each position, [2, T]."""
    module = model.module(params, rest, jax.random.key(0))
    module.eval()
    arguments = {name: x for name, x in batch.items() if name not in ("inputs", "targets", "loss_weights")}
    logits = module(batch["inputs"], **arguments).logits.astype(jnp.float32)
    targets, weights = batch["targets"], batch["loss_weights"].astype(jnp.float32)
    # at weight 0 a target need not be a class
    known = jnp.where(weights > 0, targets, 0)[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, known, axis=-1)[..., 0]
    parts = jnp.stack([jnp.where(weights > 0, losses * weights, jnp.float32(0)), weights])
    steps = targets.shape[1]
    sums = jnp.zeros((2, steps), jnp.float32)
    return sums.at[:, batch["positions"].reshape(-1)].add(parts.reshape(2, -1))


def evaluate_positions(
    workdir: str,
    *,
    step: int | None = None,
    split: str = "test",
    batches: int = 16,
    batch_size: int | None = None,
    settings: Sequence[str] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Prints and plots the perplexity of a run by position.

    Args:
      workdir, step, split, batches, batch_size, settings: as for `memformer.training.evaluate_checkpoint`;
        "task.length=4096" looks beyond the length of training.
      out: JSON file to write; None for <workdir>/positions_<split>.json. The plot has the same name with .png.

    Returns:
      The content of the JSON file.

    Raises:
      RunError: as `evaluate_checkpoint` and `loss_by_position`.
    """
    loaded = load_run(workdir, step=step, settings=settings, batch_size=batch_size)
    found = loss_by_position(loaded, split=split, batches=batches)
    name = model_name(loaded.config["model"])
    log(f"{name} on {loaded.task.name}, {split} split, step {loaded.step}: perplexity by tokens of context")
    rows = [
        (_label(part.first + 1, part.last + 1), f"{part.tokens:,}", f"{part.loss:.4f}", f"{part.perplexity:.3f}")
        for part in found
    ]
    log(format_table(("context", "tokens", "loss", "perplexity"), rows))
    result = {
        "step": loaded.step,
        "split": split,
        "memory": name,
        "trained_length": loaded.trained.length,
        "positions": [part._asdict() for part in found],
    }
    out = out or os.path.join(workdir, f"positions_{split}.json")
    if jax.process_index() == 0:
        with replace_file(out) as file:
            json.dump(result, file, indent=2)
        points = {part.last + 1: part.perplexity for part in found}
        title = f"{name} on {loaded.task.name}"
        plot_positions({name: points}, os.path.splitext(out)[0] + ".png", title=title, trained=loaded.trained.length)
    return result


def _label(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
