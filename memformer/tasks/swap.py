"""State tracking by swaps: n objects change places, and the label is the object at a position.

Source: DeltaFormer (NeurIPS 2025), listing G.1. Object j starts at position j; each step swaps the
objects at two positions, drawn uniformly from the C(n, 2) pairs.
"""

import dataclasses

import numpy as np

from memformer.core.checks import check, check_at_least, check_choice, check_flags
from memformer.data.draws import bounded_integers, split_words64
from memformer.data.source import Example, SyntheticSource, Words, make_batch
from memformer.tasks.task import Task

__all__ = ["Swap"]

STARTS = ("objects", "token", "none")
ENCODINGS = ("pair", "positions")


@dataclasses.dataclass(frozen=True)
class Swap(Task):
    """Name the object at position 0, or at the queried position, after each swap.

    An example has the start tokens, then for each of the `length` swaps one pair token (or two position tokens)
    followed, with `queries`, by a query token. Only the last token of a swap, or its query, is scored. Input ids: pairs
    or positions first, then the n query tokens if any, then the start tokens.

    Chance: the best constant answer is the object that started at the queried position, with accuracy 1/n + (1 - 1/n)
    times the mean of ((n-3)/(n-1))^t over t = 1...length; for n = 5, 25.0% at 16 and 20.3% at 256.

    Attributes:
      length: number of swaps.
      objects: n, from 3 to 512.
      start: "objects" (one token per object, so that the start state can be written), "token" (a single one) or "none"
        (as in the paper).
      queries: False queries position 0 after every swap; True adds a query token with a uniform position.
      encoding: "pair" is one token per swap (vocabulary C(n, 2)); "positions" is two tokens in either order (vocabulary
        n), for large n.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> task = Swap(length=16)
      >>> task.vocab_size, task.num_classes, task.steps, round(task.chance, 3)
      (15, 5, 21, 0.25)
    """

    name = "swap"

    length: int = 16
    objects: int = 5
    start: str = "objects"
    queries: bool = False
    encoding: str = "pair"

    def __post_init__(self):
        check_at_least("length", self.length, 1)
        check_at_least("objects", self.objects, 3)
        check(self.objects <= 512, "objects", "at most 512", self.objects)
        check_choice("start", self.start, STARTS)
        check_choice("encoding", self.encoding, ENCODINGS)
        check_flags(queries=self.queries)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return (16, 32, 64, 128, 256, 512, 1024)

    @property
    def num_classes(self) -> int:
        """One class per object."""
        return self.objects

    @property
    def start_tokens(self) -> int:
        """Number of tokens before the first swap."""
        return {"objects": self.objects, "token": 1, "none": 0}[self.start]

    @property
    def swap_ids(self) -> int:
        """Number of ids that encode swaps; they come first in the vocabulary."""
        return self.objects * (self.objects - 1) // 2 if self.encoding == "pair" else self.objects

    @property
    def vocab_size(self) -> int:
        """Number of swap, query and start ids."""
        return self.swap_ids + self.objects * self.queries + self.start_tokens

    @property
    def tokens_per_swap(self) -> int:
        """Tokens per swap, its query included."""
        return (1 if self.encoding == "pair" else 2) + self.queries

    @property
    def steps(self) -> int:
        """T: start tokens, swaps and queries."""
        return self.start_tokens + self.length * self.tokens_per_swap

    @property
    def chance(self) -> float:
        """Accuracy of naming the object that started at the queried position."""
        n, t = self.objects, np.arange(1, self.length + 1)
        stays = 1 / n + (1 - 1 / n) * ((n - 3) / (n - 1)) ** t
        return float(stays.mean())

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed, self._draw_batch)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        n = self.objects
        first = rng.integers(n, size=self.length)
        step = rng.integers(n - 1, size=self.length)
        queried = rng.integers(n, size=self.length) if self.queries else np.zeros(self.length, np.int64)
        return {name: array[0] for name, array in self._examples(first[None], step[None], queried[None]).items()}

    def _draw_batch(self, words: Words) -> tuple[Example, np.ndarray]:
        n, kinds = self.objects, 2 + self.queries
        count = kinds * self.length
        drawn = split_words64(words(-(-count // 2)))[:, :count]
        numbers, rejected = bounded_integers(drawn, np.repeat([n, n - 1, n][:kinds], self.length))
        first, step, *queried = np.split(numbers, kinds, axis=1)
        return self._examples(first, step, queried[0] if queried else np.zeros_like(first)), rejected

    def _examples(self, first: np.ndarray, step: np.ndarray, queried: np.ndarray) -> Example:
        """Stacked examples whose swaps [B, length] exchange positions `first` and `first` + 1 + `step`, modulo n."""
        second = (first + 1 + step) % self.objects
        tokens = self._encode(first, second, queried)
        targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape)
        targets[..., -1] = [_track(self.objects, *swaps) for swaps in zip(first, second, queried, strict=True)]
        weights[..., -1] = 1
        rows = len(first)
        start = np.tile(np.arange(self.vocab_size - self.start_tokens, self.vocab_size), (rows, 1))
        nothing = np.zeros_like(start)
        return make_batch(
            np.concatenate([start, tokens.reshape(rows, -1)], axis=1),
            np.concatenate([nothing, targets.reshape(rows, -1)], axis=1),
            np.concatenate([nothing, weights.reshape(rows, -1)], axis=1),
        )

    def _encode(self, first: np.ndarray, second: np.ndarray, queried: np.ndarray) -> np.ndarray:
        """Token ids [B, length, tokens_per_swap]."""
        if self.encoding == "pair":
            low, high = np.minimum(first, second), np.maximum(first, second)
            # Row-major index of (low, high) above the diagonal of an n x n table.
            columns = [low * self.objects - low * (low + 1) // 2 + high - low - 1]
        else:
            columns = [first, second]
        if self.queries:
            columns.append(self.swap_ids + queried)
        return np.stack(columns, axis=-1)


def _track(n: int, first: np.ndarray, second: np.ndarray, queried: np.ndarray) -> list[int]:
    """The object at position queried[t] after swap t."""
    # Python integers in a list are several times faster here than numpy scalars.
    objects, answers = list(range(n)), []
    for a, b, c in zip(first.tolist(), second.tolist(), queried.tolist(), strict=True):
        objects[a], objects[b] = objects[b], objects[a]
        answers.append(objects[c])
    return answers
