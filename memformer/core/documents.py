"""Documents of packed rows, moved so that each starts a chunk: a chunk then has one document, and one state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float, Int

__all__ = ["DocumentChunks", "find_chunks", "take_tokens"]


class DocumentChunks(NamedTuple):
    """Places of the documents of a packed batch after the move, L = N C tokens per row.

    Attributes:
      first: the first chunk of each document.
      chunks: of each document, 0 of a document without tokens. Chunks behind the last document are of none.
      places: the new place of each token.
      sources: the token at each place, T where there is none.
    """

    first: Int[Array, "B P"]
    chunks: Int[Array, "B P"]
    places: Int[Array, "B T"]
    sources: Int[Array, "B L"]

    def by_chunk(self, total: int) -> Int[Array, "B N"]:
        """The document of each chunk; of chunks behind the last document, the last place."""
        chunk, ends = jnp.arange(total, dtype=jnp.int32), self.first + self.chunks
        document = jnp.sum(ends[:, None] <= chunk[None, :, None], axis=2, dtype=jnp.int32)
        return jnp.minimum(document, jnp.int32(ends.shape[1] - 1))


def find_chunks(index: Int[Array, "B T"], size: int, documents: int) -> DocumentChunks:
    """Moves every document to the start of a chunk.

    Args:
      index: segment of each token.
      size: C, tokens per chunk.
      documents: P, places for documents per row.

    Example:
      >>> find_chunks(jnp.array([[0, 0, 0, 1]]), 2, documents=2).sources
      Array([[0, 1, 2, 4, 3, 4]], dtype=int32)
    """
    batch, length = index.shape
    tokens = jnp.sum(index[:, :, None] == jnp.arange(documents, dtype=jnp.int32)[None, None], axis=1, dtype=jnp.int32)
    chunks = -(-tokens // size)
    ends, last = jnp.cumsum(chunks, axis=1), jnp.cumsum(tokens, axis=1)
    shift = (ends - chunks) * size - (last - tokens)
    places = jnp.arange(length, dtype=jnp.int32)[None] + jnp.take_along_axis(shift, index, axis=1)
    total = -(-(length + documents * (size - 1)) // size)
    empty = jnp.full((batch, total * size), length, jnp.int32)
    sources = jax.vmap(lambda x, at: x.at[at].set(jnp.arange(length, dtype=jnp.int32)))(empty, places)
    return DocumentChunks(ends - chunks, chunks, places, sources)


def take_tokens(x: Float[Array, "B T *rest"], places: Int[Array, "B L"]) -> Float[Array, "B L *rest"]:
    """x at these tokens; 0 behind the last one."""
    places = lax.expand_dims(places, range(2, x.ndim))
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)
