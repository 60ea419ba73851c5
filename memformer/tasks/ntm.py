"""The tasks of the Neural Turing Machine: copy, repeat copy, associative recall, dynamic n-grams, priority sort.

Inputs are float channels, answers are bits: the loss is summed over the bits of an answer, and scores are bits and
wrong bits a sequence. An example's channels are its bits, then its marks; where the answer is due they are silent.
Source of all: Graves et al. 2014, "Neural Turing machines" (arXiv 1410.5401), section 4.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, example

__all__ = ["AssociativeRecall", "Copy", "DynamicNGrams", "PrioritySort", "RepeatCopy", "optimal_bits"]


@dataclasses.dataclass(frozen=True)
class _Bits(Task):
    """A question of float channels, and an answer of bits after it."""

    scores: ClassVar[tuple[str, ...]] = ("bits_per_sequence", "bit_errors", "sequence_accuracy", "accuracy")
    loss = "bits"

    @property
    def chance(self) -> float | None:
        """Share of the answer's vectors that fair coins get right."""
        return 0.5**self.num_classes

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def _example(self, question: np.ndarray, answer: np.ndarray) -> Example:
        """The question, then silence while the answer is due, then padding."""
        first, used = len(question), len(question) + len(answer)
        inputs, targets = np.zeros((self.steps, self.features)), np.zeros((self.steps, self.num_classes))
        weights = np.zeros(self.steps)
        inputs[:first], targets[first:used], weights[first:used] = question, answer, 1
        return example(inputs, targets.astype(np.float32), weights, used)


@dataclasses.dataclass(frozen=True)
class _UpTo(_Bits):
    """Lengths are uniform in [min_length, length]; shorter examples are padded at the end."""

    shortest: ClassVar[int] = 1

    length: int = 20
    min_length: int = 1
    bits: int = 8

    def __post_init__(self):
        check_at_least("bits", self.bits, 1)
        check_at_least("min_length", self.min_length, self.shortest)
        check_at_least("length", self.length, self.min_length)

    def with_length(self, length: int) -> Task:
        """Itself at its own length; at another, the task at that very length: min_length follows.

        Raises:
          ValueError: the task cannot have that length.
        """
        return self if length == self.length else dataclasses.replace(self, length=length, min_length=length)

    def _size(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.min_length, self.length + 1))


@dataclasses.dataclass(frozen=True)
class Copy(_UpTo):
    """Say again what was said: random vectors, a delimiter, then silence in which they are due.

    Channels: the bits, the delimiter.

    Attributes:
      length: greatest number of vectors; the paper trains on 1 to 20 and tests to 120.
      min_length: least number of vectors.
      bits: of a vector.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> task = Copy()
      >>> task.steps, task.features, task.num_classes, task.guessing_bits
      (41, 9, 8, 84.0)
    """

    name = "copy"

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """The lengths of the paper's figures."""
        return (10, 20, 30, 50, 120)

    @property
    def features(self) -> int:
        """Channels."""
        return self.bits + 1

    @property
    def num_classes(self) -> int:
        """Bits of an answer's vector."""
        return self.bits

    @property
    def steps(self) -> int:
        """The vectors twice, and the delimiter between."""
        return 2 * self.length + 1

    @property
    def guessing_bits(self) -> float:
        """Bits a sequence of one who says 1/2 to every bit: bits times the mean length."""
        return self.bits * (self.min_length + self.length) / 2

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        vectors = rng.integers(2, size=(self._size(rng), self.bits))
        question = np.zeros((len(vectors) + 1, self.features))
        question[:-1, : self.bits] = vectors
        question[-1, self.bits] = 1
        return self._example(question, vectors)


@dataclasses.dataclass(frozen=True)
class RepeatCopy(_UpTo):
    """Say it so many times: random vectors, the number of repeats, silence for the copies and a last mark.

    Channels: the bits, the delimiter, and beside it the number of repeats, brought to mean 0 and variance 1 over
    1...repeats. An answer has one bit more: 1 at the step after the last copy, where the others are 0.

    Attributes:
      length: greatest number of vectors.
      min_length: least number of vectors.
      bits: of a vector.
      repeats: the number of copies is uniform in 1...repeats.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> task = RepeatCopy()
      >>> task.steps, task.features, task.num_classes
      (112, 10, 9)
    """

    name = "repeat_copy"

    length: int = 10
    repeats: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_at_least("repeats", self.repeats, 2)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return (5, 10, 20)

    @property
    def features(self) -> int:
        """Channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits of an answer's vector, and the mark of the end."""
        return self.bits + 1

    @property
    def steps(self) -> int:
        """The vectors, the delimiter, all copies, the mark of the end."""
        return self.length * (1 + self.repeats) + 2

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        vectors = rng.integers(2, size=(self._size(rng), self.bits))
        count = int(rng.integers(1, self.repeats + 1))
        question = np.zeros((len(vectors) + 1, self.features))
        question[:-1, : self.bits] = vectors
        spread = np.sqrt((self.repeats**2 - 1) / 12)
        question[-1, self.bits :] = 1, (count - (1 + self.repeats) / 2) / spread
        answer = np.zeros((len(vectors) * count + 1, self.num_classes))
        answer[:-1, : self.bits] = np.tile(vectors, (count, 1))
        answer[-1, self.bits] = 1
        return self._example(question, answer)


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(_UpTo):
    """What came after this? Items, one of them again between two marks; the item that followed it is due.

    An item is a mark and `rows` vectors. The item asked for is uniform over all but the last. Channels: the bits,
    the mark of an item, the mark of the question.

    Attributes:
      length: greatest number of items; the paper trains on 2 to 6 and tests to 20.
      min_length: least number of items.
      bits: of a vector.
      rows: vectors of an item.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> task = AssociativeRecall()
      >>> task.steps, task.features, task.num_classes
      (32, 8, 6)
    """

    name = "associative_recall"
    shortest = 2

    length: int = 6
    min_length: int = 2
    bits: int = 6
    rows: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_at_least("rows", self.rows, 1)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Numbers of items, in training and beyond."""
        return (2, 4, 6, 8, 10, 12, 15, 20)

    @property
    def features(self) -> int:
        """Channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits of an answer's vector."""
        return self.bits

    @property
    def steps(self) -> int:
        """Items with their marks, the item asked for between two marks, the answer."""
        return (self.length + 1) * (self.rows + 1) + 1 + self.rows

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        items = rng.integers(2, size=(self._size(rng), self.rows, self.bits))
        asked = int(rng.integers(len(items) - 1))
        blocks = np.zeros((len(items) + 1, self.rows + 1, self.features))
        blocks[:-1, 0, self.bits] = 1
        blocks[-1, 0, self.bits + 1] = 1
        blocks[:-1, 1:, : self.bits], blocks[-1, 1:, : self.bits] = items, items[asked]
        last = np.zeros((1, self.features))
        last[0, self.bits + 1] = 1
        return self._example(np.concatenate([blocks.reshape(-1, self.features), last]), items[asked + 1])


@dataclasses.dataclass(frozen=True)
class DynamicNGrams(_Bits):
    """Which bit comes next, where each context's odds are drawn anew for every example?

    Each of the 2^context contexts has a probability of a one drawn from Beta(1/2, 1/2). The first `context` bits are
    fair coins; each later one is drawn by the odds of the bits before it, and predicted. `optimal_bits` gives the cost
    of the best possible prediction.

    Attributes:
      length: bits of a sequence.
      context: bits that the odds depend on.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> task = DynamicNGrams()
      >>> task.steps, int(task.source("train", 0)[0]["loss_weights"].sum())
      (199, 195)
    """

    name = "dynamic_ngrams"
    scores = ("bits_per_sequence",)

    length: int = 200
    context: int = 5

    def __post_init__(self):
        check_at_least("context", self.context, 1)
        check_at_least("length", self.length, self.context + 1)

    @property
    def features(self) -> int:
        """One channel: the bit."""
        return 1

    @property
    def num_classes(self) -> int:
        """One bit."""
        return 1

    @property
    def chance(self) -> None:
        """None: the score is how sure a prediction is."""
        return None

    @property
    def steps(self) -> int:
        """All bits but the last go in."""
        return self.length - 1

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        odds = rng.beta(0.5, 0.5, size=2**self.context)
        sequence = np.empty(self.length)
        sequence[: self.context] = rng.integers(2, size=self.context)
        uniform = rng.random(self.length)
        seen, past = int("".join(str(int(bit)) for bit in sequence[: self.context]), 2), 2**self.context
        for t in range(self.context, self.length):
            sequence[t] = uniform[t] < odds[seen]
            seen = (2 * seen + int(sequence[t])) % past
        weights = np.arange(1, self.length) >= self.context
        return example(sequence[:-1, None], sequence[1:, None].astype(np.float32), weights)


def optimal_bits(sequence: np.ndarray, context: int = 5) -> float:
    """Bits that the optimal predictor pays for a sequence of `DynamicNGrams`.

    It says (N1 + 1/2) / (N0 + N1 + 1) for a one, N1 and N0 counting the ones and zeros that followed this context
    so far: the Bayes estimate under the Beta(1/2, 1/2) prior. Source: Murphy 2012; arXiv 1410.5401, equation 10.

    Args:
      sequence: zeros and ones [T]; the first `context` of them cost nothing.
      context: bits that the odds depend on.

    Example:
      >>> round(optimal_bits(np.array([0, 0, 0]), context=1), 3)
      1.415
    """
    counts = np.full((2,) * context + (2,), 0.5)
    total = 0.0
    bits = tuple(int(bit) for bit in sequence)
    for t in range(context, len(bits)):
        seen = counts[bits[t - context : t]]
        total -= float(np.log2(seen[bits[t]] / seen.sum()))
        seen[bits[t]] += 1
    return total


@dataclasses.dataclass(frozen=True)
class PrioritySort(_Bits):
    """Random vectors, each with a priority; the highest of them are due, highest first.

    Channels: the bits, the delimiter, the priority, uniform in (-1, 1).

    Attributes:
      length: number of vectors.
      answers: how many of them are due.
      bits: of a vector.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> task = PrioritySort()
      >>> task.steps, task.features, task.num_classes
      (37, 10, 8)
    """

    name = "priority_sort"

    length: int = 20
    answers: int = 16
    bits: int = 8

    def __post_init__(self):
        check_at_least("bits", self.bits, 1)
        check_at_least("answers", self.answers, 1)
        check_at_least("length", self.length, self.answers)

    @property
    def features(self) -> int:
        """Channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits of an answer's vector."""
        return self.bits

    @property
    def steps(self) -> int:
        """The vectors, the delimiter, the answer."""
        return self.length + 1 + self.answers

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        vectors, priorities = rng.integers(2, size=(self.length, self.bits)), rng.uniform(-1, 1, self.length)
        question = np.zeros((self.length + 1, self.features))
        question[:-1, : self.bits], question[:-1, self.bits + 1] = vectors, priorities
        question[-1, self.bits] = 1
        return self._example(question, vectors[np.argsort(-priorities)[: self.answers]])
