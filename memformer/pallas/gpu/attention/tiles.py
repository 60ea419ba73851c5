"""Attention by tiles on Hopper: what the read and the write of DeltaFormer share, forward and backward.

Time is cut into tiles of 64 tokens, for rows and columns of the scores alike. A program has one or two warpgroups
that compute, each with the 64 rows of its own, and one that brings the tiles of columns (TMA) into a ring of slots
in shared memory, where all of them read it. Rows lie on threads as wgmma leaves its accumulators.

What sums without a normaliser cancels: there weights and values are sums of two bfloat16 halves, 16 bits, else one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, similarity
from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.common import column, interpreting, iotas, pairs, products, row, turned
from memformer.pallas.mask import find_first, find_last

__all__ = ["LOW", "TILE", "Plan", "Refs", "Ring", "call", "halves", "left", "load", "pairs", "scores_of", "spread"]
__all__ += ["tile_mask", "weights_of"]

# Rows of wgmma.
TILE = 64

# A hidden score; running maxima start at half of it, so that its exponential is 0.
LOW = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut, all static.

    Attributes:
      kernel: the similarity kernel.
      scale: factor on inner products.
      groups: W, warpgroups that compute.
      slots: tiles of columns in flight.
      key, value: widths as padded for the kernels.
      block: value columns a program of the write.
      part: tokens of a part of the write; see parts.py.
      before: blocks of slots before the call's own tokens.
      own: whether queries see slots of the call (those up to their own); else all up to a bound.
      strict: whether their own slot is left out.
      segments: whether there are segments.
    """

    kernel: Kernel
    scale: float
    groups: int
    slots: int
    key: int
    value: int
    block: int
    part: int
    before: int
    own: bool
    strict: bool
    segments: bool

    @property
    def size(self) -> int:
        """R, rows of a program."""
        return TILE * self.groups

    @property
    def factor(self) -> float:
        """What makes scores of inner products; exponentials of a softmax are to base 2, as the chip has them."""
        return self.scale * math.log2(math.e) if self.kernel.normalized else self.scale

    @property
    def halves(self) -> int:
        """Bfloat16 arrays that make up weights, and values."""
        return 1 if self.kernel.normalized else 2


class Refs(dict):
    """References of a kernel by name."""

    __getattr__ = dict.__getitem__


def load(ref) -> Array:
    """A block of global memory in registers, as wgmma leaves it."""
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False)


def spread(x: Array, width: int) -> Array:
    """[R] numbers of rows to [R, width]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (x.shape[0], width), (0,)), plgpu.Layout.WGMMA)


def halves(x: Array, count: int) -> tuple[Array, ...]:
    """x as the sum of `count` bfloat16 arrays, one or two."""
    high = x.astype(jnp.bfloat16)
    return (high,) if count == 1 else (high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16))


def left(parts: tuple[Array, ...], scratch) -> tuple[Any, ...]:
    """bfloat16 arrays as left operands of wgmma: from registers, which the interpreter does not know.

    Args:
      parts: halves of a matrix.
      scratch: references to shared memory, only in the interpreter.
    """
    if not interpreting():
        return parts
    for ref, part in zip(scratch, parts, strict=False):
        ref[...] = part
    plgpu.commit_smem()
    return tuple(scratch[: len(parts)])


def zeros(width: int) -> Array:
    """[64, width] of zeros, as wgmma leaves its accumulators."""
    return plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), plgpu.Layout.WGMMA)


def accumulate(x: Array, sums: tuple[tuple[Any, Any], ...]) -> Array:
    """x and a sum of matrix products, in the registers of x; the interpreter has no such accumulators."""
    if interpreting():
        return x + products(sums)[0]

    def run(accumulator):
        for a, b in sums:
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(plgpu.ACC.init(x))


def skip(ring: "Ring", first, stop) -> None:
    """Lets tiles of the ring pass, by their counts."""

    @pl.loop(first, stop)
    def _(count):
        ring.await_key(count)
        ring.await_value(count)
        ring.release(count)


def scores_of(plan: Plan, q, k) -> Array:
    """Scores [64, 64] of rows in shared memory against columns there."""
    return products(((q, turned(k)),))[0] * plan.factor


def tile_mask(diagonal: str | None, rows, columns, places=None):
    """[64, 64] what is seen, or None for everything.

    Args:
      diagonal: how column and row compare where the tile crosses the diagonal: "<", "<=", ">" or ">=".
      rows, columns: references to the segments of the tile's rows and columns, or None.
      places: row and column of every entry, where they are not to be computed.
    """
    mask = None
    if diagonal is not None:
        r, c = iotas(TILE) if places is None else places
        mask = {"<": c < r, "<=": c <= r, ">": c > r, ">=": c >= r}[diagonal]
    if rows is not None:
        same = column(rows, TILE) == row(columns, TILE)
        mask = same if mask is None else mask & same
    return mask


def place_scratch(plan: Plan) -> dict[str, Any]:
    """Scratch for the numbers from 0 to 63 in shared memory, once for rows and once for columns.

    Computed, the compiler holds them in twenty registers all along, beyond the last that it has.
    """
    there = plgpu.Barrier(num_barriers=plan.groups)
    return {"place_numbers": plgpu.SMEM((plan.groups, 2, TILE), jnp.int32), "places_there": there}


def place_numbers() -> Array:
    """What `place_scratch` holds."""
    return jnp.broadcast_to(jnp.arange(TILE, dtype=jnp.int32), (2, TILE))


def bring_places(refs: Refs, g) -> None:
    """Copies the numbers for warpgroup g."""
    plgpu.copy_gmem_to_smem(refs.places, refs.place_numbers.at[g], refs.places_there.at[g])
    plgpu.barrier_wait(refs.places_there.at[g])


def places(refs: Refs, g) -> tuple[Array, Array]:
    """Row and column of every entry of a tile."""
    return column(refs.place_numbers.at[g, 0], TILE), row(refs.place_numbers.at[g, 1], TILE)


def weights_of(plan: Plan, scores: Array, mask, norm: Array | None) -> Array:
    """Values of the kernel in one tile, normalised by the log-sum-exp `norm` where it is softmax; 0 where hidden."""
    if plan.kernel.normalized:
        return jnp.exp2((scores if mask is None else jnp.where(mask, scores, LOW)) - norm)
    if mask is None:
        return _similarity(plan.kernel, scores)
    # Hidden scores are cleared before the kernel too: their exponential may be infinite.
    return jnp.where(mask, _similarity(plan.kernel, jnp.where(mask, scores, 0.0)), 0.0)


def _similarity(kernel: Kernel, scores: Array) -> Array:
    """core.similarity, whose round stops a gradient: a primitive that kernels do not have."""
    if kernel.name != "round":
        return similarity(kernel, scores)
    unit = 10.0**kernel.decimals
    return lax.round(scores * unit, lax.RoundingMethod.TO_NEAREST_EVEN) / unit


class Ring:
    """Tiles on their way: a slot has a key tile (and numbers of its tokens) and a value tile, each with a barrier.

    Tiles are counted over the whole life of a program. Every warpgroup that computes waits for each tile and
    releases it, also those that it has no use for.

    Attributes:
      plan: as ever.
      refs: of the kernel: key_slots, value_slots (by halves), number_slots, key_there, value_there, free.
      sources: of tile t: (source, slots) pairs of its keys and of its values.
    """

    def __init__(self, plan: Plan, refs: Refs, keys: Callable, values: Callable):
        self.plan, self.refs, self.keys, self.values = plan, refs, keys, values

    def slot(self, count):
        """Where the tile of this number lies."""
        return lax.rem(count, jnp.int32(self.plan.slots))

    def bring_key(self, count, t) -> None:
        """Starts the copy of keys once the slot is free."""

        @pl.when(count >= self.plan.slots)
        def _():
            plgpu.barrier_wait(self.refs.free.at[self.slot(count)])

        self._bring(self.keys(t), count, self.refs.key_there)

    def bring_value(self, count, t) -> None:
        """Starts the copy of values; that of keys came first."""
        self._bring(self.values(t), count, self.refs.value_there)

    def _bring(self, copies, count, barrier) -> None:
        slot = self.slot(count)
        for source, slots in copies:
            plgpu.copy_gmem_to_smem(source, slots.at[slot], barrier.at[slot])

    def drain(self, count) -> None:
        """Waits until the last of `count` tiles are released."""

        @pl.loop(jnp.maximum(count - self.plan.slots, 0), count)
        def _(c):
            plgpu.barrier_wait(self.refs.free.at[self.slot(c)])

    def await_key(self, count):
        """The slot of a tile whose keys are there."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.refs.key_there.at[slot])
        return slot

    def await_value(self, count) -> None:
        """Waits until the values of a tile are there."""
        plgpu.barrier_wait(self.refs.value_there.at[self.slot(count)])

    def release(self, count) -> None:
        """Says that this warpgroup is done with a tile."""
        plgpu.barrier_arrive(self.refs.free.at[self.slot(count)])


def shared(rows: int, width: int, *lead: int) -> plgpu.SMEM:
    """A bfloat16 block of shared memory as wgmma reads it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*lead, rows, width), jnp.bfloat16, transforms=transforms)


def ring_scratch(plan: Plan, width: int, values: int, numbers: int) -> dict[str, Any]:
    """Scratch of a ring.

    Args:
      plan: as ever.
      width: of the value tiles.
      values: how many arrays of values.
      numbers: how many numbers come with the keys of each token.
    """
    scratch: dict[str, Any] = {"key_slots": shared(TILE, plan.key, plan.slots)}
    scratch |= {f"value_slots{n}": shared(TILE, width, plan.slots) for n in range(values)}
    if numbers:
        scratch["number_slots"] = plgpu.SMEM((plan.slots, numbers, TILE), jnp.float32)
    there = functools.partial(plgpu.Barrier, num_barriers=plan.slots)
    scratch["key_there"] = there(num_arrivals=1 + bool(numbers))
    scratch["value_there"] = there(num_arrivals=values)
    scratch["free"] = there(num_arrivals=plan.groups)
    return scratch


def group_of(refs: Refs):
    """The key and value head of the program's query head."""
    return lax.div(lax.axis_index("head"), jnp.int32(refs.q.shape[1] // refs.k.shape[1]))


def row_extent(plan: Plan, refs: Refs) -> tuple[Any, Any, Any, Any]:
    """A program's block of rows; its first tile of columns, the one of its first row, and where they end."""
    # Those that see most begin first.
    i = refs.q.shape[2] // plan.size - 1 - lax.axis_index("block")
    place = (lax.axis_index("batch_row"), group_of(refs))
    own = jnp.int32(plan.before * plan.groups) + i * plan.groups if plan.own else refs.bound[(*place, 0)]
    stop = own + plan.groups if plan.own else own
    first = jnp.minimum(refs.first[(*place, i)], own) if plan.segments else jnp.int32(0)
    return i, first, own, stop


def column_ring(plan: Plan, refs: Refs, values: int) -> Ring:
    """Tiles of keys k, with their segments, and of the arrays x0, x1."""
    b, group = lax.axis_index("batch_row"), group_of(refs)

    def keys(t):
        found = [(refs.k.at[b, group, pl.ds(t * TILE, TILE)], refs.key_slots)]
        return found + ([(refs.key_rows.at[b, group, t], refs.number_slots)] if plan.segments else [])

    def of_values(t):
        places = (b, group, pl.ds(t * TILE, TILE))
        return [(refs[f"x{n}"].at[places], refs[f"value_slots{n}"]) for n in range(values)]

    return Ring(plan, refs, keys, of_values)


def bring_columns(refs: Refs, plan: Plan, values: int) -> None:
    """Brings all that a block of rows sees."""
    _, first, _, stop = row_extent(plan, refs)
    ring = column_ring(plan, refs, values)

    @pl.loop(first, stop)
    def _(t):
        ring.bring_key(t - first, t)
        ring.bring_value(t - first, t)

    ring.drain(stop - first)


def put(scratch, g, x: Array, target) -> None:
    """Writes a tile of warpgroup g to global memory; bfloat16 goes through shared memory, to be waited for."""
    if target.dtype != jnp.bfloat16:
        target[...] = x
        return
    scratch.at[g][...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.at[g], target)


def interpreter_scratch(plan: Plan, count: int) -> dict[str, Any]:
    """Where left operands lie in the interpreter."""
    return {f"left{n}": shared(TILE, TILE, plan.groups) for n in range(count if interpreting() else 0)}


def call(
    plan: Plan,
    name: str,
    compute: Callable[[Refs], None],
    bring: Callable[[Refs], None],
    grid: tuple[int, ...],
    inputs: dict[str, Array],
    outputs: dict[str, tuple[tuple[int, ...], Any]],
    scratch: dict[str, Any],
    registers: tuple[int, int] = (240, 24),
) -> tuple[Array, ...]:
    """Runs a kernel of W computing warpgroups and one that brings tiles.

    Args:
      plan: as ever.
      name: of the kernel.
      compute: what each computing warpgroup does.
      bring: what the other one does.
      grid: programs by batch row, head and block.
      inputs: arrays by name.
      outputs: shapes and dtypes of the results by name.
      scratch: shared memory by name.
      registers: of a thread, in the warpgroups that compute and in the other one.
    """
    names = (*inputs, *outputs, *scratch)

    def body(*flat):
        refs = Refs(zip(names, flat, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < plan.groups)
        def _():
            if plan.groups > 1:
                plgpu.set_max_registers(registers[0], action="increase")
            compute(refs)

        @pl.when(warpgroup == plan.groups)
        def _():
            if plan.groups > 1:
                plgpu.set_max_registers(registers[1], action="decrease")
            bring(refs)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in outputs.values()],
        scratch_types=list(scratch.values()),
        grid=grid,
        grid_names=("batch_row", "head", "block"),
        num_threads=plan.groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=f"memformer_{name}",
    )
    operands = tuple(inputs.values())
    # Under shard_map results vary as the operands do; the kernel's own types do not say so.
    return tuple(vary_like(x, *operands) for x in kernel(*operands))


def value_halves(plan: Plan, x: Array) -> tuple[Array, ...]:
    """Values as products take them, one or two bfloat16 arrays."""
    if plan.halves == 1:
        return (x.astype(jnp.bfloat16),)
    if x.dtype == jnp.bfloat16:
        return x, jnp.zeros_like(x)
    # The compiler may take a cast to bfloat16 and back for nothing, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def bounds(k: Array, bound) -> Array:
    """A bound in tokens for every batch row and head of k, in tiles, [B, G, 1]."""
    tiles = lax.div(jnp.asarray(bound, jnp.int32), jnp.int32(TILE))
    return jnp.broadcast_to(tiles.reshape(1, 1, 1), (*k.shape[:2], 1))


def pack(heads: int, *numbers: Array) -> Array:
    """[B, heads, T / 64, names, 64] float32 from [B, T] or [B, heads, T] arrays."""
    batch, length = numbers[0].shape[0], numbers[0].shape[-1]

    def lay(x):
        x = x.astype(jnp.float32)
        x = jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (batch, heads, length))
        return x.reshape(batch, heads, length // TILE, TILE)

    return jnp.stack([lay(x) for x in numbers], axis=3)


def first_tiles(plan: Plan, heads: int, query: Array, key: Array) -> Array:
    """[B, heads, N] first tile of columns that each block of rows sees, the number of tiles where it sees none."""
    found = find_first(query, key, plan.size, TILE)
    return jnp.broadcast_to(found[:, None], (found.shape[0], heads, found.shape[1]))


def last_tiles(plan: Plan, heads: int, query: Array, key: Array) -> Array:
    """[B, heads, M] one more than the last tile of rows that sees each block of columns, 0 where none does."""
    found = find_last(query, key, TILE, plan.size)
    return jnp.broadcast_to(found[:, None], (found.shape[0], heads, found.shape[1]))
