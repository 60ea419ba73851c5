"""Draws for whole batches, from the words of a counter-based generator, equal to those of `numpy.random.Generator`.

A Generator draws one example at a time, and its calls cost more than their arithmetic. These functions take the random
words of all rows of a batch at once. They follow NumPy's algorithms word for word, rejections excepted: a row in which
NumPy would have rejected a word is reported, and must be drawn with a Generator. Source: Lemire 2019, "Fast random
integer generation in an interval"; Floyd's algorithm for samples (Bentley and Floyd 1987).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt32, UInt64

__all__ = ["bounded_integers", "sample_integers", "split_words64", "unit_floats"]


def split_words64(words: UInt64[np.ndarray, "B n"]) -> UInt32[np.ndarray, "B 2n"]:
    """The low and the high half of each word, in the order in which a Generator uses them for 32-bit draws.

    Example:
      >>> split_words64(np.array([[2**32 + 5]], np.uint64)).tolist()
      [[5, 1]]
    """
    return np.ascontiguousarray(words, "<u8").view("<u4")


def bounded_integers(
    words: UInt32[np.ndarray, "B n"], bounds: int | Sequence[int] | np.ndarray
) -> tuple[Int64[np.ndarray, "B n"], Bool[np.ndarray, " B"]]:
    """Integers in [0, bound) as `Generator.integers` draws them, one word each, and the rows with a rejected word.

    Args:
      words: random 32-bit words.
      bounds: one bound of at least 2 (a Generator uses no word for a bound of 1), or one per column.

    Example:
      >>> words = split_words64(np.random.Philox(key=7).random_raw(2)[None])
      >>> values, rejected = bounded_integers(words, 10)
      >>> values[0].tolist() == np.random.Generator(np.random.Philox(key=7)).integers(10, size=4).tolist()
      True
    """
    bound = np.asarray(bounds, np.uint64)
    product = words.astype(np.uint64) * bound
    threshold = (np.uint64(2**32) - bound) % bound
    rejected = np.any((product & np.uint64(0xFFFFFFFF)) < threshold, axis=1)
    return (product >> np.uint64(32)).astype(np.int64), rejected


def sample_integers(
    words: UInt32[np.ndarray, "B n"], population: int, size: int
) -> tuple[Int64[np.ndarray, "B size"], Bool[np.ndarray, " B"]]:
    """Distinct integers below `population`, as `Generator.choice(population, size, replace=False)` draws them.

    Args:
      words: 2 size - 1 random 32-bit words per row.
      population: above `size`; up to 10,000, or so large that size <= population // 50 (else a Generator uses another
        algorithm).
      size: numbers per row.

    Returns:
      The integers, and the rows with a rejected word.
    """
    ends = np.arange(population - size, population)
    # then the words of the shuffle
    drawn, rejected = bounded_integers(words, np.concatenate([ends + 1, np.arange(size, 1, -1)]))
    result = np.empty((len(words), size), np.int64)
    for i, end in enumerate(ends):
        seen = np.any(result[:, :i] == drawn[:, i : i + 1], axis=1)
        result[:, i] = np.where(seen, end, drawn[:, i])
    rows = np.arange(len(words))
    for last, place in zip(range(size - 1, 0, -1), drawn[:, size:].T, strict=True):
        result[rows, place], result[:, last] = result[:, last].copy(), result[rows, place]
    return result, rejected


def unit_floats(words: UInt64[np.ndarray, "B n"]) -> Float64[np.ndarray, "B n"]:
    """Floats in [0, 1), as `Generator.random` draws them.

    Example:
      >>> raw = np.random.Philox(key=7).random_raw(3)
      >>> (unit_floats(raw) == np.random.Generator(np.random.Philox(key=7)).random(3)).all().item()
      True
    """
    return (words >> np.uint64(11)) * 2.0**-53
