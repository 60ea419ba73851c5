"""Softmax attention on Hopper."""

from memformer.core.calls import AttentionCall
from memformer.core.types import Array, Float
from memformer.pallas.gpu.attention.deltaformer import attention
from memformer.pallas.mask import sight_of

__all__ = ["run"]


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs a call of softmax attention."""
    return attention(
        call.q,
        call.k,
        call.v,
        kernel=call.read_kernel,
        scale=call.read_kernel.scale,
        sight=sight_of(call.mask),
        held=None if call.cache is None else (call.cache.k, call.cache.values),
        chunk_size=call.chunk_size,
        precision=call.precision,
        op=call.op,
    )
