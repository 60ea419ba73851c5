"""States per document in the kernels of matrix memories: every document starts a chunk, and the state changes there."""

import dataclasses

import jax
import jax.numpy as jnp

from memformer.core.calls import MatrixCall
from memformer.core.documents import DocumentChunks, find_chunks, take_tokens
from memformer.core.types import Array, Float, Int

__all__ = ["align", "restore"]


def align(call: MatrixCall, size: int) -> tuple[MatrixCall, DocumentChunks]:
    """Moves the tokens of a call so that every document starts a chunk.

    Args:
      call: one write per token, with a state per document.
      size: C, tokens per chunk.

    Returns:
      The call in whole chunks without segments, its state [B, H, P, K, V], and the places of its documents.
    """
    index = jnp.zeros(call.q.shape[:2], jnp.int32) if call.segments is None else call.segments.index
    documents = find_chunks(index, size, call.state.shape[1])
    names = ("q", "k", "v", "w", "alpha", "beta", "decay")
    arrays = {name: getattr(call, name) for name in names}
    moved = {name: None if x is None else _move(x, documents.sources, documents.places) for name, x in arrays.items()}
    return dataclasses.replace(call, **moved, segments=None, state=jnp.swapaxes(call.state, 1, 2)), documents


def restore(
    documents: DocumentChunks, output: Float[Array, "B L H V"], state: Float[Array, "B H P K V"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B P H K V"]]:
    """The inverse of `align`, for the results."""
    return _move(output, documents.places, documents.sources), jnp.swapaxes(state, 1, 2)


@jax.custom_vjp
def _move(x: Float[Array, "B T *rest"], sources: Int[Array, "B L"], back: Int[Array, "B T"]):
    """x at `sources`, 0 where those lie behind the end; `back` are the places of x in the result."""
    return take_tokens(x, sources)


def _move_forward(x, sources, back):
    return take_tokens(x, sources), back


def _move_backward(back, gradient):
    # A gather as the forward pass: the compiler cannot know that no token is taken twice.
    return take_tokens(gradient, back), None, None


_move.defvjp(_move_forward, _move_backward)
