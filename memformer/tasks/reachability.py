"""Reachability: which nodes of a graph are connected with the first one?

Source: DeltaFormer (NeurIPS 2025), listing G.2. One DeltaFormer layer is highly accurate, several
Transformer layers are not.
"""

import dataclasses

import numpy as np

from memformer.data.source import Example, SyntheticSource, Task, check_at_least, example

__all__ = ["Reachability"]


@dataclasses.dataclass(frozen=True)
class Reachability(Task):
    """Label of node i: 1 where it is in the same tree as node 1, else 0; every node is scored.

    The nodes fall at random into two halves of equal size; in each, every node but its first takes
    a uniformly drawn earlier node of the half as its parent. Token i is a float row: columns
    0...length-1 hold row i of the symmetric adjacency matrix with 1 on the diagonal, column `length`
    is 1 for node 1 and 0 for others, the rest is 0. A label depends on tokens up to its own only,
    for a node's parent comes before it.

    Attributes:
      length: number of nodes, even and at least 4.
      width: features of a token, at least length + 1.

    Raises:
      ValueError: a setting out of range, named.

    Example:
      >>> Reachability().source("train", 0)[0]["inputs"].shape
      (32, 128)
    """

    name = "reachability"
    scores = ("accuracy", "sequence_accuracy")

    length: int = 32
    width: int = 128

    def __post_init__(self):
        check_at_least("length", self.length, 4)
        if self.length % 2:
            raise ValueError(f"length must be even (two halves of the nodes), got {self.length}")
        check_at_least("width", self.width, 1)
        if self.width <= self.length:
            raise ValueError(f"width must be at least length + 1 = {self.length + 1}, got {self.width}")

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return tuple(n for n in (8, 16, 32, 64, 96) if n < self.width)

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.width

    @property
    def num_classes(self) -> int:
        """Connected with node 1, or not."""
        return 2

    def source(self, split: str, seed: int) -> SyntheticSource:
        """Examples of one split, by number."""
        return SyntheticSource(self._draw, split, seed)

    def _draw(self, rng: np.random.Generator, index: int) -> Example:
        n = self.length
        half = rng.permutation(n) < n // 2
        rows = np.zeros((n, self.width), np.float32)
        rows[np.arange(n), np.arange(n)] = 1
        rows[0, n] = 1
        for nodes in (np.flatnonzero(half), np.flatnonzero(~half)):
            children = nodes[1:]
            # Child number c of a half (from 1) has c earlier nodes to choose from.
            parents = nodes[rng.integers(np.arange(1, len(nodes)))]
            rows[children, parents] = 1
            rows[parents, children] = 1
        return example(rows, half == half[0], np.ones(n))
