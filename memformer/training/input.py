"""Input pipeline: the examples of a task, in an order that depends on the seed alone.

Stages of Grain: source -> shuffle (finite sources) -> repeat -> start at a position -> batch -> slice by process.
The position is the number of examples that all processes together have consumed since the start of the run: one
integer, saved with the checkpoint, that restores exactly under another number of processes, another batch size or
another task (a curriculum).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from memformer.data.source import BATCH_KEYS, Example, Extra, RandomAccessSource
from memformer.tasks import Task

__all__ = ["Batch", "Loader", "batch_arrays", "check_batch", "check_split", "make_loader"]

Batch = dict[str, np.ndarray]

# Batches prepared by a background thread, so that a step does not wait for its input.
PREFETCH = 2


class Loader:
    """Iterates over this process's rows of each batch, and tracks the global position.

    Created by `make_loader`. `position` counts the examples that all processes together have consumed, without
    prefetched ones: a loader created at that position continues with the next batch.
    """

    def __init__(self, batches: grain.IterDataset, task: Task, batch_size: int, local_size: int, position: int):
        self._batches = iter(batches)
        self._task = task
        self._batch_size = batch_size
        self._local_size = local_size
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        check_batch(batch, self._task, self._local_size)
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Stops the background thread."""
        self._batches.close()


def make_loader(
    task: Task,
    split: str,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool | None = None,
    repeat: bool = True,
    prefetch: int = PREFETCH,
) -> Loader:
    """Returns a loader of batches of `task`, starting at global example number `position`.

    Batch b holds examples position + b * batch_size ... + batch_size - 1. Process p of P gets the p-th of P equal
    blocks of its rows, so that the concatenated rows of all processes are the same batch for every P.

    Args:
      task: provides the source of the split.
      split: "train", "validation" or "test".
      batch_size: rows per batch over all processes; a multiple of process_count.
      seed: seed of the source and of the shuffle.
      position: `Loader.position` of the run to resume.
      process_index: as jax.process_index().
      process_count: as jax.process_count().
      shuffle: reshuffle a finite source in each epoch; by default for the train split only. An endless source is
        random already and is never shuffled.
      repeat: False ends a finite source after one pass, with padding rows (segment 0, weight 0) in its last batch, so
        that every example is scored once.
      prefetch: number of prefetched batches; 0 creates each on demand.

    Raises:
      ValueError: sizes that do not fit, named; an endless source with repeat=False; an empty split.

    Example:
      >>> from memformer.tasks import make_task
      >>> loader = make_loader(make_task({"name": "swap"}), "train", batch_size=4, seed=0)
      >>> next(loader)["inputs"].shape, loader.position
      ((4, 21), 4)
    """
    _check_sizes(batch_size, position, process_index, process_count, prefetch)
    source = task.source(split, seed)
    _check_source(source, task, split, repeat)
    if not repeat:
        source = _Filled(source, batch_size)
    local_size = batch_size // process_count
    data = grain.MapDataset.source(source)
    if not source.endless:
        if split == "train" if shuffle is None else shuffle:
            # Grain's shuffle takes 32 bits.
            data = data.shuffle(seed=seed % 2**32)
        data = data.repeat() if repeat else data
    if not position < len(data):
        raise ValueError(f"position must be below the {len(data)} examples of one pass, got {position}")
    batches = data[position:].batch(local_size, drop_remainder=True)[process_index::process_count]
    threads = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    return Loader(batches.to_iter_dataset(threads), task, batch_size, local_size, position)


class _Filled:
    """A finite source, padded to a multiple of `size` with examples of weight 0."""

    endless = False

    def __init__(self, source: RandomAccessSource, size: int):
        self._source = source
        self._length = -(-len(source) // size) * size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if index < len(self._source):
            return self._source[index]
        return {key: np.zeros_like(array) for key, array in self._source[0].items()}


def _check_sizes(batch_size: int, position: int, process_index: int, process_count: int, prefetch: int) -> None:
    least = {"batch_size": 1, "position": 0, "process_index": 0, "process_count": 1, "prefetch": 0}
    values = (batch_size, position, process_index, process_count, prefetch)
    for (name, low), value in zip(least.items(), values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    if process_index >= process_count:
        raise ValueError(f"process_index must be below process_count = {process_count}, got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of process_count = {process_count}, got {batch_size}")


def _check_source(source: RandomAccessSource, task: Task, split: str, repeat: bool) -> None:
    if source.endless and not repeat:
        raise ValueError(f"repeat must be True for task {task.name!r}: its source is endless and has no single pass")
    if len(source) == 0:
        raise ValueError(f"the {split} split of task {task.name!r} holds no example; give it more data, or shorten it")


def check_split(task: Task, split: str, seed: int) -> None:
    """Raises ValueError unless the split has an example that a model of `task` can take."""
    source = task.source(split, seed)
    _check_source(source, task, split, repeat=True)
    check_batch({name: np.asarray(array)[None] for name, array in source[0].items()}, task, 1)


def check_batch(batch: Mapping[str, Any], task: Task, rows: int | None = None) -> None:
    """Raises ValueError unless `batch` is valid input for a model of `task`.

    Arrays: inputs int32 [B, T] or float32 [B, T, features]; targets int32 [B, T] or, for loss "bits", float32
    [B, T, num_classes]; segment_ids and positions int32 [B, T]; loss_weights float32 [B, T]; with T = task.steps, and
    the task's extras. Ids are in the vocabulary, targets are classes (bits 0 or 1), weights are finite, not negative,
    and 0 on padding.

    Args:
      batch: a batch of a loader.
      task: the task of the batch.
      rows: B, if known.
    """
    arrays = batch_arrays(task)
    if sorted(batch) != sorted(arrays):
        raise ValueError(f"a batch must hold {', '.join(arrays)}, got {', '.join(batch)}")
    size = len(batch["targets"]) if rows is None else rows
    for key, extra in arrays.items():
        want, dtype = (size, *extra.shape), np.dtype(extra.dtype)
        if batch[key].shape != want or batch[key].dtype != dtype:
            raise ValueError(f"{key} must be {dtype} {want}, got {batch[key].dtype} {batch[key].shape}")
        if extra.end is not None:
            _check_range(key, batch[key], extra.end)
        elif not np.all(np.isfinite(batch[key])):
            raise ValueError(f"{key} must be finite")
    if task.loss == "bits" and not np.all((batch["targets"] == 0) | (batch["targets"] == 1)):
        raise ValueError(f"targets must be 0 or 1, got {batch['targets'].min()} to {batch['targets'].max()}")
    weights = batch["loss_weights"]
    if np.any(weights < 0):
        raise ValueError(f"loss_weights must not be negative, got {weights.min()} to {weights.max()}")
    if np.any(weights[batch["segment_ids"] == 0]):
        raise ValueError("loss_weights must be 0 where segment_ids is 0 (padding)")


def batch_arrays(task: Task) -> dict[str, Extra]:
    """Shape (without the batch axis), dtype and range of each array in batches of a task."""
    time = (task.steps,)
    ids, features = Extra(time, "int32", task.vocab_size), Extra((*time, task.features), "float32")
    classes, bits = Extra(time, "int32", task.num_classes), Extra((*time, task.num_classes), "float32")
    own = (
        features if task.features else ids,
        bits if task.loss == "bits" else classes,
        Extra(time, "float32"),
        Extra(time, "int32", task.steps + 1),
        Extra(time, "int32", task.steps),
    )
    return {**dict(zip(BATCH_KEYS, own, strict=True)), **task.extras}


def _check_range(name: str, values: np.ndarray, end: int) -> None:
    low, high = values.min(), values.max()
    if low < 0 or high >= end:
        raise ValueError(f"{name} must lie in [0, {end}), got {low} to {high}")
