"""Attention by tiles on Hopper: what the kernels of read and write share, forward and backward.

Scores are computed in tiles of 64 queries by 64 keys. A program has one or two warpgroups that compute, each on the
64 rows of its own, and one that copies the tiles of columns (TMA) into a ring of slots in shared memory, where all
computing warpgroups read them. Rows lie on threads as wgmma leaves its accumulators.

Sums without a normaliser cancel: there weights and values are sums of two parts, 16 bits, else one. In a read they are
bfloat16 beside queries and keys of float16 too, whose range is too small for such sums.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core import mask as masks
from memformer.core.mask import Mask
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel, similarity
from memformer.core.types import Array
from memformer.pallas.gpu import compat, wgmma
from memformer.pallas.gpu.attention.config import TILE, AttentionConfig
from memformer.pallas.gpu.attention.scalars import column_names
from memformer.pallas.gpu.checks import launch_grid
from memformer.pallas.gpu.wgmma import (
    Refs,
    iotas,
    load_column,
    load_row,
    products,
    shared_block,
    split_bf16,
    transposed,
)
from memformer.pallas.pair_decay import HIDDEN

__all__ = ["LOW", "Refs", "Ring", "accumulate", "attention_weights", "bounds", "call", "column_bounds", "column_ring"]
__all__ += ["column_scalar", "compute_scores"]
__all__ += [
    "copy_columns",
    "copy_indices",
    "decay_factor",
    "index_scratch",
    "index_vectors",
]
__all__ += ["key_head", "load_indices", "load_tile", "mask_scores", "ring_scratch"]
__all__ += [
    "read_zero",
    "row_bounds",
    "row_extent",
    "similarity_values",
    "round_split",
    "split",
    "split_gradient",
    "split_outside",
    "split_two",
    "split_values",
    "store_tile",
    "tile_mask",
    "zeros",
]

# A masked score. Running maxima start at half of it, so that its exponential is 0.
LOW = float(jnp.finfo(jnp.float32).min)


def load_tile(ref) -> Array:
    """Loads a block of global memory into registers, as wgmma leaves its accumulators."""
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False)


def zeros(width: int) -> Array:
    """[64, width] zeros, as wgmma leaves its accumulators."""
    return plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), plgpu.Layout.WGMMA)


def split(config: AttentionConfig, x: Array, parts: int) -> tuple[Array, ...]:
    """Weights as products with values take them, in one part or two."""
    return split_two(config, x) if parts > 1 else (x.astype(config.value_dtype),)


def split_gradient(config: AttentionConfig, ds: Array, parts: int) -> tuple[Array, ...]:
    """ds as products with queries or keys take it; one part of float16 has 11 bits."""
    return split_bf16(ds, parts) if parts > 1 and config.dtype == "bfloat16" else (ds.astype(config.dtype),)


def split_two(config: AttentionConfig, x: Array) -> tuple[Array, Array]:
    """x as the sum of two arrays of the dtype of values."""
    return split_bf16(x, 2) if config.value_dtype == "bfloat16" else round_split(config, x)


def round_split(config: AttentionConfig, x: Array) -> tuple[Array, Array]:
    """`split_two` with a first part that is x rounded."""
    high = x.astype(config.value_dtype)
    return high, (x - high.astype(jnp.float32)).astype(config.value_dtype)


def accumulate(x: Array, pairs: tuple[tuple[Any, Any], ...]) -> Array:
    """x plus a sum of matrix products, in the registers of x."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(plgpu.ACC.init(x))


def compute_scores(config: AttentionConfig, q, k) -> Array:
    """Scores [64, 64] of rows against columns, both in shared memory."""
    return products(((q, transposed(k)),))[0] * config.factor


def tile_mask(
    config: AttentionConfig,
    diagonal: str | None,
    row: Callable[[str], Any],
    column: Callable[[str], Any],
    indices=None,
    *,
    transposed: bool = False,
):
    """The mask [64, 64] of a tile, or None where nothing is masked.

    Args:
      config: sizes.
      diagonal: how column and row compare where the tile crosses the diagonal: "<", "<=", ">" or ">=".
      row, column: functions from a name to the ref of that scalar of the tile's rows or columns.
      indices: row and column index of every entry; None computes them.
      transposed: whether rows are keys.
    """
    mask = None
    if diagonal is not None:
        i, j = iotas(TILE) if indices is None else indices
        mask = {"<": j < i, "<=": j <= i, ">": j > i, ">=": j >= i}[diagonal]
    if config.segments:
        same = load_column(row("segment"), TILE) == load_row(column("segment"), TILE)
        mask = same if mask is None else mask & same
    if config.window is None:
        return mask
    distance = load_column(row("rank"), TILE) - load_row(column("rank"), TILE)
    if not config.causal:
        distance = jnp.abs(distance)
    elif transposed:
        distance = -distance
    near = distance < config.window
    return near if mask is None else mask & near


def index_scratch(config: AttentionConfig) -> dict[str, Any]:
    """Shared memory for the numbers from 0 to 63, once for rows and once for columns.

    Computed ones the compiler holds in twenty registers throughout, which are then missing.
    """
    ready = plgpu.Barrier(num_barriers=config.warpgroups)
    return {"index_tile": plgpu.SMEM((config.warpgroups, 2, TILE), jnp.int32), "index_ready": ready}


def index_vectors() -> Array:
    """The operand that `copy_indices` copies."""
    return jnp.broadcast_to(jnp.arange(TILE, dtype=jnp.int32), (2, TILE))


def copy_indices(refs: Refs, g) -> None:
    """Copies the numbers from 0 to 63 for warpgroup g."""
    plgpu.copy_gmem_to_smem(refs.indices, refs.index_tile.at[g], refs.index_ready.at[g])
    plgpu.barrier_wait(refs.index_ready.at[g])


def read_zero(refs: Refs, g):
    """0, read in every step of a loop: otherwise the compiler holds addresses of products over it, and spills."""
    return refs.index_tile[g, 0, 0]


def load_indices(refs: Refs, g) -> tuple[Array, Array]:
    """Row and column index of every entry of a tile."""
    return load_column(refs.index_tile.at[g, 0], TILE), load_row(refs.index_tile.at[g, 1], TILE)


def mask_scores(scores: Array, mask, gap: Array | None = None) -> Array:
    """Scores of a softmax with the decay of each pair added, if any; `LOW` where masked or forgotten."""
    if gap is not None:
        scores = jnp.where(gap > HIDDEN, scores + gap, LOW)
    return scores if mask is None else jnp.where(mask, scores, LOW)


def attention_weights(
    config: AttentionConfig, scores: Array, mask, lse: Array | None, gap: Array | None = None
) -> Array:
    """Decayed weights of one tile, normalised by the log-sum-exp of its rows for softmax; 0 where masked."""
    if config.similarity.normalized:
        return jnp.exp2(mask_scores(scores, mask, gap) - lse)
    if mask is None:
        weights = similarity_values(config.similarity, scores)
    else:
        # Masked scores are cleared before the kernel too: their exponential may be infinite.
        weights = jnp.where(mask, similarity_values(config.similarity, jnp.where(mask, scores, 0.0)), 0.0)
    return weights if gap is None else weights * decay_factor(gap)


def decay_factor(gap: Array) -> Array:
    """The factor on a similarity that is no softmax; 1 for pairs against time, which are masked."""
    return jnp.exp2(jnp.minimum(gap, 0.0))


def similarity_values(kernel: Kernel, scores: Array) -> Array:
    """core.similarity without its stop_gradient (round), a primitive that kernels do not have."""
    if kernel.name != "round":
        return similarity(kernel, scores)
    unit = 10.0**kernel.decimals
    return lax.round(scores * unit, lax.RoundingMethod.TO_NEAREST_EVEN) / unit


class Ring:
    """A ring of slots for tiles of keys, with their scalars, and of values; each half of a slot has a barrier.

    Tiles are counted over the whole life of a program. Every computing warpgroup waits for each tile and releases it,
    also the tiles that it does not use.

    Args:
      config: sizes.
      refs: of the kernel: key_slots, value_slots (by parts), scalar_slots, key_ready, value_ready, free.
      keys, values: functions from a tile to its copies, pairs (source, slots).
    """

    def __init__(self, config: AttentionConfig, refs: Refs, keys: Callable, values: Callable):
        self.config, self.refs, self.keys, self.values = config, refs, keys, values

    def slot(self, count):
        """The slot of a tile, by its count."""
        return lax.rem(count, jnp.int32(self.config.slots))

    def copy_key(self, count, t) -> None:
        """Starts the copy of tile t's keys once the slot is free."""

        @pl.when(count >= self.config.slots)
        def _():
            plgpu.barrier_wait(self.refs.free.at[self.slot(count)])

        self._copy(self.keys(t), count, self.refs.key_ready)

    def copy_value(self, count, t) -> None:
        """Starts the copy of tile t's values, after that of its keys."""
        self._copy(self.values(t), count, self.refs.value_ready)

    def _copy(self, copies, count, barrier) -> None:
        slot = self.slot(count)
        for source, slots in copies:
            plgpu.copy_gmem_to_smem(source, slots.at[slot], barrier.at[slot])

    def drain(self, count) -> None:
        """Waits until the last of `count` tiles are released."""

        @pl.loop(jnp.maximum(count - self.config.slots, 0), count)
        def _(c):
            plgpu.barrier_wait(self.refs.free.at[self.slot(c)])

    def wait_key(self, count):
        """Waits for the keys of a tile, and returns its slot."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.refs.key_ready.at[slot])
        if self.config.slots == 1 and "index_tile" in self.refs:
            return read_zero(self.refs, lax.axis_index("warpgroup"))
        return slot

    def wait_value(self, count) -> None:
        """Waits for the values of a tile."""
        plgpu.barrier_wait(self.refs.value_ready.at[self.slot(count)])

    def release(self, count) -> None:
        """Releases a tile for this warpgroup."""
        if "scalar_slots" in self.refs:
            # They are read by loads; the next copy to the slot must not overtake those.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.refs.free.at[self.slot(count)])

    def skip(self, first, stop) -> None:
        """Releases the tiles from `first` to `stop` unread."""

        @pl.loop(first, stop)
        def _(count):
            self.wait_key(count)
            self.wait_value(count)
            self.release(count)


def ring_scratch(config: AttentionConfig, width: int, values: int, scalars: int, beside: int = 0) -> dict[str, Any]:
    """Scratch of a ring.

    Args:
      config: sizes.
      width: of the value tiles.
      values: number of arrays of values.
      scalars: number of scalars per token that come with the keys.
      beside: number of tiles of values that no copy writes, after the slots.
    """
    scratch: dict[str, Any] = {"key_slots": shared_block(config.slots, TILE, config.key, dtype=config.dtype)}
    tiles = config.slots + beside
    scratch |= {f"value_slots{n}": shared_block(tiles, TILE, width, dtype=config.value_dtype) for n in range(values)}
    if scalars:
        scratch["scalar_slots"] = plgpu.SMEM((config.slots, scalars, TILE), jnp.float32)
    barrier = functools.partial(plgpu.Barrier, num_barriers=config.slots)
    scratch["key_ready"] = barrier(num_arrivals=1 + bool(scalars))
    scratch["value_ready"] = barrier(num_arrivals=values)
    scratch["free"] = barrier(num_arrivals=config.warpgroups)
    return scratch


def key_head(refs: Refs):
    """The key and value head of the program's query head."""
    return lax.div(lax.axis_index("head"), jnp.int32(refs.q.shape[1] // refs.k.shape[1]))


def row_extent(config: AttentionConfig, refs: Refs) -> tuple[Any, Any, Any, Any]:
    """A program's block of rows; its first tile of columns, the tile of its first row, and the end of its columns."""
    # Blocks that see most columns start first.
    i = (refs.o if "o" in refs else refs.q).shape[2] // config.rows - 1 - lax.axis_index("block")
    place = (lax.axis_index("batch_row"), key_head(refs))
    if config.own:
        own = jnp.int32(config.before * config.warpgroups) + i * config.warpgroups
        stop = own + config.warpgroups
    else:
        own = stop = refs.bound[(*place, 0)] if config.causal else refs.stop[(*place, i)]
    first = jnp.minimum(refs.first[(*place, i)], own) if config.bounded else jnp.int32(0)
    return i, first, own, stop


def column_scalar(config: AttentionConfig, refs: Refs, slot):
    """A function from a name to the scalar of a slot's keys."""
    return lambda name: refs.scalar_slots.at[slot, column_names(config).index(name)]


def column_ring(config: AttentionConfig, refs: Refs, values: int) -> Ring:
    """Tiles of the keys k, with their scalars, and of the arrays x0, x1."""
    b, group = lax.axis_index("batch_row"), key_head(refs)
    # Decays are of query heads.
    head = lax.axis_index("head") if config.decay else group

    def keys(t):
        copies = [(refs.k.at[b, group, pl.ds(t * TILE, TILE)], refs.key_slots)]
        return copies + ([(refs.k_scalars.at[b, head, t], refs.scalar_slots)] if column_names(config) else [])

    def of_values(t):
        place = (b, group, pl.ds(t * TILE, TILE), pl.ds(config.value_start, config.value))
        return [(refs[f"x{n}"].at[place], refs[f"value_slots{n}"]) for n in range(values)]

    return Ring(config, refs, keys, of_values)


def copy_columns(refs: Refs, config: AttentionConfig, values: int) -> None:
    """Copies all tiles of columns that a block of rows sees."""
    _, first, _, stop = row_extent(config, refs)
    ring = column_ring(config, refs, values)

    @pl.loop(first, stop)
    def _(t):
        ring.copy_key(t - first, t)
        ring.copy_value(t - first, t)

    ring.drain(stop - first)


def store_tile(scratch, g, x: Array, target) -> None:
    """Writes a tile of warpgroup g to global memory; without waiting for the copy where it has 16 bits."""
    if target.dtype == jnp.float32:
        target[...] = x
        return
    scratch.at[g][...] = x.astype(target.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.at[g], target)


def call(
    config: AttentionConfig,
    name: str,
    compute: Callable[[Refs], None],
    copy: Callable[[Refs], None],
    grid: tuple[int, int, int],
    inputs: dict[str, Array],
    outputs: dict[str, tuple[tuple[int, ...], Any]],
    scratch: dict[str, Any],
    automatic_barriers: bool = True,
    updated: Mapping[str, Array] = MappingProxyType({}),
) -> tuple[Array, ...]:
    """Launches a kernel of computing warpgroups and one that copies tiles.

    Args:
      config: sizes.
      name: of the kernel.
      compute: body of each computing warpgroup.
      copy: body of the copying one.
      grid: programs by batch row, head and block.
      inputs: arrays by name.
      outputs: shapes and dtypes of the results by name.
      scratch: shared memory by name.
      automatic_barriers: whether Pallas puts barriers of the warpgroup around stores and copies.
      updated: arrays that the kernel changes in place, by name; results after the others.

    Raises:
      NotImplementedError: see `launch_grid`.
    """
    names = (*inputs, *updated, *outputs, *scratch)

    def body(*flat):
        refs = Refs(zip(names, flat, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        def first():
            if config.warpgroups > 1:
                plgpu.set_max_registers(240, action="increase")
            compute(refs)

        def last():
            if config.warpgroups > 1:
                plgpu.set_max_registers(24, action="decrease")
            copy(refs)

        # In two conditionals the first branch holds what the second one needs, and registers of the write spill; in
        # one, those of the gradients of keys do.
        if automatic_barriers:
            pl.when(warpgroup < config.warpgroups)(first)
            pl.when(warpgroup == config.warpgroups)(last)
        else:
            lax.cond(warpgroup < config.warpgroups, first, last)

    out_type = [jax.ShapeDtypeStruct(*shape) for shape in outputs.values()]
    params = plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=not automatic_barriers,
    )
    settings = {
        "num_threads": config.warpgroups + 1,
        "thread_name": "warpgroup",
        "kernel_name": f"memformer_{name}",
        **launch_grid(grid, ("batch_row", "head", "block")),
    }
    operands = tuple(inputs.values())
    if updated:

        def in_place(*refs):
            pl.run_scoped(functools.partial(body, *refs), *scratch.values(), collective_axes="warpgroup")

        mesh = plgpu.Mesh(**settings)
        # `plgpu.kernel` takes no references before jax 0.11.
        whole = pl.kernel(in_place, out_type=out_type, mesh=mesh, compiler_params=params, name=f"memformer_{name}")

        def run(refs):
            changed, results = refs
            for ref, x in zip(results, whole(*operands, *changed), strict=True):
                ref[...] = x

        empty = [lax.empty(x.shape, x.dtype) for x in out_type]
        changed, results = pl.run_state(run)((list(updated.values()), empty))
        return *results, *changed
    kernel = plgpu.kernel(
        body, out_type=out_type, scratch_types=list(scratch.values()), compiler_params=params, **settings
    )
    # Under shard_map results vary as the operands do; the kernel's own types do not say so.
    return tuple(vary_like(x, *operands) for x in kernel(*operands))


def split_values(config: AttentionConfig, x: Array) -> tuple[Array, ...]:
    """Values as products take them, in one part or two of bfloat16."""
    if config.parts == 1:
        return (x.astype(config.value_dtype),)
    return (x, jnp.zeros_like(x)) if x.dtype == jnp.bfloat16 else split_outside(config, x)


def split_outside(config: AttentionConfig, x: Array) -> tuple[Array, Array]:
    """x as the sum of two arrays of the dtype of values, outside of a kernel."""
    x = x.astype(jnp.float32)
    if config.value_dtype == "bfloat16":
        return wgmma.split_outside(x)
    # XLA may drop a cast to 16 bits and back, but not this.
    high = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return high.astype(config.value_dtype), (x - high).astype(config.value_dtype)


def bounds(k: Array, *tokens) -> Array:
    """Bounds in tokens as tiles, for every batch row and head of k: the first of [B, G, 64]."""
    tiles = jnp.stack([lax.div(jnp.asarray(bound, jnp.int32), jnp.int32(TILE)) for bound in tokens])
    return jnp.broadcast_to(jnp.pad(tiles, (0, TILE - len(tokens))), (*k.shape[:2], TILE))


def row_bounds(config: AttentionConfig, k: Array, length: int, mask: Mask) -> dict[str, Array]:
    """By name, [B, G, N]: the first tile of columns that each block of rows sees, without causality also the end."""
    if not config.bounded:
        return {}
    rows, columns = config.rows, k.shape[2] // TILE
    pair = masks.row_bounds(mask, rows, TILE, config.window, causal=config.causal)
    first, stop = pair or (jnp.int32(0), jnp.int32(columns))
    found = {"first": first} if config.causal else {"first": first, "stop": stop}
    return _per_head(found, k, length // rows)


def column_bounds(config: AttentionConfig, k: Array, q: Array, mask: Mask) -> dict[str, Array]:
    """By name, [B, G, M]: one more than the last tile of rows that sees each block of columns, 0 where none does.

    Without causality also the first.
    """
    if not config.bounded:
        return {}
    columns, rows = config.rows, q.shape[2] // TILE
    pair = masks.column_bounds(mask, TILE, columns, config.window, causal=config.causal)
    first, last = pair or (jnp.int32(0), jnp.int32(rows))
    found = {"last": last} if config.causal else {"first": first, "last": last}
    return _per_head(found, k, k.shape[2] // columns)


def _per_head(found: dict[str, Array], k: Array, blocks: int) -> dict[str, Array]:
    batch, heads = k.shape[:2]
    return {name: jnp.broadcast_to(x[:, None] if x.ndim else x, (batch, heads, blocks)) for name, x in found.items()}
