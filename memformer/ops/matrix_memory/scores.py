"""Decayed inner products inside a chunk: sum_k q_rk k_ik exp(G_rk - G_ik), never with a positive exponent.

G is the cumulative log decay, with last axis 1 (per head) or K (per key channel). Per head the decay is a factor of
the inner product; per channel it is not, and splitting it as exp(G_r) exp(-G_i) over a whole chunk overflows. There the
chunk is halved again and again, each time with a reference between the two parts (`_scores_per_channel`).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.decay import CumulativeDecay
from memformer.core.types import Array, Float

__all__ = ["decayed_scores", "repeat_tokens"]

# Blocks up to this many tokens compute whole levels in one product: smaller products cost more in calls than in work.
BASE = 16


def repeat_tokens(x: Array, writes: int) -> Array:
    """Repeats each token (axis -2) for each of its writes."""
    return x if writes == 1 else jnp.repeat(x, writes, axis=-2)


def decayed_scores(
    q: Float[Array, "*N B H C K"],
    k: Float[Array, "*N B H L K"],
    w: Float[Array, "*N B H L K"] | None,
    decay: CumulativeDecay | None,
    same_segment: Array | None,
    precision,
) -> tuple[Array, Array | None]:
    """Scores of queries and keys, and of erase vectors and keys, inside each chunk; 0 where masked.

    Args:
      q: queries.
      k: keys, with L = C N rows for N writes per token.
      w: erase vectors, or None where writes only add.
      decay: [*N, B, H, C, 1 or K] cumulative log decay up to each token, or None.
      same_segment: [*N, B, 1, C, C], True for tokens of one segment, or None.
      precision: of the products.

    Returns:
      qk [*N, B, H, C, L], of the writes up to the query's own token, and wk [*N, B, H, L, L], of strictly earlier
      writes, or None.
    """
    writes = k.shape[-2] // q.shape[-2]
    place = np.arange(k.shape[-2])
    lead = (None,) * (q.ndim - 2)
    qk_mask = jnp.asarray(place // writes <= np.arange(q.shape[-2])[:, None])[lead]
    wk_mask = jnp.asarray(place < place[:, None])[lead]
    if same_segment is not None:
        same_segment = jnp.repeat(same_segment, writes, axis=-1)
        qk_mask = qk_mask & same_segment
        wk_mask = wk_mask & repeat_tokens(same_segment, writes)
    per_write = None if decay is None else CumulativeDecay(*(repeat_tokens(x, writes) for x in decay))
    qk = _scores(q, k, decay, per_write, qk_mask, precision)
    return qk, None if w is None else _scores(w, k, per_write, per_write, wk_mask, precision)


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
    """The ladder: pairs across the middle of a block take the first token of its lower half as the reference.

    For a row r in the lower half and a column i in the upper half, exp(G_r - G_i) = exp(G_r - G_m) exp(G_m - G_i) with
    m the first token of the lower half; both exponents are at most 0. The same holds inside each half, down to single
    tokens. Blocks of up to `BASE` tokens compute each level as one masked product, larger ones as the corner block.
    """
    tokens = min(rows.shape[-2], columns.shape[-2])
    # One of the two has a row for each write of a token.
    row_writes, column_writes = rows.shape[-2] // tokens, columns.shape[-2] // tokens
    padded = 1 << (tokens - 1).bit_length()
    rows, columns = _pad_tokens(rows, padded * row_writes), _pad_tokens(columns, padded * column_writes)
    row_decay = CumulativeDecay(*(_pad_tokens(x, padded * row_writes, "edge") for x in row_decay))
    column_decay = CumulativeDecay(*(_pad_tokens(x, padded * column_writes, "edge") for x in column_decay))

    def blocks(x, size):
        return x.reshape(*x.shape[:-2], -1, size * x.shape[-2] // padded, x.shape[-1])

    def half_blocks(x, size, lower):
        return blocks(x, size // 2)[..., lower::2, :, :]

    size = min(BASE, padded)
    diagonal = _block_scores(
        blocks(rows, size),
        blocks(columns, size),
        CumulativeDecay(*(blocks(x, size) for x in row_decay)),
        CumulativeDecay(*(blocks(x, size) for x in column_decay)),
        size,
        precision,
    )
    while size < padded:
        size *= 2
        after = CumulativeDecay(*(half_blocks(x, size, 1) for x in row_decay))
        before = CumulativeDecay(*(half_blocks(x, size, 0) for x in column_decay))
        reference = _reference(after, 0)
        corner = _product(
            half_blocks(rows, size, 1) * jnp.exp(after.since(reference)),
            half_blocks(columns, size, 0) * jnp.exp(reference.since(before)),
            precision,
        )
        upper = jnp.concatenate([diagonal[..., 0::2, :, :], jnp.zeros_like(corner)], axis=-1)
        diagonal = jnp.concatenate([upper, jnp.concatenate([corner, diagonal[..., 1::2, :, :]], axis=-1)], axis=-2)
    scores = diagonal[..., 0, : tokens * row_writes, : tokens * column_writes]
    return jnp.where(mask, scores, jnp.zeros((), rows.dtype))


def _block_scores(rows, columns, row_decay, column_decay, tokens, precision):
    """Scores of whole blocks of a few tokens, all pairs of a level in one masked product; 0 above the diagonal."""
    zero = jnp.zeros((), rows.dtype)
    row, column = (np.arange(x.shape[-2]) * tokens // x.shape[-2] for x in (rows, columns))
    scores = jnp.where(jnp.asarray(row[:, None] == column), _product(rows, columns, precision), zero)
    size = 2
    while size <= tokens:
        lower, upper = (row % size >= size // 2)[:, None], (column % size < size // 2)[:, None]
        after, before = _since_middle(row_decay, tokens // size), -_since_middle(column_decay, tokens // size)
        pairs = _product(
            jnp.where(lower, rows * jnp.exp(jnp.where(lower, after, zero)), zero),
            jnp.where(upper, columns * jnp.exp(jnp.where(upper, before, zero)), zero),
            precision,
        )
        scores += jnp.where(jnp.asarray(row[:, None] // size == column // size), pairs, zero)
        size *= 2
    return scores


def _since_middle(decay: CumulativeDecay, blocks: int) -> Array:
    """Log decay since the middle row of each of `blocks` equal blocks; positive for the rows before it."""
    parts = CumulativeDecay(*(x.reshape(*x.shape[:-2], blocks, -1, x.shape[-1]) for x in decay))
    return parts.since(_reference(parts, parts.whole.shape[-2] // 2)).reshape(decay.whole.shape)


def _reference(decay: CumulativeDecay, row: int) -> CumulativeDecay:
    """One row, without a gradient: scores do not depend on the reference, and its terms would cancel inexactly."""
    return CumulativeDecay(*(lax.stop_gradient(x[..., row : row + 1, :]) for x in decay))


def _pad_tokens(x: Array, size: int, mode: str = "constant") -> Array:
    """Pads the axis of rows to `size`."""
    if x.shape[-2] == size:
        # A pad by nothing makes the compiler move a sharded array in the backward pass.
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)], mode=mode)


def _product(a: Array, b: Array, precision) -> Array:
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=precision)
