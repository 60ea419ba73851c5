"""Matrix memories by Pallas kernels: one entry for every op of the family and every chip."""

import dataclasses

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.numerics import repeat_heads
from memformer.core.types import Array, Float
from memformer.pallas.checks import check_matrix_call
from memformer.pallas.platform import chip
from memformer.pallas.sharding import key_head_repeats

__all__ = ["decode", "run"]


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a matrix memory by the kernels of the chip that this trace is for; a TPU's where it is for none.

    Returns:
      The output in float32, or in 16 bits where q, k and v have so many, and the state.

    Raises:
      NotImplementedError: no kernel serves the call, or the chip; the message names the implementation that does.
    """
    # Imported late: the kernels of the other chip, and Pallas itself where no kernel is asked for, are never loaded.
    channels = call.decay_per_channel or call.w is not None or call.alpha is not None
    if chip() == "gpu" and (channels or call.q.dtype == jnp.float16):
        from memformer.pallas.gpu.matrix_memory.channel_decay import run as kernels
    elif chip() == "gpu":
        from memformer.pallas.gpu.matrix_memory.chunk_scan import run as kernels
    elif channels:
        from memformer.pallas.tpu.matrix_memory.channel_decay import run as kernels
    elif call.beta is None:
        from memformer.pallas.tpu.matrix_memory.linear_attention import run as kernels
    else:
        from memformer.pallas.tpu.matrix_memory.delta_rule import run as kernels
    call = _repeat_key_heads(call, key_head_repeats(call.q.shape[2], call.v.shape[2]))
    output, state = kernels(_one_write_per_token(call))
    return output[:, call.writes - 1 :: call.writes], state


def decode(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a few tokens of a matrix memory by the kernel of the chip that this trace is for, as `run`; no derivative.

    Returns:
      The output and the state, in float32.

    Raises:
      NotImplementedError: as `run`.
    """
    check_matrix_call(call)
    if chip() == "gpu":
        from memformer.pallas.gpu.matrix_memory.decoding import run as kernel
    else:
        from memformer.pallas.tpu.matrix_memory.decoding import run as kernel
    return kernel(_repeat_key_heads(call, key_head_repeats(call.q.shape[2], call.v.shape[2])))


def _repeat_key_heads(call: MatrixCall, repeats: int) -> MatrixCall:
    q, k, w = (x if x is None else repeat_heads(x, repeats) for x in (call.q, call.k, call.w))
    return dataclasses.replace(call, q=q, k=k, w=w)


def _one_write_per_token(call: MatrixCall) -> MatrixCall:
    """Makes every write a token: the first write of a token decays the state, the last one reads."""
    if call.writes == 1:
        return call
    writes, segments = call.writes, call.segments
    if segments is not None:
        segments = type(segments)(*(jnp.repeat(x, writes, axis=1) for x in segments))
    q, decay = _place(call.q, writes, writes - 1), call.decay
    decay = None if decay is None else _place(decay, writes, 0)
    return dataclasses.replace(call, q=q, decay=decay, segments=segments, writes=1)


def _place(x: Array, writes: int, at: int) -> Array:
    """[B, T, ...] to [B, T * writes, ...]: x at one write of each token, 0 at the others."""
    wide = jnp.zeros((*x.shape[:2], writes, *x.shape[2:]), x.dtype)
    return wide.at[:, :, at].set(x).reshape(x.shape[0], -1, *x.shape[2:])
