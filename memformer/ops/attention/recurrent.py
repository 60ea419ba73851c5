"""The recurrent form of the attention ops: one query at a time, one row of scores each."""

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.decay import FORGOTTEN_PAIR, CumulativeDecay
from memformer.core.mask import Mask
from memformer.core.numerics import accumulation_dtype, masked_softmax
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, similarity
from memformer.core.types import Array, Bool, Float
from memformer.ops.attention.arguments import write_operands
from memformer.ops.attention.cache import offset, place

__all__ = ["deltaformer", "place_decay", "place_mask", "softmax_attention"]


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Reads the cache and the tokens at each query in turn; the output is in the accumulation dtype."""
    cache = call.cache
    cached_k, cached_v = (None, None) if cache is None else (cache.k, cache.values)
    k, v = place(cache, cached_k, call.k), place(cache, cached_v, call.v)
    mask, start = place_mask(call)
    decay = place_decay(call)

    def step(_, inputs):
        t, q = inputs
        seen = _row_mask(call, mask, start, k.shape[1], t)
        gap, seen = _row_gap(call, decay, start, seen, t)
        return None, _read_row(call.read_kernel, call.precision, seen, gap, q, k, v, call.sinks)

    tokens = jnp.arange(call.q.shape[1], dtype=jnp.int32)
    _, output = lax.scan(step, None, (tokens, jnp.moveaxis(call.q, 1, 0)))
    return jnp.moveaxis(output, 0, 1)


def deltaformer(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Writes and reads token by token.

    Returns:
      The output and u, in the accumulation dtype.
    """
    cache, q = call.cache, call.q
    w, target, beta = write_operands(call)
    cached_k, cached_u = (None, None) if cache is None else (cache.k, cache.values)
    k, u = place(cache, cached_k, call.k), place(cache, cached_u, jnp.zeros_like(target))
    mask, start = place_mask(call)
    decay, slots = place_decay(call), k.shape[1]

    def step(u, inputs):
        t, q, w, target, beta = inputs
        seen = _row_mask(call, mask, start, slots, t)
        gap, seen = _row_gap(call, decay, start, seen, t)
        own = start + t
        earlier = seen & (jnp.arange(slots, dtype=jnp.int32)[None, None] < own)
        new = target - beta[..., None] * _read_row(call.write_kernel, call.precision, earlier, gap, w, k, u)
        u = lax.dynamic_update_slice_in_dim(u, new[:, None].astype(u.dtype), own, axis=1)
        return u, (_read_row(call.read_kernel, call.precision, seen, gap, q, k, u, call.sinks), new)

    tokens = jnp.arange(q.shape[1], dtype=jnp.int32)
    inputs = (tokens, *(jnp.moveaxis(x, 1, 0) for x in (q, w, target, beta)))
    _, (output, new) = lax.scan(step, vary_like(u, q, k, w, target, beta), inputs)
    return jnp.moveaxis(output, 0, 1), jnp.moveaxis(new, 0, 1)


def place_mask(call: AttentionCall) -> tuple[Mask, Array]:
    """The mask with keys of the tokens in their slots of the cache, and the slot of the first token."""
    mask, cache = call.mask, call.cache
    if mask.key_segment is not None:
        mask = mask._replace(key_segment=place(cache, mask.cache_segment, mask.key_segment))
    if mask.key_rank is not None:
        mask = mask._replace(key_rank=place(cache, mask.cache_rank, mask.key_rank))
    return mask, offset(cache, call.k.shape[1])


def _row_mask(call: AttentionCall, mask: Mask, start: Array, slots: int, t: Array) -> Bool[Array, "b S"]:
    """True for slots that query t sees; its own slot counts among them."""
    seen = jnp.ones((1, slots), bool)
    if call.causal:
        seen = jnp.arange(slots, dtype=jnp.int32)[None] <= start + t
    if mask.key_segment is not None:
        seen &= mask.key_segment == _token(mask.query_segment, t)
    if call.window is not None:
        distance = _token(mask.query_rank, t) - mask.key_rank
        seen &= (distance if call.causal else jnp.abs(distance)) < call.window
    return seen


def place_decay(call: AttentionCall) -> CumulativeDecay | None:
    """The cumulative decays of all slots."""
    if call.decay is None or call.cache is None:
        return call.decay
    cache = call.cache
    return CumulativeDecay(
        place(cache, cache.decay_whole, call.decay.whole), place(cache, cache.decay_fraction, call.decay.fraction)
    )


def _row_gap(
    call: AttentionCall, decay: CumulativeDecay | None, start: Array, seen: Bool[Array, "b S"], t: Array
) -> tuple[Float[Array, "B H S"] | None, Bool[Array, "b h S"]]:
    """The decay from each slot to query t, 0 where masked, and what the query sees in spite of it."""
    seen = seen[:, None]
    if decay is None:
        return None, seen
    query = CumulativeDecay(*(_token(x, t) for x in call.decay))
    gap = jnp.swapaxes(query.since(decay), 1, 2)
    own = jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, None] == start + t
    seen = seen & (gap > FORGOTTEN_PAIR)
    return jnp.where(seen & ~own, gap, jnp.zeros((), gap.dtype)), seen


def _token(x: Array, t: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, t, 1, axis=1)


def _read_row(
    kernel: Kernel,
    precision: lax.Precision,
    mask: Bool[Array, "b h S"],
    gap: Float[Array, "B h S"] | None,
    q: Float[Array, "B H K"],
    k: Float[Array, "B S G K"],
    values: Float[Array, "B S G V"],
    sinks: Float[Array, "#B H"] | Float[Array, "H"] | None = None,
) -> Float[Array, "B H V"]:
    """One token's read, in the accumulation dtype."""
    dtype = accumulation_dtype(q, k, values)
    q, k, values = (x.astype(dtype) for x in (q, k, values))
    groups = k.shape[2]
    q = q.reshape(q.shape[0], groups, -1, q.shape[2])
    scores = jnp.einsum("bgrk,bsgk->bgrs", q, k, precision=precision) * kernel.scale
    # Heads h of the mask and the decay are 1, G or H.
    mask = mask[:, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], groups, -1, mask.shape[2])
    if gap is not None:
        gap = gap.astype(dtype).reshape(gap.shape[0], groups, -1, gap.shape[2])
    if kernel.normalized:
        scores = scores if gap is None else scores + gap
        weights = _softmax(scores, jnp.broadcast_to(mask, scores.shape), sinks)
    else:
        zero = jnp.zeros((), dtype)
        # Masked scores are cleared before the similarity too: an infinite exponential there would spoil gradients.
        weights = jnp.where(mask, similarity(kernel, jnp.where(mask, scores, zero)), zero)
        weights = weights if gap is None else weights * jnp.exp(gap)
    output = jnp.einsum("bgrs,bsgv->bgrv", weights, values, precision=precision)
    return output.reshape(output.shape[0], -1, output.shape[3])


def _softmax(scores: Array, mask: Array, sinks: Array | None) -> Float[Array, "B G R S"]:
    """Softmax over the slots that are seen and, per head, a sink without a slot."""
    if sinks is None:
        return masked_softmax(scores, mask)
    sinks = sinks.astype(scores.dtype).reshape(-1, *scores.shape[1:3], 1)
    sinks = jnp.broadcast_to(sinks, (*scores.shape[:3], 1))
    scores = jnp.concatenate([scores, sinks], axis=-1)
    return masked_softmax(scores, jnp.concatenate([mask, jnp.ones(sinks.shape, bool)], axis=-1))[..., :-1]
