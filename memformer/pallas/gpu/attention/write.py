"""DeltaFormer's write on Hopper: one kernel that walks the blocks of a head, forward for u, in reverse for dP.

Rows R of one block, earlier slots E, A the write kernel, B = diag(beta):

    u_R  = (I + B A[R, R])^-1 (alpha V_R - B A[R, E] u_E)
    dP_R = (I + B A[R, R])^-T (dU_R - later A[R', R]^T B dP_R')

Both read finished tiles as attention does and then solve inside the block. A program walks one head and a block of
value columns, which know nothing of each other. Two warpgroups compute: the second one's rows see the first one's,
which come back from global memory as all finished tiles do, once a barrier says that they are there. What lies before
a part of the call is read by attention, whose programs are row blocks of all heads (parts.py): so few heads fill the
chip too.

The inverse of a tile's 64 rows is the ladder of core.triangular on bfloat16 halves. For the walk in reverse tiles lie
transposed, and so does the triangle.

Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), section 3.3.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.forward import Sums, add_tile, start_sums, widen
from memformer.pallas.gpu.attention.tiles import LOW, TILE, Plan, Refs, Ring
from memformer.pallas.gpu.common import column, row
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["walk_back", "walk_forward"]


class _Walk:
    """What a warpgroup of the kernel knows: its head, its columns, and which tiles its blocks take.

    Tiles of a block are counted in the order of the walk: first those of finished blocks, then its own.
    """

    def __init__(self, plan: Plan, refs: Refs, back: bool):
        self.plan, self.refs, self.back = plan, refs, back
        self.b, self.h, self.block = (lax.axis_index(name) for name in ("batch_row", "head", "block"))
        self.blocks = refs.out0.shape[2] // plan.size
        self.columns = pl.ds(self.block * plan.block, plan.block)
        self.names = ("norm",) * (back and plan.kernel.normalized) + ("beta",) * back + ("segment",) * plan.segments
        self.ring = Ring(plan, refs, self._keys, self._values)

    def index(self, step):
        """The block of a step."""
        return self.blocks - 1 - step if self.back else step

    def order(self, g):
        """When warpgroup g has its turn."""
        return self.plan.groups - 1 - g if self.back else g

    def finished(self, i):
        """How many tiles of finished blocks block i sees."""
        plan = self.plan
        if self.back:
            end = jnp.int32(self.blocks * plan.groups)
            after = (i + 1) * plan.groups
            return jnp.maximum(self.refs.limit[self.b, self.h, i], after) - after if plan.segments else end - after
        own = i * plan.groups
        return own - jnp.minimum(self.refs.limit[self.b, self.h, i], own)

    def tile(self, i, finished, c):
        """The tile that is the c-th one of block i."""
        if self.back:
            return (i + 1) * self.plan.groups + finished - 1 - c
        return i * self.plan.groups - finished + c

    def _keys(self, t):
        tokens = pl.ds(t * TILE, TILE)
        found = [(self.refs.k.at[self.b, self.h, tokens], self.refs.key_slots)]
        return found + ([(self.refs.key_rows.at[self.b, self.h, t], self.refs.number_slots)] if self.names else [])

    def _values(self, t):
        places = (self.b, self.h, pl.ds(t * TILE, TILE), self.columns)
        return [(self.refs[f"out{n}"].at[places], self.refs[f"value_slots{n}"]) for n in range(self.plan.halves)]


def _bring(refs: Refs, plan: Plan, back: bool) -> None:
    walk = _Walk(plan, refs, back)
    ring, last = walk.ring, jnp.int32(0 if back else plan.groups - 1)

    def step(s, count):
        i = walk.index(s)
        finished = walk.finished(i)

        def both(c):
            ring.bring_key(count + c, walk.tile(i, finished, c))
            ring.bring_value(count + c, walk.tile(i, finished, c))

        pl.loop(0, finished - 1)(both)

        @pl.when(s > 0)
        def _():
            plgpu.barrier_wait(refs.written.at[last])

        @pl.when(finished > 0)
        def _():
            both(finished - 1)

        for n in range(plan.groups):
            ring.bring_key(count + finished + n, walk.tile(i, finished, finished + n))
        if plan.groups == 2:
            plgpu.barrier_wait(refs.written.at[plan.groups - 1 - last])
            ring.bring_value(count + finished, walk.tile(i, finished, finished))
        return count + finished + plan.groups

    count = lax.fori_loop(0, walk.blocks, step, jnp.int32(0))
    plgpu.barrier_wait(refs.written.at[last])
    ring.drain(count)


def _compute(refs: Refs, plan: Plan, back: bool, held: bool) -> None:
    walk = _Walk(plan, refs, back)
    ring, g = walk.ring, lax.axis_index("warpgroup")
    tiles.bring_places(refs, g)

    def step(s, count):
        i = walk.index(s)
        finished = walk.finished(i)
        mine = i * plan.groups + g
        rows = (walk.b, walk.h, pl.ds(mine * TILE, TILE))
        sources = [(refs.q.at[rows], refs.q_rows)]
        if "rows" in refs:
            sources.append((refs.rows.at[walk.b, walk.h, mine], refs.numbers))
        for source, target in sources:
            plgpu.copy_gmem_to_smem(source, target.at[g], refs.rows_there.at[g])
        plgpu.barrier_wait(refs.rows_there.at[g])
        own = count + finished + walk.order(g)
        solve = _back_block if back else _forward_block
        # What is left to write goes to shared memory, since the inverse needs the registers.
        _stage(refs, g, "work", solve(walk, g, rows, count, own, held))
        out = _solve(refs, g, _inverse(refs, g, back))
        _put(walk, g, out, (*rows, walk.columns))
        _pass_by(ring, plan, own, count + finished)
        return count + finished + plan.groups

    lax.fori_loop(0, walk.blocks, step, jnp.int32(0))


def _put(walk: _Walk, g, out: Array, place) -> None:
    """Writes a finished tile, and says so once it is there."""
    refs = walk.refs
    for n, half in enumerate(_stage(refs, g, "work", out)):
        plgpu.copy_smem_to_gmem(half, refs[f"out{n}"].at[place])
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(refs.written.at[g])


def _pass_by(ring: Ring, plan: Plan, own, first) -> None:
    """Releases the tiles of the block that were not read: its own, and the one behind it."""
    if plan.groups == 1:
        ring.release(own)
        return

    @pl.when(own == first)
    def _():
        ring.await_value(own)
        ring.release(own)
        ring.await_key(own + 1)

    ring.release(first + 1)


def _forward_block(walk: _Walk, g, rows, count, own, held: bool) -> Array:
    """What is left to write of one warpgroup's rows; beta A of them against themselves is staged as own."""
    plan, refs = walk.plan, walk.refs
    names = _row_names(plan, held)
    q = refs.q_rows.at[g]

    def mask(diagonal):
        if not plan.segments:
            return lambda slot: tiles.tile_mask(diagonal, None, None, tiles.places(refs, g) if diagonal else None)
        segment = refs.numbers.at[g, names.index("segment")]
        return lambda slot: tiles.tile_mask(
            diagonal, segment, refs.number_slots.at[slot, 0], tiles.places(refs, g) if diagonal else None
        )

    sums = start_sums(plan.block)
    if held:
        sums = sums._replace(value=tiles.load(refs.start.at[(*rows, walk.columns)]))
        if plan.kernel.normalized:
            top = compat.load(refs.numbers.at[g, names.index("start")], plgpu.Layout.WGMMA.reduce(1))
            total = plgpu.layout_cast(jnp.ones((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            sums = Sums(top, total, sums.value)
    sums = lax.fori_loop(count, own, lambda c, sums: add_tile(plan, walk.ring, refs, sums, c, g, q, mask(None)), sums)
    slot = walk.ring.await_key(own)
    scores, seen = tiles.scores_of(plan, q, refs.key_slots.at[slot]), mask("<")(slot)
    if plan.kernel.normalized:
        sums, weights = widen(sums, jnp.where(seen, scores, LOW))
        total = jnp.where(sums.total > 0, sums.total, 1.0)
        weights = weights / tiles.spread(total, TILE)
        sums = sums._replace(value=sums.value / tiles.spread(total, plan.block))
        _put_norm(walk, g, rows, sums.top + jnp.log2(total))
    else:
        weights = tiles.weights_of(plan, scores, seen, None)
    beta = refs.numbers.at[g, names.index("beta")]
    _stage(refs, g, "own", column(beta, TILE) * weights)
    target = tiles.load(refs.target.at[(*rows, walk.columns)])
    return target - column(beta, plan.block) * sums.value


def _put_norm(walk: _Walk, g, rows, norm: Array) -> None:
    """Every block of columns finds the same; one writes it."""

    @pl.when(walk.block == 0)
    def _():
        walk.refs.norms.at[g][...] = norm
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(walk.refs.norms.at[g], walk.refs.norm.at[rows])


def _back_block(walk: _Walk, g, rows, count, own, held: bool) -> Array:
    """dU less what later rows take of it, for one warpgroup's slots; their own (beta A)^T is staged as own."""
    plan, refs = walk.plan, walk.refs

    def felt(slot, diagonal):
        scores = tiles.scores_of(plan, refs.q_rows.at[g], refs.key_slots.at[slot])

        def number(name):
            return refs.number_slots.at[slot, walk.names.index(name)]

        marks = (refs.numbers.at[g, 0], number("segment")) if plan.segments else (None, None)
        norm = row(number("norm"), TILE) if plan.kernel.normalized else None
        places = tiles.places(refs, g) if diagonal else None
        weights = tiles.weights_of(plan, scores, tiles.tile_mask(diagonal, *marks, places), norm)
        return weights * row(number("beta"), TILE)

    def tile(c, left):
        slot = walk.ring.await_key(c)
        scratch = [refs[f"left{n}"].at[g] for n in range(plan.halves)] if tiles.interpreting() else ()
        parts = tiles.left(tiles.halves(-felt(slot, None), plan.halves), scratch)
        walk.ring.await_value(c)
        left = tiles.accumulate(left, tiles.pairs(parts, tuple(_values(refs, plan, slot))))
        walk.ring.release(c)
        return left

    left = lax.fori_loop(count, own, tile, tiles.load(refs.target.at[(*rows, walk.columns)]))
    _stage(refs, g, "own", felt(walk.ring.await_key(own), ">"))
    return left


def _values(refs: Refs, plan: Plan, slot):
    return [refs[f"value_slots{n}"].at[slot] for n in range(plan.halves)]


def _inverse(refs: Refs, g, upper: bool) -> Array:
    """(I + a)^-1 - I for the strictly lower (or upper) triangle [64, 64] staged as own, by blocks of 1, 2, ... rows."""
    own = tuple(refs[f"own{n}"].at[g] for n in range(2))

    def part(size):
        later, earlier = tiles.places(refs, g)[:: -1 if upper else 1]
        odd = lax.bitwise_and(later, size) != 0
        beside = lax.bitwise_and(earlier, -size) == lax.bitwise_and(later, -size) - size
        return tuple(jnp.where(odd & beside, half, jnp.bfloat16(0)) for half in _taken(own))

    def join(level, x):
        # With X = I + x: X - X S X. Small entries are not rounded beside ones.
        staged = _stage(refs, g, "square", x)
        s = part(lax.shift_left(jnp.int32(1), level))
        y = tiles.accumulate(_whole(s), tiles.pairs(_left(refs, g, s), staged))
        return tiles.accumulate(x - y, tiles.pairs(staged, _stage(refs, g, "other", -y)))

    # A loop, not its five steps in a row: else the compiler fills the registers with the parts of all.
    return lax.fori_loop(1, 6, join, -_whole(part(jnp.int32(1))))


def _space(refs: Refs, g, name: str, n: int):
    """A block of warpgroup g's shared memory; "other" is that of its queries, where they are wide enough."""
    if name == "other" and "other0" not in refs:
        return refs.q_rows.at[g, :, pl.ds(n * TILE, TILE)]
    return refs[f"{name}{n}"].at[g]


def _stage(refs: Refs, g, name: str, x: Array) -> tuple[Any, ...]:
    """Two halves of a matrix, in warpgroup g's shared memory of that name."""
    staged = tuple(_space(refs, g, name, n) for n in range(2))
    for ref, half in zip(staged, tiles.halves(x, 2), strict=True):
        ref[...] = half
    plgpu.commit_smem()
    return staged


def _taken(staged: tuple[Any, ...]) -> tuple[Array, ...]:
    return tuple(compat.load(ref, plgpu.Layout.WGMMA) for ref in staged)


def _whole(parts: tuple[Array, ...]) -> Array:
    return parts[0].astype(jnp.float32) + parts[1].astype(jnp.float32)


def _left(refs: Refs, g, parts: tuple[Array, ...]) -> tuple[Any, ...]:
    return tiles.left(parts, [refs[f"left{n}"].at[g] for n in range(2)] if tiles.interpreting() else ())


def _solve(refs: Refs, g, inverse: Array) -> Array:
    """What is staged as work, plus the inverse (less I) times it."""
    staged = tuple(refs[f"work{n}"].at[g] for n in range(2))
    sums = tiles.pairs(_left(refs, g, tiles.halves(inverse, 2)), staged)
    return tiles.accumulate(_whole(_taken(staged)), sums)


def _row_names(plan: Plan, held: bool) -> tuple[str, ...]:
    """Numbers of the rows forward."""
    return ("beta", *("start",) * (held and plan.kernel.normalized), *("segment",) * plan.segments)


def _walk(plan: Plan, back: bool, held: bool, k, q, target, *rest) -> tuple[Array, ...]:
    """One device's part of a walk; rest: what the state gave, numbers of rows, numbers of columns, `limit`."""
    batch, heads, length, value = target.shape
    rest = list(rest)
    inputs = {"k": k, "q": q, "target": target, "places": tiles.place_numbers()}
    if held:
        inputs["start"] = rest.pop(0)
    if not back or plan.segments:
        inputs["rows"] = rest.pop(0)
    if back or plan.segments:
        inputs["key_rows"] = rest.pop(0)
    if plan.segments or not back:
        inputs["limit"] = rest.pop(0)
    outputs: dict[str, Any] = {f"out{n}": (target.shape, jnp.bfloat16) for n in range(2)}
    numbers = inputs["key_rows"].shape[3] if "key_rows" in inputs else 0
    scratch = tiles.ring_scratch(plan, plan.block, plan.halves, numbers)
    scratch["q_rows"] = tiles.shared(TILE, plan.key, plan.groups)
    scratch["rows_there"] = plgpu.Barrier(num_arrivals=1 + ("rows" in inputs), num_barriers=plan.groups)
    scratch["written"] = plgpu.Barrier(num_barriers=plan.groups)
    widths = [("work", plan.block), ("own", TILE), ("square", TILE)] + [("other", TILE)] * (plan.key == TILE)
    scratch |= {f"{name}{n}": tiles.shared(TILE, width, plan.groups) for name, width in widths for n in range(2)}
    if "rows" in inputs:
        scratch["numbers"] = plgpu.SMEM((plan.groups, inputs["rows"].shape[3], TILE), jnp.float32)
    if plan.kernel.normalized and not back:
        outputs["norm"] = ((batch, heads, length), jnp.float32)
        scratch["norms"] = plgpu.SMEM((plan.groups, TILE), jnp.float32)
    scratch |= tiles.place_scratch(plan) | tiles.interpreter_scratch(plan, 2)
    return tiles.call(
        plan,
        f"write_{'backward' if back else 'forward'}",
        functools.partial(_compute, plan=plan, back=back, held=held),
        functools.partial(_bring, plan=plan, back=back),
        (batch, heads, value // plan.block),
        inputs,
        outputs,
        scratch,
        (232, 40),
    )


def walk_forward(
    plan: Plan, k: Array, w: Array, target: Array, beta: Array, marks: tuple[Array, ...], start
) -> tuple[tuple[Array, Array], Array | None]:
    """u [B, G, T, V] by halves, and the log-sum-exp of the rows to base 2 (None without a normaliser).

    Args:
      plan: as ever.
      k: [B, G, T, K].
      w: [B, G, T, K].
      target: alpha v, [B, G, T, V] float32.
      beta: [B, G, T].
      marks: segments of the tokens as queries and as keys [B, T], or nothing.
      start: what the rows read of slots before these, [B, G, T, V], and its log-sum-exp; or None.
    """
    held, heads = start is not None, k.shape[1]
    given = {"beta": beta, "start": start[1] if held else None, "segment": marks[0] if marks else None}
    rest: tuple[Array, ...] = (start[0],) if held else ()
    rest += (tiles.pack(heads, *(given[name] for name in _row_names(plan, held))),)
    if plan.segments:
        rest += (tiles.pack(heads, marks[1]), tiles.first_tiles(plan, heads, *marks))
    else:
        # The same, where it is known: what the compiler works out of that ahead has no room in registers.
        rest += (jnp.zeros((*w.shape[:2], w.shape[2] // plan.size), jnp.int32),)
    call = split_batch_and_heads(_walk, (plan, False, held), results=2 + plan.kernel.normalized)
    high, low, *norm = call(k, w, target, *rest)
    return (high, low), norm[0] if norm else None


def walk_back(plan: Plan, k: Array, w: Array, du: Array, numbers: dict[str, Array], marks: tuple[Array, ...]):
    """dP [B, G, T, V] by halves.

    Args:
      plan, k, w, marks: as in `walk_forward`.
      du: gradient of u, [B, G, T, V] float32.
      numbers: norm (with a normaliser) and beta of the rows [B, G, T].
    """
    heads = k.shape[1]
    given = [numbers[name] for name in ("norm",) * plan.kernel.normalized + ("beta",)]
    rest = (tiles.pack(heads, *given, *marks[:1]),)
    if plan.segments:
        rest = (tiles.pack(heads, marks[1]), *rest, tiles.last_tiles(plan, heads, *marks))
    return split_batch_and_heads(_walk, (plan, True, False), results=2)(w, k, du, *rest)
