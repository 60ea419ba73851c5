"""Caches of the attention ops: keys and values of earlier tokens, growing or of fixed capacity.

A cache lists slots in order of time; every token of a call takes one, padding included. `valid` marks the slots that
the next call can see: those of tokens of the last segment; the others hold zeros.

Where each document of a packed row has a cache of its own, arrays have an axis of P documents after the batch, and a
document's tokens take its next slots without padding (`memformer.ops.attention.documents`).

A growing cache (`fixed` False) has exactly the slots in use, and each call returns a longer one. A fixed cache
(`init_cache`) has a capacity; a call writes in place from `length` on, so that decoding compiles once. A call that
does not fit is an error and leaves the cache unchanged.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check, check_array, check_choice, check_floating, check_size
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
    "check_room",
    "clear_slots",
    "init_cache",
    "last_decay",
    "offset",
    "place",
    "start_slot",
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
      >>> cache.v.shape
      (1, 3, 2, 8)
    """

    k: Float[Array, "B S G K"] | Float[Array, "B P S G K"]
    v: Float[Array, "B S G V"] | Float[Array, "B P S G V"]
    valid: Bool[Array, "B S"] | Bool[Array, "B P S"]
    length: Int[Array, ""]
    fixed: bool = False
    decay_whole: Int[Array, "B S H"] | Int[Array, "B P S H"] | None = None
    decay_fraction: Float[Array, "B S H"] | Float[Array, "B P S H"] | None = None

    @property
    def values(self) -> Float[Array, "B S G V"] | Float[Array, "B P S G V"]:
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
      >>> cache.u.shape
      (1, 3, 2, 8)
    """

    k: Float[Array, "B S G K"] | Float[Array, "B P S G K"]
    u: Float[Array, "B S G V"] | Float[Array, "B P S G V"]
    valid: Bool[Array, "B S"] | Bool[Array, "B P S"]
    length: Int[Array, ""]
    fixed: bool = False
    decay_whole: Int[Array, "B S G"] | Int[Array, "B P S G"] | None = None
    decay_fraction: Float[Array, "B S G"] | Float[Array, "B P S G"] | None = None

    @property
    def values(self) -> Float[Array, "B S G V"] | Float[Array, "B P S G V"]:
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
    slots = "B P S" if getattr(cache.k, "ndim", 4) == 5 else "B S"
    check_array("initial_state.k", cache.k, f"{slots} G K", dims)
    check_array(f"initial_state.{values}", getattr(cache, values), f"{slots} G V", dims)
    if cache.decay_whole is None:
        fraction = cache.decay_fraction
        check(fraction is None, "initial_state.decay_fraction", "None without a decay_whole", np.shape(fraction))
    else:
        letters = f"{slots} H" if kind is KVCache else f"{slots} G"
        check_array("initial_state.decay_whole", cache.decay_whole, letters, dims, kind=np.integer)
        check_array("initial_state.decay_fraction", cache.decay_fraction, letters, dims)
    check_array("initial_state.valid", cache.valid, slots, dims, kind=np.bool_)
    check_array("initial_state.length", cache.length, "", dims, kind=np.integer)
    if cache.fixed and slots == "B S":
        check_room(cache, dims["T"])
    return cache


def check_room(cache: Cache, tokens: int | Array) -> None:
    """Raises at once where the lengths are known, or else has the running program raise; an exported one cannot.

    Args:
      cache: a fixed one.
      tokens: T, or the tokens of the longest document.
    """
    capacity = cache.k.shape[-3]
    if is_symbolic(capacity) or isinstance(tokens, int) and is_symbolic(tokens):
        return
    if isinstance(tokens, int) and tokens > capacity:
        raise ValueError(_overflow(tokens, capacity, 0))
    full = cache.length + tokens > capacity
    if not isinstance(full, jax.core.Tracer):
        _raise_overflow(capacity, full, tokens, cache.length)
        return

    def report():
        jax.debug.callback(partial(_raise_overflow, capacity), full, tokens, cache.length)

    lax.cond(full, report, lambda: None)


def _raise_overflow(capacity: int, full: Any, tokens: Any, length: Any) -> None:
    # Under vmap both branches of the condition run: only `full` tells.
    if np.any(full):
        raise ValueError(_overflow(int(np.max(tokens)), capacity, int(np.max(length))))


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


def sum_decay(
    cache: Cache | None,
    decay: Array | None,
    dtype: jax.typing.DTypeLike,
    documents: Callable[[Array], CumulativeDecay] | None = None,
) -> CumulativeDecay | None:
    """The cumulative log decay of a call's tokens, continued from that of the cache.

    Args:
      cache: the state before the call.
      decay: log decays of the call, or None.
      dtype: to sum in.
      documents: sums them where each document has a cache.

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
    decay = decay.astype(dtype)
    if cache is None:
        return running_decay(decay)
    if documents is not None:
        return documents(decay)
    return running_decay(decay, CumulativeDecay(*(x[:, None] for x in last_decay(cache, dtype))))


def start_slot(cache: Cache) -> Array:
    """The first slot that is not in use."""
    return jnp.asarray(cache.length, jnp.int32) if cache.fixed else jnp.int32(cache.valid.shape[-1])


def last_decay(cache: Cache, dtype: jax.typing.DTypeLike | None = None) -> CumulativeDecay:
    """The cumulative decay in the last slot in use, [B, H] or of each document [B, P, H]; 0 where none is."""
    last, axis = jnp.maximum(start_slot(cache) - 1, 0), cache.valid.ndim - 1
    held = (cache.decay_whole, cache.decay_fraction)
    whole, fraction = (lax.dynamic_index_in_dim(x, last, axis, keepdims=False) for x in held)
    return CumulativeDecay(whole, fraction if dtype is None else fraction.astype(dtype))


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
    documents: int | None = None,
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
      documents: P, caches per row, one of each segment of a packed call; capacity is then that of a document. None is
        one cache per row.
      dtype: of keys and values; DeltaFormer's u is kept in float32 (float64 where this is float64).

    Returns:
      The cache, with no slot in use.

    Raises:
      ValueError: an unknown op, a size below 1, or a dtype that is not floating.

    Example:
      >>> init_cache("softmax_attention", batch=1, capacity=16, groups=2, key_width=8, value_width=4).v.shape
      (1, 16, 2, 4)
    """
    check_choice("op", op, ("softmax_attention", "deltaformer"))
    sizes = {"batch": batch, "capacity": capacity, "groups": groups, "key_width": key_width, "value_width": value_width}
    batch, capacity, groups, key_width, value_width = (check_size(name, size) for name, size in sizes.items())
    dtype = check_floating("dtype", dtype)
    kind: type[Cache] = DeltaCache if op == "deltaformer" else KVCache
    value_dtype = accumulation_dtype(jnp.zeros((), dtype)) if op == "deltaformer" else dtype
    slots = (batch, capacity) if documents is None else (batch, check_size("documents", documents), capacity)
    k = jnp.zeros((*slots, groups, key_width), dtype)
    values = jnp.zeros((*slots, groups, value_width), value_dtype)
    decays: Any = ()
    if decay_heads is not None:
        shape = (*slots, check_size("decay_heads", decay_heads))
        decays = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, accumulation_dtype(k)))
    return kind(k, values, jnp.zeros(slots, bool), jnp.int32(0), True, *decays)
