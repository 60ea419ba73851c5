"""Reading a cache on Hopper: attention by tiles, with any similarity kernel, and its gradients.

    o_t = sum_i p_ti x_i;  p_ti = kappa(q_t . k_i), for softmax divided by its sum over the slots seen

A program is one block of queries of one head (gradients.py: of keys too). Saved for the backward pass: the inputs,
the output and the log-sum-exp.

Source: arXiv 2205.14135 (tiles with a running maximum), 2407.08608 (warpgroups that compute and one that copies).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.backward import column_gradients, row_gradients
from memformer.pallas.gpu.attention.tiles import LOW, TILE, Plan, Refs, Ring
from memformer.pallas.gpu.common import products
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["Sums", "add_tile", "attend", "norm_of", "read", "start_sums"]


class Sums(NamedTuple):
    """A tile of rows so far: running maximum and sum of exponentials [64], weighted values [64, V]."""

    top: Array
    total: Array
    value: Array


def start_sums(width: int) -> Sums:
    """Nothing seen yet."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    top, total = (plgpu.layout_cast(jnp.full((TILE,), x, jnp.float32), rows) for x in (LOW / 2, 0.0))
    return Sums(top, total, tiles.zeros(width))


def widen(sums: Sums, hidden: Array) -> tuple[Sums, Array]:
    """Takes scores into maximum and sum, and shrinks what was weighed by the old maximum; also their exponentials."""
    top = jnp.maximum(sums.top, jnp.max(hidden, axis=1))
    shrink = jnp.exp2(sums.top - top)
    weights = jnp.exp2(hidden - tiles.spread(top, TILE))
    total = sums.total * shrink + jnp.sum(weights, axis=1)
    return Sums(top, total, sums.value * tiles.spread(shrink, sums.value.shape[1])), weights


def add_tile(plan: Plan, ring: Ring, refs: Refs, sums: Sums, count, g, q, mask) -> Sums:
    """Adds what one tile of the ring holds to the sums.

    Args:
      plan, ring, refs: as ever.
      sums: of the rows.
      count: which tile.
      g: the warpgroup.
      q: the rows' queries in shared memory.
      mask: of the slot, what is seen.
    """
    slot = ring.await_key(count)
    scores = tiles.scores_of(plan, q, refs.key_slots.at[slot])
    seen = mask(slot)
    if plan.kernel.normalized:
        sums, weights = widen(sums, scores if seen is None else jnp.where(seen, scores, LOW))
    else:
        weights = tiles.weights_of(plan, scores, seen, None)
    parts = tiles.left(tiles.halves(weights, plan.halves), [refs[f"left{n}"].at[g] for n in range(lefts(plan))])
    ring.await_value(count)
    values = tuple(refs[f"value_slots{n}"].at[slot] for n in range(plan.halves))
    (read,) = products(tiles.pairs(parts, values))
    ring.release(count)
    return sums._replace(value=sums.value + read)


def _unmarked(slot):
    return None, None


def lefts(plan: Plan) -> int:
    """References that the interpreter needs for left operands."""
    return plan.halves if tiles.interpreting() else 0


def norm_of(sums: Sums) -> Array:
    """Log-sum-exp of the rows to base 2; a large negative number where a row saw nothing."""
    return sums.top + jnp.log2(jnp.where(sums.total > 0, sums.total, 1.0))


def _compute(refs: Refs, plan: Plan) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    i, first, own, stop = tiles.row_extent(plan, refs)
    ring = tiles.column_ring(plan, refs, plan.halves)
    rows = pl.ds(i * plan.size + g * TILE, TILE)
    q = refs.q_rows.at[g]
    plgpu.copy_gmem_to_smem(refs.q.at[b, h, rows], q, refs.rows_there.at[g])
    if plan.segments:
        group = tiles.group_of(refs)
        plgpu.copy_gmem_to_smem(refs.rows.at[b, group, i * plan.groups + g], refs.numbers.at[g], refs.rows_there.at[g])
    plgpu.barrier_wait(refs.rows_there.at[g])

    def tile(t, sums, diagonal=None):
        marks = (lambda slot: (refs.numbers.at[g, 0], refs.number_slots.at[slot, 0])) if plan.segments else _unmarked
        mask = lambda slot: tiles.tile_mask(diagonal, *marks(slot))  # noqa: E731
        return add_tile(plan, ring, refs, sums, t - first, g, q, mask)

    last = own + g if plan.own else stop
    sums = lax.fori_loop(first, last, tile, start_sums(plan.value))
    if plan.own:
        sums = tile(last, sums, "<" if plan.strict else "<=")
        tiles.skip(ring, last + 1 - first, stop - first)

    value = sums.value
    if plan.kernel.normalized:
        value = value / tiles.spread(jnp.where(sums.total > 0, sums.total, 1.0), plan.value)
        refs.norms.at[g][...] = norm_of(sums)
    tiles.put(refs.get("o_rows"), g, value, refs.o.at[b, h, rows])
    if plan.kernel.normalized:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.norms.at[g], refs.norm.at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)


def _read(plan: Plan, dtype: Any, k, q, *rest) -> tuple[Array, ...]:
    """One device's part of `read`; rest: values by halves, bound, numbers of rows and columns, `first`."""
    batch, heads, length = q.shape[:3]
    names = tuple(f"x{n}" for n in range(plan.halves)) + ("bound",) * (not plan.own)
    names += ("rows", "key_rows", "first") * plan.segments
    inputs = {"k": k, "q": q, **dict(zip(names, rest, strict=True))}
    scratch = tiles.ring_scratch(plan, plan.value, plan.halves, plan.segments)
    scratch["q_rows"] = tiles.shared(TILE, plan.key, plan.groups)
    if dtype == jnp.bfloat16:
        scratch["o_rows"] = tiles.shared(TILE, plan.value, plan.groups)
    outputs = {"o": ((batch, heads, length, plan.value), dtype)}
    if plan.kernel.normalized:
        outputs["norm"] = ((batch, heads, length), jnp.float32)
        scratch["norms"] = plgpu.SMEM((plan.groups, TILE), jnp.float32)
    scratch["rows_there"] = plgpu.Barrier(num_arrivals=1 + plan.segments, num_barriers=plan.groups)
    if plan.segments:
        scratch["numbers"] = plgpu.SMEM((plan.groups, 1, TILE), jnp.float32)
    scratch |= tiles.interpreter_scratch(plan, plan.halves)
    return tiles.call(
        plan,
        "attention_forward",
        functools.partial(_compute, plan=plan),
        functools.partial(tiles.bring_columns, plan=plan, values=plan.halves),
        (batch, heads, length // plan.size),
        inputs,
        outputs,
        scratch,
    )


def read(
    plan: Plan, dtype: Any, k: Array, q: Array, x: tuple[Array, ...], marks: tuple[Array, ...], bound=None
) -> tuple[Array, Array | None]:
    """Reads x [B, G, S, V] at the queries q [B, H, T, K]; T and S are multiples of R.

    Args:
      plan: as ever.
      dtype: of the output.
      k: [B, G, S, K].
      q: queries.
      x: values by halves; see tiles.value_halves.
      marks: segments of queries [B, T] and of keys [B, S], or nothing.
      bound: where queries see nothing of the call's own, how many slots they see.

    Returns:
      The output [B, H, T, V], and the log-sum-exp of the rows to base 2, [B, H, T], None without a normaliser.
    """
    operands = (k, q, *x[: plan.halves], *(() if plan.own else (tiles.bounds(k, bound),)))
    if plan.segments:
        group = k.shape[1]
        operands += (*(tiles.pack(group, m) for m in marks), tiles.first_tiles(plan, group, *marks))
    o, *norm = split_batch_and_heads(_read, (plan, dtype), results=1 + plan.kernel.normalized)(*operands)
    return o, norm[0] if norm else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(plan: Plan, dtype: Any, k: Array, q: Array, x: Array, marks: tuple[Array, ...]) -> Array:
    """`read`, differentiable in k, q and x; memory is linear in time, backward too."""
    return read(plan, dtype, k, q, tiles.value_halves(plan, x), marks)[0]


def _attend_forward(plan, dtype, k, q, x, marks):
    o, norm = read(plan, dtype, k, q, tiles.value_halves(plan, x), marks)
    return o, (k, q, x, marks, o if plan.kernel.normalized else None, norm)


def _attend_backward(plan, dtype, kept, do):
    k, q, x, marks, o, norm = kept
    mean = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    numbers = {"norm": norm, "mean": mean}
    operands = (k, q, tiles.value_halves(plan, x), tiles.value_halves(plan, do), marks, numbers)
    (dq,) = row_gradients(plan, *operands)
    dk, dx = column_gradients(plan, *operands, ("dk", "dx"))
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None


attend.defvjp(_attend_forward, _attend_backward)
