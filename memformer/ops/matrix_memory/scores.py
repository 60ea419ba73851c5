"""Decayed inner products inside a chunk: sum_k q_rk k_ik exp(G_rk - G_ik), never with a positive exponent.

G is the cumulative log decay, with last axis 1 (per head) or K (per key channel). Per head the decay is a factor of
the inner product; per channel it is not, and splitting it as exp(G_r) exp(-G_i) over a whole chunk overflows. Blocks
of tokens then take their first row as the reference, and pairs inside one block are computed one by one.
"""

import jax.numpy as jnp
import numpy as np

from memformer.core.decay import CumulativeDecay
from memformer.core.types import Array, Float

__all__ = ["decayed_scores", "repeat_tokens"]

# Tokens of a block whose pairs are computed one by one where the decay is per channel.
BLOCK = 16


def repeat_tokens(x: Array, writes: int) -> Array:
    """Repeats each token (axis -2) for each of its writes."""
    return x if writes == 1 else jnp.repeat(x, writes, axis=-2)


def decayed_scores(
    q: Float[Array, "*N B H C K"],
    k: Float[Array, "*N B H L K"],
    decay: CumulativeDecay | None,
    same_segment: Array | None,
    key_scores: bool,
    precision,
) -> tuple[Array, Array | None]:
    """Scores of queries and keys, and of keys and keys, inside each chunk; 0 where masked.

    Args:
      q: queries.
      k: keys, with L = C N rows for N writes per token.
      decay: [*N, B, H, C, 1 or K] cumulative log decay up to each token, or None.
      same_segment: [*N, B, 1, C, C], True for tokens of one segment, or None.
      key_scores: whether the scores of keys and keys are needed.
      precision: of the products.

    Returns:
      qk [*N, B, H, C, L], of the writes up to the query's own token, and kk [*N, B, H, L, L], of strictly earlier
      writes, or None.
    """
    writes = k.shape[-2] // q.shape[-2]
    place = np.arange(k.shape[-2])
    lead = (None,) * (q.ndim - 2)
    qk_mask = jnp.asarray(place // writes <= np.arange(q.shape[-2])[:, None])[lead]
    kk_mask = jnp.asarray(place < place[:, None])[lead]
    if same_segment is not None:
        same_segment = jnp.repeat(same_segment, writes, axis=-1)
        qk_mask = qk_mask & same_segment
        kk_mask = kk_mask & repeat_tokens(same_segment, writes)
    per_write = None if decay is None else CumulativeDecay(*(repeat_tokens(x, writes) for x in decay))
    qk = _scores(q, k, decay, per_write, qk_mask, precision)
    return qk, (_scores(k, k, per_write, per_write, kk_mask, precision) if key_scores else None)


def _scores(rows, columns, row_decay, column_decay, mask, precision):
    zero = jnp.zeros((), rows.dtype)
    if row_decay is not None and row_decay.fraction.shape[-1] > 1:
        return _scores_per_channel(rows, columns, row_decay, column_decay, mask, precision)
    gap_mask = mask & _different_tokens(rows, columns)
    scores = jnp.matmul(rows, jnp.swapaxes(columns, -1, -2), precision=precision)
    if row_decay is not None:
        gap = row_decay.since(CumulativeDecay(*(jnp.swapaxes(x, -1, -2) for x in column_decay)))
        scores = scores * jnp.exp(jnp.where(gap_mask, gap, zero))
    return jnp.where(mask, scores, zero)


def _different_tokens(rows, columns):
    """False for a token and itself: the gap is exactly 0 there, and so must be its gradient."""
    sizes = rows.shape[-2], columns.shape[-2]
    row, column = (np.arange(size) * min(sizes) // size for size in sizes)
    return jnp.asarray(row[:, None] != column[None, :])[(None,) * (rows.ndim - 2)]


def _scores_per_channel(rows, columns, row_decay, column_decay, mask, precision):
    size, wide = rows.shape[-2], columns.shape[-2]
    # Rows and columns of a block of tokens; one of the two has a row for each write of a token.
    tokens = min(size, wide)
    height, breadth = BLOCK * size // tokens, BLOCK * wide // tokens
    mask = jnp.broadcast_to(mask, (*rows.shape[:-1], wide))
    gap_mask = mask & _different_tokens(rows, columns)
    zero = jnp.zeros((), rows.dtype)
    blocks = []
    for top, left in zip(range(0, size, height), range(0, wide, breadth), strict=True):
        block_rows, block_columns = slice(top, top + height), slice(left, left + breadth)
        reference = row_decay[..., top : top + 1, :]
        after = rows[..., block_rows, :] * jnp.exp(row_decay[..., block_rows, :].since(reference))
        before = columns[..., :left, :] * jnp.exp(reference.since(column_decay[..., :left, :]))
        earlier = jnp.matmul(after, jnp.swapaxes(before, -1, -2), precision=precision)
        gap = row_decay[..., block_rows, None, :].since(column_decay[..., None, block_columns, :])
        weight = jnp.exp(jnp.where(gap_mask[..., block_rows, block_columns, None], gap, zero))
        pairs = jnp.sum(rows[..., block_rows, None, :] * columns[..., None, block_columns, :] * weight, axis=-1)
        later = jnp.zeros((*pairs.shape[:-1], wide - left - pairs.shape[-1]), rows.dtype)
        blocks.append(jnp.concatenate([earlier, pairs, later], axis=-1))
    return jnp.where(mask, jnp.concatenate(blocks, axis=-2), zero)
