"""Bases of the formal languages: lengths, one answer, scores.

The tasks of table 5 of DeltaFormer (NeurIPS 2025) are in `regular_languages` and `context_free_languages`.

Source: Grazzi et al. 2024, "Unlocking state-tracking in linear RNNs through negative eigenvalues" (arXiv 2411.12537),
after Deletang et al. 2022 (arXiv 2207.02098): trained on lengths 3 to 40, tested on 40 to 256, scored by
`scaled_accuracy`.
"""

import dataclasses
import functools

import numpy as np

from memformer.core.checks import check_at_least
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["FormalLanguage", "OneAnswer", "scaled_accuracy"]


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """Rescales accuracy to 0 at chance and 1 at no error: (accuracy - chance) / (1 - chance).

    Example:
      >>> scaled_accuracy(0.75, 0.5)
      0.5
    """
    return (accuracy - chance) / (1 - chance)


@dataclasses.dataclass(frozen=True)
class FormalLanguage(Task):
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
class OneAnswer(FormalLanguage):
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
