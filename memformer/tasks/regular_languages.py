"""Regular languages with one answer: parity, even pairs, cycle navigation, modular arithmetic without brackets."""

import dataclasses

import numpy as np

from memformer.core.checks import check_at_least
from memformer.data.source import SyntheticSource
from memformer.tasks.formal_languages import OneAnswer

__all__ = ["CycleNavigation", "EvenPairs", "ModularArithmetic", "Parity"]


class _BitOfBits(OneAnswer):
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
class _Drifting(OneAnswer):
    """Base of tasks whose strings are drawn from probabilities of their own with `drift`, in training alone."""

    drift: bool = False

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        task = self if split == "train" else dataclasses.replace(self, drift=False)
        return super(_Drifting, task).source(split, seed)

    def _choose(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Numbers 0, 1, 2, uniform or with probabilities that are uniform on the simplex."""
        return rng.choice(3, size, p=rng.dirichlet(np.ones(3))) if self.drift else rng.integers(3, size=size)


@dataclasses.dataclass(frozen=True)
class CycleNavigation(_Drifting):
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

    def _string(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        moves = self._choose(rng, self._size(rng))
        return moves, np.cumsum(np.array([0, 1, -1])[moves]) % self.places


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(_Drifting):
    """Evaluate an expression such as 3 + 1 * 4 - 2 =, modulo `modulus`.

    Digits and the operators +, -, * are uniform; * binds more tightly; the answer is scored at "=". An expression has
    an odd number of tokens before "=": lengths are the odd ones of [min_length, length], or the greatest odd one below
    where there is none. Ids: the digits, then +, -, *, =.

    Attributes:
      length: maximum number of tokens before "=".
      min_length: minimum number of tokens before "=".
      prefixes: train on the value after every digit too; the other splits score the answer at "=".
      modulus: digits are 0...modulus - 1.
      drift: train on expressions whose operators have probabilities of their own, as the moves of `CycleNavigation`.

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
        operators = self._choose(rng, int(rng.integers(min(self.min_length // 2, most), most + 1)))
        digits = rng.integers(self.modulus, size=len(operators) + 1)
        tokens = np.full(2 * len(digits), self.modulus + 3)
        tokens[0::2] = digits
        tokens[1:-1:2] = self.modulus + operators
        answers = np.full(len(tokens), -1)
        answers[:-1:2] = _values(digits.tolist(), operators.tolist(), self.modulus)
        answers[-1] = answers[-2]
        return tokens, answers


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
