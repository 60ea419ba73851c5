"""Tiles of scores between chunks of queries and chunks of keys: what attention and DeltaFormer share.

A score is never kept longer than its tile: the forward pass carries a running maximum and sum (as flash attention
does), the backward pass recomputes each tile from the log-sum-exp of its rows. Tiles in the future are not visited.

Inside this file time is cut into chunks of C and the chunk axis comes first. With R = H / G query heads a key head:

    queries  [N, B, G, R, C, K]        N chunks of the call
    keys     [M, B, G, C, K]           M = before + N: chunks of the state come first, unused ones at their end
    values   [M, B, G, C, V]
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype
from memformer.core.segments import chunk_time, unchunk_time
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, similarity, similarity_slope
from memformer.core.types import Array, Bool, Float, Int
from memformer.ops.attention.cache import UNSEEN, Timeline

__all__ = ["Marks", "Tiling", "align", "attend", "join_keys", "lay_keys", "lay_queries", "make_marks"]

# A number beyond every segment and rank.
_FAR = 1 << 30


class Tiling(NamedTuple):
    """What is known before tracing.

    Attributes:
      kernel: the similarity kernel.
      scale: factor on inner products.
      size: C.
      before: chunks of the state.
      causal: whether a query sees only keys up to its own.
      window: how many tokens back a query sees, itself included, or None.
      precision: of products.
    """

    kernel: Kernel
    scale: float
    size: int
    before: int
    causal: bool = True
    window: int | None = None
    precision: lax.Precision | None = None


class Marks(NamedTuple):
    """What decides who sees whom; arrays are None where they decide nothing.

    Attributes:
      used: how many chunks of the state hold anything.
      query_segment, key_segment: seen where equal.
      query_rank, key_rank: their difference is held against the window.
      first: of each row, the first column that any example sees.
      last: of each column, one more than the last row in which any example sees it.
    """

    used: Int[Array, ""]
    query_segment: Int[Array, "N B C"] | None
    key_segment: Int[Array, "M B C"] | None
    query_rank: Int[Array, "N B C"] | None
    key_rank: Int[Array, "M B C"] | None
    first: Int[Array, "N"] | None = None
    last: Int[Array, "M"] | None = None


class Sums(NamedTuple):
    """A row of tiles so far: running maximum, sum of exponentials (softmax only) and weighted values."""

    top: Float[Array, "B G R C"] | None
    total: Float[Array, "B G R C"] | None
    value: Float[Array, "B G R C V"]


def lay_queries(x: Float[Array, "B T H K"], groups: int, size: int) -> Float[Array, "N B G R C K"]:
    """Chunks of queries, heads grouped by the key head that serves them."""
    x = chunk_time(x, size)
    x = x.reshape(*x.shape[:3], groups, -1, x.shape[-1])
    return jnp.transpose(x, (0, 1, 3, 4, 2, 5))


def unlay_queries(x: Float[Array, "N B G R C V"], length: int) -> Float[Array, "B T H V"]:
    """The reverse of `lay_queries`."""
    x = jnp.transpose(x, (0, 1, 4, 2, 3, 5))
    return unchunk_time(x.reshape(*x.shape[:3], -1, x.shape[-1]), length)


def lay_keys(x: Float[Array, "B T G *rest"], size: int) -> Float[Array, "N B G C *rest"]:
    """Chunks of keys, values, or one number a token."""
    return jnp.swapaxes(chunk_time(x, size), 2, 3)


def unlay_keys(x: Float[Array, "N B G C V"], length: int) -> Float[Array, "B T G V"]:
    """The reverse of `lay_keys`."""
    return unchunk_time(jnp.swapaxes(x, 2, 3), length)


def join_keys(held: Array | None, new: Array, size: int) -> Float[Array, "M B G C V"]:
    """Chunks of what the state holds, then those of the call."""
    new = lay_keys(new, size)
    return new if held is None else jnp.concatenate([lay_keys(held, size), new])


def make_marks(tiling: Tiling, timeline: Timeline, used: Array) -> Marks:
    """Chunks of the numbers of a timeline. Padding is a key that nobody sees."""

    def chunks(x, fill):
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tiling.size)), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, tiling.size), 1, 0)

    def join(held, new):
        if held is None or new is None:
            return new
        return jnp.concatenate([held, jnp.broadcast_to(new, (new.shape[0], *held.shape[1:]))])

    marks = Marks(
        jnp.asarray(used, jnp.int32),
        chunks(timeline.query_segment, UNSEEN),
        join(chunks(timeline.held_segment, UNSEEN), chunks(timeline.key_segment, UNSEEN)),
        chunks(timeline.token_rank, _FAR),
        join(chunks(timeline.held_rank, 0), chunks(timeline.token_rank, 0)),
    )
    return _bound(tiling, marks) if tiling.causal else marks


def _bound(tiling: Tiling, marks: Marks) -> Marks:
    """Finds the tiles that nobody sees, behind a window or in an earlier segment, to leave them out."""
    seen = None
    if marks.query_segment is not None:
        least = jnp.min(jnp.where(marks.query_segment < 0, jnp.int32(_FAR), marks.query_segment), axis=-1)
        seen = jnp.max(marks.key_segment, axis=-1)[None] >= least[:, None]
    if tiling.window is not None:
        distance = jnp.min(marks.query_rank, axis=-1)[:, None] - jnp.max(marks.key_rank, axis=-1)[None]
        seen = distance < tiling.window if seen is None else seen & (distance < tiling.window)
    if seen is None:
        return marks
    seen = jnp.any(seen, axis=-1)
    rows, columns = seen.shape
    first = jnp.argmax(seen, axis=1).astype(jnp.int32)
    last = rows - jnp.argmax(seen[::-1], axis=0).astype(jnp.int32)
    return marks._replace(
        first=jnp.where(jnp.any(seen, axis=1), first, columns), last=jnp.where(jnp.any(seen, axis=0), last, 0)
    )


def align(marks: Marks, *arrays: Array) -> tuple[Array, ...]:
    """Arrays fit for one custom gradient: all in float64 if one is, all varying over the same axes of a shard_map.

    Narrower dtypes stay as they are.
    """
    if accumulation_dtype(*arrays) == jnp.float64:
        arrays = tuple(a.astype(jnp.float64) for a in arrays)
    return tuple(vary_like(a, *arrays, *marks) for a in arrays)


def take(x: Array | None, i: Array) -> Array | None:
    """x[i], or None."""
    return None if x is None else lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def product(tiling: Tiling, equation: str, a: Array, b: Array) -> Array:
    """An einsum with sums in float32 or wider."""
    dtype = accumulation_dtype(a, b)
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=tiling.precision, preferred_element_type=dtype)


def visible(tiling: Tiling, marks: Marks, i: Array, j: Array, *, strict: bool = False) -> Bool[Array, "b 1 1 C C"]:
    """Which keys of chunk j the queries of chunk i see; `strict` leaves out a query's own key."""
    row = jnp.arange(tiling.size, dtype=jnp.int32)[None, :, None]
    column = jnp.arange(tiling.size, dtype=jnp.int32)[None, None, :]
    mask = jnp.ones((1, 1, 1), bool)
    if tiling.causal:
        mask = column - row <= (i + tiling.before - j) * tiling.size - int(strict)
    if marks.query_segment is not None:
        mask &= take(marks.query_segment, i)[:, :, None] == take(marks.key_segment, j)[:, None, :]
    if tiling.window is not None:
        distance = take(marks.query_rank, i)[:, :, None] - take(marks.key_rank, j)[:, None, :]
        mask &= (distance if tiling.causal else jnp.abs(distance)) < tiling.window
    return mask[:, None, None]


def tile_scores(tiling: Tiling, q: Array, k: Array) -> Float[Array, "B G R C C"]:
    """Scaled inner products of one tile."""
    return product(tiling, "bgrtk,bgsk->bgrts", q, k) * tiling.scale


def hide(scores: Array, mask: Array) -> Array:
    """The lowest number where hidden; running maxima start at half of it, so that its exponential is 0."""
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def tile_weights(tiling: Tiling, mask: Array, scores: Array, norm: Array | None) -> Float[Array, "B G R C C"]:
    """Values of the kernel in one tile, normalised by the log-sum-exp `norm` where it is softmax."""
    if tiling.kernel.normalized:
        return jnp.exp(hide(scores, mask) - norm[..., None])
    zero = jnp.zeros((), scores.dtype)
    return jnp.where(mask, similarity(tiling.kernel, jnp.where(mask, scores, zero)), zero)


def weigh(tiling: Tiling, weights: Array, x: Array) -> Float[Array, "B G R C V"]:
    """Sum of values by weights. Normalised weights are at most 1: they may be as narrow as the values."""
    if tiling.kernel.normalized:
        weights = weights.astype(x.dtype)
    return product(tiling, "bgrts,bgsv->bgrtv", weights, x)


def widen(sums: Sums, hidden: Array) -> tuple[Array, Array, Array]:
    """Running maximum after one more tile of hidden scores, the factor on what was summed before, the new weights."""
    top = jnp.maximum(sums.top, jnp.max(hidden, axis=-1))
    return top, jnp.exp(sums.top - top), jnp.exp(hidden - top[..., None])


def empty_sums(tiling: Tiling, q: Array, x: Array, *others: Array | None) -> Sums:
    """Sums over no tile for one chunk of queries."""
    dtype = accumulation_dtype(q, x)
    shape = q.shape[:-1]
    value = vary_like(jnp.zeros((*shape, x.shape[-1]), dtype), q, x, *others)
    if not tiling.kernel.normalized:
        return Sums(None, None, value)
    top = vary_like(jnp.full(shape, jnp.finfo(dtype).min / 2, dtype), q, x, *others)
    return Sums(top, jnp.zeros_like(value[..., 0]), value)


def sum_tiles(tiling: Tiling, marks: Marks, i: Array, q: Array, k: Array, x: Array, steps: Array) -> Sums:
    """Sums over the first `steps` tiles of row i, unused chunks of the state left out."""

    def tile(step, sums):
        j = jnp.where(step < marks.used, step, step - marks.used + tiling.before)
        mask = visible(tiling, marks, i, j)
        scores = tile_scores(tiling, q, take(k, j))
        if not tiling.kernel.normalized:
            weights = tile_weights(tiling, mask, scores, None)
            return sums._replace(value=sums.value + weigh(tiling, weights, take(x, j)))
        top, shrink, weights = widen(sums, hide(scores, mask))
        total = sums.total * shrink + jnp.sum(weights, axis=-1)
        return Sums(top, total, sums.value * shrink[..., None] + weigh(tiling, weights, take(x, j)))

    first = jnp.int32(0)
    if marks.first is not None:
        first = take(marks.first, i)
        first = jnp.where(first < tiling.before, jnp.minimum(first, marks.used), first - tiling.before + marks.used)
    start = empty_sums(tiling, q, x, k, *marks)
    return lax.fori_loop(first, jnp.asarray(steps, jnp.int32), tile, start)


def norm_of(sums: Sums) -> Float[Array, "B G R C"] | None:
    """Log-sum-exp of the rows; a large negative number where a row saw nothing."""
    if sums.top is None:
        return None
    return sums.top + jnp.log(jnp.where(sums.total > 0, sums.total, jnp.ones_like(sums.total)))


def tile_gradient(
    tiling: Tiling, mask: Array, q: Array, k: Array, x: Array, norm: Array | None, do: Array, mean: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and x through one tile of the output, `do` being that of the output.

    `mean` is the sum of output times `do`: what the normaliser of softmax takes from each score's gradient.
    """
    scores = tile_scores(tiling, q, k)
    weights = tile_weights(tiling, mask, scores, norm)
    dx = product(tiling, "bgrts,bgrtv->bgsv", weights, do)
    dweights = product(tiling, "bgrtv,bgsv->bgrts", do, x)
    if tiling.kernel.normalized:
        dscores = weights * (dweights - mean[..., None])
    else:
        slope = similarity_slope(tiling.kernel, scores, weights)
        dscores = jnp.where(mask, dweights * slope, jnp.zeros((), scores.dtype))
    dscores = dscores * tiling.scale
    dq = product(tiling, "bgrts,bgsk->bgrtk", dscores, k)
    return dq, product(tiling, "bgrts,bgrtk->bgsk", dscores, q), dx


def column_gradient(
    tiling: Tiling, marks: Marks, j: Array, rows: tuple, k: Array, x: Array, q: Array, rest: tuple, dq: Array
) -> tuple[Array, Array, Array]:
    """Gradients through the tiles of column j in rows[0] <= i < rows[1].

    Args:
      tiling, marks: as ever.
      j: chunk of keys.
      rows: first row and the one after the last.
      k, x: all keys and values.
      q: all queries.
      rest: norm, do and mean of `tile_gradient`, of all rows.
      dq: gradient of all queries so far.

    Returns:
      dq with these tiles added, and the gradients of k[j] and x[j].
    """
    k, x = take(k, j), take(x, j)

    def row(i, carry):
        dq, dk, dx = carry
        mask = visible(tiling, marks, i, j)
        parts = tile_gradient(tiling, mask, take(q, i), k, x, *(take(r, i) for r in rest))
        dq = lax.dynamic_update_index_in_dim(dq, take(dq, i) + parts[0], i, 0)
        return dq, dk + parts[1], dx + parts[2]

    zeros = (vary_like(jnp.zeros(a.shape, dq.dtype), q, k, x, *rest, *marks) for a in (k, x))
    first, last = (jnp.asarray(bound, jnp.int32) for bound in rows)
    if marks.last is not None:
        last = jnp.minimum(last, take(marks.last, j))
    return lax.fori_loop(first, last, row, (dq, *zeros))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(tiling: Tiling, marks: Marks, q: Array, k: Array, x: Array) -> Float[Array, "N B G R C V"]:
    """Reads the values x at the queries, in the accumulation dtype. Memory is linear in time, backward too."""
    return _attend(tiling, marks, q, k, x)[0]


def _attend(tiling, marks, q, k, x):
    def row(_, inputs):
        i, q = inputs
        steps = marks.used + (i + 1 if tiling.causal else k.shape[0] - tiling.before)
        sums = sum_tiles(tiling, marks, i, q, k, x, steps)
        if sums.total is None:
            return None, (sums.value, None)
        total = jnp.where(sums.total > 0, sums.total, jnp.ones_like(sums.total))
        return None, (sums.value / total[..., None], norm_of(sums))

    index = jnp.arange(q.shape[0], dtype=jnp.int32)
    return lax.scan(row, None, (index, q))[1]


def _attend_forward(tiling, marks, q, k, x):
    output, norm = _attend(tiling, marks, q, k, x)
    return output, (marks, q, k, x, output if tiling.kernel.normalized else None, norm)


def _attend_backward(tiling, kept, do):
    marks, q, k, x, output, norm = kept
    mean = None if output is None else jnp.sum(output * do, axis=-1)
    last = q.shape[0]

    def column(dq, j):
        first = jnp.maximum(j - tiling.before, 0) if tiling.causal else 0
        first = jnp.where((j >= marks.used) & (j < tiling.before), last, first)
        dq, dk, dx = column_gradient(tiling, marks, j, (first, last), k, x, q, (norm, do, mean), dq)
        return dq, (dk.astype(k.dtype), dx.astype(x.dtype))

    start = vary_like(jnp.zeros(q.shape, do.dtype), q, k, x, do, *marks)
    dq, (dk, dx) = lax.scan(column, start, jnp.arange(k.shape[0], dtype=jnp.int32))
    return None, dq.astype(q.dtype), dk, dx


attend.defvjp(_attend_forward, _attend_backward)
