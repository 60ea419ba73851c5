"""Loss by position and by distance: whether a memory uses the context that it has, and how far back."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check_array
from memformer.core.segments import find_segments
from memformer.core.types import Array, Dims, Int
from memformer.data.source import SPLITS
from memformer.training.config import RunError, run_errors
from memformer.training.evaluation import LoadedRun, load_run, score_split
from memformer.training.files import check_out, replace_file
from memformer.training.metrics import format_table, log, model_name
from memformer.training.plots import plot_positions

__all__ = [
    "DistanceLoss",
    "PositionLoss",
    "evaluate_distances",
    "evaluate_positions",
    "loss_by_distance",
    "loss_by_position",
    "token_distances",
]


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


class DistanceLoss(NamedTuple):
    """Loss of the targets whose last occurrence in the context lies in a range of distances.

    Attributes:
      first, last: tokens from the last occurrence to the target, 1 where it is the newest input; both are 0 for
        targets that do not occur in the context.
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
    return [PositionLoss(*part) for part in _mean_losses(loaded, _positions, "position", split, batches)]


def loss_by_distance(loaded: LoadedRun, *, split: str = "test", batches: int = 16) -> list[DistanceLoss]:
    """Mean loss by the distance of the target's last occurrence in the context: none, 1, 2-3, 4-7, ... tokens.

    The context is the part of the document that the example holds before the target; see `token_distances`.

    Args:
      loaded, split, batches: as for `loss_by_position`; inputs and targets are ids of one vocabulary.

    Raises:
      RunError: as `loss_by_position`, or inputs and targets of different vocabularies.
    """
    task = loaded.task
    # of text, the start of a document may be an id that is no class
    shared = task.vocab_size == task.num_classes or "bits_per_byte" in task.scores
    if task.loss == "classes" and (task.features or not shared):
        inputs = f"{task.features} features" if task.features else f"{task.vocab_size} ids"
        raise RunError(
            f"loss by distance needs inputs and targets of one vocabulary, and task {task.name!r} has {inputs} and "
            f"{task.num_classes} classes."
        )
    return [DistanceLoss(*part) for part in _mean_losses(loaded, _distances, "distance", split, batches)]


def token_distances(
    inputs: Int[Array, "B T"], targets: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Tokens from the last occurrence of each target among the inputs of its segment up to its own; 0 for none.

    Args:
      inputs, targets: ids; a target stands behind the input of its step, so that the newest input has distance 1.
      segment_ids: packed sequences, 0 = padding, which is no occurrence.

    Raises:
      ValueError: an argument that is not [B, T] integers.

    Example:
      >>> token_distances(jnp.array([[5, 7, 5, 5]]), jnp.array([[7, 5, 5, 9]]))
      Array([[0, 2, 1, 0]], dtype=int32)
    """
    dims: Dims = {}
    inputs = check_array("inputs", inputs, "B T", dims, kind=jnp.integer).astype(jnp.int32)
    targets = check_array("targets", targets, "B T", dims, kind=jnp.integer).astype(jnp.int32)
    rows, steps = inputs.shape
    segments = find_segments(segment_ids, dims)
    index = of_inputs = jnp.zeros((rows, steps), jnp.int32)
    if segments is not None:
        # an input in padding is in no segment
        index, of_inputs = segments.index, jnp.where(segments.valid, segments.index, -1)
    # sorted by segment, id and time, where the input of a step comes before its target
    index, ids = (jnp.stack(pair, axis=2).reshape(rows, 2 * steps) for pair in ((of_inputs, index), (inputs, targets)))
    place = jnp.broadcast_to(jnp.arange(2 * steps, dtype=jnp.int32), ids.shape)
    index, ids, time = lax.sort((index, ids, place), dimension=1, num_keys=3)
    newest = lax.cummax(jnp.where(time % 2 == 0, place, -1), axis=1)
    last = jnp.maximum(newest, 0)
    found_index, found_ids, found_time = (jnp.take_along_axis(x, last, axis=1) for x in (index, ids, time))
    same = (newest >= 0) & (found_index == index) & (found_ids == ids)
    distance = jnp.where(same, (time + 1) // 2 - found_time // 2, 0)
    back = jnp.zeros_like(distance).at[jnp.arange(rows)[:, None], time].set(distance)
    return back[:, 1::2]


Bin = tuple[int, int, int, float, float]


def _mean_losses(
    loaded: LoadedRun, places: Callable[[Mapping[str, Array]], Array], by: str, split: str, batches: int
) -> list[Bin]:
    """Mean losses over ranges of `places`, which gives each target of a batch a number from 0 to T."""
    if split not in SPLITS:
        raise RunError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}.")
    task, mesh = loaded.task, loaded.run.mesh
    if task.loss != "classes":
        raise RunError(f"loss by {by} needs targets that are classes, and task {task.name!r} has {task.loss}.")
    size, seed = loaded.config["train"]["batch_size"], loaded.config["seed"]
    step = functools.partial(jax.jit(functools.partial(_sum_losses, loaded.model, places)), *loaded.weights)
    with run_errors("the data" if batches else "--batches"):
        sums = score_split(step, mesh, task, split, batch_size=size, seed=seed, batches=batches)
    total = np.stack(sums).astype(np.float64).sum(axis=0)
    if not total[1].any():
        raise RunError(f"the data: no target of the {split} split is scored in {batches or 'all'} batches.")
    return _bin_losses(total[0], total[1])


def _positions(batch: Mapping[str, Array]) -> Array:
    return batch["positions"]


def _distances(batch: Mapping[str, Array]) -> Array:
    return token_distances(batch["inputs"], batch["targets"], batch.get("segment_ids"))


def _bin_losses(loss: np.ndarray, weight: np.ndarray) -> list[Bin]:
    """Means over ranges whose length doubles, of the sums at each place."""
    found, first = [], 0
    while first < len(loss):
        last = min(max(first * 2, first + 1), len(loss))
        count = float(weight[first:last].sum())
        if count:
            mean = float(loss[first:last].sum()) / count
            found.append((first, last - 1, round(count), mean, float(np.exp(mean))))
        first = last
    return found


def _sum_losses(model, places, params, rest, batch):
    """Sums of loss and weight at each place, [2, T + 1]."""
    module = model.module(params, rest, jax.random.key(0))
    module.eval()
    arguments = {name: x for name, x in batch.items() if name not in ("inputs", "targets", "loss_weights")}
    logits = module(batch["inputs"], **arguments).logits.astype(jnp.float32)
    targets, weights = batch["targets"], batch["loss_weights"].astype(jnp.float32)
    # at weight 0 a target need not be a class
    known = jnp.where(weights > 0, targets, 0)[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, known, axis=-1)[..., 0]
    parts = jnp.stack([jnp.where(weights > 0, losses * weights, jnp.float32(0)), weights])
    sums = jnp.zeros((2, targets.shape[1] + 1), jnp.float32)
    return sums.at[:, places(batch).reshape(-1)].add(parts.reshape(2, -1))


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
    if jax.process_index() == 0:
        check_out(out)
    loaded = load_run(workdir, step=step, settings=settings, batch_size=batch_size)
    found = loss_by_position(loaded, split=split, batches=batches)
    named = [(_label(part.first + 1, part.last + 1), part.last + 1, part) for part in found]
    return _report(loaded, named, ("positions", "context", "tokens of context"), split, workdir, out)


def evaluate_distances(
    workdir: str,
    *,
    step: int | None = None,
    split: str = "test",
    batches: int = 16,
    batch_size: int | None = None,
    settings: Sequence[str] = (),
    out: str | None = None,
) -> dict[str, Any]:
    """Prints and plots the perplexity of a run by the distance of the target's last occurrence.

    Args:
      workdir, step, split, batches, batch_size, settings: as for `evaluate_positions`.
      out: JSON file to write; None for <workdir>/distances_<split>.json. The plot has the same name with .png.

    Returns:
      The content of the JSON file.

    Raises:
      RunError: as `evaluate_checkpoint` and `loss_by_distance`.
    """
    if jax.process_index() == 0:
        check_out(out)
    loaded = load_run(workdir, step=step, settings=settings, batch_size=batch_size)
    found = loss_by_distance(loaded, split=split, batches=batches)
    named = [(_label(part.first, part.last) if part.last else "none", part.last, part) for part in found]
    titles = ("distances", "distance", "tokens since the target's last occurrence")
    return _report(loaded, named, titles, split, workdir, out)


def _report(
    loaded: LoadedRun,
    named: Sequence[tuple[str, int, PositionLoss | DistanceLoss]],
    titles: tuple[str, str, str],
    split: str,
    workdir: str,
    out: str | None,
) -> dict[str, Any]:
    """Prints, plots and writes means.

    Args:
      loaded: the run.
      named: label, place on the axis and mean of each range.
      titles: key in the JSON and beginning of the file's name, heading of the labels, title of the axis.
      split, workdir, out: as for `evaluate_positions`.
    """
    key, heading, axis = titles
    name = model_name(loaded.config["model"])
    log(f"{name} on {loaded.task.name}, {split} split, step {loaded.step}: perplexity by {axis}")
    rows = [(label, f"{part.tokens:,}", f"{part.loss:.4f}", f"{part.perplexity:.3f}") for label, _, part in named]
    log(format_table((heading, "tokens", "loss", "perplexity"), rows))
    result = {
        "step": loaded.step,
        "split": split,
        "memory": name,
        "trained_length": loaded.trained.length,
        key: [part._asdict() for _, _, part in named],
    }
    out = out or os.path.join(workdir, f"{key}_{split}.json")
    if jax.process_index() == 0:
        with replace_file(out) as file:
            json.dump(result, file, indent=2)
        points = {place: part.perplexity for _, place, part in named}
        plot_positions(
            {name: points},
            os.path.splitext(out)[0] + ".png",
            title=f"{name} on {loaded.task.name}",
            trained=loaded.trained.length,
            axis_title=axis,
        )
    return result


def _label(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
