"""DeltaFormer's write on TPU: u block by block.

Rows R of one block, earlier slots E, A the write kernel, P what is left to write:

    P = alpha V_R - beta A[R, E] U_E        U_R = (I + beta A[R, R])^-1 P

Forward, a program is one block of one head: keys and u of that head stay in VMEM, it sums over earlier blocks as flash
attention does, and then solves inside the block, by the inverses of sub-blocks on its diagonal (inverse.py) taken in
turn, and substitution between them. Backward is the walk of columns.py, blocks in reverse, with this solve:

    dP_R = (I + beta A[R, R])^-T (dU_R - later A[R', R]^T beta dP_R')

Slots of a state, and earlier parts of a call too long for VMEM, are read by attention.py before the walk begins.
Saved for the backward pass: the inputs, u and the log-sum-exp of the rows.

Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), section 3.3.
"""

import dataclasses
import functools
from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.partition import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tiles
from memformer.pallas.tpu.attention import read
from memformer.pallas.tpu.columns import Refs, column_gradients
from memformer.pallas.tpu.common import iotas, lockstep, product
from memformer.pallas.tpu.inverse import unit_lower_inverse
from memformer.pallas.tpu.tiles import NAMES, Plan, Sums

__all__ = ["write"]


def _column(numbers: Array, name: str) -> Array:
    """[R, 1] of one name from [R, 8]."""
    place = NAMES.index(name)
    return numbers[:, place : place + 1]


def _seen_of_own(plan: Plan, rows: slice, numbers: Array, key: Array | None) -> Array:
    """What rows of a block see of its slots up to their sub-block."""
    seen = slice(0, rows.stop)
    mask = tiles.own_mask(plan, rows, seen)
    return mask if key is None else tiles.same_segment(mask, _column(numbers, "segment")[rows], key[:, seen])


def _invert(plan: Plan, own: Array, rows: slice) -> Generator[None, None, Array]:
    """(I + a)^-1 - I for the sub-block on the diagonal; small entries are not rounded beside ones."""
    inverse = yield from unit_lower_inverse(own[:, rows], plan.exact)
    row, column = iotas(inverse.shape)
    return jnp.where(row == column, 0.0, inverse)


def _own_forward(
    plan: Plan, rows: slice, w, k, mask, beta, top, total, erased
) -> Generator[None, None, tuple[Array, Array, Array, Array]]:
    """beta A of some rows against their own block, the log-sum-exp, what they read of earlier ones, and `_invert`."""
    scores = product(w, k, "nt", plan.passes) * plan.factor
    yield
    norm = jnp.zeros(beta.shape, jnp.float32)
    if plan.kernel.normalized:
        hidden = jnp.where(mask, scores, tiles.LOW)
        before = top
        top = jnp.maximum(before, jnp.max(hidden, axis=1, keepdims=True))
        yield
        shrink = jnp.exp2(before - top)
        total = total * shrink + jnp.sum(jnp.exp2(hidden - top), axis=1, keepdims=True)
        norm = top + jnp.log2(jnp.where(total > 0, total, 1.0))
        erased = erased * jnp.exp2(before - norm)
        yield
    own = beta * tiles.weights_of(plan, scores, mask, norm)
    inverse = yield from _invert(plan, own, rows)
    return own, norm, erased, inverse


def _start(plan: Plan, sums: Sums, rows: Array, start_ref) -> None:
    """The sums over the slots of the state, or nothing."""
    tiles.start_sums(sums)
    if start_ref is None:
        return
    sums.value[...] = start_ref[0, 0].T
    if plan.kernel.normalized:
        place = NAMES.index("start")
        sums.top[...] = jnp.broadcast_to(rows[place : place + 1], sums.top.shape)
        sums.total[...] = jnp.where(iotas(sums.total.shape)[0] == 0, 1.0, 0.0)


def _forward_kernel(first_ref, k_ref, w_ref, v_ref, rows_ref, *refs, plan: Plan, held: bool):
    keys = refs[0] if plan.segments else None
    start_ref = refs[plan.segments] if held else None
    u_ref, norm_ref, *refs = refs[plan.segments + held :]
    sums, near = Sums(*refs[:3]), refs[3] if plan.value_passes == 1 else u_ref.at[0, 0]
    i = pl.program_id(2)
    _start(plan, sums, rows_ref[0, 0, 0], start_ref)
    segment = rows_ref[0, 0, 0, :1] if plan.segments else None

    def block(j, carry):
        key = tiles.to_columns(keys[0, 0, j])[:, :1] if plan.segments else None
        tiles.add_block(plan, sums, w_ref.at[0, 0], k_ref.at[0, 0], near, j, segment, key)
        return carry

    lax.fori_loop(first_ref[pl.program_id(0), i], i, block, 0)

    numbers, top = tiles.to_columns(rows_ref[0, 0, 0]), tiles.to_columns(sums.top[...])[:, :1]
    total = jnp.sum(tiles.to_columns(sums.total[...]), axis=1, keepdims=True)
    at, erased, beta = tiles.block_at(plan, i), sums.value[...].T, _column(numbers, "beta")
    k, key = k_ref[0, 0, at], keys[0, 0, i][:1] if plan.segments else None
    steps = []
    for rows in plan.subs:
        mask = _seen_of_own(plan, rows, numbers, key)
        columns = (x[rows] for x in (beta, top, total, erased))
        steps.append(_own_forward(plan, rows, w_ref[0, 0, rows], k[: rows.stop], mask, *columns))
    parts = lockstep(steps)
    target = _column(numbers, "alpha") * v_ref[0, 0].astype(jnp.float32)
    written: list[Array] = []
    for rows, (own, _, erased, inverse) in zip(plan.subs, parts, strict=True):
        left = target[rows] - beta[rows] * erased
        for earlier, u in zip(plan.subs, written, strict=False):
            left = left - product(own[:, earlier], u, "nn", plan.exact)
        written.append(left + product(inverse, left, "nn", plan.exact))
    u = jnp.concatenate(written)
    u_ref[0, 0, at] = u
    if plan.value_passes == 1:
        near[at] = u.astype(near.dtype)
    norm_ref[0, 0, 0] = tiles.to_row(jnp.concatenate([part[1] for part in parts]))[:1]


def _forward(plan: Plan, k, w, v, rows, first, *rest):
    """One device's part of the walk over the call's own slots; rest: segments of keys, what the state gave."""
    batch, groups, length, key = k.shape
    value, size = v.shape[3], plan.size
    held = len(rest) > plan.segments
    blocks = length // size

    def block(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, i, *_: (b, h, i, *[0] * (len(shape) - 1)))

    def whole(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, i, *_: (b, h, *[0] * len(shape)))

    like = (k, w, v, rows, *rest)
    scratch = tiles.sums_scratch(plan, value)
    if plan.value_passes == 1:
        scratch.append(pltpu.VMEM((length, value), jnp.bfloat16))
    in_specs = [whole(length, key), block(size, key), block(size, value), block(1, 8, size)]
    in_specs += [whole(blocks, 8, size)] * plan.segments + [block(size, value)] * held
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan, held=held),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, blocks),
            in_specs=in_specs,
            out_specs=[whole(length, value), block(1, 1, size)],
            scratch_shapes=scratch,
        ),
        out_shape=[
            varying_result((batch, groups, length, value), jnp.float32, *like),
            varying_result((batch, groups, blocks, 1, size), jnp.float32, *like),
        ],
        compiler_params=tiles.compiler_params(3),
        name="memformer_write_forward",
    )(first[:, 0], k, w, v, rows, *rest)


def _solve(plan: Plan, refs: Refs, i) -> None:
    """Block i inside the backward walk: dP of dU, and what its rows' normaliser takes from each score's gradient."""
    at = tiles.block_at(plan, i)
    numbers = tiles.to_columns(refs.rows[0, 0, i])
    beta, norm = _column(numbers, "beta"), _column(numbers, "norm")
    key = refs.key[0, 0, 0][:1] if plan.segments else None

    def own(rows):
        w, k = refs.q[0, 0, at][rows], refs.k[0, 0, : rows.stop]
        scores = product(w, k, "nt", plan.passes) * plan.factor
        yield
        own = beta[rows] * tiles.weights_of(plan, scores, _seen_of_own(plan, rows, numbers, key), norm[rows])
        return own, (yield from _invert(plan, own, rows))

    parts = lockstep([own(rows) for rows in plan.subs])
    solved: list[Array] = [None] * len(parts)
    for place in range(len(parts) - 1, -1, -1):
        rows = plan.subs[place]
        left = refs.du[0, 0, rows] + refs.dx[rows]
        for later in range(place + 1, len(parts)):
            left = left - product(parts[later][0][:, rows], solved[later], "tn", plan.exact)
        solved[place] = left + product(parts[place][1], left, "tn", plan.exact)
    dp = jnp.concatenate(solved)
    refs.g[at] = dp.astype(refs.g.dtype)
    refs.dx[...] = dp
    erased = _column(numbers, "alpha") * refs.v[0, 0].astype(jnp.float32) - refs.x[0, 0]
    refs.mean[i] = tiles.to_row(-jnp.sum(dp * erased, axis=1, keepdims=True))


class _Part(NamedTuple):
    """One part of a call: which rows, and how many slots lie before them."""

    rows: slice
    slots: int


def _parts(plan: Plan, length: int) -> list[_Part]:
    """Parts of the call that VMEM holds."""
    step, before = plan.most * plan.size, plan.before * plan.size
    return [_Part(slice(s, min(s + step, length)), before + s) for s in range(0, length, step)]


def _plans(plan: Plan, part: _Part) -> tuple[Plan, Plan]:
    """The walk over a part's own slots, and the read of all before them."""
    own = dataclasses.replace(plan, before=0, own=True, strict=True)
    return own, dataclasses.replace(plan, before=part.slots // plan.size, own=False)


def _marks(plan: Plan, part: _Part, marks: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Segments for the two plans."""
    if not plan.segments:
        return (), ()
    query, key = marks
    stop = part.slots + part.rows.stop - part.rows.start
    return (query[:, part.rows], key[:, part.slots : stop]), (query[:, part.rows], key[:, : part.slots])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(plan: Plan, k: Array, w: Array, v: Array, alpha: Array, beta: Array, held: Array, marks: tuple[Array, ...]):
    """The writes u [B, G, T, V] of a call, float32; memory is linear in time, backward too.

    Args:
      plan: how the call is cut; `before` counts the blocks of the state.
      k: keys of the state and then of the call, [B, G, S, K]; S and T are multiples of R.
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha: [B, G, T].
      beta: [B, G, T].
      held: u of the state, [B, G, S - T, V].
      marks: segments of the tokens [B, T] and of all slots [B, S], or nothing.
    """
    return _write(plan, k, w, v, alpha, beta, held, marks)[0]


def _write(plan, k, w, v, alpha, beta, held, marks):
    """u, and the log-sum-exp of the rows."""
    groups, written, norms = k.shape[1], held, []
    for part in _parts(plan, w.shape[2]):
        own, before = _plans(plan, part)
        near, far = _marks(plan, part, marks)
        rows = part.rows
        stop = part.slots + rows.stop - rows.start
        start, rest = None, ()
        if part.slots:
            value, start = read(before, jnp.float32, k[:, :, : part.slots], w[:, :, rows], _near(plan, written), far)
            rest = (value,)
        numbers = tiles.pack_rows(
            plan, groups, segment=near[0] if near else None, alpha=alpha[:, :, rows], beta=beta[:, :, rows], start=start
        )
        first = jnp.zeros((k.shape[0], numbers.shape[2]), jnp.int32)
        if near:
            first = tiles.find_first(plan, *near)
            rest = (tiles.pack_rows(plan, groups, segment=near[1]), *rest)
        first = jnp.broadcast_to(first[:, None], (first.shape[0], groups, first.shape[1]))
        call = split_batch_and_heads(_forward, (own,), results=2)
        u, norm = call(k[:, :, part.slots : stop], w[:, :, rows], v[:, :, rows], numbers, first, *rest)
        written = jnp.concatenate([written, u], axis=2) if written.shape[2] else u
        norms.append(norm.reshape(*norm.shape[:2], -1))
    return written[:, :, held.shape[2] :], jnp.concatenate(norms, axis=2)


def _near(plan: Plan, u: Array) -> Array:
    """u as products take it."""
    return u.astype(jnp.bfloat16) if plan.value_passes == 1 else u


def _write_forward(plan, k, w, v, alpha, beta, held, marks):
    u, norm = _write(plan, k, w, v, alpha, beta, held, marks)
    return u, (k, w, v, alpha, beta, held, marks, u, norm)


def _write_backward(plan, kept, du):
    k, w, v, alpha, beta, held, marks, u, norm = kept
    state = held.shape[2]
    dk = jnp.zeros(k.shape, jnp.float32)
    du = jnp.concatenate([jnp.zeros(held.shape, jnp.float32), du], axis=2) if state else du
    written = jnp.concatenate([held, u], axis=2) if state else u
    grown = []
    for part in reversed(_parts(plan, w.shape[2])):
        own, before = _plans(plan, part)
        near, far = _marks(plan, part, marks)
        rows = part.rows
        here = slice(part.slots, part.slots + rows.stop - rows.start)
        numbers = {"norm": norm[:, :, rows], "alpha": alpha[:, :, rows], "beta": beta[:, :, rows]}
        keys, queries, values = k[:, :, here], w[:, :, rows], v[:, :, rows]
        dk_own, dw, dp, dbeta = column_gradients(
            own, keys, queries, u[:, :, rows], values, near, numbers, solve=_solve, du=du[:, :, here]
        )
        if part.slots:
            earlier = slice(0, part.slots)
            left = alpha[:, :, rows, None] * values.astype(jnp.float32) - u[:, :, rows]
            numbers["mean"] = -jnp.sum(dp * left, axis=-1)
            dk_far, dw_far, du_far, dbeta_far = column_gradients(
                before, k[:, :, earlier], queries, _near(plan, written[:, :, earlier]), _near(plan, dp), far, numbers
            )
            dw, dbeta = dw + dw_far, dbeta + dbeta_far
            dk, du = dk.at[:, :, earlier].add(dk_far), du.at[:, :, earlier].add(du_far)
        dk = dk.at[:, :, here].add(dk_own)
        grown.append((dw, dp, dbeta))
    dw, dp, dbeta = (jnp.concatenate(x[::-1], axis=2) for x in zip(*grown, strict=True))
    dv, dalpha = alpha[..., None] * dp, jnp.sum(v.astype(jnp.float32) * dp, axis=-1)
    like = (k, w, v, alpha, beta)
    gradients = (x.astype(y.dtype) for x, y in zip((dk, dw, dv, dalpha, dbeta), like, strict=True))
    return *gradients, du[:, :, :state], None


write.defvjp(_write_forward, _write_backward)
