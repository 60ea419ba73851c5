"""Decayed inner products inside a chunk: sum_k q_rk k_ik exp(G_rk - G_ik), never a positive exponent.

G is the cumulative log decay, with last axis 1 (a head) or K (a key channel). Per head the factor comes out of
the sum; per channel it does not, and splitting it as exp(G_r) exp(-G_i) over a chunk overflows: blocks of tokens
take their first row as the reference, and pairs inside one block are taken one by one.
"""

import jax.numpy as jnp
import numpy as np

from memformer.core.types import Array, Float

__all__ = ["decayed_scores", "repeat_tokens"]

# Tokens of a block whose pairs are taken one by one where decay is per channel.
BLOCK = 16


def repeat_tokens(x: Array, writes: int) -> Array:
    """Repeats each token (axis -2) for every write of it."""
    return x if writes == 1 else jnp.repeat(x, writes, axis=-2)


def decayed_scores(
    q: Float[Array, "*N B H C K"],
    k: Float[Array, "*N B H L K"],
    total: Float[Array, "*N B H C 1"] | Float[Array, "*N B H C K"] | None,
    same: Array | None,
    matching: bool,
    precision,
) -> tuple[Array, Array | None]:
    """Scores of the reads and of the writes of each chunk against its keys, 0 where they must not see.

    Args:
      q, k: queries, and keys with L = C * writes rows.
      total: cumulative log decay after each token, or None.
      same: [*N, B, 1, C, C], True for tokens of one segment, or None.
      matching: whether the scores among keys are wanted.
      precision: of the products.

    Returns:
      The reads' [*N, B, H, C, L] (write i of a token up to the reader's), and the keys' [*N, B, H, L, L] (earlier
      writes only) or None.
    """
    writes = k.shape[-2] // q.shape[-2]
    place = np.arange(k.shape[-2])
    lead = (None,) * (q.ndim - 2)
    reads = jnp.asarray(place // writes <= np.arange(q.shape[-2])[:, None])[lead]
    matches = jnp.asarray(place < place[:, None])[lead]
    if same is not None:
        same = jnp.repeat(same, writes, axis=-1)
        reads = reads & same
        matches = matches & repeat_tokens(same, writes)
    wide = None if total is None else repeat_tokens(total, writes)
    read = _scores(q, k, total, wide, reads, precision)
    return read, (_scores(k, k, wide, wide, matches, precision) if matching else None)


def _scores(rows, columns, after_rows, after_columns, mask, precision):
    zero = jnp.zeros((), rows.dtype)
    if after_rows is not None and after_rows.shape[-1] > 1:
        return _scores_by_channel(rows, columns, after_rows, after_columns, mask, precision)
    scores = jnp.matmul(rows, jnp.swapaxes(columns, -1, -2), precision=precision)
    if after_rows is not None:
        gap = after_rows - jnp.swapaxes(after_columns, -1, -2)
        scores = scores * jnp.exp(jnp.where(mask, gap, zero))
    return jnp.where(mask, scores, zero)


def _scores_by_channel(rows, columns, after_rows, after_columns, mask, precision):
    size, wide = rows.shape[-2], columns.shape[-2]
    # Rows and columns of a block of tokens; one of the two counts every write of a token.
    tokens = min(size, wide)
    height, breadth = BLOCK * size // tokens, BLOCK * wide // tokens
    mask = jnp.broadcast_to(mask, (*rows.shape[:-1], wide))
    zero = jnp.zeros((), rows.dtype)
    blocks = []
    for top, left in zip(range(0, size, height), range(0, wide, breadth), strict=True):
        here, there = slice(top, top + height), slice(left, left + breadth)
        first = after_rows[..., top : top + 1, :]
        upper = rows[..., here, :] * jnp.exp(after_rows[..., here, :] - first)
        lower = columns[..., :left, :] * jnp.exp(first - after_columns[..., :left, :])
        earlier = jnp.matmul(upper, jnp.swapaxes(lower, -1, -2), precision=precision)
        gap = after_rows[..., here, None, :] - after_columns[..., None, there, :]
        weight = jnp.exp(jnp.where(mask[..., here, there, None], gap, zero))
        pairs = jnp.sum(rows[..., here, None, :] * columns[..., None, there, :] * weight, axis=-1)
        later = jnp.zeros((*pairs.shape[:-1], wide - left - pairs.shape[-1]), rows.dtype)
        blocks.append(jnp.concatenate([earlier, pairs, later], axis=-1))
    return jnp.where(mask, jnp.concatenate(blocks, axis=-2), zero)
