"""Content-addressable lookup: pairs of a random key and a value stand in random order; a key is asked for."""

import dataclasses

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, check_choice, example

__all__ = ["Lookup"]


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """Which value was stored with this key? Asked, and scored, at the last step.

    A step is a pair: its key and, beside it, its value (one number of a row is 1). Keys are drawn anew for each
    example, of length 1 in a random direction, so that none is known from training; the last step has one of them
    again, with noise, and no value. Where a pair stands tells nothing: the order is random.

    Attributes:
      length: steps, the pairs and the question.
      key_width: numbers a key.
      values: kinds of value.
      noise: the question is off by a random vector of this length.
      asked: "anywhere", or "first": always the pair at the first step, so that there a place does tell.

    Raises:
      ValueError: a setting out of range, named.

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
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < np.inf:
            raise ValueError(f"noise must be a number of at least 0, got {self.noise!r}")

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """8, 16, 32 and 64 pairs."""
        return (9, 17, 33, 65)

    @property
    def features(self) -> int:
        """A key and a value."""
        return self.key_width + self.values

    @property
    def num_classes(self) -> int:
        """Kinds of value."""
        return self.values

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def asked_place(self, inputs: np.ndarray) -> int:
        """The step of the pair whose key is nearest to the question of an example.

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
        question = keys[place] + self.noise * _directions(rng, 1, self.key_width)[0]
        inputs = np.zeros((self.length, self.features), np.float32)
        inputs[:-1, : self.key_width], inputs[-1, : self.key_width] = keys, question
        inputs[np.arange(self.length - 1), self.key_width + values] = 1
        targets, weights = np.zeros(self.length), np.zeros(self.length)
        targets[-1], weights[-1] = values[place], 1
        return example(inputs, targets, weights)


def _directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Vectors of length 1, uniform over directions."""
    drawn = rng.normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
