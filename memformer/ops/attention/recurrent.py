"""Reading a cache by a similarity kernel: row by row, and by tiles."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype, masked_softmax
from memformer.core.similarity import Kernel, similarity
from memformer.core.types import Array, Bool, Float, Int
from memformer.ops.attention import tiled as tiles
from memformer.ops.attention.cache import Cache, KVCache, Timeline, offset, place

__all__ = ["Reading", "choose_tiling", "lay_slots", "read_row", "read_rows", "read_tiles", "row_mask"]

# Side of a tile where the caller names none.
CHUNK = 256


class Reading(NamedTuple):
    """How to read; static.

    Attributes:
      kernel: the similarity kernel.
      scale: factor on inner products.
      causal: whether a query sees only slots up to its own.
      window: how many tokens back it sees, itself included, or None.
      chunk_size: side of a tile, or None.
      precision: of products.
    """

    kernel: Kernel
    scale: float
    causal: bool
    window: int | None
    chunk_size: int | None
    precision: lax.Precision


class Slots(NamedTuple):
    """The slots of a cache with a call's tokens in it.

    Attributes:
      start: slot of the call's first token.
      segment: segment numbers, or None.
      rank: ranks, or None.
    """

    start: Int[Array, ""]
    segment: Int[Array, "B S"] | None
    rank: Int[Array, "B S"] | None


def lay_slots(timeline: Timeline, cache: Cache | None, tokens: int) -> Slots:
    """Places the numbers of a call's tokens behind those of the slots held before."""
    segment = timeline.key_segment
    if segment is not None:
        segment = place(cache, timeline.held_segment, segment)
    rank = timeline.token_rank
    if rank is not None:
        rank = place(cache, timeline.held_rank, rank)
    return Slots(offset(cache, tokens), segment, rank)


def row_mask(reading: Reading, timeline: Timeline, slots: Slots, count: int, t: Array) -> Bool[Array, "b S"]:
    """Which of `count` slots query t sees; its own slot counts among them."""
    mask = jnp.ones((1, count), bool)
    if reading.causal:
        mask = jnp.arange(count, dtype=jnp.int32)[None] <= slots.start + t
    if slots.segment is not None:
        mask &= slots.segment == _token(timeline.query_segment, t)
    if reading.window is not None:
        distance = _token(timeline.token_rank, t) - slots.rank
        mask &= (distance if reading.causal else jnp.abs(distance)) < reading.window
    return mask


def _token(x: Array, t: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, t, 1, axis=1)


def read_row(
    reading: Reading, mask: Array, q: Float[Array, "B H K"], k: Float[Array, "B S G K"], x: Float[Array, "B S G V"]
) -> Float[Array, "B H V"]:
    """One token's read, in the accumulation dtype."""
    dtype = accumulation_dtype(q, k, x)
    q, k, x = (a.astype(dtype) for a in (q, k, x))
    groups = k.shape[2]
    q = q.reshape(q.shape[0], groups, -1, q.shape[2])
    scores = jnp.einsum("bgrk,bsgk->bgrs", q, k, precision=reading.precision) * reading.scale
    mask = mask[:, None, None]
    if reading.kernel.normalized:
        weights = masked_softmax(scores, jnp.broadcast_to(mask, scores.shape))
    else:
        zero = jnp.zeros((), dtype)
        # Hidden scores are cleared before the kernel too: an infinite exponential there would spoil gradients.
        weights = jnp.where(mask, similarity(reading.kernel, jnp.where(mask, scores, zero)), zero)
    output = jnp.einsum("bgrs,bsgv->bgrv", weights, x, precision=reading.precision)
    return output.reshape(output.shape[0], -1, output.shape[3])


def read_rows(
    reading: Reading, timeline: Timeline, cache: KVCache | None, q: Array, k: Array, v: Array
) -> Float[Array, "B T H V"]:
    """The recurrent form: one query at a time."""
    held = (None, None) if cache is None else (cache.k, cache.v)
    k, v = place(cache, held[0], k), place(cache, held[1], v)
    slots = lay_slots(timeline, cache, q.shape[1])

    def step(_, inputs):
        t, q = inputs
        return None, read_row(reading, row_mask(reading, timeline, slots, k.shape[1], t), q, k, v)

    tokens = jnp.arange(q.shape[1], dtype=jnp.int32)
    _, output = lax.scan(step, None, (tokens, jnp.moveaxis(q, 1, 0)))
    return jnp.moveaxis(output, 0, 1)


def choose_tiling(reading: Reading, cache: Cache | None, tokens: int, default: int) -> tuple[tiles.Tiling, Array]:
    """The tiles of a call, and how many chunks of the state are in use."""
    held = 0 if cache is None else cache.k.shape[1]
    size = min(reading.chunk_size or default, held + tokens)
    before = -(-held // size)
    used = jnp.int32(before)
    if cache is not None and cache.fixed:
        used = jnp.minimum((offset(cache, tokens) + (size - 1)) // size, used)
    return tiles.Tiling(
        reading.kernel, reading.scale, size, before, reading.causal, reading.window, reading.precision
    ), used


def read_tiles(
    reading: Reading, timeline: Timeline, cache: KVCache | None, q: Array, k: Array, v: Array
) -> Float[Array, "B T H V"]:
    """The chunked form: tiles of scores, memory linear in time."""
    tokens, groups = k.shape[1:3]
    tiling, used = choose_tiling(reading, cache, tokens, CHUNK)
    marks = tiles.make_marks(tiling, with_edges(reading, timeline, q), used)
    held: tuple[Array | None, Array | None] = (None, None)
    if cache is not None:
        held = (cache.k, cache.v)
        k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    k, v = tiles.join_keys(held[0], k, tiling.size), tiles.join_keys(held[1], v, tiling.size)
    q, k, v = tiles.align(marks, tiles.lay_queries(q, groups, tiling.size), k, v)
    return tiles.unlay_queries(tiles.attend(tiling, marks, q, k, v), tokens)


def with_edges(reading: Reading, timeline: Timeline, q: Array) -> Timeline:
    """Without causality nothing else hides the padding of the last chunk: number the tokens."""
    if reading.causal or timeline.key_segment is not None:
        return timeline
    zeros = jnp.zeros(q.shape[:2], jnp.int32)
    return timeline._replace(key_segment=zeros, query_segment=zeros)
