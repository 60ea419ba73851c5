"""What is one number a token and head: strength of the write, decay, segments.

One float32 array [B, H, N, names, C], names in the order of `Cut.names`:

    beta     strength of the write
    enter    how a token sees the state that enters the chunk; the last token's is what the chunk keeps of it
    leave    how a write reaches the state that leaves the chunk
    total    log decay since the start of the chunk
    segment  index of the token's segment

and "-total", "-segment", their negatives: a row is loaded either for the rows of a matrix or for its columns, since
the compiler merges two loads of one row, and then finds no layout for it.
"""

import jax.numpy as jnp

from memformer.core.chunking import pad_time
from memformer.core.types import Array
from memformer.pallas.gpu.common import Cut

__all__ = ["token_rows"]


def token_rows(cut: Cut, beta: Array | None, decay: Array | None, index: Array | None) -> tuple[Array, ...]:
    """The array of rows, or none where a token has no numbers.

    Args:
      cut: sizes.
      beta: [B, T, H] or None.
      decay: log decay [B, T, H], or None.
      index: segment of every token [B, T], or None.
    """
    if not cut.names:
        return ()
    shape = (cut.batch, cut.chunks, cut.chunk, cut.heads)

    def cut_time(x):
        return pad_time(x.astype(jnp.float32), cut.chunk).reshape(shape)

    enter = leave = jnp.ones(shape, jnp.float32)
    rows = {} if beta is None else {"beta": cut_time(beta)}
    if decay is not None:
        total = rows["total"] = jnp.cumsum(cut_time(decay), axis=2)
        enter, leave = jnp.exp(total), jnp.exp(total[:, :, -1:] - total)
    if index is not None:
        # Padding at the end belongs to the last segment, so that the state it leaves is the last segment's.
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % cut.chunk)), mode="edge").reshape(shape[:3])
        last = index[:, :, -1]
        before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
        enter *= (index == before[:, :, None]).astype(jnp.float32)[..., None]
        leave *= (index == last[:, :, None]).astype(jnp.float32)[..., None]
        rows["segment"] = jnp.broadcast_to(index[..., None], shape).astype(jnp.float32)
    rows |= {"enter": enter, "leave": leave}
    rows |= {f"-{name}": -rows[name] for name in ("total", "segment") if name in rows}
    return (jnp.stack([rows[name] for name in cut.names], axis=-1).transpose(0, 3, 1, 4, 2),)
