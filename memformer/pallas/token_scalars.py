"""Scalars per token and head that enter the kernels of matrix memories: decay, write strength, segment.

beta       strength of the write
alpha      strength of the write where it is not beta's, which then erases
decay_in   factor on the state that enters the chunk, as this token reads it; the last token's is the decay of the
           state over the whole chunk
decay_out  factor on this token's write in the state that leaves the chunk
whole, fraction
           cumulative log decay since the start of the chunk, as the sum of two (core/decay.py): their differences are
           exact next to a token that forgets everything
segment    index of the token's segment
"""

from collections.abc import Callable

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.decay import cumulative_decay
from memformer.core.segments import pad_time
from memformer.core.types import Array, Float
from memformer.pallas.config import BaseScanConfig

__all__ = ["token_scalars"]


def token_scalars(
    config: BaseScanConfig, call: MatrixCall, sums: Callable[..., Array] = jnp.cumsum
) -> dict[str, Float[Array, "B H N C"]]:
    """The scalars of a call in float32, by name; only those that the call has.

    Args:
      config: sizes.
      call: one write per token.
      sums: see `cumulative_decay`.
    """
    shape = (config.batch, config.heads, config.chunks, config.chunk)

    def by_chunk(x):
        # Transposed once, here: all that follows keeps the tokens of a chunk side by side.
        return jnp.swapaxes(pad_time(x.astype(jnp.float32), config.chunk), 1, 2).reshape(shape)

    decay_in = decay_out = jnp.ones(shape, jnp.float32)
    scalars = {} if call.beta is None else {"beta": by_chunk(call.beta)}
    if call.alpha is not None:
        scalars["alpha"] = by_chunk(call.alpha)
    if config.decay:
        decay = cumulative_decay(by_chunk(call.decay), axis=3, sums=sums)
        scalars |= {"whole": decay.whole, "fraction": decay.fraction}
        decay_in, decay_out = jnp.exp(decay.total()), jnp.exp(decay[..., -1:].since(decay))
    if call.segments is not None:
        # Padding at the end belongs to the last segment, so that the returned state is that segment's.
        index = call.segments.index
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % config.chunk)), mode="edge")
        index = index.reshape(config.batch, 1, config.chunks, config.chunk)
        last = index[..., -1:]
        before = jnp.pad(last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        decay_in *= (index == before).astype(jnp.float32)
        decay_out *= (index == last).astype(jnp.float32)
        scalars["segment"] = jnp.broadcast_to(index, shape).astype(jnp.float32)
    return scalars | {"decay_in": decay_in, "decay_out": decay_out}
