"""Packing: documents one after another, cut into windows of fixed length."""

from collections.abc import Sequence

import numpy as np

from memformer.core.checks import check, check_at_least
from memformer.data.source import Example, FiniteSource

__all__ = ["PackedDocuments", "make_window"]


class PackedDocuments(FiniteSource):
    """Windows over documents of token ids.

    A document of n tokens takes n time steps: inputs are the start id and all tokens but the last, targets are the
    tokens, so that each token is scored exactly once. The documents are concatenated and cut into windows of `length`
    steps. A new document starts a new segment, positions count from 0 in each segment, and the last window is padded.

    Args:
      tokens: ids of all documents, concatenated.
      sizes: number of tokens per document, all positive.
      length: time steps per window.
      start: id before the first token of a document.

    Raises:
      ValueError: a length below 1, or sizes that do not add up to the tokens.

    Example:
      >>> windows = PackedDocuments(np.array([5, 6, 7]), [2, 1], length=4, start=9)
      >>> windows[0]["inputs"], windows[0]["segment_ids"]
      (array([9, 5, 9, 0], dtype=int32), array([1, 1, 2, 0], dtype=int32))
    """

    def __init__(self, tokens: np.ndarray, sizes: Sequence[int], length: int, start: int):
        length = check_at_least("length", length, 1)
        super().__init__(self._window, -(-len(tokens) // length))
        counts = np.array(sizes, np.int64)
        check(
            bool(np.all(counts > 0)) and counts.sum() == len(tokens), "sizes", f"positive, {len(tokens)} in all", sizes
        )
        self._tokens = tokens
        self._starts = np.cumsum(counts) - counts
        self._window_length = length
        self._start = start

    def _window(self, index: int) -> Example:
        first = index * self._window_length
        targets = self._tokens[first : first + self._window_length]
        # Document starts, counted from the first step of the window.
        starts = self._starts[slice(*np.searchsorted(self._starts, [first, first + len(targets)]))] - first
        return make_window(targets, starts, int(self._tokens[first - 1]), self._window_length, self._start)


def make_window(
    targets: np.ndarray, starts: np.ndarray, previous: int, length: int, start: int, unscored: np.ndarray | None = None
) -> Example:
    """Makes an example of consecutive tokens: each document in it is a segment, in which positions count from 0.

    Args:
      targets: tokens [steps], steps <= length; the rest of the window is padding.
      starts: steps at which a document begins, ascending.
      previous: the token before the first one, which is its input if no document begins there.
      length: steps of the window.
      start: the input at which a document begins.
      unscored: True for tokens that are read and not scored [steps]; None scores all.

    Example:
      >>> window = make_window(np.array([5, 6, 7]), np.array([2]), 4, length=4, start=9)
      >>> window["inputs"], window["segment_ids"], window["positions"]
      (array([4, 5, 9, 0], dtype=int32), array([1, 1, 2, 0], dtype=int32), array([0, 1, 0, 0], dtype=int32))
    """
    used = len(targets)
    example: Example = {
        "inputs": np.zeros(length, np.int32),
        "targets": np.zeros(length, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
    inputs = example["inputs"][:used]
    inputs[1:] = targets[:-1]
    inputs[:1] = previous
    inputs[starts] = start
    example["targets"][:used] = targets
    example["loss_weights"][:used] = 1 if unscored is None else ~unscored
    # the segment that begins at a step, and how far the steps before it count
    segments, positions = example["segment_ids"][:used], example["positions"][:used]
    segments[:1] = 1
    segments[starts[starts > 0]] = 1
    np.cumsum(segments, out=segments)
    begins = np.zeros(used, np.int32)
    begins[starts] = starts
    np.subtract(np.arange(used, dtype=np.int32), np.maximum.accumulate(begins), out=positions)
    return example
