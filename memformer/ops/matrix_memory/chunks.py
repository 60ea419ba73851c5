"""All chunks of a call at once, and its tokens one by one, for memories whose state is more than one matrix."""

from typing import NamedTuple

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.decay import cumulative_decay, decay_to_end
from memformer.core.numerics import repeat_heads
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.ops.matrix_memory.groups import ChunkScan, Inputs, flatten, make_masks, to_chunks, to_time
from memformer.ops.matrix_memory.scores import decayed_scores

__all__ = ["Chunks", "by_time", "load_chunks", "refuse_kernel", "resets", "split_chunks", "unsplit_chunks"]


class Chunks(NamedTuple):
    """Arrays of M chunks in the accumulation dtype, with decays per head; no exponent used is positive.

    Attributes:
      q, k: [M, B, H, C, K].
      v: [M, B, H, C, V].
      beta: [M, B, H, C, 1], or None.
      pairs: [M, B, H, C, C] exp(G_r - G_i), 0 for later tokens i and those of other segments.
      decay_in: [M, B, H, C, 1] exp(G), 0 for tokens of a segment that started inside the chunk.
      decay_out: [M, B, H, C, 1] exp(G_C - G), 0 for tokens of a segment that ended inside the chunk.
      chunk_decay: [M, B, H, 1, 1] exp(G_C), 0 where a segment started inside the chunk.
    """

    q: Array
    k: Array
    v: Array
    beta: Array | None
    pairs: Array
    decay_in: Array
    decay_out: Array
    chunk_decay: Array


def load_chunks(call: MatrixCall, size: int) -> Chunks:
    """Cuts a call without erase vectors and with decays per head into chunks of `size` tokens."""
    repeats = call.v.shape[2] // call.q.shape[2]
    decay = jnp.zeros_like(call.v[..., 0], dtype=call.state.dtype) if call.decay is None else call.decay
    beta = None if call.beta is None else call.beta[..., None]
    q, k = repeat_heads(call.q, repeats), repeat_heads(call.k, repeats)
    arrays = (q, k, call.v, None, None, beta, decay[..., None])
    inputs = Inputs(*(None if x is None else vary_like(x, *arrays, call.state) for x in arrays))
    plan = ChunkScan(size, 1, 1, call.scale, call.precision)
    flat, segments = flatten(plan, inputs, None if call.segments is None else call.segments.index)
    dtype = call.state.dtype
    group = Inputs(*(None if x is None else _cut(f, x, size).astype(dtype) for f, x in zip(flat, inputs, strict=True)))
    masks = None if segments is None else make_masks(tuple(x[:, 0] for x in segments), dtype)
    sums = cumulative_decay(group.decay)
    ones = jnp.ones_like(group.decay)
    pairs, _ = decayed_scores(ones, ones, None, sums, None if masks is None else masks.same, call.precision)
    decay_in, decay_out = jnp.exp(sums.total()), jnp.exp(decay_to_end(group.decay))
    chunk_decay = decay_in[..., -1:, :]
    if masks is not None:
        decay_in, decay_out = decay_in * masks.decay_in, decay_out * masks.decay_out
        chunk_decay = chunk_decay * masks.chunk_decay
    return Chunks(group.q, group.k, group.v, group.beta, pairs, decay_in, decay_out, chunk_decay)


def split_chunks(x: Array, size: int, like: Array) -> Array:
    """[B, T, H, width] to chunks [M, B, H, C, width] in the dtype of `like`; missing tokens are 0."""
    return _cut(pad_time(x.reshape(*x.shape[:2], -1), size), x, size).astype(like.dtype)


def _cut(flat: Array, like: Array, size: int) -> Array:
    return to_chunks(flat.reshape(flat.shape[0], -1, *like.shape[2:]), flat.shape[1] // size)


def unsplit_chunks(x: Array, tokens: int) -> Array:
    """[M, B, H, C, width] to [B, T, H, width]."""
    return to_time(x)[:, :tokens]


def by_time(x: Array, repeats: int = 1) -> Array:
    """[B, T, G, ...] to [T, B, H, ...]."""
    return jnp.moveaxis(repeat_heads(x, repeats), 1, 0)


def resets(call: MatrixCall) -> Array | None:
    """[T, B], whether a segment starts at a token, the first of the call aside; None where nothing is packed."""
    if call.segments is None:
        return None
    index = call.segments.index
    return jnp.moveaxis(jnp.diff(index, axis=1, prepend=jnp.zeros_like(index[:, :1])) != 0, 1, 0)


def refuse_kernel(call: MatrixCall) -> tuple[Array, Array]:
    """Raises NotImplementedError: no chip has a kernel of the op."""
    raise NotImplementedError(f"{call.op} has no kernel; implementation='chunked' or 'recurrent' serves")
