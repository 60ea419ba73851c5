"""Tiles of scores between chunks of queries and chunks of keys, shared by the read and by DeltaFormer's write.

A score lives only as long as its tile: the forward pass carries a running maximum and sum (as in flash attention),
the backward pass recomputes each tile from the log-sum-exp of its rows. Tiles in the future are not visited.

Inside this file time is divided into chunks of C and the chunk axis comes first. With R = H / G query heads per key
head:

    queries  [N, B, G, R, C, K]        N chunks of the call
    keys     [M, B, G, C, K]           M = cached + N: chunks of the cache come first, unused ones at their end
    values   [M, B, G, C, V]
    decays   [N, B, G, R, C] of queries and [M, B, G, R, C] of keys
    tiles    [B, G, C, R, C]          keys, then the R heads and queries that read them

So keys lie in rows and queries in columns: on a CPU sums over keys are then sums of vectors, and every product takes
its operands as they lie, with no tile transposed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.decay import FORGOTTEN_PAIR
from memformer.core.mask import Mask, first_tiles, join_cache, last_tiles
from memformer.core.numerics import accumulation_dtype
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, similarity
from memformer.core.symbolic import at_most
from memformer.core.types import Array, Bool, Float, Int
from memformer.ops.attention.cache import offset
from memformer.ops.attention.layout import chunk_queries
from memformer.pallas.platform import chip

__all__ = [
    "REVERSE_ONCE",
    "Decay",
    "Gap",
    "TileMask",
    "Tiling",
    "attention_weights",
    "chunk_decay",
    "make_tiling",
    "mask_scores",
    "take",
    "tile_gap",
    "tile_mask",
    "tile_product",
    "tile_scores",
    "unify",
]


REVERSE_ONCE = (
    "the chunked form of softmax_attention and deltaformer has no reverse mode of its gradient (jax.grad of jax.grad),"
    " because its loops over tiles have no static length; implementation='recurrent' has it, and jax.hessian (forward"
    " over reverse) works here"
)


class Tiling(NamedTuple):
    """Static settings of one call.

    Attributes:
      kernel: the similarity kernel, with its scale.
      size: C.
      cached: chunks of the cache.
      causal: whether a query sees only keys up to its own.
      window: how many tokens back a query sees, itself included, or None.
      precision: of products.
      parts: how many parts of the heads are read one after another; arrays have the chunks of each, part after part.
    """

    kernel: Kernel
    size: int
    cached: int
    causal: bool
    window: int | None
    precision: lax.Precision
    parts: int = 1


class TileMask(NamedTuple):
    """The mask of a call over whole tiles, and the bounds of the loops over them.

    Attributes:
      mask: from `join_cache`.
      used: how many chunks of the cache hold anything.
      first: for each row, the first column that any example sees; None where that is the first.
      last: for each column, one more than the last row in which any example sees it; None where that is the last.
      query_decay, key_decay: whole part of the cumulative decays, or None.
    """

    mask: Mask
    used: Int[Array, ""]
    first: Int[Array, "N"] | None
    last: Int[Array, "M"] | None
    query_decay: Int[Array, "N B G R C"] | None = None
    key_decay: Int[Array, "M B G R C"] | None = None

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All of them."""
        return (*self.mask, *self[1:])


class Decay(NamedTuple):
    """Fractions of the cumulative decays of queries and of keys; their whole parts are in the mask."""

    query: Float[Array, "N B G R C"]
    key: Float[Array, "M B G R C"]


class Gap(NamedTuple):
    """The decay between the tokens of one tile.

    Attributes:
      log: from each key to each query, at most 0; 0 where masked.
      apart: False for a token and itself, whose gap of 0 has no gradient: in sums it would cancel inexactly.
    """

    log: Float[Array, "B G C R C"]
    apart: Bool[Array, "1 1 C 1 C"]


def make_tiling(call: AttentionCall, kernel: Kernel, default_size: int) -> tuple[Tiling, TileMask]:
    """The tiles of a call, and its mask over them."""
    cache, tokens = call.cache, call.k.shape[1]
    slots = 0 if cache is None else cache.k.shape[1]
    size = at_most(call.chunk_size or default_size, slots + tokens)
    cached = (slots + size - 1) // size
    used = jnp.int32(cached)
    if cache is not None and cache.fixed:
        used = jnp.minimum((offset(cache, tokens) + (size - 1)) // size, used)
    mask = call.mask
    if not call.causal and mask.key_segment is None:
        # Nothing else hides the padding of the last chunk.
        zeros = jnp.zeros(call.q.shape[:2], jnp.int32)
        mask = mask._replace(key_segment=zeros, query_segment=zeros)
    mask = join_cache(mask, size)
    first = last = None
    if call.causal:
        first, last = (find(mask, size, size, call.window) for find in (first_tiles, last_tiles))
        first = None if first is None else jnp.min(first, axis=0)
        last = None if last is None else jnp.max(last, axis=0)
    tiling = Tiling(kernel, size, cached, call.causal, call.window, call.precision)
    return tiling, TileMask(mask, used, first, last)


def chunk_decay(call: AttentionCall, tiling: Tiling, mask: TileMask) -> tuple[TileMask, Decay | None]:
    """The decays of a call in chunks: the mask with their whole parts, and the fractions."""
    if call.decay is None:
        return mask, None
    cache, groups = call.cache, call.k.shape[2]

    def chunks(x):
        """[B, T, H] to [N, B, G, R, C]."""
        return chunk_queries(x[..., None], groups, tiling.size)[..., 0]

    held = (None, None) if cache is None else (cache.decay_whole, cache.decay_fraction)
    (whole, key_whole), (fraction, key_fraction) = (
        (
            chunks(new),
            chunks(new) if cached is None else jnp.concatenate([chunks(cached), chunks(new.astype(cached.dtype))]),
        )
        for new, cached in zip(call.decay, held, strict=True)
    )
    return mask._replace(query_decay=whole, key_decay=key_whole), Decay(fraction, key_fraction)


def unify(mask: TileMask, *arrays: Array) -> tuple[Array, ...]:
    """Arrays fit for one custom gradient: all in float64 if one is, all varying over the same axes of a shard_map.

    Narrower dtypes stay as they are.
    """
    if accumulation_dtype(*arrays) == jnp.float64:
        arrays = tuple(a.astype(jnp.float64) for a in arrays)
    return tuple(vary_like(a, *arrays, *mask.arrays) for a in arrays)


def take(x: Array | None, i: Array) -> Array | None:
    """x[i], or None."""
    return None if x is None else lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def tile_product(tiling: Tiling, equation: str, a: Array, b: Array) -> Array:
    """An einsum with sums in float32 or wider."""
    dtype = accumulation_dtype(a, b)
    # XLA for CPUs lacks the product of two bfloat16 arrays for some of these shapes, and widens the others itself.
    if a.dtype != b.dtype or chip() == "cpu":
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=tiling.precision, preferred_element_type=dtype)


def tile_mask(tiling: Tiling, mask: TileMask, i: Array, j: Array, *, strict: bool = False) -> Bool[Array, "b g C r C"]:
    """True where a query of chunk i sees a key of chunk j; `strict` leaves out a query's own key."""

    def chunk(x, i):
        return lax.dynamic_slice_in_dim(x, i * jnp.int32(tiling.size), tiling.size, axis=1)

    whole = mask.mask
    key = jnp.arange(tiling.size, dtype=jnp.int32)[None, :, None]
    query = jnp.arange(tiling.size, dtype=jnp.int32)[None, None, :]
    seen = jnp.ones((1, 1, 1), bool)
    if tiling.causal:
        seen = key - query <= (i + tiling.cached - j) * tiling.size - int(strict)
    if whole.query_segment is not None:
        seen &= chunk(whole.query_segment, i)[:, None, :] == chunk(whole.key_segment, j)[:, :, None]
    if tiling.window is not None:
        distance = chunk(whole.query_rank, i)[:, None, :] - chunk(whole.key_rank, j)[:, :, None]
        seen &= (distance if tiling.causal else jnp.abs(distance)) < tiling.window
    seen = seen[:, None, :, None]
    return seen if mask.query_decay is None else seen & (_whole_gap(mask, i, j) > FORGOTTEN_PAIR)


def _differences(query: Float[Array, "B G R C"], key: Float[Array, "B G R C"]) -> Float[Array, "B G C R C"]:
    """The scalar of each query less that of each key."""
    return query[:, :, None] - jnp.moveaxis(key, -1, 2)[..., None]


def _whole_gap(mask: TileMask, i: Array, j: Array) -> Int[Array, "B G C R C"]:
    return _differences(take(mask.query_decay, i), take(mask.key_decay, j))


def tile_gap(
    tiling: Tiling, mask: TileMask, decay: Decay | None, i: Array, j: Array, seen: Bool[Array, "b g C r C"]
) -> Gap | None:
    """The decay from the keys of chunk j to the queries of chunk i."""
    if decay is None:
        return None
    gap = _differences(take(decay.query, i), take(decay.key, j))
    gap = gap + _whole_gap(mask, i, j).astype(gap.dtype)
    # Queries in the padding of the last chunk have no decay, and gaps that would overflow.
    seen = seen & (gap < 1)
    place = jnp.arange(tiling.size, dtype=jnp.int32)
    apart = place[:, None] - place[None, :] != (i + tiling.cached - j) * tiling.size
    return Gap(jnp.where(seen, gap, jnp.zeros((), gap.dtype)), apart[None, None, :, None])


def tile_scores(
    tiling: Tiling, q: Float[Array, "B G K R C"], k: Float[Array, "B G C K"], gap: Gap | None
) -> Float[Array, "B G C R C"]:
    """Scaled inner products of one tile; a normalised kernel has the decay added to them."""
    scale = tiling.kernel.scale
    if q.dtype == accumulation_dtype(q, k):
        # One pass less over the scores; narrower queries would be rounded twice.
        scores = tile_product(tiling, "bgsk,bgkrt->bgsrt", k, q * scale)
    else:
        scores = tile_product(tiling, "bgsk,bgkrt->bgsrt", k, q) * scale
    return scores + gap.log if tiling.kernel.normalized and gap is not None else scores


def mask_scores(scores: Array, mask: Array | None) -> Array:
    """The lowest number where masked; running maxima start at half of it, so that its exponential is 0."""
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def attention_weights(
    tiling: Tiling, mask: Array | None, scores: Array, lse: Array | None, gap: Gap | None
) -> Float[Array, "B G C R C"]:
    """Decayed similarities of one tile, normalised by the rows' log-sum-exp for softmax; nothing is masked by None."""
    if tiling.kernel.normalized:
        return jnp.exp(mask_scores(scores, mask) - lse[:, :, None])
    if mask is None:
        return similarity(tiling.kernel, scores)
    zero = jnp.zeros((), scores.dtype)
    weights = jnp.where(mask, similarity(tiling.kernel, jnp.where(mask, scores, zero)), zero)
    return weights if gap is None else weights * jnp.exp(gap.log)
