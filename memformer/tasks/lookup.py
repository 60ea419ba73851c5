"""Content-addressable lookup: pairs of a random key and a value, and one query."""

import dataclasses

import numpy as np

from memformer.core.checks import check_at_least, check_choice, check_number
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["Lookup"]


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """Recall the value that was stored with a key; scored at the last step.

    A step is a pair: its key, followed by its value as a one-hot vector. Keys are unit vectors in random directions,
    drawn anew for each example, so that none is known from training. The last step is the query: one of the keys with
    noise, and no value. Pairs are in random order, so that positions carry no information.

    Attributes:
      length: steps, that is, the pairs and the query.
      key_width: width of a key.
      values: number of values.
      noise: norm of the random vector added to the query.
      asked: "anywhere"; or "first", which always queries the first pair, so that its position is informative.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> e = Lookup(length=5).source("train", 0)[0]
      >>> e["inputs"].shape, int(e["loss_weights"].sum())
      ((5, 32), 1)
    """

    name = "lookup"

    length: int = 17
    key_width: int = 16
    values: int = 16
    noise: float = 0.1
    asked: str = "anywhere"

    def __post_init__(self):
        check_at_least("length", self.length, 2)
        check_at_least("key_width", self.key_width, 1)
        check_at_least("values", self.values, 2)
        check_choice("asked", self.asked, ("anywhere", "first"))
        check_number("noise", self.noise, at_least=0)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length: 8, 16, 32 and 64 pairs."""
        return (9, 17, 33, 65)

    @property
    def features(self) -> int:
        """Width of a key and a value."""
        return self.key_width + self.values

    @property
    def num_classes(self) -> int:
        """Number of values."""
        return self.values

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def asked_place(self, inputs: np.ndarray) -> int:
        """The step of the pair whose key is nearest to the query of an example.

        Example:
          >>> task = Lookup(length=5)
          >>> e = task.source("train", 0)[0]
          >>> place = task.asked_place(e["inputs"])
          >>> int(np.argmax(e["inputs"][place, 16:])) == int(e["targets"][-1])
          True
        """
        keys = inputs[:, : self.key_width]
        return int(np.argmax(keys[:-1] @ keys[-1]))

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        keys = _directions(rng, self.length - 1, self.key_width)
        values = rng.integers(self.values, size=self.length - 1)
        place = 0 if self.asked == "first" else int(rng.integers(self.length - 1))
        query = keys[place] + self.noise * _directions(rng, 1, self.key_width)[0]
        inputs = np.zeros((self.length, self.features), np.float32)
        inputs[:-1, : self.key_width], inputs[-1, : self.key_width] = keys, query
        inputs[np.arange(self.length - 1), self.key_width + values] = 1
        targets, weights = np.zeros(self.length), np.zeros(self.length)
        targets[-1], weights[-1] = values[place], 1
        return make_example(inputs, targets, weights)


def _directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Unit vectors in uniformly random directions."""
    drawn = rng.normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
