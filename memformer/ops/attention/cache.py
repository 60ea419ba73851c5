"""The growing memory of attention-like ops: a cache of keys and values, exact or in a fixed buffer.

A cache lists slots in order of time; every token of a call takes one, padding included. `valid` says which slots
the next call can see: those of tokens of the last segment. What the other slots hold does not matter.

An exact cache (`fixed` False) has just the slots in use, and each call returns a longer one. A fixed buffer
(`init_cache` of the op) has a capacity; a call writes in place from `length` on, so that decoding compiles once.
A call that does not fit is an error and leaves the buffer as it was.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check_array, check_positive
from memformer.core.segments import Segments
from memformer.core.types import Array, Bool, Dims, Float, Int

__all__ = [
    "Cache",
    "DeltaCache",
    "KVCache",
    "Timeline",
    "append",
    "check_cache",
    "empty",
    "make_timeline",
    "offset",
    "place",
]

# Segment numbers that match nothing: a slot that nobody sees, and a query that sees nothing.
UNSEEN, BLIND = -1, -2


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "valid", "length"], meta_fields=["fixed"])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What softmax attention keeps: a key and a value for each token.

    Attributes:
      k: keys, in the dtype of the first call (or of the buffer); later calls are stored in it too.
      v: values, likewise.
      valid: slots that the next call can see.
      length: slots in use.
      fixed: True for a buffer with a capacity of S slots; static.
    """

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    fixed: bool = False

    @property
    def values(self) -> Float[Array, "B S G V"]:
        """What is stored at the keys, by the name that all caches have."""
        return self.v


@partial(jax.tree_util.register_dataclass, data_fields=["k", "u", "valid", "length"], meta_fields=["fixed"])
@dataclasses.dataclass(frozen=True)
class DeltaCache:
    """What DeltaFormer keeps: a key and what was written there (u) for each token.

    Attributes:
      k: keys, in the dtype of the first call (or of the buffer); later calls are stored in it too.
      u: writes, in float32 (float64 for float64 inputs).
      valid: slots that the next call can see.
      length: slots in use.
      fixed: True for a buffer with a capacity of S slots; static.
    """

    k: Float[Array, "B S G K"]
    u: Float[Array, "B S G V"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    fixed: bool = False

    @property
    def values(self) -> Float[Array, "B S G V"]:
        """What is stored at the keys, by the name that all caches have."""
        return self.u


Cache: TypeAlias = KVCache | DeltaCache
C = TypeVar("C", bound=Cache)


class Timeline(NamedTuple):
    """Who sees whom: numbers for the slots held before a call, and for its tokens as keys and as queries.

    A query sees a slot of its own segment number; fields are None where everything is in one segment. Ranks
    count the tokens of a segment without padding; they are None where no window asks for them.
    """

    held_segment: Int[Array, "B S"] | None = None
    key_segment: Int[Array, "B T"] | None = None
    query_segment: Int[Array, "B T"] | None = None
    held_rank: Int[Array, "B S"] | None = None
    token_rank: Int[Array, "B T"] | None = None


def make_timeline(cache: Cache | None, segments: Segments | None, dims: Dims, *, ranks: bool) -> Timeline:
    """Numbers the slots of `cache` and the tokens of a call.

    Args:
      cache: the state before the call.
      segments: of the call, from `find_segments`.
      dims: B and T.
      ranks: whether ranks are needed.
    """
    shape = (dims["B"], dims["T"])
    # From 1, as counts of valid tokens are.
    rank = jnp.arange(1, dims["T"] + 1, dtype=jnp.int32)[None]
    if cache is None and segments is None:
        return Timeline(token_rank=rank if ranks else None)
    if segments is None:
        key_segment = query_segment = jnp.zeros(shape, jnp.int32)
    else:
        key_segment = jnp.where(segments.valid, segments.index, jnp.int32(UNSEEN))
        query_segment = jnp.where(segments.valid, segments.index, jnp.int32(BLIND))
        rank = jnp.cumsum(segments.valid, axis=1, dtype=jnp.int32)
    timeline = Timeline(None, key_segment, query_segment)
    if cache is not None:
        timeline = timeline._replace(held_segment=jnp.where(cache.valid, jnp.int32(0), jnp.int32(UNSEEN)))
    if not ranks:
        return timeline
    if cache is not None:
        held = jnp.cumsum(cache.valid, axis=1, dtype=jnp.int32)
        rank = rank + held[:, -1:]
        timeline = timeline._replace(held_rank=held)
    return timeline._replace(token_rank=rank)


def check_cache(cache: Any, kind: type[C], dims: Dims, module: str) -> C | None:
    """Checks the argument initial_state; binds S in `dims`.

    Raises:
      ValueError: not a cache of this op, wrong shapes, or a fixed buffer without room for the call.
    """
    if cache is None:
        return None
    if not isinstance(cache, kind):
        raise ValueError(
            f"initial_state must be a {kind.__name__}, as {module} returns it or {module}.init_cache makes it, "
            f"got {type(cache).__name__}"
        )
    values = "v" if kind is KVCache else "u"
    check_array("initial_state.k", cache.k, "B S G K", dims)
    check_array(f"initial_state.{values}", getattr(cache, values), "B S G V", dims)
    check_array("initial_state.valid", cache.valid, "B S", dims, kind=np.bool_)
    if jnp.shape(cache.length) != () or not jnp.issubdtype(cache.length.dtype, jnp.integer):
        raise ValueError(f"initial_state.length must be one integer, got shape {jnp.shape(cache.length)}")
    if cache.fixed:
        _check_room(cache, dims)
    return cache


def _check_room(cache: Cache, dims: Dims) -> None:
    """Raises at once where the length is known, or else has the running program raise."""
    tokens, capacity = dims["T"], dims["S"]
    if tokens > capacity:
        raise ValueError(_overflow(tokens, capacity, 0))
    if not isinstance(cache.length, jax.core.Tracer):
        if int(cache.length) + tokens > capacity:
            raise ValueError(_overflow(tokens, capacity, int(cache.length)))
        return
    full = cache.length + tokens > capacity

    def report():
        jax.debug.callback(partial(_raise_overflow, tokens, capacity), full, cache.length)

    lax.cond(full, report, lambda: None)


def _raise_overflow(tokens: int, capacity: int, full: Any, length: Any) -> None:
    # Under vmap both branches of the condition run: only `full` tells.
    if np.any(full):
        raise ValueError(_overflow(tokens, capacity, int(np.max(length))))


def _overflow(tokens: int, capacity: int, length: int) -> str:
    return (
        f"initial_state has a capacity of {capacity} slots, {length} of them in use: no room for {tokens} more tokens. "
        "Allocate a larger one with init_cache"
    )


def place(cache: Cache | None, held: Array | None, new: Array) -> Array:
    """Puts `new` [B, T, ...] behind what the cache holds in `held` [B, S, ...], in held's dtype."""
    if cache is None or held is None:
        return new
    new = new.astype(held.dtype)
    if not cache.fixed:
        return jnp.concatenate([held, new], axis=1)
    start, full = room(cache, new.shape[1])
    kept = lax.dynamic_slice_in_dim(held, start, new.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(held, jnp.where(full, kept, new), start, axis=1)


def room(cache: Cache, tokens: int) -> tuple[Array, Array]:
    """The slot of a fixed buffer where a call writes, and whether it does not fit (nothing is written then)."""
    length = jnp.asarray(cache.length, jnp.int32)
    last = jnp.int32(cache.k.shape[1] - tokens)
    return jnp.minimum(length, last), length > last


def offset(cache: Cache | None, tokens: int) -> Array:
    """The slot of the first token of a call."""
    if cache is None:
        return jnp.int32(0)
    return room(cache, tokens)[0] if cache.fixed else jnp.int32(cache.k.shape[1])


def append(kind: type[C], cache: C | None, segments: Segments | None, k: Array, values: Array) -> C:
    """The state after a call.

    Args:
      kind: KVCache or DeltaCache.
      cache: the state before.
      segments: of the call.
      k: keys of the call's tokens, [B, T, G, K].
      values: what is stored at them, [B, T, G, V].
    """
    batch, tokens = k.shape[:2]
    if segments is None:
        valid = jnp.ones((batch, tokens), bool)
    else:
        valid = segments.valid & (segments.index == segments.index[:, -1:])
    if cache is None:
        return kind(k, values, valid, jnp.int32(tokens))
    kept = cache.valid if segments is None else cache.valid & (segments.index[:, -1:] == 0)
    valid, length = place(cache, kept, valid), jnp.asarray(cache.length, jnp.int32) + jnp.int32(tokens)
    if cache.fixed:
        _, full = room(cache, tokens)
        valid, length = jnp.where(full, cache.valid, valid), jnp.where(full, length - jnp.int32(tokens), length)
    held = cache.v if isinstance(cache, KVCache) else cache.u
    return kind(place(cache, cache.k, k), place(cache, held, values), valid, length, cache.fixed)


def empty(kind: type[C], shapes: tuple[int, ...], k_dtype: Any, value_dtype: Any) -> C:
    """A fixed buffer of zeros; `shapes` is (batch, capacity, groups, key_width, value_width)."""
    names = ("batch", "capacity", "groups", "key_width", "value_width")
    for name, size in zip(names, shapes, strict=True):
        check_positive(name, size)
        if size is None:
            raise ValueError(f"{name} must be a positive integer, got None")
    batch, capacity, groups, key_width, value_width = shapes
    k = jnp.zeros((batch, capacity, groups, key_width), k_dtype)
    values = jnp.zeros((batch, capacity, groups, value_width), value_dtype)
    return kind(k, values, jnp.zeros((batch, capacity), bool), jnp.int32(0), True)
