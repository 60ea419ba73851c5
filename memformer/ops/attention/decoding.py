"""The kernels of attention: one of few tokens over a cache of fixed capacity, and those of all others.

The former reads the cache once. What the tokens of a call of DeltaFormer write, and what they read of each other, is
left to XLA: a few numbers per pair of tokens. It has no derivative of its own: whatever is differentiated runs as the
recurrence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.calls import AttentionCall
from memformer.core.decay import FORGOTTEN_PAIR, CumulativeDecay
from memformer.core.numerics import repeat_heads
from memformer.core.similarity import Kernel, similarity
from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Bool, Float, Int
from memformer.ops.attention import recurrent
from memformer.ops.attention.arguments import write_operands
from memformer.ops.attention.cache import offset, place
from memformer.pallas import attention as pallas
from memformer.pallas.decoding import MOST_TOKENS
from memformer.pallas.platform import chip
from memformer.pallas.sharding import key_head_repeats

__all__ = ["complete", "decodes", "deltaformer", "softmax_attention"]

# Fields of a call that hold arrays.
ARRAYS = ("q", "k", "v", "w", "alpha", "beta", "decay", "sinks", "mask", "cache")

# Products of the tokens of a call with each other are a few numbers.
HIGHEST = jax.lax.Precision.HIGHEST


def decodes(call: AttentionCall) -> bool:
    """Whether a call is for the kernel of a few tokens, if there is one for this chip."""
    length, cache = call.q.shape[1], call.cache
    if chip() not in ("tpu", "gpu") or cache is None or not cache.fixed or is_symbolic(length):
        return False
    return length <= MOST_TOKENS


def complete(call: AttentionCall) -> tuple[str, ...]:
    """Implementations that have every derivative of a call, see `dispatch`."""
    return ("recurrent", "pallas") if decodes(call) else ("recurrent",)


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention by a kernel.

    Returns:
      The output in float32 (in bfloat16 from the kernels of many tokens where v is).

    Raises:
      NotImplementedError: no kernel serves the call, or the chip; the message names the implementation that does.
    """
    if not decodes(call):
        return pallas.softmax_attention(call)
    return _differentiable(call, _decode, recurrent.softmax_attention)


def deltaformer(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer by a kernel.

    Returns:
      The output in float32 (in bfloat16 from the kernels of many tokens where v is), and u.

    Raises:
      NotImplementedError: see `softmax_attention`.
    """
    if not decodes(call):
        return pallas.deltaformer(call)
    return _differentiable(call, _decode_deltaformer, recurrent.deltaformer)


def _differentiable(call: AttentionCall, kernel: Callable[[AttentionCall], Any], reference: Callable) -> Any:
    """The results of a kernel, with the derivatives of a reference."""
    fixed: Any = dataclasses.replace(call, **dict.fromkeys(ARRAYS))

    def restore(arrays):
        return dataclasses.replace(fixed, **dict(zip(ARRAYS, arrays, strict=True)))

    @jax.custom_jvp
    def decode(arrays):
        return kernel(restore(arrays))

    @decode.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda arrays: reference(restore(arrays)), primals, tangents)

    return decode([getattr(call, name) for name in ARRAYS])


def _over(x: Array | None, rows: tuple[int, ...]) -> Array | None:
    """An array of all rows of the batch, of one for all."""
    return None if x is None else jnp.broadcast_to(x, (rows[0], x.shape[1]))


def _first_slot(call: AttentionCall, rank: Array | None, used: Array) -> Int[Array, "B T"] | None:
    """The first slot within the window of each query; ranks [B, S] of the slots in use grow with time."""
    if call.window is None or rank is None:
        return None
    slots = jnp.arange(rank.shape[1], dtype=jnp.int32)
    old = call.mask.query_rank - jnp.int32(call.window)
    behind = (rank[:, None] <= old[:, :, None]) & (slots < used)[None, None]
    return _over(jnp.sum(behind, axis=2, dtype=jnp.int32), call.q.shape[:2])


def _decode(call: AttentionCall) -> Array:
    cache, mask, rows, kernel = call.cache, call.mask, call.q.shape[:2], call.read_kernel
    placed, start = recurrent.place_mask(call)
    slots = start + jnp.arange(rows[1], dtype=jnp.int32)
    repeats = key_head_repeats(call.k.shape[2], call.q.shape[2])
    read = pallas.CacheRead(
        q=call.q,
        k=repeat_heads(place(cache, cache.k, call.k), repeats),
        v=repeat_heads(place(cache, cache.v, call.v), repeats),
        used=start + rows[1],
        key_segment=_over(placed.key_segment, rows),
        query_segment=_over(mask.query_segment, rows),
        # The slots behind one token are not in use.
        last_slot=None if rows[1] == 1 else jnp.broadcast_to(slots[None], rows),
        first_slot=_first_slot(call, placed.key_rank, start + rows[1]),
        similarities=(kernel,),
        kinds=(0,) * (call.q.shape[2] // (call.k.shape[2] * repeats)),
        decay=None if call.decay is None else (call.decay, recurrent.place_decay(call)),
        precision=call.precision,
    )
    return _normalize(*pallas.decode(call.op, read), call.sinks)


def _normalize(top: Array, total: Array, value: Array, sinks: Array | None) -> Array:
    """The weighted mean of values, [B, T, H, V]; with a slot of value 0 whose logit per head is the sink, if any."""
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    if sinks is None:
        return value / total[..., None]
    heads = sinks.astype(top.dtype).reshape(-1, 1, sinks.shape[-1])
    return value * (jax.nn.sigmoid(top + jnp.log(total) - heads) / total)[..., None]


class _Pairs(NamedTuple):
    """Pairs of tokens of a call: whether the first sees the second, and the log decay between them, 0 elsewhere."""

    seen: Bool[Array, "B t s #H"]
    gap: Float[Array, "B t s H"] | None


def _pairs(call: AttentionCall) -> _Pairs:
    mask, length = call.mask, call.k.shape[1]
    token = jnp.arange(length, dtype=jnp.int32)
    seen = (token[None] <= token[:, None])[None] & (mask.query_segment[:, :, None] == mask.key_segment[:, None])
    if call.window is not None:
        seen &= mask.query_rank[:, :, None] - mask.key_rank[:, None] < call.window
    seen = seen[..., None]
    if call.decay is None:
        return _Pairs(seen, None)
    gap = CumulativeDecay(*(x[:, :, None] for x in call.decay)).since(
        CumulativeDecay(*(x[:, None] for x in call.decay))
    )
    seen &= gap > FORGOTTEN_PAIR
    return _Pairs(seen, jnp.where(seen, gap, jnp.zeros_like(gap)))


class _Read(NamedTuple):
    """Reads of rows: the part of the cache, weights of the call's tokens, and for a softmax their sum and maximum.

    Heads follow the tokens: [B, T, h, V], [B, T, T, h] and [B, T, h].
    """

    cached: Array
    weights: Array
    total: Array
    top: Array


def _join(kernel: Kernel, sums: pallas.CacheSums, scores: Array, seen: Array, gap: Array | None) -> _Read:
    """Adds the tokens of a call to what was read from the cache; scores [B, t, s, h] are inner products."""
    top, total, value = sums
    scores = scores * kernel.scale
    if not kernel.normalized:
        # Masked scores are cleared first: their exponential may be infinite.
        weights = jnp.where(seen, similarity(kernel, jnp.where(seen, scores, jnp.zeros_like(scores))), 0.0)
        return _Read(value, weights if gap is None else weights * jnp.exp(gap), total, top)
    logits = jnp.where(seen, scores if gap is None else scores + gap, jnp.finfo(scores.dtype).min)
    joint = jnp.maximum(top, jnp.max(logits, axis=2))
    weights = jnp.where(seen, jnp.exp(logits - joint[:, :, None]), 0.0)
    factor = jnp.exp(top - joint)
    return _Read(factor[..., None] * value, weights, factor * total + jnp.sum(weights, axis=2), joint)


def _decode_deltaformer(call: AttentionCall) -> tuple[Array, Array]:
    cache, mask, rows = call.cache, call.mask, call.k.shape[:2]
    (heads, groups), width = (call.q.shape[2], call.k.shape[2]), call.q.shape[3]
    w, target, beta = write_operands(call)
    # A row that writes and those that read, of each key head.
    q = call.q.reshape(*rows, groups, -1, width)
    queries = jnp.concatenate([w.astype(q.dtype)[:, :, :, None], q], axis=3)
    per_head = queries.shape[3]
    same = call.write_kernel == call.read_kernel
    decay = None
    if call.decay is not None:
        decay = (call.decay, CumulativeDecay(cache.decay_whole, cache.decay_fraction))
    read = pallas.CacheRead(
        q=queries.reshape(*rows, -1, width),
        # With the keys of the call, so that the cache is written before it is read, in place.
        k=place(cache, cache.k, call.k),
        v=cache.values,
        used=offset(cache, rows[1]),
        # Those slots are not valid yet.
        key_segment=_over(mask.cache_segment, rows),
        query_segment=_over(mask.query_segment, rows),
        last_slot=None,
        first_slot=_first_slot(call, mask.cache_rank, offset(cache, rows[1])),
        similarities=(call.read_kernel,) if same else (call.read_kernel, call.write_kernel),
        kinds=(0 if same else 1, *(0,) * (per_head - 1)),
        decay=decay,
        precision=call.precision,
    )
    sums = [x.reshape(*rows, groups, per_head, *x.shape[3:]) for x in pallas.decode(call.op, read)]
    write, reads = (pallas.CacheSums(*(x[:, :, :, at] for x in sums)) for at in (0, slice(1, None)))
    reads = pallas.CacheSums(*(x.reshape(*rows, heads, *x.shape[4:]) for x in reads))
    pairs, wide = _pairs(call), [x.astype(target.dtype) for x in (call.k, w, q)]
    k, w, q = wide
    scores = jnp.einsum("btgk,bsgk->btsg", w, k, precision=HIGHEST)
    earlier = pairs.seen & jnp.asarray(np.tri(rows[1], k=-1, dtype=bool))[None, :, :, None]
    u = _write(call.write_kernel, _join(call.write_kernel, write, scores, earlier, pairs.gap), target, beta)
    scores = jnp.einsum("btgrk,bsgk->btsgr", q, k, precision=HIGHEST).reshape(*rows, rows[1], heads)
    seen, gap = (x if x is None or x.shape[3] == 1 else jnp.repeat(x, heads // groups, axis=3) for x in pairs)
    found = _join(call.read_kernel, reads, scores, seen, gap)
    weights = found.weights.reshape(*rows, rows[1], groups, -1)
    own = jnp.einsum("btsgr,bsgv->btgrv", weights, u, precision=HIGHEST).reshape(*rows, heads, -1)
    if not call.read_kernel.normalized:
        return found.cached + own, u
    return _normalize(found.top, found.total, found.cached + own, call.sinks), u


def _write(kernel: Kernel, read: _Read, target: Array, beta: Array) -> Float[Array, "B T G V"]:
    """u of the tokens of a call, one after the other."""
    if kernel.normalized:
        beta = beta / jnp.where(read.total > 0, read.total, jnp.ones_like(read.total))
    written: list[Array] = []
    for t in range(target.shape[1]):
        erased = read.cached[:, t]
        for s, u in enumerate(written):
            erased = erased + read.weights[:, t, s, :, None] * u
        written.append(target[:, t] - beta[:, t, :, None] * erased)
    return jnp.stack(written, axis=1)
