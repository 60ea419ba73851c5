"""Packing: documents one after another, cut into windows of fixed length."""

from collections.abc import Sequence

import numpy as np

from memformer.core.checks import check, check_at_least
from memformer.data.source import Example, FiniteSource

__all__ = ["PackedDocuments"]


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
        targets = self._tokens[first : first + self._window_length].astype(np.int32)
        used = len(targets)
        # Document starts, counted from the first step of the window.
        starts = self._starts[slice(*np.searchsorted(self._starts, [first, first + used]))] - first
        inputs = np.empty(used, np.int32)
        inputs[1:] = targets[:-1]
        inputs[0] = self._tokens[first - 1]
        inputs[starts] = self._start
        time = np.arange(used, dtype=np.int32)
        newest = np.zeros(used, np.int32)
        newest[starts] = starts
        newest = np.maximum.accumulate(newest)
        segments = 1 + np.searchsorted(starts[starts > 0], time, side="right")
        padding = (0, self._window_length - used)
        return {
            "inputs": np.pad(inputs, padding),
            "targets": np.pad(targets, padding),
            "loss_weights": np.pad(np.ones(used, np.float32), padding),
            "segment_ids": np.pad(segments.astype(np.int32), padding),
            "positions": np.pad(time - newest, padding),
        }
