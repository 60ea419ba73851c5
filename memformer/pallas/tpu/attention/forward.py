"""Reading a cache on TPU: attention by tiles, with any similarity kernel, and its gradients.

    o_t = sum_i p_ti x_i;  p_ti = kappa(q_t . k_i), for softmax divided by its sum over the slots seen

A program is one block of queries of one head; the keys and values of that head stay in VMEM from block to block, or
come in parts where they are too many. Saved for the backward pass: the inputs, the output and the log-sum-exp.

Source: arXiv 2205.14135 (tiles with a running maximum), 2307.08691 (backward from the log-sum-exp).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.backward import column_gradients
from memformer.pallas.tpu.attention.tiles import Plan, Sums
from memformer.pallas.tpu.common import lockstep

__all__ = ["attend", "read", "read_gradients"]


def _kernel(first_ref, k_ref, q_ref, x_ref, *refs, plan: Plan, blocks: int):
    rows, keys = (refs[0][0, 0, 0], refs[1]) if plan.segments else (None, None)
    o_ref, norm_ref, *sums = refs[2 * plan.segments :]
    sums = Sums(*sums)
    i, part = pl.program_id(2), pl.program_id(3)
    segment = rows[:1] if plan.segments else None

    @pl.when(part == 0)
    def _():
        tiles.start_sums(sums)

    q, k, x = q_ref.at[0, 0], k_ref.at[0, 0], x_ref.at[0, 0]

    def key_of(j):
        return tiles.to_columns(keys[0, 0, j])[:, :1] if plan.segments else None

    def block(j, carry):
        tiles.add_block(plan, [(sums, q, k, x)], j, segment, key_of(j))
        return carry

    start = part * plan.most
    before = plan.before + i if plan.own else plan.before
    first = jnp.maximum(first_ref[pl.program_id(0), i], start)
    lax.fori_loop(first - start, jnp.minimum(before, start + plan.most) - start, block, 0)

    if plan.own:

        @pl.when(part == before // plan.most)
        def _():
            j = before - start
            key, steps = key_of(j), []
            for rows in plan.subs:
                seen = slice(0, rows.stop)
                mask = tiles.own_mask(plan, rows, seen, transposed=True)
                mask = tiles.same_segment(mask, *((None,) * 2 if key is None else (segment[:, rows], key[seen])))
                at = tiles.block_at(plan, j, 0, rows.stop)
                steps.append(tiles.add_tile(plan, sums, rows, q, k, x, at, mask))
            lockstep(steps, apart=1)

    @pl.when(part == blocks - 1)
    def _():
        value, norm = sums.value[...], jnp.zeros((1, plan.size), jnp.float32)
        if plan.kernel.normalized:
            total = jnp.sum(sums.total[...], axis=0, keepdims=True)
            value = value / jnp.where(total > 0, total, 1.0)
            norm = tiles.norm_of(sums.top[...], sums.total[...])
        o_ref[0, 0] = value.T.astype(o_ref.dtype)
        norm_ref[0, 0, 0] = norm


def _read(plan: Plan, dtype: Any, k, q, x, first, *numbers):
    """One device's part of `read`."""
    batch, groups, slots, key = k.shape
    heads, length = q.shape[1:3]
    value, size, shared = x.shape[3], plan.size, heads // groups
    most = min(plan.most, slots // size)
    parts = -(-slots // (size * most))

    def part(i, p):
        # Parts behind a block's own are not fetched.
        last = (plan.before + i) // most if plan.own else parts - 1
        return jnp.minimum(p, last)

    def slots_of(width):
        return pl.BlockSpec((1, 1, most * size, width), lambda b, h, i, p, *_: (b, h // shared, part(i, p), 0))

    def rows_of(width):
        return pl.BlockSpec((1, 1, size, width), lambda b, h, i, p, *_: (b, h, i, 0))

    rows = [
        pl.BlockSpec((1, 1, 1, 8, size), lambda b, h, i, p, *_: (b, h // shared, i, 0, 0)),
        pl.BlockSpec((1, 1, most, 8, size), lambda b, h, i, p, *_: (b, h // shared, part(i, p), 0, 0)),
    ]
    norm = pl.BlockSpec((1, 1, 1, 1, size), lambda b, h, i, p, *_: (b, h, i, 0, 0))
    like = (k, q, x, *numbers)
    return pl.pallas_call(
        functools.partial(_kernel, plan=dataclasses.replace(plan, most=most), blocks=parts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // size, parts),
            in_specs=[slots_of(key), rows_of(key), slots_of(value), *(rows if plan.segments else [])],
            out_specs=[rows_of(value), norm],
            scratch_shapes=list(tiles.sums_scratch(plan, value).values()),
        ),
        out_shape=[
            varying_result((batch, heads, length, value), dtype, *like),
            varying_result((batch, heads, length // size, 1, size), jnp.float32, *like),
        ],
        compiler_params=tiles.compiler_params(4),
        name="memformer_attention_forward",
    )(first[:, 0], k, q, x, *numbers)


def read(plan: Plan, dtype: Any, k: Array, q: Array, x: Array, marks: tuple[Array, ...]) -> tuple[Array, Array]:
    """Reads x [B, G, S, V] at the queries q [B, H, T, K]; T and S are multiples of R.

    Args:
      plan: as ever.
      dtype: of the output.
      k: [B, G, S, K].
      q: queries.
      x: values.
      marks: segments of queries [B, T] and of keys [B, S], or nothing.

    Returns:
      The output [B, H, T, V], and the log-sum-exp of the rows to base 2, [B, H, T].
    """
    groups = k.shape[1]
    first = jnp.zeros((q.shape[0], q.shape[2] // plan.size), jnp.int32)
    numbers: tuple[Array, ...] = ()
    if plan.segments:
        first = tiles.find_first(plan, *marks)
        numbers = tuple(tiles.pack_rows(plan, groups, segment=x) for x in marks)
    first = jnp.broadcast_to(first[:, None], (first.shape[0], groups, first.shape[1]))
    o, norm = split_batch_and_heads(_read, (plan, dtype), results=2)(k, q, x, first, *numbers)
    return o, norm.reshape(q.shape[:3])


def read_gradients(
    plan: Plan, k: Array, q: Array, x: Array, marks: tuple[Array, ...], norm: Array, mean: Array | None, do: Array
) -> tuple[Array, Array, Array]:
    """Gradients of k, q and x, given that of the output; q by parts that VMEM holds.

    Args:
      plan, k, q, x, marks: as in `read`.
      norm: its second result.
      mean: the sum of output times do, [B, H, T]: what the normaliser takes from each score's gradient.
      do: [B, H, T, V].
    """
    length, step = q.shape[2], plan.most * plan.size
    if length <= step:
        return column_gradients(plan, k, q, x, do, marks, {"norm": norm, "mean": mean})
    dq, dk, dx = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        slots = plan.before * plan.size + (rows.stop if plan.own else 0)
        here = dataclasses.replace(plan, before=plan.before + start // plan.size if plan.own else plan.before)
        segments = (marks[0][:, rows], marks[1][:, :slots]) if plan.segments else ()
        numbers = {"norm": norm[:, :, rows], "mean": None if mean is None else mean[:, :, rows]}
        parts = column_gradients(
            here, k[:, :, :slots], q[:, :, rows], x[:, :, :slots], do[:, :, rows], segments, numbers
        )
        dq.append(parts[1])
        dk, dx = dk.at[:, :, :slots].add(parts[0]), dx.at[:, :, :slots].add(parts[2])
    return dk, jnp.concatenate(dq, axis=2), dx


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(plan: Plan, dtype: Any, k: Array, q: Array, x: Array, marks: tuple[Array, ...]) -> Array:
    """`read`, differentiable in k, q and x; memory is linear in time, backward too."""
    return read(plan, dtype, k, q, _values(plan, x), marks)[0]


def _values(plan: Plan, x: Array) -> Array:
    """Values as products take them."""
    return x.astype(jnp.bfloat16 if plan.value_passes == 1 else jnp.float32)


def _attend_forward(plan, dtype, k, q, x, marks):
    o, norm = read(plan, dtype, k, q, _values(plan, x), marks)
    return o, (k, q, x, marks, o if plan.kernel.normalized else None, norm)


def _attend_backward(plan, dtype, kept, do):
    k, q, x, marks, o, norm = kept
    mean = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    dk, dq, dx = read_gradients(plan, k, q, _values(plan, x), marks, norm, mean, _values(plan, do))
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None


attend.defvjp(_attend_forward, _attend_backward)
