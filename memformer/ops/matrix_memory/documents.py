"""States per document: every document of a packed row starts from its own state and leaves one.

A state is then [B, P, H, K, V], with one place per document of a row. The chunked form moves every document to the
start of a chunk, so that a chunk has one document and one state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.documents import find_chunks, take_tokens
from memformer.core.types import Array, Int
from memformer.ops.matrix_memory.groups import ChunkScan, Inputs

__all__ = ["align", "put", "take"]


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
    chunks = find_chunks(index, plan.size, count)

    def move(x, writes):
        if x is None:
            return None
        at = chunks.sources[:, :, None] * writes + jnp.arange(writes, dtype=jnp.int32)[None, None]
        return take_tokens(x, at.reshape(batch, -1))

    moved = Inputs(*(move(x, writes) for x, writes in zip(inputs, plan.rows, strict=True)))
    # Chunks behind the last document hold zeros, which change no state.
    document = chunks.by_chunk(chunks.sources.shape[1] // plan.size)
    return moved, jnp.swapaxes(document, 0, 1), chunks.places
