"""Input pipeline: the examples of a task, in an order that depends on the seed alone.

Order of the examples (shuffled, repeated) -> batches, of which a process reads its own rows -> checks and the transfer
to the devices. Everything runs in a background thread; reading can run in processes.
The position is the number of examples that all processes together have consumed since the start of the run: one
integer, saved with the checkpoint, that restores exactly under another number of processes, another batch size or
another task (a curriculum).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from memformer.core.checks import check_at_least
from memformer.data.source import BATCH_KEYS, Example, Extra, RandomAccessSource, stack_examples
from memformer.data.token_windows import MixedSource
from memformer.tasks import Task

__all__ = ["Batch", "Loader", "batch_arrays", "batch_shapes", "check_batch", "check_split", "make_loader"]

Batch = dict[str, np.ndarray]

# Batches prepared by a background thread, so that a step does not wait for its input.
PREFETCH = 2


class Loader:
    """Iterates over this process's part of each batch, and tracks the global position.

    Created by `make_loader`. `position` counts the examples that all processes together have consumed, without
    prefetched ones: a loader created at that position continues with the next batch.
    """

    def __init__(self, batches: grain.IterDataset, source: RandomAccessSource, batch_size: int, position: int):
        self._source = source
        self._batches = iter(batches)
        self._batch_size = batch_size
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        self.position += self._batch_size
        return batch

    @property
    def epochs(self) -> tuple[float, ...]:
        """Number of passes over each stored part of the data so far; () where every example is new."""
        if isinstance(self._source, MixedSource):
            return self._source.epochs(self.position)
        return () if self._source.endless else (self.position / len(self._source),)

    def close(self) -> None:
        """Stops the background thread and the workers."""
        self._batches.close()


def make_loader(
    task: Task,
    split: str,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    place: Callable[[Batch], dict[str, Any]] | None = None,
    shuffle: bool | None = None,
    repeat: bool = True,
    prefetch: int = PREFETCH,
    workers: int = 0,
) -> Loader:
    """Returns a loader of batches of `task`, starting at global example number `position`.

    Row r of batch b is example position + b * batch_size + r, for every number of processes. A process reads the rows
    that its devices hold and no other:

        layout = batch_layout(batch_shapes(task, batch_size), mesh)
        make_loader(task, "train", batch_size=batch_size, seed=seed, rows=layout.rows, place=layout.place)

    Args:
      task: provides the source of the split.
      split: "train", "validation" or "test".
      batch_size: rows per batch over all processes.
      seed: seed of the source and of the shuffle.
      position: `Loader.position` of the run to resume.
      rows: numbers of the rows to read, increasing; by default all.
      place: applied to each batch of these rows in the background thread, such as `BatchLayout.place`; by default
        batches stay NumPy arrays.
      shuffle: reshuffle a finite source in each epoch; by default for the train split only. An endless source is
        random already and is never shuffled.
      repeat: False ends a finite source after one pass, with padding rows (segment 0, weight 0) in its last batch, so
        that every example is scored once.
      prefetch: number of prefetched batches; 0 creates each on demand.
      workers: processes that read batches, for sources that compute much per example (rendering, tokenizing); 0 reads
        in the background thread. The batches are the same.

    Raises:
      ValueError: sizes that do not fit, named; an endless source with repeat=False; an empty split.

    Example:
      >>> from memformer.tasks import make_task
      >>> loader = make_loader(make_task({"name": "swap"}), "train", batch_size=4, seed=0)
      >>> next(loader)["inputs"].shape, loader.position
      ((4, 21), 4)
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("position", position, 0),
        ("prefetch", prefetch, 0),
        ("workers", workers, 0),
    ):
        check_at_least(name, value, least)
    chosen = np.arange(batch_size) if rows is None else _check_rows(rows, batch_size)
    source = task.source(split, seed)
    _check_source(source, task, split, repeat)
    if not repeat:
        source = _Filled(source, batch_size)
    order: Any = range(len(source))
    if not source.endless:
        order = grain.MapDataset.range(len(source))
        if split == "train" if shuffle is None else shuffle:
            # Grain's shuffle takes 32 bits.
            order = order.shuffle(seed=seed % 2**32)
        order = order.repeat() if repeat else order
    if not position < len(order):
        raise ValueError(f"position must be below the {len(order)} examples of one pass, got {position}")

    def prepare(batch: Batch) -> dict[str, Any]:
        check_batch(batch, task, len(chosen))
        return batch if place is None else place(batch)

    batches = grain.MapDataset.source(_Batches(source, order, batch_size, chosen, position))
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads flags of its own, which nothing has parsed in a notebook
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    stream = stream.map(prepare)
    if prefetch:
        stream = ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch)
    return Loader(stream, source, batch_size, position)


class _Batches:
    """The batches of a source by number: `rows` of each `batch_size` examples of `order`, from `position` on."""

    def __init__(self, source: RandomAccessSource, order: Any, batch_size: int, rows: np.ndarray, position: int):
        self._source, self._order = source, order
        self._size, self._rows, self._position = batch_size, rows, position

    def __len__(self) -> int:
        return (len(self._order) - self._position) // self._size

    def __getitem__(self, index: int) -> Batch:
        start = self._position + int(index) * self._size
        numbers = [self._order[start + row] for row in self._rows.tolist()]
        read = getattr(self._source, "batch", None)
        return stack_examples([self._source[number] for number in numbers]) if read is None else read(numbers)


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


def _check_rows(rows: Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
    numbers = np.asarray(rows)
    whole = numbers.ndim == 1 and len(numbers) > 0 and np.issubdtype(numbers.dtype, np.integer)
    if not (whole and np.all(np.diff(numbers) > 0) and numbers[0] >= 0 and numbers[-1] < batch_size):
        raise ValueError(f"rows must be increasing numbers below batch_size = {batch_size}, got {rows!r}")
    return numbers


def _check_source(source: RandomAccessSource, task: Task, split: str, repeat: bool) -> None:
    if source.endless and not repeat:
        raise ValueError(
            f"task {task.name!r} has an endless source, without a single pass: give a number of batches (repeat=True)"
        )
    if len(source) == 0:
        raise ValueError(f"the {split} split of task {task.name!r} holds no example; give it more data, or shorten it")


def check_split(task: Task, split: str, seed: int, *, once: bool = False) -> None:
    """Raises ValueError unless the split has an example that a model of `task` can take, and an end for `once`."""
    source = task.source(split, seed)
    _check_source(source, task, split, repeat=not once)
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


def batch_shapes(task: Task, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Global shape of each array in batches of a task.

    Example:
      >>> from memformer.tasks import make_task
      >>> batch_shapes(make_task({"name": "swap"}), 4)["inputs"]
      (4, 21)
    """
    return {name: (batch_size, *extra.shape) for name, extra in batch_arrays(task).items()}


def _check_range(name: str, values: np.ndarray, end: int) -> None:
    low, high = values.min(), values.max()
    if low < 0 or high >= end:
        raise ValueError(f"{name} must lie in [0, {end}), got {low} to {high}")
