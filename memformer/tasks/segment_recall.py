"""Remember and rewrite: key-value pairs one segment each, and questions for the value of a key.

Source: Rodkin et al. 2024, "Associative recurrent memory transformer" (arXiv 2407.04841) and its code
(RodkinIvan/associative-recurrent-memory-transformer). There `queries` is 1, training draws the number of pairs anew
for each batch, and keys of remember grow from one symbol to three with the number of pairs.
"""

import dataclasses

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, example

__all__ = ["Remember", "Rewrite"]

# Tokens beside the symbols, as in the paper's code: a pair, a question, the end of a segment.
PAIR, QUESTION, END = 100, 101, 102


@dataclasses.dataclass(frozen=True)
class Remember(Task):
    """Segments `key 100 value 102`, one a pair with a key of its own; at the end `key 101 value 102`, a question.

    Only the answer is scored: its symbols are predicted from the question mark 101 and the symbols before each. With
    `queries` above 1 the further questions stand at random places behind the first pair: the number of pairs before
    a question is then spread over 1 to `length`. Each asks for any of the keys seen so far.

    Attributes:
      length: pairs.
      key_size: symbols of a key; length <= symbols^key_size.
      value_size: symbols of a value.
      symbols: of keys and values, ids from 0.
      queries: questions, the last of them behind all pairs.

    Raises:
      ValueError: a setting out of range, named.

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
        if self.symbols > PAIR:
            raise ValueError(f"symbols must be at most {PAIR}, the first id that is none, got {self.symbols}")
        self._check_keys()

    def _check_keys(self) -> None:
        if self.length > self.symbols**self.key_size:
            raise ValueError(
                f"length must be at most symbols ** key_size = {self.symbols**self.key_size}, for as many different "
                f"keys, got {self.length}"
            )

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Numbers of pairs from 2 to 500 for which there are keys."""
        return tuple(n for n in (2, 5, 10, 20, 50, 100, 200, 500) if n <= self.most)

    @property
    def most(self) -> int:
        """The most pairs that a sequence can have."""
        return self.symbols**self.key_size

    @property
    def segment_length(self) -> int:
        """Tokens of a pair, and of a question with its answer."""
        return self.key_size + self.value_size + 2

    @property
    def vocab_size(self) -> int:
        """Symbols, the ids between them and the marks, and the three marks."""
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
        """T: a segment for each pair and each question."""
        return (self.length + self.queries) * self.segment_length

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw_keys(self, rng: np.random.Generator) -> np.ndarray:
        """A number for the key of each pair."""
        return rng.choice(self.most, self.length, replace=False)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        keys = self._draw_keys(rng)
        values = rng.integers(self.symbols, size=(self.length, self.value_size))
        # The pair that each segment shows, and which segments ask for it.
        pairs, asks = self._arrange(rng, keys.tolist())
        digits = keys[pairs, None] // self.symbols ** np.arange(self.key_size) % self.symbols
        marks, ends = np.where(asks, QUESTION, PAIR)[:, None], np.full((len(pairs), 1), END)
        inputs = np.concatenate([digits, marks, values[pairs], ends], axis=1)
        scored = np.zeros(inputs.shape, bool)
        scored[asks, self.key_size : -2] = True
        targets = np.where(scored, np.roll(inputs, -1, axis=1), 0)
        return example(inputs.reshape(-1), targets.reshape(-1), scored.reshape(-1))

    def _arrange(self, rng: np.random.Generator, keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The pair of each segment, in order of time, and whether the segment is a question."""
        # How many pairs stand before each question.
        before = np.sort(np.append(rng.integers(1, self.length + 1, size=self.queries - 1), self.length))
        counts = np.bincount(before, minlength=self.length + 1)[1:].tolist()
        pairs, asks = [], []
        latest: dict[int, int] = {}
        for pair, key in enumerate(keys):
            latest[key] = pair
            seen = list(latest.values())
            asked = [seen[i] for i in rng.integers(len(seen), size=counts[pair])]
            pairs += [pair, *asked]
            asks += [False, *[True] * len(asked)]
        return np.array(pairs), np.array(asks)


@dataclasses.dataclass(frozen=True)
class Rewrite(Remember):
    """Remember with keys that come again: each pair's key is any of symbols^key_size, and its latest value counts.

    The question is for any of the keys seen.

    Attributes:
      length: pairs.
      key_size: symbols of a key.
      value_size: symbols of a value.
      symbols: of keys and values, ids from 0.
      queries: questions, the last of them behind all pairs.

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
        """Numbers of pairs from 2 to 500."""
        return (2, 5, 10, 20, 50, 100, 200, 500)

    def _draw_keys(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(self.most, size=self.length)
