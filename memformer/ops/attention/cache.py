"""Caches of the attention ops: keys and values of earlier tokens, growing or of fixed capacity.

A cache lists slots in order of time; every token of a call takes one, padding included. `valid` marks the slots that
the next call can see: those of tokens of the last segment; the others hold zeros.

A growing cache (`fixed` False) has exactly the slots in use, and each call returns a longer one. A fixed cache
(`init_cache`) has a capacity; a call writes in place from `length` on, so that decoding compiles once. A call that
does not fit is an error and leaves the cache unchanged.
"""

import dataclasses
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.decay import CumulativeDecay, running_decay
from memformer.core.numerics import accumulation_dtype
from memformer.core.segments import Segments, clear
from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Bool, Dims, Float, Int

__all__ = [
    "Cache",
    "DeltaCache",
    "KVCache",
    "append",
    "check_cache",
    "clear_slots",
    "init_cache",
    "offset",
    "place",
    "sum_decay",
]

_DATA = ["valid", "length", "decay_whole", "decay_fraction"]


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", *_DATA], meta_fields=["fixed"])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The state of softmax attention: a key and a value per token.

    Attributes:
      k: keys, in the dtype of the first call (or of `init_cache`); later calls are stored in it too.
      v: values, likewise.
      valid: slots that the next call can see.
      length: slots in use.
      fixed: True for a capacity of S slots; static.
      decay_whole, decay_fraction: cumulative log decay as a whole number and a fraction; None where calls have none.

    Example:
      >>> x = jnp.ones((1, 3, 2, 8))
      >>> _, cache = mf.softmax_attention(x, x, x)
      >>> cache.v.shape, cache.length
      ((1, 3, 2, 8), Array(3, dtype=int32))
    """

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    fixed: bool = False
    decay_whole: Int[Array, "B S H"] | None = None
    decay_fraction: Float[Array, "B S H"] | None = None

    @property
    def values(self) -> Float[Array, "B S G V"]:
        """The values stored at the keys, under one name for all caches."""
        return self.v


@partial(jax.tree_util.register_dataclass, data_fields=["k", "u", *_DATA], meta_fields=["fixed"])
@dataclasses.dataclass(frozen=True)
class DeltaCache:
    """The state of DeltaFormer: a key and the value u written there, per token.

    Attributes:
      k: keys, in the dtype of the first call (or of `init_cache`); later calls are stored in it too.
      u: writes, in float32 (float64 for float64 inputs).
      valid: slots that the next call can see.
      length: slots in use.
      fixed: True for a capacity of S slots; static.
      decay_whole, decay_fraction: cumulative log decay as a whole number and a fraction; None where calls have none.

    Example:
      >>> x = jnp.ones((1, 3, 2, 8))
      >>> _, cache = mf.deltaformer(x, x, x)
      >>> cache.u.shape, cache.length
      ((1, 3, 2, 8), Array(3, dtype=int32))
    """

    k: Float[Array, "B S G K"]
    u: Float[Array, "B S G V"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]
    fixed: bool = False
    decay_whole: Int[Array, "B S G"] | None = None
    decay_fraction: Float[Array, "B S G"] | None = None

    @property
    def values(self) -> Float[Array, "B S G V"]:
        """The values stored at the keys, under one name for all caches."""
        return self.u


Cache: TypeAlias = KVCache | DeltaCache
C = TypeVar("C", bound=Cache)


def check_cache(cache: Any, kind: type[C], dims: Dims, op: str) -> C | None:
    """Checks the argument initial_state; binds S in `dims`.

    Raises:
      ValueError: not a cache of this op, wrong shapes, or a fixed cache without room for the call.
    """
    if cache is None:
        return None
    if not isinstance(cache, kind):
        raise ValueError(
            f"initial_state must be a {kind.__name__}, as memformer.{op} returns it or"
            f" memformer.init_cache({op!r}, ...) makes it, got {type(cache).__name__}"
        )
    values = "v" if kind is KVCache else "u"
    check_array("initial_state.k", cache.k, "B S G K", dims)
    check_array(f"initial_state.{values}", getattr(cache, values), "B S G V", dims)
    if cache.decay_whole is not None:
        letters = "B S H" if kind is KVCache else "B S G"
        check_array("initial_state.decay_whole", cache.decay_whole, letters, dims, kind=np.integer)
        check_array("initial_state.decay_fraction", cache.decay_fraction, letters, dims)
    check_array("initial_state.valid", cache.valid, "B S", dims, kind=np.bool_)
    if jnp.shape(cache.length) != () or not jnp.issubdtype(cache.length.dtype, jnp.integer):
        raise ValueError(f"initial_state.length must be one integer, got shape {jnp.shape(cache.length)}")
    if cache.fixed:
        _check_room(cache, dims)
    return cache


def _check_room(cache: Cache, dims: Dims) -> None:
    """Raises at once where the length is known, or else has the running program raise; an exported one cannot."""
    tokens, capacity = dims["T"], dims["S"]
    if is_symbolic(tokens, capacity):
        return
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
        "Allocate a larger one with memformer.init_cache"
    )


def clear_slots(cache: C) -> C:
    """The cache with zeros in the slots that no query sees, so that NaN there reaches neither outputs nor gradients.

    `append` keeps these slots of a fixed cache at zero: clearing all of it would double the cost of decoding.
    """
    if cache.fixed:
        return cache
    return _clear(cache, cache.valid)


def _clear(cache: C, valid: Bool[Array, "B S"]) -> C:
    """The cache with these slots valid, and zeros in the others."""
    decays = (cache.decay_whole, cache.decay_fraction)
    return type(cache)(clear(valid, cache.k), clear(valid, cache.values), valid, cache.length, cache.fixed, *decays)


def sum_decay(cache: Cache | None, decay: Array | None, dtype: jax.typing.DTypeLike) -> CumulativeDecay | None:
    """The cumulative log decay of a call's tokens, continued from that of the cache.

    Raises:
      ValueError: the call has a decay and the cache has none, or the other way round.
    """
    if cache is not None and (decay is None) != (cache.decay_whole is None):
        expected, holds = ("given", "decays") if decay is None else ("None", "no decays")
        raise ValueError(
            f"decay must be {expected} where initial_state holds {holds}: all calls of a sequence have one, or none"
            " (memformer.init_cache(decay_heads=...) allocates them)"
        )
    if decay is None:
        return None
    start = None
    if cache is not None:
        last = jnp.maximum(jnp.asarray(cache.length, jnp.int32) - 1, 0) if cache.fixed else cache.k.shape[1] - 1
        held = (cache.decay_whole, cache.decay_fraction)
        whole, fraction = (lax.dynamic_slice_in_dim(x, last, 1, axis=1) for x in held)
        start = CumulativeDecay(whole, fraction.astype(dtype))
    return running_decay(decay.astype(dtype), start)


def place(cache: Cache | None, cached: Array | None, new: Array) -> Array:
    """Appends `new` [B, T, ...] to the cached array `cached` [B, S, ...], in its dtype."""
    if cache is None or cached is None:
        return new
    new = new.astype(cached.dtype)
    if not cache.fixed:
        return jnp.concatenate([cached, new], axis=1)
    start, full = room(cache, new.shape[1])
    kept = lax.dynamic_slice_in_dim(cached, start, new.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(cached, jnp.where(full, kept, new), start, axis=1)


def room(cache: Cache, tokens: int) -> tuple[Array, Array]:
    """The slot of a fixed cache where a call writes, and whether the call does not fit (nothing is written then)."""
    length = jnp.asarray(cache.length, jnp.int32)
    last = jnp.int32(cache.k.shape[1] - tokens)
    return jnp.minimum(length, last), length > last


def offset(cache: Cache | None, tokens: int) -> Array:
    """The slot of the first token of a call."""
    if cache is None:
        return jnp.int32(0)
    return room(cache, tokens)[0] if cache.fixed else jnp.int32(cache.k.shape[1])


def append(
    kind: type[C],
    cache: C | None,
    segments: Segments | None,
    k: Array,
    values: Array,
    decay: CumulativeDecay | None = None,
) -> C:
    """The state after a call.

    Args:
      kind: KVCache or DeltaCache.
      cache: the state before the call.
      segments: of the call.
      k: keys of the call's tokens, [B, T, G, K].
      values: v or u of the call's tokens, [B, T, G, V].
      decay: of the call's tokens, from `sum_decay`.
    """
    batch, tokens = k.shape[:2]
    valid = jnp.ones((batch, tokens), bool)
    if segments is not None:
        valid = segments.valid & (segments.index == segments.index[:, -1:])
        k, values = clear(valid, k), clear(valid, values)
    if cache is None:
        return kind(k, values, valid, jnp.int32(tokens), False, *(decay or ()))
    full = room(cache, tokens)[1] if cache.fixed else jnp.bool_(False)
    if segments is not None:
        cache = _drop_segments(cache, full | (segments.index[:, -1] == 0))
    valid, length = place(cache, cache.valid, valid), jnp.asarray(cache.length, jnp.int32) + jnp.int32(tokens)
    if cache.fixed:
        valid, length = jnp.where(full, cache.valid, valid), jnp.where(full, length - jnp.int32(tokens), length)
    decays: Any = ()
    if decay is not None:
        held = (cache.decay_whole, cache.decay_fraction)
        decays = (place(cache, cached, new) for cached, new in zip(held, decay, strict=True))
    return kind(place(cache, cache.k, k), place(cache, cache.values, values), valid, length, cache.fixed, *decays)


def _drop_segments(cache: C, kept: Bool[Array, "B"]) -> C:
    """Clears all slots of the rows that are not kept; most calls keep all rows and copy nothing."""

    return lax.cond(jnp.all(kept), lambda cache: cache, lambda cache: _clear(cache, cache.valid & kept[:, None]), cache)


def init_cache(
    op: str,
    *,
    batch: int,
    capacity: int,
    groups: int,
    key_width: int,
    value_width: int,
    decay_heads: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cache:
    """Makes an empty cache of fixed capacity: calls that take it as initial_state write in place.

    Args:
      op: whose state it is, "softmax_attention" (a `KVCache`) or "deltaformer" (a `DeltaCache`).
      batch: B.
      capacity: S, the number of tokens that fit.
      groups: G, key/value heads.
      key_width: K.
      value_width: V.
      decay_heads: number of heads of the calls' decay (H in softmax_attention, G in deltaformer); None where they
        have none.
      dtype: of keys and values; DeltaFormer's u is kept in float32 (float64 where this is float64).

    Returns:
      The cache, with no slot in use.

    Raises:
      ValueError: an unknown op, or a size below 1.

    Example:
      >>> init_cache("softmax_attention", batch=1, capacity=16, groups=2, key_width=8, value_width=4).v.shape
      (1, 16, 2, 4)
    """
    check_choice("op", op, ("softmax_attention", "deltaformer"))
    sizes = {"batch": batch, "capacity": capacity, "groups": groups, "key_width": key_width, "value_width": value_width}
    batch, capacity, groups, key_width, value_width = (check_size(name, size) for name, size in sizes.items())
    kind: type[Cache] = DeltaCache if op == "deltaformer" else KVCache
    value_dtype = accumulation_dtype(jnp.zeros((), dtype)) if op == "deltaformer" else dtype
    k = jnp.zeros((batch, capacity, groups, key_width), dtype)
    values = jnp.zeros((batch, capacity, groups, value_width), value_dtype)
    decays: Any = ()
    if decay_heads is not None:
        shape = (batch, capacity, check_size("decay_heads", decay_heads))
        decays = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, accumulation_dtype(k)))
    return kind(k, values, jnp.zeros((batch, capacity), bool), jnp.int32(0), True, *decays)
