"""Multi-query associative recall (MQAR).

Source: Arora et al. 2023, "Zoology: measuring and improving recall in efficient language models"
(arXiv 2312.04927). Setting A: vocab_size 8192 with (length, pairs) = (64, 4), (128, 8), (256, 16).
Setting B (DeltaFormer, NeurIPS 2025, table 1): vocab_size 256, length 128, pairs 32.
"""

import dataclasses
import functools

import numpy as np

from memformer.core.checks import check, check_at_least, check_number
from memformer.data.draws import bounded_integers, sample_integers, split_words64, unit_floats
from memformer.data.source import Example, SyntheticSource, Words, make_batch
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
        population = self.vocab_size // 2 - 1
        # `sample_integers` draws no other samples
        together = population > self.pairs and (population <= 10_000 or self.pairs <= population // 50)
        return SyntheticSource(self._draw, split, seed, self._draw_batch if together else None)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        half = self.vocab_size // 2
        keys = rng.choice(half - 1, self.pairs, replace=False)
        values = rng.choice(half, self.pairs, replace=False)
        chances = self._gap_probabilities
        gaps = rng.choice(len(chances), self.pairs, replace=False, p=chances)
        rest = rng.integers(self.vocab_size, size=self.length)
        batch = self._examples(keys[None], values[None], gaps[None], rest[None])
        return {name: array[0] for name, array in batch.items()}

    def _draw_batch(self, words: Words) -> tuple[Example, np.ndarray]:
        half, pairs = self.vocab_size // 2, self.pairs
        sampled, filled = 2 * pairs - 1, -(-self.length // 2)
        # Most rows need fewer words for their gaps.
        drawn = words(sampled + 6 * pairs + 16 + filled)
        samples = split_words64(drawn[:, :sampled])
        keys, bad_keys = sample_integers(samples[:, :sampled], half - 1, pairs)
        values, bad_values = sample_integers(samples[:, sampled:], half, pairs)
        gaps, used, short = _sample_gaps(unit_floats(drawn[:, sampled:-filled]), self._gap_probabilities, pairs)
        columns = sampled + used[:, None] + np.arange(filled)
        rest = split_words64(np.take_along_axis(drawn, columns, axis=1))[:, : self.length]
        others, bad_others = bounded_integers(rest, self.vocab_size)
        return self._examples(keys, values, gaps, others), bad_keys | bad_values | short | bad_others

    def _examples(self, keys: np.ndarray, values: np.ndarray, gaps: np.ndarray, others: np.ndarray) -> Example:
        """Stacked examples: keys, values and gaps [B, pairs] from 0 on, and the ids [B, length] of all other tokens."""
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys, values, queried = 1 + keys, half + values, context + 2 * gaps
        inputs = others.copy()
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape)
        for array, content in ((inputs, keys), (targets, values), (weights, 1)):
            np.put_along_axis(array, queried, content, axis=1)
        return make_batch(inputs, targets, weights)

    @property
    def _gap_probabilities(self) -> np.ndarray:
        return _gap_probabilities((self.length - 2 * self.pairs) // 2, float(self.power))


def _sample_gaps(drawn: np.ndarray, probabilities: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct numbers of these probabilities per row, as `Generator.choice` draws them from floats [B, n].

    Returns:
      The numbers [B, size], the floats used per row, and the rows that need more floats.
    """
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]
    first = cumulative.searchsorted(drawn[:, :size], side="right")
    result, used = first.copy(), np.full(len(drawn), size)
    short = np.zeros(len(drawn), bool)
    for row, numbers in enumerate(first.tolist()):
        found = list(dict.fromkeys(numbers))
        while len(found) < size and not short[row]:
            # NumPy draws what is missing again, without the numbers found
            end = used[row] + size - len(found)
            if end > drawn.shape[1]:
                short[row] = True
                break
            left = probabilities.copy()
            left[found] = 0
            left = np.cumsum(left)
            left /= left[-1]
            found += dict.fromkeys(left.searchsorted(drawn[row, used[row] : end], side="right").tolist())
            used[row] = end
        result[row, : len(found)] = found
    return result, used, short


@functools.cache
def _gap_probabilities(count: int, power: float) -> np.ndarray:
    """Probabilities of the gaps 1...count, proportional to g^(power - 1)."""
    probabilities = np.arange(1, count + 1) ** (power - 1)
    return probabilities / probabilities.sum()
