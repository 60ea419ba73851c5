"""Masks of attention and the bounds of their tiles, against loops over queries and slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core.mask import column_bounds, first_tiles, join_cache, last_tiles, make_mask, row_bounds
from memformer.core.segments import find_segments

IDS = np.array([[1, 1, 0, 2, 2, 2, 0], [0, 3, 3, 3, 3, 4, 4]], np.int32)
VALID = np.array([[True, False, True, True, True], [False, True, True, True, False]])
DIMS = {"B": 2, "T": 7}


def make(cache, packed, ranks=True):
    segments = find_segments(jnp.asarray(IDS), dict(DIMS)) if packed else None
    return make_mask(jnp.asarray(VALID) if cache else None, segments, DIMS, ranks=ranks)


def visible(cache, packed, window):
    """[B, T, S + T] by a loop: same segment, not later, at most `window` valid tokens back."""
    slots = 5 if cache else 0
    seen = np.zeros((2, 7, slots + 7), bool)
    for b in range(2):
        ids = [1] * slots + (list(IDS[b]) if packed else [1] * 7)
        if packed and cache:
            # The cache belongs to the first segment of the call.
            ids[:slots] = [next(i for i in IDS[b] if i)] * slots
        valid = ([*VALID[b]] if cache else []) + [i != 0 for i in ids[slots:]]
        rank = np.cumsum(valid)
        for t in range(7):
            for s in range(slots + t + 1):
                same = ids[slots + t] == ids[s] and valid[slots + t] and valid[s]
                seen[b, t, s] = same and (window is None or rank[slots + t] - rank[s] < window)
    return seen


def from_mask(cache, packed, window, size):
    """The same from the mask over whole tiles, padding dropped."""
    mask = jax.jit(lambda: join_cache(make(cache, packed), size))()
    slots = 5 if cache else 0
    padded = -(-slots // size) * size
    seen = np.arange(padded + 8)[None, None] <= padded + np.arange(8)[None, :, None]
    if mask.query_segment is not None:
        seen = seen & (
            np.asarray(mask.query_segment)[:, :8, None] == np.asarray(mask.key_segment)[:, None, : padded + 8]
        )
    if window is not None:
        distance = np.asarray(mask.query_rank)[:, :8, None] - np.asarray(mask.key_rank)[:, None, : padded + 8]
        seen = seen & (distance < window)
    seen = np.broadcast_to(seen, (2, 8, padded + 8))
    return mask, np.concatenate([seen[:, :7, :slots], seen[:, :7, padded : padded + 7]], axis=-1)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_mask_against_a_loop(cache, packed, window):
    mask, seen = from_mask(cache, packed, window, 4)
    assert np.array_equal(seen, visible(cache, packed, window))
    assert mask.cache_segment is None and mask.cache_rank is None
    assert jax.eval_shape(lambda: make(cache, packed, ranks=False)).query_rank is None


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_bounds_hold_every_visible_tile(cache, window):
    """No tile outside the bounds is visible; tiles of an earlier segment alone are outside."""
    mask, _ = from_mask(cache, True, window, 2)
    find = jax.jit(lambda mask: (first_tiles(mask, 2, 2, window), last_tiles(mask, 2, 2, window)))
    first, last = map(np.asarray, find(mask))
    query, key = (np.asarray(x) for x in (mask.query_segment, mask.key_segment))
    before = key.shape[1] - query.shape[1]
    seen = query[:, :, None] == key[:, None]
    if window is not None:
        seen &= np.asarray(mask.query_rank)[:, :, None] - np.asarray(mask.key_rank)[:, None] < window
    seen &= np.arange(key.shape[1])[None, None] <= before + np.arange(query.shape[1])[None, :, None]
    for b, t, s in np.argwhere(seen):
        assert first[b, t // 2] <= s // 2 and t // 2 < last[b, s // 2]
    # The fourth token of the first row starts a segment: its tile holds an earlier token, the next one does not.
    assert first[0, 2] >= before // 2 + 1
    assert first.shape == (2, query.shape[1] // 2) and last.shape == (2, key.shape[1] // 2)


@pytest.mark.parametrize("window", [None, 2])
def test_bounds_without_causality(window):
    """The same where queries see later tokens, in both directions: tiles of later segments alone are outside."""
    mask, _ = from_mask(False, True, window, 2)
    find = jax.jit(lambda mask: [bounds(mask, 2, 2, window, causal=False) for bounds in (row_bounds, column_bounds)])
    (first, stop), (first_row, stop_row) = jax.tree.map(np.asarray, find(mask))
    query, key, query_rank, key_rank = (
        np.asarray(getattr(mask, name)) for name in ("query_segment", "key_segment", "query_rank", "key_rank")
    )
    seen = query[:, :, None] == key[:, None]
    if window is not None:
        seen &= np.abs(query_rank[:, :, None] - key_rank[:, None]) < window
    assert seen.any()
    for b, t, s in np.argwhere(seen):
        assert first[b, t // 2] <= s // 2 < stop[b, t // 2]
        assert first_row[b, s // 2] <= t // 2 < stop_row[b, s // 2]
    # Two tokens of the first row are its first segment: their tile sees no other. Its last tile is padding.
    assert (first[0, 0], stop[0, 0], stop_row[0, 0]) == (0, 1, 1)
    assert stop[0, 3] == 0 and stop_row[0, 3] == 0


def test_nothing_to_mask():
    mask = make(False, False, ranks=False)
    assert all(x is None for x in mask)
    assert all(x is None for x in join_cache(mask, 4))
    assert first_tiles(mask, 4, 4) is None and last_tiles(mask, 4, 4) is None
    assert row_bounds(mask, 4, 4, causal=False) is None and column_bounds(mask, 4, 4, causal=False) is None
