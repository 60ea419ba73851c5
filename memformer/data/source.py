"""The base of every task: counter-based random access, and the shape of one example.

Example i of (seed, split) is drawn by a Philox generator whose key is (seed, split) and whose
counter starts at i * 2**128: it depends on nothing else, so that a source is endless, costs nothing
to resume, is the same for any number of workers and processes, and never shares a draw between
splits (their keys differ). Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "BATCH_KEYS",
    "SPLITS",
    "Example",
    "Extra",
    "RandomAccessSource",
    "SyntheticSource",
    "Task",
    "check_at_least",
    "check_choice",
    "example",
]

Example: TypeAlias = dict[str, np.ndarray]

# The number is the second word of the generator's key.
SPLITS = {"train": 0, "validation": 1, "test": 2}

# The arrays that every example has; all have time as their first axis.
BATCH_KEYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions")

# Far more examples than any run draws, and well inside what Grain counts with (sys.maxsize).
ENDLESS = 2**48


class Extra(NamedTuple):
    """An array of an example beside those that every task has, such as the sentence to translate.

    Attributes:
      shape: of one example, without the batch.
      dtype: NumPy's name of it.
      end: integers lie in [0, end); None for floats, which must be finite.
    """

    shape: tuple[int, ...]
    dtype: str
    end: int | None = None


class RandomAccessSource(Protocol):
    """What the input pipeline reads: a length, examples by number, and whether draws ever repeat."""

    endless: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class SyntheticSource:
    """An endless source that draws example i of (seed, split) by `draw(generator, i)`.

    Args:
      draw: makes one example from a fresh generator and the example's number.
      split: "train", "validation" or "test".
      seed: integer in [0, 2**64).

    Raises:
      ValueError: unknown split, or a seed that is no such integer.
      IndexError: example numbers outside [0, len(source)).

    Example:
      >>> source = SyntheticSource(lambda rng, i: {"x": rng.integers(10, size=3)}, "train", 0)
      >>> bool((source[7]["x"] == source[7]["x"]).all())
      True
    """

    endless = True

    def __init__(self, draw: Callable[[np.random.Generator, int], Example], split: str, seed: int):
        check_choice("split", split, SPLITS)
        self._key = np.array([check_seed(seed), SPLITS[split]], np.uint64)
        self._draw = draw

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < ENDLESS:
            raise IndexError(f"example number must be in [0, {ENDLESS}), got {index}")
        counter = np.array([0, 0, index, 0], np.uint64)
        return self._draw(np.random.Generator(np.random.Philox(key=self._key, counter=counter)), index)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: what an example looks like, how it is scored, and where examples come from.

    A subclass is a frozen dataclass of the task's settings with a field `length` (the size that
    curricula and evaluations vary), and gives `vocab_size` or `features`, `num_classes`, `steps`
    and `source`.

    Attributes:
      name: the key in `TASKS`.
      scores: metrics shown beside the loss, keys of `memformer.training.losses.SCORES`.
      loss: "classes", where a target is a class and the loss its cross entropy, or "bits", where a target is
        [num_classes] zeros and ones and the loss the sum of their binary cross entropies.
    """

    name: ClassVar[str]
    scores: ClassVar[tuple[str, ...]] = ("accuracy",)
    loss: ClassVar[str] = "classes"

    length: int

    @property
    def resolved(self) -> Mapping[str, str]:
        """Settings that depend on what is installed here, resolved; a run records them."""
        return {}

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return ()

    @property
    def vocab_size(self) -> int:
        """Number of input ids; 0 where inputs are float features."""
        return 0

    @property
    def features(self) -> int:
        """Width of float inputs [T, features]; 0 where inputs are ids."""
        return 0

    @property
    def num_classes(self) -> int:
        """Number of classes of a target, or of its bits."""
        raise NotImplementedError(f"{type(self).__name__} has no num_classes")

    @property
    def extras(self) -> Mapping[str, Extra]:
        """Further arrays of an example, each given to the model as the keyword argument of its name."""
        return {}

    @property
    def steps(self) -> int:
        """T, the time steps of an example's arrays (start tokens and queries counted)."""
        return self.length

    @property
    def chance(self) -> float | None:
        """Accuracy of an answer that ignores the inputs; None where accuracy is not the score."""
        return 1 / self.num_classes if self.loss == "classes" else None

    def source(self, split: str, seed: int) -> RandomAccessSource:
        """Examples of one split, by number."""
        raise NotImplementedError(f"{type(self).__name__} has no source")

    def with_length(self, length: int) -> "Task":
        """The same task at another length.

        Raises:
          ValueError: the task cannot have that length.
        """
        return dataclasses.replace(self, length=length)


def example(inputs: np.ndarray, targets: ArrayLike, loss_weights: np.ndarray, used: int | None = None) -> Example:
    """One example of a single segment; time steps from `used` on are padding.

    Args:
      inputs: ids [T], or features [T, F].
      targets: classes [T], or bits [T, num_classes].
      loss_weights: [T]; 0 is not scored. Padding must hold 0.
      used: number of steps that are not padding, all by default.
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


def check_at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_seed(seed: int) -> int:
    """The seed, or ValueError: a key word of the generator holds 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    return int(seed)
