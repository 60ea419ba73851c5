"""Regular languages with one answer at the end: parity, and modular arithmetic without brackets.

Source: Grazzi et al. 2024, "Unlocking state-tracking in linear RNNs through negative eigenvalues"
(arXiv 2411.12537), after Deletang et al. 2022 (arXiv 2207.02098). Trained on lengths 3 to 40, tested
on 40 to 256, scored by `scaled_accuracy`.
"""

import dataclasses

import numpy as np

from memformer.tasks.source import Example, SyntheticSource, Task, check_at_least, example

__all__ = ["ModularArithmetic", "Parity", "scaled_accuracy"]


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for no mistake.

    Example:
      >>> scaled_accuracy(0.75, 0.5)
      0.5
    """
    return (accuracy - chance) / (1 - chance)


@dataclasses.dataclass(frozen=True)
class _OneAnswer(Task):
    """Lengths are uniform in [min_length, length]; shorter examples are padded at the end."""

    length: int = 40
    min_length: int = 3

    def __post_init__(self):
        check_at_least("min_length", self.min_length, 1)
        check_at_least("length", self.length, self.min_length)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return (40, 64, 128, 256)

    def with_length(self, length: int) -> Task:
        """Itself at its own length; at another, the task at that very length: min_length follows.

        Raises:
          ValueError: the task cannot have that length.
        """
        return self if length == self.length else dataclasses.replace(self, length=length, min_length=length)

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def _example(self, tokens: np.ndarray, answer: int) -> Example:
        used = len(tokens)
        targets, weights = np.zeros(self.steps), np.zeros(self.steps)
        targets[used - 1], weights[used - 1] = answer, 1
        return example(np.pad(tokens, (0, self.steps - used)), targets, weights, used)


@dataclasses.dataclass(frozen=True)
class Parity(_OneAnswer):
    """Is the number of ones odd? Bits are uniform; the answer is scored at the last bit.

    Attributes:
      length: greatest number of bits.
      min_length: least number of bits.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> e = Parity().source("train", 0)[0]
      >>> int(e["inputs"].sum() % 2) == int(e["targets"].sum())
      True
    """

    name = "parity"

    @property
    def vocab_size(self) -> int:
        """Number of input ids."""
        return 2

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return 2

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        bits = rng.integers(2, size=rng.integers(self.min_length, self.length + 1))
        return self._example(bits, bits.sum() % 2)


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(_OneAnswer):
    """The value of an expression such as 3 + 1 * 4 - 2 =, modulo `modulus`.

    Digits and the operators +, -, * are uniform; * binds closer; the answer is scored at "=".
    An expression has an odd number of tokens, so that the lengths in use are the odd ones of
    [min_length, length], or the greatest below where there is none; "=" is not counted. Ids: the
    digits, then +, -, *, =.

    Attributes:
      length: greatest number of tokens before "=".
      min_length: least number of tokens before "=".
      modulus: digits are 0...modulus - 1.

    Raises:
      ValueError: a setting out of range, named.

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
        """The longest expression and "="."""
        return self.length + 1

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        most = (self.length - 1) // 2
        operators = rng.integers(3, size=rng.integers(min(self.min_length // 2, most), most + 1))
        digits = rng.integers(self.modulus, size=len(operators) + 1)
        tokens = np.full(2 * len(digits), self.modulus + 3)
        tokens[0::2] = digits
        tokens[1:-1:2] = self.modulus + operators
        return self._example(tokens, _value(digits.tolist(), operators.tolist()) % self.modulus)


def _value(digits: list[int], operators: list[int]) -> int:
    """The value, 0, 1, 2 standing for +, -, *."""
    total, product = 0, digits[0]
    for operator, digit in zip(operators, digits[1:], strict=True):
        if operator == 2:
            product *= digit
        else:
            total, product = total + product, digit if operator == 0 else -digit
    return total + product
