"""Formal languages, the tasks of table 5 of DeltaFormer (NeurIPS 2025).

Regular languages with one answer at the end: parity, even pairs, cycle navigation, modular arithmetic without brackets.
Context-free languages answered with a string: string reversal, stack manipulation.

Source: Grazzi et al. 2024, "Unlocking state-tracking in linear RNNs through negative eigenvalues"
(arXiv 2411.12537), after Deletang et al. 2022 (arXiv 2207.02098): trained on lengths 3 to 40, tested on 40
to 256, scored by `scaled_accuracy`.
"""

import dataclasses
import functools

import numpy as np

from memformer.core.checks import check_at_least
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = [
    "CycleNavigation",
    "EvenPairs",
    "ModularArithmetic",
    "Parity",
    "ReverseString",
    "StackManipulation",
    "scaled_accuracy",
]


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """Rescales accuracy to 0 at chance and 1 at no error: (accuracy - chance) / (1 - chance).

    Example:
      >>> scaled_accuracy(0.75, 0.5)
      0.5
    """
    return (accuracy - chance) / (1 - chance)


@dataclasses.dataclass(frozen=True)
class _FormalLanguage(Task):
    """Base of all: lengths are uniform in [min_length, length], and shorter examples are padded."""

    length: int = 40
    min_length: int = 3

    def __post_init__(self):
        check_at_least("min_length", self.min_length, 1)
        check_at_least("length", self.length, self.min_length)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return (40, 64, 128, 256)

    def with_length(self, length: int) -> Task:
        """The same task at exactly that length: min_length becomes `length`, unless it is the task's own length.

        Raises:
          ValueError: the task does not support that length.
        """
        return self if length == self.length else dataclasses.replace(self, length=length, min_length=length)

    def up_to(self, length: int) -> Task:
        """The same task at lengths from min_length to `length`.

        Raises:
          ValueError: a length below min_length.
        """
        return dataclasses.replace(self, length=length)

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        raise NotImplementedError(f"{type(self).__name__} has no _draw")


@dataclasses.dataclass(frozen=True)
class _OneAnswer(_FormalLanguage):
    """Base of tasks with one answer, at the last token; with `prefixes`, training also has those of shorter strings."""

    prefixes: bool = False

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        every = self.prefixes and split == "train"
        return SyntheticSource(functools.partial(self._draw, every=every), split, seed)

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A string, and the answer after each of its tokens; -1 where a string cannot end."""
        raise NotImplementedError(f"{type(self).__name__} has no _string")

    def _draw(self, rng: np.random.Generator, index: int, every: bool = False) -> Example:
        tokens, answers = self._string(rng)
        used = len(tokens)
        scored = answers >= 0 if every else np.arange(used) == used - 1
        rest = (0, self.steps - used)
        targets = np.pad(np.where(scored, answers, 0), rest)
        return make_example(np.pad(tokens, rest), targets, np.pad(scored, rest), used)

    def _size(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.min_length, self.length + 1))


class _BitOfBits(_OneAnswer):
    """Base of tasks whose tokens are bits, and whose answer is one."""

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return 2

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return 2


@dataclasses.dataclass(frozen=True)
class Parity(_BitOfBits):
    """Tell whether the number of ones is odd. Bits are uniform; the answer is scored at the last bit.

    Attributes:
      length: maximum number of bits.
      min_length: minimum number of bits.
      prefixes: train on the answer after every bit; the other splits score the last.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = Parity().source("train", 0)[0]
      >>> int(e["inputs"].sum() % 2) == int(e["targets"].sum())
      True
    """

    name = "parity"

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(2, size=self._size(rng))
        return bits, np.cumsum(bits) % 2


@dataclasses.dataclass(frozen=True)
class EvenPairs(_BitOfBits):
    """Tell whether the number of adjacent pairs 01 and 10 is even, that is, whether the first and last bit agree.

    Attributes:
      length: maximum number of bits.
      min_length: minimum number of bits.
      prefixes: train on the answer after every bit; the other splits score the last.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = EvenPairs(min_length=40).source("train", 0)[0]
      >>> bool(e["inputs"][0] == e["inputs"][39]) == bool(e["targets"][39])
      True
    """

    name = "even_pairs"

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(2, size=self._size(rng))
        return bits, (bits == bits[0]).astype(int)


@dataclasses.dataclass(frozen=True)
class CycleNavigation(_OneAnswer):
    """Track the position on a cycle, from position 0. Moves are uniform: 0 stay, 1 forward, 2 back.

    Attributes:
      length: maximum number of moves.
      min_length: minimum number of moves.
      prefixes: train on the answer after every move; the other splits score the last.
      places: number of positions of the cycle.
      drift: train on strings whose moves have probabilities of their own (uniform on the simplex), so that few moves
        lead as far from the start as many unbiased ones; moves of the other splits stay uniform.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = CycleNavigation().source("train", 0)[0]
      >>> moves = e["inputs"].tolist()
      >>> int((moves.count(1) - moves.count(2)) % 5) == int(e["targets"].sum())
      True
    """

    name = "cycle_navigation"

    places: int = 5
    drift: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_at_least("places", self.places, 2)

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return 3

    @property
    def num_classes(self) -> int:
        """Positions."""
        return self.places

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        task = self if split == "train" else dataclasses.replace(self, drift=False)
        return super(CycleNavigation, task).source(split, seed)

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size = self._size(rng)
        moves = rng.choice(3, size, p=rng.dirichlet(np.ones(3))) if self.drift else rng.integers(3, size=size)
        return moves, np.cumsum(np.array([0, 1, -1])[moves]) % self.places


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(_OneAnswer):
    """Evaluate an expression such as 3 + 1 * 4 - 2 =, modulo `modulus`.

    Digits and the operators +, -, * are uniform; * binds more tightly; the answer is scored at "=". An expression has
    an odd number of tokens before "=": lengths are the odd ones of [min_length, length], or the greatest odd one below
    where there is none. Ids: the digits, then +, -, *, =.

    Attributes:
      length: maximum number of tokens before "=".
      min_length: minimum number of tokens before "=".
      prefixes: train on the value after every digit too; the other splits score the answer at "=".
      modulus: digits are 0...modulus - 1.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = ModularArithmetic()
      >>> task.vocab_size, task.num_classes, task.steps
      (9, 5, 41)
    """

    name = "modular_arithmetic"

    modulus: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("modulus", self.modulus, 2)

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return self.modulus + 4

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return self.modulus

    @property
    def steps(self) -> int:
        """T: the longest expression and "="."""
        return self.length + 1

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        most = (self.length - 1) // 2
        operators = rng.integers(3, size=rng.integers(min(self.min_length // 2, most), most + 1))
        digits = rng.integers(self.modulus, size=len(operators) + 1)
        tokens = np.full(2 * len(digits), self.modulus + 3)
        tokens[0::2] = digits
        tokens[1:-1:2] = self.modulus + operators
        answers = np.full(len(tokens), -1)
        answers[:-1:2] = _values(digits.tolist(), operators.tolist(), self.modulus)
        answers[-1] = answers[-2]
        return tokens, answers


class _OneString(_FormalLanguage):
    """Base of tasks whose answer is a string, given at `room` blanks after the question."""

    scores = ("accuracy", "sequence_accuracy")

    @property
    def chance(self) -> float:
        """Accuracy of guessing bits."""
        return 0.5

    def _answered(self, tokens: np.ndarray, room: int, answer: np.ndarray) -> Example:
        first, used = len(tokens), len(tokens) + room
        inputs, targets, weights = np.zeros(self.steps), np.zeros(self.steps), np.zeros(self.steps)
        inputs[:first], inputs[first:used] = tokens, self.vocab_size - 1
        targets[first : first + len(answer)], weights[first : first + len(answer)] = answer, 1
        return make_example(inputs, targets, weights, used)


@dataclasses.dataclass(frozen=True)
class ReverseString(_OneString):
    """Reverse a string of bits, one bit per blank. Ids: 0, 1, blank.

    Attributes:
      length: maximum number of bits.
      min_length: minimum number of bits.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = ReverseString(length=3).source("train", 0)[0]
      >>> bool((e["inputs"][:3] == e["targets"][:2:-1]).all())
      True
    """

    name = "reverse_string"

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return 3

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return 2

    @property
    def steps(self) -> int:
        """T: the string and its blanks."""
        return 2 * self.length

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        bits = rng.integers(2, size=rng.integers(self.min_length, self.length + 1))
        return self._answered(bits, len(bits), bits[::-1])


@dataclasses.dataclass(frozen=True)
class StackManipulation(_OneString):
    """List a stack after a sequence of actions, from top to bottom, followed by an end-of-stack class.

    The first tokens are the stack, bottom first, the others are actions; their proportion is uniform. Popping an empty
    stack has no effect. Ids: 0 and 1 are bits, 2 pops, 3 and 4 push 0 and 1, 5 is the blank.

    Attributes:
      length: maximum number of bits and actions.
      min_length: minimum number of bits and actions.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = StackManipulation(length=3)
      >>> task.vocab_size, task.num_classes, task.steps
      (6, 3, 7)
    """

    name = "stack_manipulation"

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return 6

    @property
    def num_classes(self) -> int:
        """Two bits and the end of the stack."""
        return 3

    @property
    def steps(self) -> int:
        """T: the question and its blanks, one more for the end of the stack."""
        return 2 * self.length + 1

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        size = rng.integers(self.min_length, self.length + 1)
        held = rng.integers(2, size=rng.integers(1, size + 1))
        actions = rng.integers(2, 5, size=size - len(held))
        stack = held.tolist()
        for action in actions.tolist():
            if action > 2:
                stack.append(action - 3)
            elif stack:
                stack.pop()
        return self._answered(np.concatenate([held, actions]), int(size) + 1, np.array([*stack[::-1], 2]))


def _values(digits: list[int], operators: list[int], modulus: int) -> list[int]:
    """Values of an expression after each of its digits; operators 0, 1, 2 are +, -, *."""
    total, product = 0, digits[0]
    values = [product]
    for operator, digit in zip(operators, digits[1:], strict=True):
        if operator == 2:
            product = product * digit % modulus
        else:
            total, product = (total + product) % modulus, digit if operator == 0 else -digit
        values.append((total + product) % modulus)
    return values
