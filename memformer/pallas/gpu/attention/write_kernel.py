"""The kernel of DeltaFormer's write on Hopper, forward and in reverse. Equations: deltaformer.py.

The kernel reads finished tiles as attention does and then solves inside the block. A program scans one head and one
block of value columns, which are independent of each other. Two warpgroups compute, each 64 rows of a block. What a
warpgroup sees last is the tile that the other one solves meanwhile: its weights and the inverse are ready before, and
the tile itself passes through shared memory. So the chain of a head is, per 64 tokens, one product of weights with u,
and the product with the inverse; both warpgroups invert at once. Earlier tiles come back from global memory. The
inverse of a tile's 64 rows is the ladder of core/triangular.py on two parts of 16 bits. In reverse tiles are
transposed, and so is the triangle.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.config import TILE, AttentionConfig, fit
from memformer.pallas.gpu.attention.scalars import (
    column_names,
    pair_gap,
    row_names,
)
from memformer.pallas.gpu.attention.softmax_attention import (
    RunningSums,
    rescale,
    start_sums,
)
from memformer.pallas.gpu.attention.tiles import Refs, Ring
from memformer.pallas.gpu.wgmma import (
    broadcast_rows,
    load_row,
    partial_products,
    shared_block,
)

__all__ = ["write_columns", "write_rows", "write_shard"]


class _Program:
    """One program of the kernel: its head, its columns, and which tiles its blocks take.

    Tiles of a block are counted in the order in which they are read: those of finished blocks, then its own.
    """

    def __init__(self, config: AttentionConfig, refs: Refs, reverse: bool, g=None):
        self.config, self.refs, self.reverse, self.g = config, refs, reverse, g
        self.b, self.h, self.block = (lax.axis_index(name) for name in ("batch_row", "head", "block"))
        self.blocks = config.span // config.rows
        if g is None and "bound" in refs:
            self.begin = [refs.bound[self.b, self.h, n] for n in range(2)]
        self.columns = pl.ds(self.block * config.value_block, config.value_block)
        self.names = write_columns(config, reverse)
        self.ring = Ring(config, refs, self._keys, self._values)

    def index(self, step):
        """The block of a step."""
        return self.blocks - 1 - step if self.reverse else step

    def order(self, g):
        """Position of warpgroup g among the warpgroups of a block, or the warpgroup at a position."""
        return self.config.warpgroups - 1 - g if self.reverse else g

    def finished(self, i):
        """Number of tiles of finished blocks that block i sees, at least the last one if there is any."""
        warpgroups = self.config.warpgroups
        if self.reverse:
            end = jnp.int32(self.blocks * warpgroups)
            after = (i + 1) * warpgroups
            if not self.config.bounded:
                return end - after
            return jnp.maximum(self.refs.limit[self.b, self.h, i], jnp.minimum(after + 1, end)) - after
        own = i * warpgroups
        if not self.config.bounded:
            return own - self.zero()
        return own - jnp.minimum(self.refs.limit[self.b, self.h, i], jnp.maximum(own - 1, 0))

    def tile(self, i, finished, c):
        """The c-th tile of block i."""
        if self.reverse:
            return (i + 1) * self.config.warpgroups + finished - 1 - c
        return i * self.config.warpgroups - finished + c

    def rows(self, i, g, start=0) -> tuple[Any, Any, Any]:
        """Index of warpgroup g's rows of block i, in an array in which the span starts with that tile."""
        return self.b, self.h, pl.ds((start + i * self.config.warpgroups + g) * TILE, TILE)

    def start(self, name: str):
        """The tile with which the span starts: of "slots", which hold the cache too, or of the "rows" of the call."""
        if "bound" not in self.refs:
            return 0
        n = ("slots", "rows").index(name)
        # Read where it is needed, by those that compute from shared memory: their registers hold neither it nor an
        # address of the other.
        return self.begin[n] if self.g is None else self.refs.bound_tile[self.g, n]

    def zero(self):
        """0 that the compiler does not know: it hoists what it derives from a static one, and spills that."""
        return self.refs.indices[0, 0] if self.g is None else tiles.read_zero(self.refs, self.g)

    def place(self, i, g):
        """Index of the solution of warpgroup g's rows of block i."""
        return *self.rows(i, g, self._start_out()), self.columns

    def _start_out(self):
        # Inside the caller's shard_map the solutions of a span are an array of their own.
        return 0 if self.refs.out0.shape[2] == self.config.span else self.start("slots")

    def column(self, slot, name: str):
        """Ref to a scalar of the tokens of a slot."""
        return self.refs.scalar_slots.at[slot, self.names.index(name)]

    def pairs(self, g, row: Callable[[str], Any], slot, diagonal: str | None) -> tuple[Any, Array | None]:
        """The mask of warpgroup g's rows against a slot, and the decay of each pair."""
        config, column = self.config, functools.partial(self.column, slot)
        indices = tiles.load_indices(self.refs, g) if diagonal else None
        mask = tiles.tile_mask(config, diagonal, row, column, indices, transposed=self.reverse)
        if not config.decay:
            return mask, None
        return mask, pair_gap(config, row, column, diagonal=diagonal is not None, transposed=self.reverse)

    def _keys(self, t):
        place = (self.b, self.h, pl.ds((self.start("slots") + t) * TILE, TILE))
        copies = [(self.refs.k.at[place], self.refs.key_slots)]
        return copies + ([(self.refs.k_scalars.at[self.b, self.h, t], self.refs.scalar_slots)] if self.names else [])

    def _values(self, t):
        place = (self.b, self.h, pl.ds((self._start_out() + t) * TILE, TILE), self.columns)
        return [(self.refs[f"out{n}"].at[place], self.refs[f"value_slots{n}"]) for n in range(self.config.parts)]


def write_rows(config: AttentionConfig, reverse: bool) -> tuple[str, ...]:
    """Names of the scalars per row."""
    return ("alpha", "beta") * (not reverse) + row_names(config)


def write_columns(config: AttentionConfig, reverse: bool) -> tuple[str, ...]:
    """Names of the scalars per token of a tile of columns."""
    names = ("lse",) * (reverse and config.similarity.normalized) + ("beta",) * reverse
    return names + column_names(config)


def _copy(refs: Refs, config: AttentionConfig, reverse: bool) -> None:
    program = _Program(config, refs, reverse)
    ring, last = program.ring, config.warpgroups - 1

    def wait_stored(position):
        plgpu.barrier_wait(refs.stored.at[program.order(position)])
        compat.fence_global()

    def step(s, count):
        i = program.index(s)
        finished = program.finished(i)

        # The values of the last finished tile and of the block itself are still in the shared memory of those that
        # compute. The tile before them was stored last.
        stored = jnp.maximum(finished - 2, 0)

        @pl.loop(0, finished + config.warpgroups)
        def _(c):
            t = program.tile(i, finished, c)
            ring.copy_key(count + c, t)
            if last:
                pl.when((s > 0) & (c == stored))(lambda: wait_stored(0))
                pl.when(c < finished - 1)(lambda: ring.copy_value(count + c, t))

        if last:
            pl.when(s > 0)(lambda: wait_stored(last))
        return count + finished + config.warpgroups

    count = lax.fori_loop(0, program.blocks, step, jnp.int32(0))
    for position in range(config.warpgroups):
        wait_stored(position)
    ring.drain(count)


def _compute(refs: Refs, config: AttentionConfig, reverse: bool, earlier: bool) -> None:
    """Scans the blocks of a program, as one of its warpgroups.

    There are no automatic barriers. Threads exchange data in shared memory in `_inverse` and `_solve`, which separate
    stores from reads by other warps; slots are written by copies alone.
    """
    g = lax.axis_index("warpgroup")
    program = _Program(config, refs, reverse, g)
    ring = program.ring
    position, last = program.order(g), config.warpgroups - 1
    other = last - g
    tiles.copy_indices(refs, g)
    if "bound" in refs:
        plgpu.copy_gmem_to_smem(refs.bound.at[program.b, program.h], refs.bound_tile.at[g], refs.bound_ready.at[g])
        plgpu.barrier_wait(refs.bound_ready.at[g])
    _copy_rows(program, g, jnp.int32(0))

    def step(s, count):
        i = program.index(s)
        finished = program.finished(i)
        rows = program.rows(i, g)
        pending = count + finished - 1 + position
        first = refs.target if reverse else refs.earlier if earlier else None
        # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
        first = None if first is None else tiles.load_tile(first.at[(*rows, program.columns)]) * 1.0
        plgpu.barrier_wait(refs.own_ready.at[g])
        side = _reverse_side(program, g) if reverse else _forward_side(program, g, i, earlier)

        def staged(c):
            return c == count + finished - 1

        def add(c, state):
            slot, state, weights = side.weigh(c, state)
            pl.when(~staged(c))(lambda: ring.wait_value(c))
            slot = jnp.where(staged(c), config.slots + program.order(last), slot)
            state = side.add(state, weights, slot)
            ring.release(c)
            return state

        def hold(c, carry):
            _, state, weights = side.weigh(c, carry[0])
            ring.release(c)
            return state, weights

        state = lax.fori_loop(count, pending, add, side.start(first))

        @pl.when((s > 0) & (position == last))
        def _():
            _announce_stored(refs, g)

        # The tile whose u comes last: its weights, and the inverse, are ready before.
        exists = jnp.int32(finished + position > 0)
        state, weights = lax.fori_loop(pending, pending + exists, hold, (state, side.no_weights()))
        right, parts = side.finish(pending + 1, state, weights)
        ring.release(pending + 1)
        _release_block(ring, config, position, pending + 2)
        inverse = _inverse(program, g)
        # All warps are done with the rows, and with the operands of the inverse that lie there.
        plgpu.commit_smem()
        pl.when(s + 1 < program.blocks)(lambda: _copy_rows(program, g, s + 1))
        if last:

            @pl.when((s > 0) | (position > 0))
            def _():
                plgpu.barrier_wait(refs.solved.at[other])

            values = tuple(refs[f"value_slots{n}"].at[config.slots + other] for n in range(config.parts))
            right = lax.fori_loop(
                0, exists, lambda _, right: tiles.accumulate(right, partial_products(parts, values)), right
            )
        _store(program, g, _solve(program, g, inverse, right), program.place(i, g))

        @pl.when((position < last) | (s + 1 == program.blocks))
        def _():
            _announce_stored(refs, g)

        return count + finished + config.warpgroups

    lax.fori_loop(0, program.blocks, step, jnp.int32(0))
    if last:

        @pl.when(position == 0)
        def _():
            plgpu.barrier_wait(refs.solved.at[other])


def _copy_rows(program: _Program, g, s) -> None:
    """Starts the copies of a step's rows of warpgroup g."""
    refs = program.refs
    start = program.start("rows")
    copies = [(refs.q.at[program.rows(program.index(s), g, start)], refs.q_tile)]
    if "q_scalars" in refs:
        mine = start + program.index(s) * program.config.warpgroups + g
        copies.append((refs.q_scalars.at[program.b, program.h, mine], refs.own_scalars))
    if "earlier_lse" in refs:
        copies.append((refs.earlier_lse.at[program.rows(program.index(s), g)], refs.earlier_tile))
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[g], refs.own_ready.at[g])


def _store(program: _Program, g, out: Array, place) -> None:
    """Announces a finished tile to the other warpgroup, and starts its copy to global memory."""
    refs = program.refs
    # All warps are done with the right-hand side.
    plgpu.commit_smem()
    # Rounded, because a softmax reads the first part alone.
    staged = _solution(program, g)
    for ref, part in zip(staged, tiles.round_split(program.config, out), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    if program.config.warpgroups > 1:
        plgpu.barrier_arrive(refs.solved.at[g])
    for n, part in enumerate(staged):
        plgpu.copy_smem_to_gmem(part, refs[f"out{n}"].at[place])


def _announce_stored(refs: Refs, g) -> None:
    """Announces that the last tile has arrived in global memory."""
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(refs.stored.at[g])


def _release_block(ring: Ring, config: AttentionConfig, position, after) -> None:
    """Releases the last tile of the block, which the first warpgroup does not see."""
    if config.warpgroups == 1:
        return

    @pl.when(position == 0)
    def _():
        ring.wait_key(after)
        ring.release(after)


class _Side(NamedTuple):
    """The computation of a warpgroup's right-hand side.

    Attributes:
      start: the sums before all tiles, from the array that they start from.
      weigh: the slot of a tile, the sums and its weights, from its count and the sums.
      add: the sums with a tile's values, from sums, weights and the slot of the values.
      no_weights: weights of no tile.
      finish: the right-hand side but for a tile whose values are not known, and the parts of this tile's weights as
        they enter it, from the count of the warpgroup's own tile, the sums and the weights. The matrix to invert is
        staged.
    """

    start: Callable
    weigh: Callable
    add: Callable
    no_weights: Callable
    finish: Callable


def _forward_side(program: _Program, g, i, earlier: bool) -> _Side:
    """alpha V less the read of earlier slots, for warpgroup g's rows of block i; stages B A of its own tile."""
    config, refs = program.config, program.refs
    names, normalized = write_rows(config, False), config.similarity.normalized

    def scalar(name):
        return refs.own_scalars.at[g, names.index(name)]

    def scores_of(c, diagonal=None):
        slot = program.ring.wait_key(c)
        q = refs.q_tile.at[g + tiles.read_zero(refs, g)]
        scores = tiles.compute_scores(config, q, refs.key_slots.at[slot])
        return slot, scores, *program.pairs(g, scalar, slot, diagonal)

    def start(value):
        sums = start_sums(config.value_block)
        if earlier and normalized:
            top = compat.load(refs.earlier_tile.at[g], plgpu.Layout.WGMMA.reduce(1))
            total = plgpu.layout_cast(jnp.ones((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            return RunningSums(top, total, value)
        return sums._replace(value=value) if earlier else sums

    def weigh(c, sums, diagonal=None):
        slot, scores, mask, gap = scores_of(c, diagonal)
        if normalized:
            return slot, *rescale(sums, tiles.mask_scores(scores, mask, gap))
        return slot, sums, tiles.attention_weights(config, scores, mask, None, gap)

    def add(sums, weights, slot):
        values = tuple(refs[f"value_slots{n}"].at[slot] for n in range(config.parts))
        pairs = partial_products(tiles.split(config, weights, config.parts), values)
        return sums._replace(value=tiles.accumulate(sums.value, pairs))

    def finish(c, sums, pending):
        before = sums.top
        _, sums, weights = weigh(c, sums, "<")
        beta = compat.load(scalar("beta"), plgpu.Layout.WGMMA.reduce(1))
        factor = beta
        if normalized:
            total = jnp.where(sums.total > 0, sums.total, 1.0)
            _store_lse(program, g, program.rows(i, g), sums.top + jnp.log2(total))
            factor = beta / total
            pending = pending * broadcast_rows(jnp.exp2(before - sums.top), TILE)
        _stage(config, refs, g, "own", broadcast_rows(factor, TILE) * weights)
        parts = tiles.split(config, broadcast_rows(-factor, TILE) * pending, config.parts)
        right = -broadcast_rows(factor, config.value_block) * sums.value

        def add_target(_, right):
            values = refs.target.at[(*program.rows(i, g, program.start("rows")), program.columns)]
            alpha = compat.load(scalar("alpha"), plgpu.Layout.WGMMA.reduce(1))
            return right + broadcast_rows(alpha, config.value_block) * tiles.load_tile(values).astype(jnp.float32)

        # A loop of one step: otherwise the compiler loads them earlier, and spills.
        return lax.fori_loop(0, 1 + program.zero(), add_target, right), parts

    return _Side(start, weigh, add, functools.partial(tiles.zeros, TILE), finish)


def _store_lse(program: _Program, g, rows, lse: Array) -> None:
    """Writes the log-sum-exp from one block of columns: all of them compute the same."""

    @pl.when(program.block == 0)
    def _():
        # The copy of the last one has been waited for.
        program.refs.lse_tile.at[g][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(program.refs.lse_tile.at[g], program.refs.lse.at[rows])


def _reverse_side(program: _Program, g) -> _Side:
    """dU less what reaches it from later rows, for one warpgroup's slots; stages (B A)^T of its own tile."""
    config, refs = program.config, program.refs
    names = write_rows(config, True)

    def scalar(name):
        return refs.own_scalars.at[g, names.index(name)]

    def weigh(c, right, diagonal=None):
        slot = program.ring.wait_key(c)
        q = refs.q_tile.at[g + tiles.read_zero(refs, g)]
        scores = tiles.compute_scores(config, q, refs.key_slots.at[slot])
        lse = load_row(program.column(slot, "lse"), TILE) if config.similarity.normalized else None
        mask, gap = program.pairs(g, scalar, slot, diagonal)
        weights = tiles.attention_weights(config, scores, mask, lse, gap)
        return slot, right, weights * load_row(program.column(slot, "beta"), TILE)

    def add(right, weights, slot):
        values = tuple(refs[f"value_slots{n}"].at[slot] for n in range(config.parts))
        return tiles.accumulate(right, partial_products(tiles.split(config, -weights, config.parts), values))

    def finish(c, right, pending):
        _, right, weights = weigh(c, right, ">")
        _stage(config, refs, g, "own", weights)
        return right, tiles.split(config, -pending, config.parts)

    return _Side(lambda value: value, weigh, add, functools.partial(tiles.zeros, TILE), finish)


def _inverse(program: _Program, warpgroup) -> tuple[Array, ...]:
    """(I + a)^-1 - I for the triangle [64, 64] staged as own, by blocks of 1, 2, ... rows; in two parts.

    a is strictly lower, in reverse strictly upper. Every thread reads of "own" what it stored itself.
    """

    config, refs = program.config, program.refs

    def part(g, size):
        own = tuple(refs[f"own{n}"].at[g] for n in range(2))
        later, earlier = tiles.load_indices(refs, g)[:: -1 if program.reverse else 1]
        odd = lax.bitwise_and(later, size) != 0
        beside = lax.bitwise_and(earlier, -size) == lax.bitwise_and(later, -size) - size
        return tuple(jnp.where(odd & beside, x, jnp.zeros((), x.dtype)) for x in _load_staged(own))

    def join(level, x):
        g = warpgroup + tiles.read_zero(refs, warpgroup)
        # With X = I + x: X - X S X. Small entries are not rounded beside ones.
        # All warps are done with the block: they stored the y of the level before after their last product with it.
        staged = _stage(config, refs, g, "square", x)
        s = part(g, lax.shift_left(jnp.int32(1), level))
        y = tiles.accumulate(_sum_parts(s), partial_products(s, staged))
        other = _stage(config, refs, g, "other", -y)
        # Loaded, because the registers do not hold it beside y and what waits for the inverse.
        parts = _load_staged(staged)
        return tiles.accumulate(_sum_parts(parts) - y, partial_products(parts, other))

    # A loop instead of five unrolled steps: the compiler would fill the registers with the parts of all steps.
    return tiles.split_two(config, lax.fori_loop(1, 6, join, -_sum_parts(part(warpgroup, jnp.int32(1)))))


def _staging(refs: Refs, g, name: str, n: int):
    """A block of warpgroup g's shared memory; "other" shares that of its queries, where they are wide enough."""
    if name == "other" and "other0" not in refs:
        return refs.q_tile.at[g, :, pl.ds(n * TILE, TILE)]
    return refs[f"{name}{n}"].at[g]


def _stage(config: AttentionConfig, refs: Refs, g, name: str, x: Array) -> tuple[Any, ...]:
    """Stores a matrix in two parts in warpgroup g's shared memory of that name."""
    staged = tuple(_staging(refs, g, name, n) for n in range(2))
    for ref, part in zip(staged, tiles.split_two(config, x), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    return staged


def _load_staged(staged: tuple[Any, ...]) -> tuple[Array, ...]:
    return tuple(compat.load(ref, plgpu.Layout.WGMMA) for ref in staged)


def _sum_parts(parts: tuple[Array, ...]) -> Array:
    return parts[0].astype(jnp.float32) + parts[1].astype(jnp.float32)


def _solution(program: _Program, g) -> tuple[Any, ...]:
    """The blocks of warpgroup g's solution in two parts, before that its right-hand side."""
    refs, at = program.refs, program.config.slots + g
    return refs.value_slots0.at[at], refs.value_slots1.at[at] if program.config.parts == 2 else refs.low.at[g]


def _solve(program: _Program, g, inverse: tuple[Array, ...], right: Array) -> Array:
    """(I + inverse) times the right-hand side."""
    staged = _solution(program, g)
    # The last solution has been stored and, as this side depends on what others made of it, read.
    for ref, part in zip(staged, tiles.split_two(program.config, right), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    return tiles.accumulate(right, partial_products(inverse, staged))


def write_shard(config: AttentionConfig, reverse: bool, earlier: bool, k, q, target, *rest) -> tuple[Array, ...]:
    """One device's shard of a span.

    Args:
      config: sizes.
      reverse: whether it is the transposed system.
      earlier: whether there are slots before the span.
      k, q: keys and write queries, in reverse the other way round.
      target: values, in reverse the gradient of u.
      *rest: where there are earlier slots their read, its log-sum-exp (with a normaliser), the two parts of u of all
        slots, and `tiles.bounds` of the span's first slot and row: k, q, values and scalars of queries are of all slots
        and rows then, and u is changed. Scalars of queries, scalars of keys, `limit`.

    Returns:
      The two parts of the solution, and the log-sum-exp of the span's rows (forward, with a normaliser).
    """
    batch, heads, _, value = target.shape
    rest, length = list(rest), config.span
    # The solution, the triangle and its inverse, and a part of the solution or the operand that has no other place.
    own = config.key + 2 * config.value_block + 4 * TILE + 2 * TILE * (config.key == TILE)
    config = fit(config, config.key + config.parts * config.value_block, own)
    inputs = {"k": k, "q": q, "target": target, "indices": tiles.index_vectors()}
    solutions: dict[str, Array] = {}
    if earlier:
        inputs["earlier"] = rest.pop(0)
        if config.similarity.normalized:
            inputs["earlier_lse"] = rest.pop(0)
        solutions = {f"out{n}": rest.pop(0) for n in range(2)}
        inputs["bound"] = rest.pop(0)
    rows, columns = write_rows(config, reverse), write_columns(config, reverse)
    if rows:
        inputs["q_scalars"] = rest.pop(0)
    if columns:
        inputs["k_scalars"] = rest.pop(0)
    if config.bounded:
        inputs["limit"] = rest.pop(0)
    dtype = jnp.dtype(config.value_dtype)
    # Inside the caller's shard_map references have no type, and a kernel changes nothing in place.
    local = not solutions or bool(jax.typeof(solutions["out0"]).manual_axis_type.varying)
    outputs: dict[str, Any] = {f"out{n}": ((batch, heads, length, value), dtype) for n in range(2)} if local else {}
    # The solutions of the warpgroups lie beside the slots of values.
    scratch = tiles.ring_scratch(config, config.value_block, config.parts, len(columns), config.warpgroups)
    if config.parts == 1:
        scratch["low"] = shared_block(config.warpgroups, TILE, config.value_block, dtype=dtype)
    scratch["q_tile"] = shared_block(config.warpgroups, TILE, config.key, dtype=dtype)
    scratch["own_ready"] = plgpu.Barrier(
        num_arrivals=1 + bool(rows) + ("earlier_lse" in inputs), num_barriers=config.warpgroups
    )
    for name in ("solved",) * (config.warpgroups > 1) + ("stored",):
        scratch[name] = plgpu.Barrier(num_barriers=config.warpgroups)
    widths = [("own", TILE), ("square", TILE)] + [("other", TILE)] * (config.key == TILE)
    blocks = {f"{name}{n}": width for name, width in widths for n in range(2)}
    scratch |= {name: shared_block(config.warpgroups, TILE, width, dtype=dtype) for name, width in blocks.items()}
    if rows:
        scratch["own_scalars"] = plgpu.SMEM((config.warpgroups, len(rows), TILE), jnp.float32)
    if config.similarity.normalized and not reverse:
        outputs["lse"] = ((batch, heads, length), jnp.float32)
        scratch["lse_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.float32)
    if "earlier_lse" in inputs:
        scratch["earlier_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.float32)
    if solutions:
        scratch["bound_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.int32)
        scratch["bound_ready"] = plgpu.Barrier(num_barriers=config.warpgroups)
    scratch |= tiles.index_scratch(config)
    found = tiles.call(
        config,
        f"write_{'backward' if reverse else 'forward'}",
        functools.partial(_compute, config=config, reverse=reverse, earlier=earlier),
        functools.partial(_copy, config=config, reverse=reverse),
        (batch, heads, value // config.value_block),
        inputs,
        outputs,
        scratch,
        automatic_barriers=False,
        updated={} if local else solutions,
    )
    if not local:
        *lse, high, low = found
        return high, low, *lse
    high, low, *lse = found
    if solutions:
        start = inputs["bound"][0, 0, 0] * TILE
        pairs = zip(solutions.values(), (high, low), strict=True)
        high, low = (lax.dynamic_update_slice_in_dim(x, y, start, 2) for x, y in pairs)
    return high, low, *lse
