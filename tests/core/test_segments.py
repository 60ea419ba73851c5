"""Round trips of chunks, and segments against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core.segments import chunk_time, find_segments, pad_time, unchunk_time


def segments_by_loop(row):
    """The rule as a loop: 0 is padding; the index grows where the id differs from that of the last valid token."""
    index, current, out = 0, None, []
    for token in row:
        if token != 0:
            if current is not None and token != current:
                index += 1
            current = token
        out.append(index)
    return out


ROWS = {
    "one segment": [4, 4, 4, 4, 4, 4, 4],
    "all padding": [0, 0, 0, 0, 0, 0, 0],
    "padding first": [0, 0, 3, 3, 5, 5, 5],
    "padding last": [3, 3, 5, 5, 0, 0, 0],
    "padding between equal ids is no change": [2, 0, 2, 2, 0, 0, 2],
    "padding between different ids": [2, 0, 1, 1, 0, 0, 2],
    "an id comes back": [1, 2, 1, 2, 2, 1, 1],
    "negative ids": [-1, -1, 7, 0, 7, -1, 0],
    "last token alone": [1, 1, 1, 1, 1, 1, 2],
}


def test_segments_against_the_loop():
    ids = np.array(list(ROWS.values()), np.int32)
    segments = jax.jit(lambda ids: find_segments(ids, {"B": len(ROWS), "T": 7}))(ids)
    for name, index, valid, row in zip(ROWS, segments.index, segments.valid, ids, strict=True):
        assert index.tolist() == segments_by_loop(row), name
        assert valid.tolist() == (row != 0).tolist(), name
    assert segments.index.dtype == jnp.int32


def test_random_segments_against_the_loop():
    ids = np.random.default_rng(0).integers(0, 3, (200, 17)).astype(np.int32)
    segments = jax.jit(lambda ids: find_segments(ids, {"B": 200, "T": 17}))(jnp.asarray(ids))
    np.testing.assert_array_equal(segments.index, [segments_by_loop(row) for row in ids])


def test_one_token():
    segments = jax.jit(lambda ids: find_segments(ids, {"B": 2, "T": 1}))(np.array([[0], [3]], np.int32))
    assert segments.index.tolist() == [[0], [0]] and segments.valid.tolist() == [[False], [True]]


def test_nothing_packed():
    assert find_segments(None, {"B": 1, "T": 4}) is None


BAD_IDS = {
    "length": (np.ones((1, 5), np.int32), r"segment_ids must be \[B, T\] = \(1, 4\), got \(1, 5\)"),
    "rank": (np.ones((4,), np.int32), r"segment_ids must be \[B, T\] = \(1, 4\), got \(4,\)"),
    "dtype": (np.ones((1, 4), np.float32), "segment_ids must have an integer dtype, got float32"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_segment_ids(case):
    ids, message = BAD_IDS[case]
    with pytest.raises(ValueError, match=message):
        find_segments(ids, {"B": 1, "T": 4})


@pytest.mark.parametrize(("length", "size", "chunks"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (3, 1, 3)])
def test_round_trip_of_chunks(length, size, chunks):
    x = np.random.default_rng(1).normal(size=(2, length, 3)).astype(np.float32)

    @jax.jit
    def round_trip(x):
        parts = chunk_time(x, size)
        return parts, unchunk_time(parts, length)

    parts, back = map(np.asarray, round_trip(x))
    assert parts.shape == (chunks, 2, size, 3)
    padded = np.zeros((2, chunks * size, 3), np.float32)
    padded[:, :length] = x
    for n in range(chunks):
        np.testing.assert_array_equal(parts[n], padded[:, n * size : (n + 1) * size])
    np.testing.assert_array_equal(back, x)


def test_pad_time():
    x = jnp.ones((2, 6))
    assert pad_time(x, 3) is x
    np.testing.assert_array_equal(pad_time(x, 4), np.pad(np.ones((2, 6)), ((0, 0), (0, 2))))
    assert pad_time(x, 4, axis=0).shape == (4, 6)
