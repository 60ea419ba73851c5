"""Matrix memories in the chunkwise form on Hopper: the order of all kernels, and their gradients.

Forward: intra-chunk terms for all chunks in parallel (intra_chunk.py), then the scan over chunks (scan_kernels.py),
with few heads in parts (time_parts.py). Backward: the reverse scan gives the gradients that flow through the state; the
rest is parallel over chunks again (intra_chunk_backward.py). Saved: the inputs, P, X, W and the state that enters each
chunk, or the inputs alone (`remat`). Arrays stay as the call has them, [B, T, H, K].

With S the state that enters a chunk, P and X from intra_chunk.py, c, b and w the token scalars decay_in, beta and
decay_out, s the scale, the forward scan computes

    W = X (V - c K S)      U = b W      O = s c Q S + P U      S' = c_C S + K^T (w U)

and the backward scan, from the last chunk to the first, with dS and dS' the gradients of S and S',

    dV = X^T b (P^T dO + w K dS')       dS = c_C dS' + Q^T (s c dO) - K^T (c dV)

Where writes add, X and b are one, W = V and the last term is absent.

What cancels when keys repeat (X times the difference, P U, K^T U, and their gradients) takes its float32 operands as
sums of two bfloat16 parts, 16 bits. With identical keys and beta 2, single bfloat16 operands lost 11% of the output in
128 tokens. K S, Q S and K dS' take one part of the state: in 512 tokens that is 2e-3 of the state at beta 1 and 4e-3 at
beta 2 for random keys, less for repeated ones.

Source: arXiv 2406.06484 (chunkwise delta rule), 2312.06635 (linear attention), 2412.06464 and 2405.21060 (per-head
decay).
"""

import functools

import jax
import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.documents import restore
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.matrix_memory.config import ScanConfig, align_documents, plan_call, take
from memformer.pallas.gpu.matrix_memory.intra_chunk import intra_chunk
from memformer.pallas.gpu.matrix_memory.intra_chunk_backward import intra_chunk_backward
from memformer.pallas.gpu.matrix_memory.scan_kernels import scan_backward, scan_forward
from memformer.pallas.gpu.matrix_memory.time_parts import part_gradients, part_states
from memformer.pallas.gpu.matrix_memory.token_scalars import stack_scalars
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

# Where the heads are: in arrays over time, and in all others.
TIME, OTHER = 2, 1

# The kernels hold the transposes of states.
swap = functools.partial(jnp.swapaxes, axis1=-2, axis2=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(config: ScanConfig, q, k, v, scalars, start, spans):
    return _forward(config, False, q, k, v, scalars, start, spans)[:2]


def _chunkwise_forward(config, q, k, v, scalars, start, spans):
    if config.remat == "inputs":
        return _chunkwise(config, q, k, v, scalars, start, spans), (q, k, v, scalars, start, spans)
    o, end, *saved = _forward(config, True, q, k, v, scalars, start, spans)
    return (o, end), (q, k, v, scalars, saved, spans)


def _chunkwise_backward(config, inputs, cotangents):
    q, k, v, scalars, saved, spans = inputs
    do, dend = cotangents
    if config.remat == "inputs":
        saved = _forward(config, True, q, k, v, scalars, saved, spans)[2:]
    operands = (TIME,) * 4 + (OTHER,) * (3 + 2 * config.beta) + (TIME,) * (2 * config.beta)
    kernels = split_batch_and_heads(
        _backward_kernels,
        (config,),
        config.axes,
        operands=(*operands, *(OTHER,) * len(scalars), *(None,) * len(spans)),
        results=(TIME,) * 3 + (OTHER,) * (1 + len(scalars)),
    )
    dq, dk, dv, dstart, *dscalars = kernels(q, k, v, do, dend, *saved, *scalars, *spans)
    return dq, dk, dv, tuple(dscalars), dstart, None


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def _forward(config: ScanConfig, save: bool, q, k, v, scalars, start, spans) -> tuple[Array, ...]:
    """O, the last state and, to be saved, P, X, the states that enter chunks, and W."""
    squares = 1 + 2 * config.beta
    kernels = split_batch_and_heads(
        _forward_kernels,
        (config, save),
        config.axes,
        operands=(*(TIME,) * 3, *(OTHER,) * (1 + len(scalars)), *(None,) * len(spans)),
        results=(TIME, OTHER) + ((OTHER,) * (squares + 1) + (TIME,) * (2 * config.beta)) * save,
    )
    return tuple(kernels(q, k, v, start, *scalars, *spans))


def _forward_kernels(config: ScanConfig, save: bool, q, k, v, start, *rest) -> tuple[Array, ...]:
    """One device's shard of `_forward`; rest: the token scalars, and the chunks of documents."""
    config = config.local(q, v)
    scalars, spans = take(rest, bool(config.scalars))
    qk, inverse = intra_chunk(config, q, k, scalars)
    starts = swap(start) if spans else part_states(config, k, v, inverse, scalars, swap(start))
    o, ends, *saved = scan_forward(config, save, q, k, v, qk, inverse, scalars, starts, spans)
    end = swap(ends if spans else ends[:, :, -1])
    return (o, end, qk, *inverse, *saved) if save else (o, end)


def _backward_kernels(config: ScanConfig, q, k, v, do, dend, qk, *rest) -> tuple[Array, ...]:
    """One device's shard of the gradients.

    Args:
      config: sizes.
      q, k, v, do, dend, qk: see `scan_backward`.
      *rest: X, the states that enter chunks, W, the token scalars and the chunks of documents.
    """
    config, parts = config.local(q, v), 2 * config.beta
    inverse, (states,), w, scalars, spans = take(rest, parts, 1, parts, bool(config.scalars))
    dends = swap(dend) if spans else part_gradients(config, q, k, do, qk, inverse, scalars, swap(dend))
    dv, dstates, dstarts = scan_backward(config, True, q, k, do, qk, inverse, scalars, dends, spans)
    values = (w, (dv,)) if config.beta else ((v,), ())
    dq, dk, dscalars = intra_chunk_backward(config, q, k, do, *values, states, dstates, scalars)
    return (dq, dk, dv, swap(dstarts if spans else dstarts[:, :, 0]), *dscalars)


def run(call: MatrixCall, remat: str = tuning.REMAT[0]) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the delta rule, or linear attention where the call has no beta; one write per token.

    Args:
      call: one write per token.
      remat: see `ScanConfig`.

    Returns:
      The output in bfloat16, and the state in float32.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    config = plan_call(call, remat)
    call, documents, spans = align_documents(config, call)
    length, key, value = call.q.shape[1], call.q.shape[-1], call.v.shape[-1]

    def pad(x, width):
        return pad_time(pad_time(x, config.chunk), width, axis=3)

    q, k, v = pad(call.q, config.key), pad(call.k, config.key), pad(call.v, config.value)
    scalars = stack_scalars(config, call)
    state = pad_time(pad_time(call.state.astype(jnp.float32), config.key, axis=-2), config.value, axis=-1)
    o, end = _chunkwise(config, q, k, v, scalars, vary_like(state, q, k, v, *scalars), spans)
    o, end = o[:, :length, :, :value], end[..., :key, :value]
    return (o, end) if documents is None else restore(documents, o, end)
