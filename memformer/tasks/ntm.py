"""The tasks of the Neural Turing Machine: copy, repeat copy, associative recall, dynamic n-grams, priority sort.

Inputs are float channels, answers are bits: the loss is summed over the bits of an answer, and scores are bits and bit
errors per sequence. The channels are the bits, then the markers; all are zero while the answer is given. Source: Graves
et al. 2014, "Neural Turing machines" (arXiv 1410.5401), section 4.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from memformer.core.checks import check, check_at_least
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["AssociativeRecall", "Copy", "DynamicNGrams", "PrioritySort", "RepeatCopy", "optimal_bits"]


@dataclasses.dataclass(frozen=True)
class _Bits(Task):
    """Base of tasks with a question of float channels, followed by an answer of bits."""

    scores: ClassVar[tuple[str, ...]] = ("bits_per_sequence", "bit_errors", "sequence_accuracy", "accuracy")
    loss = "bits"

    @property
    def chance(self) -> float | None:
        """Fraction of the answer's vectors that fair coin flips get right."""
        return 0.5**self.num_classes

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        raise NotImplementedError(f"{type(self).__name__} has no _draw")

    def _example(self, question: np.ndarray, answer: np.ndarray) -> Example:
        """The question, then zeros while the answer is given, then padding."""
        first, used = len(question), len(question) + len(answer)
        inputs, targets = np.zeros((self.steps, self.features)), np.zeros((self.steps, self.num_classes))
        weights = np.zeros(self.steps)
        inputs[:first], targets[first:used], weights[first:used] = question, answer, 1
        return make_example(inputs, targets.astype(np.float32), weights, used)


@dataclasses.dataclass(frozen=True)
class _UpTo(_Bits):
    """Base of tasks with random lengths: uniform in [min_length, length]; shorter examples are padded."""

    shortest: ClassVar[int] = 1

    length: int = 20
    min_length: int = 1
    bits: int = 8

    def __post_init__(self):
        check_at_least("bits", self.bits, 1)
        check_at_least("min_length", self.min_length, self.shortest)
        check_at_least("length", self.length, self.min_length)

    def with_length(self, length: int) -> Task:
        """The same task at exactly that length: min_length becomes `length`, unless it is the task's own length."""
        return self if length == self.length else dataclasses.replace(self, length=length, min_length=length)

    def up_to(self, length: int) -> Task:
        """The same task at lengths from min_length to `length`."""
        return dataclasses.replace(self, length=length)

    def _size(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.min_length, self.length + 1))


@dataclasses.dataclass(frozen=True)
class Copy(_UpTo):
    """Copy random vectors, after a delimiter. Channels: the bits, the delimiter.

    Attributes:
      length: maximum number of vectors; the paper trains on 1 to 20 and tests up to 120.
      min_length: minimum number of vectors.
      bits: bits per vector.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = Copy()
      >>> task.steps, task.features, task.num_classes, task.guessing_bits
      (41, 9, 8, 84.0)
    """

    name = "copy"

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length: those of the paper's figures."""
        return (10, 20, 30, 50, 120)

    @property
    def features(self) -> int:
        """Number of channels."""
        return self.bits + 1

    @property
    def num_classes(self) -> int:
        """Bits per vector of an answer."""
        return self.bits

    @property
    def steps(self) -> int:
        """T: the vectors, the delimiter, and the vectors again."""
        return 2 * self.length + 1

    @property
    def guessing_bits(self) -> float:
        """Bits per sequence of predicting 1/2 for every bit: bits times the mean length."""
        return self.bits * (self.min_length + self.length) / 2

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        vectors = rng.integers(2, size=(self._size(rng), self.bits))
        question = np.zeros((len(vectors) + 1, self.features))
        question[:-1, : self.bits] = vectors
        question[-1, self.bits] = 1
        return self._example(question, vectors)


@dataclasses.dataclass(frozen=True)
class RepeatCopy(_UpTo):
    """Copy random vectors a given number of times, then mark the end.

    Channels: the bits, the delimiter, and the number of repeats (at the step of the delimiter), normalised to mean 0
    and variance 1 over 1...repeats. An answer has one more bit, the end marker: 1 at the step after the last copy,
    where the other bits are 0.

    Attributes:
      length: maximum number of vectors.
      min_length: minimum number of vectors.
      bits: bits per vector.
      repeats: the number of copies is uniform in 1...repeats.

    Raises:
      ValueError: an option out of range.

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
        """Lengths of an evaluation by length."""
        return (5, 10, 20)

    @property
    def features(self) -> int:
        """Number of channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits per vector of an answer, and the end marker."""
        return self.bits + 1

    @property
    def steps(self) -> int:
        """T: the vectors, the delimiter, all copies, the end marker."""
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
    """Recall the item that followed the queried one.

    The question is a list of items, then one of them again between two query markers. An item is an item marker and
    `rows` vectors. The queried item is uniform over all but the last. Channels: the bits, the item marker, the query
    marker.

    Attributes:
      length: maximum number of items; the paper trains on 2 to 6 and tests up to 20.
      min_length: minimum number of items.
      bits: bits per vector.
      rows: vectors per item.

    Raises:
      ValueError: an option out of range.

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
        """Lengths of an evaluation by length: numbers of items in training and beyond."""
        return (2, 4, 6, 8, 10, 12, 15, 20)

    @property
    def features(self) -> int:
        """Number of channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits per vector of an answer."""
        return self.bits

    @property
    def steps(self) -> int:
        """T: the items with their markers, the queried item between two markers, the answer."""
        return (self.length + 1) * (self.rows + 1) + 1 + self.rows

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        items = rng.integers(2, size=(self._size(rng), self.rows, self.bits))
        queried = int(rng.integers(len(items) - 1))
        blocks = np.zeros((len(items) + 1, self.rows + 1, self.features))
        blocks[:-1, 0, self.bits] = 1
        blocks[-1, 0, self.bits + 1] = 1
        blocks[:-1, 1:, : self.bits], blocks[-1, 1:, : self.bits] = items, items[queried]
        last = np.zeros((1, self.features))
        last[0, self.bits + 1] = 1
        return self._example(np.concatenate([blocks.reshape(-1, self.features), last]), items[queried + 1])


@dataclasses.dataclass(frozen=True)
class DynamicNGrams(_Bits):
    """Predict the next bit of an n-gram source whose probabilities are drawn anew for every example.

    Each of the 2^context contexts has a probability of a one, drawn from Beta(1/2, 1/2). The first `context` bits are
    uniform; each later bit is drawn with the probability of its context, and predicted. `optimal_bits` is the cost of
    the optimal predictor.

    Attributes:
      length: bits per sequence.
      context: number of preceding bits that determine the probability.

    Raises:
      ValueError: an option out of range.

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
        check(self.context <= 20, "context", "at most 20 (there are 2^context probabilities)", self.context)
        check_at_least("length", self.length, self.context + 1)

    @property
    def features(self) -> int:
        """One channel, the bit."""
        return 1

    @property
    def num_classes(self) -> int:
        """One bit."""
        return 1

    @property
    def chance(self) -> None:
        """None: predictions are scored by their likelihood."""
        return None

    @property
    def steps(self) -> int:
        """T: all bits but the last are inputs."""
        return self.length - 1

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        probabilities = rng.beta(0.5, 0.5, size=2**self.context)
        sequence = np.empty(self.length)
        sequence[: self.context] = rng.integers(2, size=self.context)
        uniform = rng.random(self.length)
        context, contexts = int("".join(str(int(bit)) for bit in sequence[: self.context]), 2), 2**self.context
        for t in range(self.context, self.length):
            sequence[t] = uniform[t] < probabilities[context]
            context = (2 * context + int(sequence[t])) % contexts
        weights = np.arange(1, self.length) >= self.context
        return make_example(sequence[:-1, None], sequence[1:, None].astype(np.float32), weights)


def optimal_bits(sequence: np.ndarray, context: int = 5) -> float:
    """Bits per sequence of the optimal predictor of `DynamicNGrams`.

    It predicts a one with probability (N1 + 1/2) / (N0 + N1 + 1) for N1 ones and N0 zeros so far in this context, the
    Bayes estimate under the Beta(1/2, 1/2) prior. Source: Murphy 2012; arXiv 1410.5401, equation 10.

    Args:
      sequence: zeros and ones [T]; the first `context` of them cost nothing.
      context: number of preceding bits that determine the probability.

    Example:
      >>> round(optimal_bits(np.array([0, 0, 0]), context=1), 3)
      1.415
    """
    counts = np.full((2,) * context + (2,), 0.5)
    total = 0.0
    bits = tuple(int(bit) for bit in sequence)
    for t in range(context, len(bits)):
        count = counts[bits[t - context : t]]
        total -= float(np.log2(count[bits[t]] / count.sum()))
        count[bits[t]] += 1
    return total


@dataclasses.dataclass(frozen=True)
class PrioritySort(_Bits):
    """Sort random vectors by priority, and return those with the highest, in descending order.

    Channels: the bits, the delimiter, the priority, which is uniform in (-1, 1).

    Attributes:
      length: number of vectors.
      answers: number of vectors returned.
      bits: bits per vector.

    Raises:
      ValueError: an option out of range.

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
        """Number of channels."""
        return self.bits + 2

    @property
    def num_classes(self) -> int:
        """Bits per vector of an answer."""
        return self.bits

    @property
    def steps(self) -> int:
        """T: the vectors, the delimiter, the answer."""
        return self.length + 1 + self.answers

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        vectors, priorities = rng.integers(2, size=(self.length, self.bits)), rng.uniform(-1, 1, self.length)
        question = np.zeros((self.length + 1, self.features))
        question[:-1, : self.bits], question[:-1, self.bits + 1] = vectors, priorities
        question[-1, self.bits] = 1
        return self._example(question, vectors[np.argsort(-priorities)[: self.answers]])
