"""Decayed inner products inside a chunk: sum_k q_rk k_ik exp(G_rk - G_ik), never a positive exponent.

G is the cumulative log decay, with last axis 1 (a head) or K (a key channel). Per head the factor comes out of
the sum; per channel it does not, and splitting it as exp(G_r) exp(-G_i) over a chunk overflows: blocks of tokens
take their first row as the reference, and pairs inside one block are taken one by one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.types import Array, Float

__all__ = ["Total", "decayed_scores", "repeat_tokens", "total_decay"]

# exp of this is 0 even in float64, and sums of it are exact.
FORGOTTEN = -32768.0

# Tokens of a block whose pairs are taken one by one where decay is per channel.
BLOCK = 16


class Total(NamedTuple):
    """A cumulative log decay as a whole number and a small rest.

    Whole numbers add exactly, so a token that forgets everything (-1e4, or -inf) does not blur the decays
    beside it, as the difference of two large sums would.
    """

    whole: Array
    rest: Array

    def __getitem__(self, at) -> "Total":  # type: ignore[override]
        return Total(self.whole[at], self.rest[at])

    def since(self, other: "Total") -> Array:
        """What was forgotten since `other`."""
        return (self.whole - other.whole) + (self.rest - other.rest)


def total_decay(decay: Float[Array, "*N C K"]) -> Total:
    """The sum of the log decays up to each token (axis -2)."""
    decay = jnp.maximum(decay, jnp.asarray(FORGOTTEN, decay.dtype))
    whole = lax.stop_gradient(jnp.round(decay))
    return Total(jnp.cumsum(whole, axis=-2), jnp.cumsum(decay - whole, axis=-2))


def repeat_tokens(x: Array, writes: int) -> Array:
    """Repeats each token (axis -2) for every write of it."""
    return x if writes == 1 else jnp.repeat(x, writes, axis=-2)


def decayed_scores(
    q: Float[Array, "*N B H C K"],
    k: Float[Array, "*N B H L K"],
    total: Total | None,
    same: Array | None,
    matching: bool,
    precision,
) -> tuple[Array, Array | None]:
    """Scores of the reads and of the writes of each chunk against its keys, 0 where they must not see.

    Args:
      q, k: queries, and keys with L = C * writes rows.
      total: [*N, B, H, C, 1 or K] cumulative log decay up to each token, or None.
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
    wide = None if total is None else Total(*(repeat_tokens(x, writes) for x in total))
    read = _scores(q, k, total, wide, reads, precision)
    return read, (_scores(k, k, wide, wide, matches, precision) if matching else None)


def _scores(rows, columns, after_rows, after_columns, mask, precision):
    zero = jnp.zeros((), rows.dtype)
    if after_rows is not None and after_rows.rest.shape[-1] > 1:
        return _scores_by_channel(rows, columns, after_rows, after_columns, mask, precision)
    mask_gap = mask & _apart(rows, columns)
    scores = jnp.matmul(rows, jnp.swapaxes(columns, -1, -2), precision=precision)
    if after_rows is not None:
        gap = after_rows.since(Total(*(jnp.swapaxes(x, -1, -2) for x in after_columns)))
        scores = scores * jnp.exp(jnp.where(mask_gap, gap, zero))
    return jnp.where(mask, scores, zero)


def _apart(rows, columns):
    """False where a token meets itself: the gap is 0 there, and so is its gradient, to the last bit."""
    sizes = rows.shape[-2], columns.shape[-2]
    row, column = (np.arange(size) * min(sizes) // size for size in sizes)
    return jnp.asarray(row[:, None] != column[None, :])[(None,) * (rows.ndim - 2)]


def _scores_by_channel(rows, columns, after_rows, after_columns, mask, precision):
    size, wide = rows.shape[-2], columns.shape[-2]
    # Rows and columns of a block of tokens; one of the two counts every write of a token.
    tokens = min(size, wide)
    height, breadth = BLOCK * size // tokens, BLOCK * wide // tokens
    mask = jnp.broadcast_to(mask, (*rows.shape[:-1], wide))
    mask_gap = mask & _apart(rows, columns)
    zero = jnp.zeros((), rows.dtype)
    blocks = []
    for top, left in zip(range(0, size, height), range(0, wide, breadth), strict=True):
        here, there = slice(top, top + height), slice(left, left + breadth)
        first = after_rows[..., top : top + 1, :]
        upper = rows[..., here, :] * jnp.exp(after_rows[..., here, :].since(first))
        lower = columns[..., :left, :] * jnp.exp(first.since(after_columns[..., :left, :]))
        earlier = jnp.matmul(upper, jnp.swapaxes(lower, -1, -2), precision=precision)
        gap = after_rows[..., here, None, :].since(after_columns[..., None, there, :])
        weight = jnp.exp(jnp.where(mask_gap[..., here, there, None], gap, zero))
        pairs = jnp.sum(rows[..., here, None, :] * columns[..., None, there, :] * weight, axis=-1)
        later = jnp.zeros((*pairs.shape[:-1], wide - left - pairs.shape[-1]), rows.dtype)
        blocks.append(jnp.concatenate([earlier, pairs, later], axis=-1))
    return jnp.where(mask, jnp.concatenate(blocks, axis=-2), zero)
