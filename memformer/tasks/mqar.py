"""Multi-query associative recall (MQAR).

Source: Arora et al. 2023, "Zoology: measuring and improving recall in efficient language models"
(arXiv 2312.04927). Setting A: vocab_size 8192 with (length, pairs) = (64, 4), (128, 8), (256, 16).
Setting B (DeltaFormer, NeurIPS 2025, table 1): vocab_size 256, length 128, pairs 32.
"""

import dataclasses
import functools

import numpy as np

from memformer.core.checks import check, check_at_least, check_number
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["MQAR"]


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Answer each repeated key with its value: key, value, key, value, ..., then every key once more.

    Keys are drawn from [1, V/2), values from [V/2, V), both without replacement. After the 2N tokens of the pairs, key
    n is repeated at offset 2 g_n; the gaps g are drawn without replacement from 1, 2, ... with probabilities
    proportional to g^(a - 1), a = `power`. The answer is scored at the repeated key; all other tokens after the pairs
    are uniform over the vocabulary.

    Attributes:
      length: tokens L.
      pairs: N; 4 N <= L and N < V / 2.
      vocab_size: V, even.
      power: a; small values repeat most keys early.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = MQAR().source("train", 0)[0]
      >>> int(e["loss_weights"].sum())
      4
    """

    name = "mqar"

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self):
        check_at_least("pairs", self.pairs, 1)
        check_at_least("length", self.length, 1)
        check(self.length >= 4 * self.pairs, "length", f"at least 4 * pairs = {4 * self.pairs}", self.length)
        check_at_least("vocab_size", self.vocab_size, 4)
        fits = self.vocab_size % 2 == 0 and self.vocab_size // 2 > self.pairs
        check(fits, "vocab_size", f"even and above 2 * pairs = {2 * self.pairs}", self.vocab_size)
        check_number("power", self.power, above=0)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length: from 64 to 1024, at least 4 * pairs."""
        return tuple(n for n in (64, 128, 256, 512, 1024) if n >= 4 * self.pairs)

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return self.vocab_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing any value."""
        return 2 / self.vocab_size

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(half, self.pairs, replace=False)
        probabilities = _gap_probabilities((self.length - context) // 2, float(self.power))
        queried = context + 2 * rng.choice(len(probabilities), self.pairs, replace=False, p=probabilities)
        inputs = rng.integers(self.vocab_size, size=self.length)
        inputs[0:context:2], inputs[1:context:2] = keys, values
        inputs[queried] = keys
        targets, weights = np.zeros(self.length), np.zeros(self.length)
        targets[queried], weights[queried] = values, 1
        return make_example(inputs, targets, weights)


@functools.cache
def _gap_probabilities(count: int, power: float) -> np.ndarray:
    """Probabilities of the gaps 1...count, proportional to g^(power - 1)."""
    probabilities = np.arange(1, count + 1) ** (power - 1)
    return probabilities / probabilities.sum()
