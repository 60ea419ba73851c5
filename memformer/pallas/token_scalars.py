"""Scalars per token and head that enter the kernels of matrix memories: decay, write strength, segment.

beta       strength of the write
decay_in   factor on the state that enters the chunk, as this token reads it; the last token's is the decay of the
           state over the whole chunk
decay_out  factor on this token's write in the state that leaves the chunk
log_decay  cumulative log decay since the start of the chunk
segment    index of the token's segment
"""

import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.segments import pad_time
from memformer.core.types import Array, Float
from memformer.pallas.config import BaseScanConfig

__all__ = ["token_scalars"]


def token_scalars(config: BaseScanConfig, call: MatrixCall) -> dict[str, Float[Array, "B N C H"]]:
    """The scalars of a call in float32, by name; beta, log_decay and segment only where the call has them."""
    shape = (config.batch, config.chunks, config.chunk, config.heads)

    def by_chunk(x):
        return pad_time(x.astype(jnp.float32), config.chunk).reshape(shape)

    decay_in = decay_out = jnp.ones(shape, jnp.float32)
    scalars = {} if call.beta is None else {"beta": by_chunk(call.beta)}
    if call.decay is not None:
        total = scalars["log_decay"] = jnp.cumsum(by_chunk(call.decay), axis=2)
        decay_in, decay_out = jnp.exp(total), jnp.exp(total[:, :, -1:] - total)
    if call.segments is not None:
        # Padding at the end belongs to the last segment, so that the returned state is that segment's.
        index = call.segments.index
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % config.chunk)), mode="edge").reshape(shape[:3])
        last = index[:, :, -1]
        before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
        decay_in *= (index == before[:, :, None]).astype(jnp.float32)[..., None]
        decay_out *= (index == last[:, :, None]).astype(jnp.float32)[..., None]
        scalars["segment"] = jnp.broadcast_to(index[..., None], shape).astype(jnp.float32)
    return scalars | {"decay_in": decay_in, "decay_out": decay_out}
