"""The chunkwise form of every memory with a matrix state: linear attention and the delta rule.

One chunk of C tokens with M writes a token, state S before it, G the cumulative log decay inside it:

    A = diag(beta) tril(K K^T * exp(G_r - G_i), -1)      U = (I + A)^-1 diag(beta) (V - (exp(G) K) S)
    P = tril(Q K^T * exp(G_r - G_i))                     O = scale [(exp(G) Q) S + P U]
    S' = exp(G_C) S + (exp(G_C - G) K)^T U

Where writes add (no beta), U = V. Every exponent is at most 0 where it is used. Source: arXiv 2406.06484
(chunkwise delta rule), 2412.06464 (per-head decay), 2510.26692 (per-channel decay).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.chunking import chunk_time, unchunk_time, vary_like
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array, Float
from memformer.ops._arguments import Memory, zero_state

__all__ = ["chunkwise", "default_chunk", "prefers_recurrence"]

# Rows of a block whose decayed scores are taken pair by pair where decay is per channel.
BLOCK = 16


class Chunk(NamedTuple):
    """One chunk, or all of them with a leading axis. L = C * M rows of keys.

    Attributes:
      q: [B, H, C, K].
      k: [B, H, L, K].
      v: [B, H, L, V].
      beta: [B, H, L] or None.
      decay: [B, H, C, 1 or K] or None.
      index: [B, C] segment of each token, or None.
      before: [B] segment that the carried state belongs to, or None.
    """

    q: Array
    k: Array
    v: Array
    beta: Array | None
    decay: Array | None
    index: Array | None
    before: Array | None


def chunkwise(
    memory: Memory, scale: float, chunk_size: int, precision=None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a memory chunk by chunk: what the recurrence gives, in matrix products.

    Args:
      memory: checked arguments.
      scale: factor on the read.
      chunk_size: tokens a chunk.
      precision: of the products (the inverse always runs at the highest).

    Returns:
      The output in the accumulation dtype, and the state.
    """
    length = memory.q.shape[1]
    precision = matmul_precision(precision, memory.q, memory.k, memory.v)
    dtype = accumulation_dtype(memory.q, memory.k, memory.v)
    chunks = _cut(memory, chunk_size)
    start = zero_state(memory) if memory.state is None else memory.state

    @jax.checkpoint
    def step(state, chunk):
        return _forward(state, _widen(chunk, dtype), scale, precision)

    start = vary_like(start, *chunks)
    state, output = lax.scan(step, start, chunks)
    return unchunk_time(jnp.moveaxis(output, 2, 3), length), state


def default_chunk(memory: Memory) -> int:
    """Tokens a chunk where the caller leaves the choice: 32 rows of keys was fastest on a CPU."""
    return max(1, 32 // memory.k.shape[2])


def prefers_recurrence(memory: Memory) -> bool:
    """True for a few tokens, where a chunk would be mostly padding."""
    return memory.q.shape[1] <= 4


def _cut(memory: Memory, size: int) -> Chunk:
    def rows(x):
        # [B, T, M, H, ...] to [N, B, H, C * M, ...].
        if x is None:
            return None
        x = chunk_time(x, size)
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        return jnp.moveaxis(x, 3, 2)

    def tokens(x):
        return None if x is None else jnp.moveaxis(chunk_time(x, size), 3, 2)

    index = before = None
    if memory.segments is not None:
        index = memory.segments.index
        # Padding at the end belongs to the last segment, so that the state it leaves is the last segment's.
        index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % size)), mode="edge")
        index = chunk_time(index, size)
        before = jnp.concatenate([jnp.zeros_like(index[:1, :, 0]), index[:-1, :, -1]])
    return Chunk(
        tokens(memory.q), rows(memory.k), rows(memory.v), rows(memory.beta), tokens(memory.decay), index, before
    )


def _widen(chunk: Chunk, dtype) -> Chunk:
    wide = (x if x is None else x.astype(dtype) for x in chunk[:5])
    return Chunk(*wide, chunk.index, chunk.before)


def _forward(state: Array, chunk: Chunk, scale: float, precision) -> tuple[Array, Array]:
    def product(a, b):
        return jnp.matmul(a, b, precision=precision)

    q, k, v, beta = chunk.q, chunk.k, chunk.v, chunk.beta
    steps = k.shape[-2] // q.shape[-2]
    total = None if chunk.decay is None else jnp.cumsum(chunk.decay, axis=-2)
    read, match = _scores(q, k, total, chunk.index, beta is not None, precision)
    enter, leave, keep = _ends(total, chunk.index, chunk.before, k.dtype)
    u = v
    if beta is not None:
        entering = k if enter is None else k * _each(enter, steps)
        u = beta[..., None] * (v - product(entering, state))
        u = product(unit_lower_inverse(beta[..., None] * match), u)
    output = product(q if enter is None else q * enter, state) + product(read, u)
    leaving = k if leave is None else k * _each(leave, steps)
    state = (state if keep is None else state * keep) + product(jnp.swapaxes(leaving, -1, -2), u)
    return state, scale * output


def _each(x: Array, steps: int) -> Array:
    """Repeats tokens (axis -2) for every write of a token."""
    return x if steps == 1 else jnp.repeat(x, steps, axis=-2)


def _ends(total, index, before, dtype):
    """How a row sees the carried state, how a write reaches the next one, what of the state is kept."""
    enter = leave = keep = None
    if total is not None:
        last = total[..., -1:, :]
        enter, leave, keep = jnp.exp(total), jnp.exp(last - total), jnp.exp(jnp.swapaxes(last, -1, -2))
    if index is not None:
        masks = (index == before[:, None], index == index[:, -1:], (index[:, -1:] == before[:, None]))
        masks = tuple(m[:, None, :, None].astype(dtype) for m in masks)
        enter, leave, keep = (m if x is None else m * x for m, x in zip(masks, (enter, leave, keep), strict=True))
    return enter, leave, keep


def _scores(q, k, total, index, matching: bool, precision):
    """Decayed, masked scores of queries (i <= r) and of keys (i < r, or None) against the keys of the chunk."""
    tokens, steps = q.shape[-2], k.shape[-2] // q.shape[-2]
    place = jnp.arange(tokens * steps)
    reads = (place[None, :] // steps <= jnp.arange(tokens)[:, None])[None, None]
    matches = (place[None, :] < place[:, None])[None, None]
    if index is not None:
        wide = jnp.repeat(index, steps, axis=-1)
        reads = reads & (index[:, :, None] == wide[:, None, :])[:, None]
        matches = matches & (wide[:, :, None] == wide[:, None, :])[:, None]
    wide = None if total is None else _each(total, steps)
    read = _decayed(q, k, total, wide, reads, precision)
    return read, (_decayed(k, k, wide, wide, matches, precision) if matching else None)


def _decayed(rows, columns, total_rows, total_columns, mask, precision):
    if total_rows is not None and total_rows.shape[-1] > 1:
        return _decayed_by_channel(rows, columns, total_rows, total_columns, mask, precision)
    scores = jnp.matmul(rows, jnp.swapaxes(columns, -1, -2), precision=precision)
    if total_rows is not None:
        gap = total_rows - jnp.swapaxes(total_columns, -1, -2)
        scores = scores * jnp.exp(jnp.where(mask, gap, jnp.zeros((), gap.dtype)))
    return jnp.where(mask, scores, jnp.zeros((), scores.dtype))


def _decayed_by_channel(rows, columns, total_rows, total_columns, mask, precision):
    """sum_k rows_rk columns_ik exp(G_rk - G_ik), block row by block row."""
    size, wide = rows.shape[-2], columns.shape[-2]
    # Rows and columns of one block of tokens.
    height, breadth = -(-BLOCK * size // min(size, wide)), -(-BLOCK * wide // min(size, wide))
    mask = jnp.broadcast_to(mask, (*rows.shape[:-1], wide))
    blocks = []
    for block in range(-(-size // height)):
        top, left = slice(block * height, (block + 1) * height), slice(block * breadth, (block + 1) * breadth)
        first = total_rows[..., block * height : block * height + 1, :]
        earlier, before = columns[..., : left.start, :], total_columns[..., : left.start, :]
        parts = [
            jnp.matmul(
                rows[..., top, :] * jnp.exp(total_rows[..., top, :] - first),
                jnp.swapaxes(earlier * jnp.exp(first - before), -1, -2),
                precision=precision,
            )
        ]
        here = mask[..., top, left]
        gap = total_rows[..., top, None, :] - total_columns[..., None, left, :]
        weight = jnp.exp(jnp.where(here[..., None], gap, jnp.zeros((), gap.dtype)))
        parts.append(jnp.sum(rows[..., top, None, :] * columns[..., None, left, :] * weight, axis=-1))
        parts.append(jnp.zeros((*parts[1].shape[:-1], wide - min(left.stop, wide)), rows.dtype))
        blocks.append(jnp.concatenate(parts, axis=-1))
    return jnp.where(mask, jnp.concatenate(blocks, axis=-2), jnp.zeros((), rows.dtype))
