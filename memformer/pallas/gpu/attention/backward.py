"""Gradients of attention by tiles on Hopper: a kernel for rows (dq) and one for columns (dk and dx).

With p the weights of a tile and g what is weighed (dO for the read, dP for the write, see write.py):

    G = g x^T      e = p, or -beta p for the write      dx = e^T g
    ds = e G - p mean (softmax), else slope e / p G      dk = scale ds^T q      dq = scale ds k

Both compute the scores of a tile again, from the log-sum-exp. In the second tiles lie transposed, and a program takes
all query heads of its key head.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.tiles import TILE, Plan, Refs, Ring
from memformer.pallas.gpu.common import column, products, row, turned
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["column_gradients", "row_gradients"]


def _names(plan: Plan, write: bool) -> tuple[str, ...]:
    """Numbers of the rows that gradients need."""
    names = ("norm", "mean") * plan.kernel.normalized + ("beta",) * write
    return names + ("segment",) * plan.segments


def _felt(weights: Array, number, write: bool) -> Array:
    """e of a tile of weights; `number` gives a number of the rows, spread over the tile, by its name."""
    return weights * -number("beta") if write else weights


def _cleared(plan: Plan, weights: Array, change: Array, mask) -> Array:
    """G of a tile, 0 where its scores have no gradient; weights of softmax and exp are 0 there themselves.

    Args:
      plan: as ever.
      weights, change: of the tile; change is G.
      mask: gives what is seen, or None; asked for again, for want of registers to keep it.
    """
    if plan.kernel.normalized or plan.kernel.name == "exp":
        return change
    seen = weights > 0 if plan.kernel.name == "relu" else mask()
    return change if seen is None else jnp.where(seen, change, 0.0)


def _scores_gradient(plan: Plan, weights: Array, change: Array, number, write: bool) -> Array:
    """ds of a tile.

    Args:
      plan: as ever.
      weights: of the tile.
      change: G as `_cleared` gives it.
      number: as in `_felt`.
      write: whether rows have a beta.
    """
    if plan.kernel.normalized:
        return _felt(weights, number, write) * change - weights * number("mean")
    return _felt(weights * change if plan.kernel.name == "exp" else change, number, write)


def _left(refs: Refs, g, x: Array, count: int, first: int):
    """A left operand of `count` halves; the interpreter's scratch from `first` on."""
    scratch = [refs[f"left{n}"].at[g] for n in range(first, first + count)] if tiles.interpreting() else ()
    return tiles.left(tiles.halves(x, count), scratch)


def _compute_rows(refs: Refs, plan: Plan, write: bool) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    i, first, own, stop = tiles.row_extent(plan, refs)
    ring = tiles.column_ring(plan, refs, plan.halves)
    rows, names = pl.ds(i * plan.size + g * TILE, TILE), _names(plan, write)
    changes = range(_changes(plan, write))
    sources = [(refs.q.at[b, h, rows], refs.q_rows)]
    sources += [(refs[f"g{n}"].at[b, h, rows], refs[f"g_rows{n}"]) for n in changes]
    if names:
        sources.append((refs.rows.at[b, h, i * plan.groups + g], refs.numbers))
    for source, target in sources:
        plgpu.copy_gmem_to_smem(source, target.at[g], refs.rows_there.at[g])
    plgpu.barrier_wait(refs.rows_there.at[g])
    tiles.bring_places(refs, g)

    def number(name):
        return column(refs.numbers.at[g, names.index(name)], TILE)

    def tile(t, carry, diagonal=None):
        dq, dbeta = carry
        slot = ring.await_key(t - first)
        ring.await_value(t - first)
        k, xs = refs.key_slots.at[slot], [turned(refs[f"value_slots{n}"].at[slot]) for n in range(plan.halves)]
        gs = [refs[f"g_rows{n}"].at[g] for n in changes]
        scores, change = products(((refs.q_rows.at[g], turned(k)),), tiles.pairs(gs, xs))
        marks = (refs.numbers.at[g, names.index("segment")], refs.number_slots.at[slot, 0]) if plan.segments else ()
        mask = tiles.tile_mask(diagonal, *(marks or (None, None)), tiles.places(refs, g) if diagonal else None)
        weights = tiles.weights_of(plan, scores * plan.factor, mask, number("norm") if plan.kernel.normalized else None)
        change = _cleared(plan, weights, change, lambda: mask)
        if write:
            dbeta = dbeta - jnp.sum(weights * change, axis=1)
        ds = _scores_gradient(plan, weights, change, number, write)
        dq = tiles.accumulate(dq, tiles.pairs(_left(refs, g, ds, plan.halves, 0), (k,)))
        ring.release(t - first)
        return dq, dbeta

    last = own + g if plan.own else stop
    zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    carry = lax.fori_loop(first, last, tile, (tiles.zeros(plan.key), zero))
    if plan.own:
        carry = tile(last, carry, "<" if plan.strict else "<=")
        tiles.skip(ring, last + 1 - first, stop - first)
    dq, dbeta = carry
    tiles.put(refs.get("q_rows"), g, dq * plan.scale, refs.dq.at[b, h, rows])
    if write:
        refs.sums.at[g][...] = dbeta
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.sums.at[g], refs.dbeta.at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)


def _changes(plan: Plan, write: bool) -> int:
    """Arrays that make up g for dq: dO has bfloat16's bits only."""
    return plan.halves if write else 1


def _rows(plan: Plan, write: bool, k, q, *rest) -> tuple[Array, ...]:
    """One device's part of dq, and of dbeta; rest: x and g by halves, numbers of rows, segments of columns, `first`."""
    batch, heads, length = q.shape[:3]
    names, rest = _names(plan, write), list(rest)
    changes = _changes(plan, write)
    inputs = {"places": tiles.place_numbers(), "k": k, "q": q}
    for name in (*(f"x{n}" for n in range(plan.halves)), *(f"g{n}" for n in range(changes))):
        inputs[name] = rest.pop(0)
    if names:
        inputs["rows"] = rest.pop(0)
    if plan.segments:
        inputs |= {"key_rows": rest[0], "first": rest[1]}
    outputs = {"dq": ((batch, heads, length, plan.key), jnp.bfloat16)}
    scratch = tiles.ring_scratch(plan, plan.value, plan.halves, plan.segments)
    widths = {"q_rows": plan.key, **{f"g_rows{n}": plan.value for n in range(changes)}}
    scratch |= {name: tiles.shared(TILE, width, plan.groups) for name, width in widths.items()}
    scratch["rows_there"] = plgpu.Barrier(num_arrivals=1 + changes + bool(names), num_barriers=plan.groups)
    if names:
        scratch["numbers"] = plgpu.SMEM((plan.groups, len(names), TILE), jnp.float32)
    if write:
        outputs["dbeta"] = ((batch, heads, length), jnp.float32)
        scratch["sums"] = plgpu.SMEM((plan.groups, TILE), jnp.float32)
    scratch |= tiles.place_scratch(plan) | tiles.interpreter_scratch(plan, plan.halves)
    return tiles.call(
        plan,
        f"{'write' if write else 'attention'}_backward_rows",
        functools.partial(_compute_rows, plan=plan, write=write),
        functools.partial(tiles.bring_columns, plan=plan, values=plan.halves),
        (batch, heads, length // plan.size),
        inputs,
        outputs,
        scratch,
    )


def _column_extent(plan: Plan, refs: Refs):
    """A program's block of columns; the first tile of rows that sees it, and where they end."""
    j = lax.axis_index("block")
    place = (lax.axis_index("batch_row"), lax.axis_index("head"))
    first = jnp.maximum((j - plan.before) * plan.groups, 0) if plan.own else refs.bound[(*place, 0)]
    stop = jnp.int32(refs.q.shape[2] // TILE)
    if plan.segments:
        stop = refs.last[(*place, j)]
        # Rows of the block itself are always looked at.
        least = jnp.where(j >= plan.before, first + plan.groups, first) if plan.own else first
        stop = jnp.maximum(stop, least)
    return j, first, stop


def _row_ring(plan: Plan, refs: Refs, names: tuple[str, ...], tile_of) -> Ring:
    """Tiles of queries, with their numbers, and of g; `tile_of` gives head and tile of a count."""
    b = lax.axis_index("batch_row")

    def keys(count):
        h, t = tile_of(count)
        found = [(refs.q.at[b, h, pl.ds(t * TILE, TILE)], refs.key_slots)]
        return found + ([(refs.rows.at[b, h, t], refs.number_slots)] if names else [])

    def values(count):
        h, t = tile_of(count)
        places = (b, h, pl.ds(t * TILE, TILE))
        return [(refs[f"g{n}"].at[places], refs[f"value_slots{n}"]) for n in range(plan.halves)]

    return Ring(plan, refs, keys, values)


def _tile_of(plan: Plan, refs: Refs):
    """How many tiles of rows a program meets of one head, and the head and tile of a count."""
    _, first, stop = _column_extent(plan, refs)
    repeat, count = refs.q.shape[1] // refs.k.shape[1], stop - first

    def tile_of(c):
        if repeat == 1:
            return lax.axis_index("head"), first + c
        return lax.axis_index("head") * repeat + lax.div(c, count), first + lax.rem(c, count)

    return count, repeat, tile_of


def _bring_rows(refs: Refs, plan: Plan, write: bool) -> None:
    count, repeat, tile_of = _tile_of(plan, refs)
    ring = _row_ring(plan, refs, _names(plan, write), tile_of)

    @pl.loop(0, count * repeat)
    def _(c):
        ring.bring_key(c, c)
        ring.bring_value(c, c)

    ring.drain(count * repeat)


def _compute_columns(refs: Refs, plan: Plan, write: bool) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    j, first, stop = _column_extent(plan, refs)
    count, repeat, tile_of = _tile_of(plan, refs)
    names = _names(plan, write)
    ring = _row_ring(plan, refs, names, tile_of)
    columns = pl.ds(j * plan.size + g * TILE, TILE)
    sources = [(refs.k.at[b, h, columns], refs.k_rows), (refs.x0.at[b, h, columns], refs.x_rows)]
    if plan.segments:
        sources.append((refs.key_rows.at[b, h, j * plan.groups + g], refs.numbers))
    for source, target in sources:
        plgpu.copy_gmem_to_smem(source, target.at[g], refs.columns_there.at[g])
    plgpu.barrier_wait(refs.columns_there.at[g])
    tiles.bring_places(refs, g)

    def tile(c, carry, diagonal=None):
        dk, dx = carry
        slot = ring.await_key(c)
        ring.await_value(c)
        q, gs = refs.key_slots.at[slot], tuple(refs[f"value_slots{n}"].at[slot] for n in range(plan.halves))
        scores = tiles.scores_of(plan, refs.k_rows.at[g], q)

        def number(name):
            return row(refs.number_slots.at[slot, names.index(name)], TILE)

        marks = (refs.numbers.at[g, 0], refs.number_slots.at[slot, names.index("segment")]) if plan.segments else ()

        def mask():
            return tiles.tile_mask(diagonal, *(marks or (None, None)), tiles.places(refs, g) if diagonal else None)

        weights = tiles.weights_of(plan, scores, mask(), number("norm") if plan.kernel.normalized else None)
        if "dx" in refs:
            # Before G, and the weights kept in bfloat16, for want of registers.
            felt = _left(refs, g, _felt(weights, number, write), plan.halves, 1)
            kept = weights.astype(jnp.bfloat16)
            dx = tiles.accumulate(dx, tiles.pairs(felt, gs))
            weights = kept.astype(jnp.float32)
        if "dk" in refs:
            (change,) = products(((refs.x_rows.at[g], turned(gs[0])),))
            change = _cleared(plan, weights, change, mask)
            ds = _scores_gradient(plan, weights, change, number, write)
            dk = tiles.accumulate(dk, tiles.pairs(_left(refs, g, ds, 1, 0), (q,)))
        ring.release(c)
        return dk, dx

    carry = tuple(tiles.zeros(w) if n in refs else () for n, w in (("dk", plan.key), ("dx", plan.value)))
    # In tiles from `first`; where no row tile lies on the diagonal it is below them.
    own = (j - plan.before) * plan.groups + g - first if plan.own else jnp.int32(-1)
    here, after = jnp.maximum(own, 0), jnp.maximum(own + 1, 0)

    def head(n, carry):
        start = n * count
        tiles.skip(ring, start, start + here)
        diagonal = functools.partial(tile, diagonal=">" if plan.strict else ">=")
        carry = lax.fori_loop(start + here, start + after, diagonal, carry)
        return lax.fori_loop(start + after, start + count, tile, carry)

    dk, dx = head(0, carry) if repeat == 1 else lax.fori_loop(0, repeat, head, carry)
    if "dk" in refs:
        refs.dk[b, h, columns] = dk * plan.scale
    if "dx" in refs:
        refs.dx[b, h, columns] = dx


def _columns(plan: Plan, write: bool, wanted: tuple[str, ...], k, q, x, *rest) -> tuple[Array, ...]:
    """One device's part of dk and dx; rest: g by halves, numbers of rows, bound, segments of columns, `last`."""
    batch, heads, slots = k.shape[:3]
    names, rest = _names(plan, write), list(rest)
    inputs = {
        "places": tiles.place_numbers(),
        "k": k,
        "q": q,
        "x0": x,
        **{f"g{n}": rest.pop(0) for n in range(plan.halves)},
    }
    if names:
        inputs["rows"] = rest.pop(0)
    if not plan.own:
        inputs["bound"] = rest.pop(0)
    if plan.segments:
        inputs |= {"key_rows": rest[0], "last": rest[1]}
    widths = {"dk": plan.key, "dx": plan.value}
    outputs = {name: ((batch, heads, slots, widths[name]), jnp.float32) for name in wanted}
    scratch = tiles.ring_scratch(plan, plan.value, plan.halves, len(names))
    scratch |= {n: tiles.shared(TILE, w, plan.groups) for n, w in (("k_rows", plan.key), ("x_rows", plan.value))}
    scratch["columns_there"] = plgpu.Barrier(num_arrivals=2 + plan.segments, num_barriers=plan.groups)
    if plan.segments:
        scratch["numbers"] = plgpu.SMEM((plan.groups, 1, TILE), jnp.float32)
    scratch |= tiles.place_scratch(plan) | tiles.interpreter_scratch(plan, 1 + plan.halves)
    return tiles.call(
        plan,
        f"{'write' if write else 'attention'}_backward_columns",
        functools.partial(_compute_columns, plan=plan, write=write),
        functools.partial(_bring_rows, plan=plan, write=write),
        (batch, heads, slots // plan.size),
        inputs,
        outputs,
        scratch,
    )


def _numbers(plan: Plan, heads: int, marks: tuple[Array, ...], numbers: dict[str, Array | None]) -> tuple[Array, ...]:
    """What is one number a row, where rows have any."""
    names = _names(plan, numbers.get("beta") is not None)
    given = numbers | ({"segment": marks[0]} if plan.segments else {})
    return (tiles.pack(heads, *(given[name] for name in names)),) if names else ()


def row_gradients(
    plan: Plan,
    k: Array,
    q: Array,
    x: tuple[Array, ...],
    g: tuple[Array, ...],
    marks: tuple[Array, ...],
    numbers: dict[str, Array | None],
) -> tuple[Array, ...]:
    """dq [B, H, T, K] in bfloat16 through every tile of one call, and for the write dbeta [B, H, T].

    Args:
      plan: as ever; queries see slots of the call.
      k: [B, G, S, K].
      q: [B, H, T, K].
      x: values by halves, [B, G, S, V].
      g: dO or dP by halves, [B, H, T, V].
      marks: segments of queries [B, T] and of keys [B, S], or nothing.
      numbers: norm and mean of the rows, [B, H, T], None without a normaliser; beta where this is the write.
    """
    write, group = numbers.get("beta") is not None, k.shape[1]
    rest = _numbers(plan, q.shape[1], marks, numbers)
    if plan.segments:
        rest += (tiles.pack(group, marks[1]), tiles.first_tiles(plan, group, *marks))
    operands = (k, q, *x[: plan.halves], *g[: _changes(plan, write)], *rest)
    return split_batch_and_heads(_rows, (plan, write), results=1 + write)(*operands)


def column_gradients(
    plan: Plan,
    k: Array,
    q: Array,
    x: tuple[Array, ...],
    g: tuple[Array, ...],
    marks: tuple[Array, ...],
    numbers: dict[str, Array | None],
    wanted: tuple[str, ...],
    bound=0,
) -> tuple[Array, ...]:
    """Those `wanted` of dk [B, G, S, K] and dx [B, G, S, V], in float32.

    Args:
      plan, k, q, x, g, marks, numbers: as in `row_gradients`.
      wanted: "dk", "dx" or both.
      bound: where queries see nothing of the call's own, the first query that counts.
    """
    write, group = numbers.get("beta") is not None, k.shape[1]
    rest = _numbers(plan, q.shape[1], marks, numbers) + (() if plan.own else (tiles.bounds(k, bound),))
    if plan.segments:
        rest += (tiles.pack(group, marks[1]), tiles.last_tiles(plan, group, *marks))
    call = split_batch_and_heads(_columns, (plan, write, wanted), results=len(wanted))
    return call(k, q, x[0], *g[: plan.halves], *rest)
