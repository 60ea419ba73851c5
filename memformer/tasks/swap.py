"""State tracking by swaps: n objects change places, and the label says where they are now.

Source: DeltaFormer (NeurIPS 2025), listing G.1. Object j starts at position j; every step swaps the
objects at two positions, drawn uniformly among the C(n, 2) pairs.
"""

import dataclasses

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, check_choice, example

__all__ = ["Swap"]

STARTS = ("objects", "token", "none")
ENCODINGS = ("pair", "positions")


@dataclasses.dataclass(frozen=True)
class Swap(Task):
    """After each swap, which object is at position 0 (or at the position asked for)?

    Time steps of an example: first the start tokens, then for each of the `length` swaps one pair
    token (or two position tokens), then, with `queries`, one query token. The label stands at the
    last token of a swap, or at its query; nothing else is scored.

    Attributes:
      length: number of swaps.
      objects: n, from 3 to 512.
      start: "objects" (one token an object, so that the start state can be written), "token" (a
        single one) or "none" (the paper's form).
      queries: False asks for position 0 after every swap; True adds a query token with a uniform
        position.
      encoding: "pair" is one token a swap (vocabulary C(n, 2)), "positions" two tokens (vocabulary
        n, in either order), for large n.

    Input ids: pairs or positions first, then the n query tokens if any, then the start tokens.
    Chance: the best constant answer is the object that started there: 1/n + (1 - 1/n) times the
    mean of ((n-3)/(n-1))^t over t = 1...length; for n = 5, 25.0% at 16 and 20.3% at 256.

    Raises:
      ValueError: a setting out of range, named.

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
        if self.objects > 512:
            raise ValueError(f"objects must be at most 512, got {self.objects}")
        check_choice("start", self.start, STARTS)
        check_choice("encoding", self.encoding, ENCODINGS)
        if not isinstance(self.queries, bool):
            raise ValueError(f"queries must be True or False, got {self.queries!r}")

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return (16, 32, 64, 128, 256, 512, 1024)

    @property
    def num_classes(self) -> int:
        """Objects: each is a class."""
        return self.objects

    @property
    def start_tokens(self) -> int:
        """Number of tokens before the first swap."""
        return {"objects": self.objects, "token": 1, "none": 0}[self.start]

    @property
    def swap_ids(self) -> int:
        """Number of ids that spell swaps; they come first in the vocabulary."""
        return self.objects * (self.objects - 1) // 2 if self.encoding == "pair" else self.objects

    @property
    def vocab_size(self) -> int:
        """Swap ids, query ids and start ids."""
        return self.swap_ids + self.objects * self.queries + self.start_tokens

    @property
    def tokens_a_swap(self) -> int:
        """Tokens of one swap, its query included."""
        return (1 if self.encoding == "pair" else 2) + self.queries

    @property
    def steps(self) -> int:
        """Start tokens, swaps and queries."""
        return self.start_tokens + self.length * self.tokens_a_swap

    @property
    def chance(self) -> float:
        """Accuracy of naming the object that started at the position asked for."""
        n, t = self.objects, np.arange(1, self.length + 1)
        stays = 1 / n + (1 - 1 / n) * ((n - 3) / (n - 1)) ** t
        return float(stays.mean())

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        n = self.objects
        first = rng.integers(n, size=self.length)
        second = (first + 1 + rng.integers(n - 1, size=self.length)) % n
        asked = rng.integers(n, size=self.length) if self.queries else np.zeros(self.length, np.int64)
        tokens = self._spell(first, second, asked)
        targets = np.zeros_like(tokens)
        targets[:, -1] = _track(n, first, second, asked)
        weights = np.zeros(tokens.shape)
        weights[:, -1] = 1
        start = np.arange(self.vocab_size - self.start_tokens, self.vocab_size)
        nothing = np.zeros(self.start_tokens)
        return example(
            np.concatenate([start, tokens.ravel()]),
            np.concatenate([nothing, targets.ravel()]),
            np.concatenate([nothing, weights.ravel()]),
        )

    def _spell(self, first: np.ndarray, second: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Token ids [length, tokens_a_swap]."""
        if self.encoding == "pair":
            low, high = np.minimum(first, second), np.maximum(first, second)
            # Row-major number of (low, high) above the diagonal of an n x n table.
            columns = [low * self.objects - low * (low + 1) // 2 + high - low - 1]
        else:
            columns = [first, second]
        if self.queries:
            columns.append(self.swap_ids + asked)
        return np.stack(columns, axis=1)


def _track(n: int, first: np.ndarray, second: np.ndarray, asked: np.ndarray) -> list[int]:
    """The object at position asked[t] after swap t."""
    # Plain integers in a list: several times faster here than numpy scalars.
    objects, answers = list(range(n)), []
    for a, b, c in zip(first.tolist(), second.tolist(), asked.tolist(), strict=True):
        objects[a], objects[b] = objects[b], objects[a]
        answers.append(objects[c])
    return answers
