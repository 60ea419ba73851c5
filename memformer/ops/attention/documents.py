"""Caches per document: every document of a packed row starts from its own cache and leaves one.

Arrays of such a cache have an axis of P documents after the batch, [B, P, S, ...]. A call reads them as one cache of
P * S slots, which the mask tells apart. The tokens of a document then take its next slots, without the padding.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from memformer.core.decay import CumulativeDecay, add_decay, running_decay
from memformer.core.mask import UNSEEN, Mask
from memformer.core.segments import Segments
from memformer.core.types import Array, Bool, Float, Int
from memformer.ops.attention import cache as caches
from memformer.ops.attention.cache import Cache, last_decay, start_slot

__all__ = ["Documents", "append", "find_documents", "flatten", "place_mask", "sum_decays"]

C = TypeVar("C", bound=Cache)


class Documents(NamedTuple):
    """The documents of a call.

    Attributes:
      index: document of each token, from 0.
      valid: False at padding.
      counts: tokens of each document, without padding.
      before: tokens of the row before each document, without padding.
      order: positions of the row's tokens in order of time, those of padding behind.
    """

    index: Int[Array, "B T"]  # type: ignore[assignment]
    valid: Bool[Array, "B T"]
    counts: Int[Array, "B P"]
    before: Int[Array, "B P"]
    order: Int[Array, "B T"]


def find_documents(segments: Segments | None, shape: tuple[int, int], places: int) -> Documents:
    """The documents of a call [B, T] with P places per row; without segments all tokens belong to the first."""
    index, valid = (jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)) if segments is None else segments
    index = jnp.minimum(index, jnp.int32(places - 1))
    own = (index[:, :, None] == jnp.arange(places, dtype=jnp.int32)[None, None]) & valid[:, :, None]
    counts = jnp.sum(own, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)
    return Documents(index, valid, counts, jnp.cumsum(counts, axis=1) - counts, order)


def flatten(cache: C) -> C:
    """The cache of all documents of a row, as one that grows: [B, P S, ...].

    Decays are counted from the last slot in use of each document: a tile has slots of several documents, and one number
    close to all of them (`memformer.pallas.pair_decay`) only if all end at 0.
    """
    if cache.decay_whole is not None:
        last = CumulativeDecay(*(-x[:, :, None] for x in last_decay(cache)))
        decay = add_decay(CumulativeDecay(cache.decay_whole, cache.decay_fraction), last)
        whole, fraction = (_where(cache.valid, x, jnp.zeros_like(x)) for x in decay)
        cache = dataclasses.replace(cache, decay_whole=whole, decay_fraction=fraction)
    arrays: dict[str, Any] = {name: x.reshape(x.shape[0], -1, *x.shape[3:]) for name, x in _arrays(cache).items()}
    return dataclasses.replace(cache, **arrays, length=jnp.int32(arrays["valid"].shape[1]), fixed=False)


def _arrays(cache: Cache) -> dict[str, Array]:
    """The arrays of a cache that have slots."""
    return {name: x for name, x in vars(cache).items() if name not in ("length", "fixed") and x is not None}


def place_mask(mask: Mask, cache_valid: Bool[Array, "B P S"], documents: Documents) -> Mask:
    """The mask of a call whose tokens see the slots of their own document."""
    places = jnp.arange(cache_valid.shape[1], dtype=jnp.int32)[None, :, None]
    segment = jnp.where(cache_valid, places, jnp.int32(UNSEEN))
    mask = mask._replace(cache_segment=segment.reshape(segment.shape[0], -1))
    if mask.query_rank is None:
        return mask
    cache_rank = jnp.cumsum(cache_valid, axis=2, dtype=jnp.int32)
    rank = jnp.cumsum(documents.valid, axis=1, dtype=jnp.int32)
    rank = rank + jnp.take_along_axis(cache_rank[:, :, -1] - documents.before, documents.index, axis=1)
    return mask._replace(cache_rank=cache_rank.reshape(segment.shape[0], -1), query_rank=rank, key_rank=rank)


def sum_decays(decay: Float[Array, "B T H"], documents: Documents) -> CumulativeDecay:
    """The cumulative log decay of each token, from 0 before its document's first token."""
    total = running_decay(decay)
    # Of the tokens before each document; padding decays by nothing.
    first = jnp.take_along_axis(documents.order, jnp.minimum(documents.before, decay.shape[1] - 1), axis=1)
    padded = CumulativeDecay(*(jnp.pad(x, ((0, 0), (1, 0), (0, 0))) for x in total))
    before = CumulativeDecay(*(_take(x, first) for x in padded))
    return add_decay(total, CumulativeDecay(*(-_take(x, documents.index) for x in before)))


def _take(x: Array, places: Int[Array, "B L"]) -> Array:
    """x [B, N, ...] at these places of its second axis."""
    return jnp.take_along_axis(x, jnp.expand_dims(places, tuple(range(2, x.ndim))), axis=1)


def append(
    kind: type[C],
    cache: C | None,
    segments: Segments | Documents | None,
    k: Array,
    values: Array,
    decay: CumulativeDecay | None = None,
) -> C:
    """The state after a call, as `cache.append`; with a cache per document, the documents stand for the segments."""
    if isinstance(segments, Documents) and cache is not None:
        return _append_documents(cache, segments, k, values, decay)
    return caches.append(kind, cache, segments, k, values, decay)  # type: ignore[arg-type]


def _append_documents(
    cache: C, documents: Documents, k: Array, values: Array, decay: CumulativeDecay | None = None
) -> C:
    """The caches after a call: each document has its own tokens in the slots behind those in use.

    A fixed cache that has no room for the longest document stays as it is.
    """
    batch, tokens = documents.index.shape
    places, held = cache.valid.shape[1:]
    most = jnp.max(documents.counts)
    start = start_slot(cache)
    slots = held if cache.fixed else held + tokens
    full = (start + most > held) if cache.fixed else jnp.bool_(False)
    ahead = jnp.arange(slots, dtype=jnp.int32) - start
    counts = documents.counts[:, :, None]
    new = (ahead[None, None] >= 0) & (ahead[None, None] < counts) & ~full
    # What is behind a document's last token repeats that token: its decay, that is; the rest is cleared.
    number = documents.before[:, :, None] + jnp.clip(ahead[None, None], 0, jnp.maximum(counts - 1, 0))
    number = jnp.minimum(number, jnp.int32(tokens - 1)).reshape(batch, -1)
    source = jnp.take_along_axis(documents.order, number, axis=1)

    def move(x: Array) -> Array:
        return _take(x, source).reshape(batch, places, slots, *x.shape[2:])

    def place(old: Array, x: Array) -> Array:
        return _where(new, move(x).astype(old.dtype), _grow(old, slots))

    arrays: dict[str, Any] = {"k": place(cache.k, k)}
    arrays["u" if hasattr(cache, "u") else "v"] = place(cache.values, values)
    if decay is not None:
        behind, none = (ahead >= 0)[None, None] & ~full, counts == 0
        last = CumulativeDecay(*(x[:, :, None] for x in last_decay(cache)))
        moved = CumulativeDecay(*(move(x) for x in decay))
        added = add_decay(last, CumulativeDecay(moved.whole, moved.fraction.astype(last.fraction.dtype)))
        for name, x, end in zip(("decay_whole", "decay_fraction"), added, last, strict=True):
            kept = _where(behind & none, end, _grow(getattr(cache, name), slots))
            arrays[name] = _where(behind & ~none, x, kept)
    valid = new | _grow(cache.valid, slots)
    length = jnp.where(full, start, start + most) if cache.fixed else jnp.int32(slots)
    return dataclasses.replace(cache, **arrays, valid=valid, length=length)


def _grow(x: Array, slots: int) -> Array:
    """x [B, P, S, ...] with empty slots behind."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), *((0, 0),) * (x.ndim - 3)))


def _where(at: Bool[Array, "B P S"], x: Array, other: Array) -> Array:
    return jnp.where(jax.lax.expand_dims(at, range(3, other.ndim)), x, other)
