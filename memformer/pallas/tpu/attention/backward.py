"""Gradients of attention by tiles on TPU: one kernel that walks over blocks of columns, last block first.

With p the weights of a tile and g what is weighed (dO for the read, dP for the write, see write.py):

    G = g x^T      e = p, or -beta p for the write      dx = e^T g
    ds = e G - p mean (softmax), else slope e / p G      dk = scale ds^T q      dq = scale ds k

Tiles lie transposed, columns in sublanes, so that the numbers of rows spread over sublanes for nothing and only dq
needs a transposed operand. All rows of one head stay in VMEM, dq among them. Where `Solve` is given, the block of
columns j first becomes its own block of rows: later blocks have told it all of dU, and it solves for g = dP.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.similarity import similarity_slope
from memformer.core.types import Array
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.tiles import NAMES, Plan
from memformer.pallas.tpu.common import lockstep, product

__all__ = ["column_gradients"]


class Refs(NamedTuple):
    """What a program sees; fields that a call does not have are None.

    k, x, key are of its block of columns, rows, q, g, dq and dbeta of all rows; key is [8, R] segments.
    """

    k: Any
    q: Any
    x: Any
    rows: Any
    key: Any
    g: Any
    v: Any
    du: Any
    dk: Any
    dq: Any
    dx: Any
    dbeta: Any
    mean: Any


class _Rows(NamedTuple):
    """A block of rows as a tile meets it: q [R, K], g [R, V], and rows [1, R] of numbers."""

    q: Array
    g: Array
    norm: Array
    mean: Array
    beta: Array
    segment: Array


def _rows(plan: Plan, refs: Refs, i) -> _Rows:
    at = tiles.block_at(plan, i)
    numbers = refs.rows[0, 0, i]
    norm, mean, beta, segment = (
        numbers[place : place + 1] for place in map(NAMES.index, ("norm", "mean", "beta", "segment"))
    )
    if refs.mean is not None:
        mean = refs.mean[i][:1]
    g = refs.g[at] if refs.mean is not None else refs.g[0, 0, at]
    return _Rows(refs.q[0, 0, at], g, norm, mean, beta, segment)


def _tile(
    plan: Plan, refs: Refs, rows: _Rows, columns: slice, mask, write: bool, dx: bool
) -> Generator[None, None, tuple[Array, Array | None]]:
    """One tile: adds to dk and dx, returns ds [columns, R] and what the rows' dbeta gets, [1, R] or None."""
    scores = product(refs.k[0, 0, columns], rows.q, "nt", plan.passes) * plan.factor
    yield
    change = product(refs.x[0, 0, columns], rows.g, "nt", plan.value_passes)
    yield
    weights = tiles.weights_of(plan, scores, mask, rows.norm)
    felt = weights * -rows.beta if write else weights
    yield
    if dx:
        refs.dx[columns] += product(felt, rows.g, "nn", plan.value_passes)
    yield
    dbeta = -jnp.sum(weights * change, axis=0, keepdims=True) if write else None
    if plan.kernel.normalized:
        ds = felt * change - weights * rows.mean if write else weights * (change - rows.mean)
    else:
        ds = similarity_slope(plan.kernel, scores, weights) * change
        ds = ds if mask is None else jnp.where(mask, ds, 0.0)
        ds = ds * -rows.beta if write else ds
    if plan.value_passes == 1:
        ds = ds.astype(jnp.bfloat16)
    yield
    refs.dk[columns] += product(ds, rows.q, "nn", plan.value_passes)
    return ds, dbeta


def _block(plan: Plan, refs: Refs, i, own: bool, write: bool, dx: bool) -> None:
    """All that the tiles of the program's columns and of row block i give."""
    rows = _rows(plan, refs, i)
    key = tiles.to_columns(refs.key[0, 0, 0])[:, :1] if plan.segments else None
    steps = []
    for columns in plan.subs:
        mask = tiles.own_mask(plan, slice(0, plan.size), columns, transposed=True) if own else None
        mask = tiles.same_segment(mask, *((None, None) if key is None else (rows.segment, key[columns])))
        steps.append(_tile(plan, refs, rows, columns, mask, write, dx))
    parts = lockstep(steps)
    ds = jnp.concatenate([part[0] for part in parts], axis=0)
    refs.dq[0, 0, tiles.block_at(plan, i)] += product(ds, refs.k[0, 0], "tn", plan.value_passes)
    if write:
        refs.dbeta[0, 0, i] += functools.reduce(jnp.add, (part[1] for part in parts))


def _kernel(last_ref, *flat, plan: Plan, blocks: int, total: int, write: bool, solve: Callable | None, names):
    """Walks the rows that see the program's columns.

    Args:
      last_ref: [B, M] one more than the last block of rows that sees a block of columns.
      *flat: references by `names`.
      plan: as ever.
      blocks: N, blocks of rows.
      total: M, blocks of columns.
      write: whether rows have a beta.
      solve: makes g of the block of rows that the columns are; None where g is given.
      names: of the references.
    """
    refs = Refs(**(dict.fromkeys(Refs._fields) | dict(zip(names, flat, strict=True))))
    step = pl.program_id(2)
    j = total - 1 - step

    @pl.when(step == 0)
    def _():
        refs.dq[...] = jnp.zeros(refs.dq.shape, jnp.float32)
        if write:
            refs.dbeta[...] = jnp.zeros(refs.dbeta.shape, jnp.float32)

    outer = refs
    refs = refs._replace(dk=outer.dk.at[0, 0], dx=outer.dx.at[0, 0])
    refs.dk[...] = jnp.zeros(refs.dk.shape, jnp.float32)
    refs.dx[...] = jnp.zeros(refs.dx.shape, jnp.float32)

    def row(i, carry):
        _block(plan, refs, i, False, write, True)
        return carry

    first = jnp.maximum(j - plan.before + 1, 0) if plan.own else 0
    lax.fori_loop(first, jnp.minimum(last_ref[pl.program_id(0), j], blocks), row, 0)

    if plan.own:

        @pl.when(j >= plan.before)
        def _():
            if solve is not None:
                solve(plan, refs, j - plan.before)
            _block(plan, refs, j - plan.before, True, write, solve is None)

    refs.dk[...] = refs.dk[...] * plan.scale


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call of the kernel besides its plan: see `_kernel`."""

    write: bool
    solve: Callable | None


def _columns(plan: Plan, call: _Call, k, q, x, g, rows, last, *rest):
    """One device's part: g is dO or dP [B, H, T, V], or (v, dU) where the kernel solves for it."""
    batch, groups, slots, key = k.shape
    heads, length = q.shape[1:3]
    value, size, shared = x.shape[3], plan.size, heads // groups
    total, blocks = slots // size, length // size
    rest = list(rest)

    def column(shape, of=1):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h // of, total - 1 - n, *[0] * (len(shape) - 1)))

    def whole(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, n, *_: (b, h, *[0] * len(shape)))

    inputs = {
        "k": (k, column((size, key), shared)),
        "q": (q, whole(length, key)),
        "x": (x, column((size, value), shared)),
        "rows": (rows, whole(blocks, 8, size)),
    }
    if plan.segments:
        inputs["key"] = (rest.pop(0), column((1, 8, size), shared))
    if call.solve is None:
        inputs["g"] = (g, whole(length, value))
    else:
        inputs |= {"v": (g, column((size, value))), "du": (rest.pop(0), column((size, value)))}
    arrays = [x for x, _ in inputs.values()]

    def result(*shape):
        return varying_result((batch, heads, *shape), jnp.float32, *arrays)

    outputs = {
        "dk": (result(slots, key), column((size, key))),
        "dq": (result(length, key), whole(length, key)),
        "dx": (result(slots, value), column((size, value))),
    }
    if call.write:
        outputs["dbeta"] = (result(blocks, 1, size), whole(blocks, 1, size))
    scratch = {}
    if call.solve is not None:
        dtype = jnp.bfloat16 if plan.value_passes == 1 else jnp.float32
        scratch["g"] = pltpu.VMEM((length, value), dtype)
        scratch["mean"] = pltpu.VMEM((blocks, 8, size), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _kernel, plan=plan, blocks=blocks, total=total, write=call.write, solve=call.solve,
            names=(*inputs, *outputs, *scratch),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, total),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=tiles.compiler_params(3),
        name=f"memformer_{'write' if call.solve else 'attention'}_backward",
    )(last[:, 0], *arrays)  # fmt: skip


def column_gradients(
    plan: Plan,
    k: Array,
    q: Array,
    x: Array,
    g: Array,
    marks: tuple[Array, ...],
    numbers: dict[str, Array | None],
    *,
    solve: Callable | None = None,
    du: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients through every tile of one call whose rows VMEM holds.

    Args:
      plan: as ever.
      k: [B, G, S, K].
      q: [B, H, T, K].
      x: [B, G, S, V].
      g: dO or dP [B, H, T, V]; v where the kernel solves.
      marks: segments of queries [B, T] and of keys [B, S], or nothing.
      numbers: norm and mean of the rows, [B, H, T]; beta (and alpha) where this is the write.
      solve: makes dP of dU, inside the kernel.
      du: [B, G, T, V] where it solves.

    Returns:
      In float32 dk [B, G, S, K], dq [B, H, T, K], dx [B, G, S, V] (where it solves dP instead), and for the write
      dbeta [B, H, T].
    """
    plan = plan.backward
    heads, groups = q.shape[1], k.shape[1]
    total, blocks = k.shape[2] // plan.size, q.shape[2] // plan.size
    last = jnp.full((k.shape[0], total), blocks, jnp.int32)
    rest: tuple[Array, ...] = ()
    rows = tiles.pack_rows(plan, heads, segment=marks[0] if plan.segments else None, **numbers)
    if plan.segments:
        last = tiles.find_last(plan, *marks)
        rest = (tiles.pack_rows(plan, groups, segment=marks[1]),)
    if du is not None:
        rest += (du,)
    last = jnp.broadcast_to(last[:, None], (last.shape[0], groups, total))
    write = numbers.get("beta") is not None
    call = split_batch_and_heads(_columns, (plan, _Call(write, solve)), results=3 + write)
    dk, dq, dx, *dbeta = call(k, q, x, g, rows, last, *rest)
    dk, dx = (y.reshape(*k.shape[:2], -1, *y.shape[2:]).sum(2) if heads != groups else y for y in (dk, dx))
    return dk, dq * plan.scale, dx, *(y.reshape(q.shape[:3]) for y in dbeta)
