"""Remember and rewrite: key-value pairs, one per segment, and queries for the value of a key.

Source: Rodkin et al. 2024, "Associative recurrent memory transformer" (arXiv 2407.04841) and its code
(RodkinIvan/associative-recurrent-memory-transformer). There `queries` is 1, training draws the number of pairs
anew for each batch, and the keys of remember grow from one symbol to three with the number of pairs.
"""

import dataclasses

import numpy as np

from memformer.core.checks import check, check_at_least
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["Remember", "Rewrite"]

# Marker ids, as in the paper's code: a pair, a query, the end of a segment.
PAIR, QUERY, END = 100, 101, 102


@dataclasses.dataclass(frozen=True)
class Remember(Task):
    """Recall the value of a key: segments `key 100 value 102` with distinct keys, then the query `key 101 value 102`.

    Only the answer is scored: its symbols are predicted from the query marker 101 and the symbols before each. With
    `queries` above 1, the further queries are at random positions after the first pair, which spreads the number of
    pairs before a query over 1 to `length`. Each queries any of the earlier keys.

    Attributes:
      length: number of pairs.
      key_size: symbols per key; length <= symbols^key_size.
      value_size: symbols per value.
      symbols: number of symbols of keys and values, with ids from 0.
      queries: number of queries; the last follows all pairs.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> Remember(length=2, key_size=1).source("train", 0)[0]["inputs"].reshape(3, 4)
      array([[  0, 100,   3, 102],
             [ 15, 100,   5, 102],
             [  0, 101,   3, 102]], dtype=int32)
    """

    name = "remember"
    scores = ("accuracy", "sequence_accuracy")

    length: int = 50
    key_size: int = 3
    value_size: int = 1
    symbols: int = 16
    queries: int = 1

    def __post_init__(self):
        for name, least in (("length", 1), ("key_size", 1), ("value_size", 1), ("symbols", 2), ("queries", 1)):
            check_at_least(name, getattr(self, name), least)
        check(self.symbols <= PAIR, "symbols", f"at most {PAIR}, the id of the first marker", self.symbols)
        limit = f"such that symbols ** key_size = {self.symbols} ** key_size is below 2^63"
        check(self.most < 2**63, "key_size", limit, self.key_size)
        self._check_keys()

    def _check_keys(self) -> None:
        check(self.length <= self.most, "length", f"at most symbols ** key_size = {self.most}", self.length)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length: from 2 to 500 pairs, as far as there are keys."""
        return tuple(n for n in (2, 5, 10, 20, 50, 100, 200, 500) if n <= self.most)

    @property
    def most(self) -> int:
        """Number of distinct keys."""
        return self.symbols**self.key_size

    @property
    def segment_length(self) -> int:
        """Tokens of a pair, and of a query with its answer."""
        return self.key_size + self.value_size + 2

    @property
    def vocab_size(self) -> int:
        """All ids up to the last marker; those between the symbols and the markers are unused."""
        return END + 1

    @property
    def num_classes(self) -> int:
        """Number of classes of a target."""
        return self.vocab_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing any symbol."""
        return 1 / self.symbols

    @property
    def steps(self) -> int:
        """T: a segment for each pair and each query."""
        return (self.length + self.queries) * self.segment_length

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw_keys(self, rng: np.random.Generator) -> np.ndarray:
        """The number of each pair's key."""
        return rng.choice(self.most, self.length, replace=False)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        keys = self._draw_keys(rng)
        values = rng.integers(self.symbols, size=(self.length, self.value_size))
        # The pair of each segment, and the segments that query it.
        pairs, is_query = self._arrange(rng, keys.tolist())
        digits = keys[pairs, None] // self.symbols ** np.arange(self.key_size) % self.symbols
        markers, ends = np.where(is_query, QUERY, PAIR)[:, None], np.full((len(pairs), 1), END)
        inputs = np.concatenate([digits, markers, values[pairs], ends], axis=1)
        scored = np.zeros(inputs.shape, bool)
        scored[is_query, self.key_size : -2] = True
        targets = np.where(scored, np.roll(inputs, -1, axis=1), 0)
        return make_example(inputs.reshape(-1), targets.reshape(-1), scored.reshape(-1))

    def _arrange(self, rng: np.random.Generator, keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The pair of each segment, in order, and whether the segment is a query."""
        # The number of pairs before each query.
        before = np.sort(np.append(rng.integers(1, self.length + 1, size=self.queries - 1), self.length))
        counts = np.bincount(before, minlength=self.length + 1)[1:].tolist()
        pairs, is_query = [], []
        latest: dict[int, int] = {}
        for pair, key in enumerate(keys):
            latest[key] = pair
            seen = list(latest.values())
            queried = [seen[i] for i in rng.integers(len(seen), size=counts[pair])]
            pairs += [pair, *queried]
            is_query += [False, *[True] * len(queried)]
        return np.array(pairs), np.array(is_query)


@dataclasses.dataclass(frozen=True)
class Rewrite(Remember):
    """Recall the latest value of a key: like `Remember`, with keys drawn with replacement from symbols^key_size.

    Attributes:
      length: number of pairs.
      key_size: symbols per key.
      value_size: symbols per value.
      symbols: number of symbols of keys and values, with ids from 0.
      queries: number of queries; the last follows all pairs.

    Example:
      >>> Rewrite(length=500).segment_length
      4
    """

    name = "rewrite"

    key_size: int = 1

    def _check_keys(self) -> None:
        pass

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length: from 2 to 500 pairs."""
        return (2, 5, 10, 20, 50, 100, 200, 500)

    def _draw_keys(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(self.most, size=self.length)
