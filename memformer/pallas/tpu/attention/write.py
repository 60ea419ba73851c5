"""DeltaFormer's write on TPU: u block by block.

Rows R of one block, earlier slots E, A the write kernel, P what is left to write:

    P = alpha V_R - beta A[R, E] U_E        U_R = (I + beta A[R, R])^-1 P

Forward, a program is one block of one head, or of two where they are even: keys and u of a head stay in VMEM, it sums
over earlier blocks as flash attention does, and then solves inside the block, by the inverses of sub-blocks on its
diagonal (inverse.py, two heads sharing products), and substitution between them. All of it lies transposed, rows in
lanes, and weights between sub-blocks count as those of earlier blocks do, bfloat16 where a softmax divides; only the
inverses keep 16 bits then. Backward is the walk of columns.py, blocks in reverse, with this solve:

    dP_R = (I + beta A[R, R])^-T (dU_R - later A[R', R]^T beta dP_R')

Slots of a state, and earlier parts of a call too long for VMEM, are read by attention.py before the walk begins.
Saved for the backward pass: the inputs, u and the log-sum-exp of the rows.

Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), section 3.3.
"""

import dataclasses
import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.backward import Refs, column_gradients
from memformer.pallas.tpu.attention.forward import read
from memformer.pallas.tpu.attention.tiles import NAMES, Plan, Sums
from memformer.pallas.tpu.common import iotas, lockstep, product, split
from memformer.pallas.tpu.inverse import unit_lower_inverses

__all__ = ["write"]

# Steps by which a sub-block starts later than the one before it. Seen on v5p, bundles for 512 rows of two heads: 6016
# for 0, 6186 for 4, 5937 for 10, 6346 for 20.
APART = 10


def _column(numbers: Array, name: str) -> Array:
    """[R, 1] of one name from [R, 8]."""
    place = NAMES.index(name)
    return numbers[:, place : place + 1]


def _seen_of_own(plan: Plan, rows: slice, numbers: Array, key: Array | None) -> Array:
    """What rows of a block see of its slots up to their sub-block."""
    seen = slice(0, rows.stop)
    mask = tiles.own_mask(plan, rows, seen)
    return mask if key is None else tiles.same_segment(mask, _column(numbers, "segment")[rows], key[:, seen])


def _invert(own: list[Any], passes: int) -> Generator[None, None, list[Array]]:
    """(I + a)^-1 - I for sub-blocks on the diagonal, one or two; small entries are not rounded beside ones."""
    inverses = yield from unit_lower_inverses(own, passes)
    row, column = iotas(inverses[0].shape)
    return [jnp.where(row == column, 0.0, inverse) for inverse in inverses]


class _Head(NamedTuple):
    """What one head of a program sees; fields that a call does not have are None.

    Attributes:
      k, w, v, start: of this head.
      rows: numbers of its rows, [8, R].
      keys: segments of all columns, [N, 8, R].
      u, norm: results, [R, V] and [1, R].
      near: u of all slots so far, as products take it.
      sums: over earlier blocks.
      weights: of the block's columns [R] for its rows [R], with no normaliser.
      own: beta A of each sub-block against itself.
    """

    k: Any
    w: Any
    v: Any
    start: Any
    rows: Any
    keys: Any
    u: Any
    norm: Any
    near: Any
    sums: Sums
    weights: Any
    own: Any

    def number(self, name: str, rows: slice) -> Array:
        """[1, rows] of one name."""
        place = NAMES.index(name)
        return self.rows[place : place + 1, rows]

    def key(self, i, columns: slice) -> Array:
        """[columns, 1] segments of some columns of block i."""
        return tiles.to_columns(self.keys[i])[columns, :1]


def _start(plan: Plan, head: _Head) -> None:
    """The sums over the slots of the state, or nothing."""
    sums = head.sums
    tiles.start_sums(sums)
    if head.start is None:
        return
    sums.value[...] = head.start[...].T
    if plan.kernel.normalized:
        sums.top[...] = jnp.broadcast_to(head.number("start", slice(0, plan.size)), sums.top.shape)
        sums.total[...] = jnp.where(iotas(sums.total.shape)[0] == 0, 1.0, 0.0)


def _weigh(plan: Plan, head: _Head, i, place: int) -> Generator[None, None, tuple[Array, list[Array]]]:
    """Weights of a sub-block's rows in its own block, tile by tile, and what makes them (and the sums) -beta A.

    Returns:
      Factors of the sums over earlier blocks, and of each tile, [1, rows].
    """
    rows, sums, factors = plan.subs[place], head.sums, []
    beta = head.number("beta", rows)
    start = top = sums.top[:, rows] if plan.kernel.normalized else None
    for columns in plan.subs[: place + 1]:
        k = head.k[tiles.block_at(plan, i, columns.start, plan.sub)]
        scores = product(k, head.w[rows], "nt", plan.passes) * plan.factor
        yield
        mask = tiles.own_mask(plan, rows, columns, transposed=True) if columns == rows else None
        if plan.segments:
            mask = tiles.same_segment(mask, head.number("segment", rows), head.key(i, columns))
        if plan.kernel.normalized:
            scores = scores if mask is None else jnp.where(mask, scores, tiles.LOW)
            top, _, weights = yield from tiles.widen(sums, rows, top, scores)
            factors.append(top[:1])
        else:
            weights = tiles.weights_of(plan, scores, mask, None)
            factors.append(jnp.zeros_like(beta))
        if columns != rows:
            head.weights[columns, rows] = weights.astype(head.weights.dtype)
        yield
    norm = tiles.norm_of(top, sums.total[:, rows]) if plan.kernel.normalized else jnp.zeros_like(beta)
    head.norm[:, rows] = norm
    factors = [-beta * jnp.exp2(x - norm) if plan.kernel.normalized else -beta for x in factors]
    head.own[place] = (weights * -factors[-1]).T
    yield
    return factors[-1] if start is None else -beta * jnp.exp2(start[:1] - norm), factors[:-1]


def _sub_block(plan: Plan, heads: list[_Head], written: list[list], i, place: int) -> Generator[None, None, None]:
    """u of one sub-block of every head; `written` holds that of those before it, [V, rows], as products take it."""
    rows, factors = plan.subs[place], []
    for head in heads:
        factors.append((yield from _weigh(plan, head, i, place)))
    inverses = yield from _invert([head.own.at[place] for head in heads], plan.exact)
    lefts = []
    for head, (start, _) in zip(heads, factors, strict=True):
        lefts.append(head.number("alpha", rows) * head.v[rows].astype(jnp.float32).T + start * head.sums.value[:, rows])
        yield
    while min(map(len, written)) < place:
        yield
    for columns, *ours in zip(plan.subs[:place], *(each for _, each in factors), strict=True):
        for h, (head, factor) in enumerate(zip(heads, ours, strict=True)):
            u = written[h][columns.start // plan.sub]
            lefts[h] += factor * product(u, head.weights[columns, rows], "nn", plan.value_passes)
    yield
    changes = [product(left, inverse, "nt", plan.exact) for left, inverse in zip(lefts, inverses, strict=True)]
    yield
    for head, left, change, done in zip(heads, lefts, changes, written, strict=True):
        u = left + change
        done.append(split(u, plan.value_passes))
        u = u.T
        head.u[rows] = u
        head.near[tiles.block_at(plan, i, rows.start, plan.sub)] = u.astype(head.near.dtype)


def _forward_kernel(first_ref, *flat, plan: Plan, names: tuple[str, ...], count: int):
    """One block of `count` heads; `names` are those of the references."""
    refs = dict(zip(names, flat, strict=True))
    heads = []
    for h in range(count):
        fields = {name: refs[name].at[0, h] if name in refs else None for name in ("k", "w", "v", "start", "keys", "u")}
        fields |= {name: refs[name].at[0, h, 0] for name in ("rows", "norm")}
        fields |= {name: refs[name].at[h] for name in ("near", "weights", "own")}
        heads.append(_Head(sums=Sums(*(refs[name].at[h] for name in Sums._fields)), **fields))
    i = pl.program_id(2)
    for head in heads:
        _start(plan, head)

    def block(j, carry):
        segment, key, every = None, None, slice(0, plan.size)
        if plan.segments:
            segment, key = heads[0].number("segment", every), heads[0].key(j, every)
        tiles.add_block(plan, [(head.sums, head.w, head.k, head.near) for head in heads], j, segment, key)
        return carry

    lax.fori_loop(first_ref[pl.program_id(0), i], i, block, 0)
    written: list[list] = [[] for _ in heads]
    lockstep([_sub_block(plan, heads, written, i, place) for place in range(len(plan.subs))], apart=APART)


def _forward(plan: Plan, k, w, v, rows, first, *rest):
    """One device's part of the walk over the call's own slots; rest: segments of keys, what the state gave."""
    batch, groups, length, key = k.shape
    value, size = v.shape[3], plan.size
    blocks, rest = length // size, list(rest)
    # Two heads: one waits for its products while the other works, and their inverses share products.
    dtype = jnp.bfloat16 if plan.value_passes == 1 else jnp.float32
    resident = length * (2 * key * k.dtype.itemsize + value * jnp.dtype(dtype).itemsize)
    count = 2 if groups % 2 == 0 and 2 * resident <= tuning.PAIR else 1

    def block(*shape):
        return pl.BlockSpec((1, count, *shape), lambda b, h, i, *_: (b, h, i, *[0] * (len(shape) - 1)))

    def whole(*shape):
        return pl.BlockSpec((1, count, *shape), lambda b, h, i, *_: (b, h, *[0] * len(shape)))

    inputs = {
        "k": (k, whole(length, key)),
        "w": (w, block(size, key)),
        "v": (v, block(size, value)),
        "rows": (rows, block(1, 8, size)),
    }
    if plan.segments:
        inputs["keys"] = (rest.pop(0), whole(blocks, 8, size))
    if rest:
        inputs["start"] = (rest.pop(0), block(size, value))
    arrays = [x for x, _ in inputs.values()]
    scratch = {name: pltpu.VMEM((count, *x.shape), x.dtype) for name, x in tiles.sums_scratch(plan, value).items()}
    scratch |= {
        "near": pltpu.VMEM((count, length, value), dtype),
        "weights": pltpu.VMEM((count, size, size), dtype),
        "own": pltpu.VMEM((count, len(plan.subs), plan.sub, plan.sub), jnp.float32),
    }
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan, names=(*inputs, "u", "norm", *scratch), count=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups // count, blocks),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[block(size, value), block(1, 1, size)],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            varying_result((batch, groups, length, value), jnp.float32, *arrays),
            varying_result((batch, groups, blocks, 1, size), jnp.float32, *arrays),
        ],
        compiler_params=tiles.compiler_params(3),
        name="memformer_write_forward",
    )(first[:, 0], *arrays)


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
        return own, (yield from _invert([own[:, rows]], plan.exact))[0]

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
