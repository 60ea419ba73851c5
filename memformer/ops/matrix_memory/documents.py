"""States per document: every document of a packed row starts from its own state and leaves one.

A state is then [B, P, H, K, V], with one place per document of a row. The chunked form moves every document to the
start of a chunk, so that a chunk has one document and one state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float, Int
from memformer.ops.matrix_memory.groups import ChunkScan, Inputs

__all__ = ["align", "put", "take", "take_tokens"]


def take(states: Array, document: Int[Array, "B"] | None) -> Array:
    """The state of one document per row [B, H, K, V]; None where `states` is that already."""
    if document is None:
        return states
    return jax.vmap(lambda x, p: lax.dynamic_index_in_dim(x, p, 0, keepdims=False))(states, document)


def put(states: Array, document: Int[Array, "B"] | None, state: Array) -> Array:
    """`states` with that of one document per row replaced."""
    if document is None:
        return state
    return jax.vmap(lambda x, p, new: lax.dynamic_update_index_in_dim(x, new, p, 0))(states, document, state)


def align(plan: ChunkScan, inputs: Inputs, index: Int[Array, "B T"] | None, count: int):
    """Moves the tokens of a call, so that every document starts a chunk.

    Args:
      plan: static settings.
      inputs: of the call.
      index: segment of each token; None is 0.
      count: P, documents per row.

    Returns:
      The inputs at their new places with zeros between, the document of each chunk [N, B], and the place of each
      token [B, T].
    """
    batch, length = inputs.q.shape[:2]
    index = jnp.zeros((batch, length), jnp.int32) if index is None else index
    tokens = jnp.sum(index[:, :, None] == jnp.arange(count, dtype=jnp.int32)[None, None], axis=1, dtype=jnp.int32)
    chunks = -(-tokens // plan.size)
    ends, last = jnp.cumsum(chunks, axis=1), jnp.cumsum(tokens, axis=1)
    shift = (ends - chunks) * plan.size - (last - tokens)
    places = jnp.arange(length, dtype=jnp.int32)[None] + jnp.take_along_axis(shift, index, axis=1)
    total = -(-(length + count * (plan.size - 1)) // plan.size)
    chunk = jnp.arange(total, dtype=jnp.int32)
    # Chunks behind the last document hold zeros, which change no state.
    document = jnp.sum(ends[None] <= chunk[:, None, None], axis=2, dtype=jnp.int32)
    empty = jnp.full((batch, total * plan.size), length, jnp.int32)
    sources = jax.vmap(lambda x, at: x.at[at].set(jnp.arange(length, dtype=jnp.int32)))(empty, places)

    def move(x, writes):
        if x is None:
            return None
        at = sources[:, :, None] * writes + jnp.arange(writes, dtype=jnp.int32)[None, None]
        return take_tokens(x, at.reshape(batch, -1))

    moved = Inputs(*(move(x, writes) for x, writes in zip(inputs, plan.rows, strict=True)))
    return moved, jnp.minimum(document, jnp.int32(count - 1)), places


def take_tokens(x: Float[Array, "B T *rest"], places: Int[Array, "B L"]) -> Float[Array, "B L *rest"]:
    """x at these tokens; 0 behind the last one."""
    places = lax.expand_dims(places, range(2, x.ndim))
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)
