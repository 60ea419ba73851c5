"""Sources: random access to examples by number, drawn from a counter-based generator or stored.

Example i of (seed, split) is drawn by a Philox generator whose key is (seed, split) and whose counter starts at
i * 2**128. It depends on nothing else: a source is endless, resumes at no cost, is the same for any number of workers
and processes, and never shares a draw between splits, whose keys differ. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3".
"""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from memformer.core.checks import check, check_choice

__all__ = [
    "BATCH_KEYS",
    "SPLITS",
    "Example",
    "Extra",
    "FiniteSource",
    "RandomAccessSource",
    "SyntheticSource",
    "make_batch",
    "make_example",
    "stack_examples",
]

Example: TypeAlias = dict[str, np.ndarray]
Words: TypeAlias = Callable[[int], np.ndarray]

# The number is the second word of the generator's key.
SPLITS = {"train": 0, "validation": 1, "test": 2}

# The arrays that every example has; all have time as their first axis.
BATCH_KEYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions")

# More examples than any run draws, and within the integers that Grain counts with (sys.maxsize).
ENDLESS = 2**48


class Extra(NamedTuple):
    """Shape and range of an array that an example has beyond `BATCH_KEYS`, such as the sentence to translate.

    Attributes:
      shape: shape per example, without the batch axis.
      dtype: NumPy dtype name.
      end: integers lie in [0, end); None for floats, which must be finite.
    """

    shape: tuple[int, ...]
    dtype: str
    end: int | None = None


class RandomAccessSource(Protocol):
    """The interface that the input pipeline reads: a length and examples by number.

    A source may also have a method `batch(numbers)` that returns examples stacked; the pipeline then calls it instead.

    Attributes:
      endless: True where every draw is new; False where the source is a stored set.
    """

    endless: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class SyntheticSource:
    """Endless source that draws example i of (seed, split) by `draw(generator, i)`.

    Args:
      draw: makes one example from a fresh generator and the example's number.
      split: "train", "validation" or "test".
      seed: integer in [0, 2**64).
      draw_batch: makes the stacked examples of a batch from `words`, where words(n) are the first n words [B, n] of the
        rows' generators, and names the rows that `draw` must make instead; see `memformer.data.draws`. It must make
        the same examples as `draw`, faster.

    Raises:
      ValueError: unknown split, or invalid seed.
      IndexError: example number outside [0, len(source)).
      TypeError: example number that is not an integer.

    Example:
      >>> source = SyntheticSource(lambda rng, i: {"x": rng.integers(10, size=3)}, "train", 0)
      >>> bool((source[7]["x"] == source[7]["x"]).all())
      True
    """

    endless = True

    def __init__(
        self,
        draw: Callable[[np.random.Generator, int], Example],
        split: str,
        seed: int,
        draw_batch: Callable[[Words], tuple[Example, np.ndarray]] | None = None,
    ):
        check_choice("split", split, SPLITS)
        self._key = np.array([_check_seed(seed), SPLITS[split]], np.uint64)
        self._draw, self._draw_batch = draw, draw_batch

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        index = _check_index(index, ENDLESS)
        counter = np.array([0, 0, index, 0], np.uint64)
        return self._draw(np.random.Generator(np.random.Philox(key=self._key, counter=counter)), index)

    def batch(self, numbers: Sequence[int]) -> Example:
        """The examples with these numbers, stacked.

        Example:
          >>> source = SyntheticSource(lambda rng, i: {"x": rng.integers(10, size=3)}, "train", 0)
          >>> source.batch([7, 8])["x"].shape
          (2, 3)
        """
        if self._draw_batch is None:
            return stack_examples([self[number] for number in numbers])
        chosen = [_check_index(number, ENDLESS) for number in numbers]
        batch, again = self._draw_batch(lambda count: self._words(chosen, count))
        for row in np.flatnonzero(again):
            for name, array in self[chosen[row]].items():
                batch[name][row] = array
        return batch

    def _words(self, numbers: Sequence[int], count: int) -> np.ndarray:
        # setting the counter of one generator costs a tenth of making another
        generator = np.random.Philox(key=self._key)
        state = generator.state
        words = np.empty((len(numbers), count), np.uint64)
        for row, number in enumerate(numbers):
            state["state"]["counter"][2] = number
            generator.state = state
            words[row] = generator.random_raw(count)
        return words


class FiniteSource:
    """Stored set of `length` examples, of which example i is `make(i)`.

    Raises:
      IndexError: example number outside [0, length).
      TypeError: example number that is not an integer.

    Example:
      >>> source = FiniteSource(lambda i: {"x": np.array([i])}, 3)
      >>> len(source), source[2]["x"].item()
      (3, 2)
    """

    endless = False

    def __init__(self, make: Callable[[int], Example], length: int):
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._make(_check_index(index, self._length))


def make_example(inputs: np.ndarray, targets: ArrayLike, loss_weights: np.ndarray, used: int | None = None) -> Example:
    """Makes an example of a single segment; time steps from `used` on are padding.

    Args:
      inputs: ids [T], or features [T, F].
      targets: classes [T], or bits [T, num_classes].
      loss_weights: [T]; a step of weight 0 is not scored. Padding must have weight 0.
      used: number of steps before the padding; default: all.
    """
    steps = len(inputs)
    time = np.arange(steps, dtype=np.int32)
    inside = time < (steps if used is None else used)
    return {
        "inputs": np.asarray(inputs, np.float32 if np.ndim(inputs) == 2 else np.int32),
        "targets": np.asarray(targets, np.float32 if np.ndim(targets) == 2 else np.int32),
        "loss_weights": np.asarray(loss_weights, np.float32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, time, 0).astype(np.int32),
    }


def make_batch(inputs: np.ndarray, targets: np.ndarray, loss_weights: np.ndarray) -> Example:
    """Makes the stacked examples [B, T] of a batch, each a single segment without padding; see `make_example`."""
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape[:2])
    return {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_weights": loss_weights.astype(np.float32),
        "segment_ids": np.ones(inputs.shape[:2], np.int32),
        "positions": positions.copy(),
    }


def stack_examples(examples: Sequence[Example]) -> Example:
    """Stacks examples along a new first axis.

    Raises:
      ValueError: examples with different arrays or shapes.

    Example:
      >>> stack_examples([{"x": np.zeros(3)}, {"x": np.ones(3)}])["x"].shape
      (2, 3)
    """
    first = {name: np.shape(array) for name, array in examples[0].items()}
    for example in examples:
        found = {name: np.shape(array) for name, array in example.items()}
        if found != first:
            raise ValueError(f"all examples of a source must have the same arrays and shapes, got {first} and {found}")
    return {name: np.stack([example[name] for example in examples]) for name in first}


def _check_index(index: int, length: int) -> int:
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(f"example number must be in [0, {length}), got {number}")
    return number


def _check_seed(seed: int) -> int:
    # A word of the generator's key has 64 bits.
    valid = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) and 0 <= seed < 2**64
    check(valid, "seed", "an integer in [0, 2**64)", seed)
    return int(seed)
