"""Context-free languages: arithmetic with brackets, string reversal, stack manipulation."""

import dataclasses

import numpy as np

from memformer.core.checks import check_at_least
from memformer.data.source import Example, make_example
from memformer.tasks.formal_languages import FormalLanguage, OneAnswer

__all__ = ["BracketArithmetic", "ReverseString", "StackManipulation"]


@dataclasses.dataclass(frozen=True)
class BracketArithmetic(OneAnswer):
    """Evaluate an expression with brackets such as ( ( - 1 ) * ( 4 - 3 ) ) =, modulo `modulus`.

    An expression of n tokens is a digit (n = 1), - digit (2), ( digit ) (3), ( - digit ) (4), or ( left operator right
    ) with one of +, -, * and the other n - 3 tokens divided anywhere, all uniform. Ids: the digits, +, -, *, (, ), =.

    Attributes:
      length: maximum number of tokens before "=".
      min_length: minimum number of tokens before "=".
      prefixes: train on the value of every bracket where it closes too; the other splits score the answer at "=".
      modulus: digits are 0...modulus - 1.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = BracketArithmetic()
      >>> task.vocab_size, task.num_classes, task.steps
      (11, 5, 41)
    """

    name = "bracket_arithmetic"

    modulus: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("modulus", self.modulus, 2)

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return self.modulus + 6

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return self.modulus

    @property
    def steps(self) -> int:
        """T: the longest expression and "="."""
        return self.length + 1

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = []
        answers: list[int] = []
        value = self._write(rng, self._size(rng), tokens, answers)
        return np.array([*tokens, self.modulus + 5]), np.array([*answers, value])

    def _write(self, rng: np.random.Generator, size: int, tokens: list[int], answers: list[int]) -> int:
        """Appends an expression of `size` tokens, and the values of its brackets; returns its value."""
        plus, minus, times, opening, closing = range(self.modulus, self.modulus + 5)

        def put(*ids: int) -> None:
            tokens.extend(ids)
            answers.extend([-1] * len(ids))

        if size <= 4:
            digit = int(rng.integers(self.modulus))
            negative, bracketed = size % 2 == 0, size > 2
            put(*[opening] * bracketed, *[minus] * negative, digit, *[closing] * bracketed)
            value = -digit if negative else digit
        else:
            left = int(rng.integers(1, size - 3))
            operator = plus + int(rng.integers(3))
            put(opening)
            first = self._write(rng, left, tokens, answers)
            put(operator)
            second = self._write(rng, size - 3 - left, tokens, answers)
            put(closing)
            value = {plus: first + second, minus: first - second, times: first * second}[operator]
        value %= self.modulus
        if tokens[-1] == closing:
            answers[-1] = value
        return value


class _OneString(FormalLanguage):
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
