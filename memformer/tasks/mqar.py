"""Recall: multi-query associative recall (MQAR).

Source: Arora et al. 2023, "Zoology: measuring and improving recall in efficient language models"
(arXiv 2312.04927). Setting A: vocab_size 8192 with (length, pairs) = (64, 4), (128, 8), (256, 16).
Setting B (DeltaFormer, NeurIPS 2025, table 1): vocab_size 256, length 128, pairs 32.
"""

import dataclasses
import functools

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, example

__all__ = ["MQAR"]


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Key, value, key, value, ...; then every key once more, to be answered with its value.

    Keys are drawn from [1, V/2), values from [V/2, V), both without replacement. After the 2N tokens
    of the pairs, key n comes back 2 g_n tokens later; the gaps g are drawn without replacement from
    1, 2, ... with odds g^(a - 1), a = `power`. The answer is scored at the key itself; all other
    tokens after the pairs are uniform over the vocabulary.

    Attributes:
      length: tokens L.
      pairs: N; 4 N <= L and N < V / 2.
      vocab_size: V, even.
      power: a; small values bring most keys back early.

    Raises:
      ValueError: a setting out of range, named.

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
        if self.length < 4 * self.pairs:
            raise ValueError(f"length must be at least 4 * pairs = {4 * self.pairs}, got {self.length}")
        check_at_least("vocab_size", self.vocab_size, 4)
        if self.vocab_size % 2 or self.vocab_size // 2 <= self.pairs:
            raise ValueError(f"vocab_size must be even and above 2 * pairs = {2 * self.pairs}, got {self.vocab_size}")
        if not isinstance(self.power, (int, float)) or not 0 < self.power < np.inf:
            raise ValueError(f"power must be above 0, got {self.power!r}")

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths from 4 * pairs on, doubling from 64 to 1024."""
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
        odds = _gap_odds((self.length - context) // 2, float(self.power))
        asked = context + 2 * rng.choice(len(odds), self.pairs, replace=False, p=odds)
        inputs = rng.integers(self.vocab_size, size=self.length)
        inputs[0:context:2], inputs[1:context:2] = keys, values
        inputs[asked] = keys
        targets, weights = np.zeros(self.length), np.zeros(self.length)
        targets[asked], weights[asked] = values, 1
        return example(inputs, targets, weights)


@functools.cache
def _gap_odds(count: int, power: float) -> np.ndarray:
    """Probabilities of the gaps 1...count, in proportion to g^(power - 1)."""
    odds = np.arange(1, count + 1) ** (power - 1)
    return odds / odds.sum()
