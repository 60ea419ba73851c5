"""Reachability: the nodes of a graph that are connected to the first one.

Source: DeltaFormer (NeurIPS 2025), listing G.2. One DeltaFormer layer is highly accurate, several
Transformer layers are not.
"""

import dataclasses

import numpy as np

from memformer.core.checks import check, check_at_least
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["Reachability"]


@dataclasses.dataclass(frozen=True)
class Reachability(Task):
    """Label each node with 1 if it is in the tree of node 1, else with 0; every node is scored.

    The nodes are split at random into two halves of equal size. In each half, every node but the first has a uniformly
    drawn earlier node as its parent. Token i is a row of floats: columns 0...length-1 are row i of the symmetric
    adjacency matrix with a unit diagonal, column `length` is 1 for node 1 and 0 for others, and the rest is 0. Parents
    precede their children, so that a label depends only on tokens up to its own.

    Attributes:
      length: number of nodes, even and at least 4.
      width: features per token, at least length + 1.

    Raises:
      ValueError: an option out of range.

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
        check(self.length % 2 == 0, "length", "even (two halves of the nodes)", self.length)
        check_at_least("width", self.width, 1)
        check(self.width > self.length, "width", f"at least length + 1 = {self.length + 1}", self.width)

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths of an evaluation by length."""
        return tuple(n for n in (8, 16, 32, 64, 96) if n < self.width)

    @property
    def features(self) -> int:
        """Features per token."""
        return self.width

    @property
    def num_classes(self) -> int:
        """Connected to node 1, or not."""
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
            # Child c of a half, counted from 1, has c candidates.
            parents = nodes[rng.integers(np.arange(1, len(nodes)))]
            rows[children, parents] = 1
            rows[parents, children] = 1
        return make_example(rows, half == half[0], np.ones(n))
