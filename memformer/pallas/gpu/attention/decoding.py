"""Few tokens of attention over a cache of fixed capacity on Hopper: one kernel that reads the slots in use once.

A program reads slots of one key head in tiles of 64, as they lie in the cache; the rows of its products are the queries
of all tokens and of all query heads of that key head. Where rows of the batch and key heads are fewer than the chip has
room for, programs share the slots in use, and what they sum is added up outside.

A tile of keys and values of 128 channels in bfloat16 is 32 KiB, 1,500 cycles of an SM's share of 4.8 TB/s at 1.7 GHz;
its two products take 490 with 64 rows, whatever of them are queries. Two programs fit an SM, each with two tiles in
flight, so that one computes while the other waits.

Source: arXiv 2205.14135 (tiles with a running maximum); Flash-Decoding (Dao et al., 2023) for the division of slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.decay import CumulativeDecay
from memformer.core.mask import BLIND, UNSEEN
from memformer.core.numerics import repeat_heads
from memformer.core.sharding import vary_like
from memformer.core.similarity import Kernel
from memformer.core.types import Array
from memformer.pallas.cache_decoding import MOST_SLOTS, CacheConfig, CacheRead, CacheSums, token_values
from memformer.pallas.checks import check_chip, check_dtypes, unsupported
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.tiles import LOW, Refs
from memformer.pallas.gpu.checks import launch_grid
from memformer.pallas.gpu.wgmma import (
    anew,
    broadcast_rows,
    load_column,
    load_row,
    partial_products,
    products,
    shared_block,
    split_bf16,
    start_anew,
    transposed,
)
from memformer.pallas.pair_decay import LOG2E, RADIX, decay_digits
from memformer.pallas.platform import interpreting_for, is_hopper
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

TILE = tuning.CHUNK

# Tiles in flight in one program, and programs that keep an H200 busy: two on each of its 132 SMs.
SLOTS, PROGRAMS = 2, 264

# Tiles that a program reads at least where the cache is full, if programs share the slots.
LEAST_TILES = 4

# Numbers of a decay: its digits (pallas/pair_decay.py) and its fraction.
DECAY = ("decay_high", "decay_low", "decay_fraction")

# Channels: multiples of the width of a swizzled block, up to what fits registers and shared memory.
BLOCK, MOST_CHANNELS, MOST_WRITTEN = 64, 256, 128


def _mask_names(config: CacheConfig) -> tuple[str, ...]:
    """Numbers of a slot: its segment, and where a row sees but some of them which slot it is."""
    return ("segment",) + ("slot",) * (config.causal or config.windowed)


def _row_names(config: CacheConfig) -> tuple[str, ...]:
    names = ("segment",) + ("stop",) * config.causal + ("first",) * config.windowed
    names += DECAY if config.decays else ()
    return names + ("kind",) * (len(config.similarities) > 1) + ("head",) * (config.decays > 1)


def _decay_names(config: CacheConfig) -> tuple[str, ...]:
    """Numbers of a slot and key head; a decay has the number of its query head behind its name."""
    return tuple(f"{name}{i}" for i in range(config.decays) for name in DECAY)


def _tile_rows(config: CacheConfig) -> int:
    """Rows of a program that are copied: whole blocks of 8."""
    return min(TILE, -(-config.rows // 8) * 8)


def _row_tiles(config: CacheConfig) -> int:
    """Programs that share the rows of a key head."""
    return -(-config.rows // TILE)


class Sums(NamedTuple):
    """Running sums of the rows: maximum and sum of exponentials [64], weighted sum of values in blocks of columns."""

    top: Array
    total: Array
    values: tuple[Array, ...]


def _start(width: int) -> Sums:
    layout = plgpu.Layout.WGMMA.reduce(1)
    top, total = (plgpu.layout_cast(jnp.full((TILE,), x, jnp.float32), layout) for x in (LOW / 2, 0.0))
    return Sums(top, total, (tiles.zeros(BLOCK),) * (width // BLOCK))


def _scaled(kernel: Kernel, scores: Array) -> Array:
    """Scores times the scale; those of a softmax to base 2."""
    return scores * (kernel.scale * LOG2E if kernel.normalized else kernel.scale)


def _add_weights(config: CacheConfig, sums: Sums, scores: Array, seen, gap, kind) -> tuple[Sums, Array]:
    """The weights of a tile; for the rows of a softmax the sums are rescaled to a new maximum.

    A row that a similarity does not belong to sees nothing by it: its weights are 0, and its maximum stays.
    """
    found = None
    for i, kernel in enumerate(config.similarities):
        mine = seen if kind is None else seen & (kind == float(i))
        if kernel.normalized:
            logits = tiles.mask_scores(_scaled(kernel, scores), mine, gap)
            top = jnp.maximum(sums.top, jnp.max(logits, axis=1))
            factor = jnp.exp2(sums.top - top)
            weights = jnp.exp2(logits - broadcast_rows(top, TILE))
            values = tuple(x * broadcast_rows(factor, BLOCK) for x in sums.values)
            sums = Sums(top, sums.total * factor + jnp.sum(weights, axis=1), values)
        else:
            # Masked scores are cleared before the similarity too: their exponential may be infinite.
            weights = tiles.similarity_values(kernel, jnp.where(mine, _scaled(kernel, scores), 0.0))
            weights = jnp.where(mine, weights, 0.0)
            weights = weights if gap is None else weights * tiles.decay_factor(gap)
        found = weights if found is None else found + weights
    return sums, found


class _CacheProgram:
    """One program: its tiles of slots, its rows, and the copies of both."""

    def __init__(self, config: CacheConfig, refs: Refs, splits: int):
        self.config, self.refs = config, refs
        self.b, self.g, n = (lax.axis_index(name) for name in ("batch_row", "head", "block"))
        self.split, self.tile = lax.div(n, jnp.int32(_row_tiles(config))), lax.rem(n, jnp.int32(_row_tiles(config)))
        first, stop = refs.bounds[self.b, 0], refs.bounds[self.b, 1]
        share = lax.div(stop - first + jnp.int32(splits - 1), jnp.int32(splits))
        self.first = jnp.minimum(first + self.split * share, stop)
        self.stop = jnp.minimum(self.first + share, stop)

    def slot(self, t):
        """The slot of tile t in shared memory."""
        return lax.rem(t - self.first, jnp.int32(SLOTS))

    def place(self, t):
        """The slots of tile t: the last tile ends where the cache does, see `_by_tile`."""
        return pl.ds(jnp.minimum(t * TILE, jnp.int32(self.refs.k.shape[1] - TILE)), TILE)

    def copy_keys(self, t) -> None:
        """Starts the copy of a tile's keys and scalars, if the program has it."""
        refs, slot = self.refs, self.slot(t)

        @pl.when(t < self.stop)
        def _():
            ready = refs.key_ready.at[slot]
            plgpu.copy_gmem_to_smem(refs.k.at[self.b, self.place(t), self.g], refs.key_slots.at[slot], ready)
            plgpu.copy_gmem_to_smem(refs.masks.at[self.b, t], refs.mask_slots.at[slot], ready)
            if self.config.decays:
                plgpu.copy_gmem_to_smem(refs.decays.at[self.b, self.g, t], refs.decay_slots.at[slot], ready)

    def copy_values(self, t) -> None:
        """Starts the copy of a tile's values, if the program has it."""
        refs, slot = self.refs, self.slot(t)

        @pl.when(t < self.stop)
        def _():
            source = refs.v.at[self.b, self.place(t), self.g]
            plgpu.copy_gmem_to_smem(source, refs.value_slots.at[slot], refs.value_ready.at[slot])

    def copy_rows(self) -> None:
        """Copies the queries and their scalars; rows of the tile that are none hold anything."""
        refs, count = self.refs, _tile_rows(self.config)
        rows = pl.ds(self.tile * TILE, count)
        plgpu.copy_gmem_to_smem(refs.q.at[self.b, self.g, rows], refs.q_tile.at[0, pl.ds(0, count)], refs.rows_ready)
        plgpu.copy_gmem_to_smem(refs.rows.at[self.b, self.g, self.tile], refs.row_scalars, refs.rows_ready)
        plgpu.barrier_wait(refs.rows_ready)

    def row(self, name: str):
        """A number of the rows."""
        return load_column(self.refs.row_scalars.at[_row_names(self.config).index(name)], TILE)

    def mask(self, name: str, slot):
        """A number of a tile's slots."""
        return load_row(self.refs.mask_slots.at[slot, _mask_names(self.config).index(name)], TILE)

    def decay(self, name: str, slot):
        """A number of a tile's slots for the key head."""
        return load_row(self.refs.decay_slots.at[slot, _decay_names(self.config).index(name)], TILE)

    def seen(self, slot):
        """The mask of a tile: slots that the rows see, [64, 64]."""
        seen = self.row("segment") == self.mask("segment", slot)
        if self.config.causal:
            seen &= self.mask("slot", slot) < self.row("stop")
        if self.config.windowed:
            seen &= self.mask("slot", slot) >= self.row("first")
        return seen

    def gap(self, slot) -> Array | None:
        """The log decay of each pair to base 2, [64, 64]."""
        found = None
        for i in range(self.config.decays):
            high, low, fraction = (self.row(name) - self.decay(f"{name}{i}", slot) for name in DECAY)
            gap = (high * RADIX + low + fraction) * LOG2E
            if found is not None:
                gap = jnp.where(self.row("head") == float(i), gap, found)
            found = gap
        return found

    def values_of(self, slot) -> tuple[Any, ...]:
        """The parts of a tile's values as products take them."""
        refs = self.refs
        if "part0" not in refs:
            return (refs.value_slots.at[slot],)
        parts = anew(refs.zero, [refs[f"part{n}"] for n in range(self.config.parts)])
        for c in range(0, parts[0].shape[1], BLOCK):
            columns = pl.ds(c, BLOCK)
            x = compat.load(refs.value_slots.at[slot, :, columns], plgpu.Layout.WGMMA, optimized=False)
            for ref, part in zip(parts, split_bf16(x, len(parts)), strict=True):
                ref.at[:, columns][...] = part
        plgpu.commit_smem()
        return tuple(parts)


def _kernel(*flat, config: CacheConfig, names: tuple[str, ...], splits: int) -> None:
    refs = Refs(zip(names, flat, strict=True))
    start_anew(refs.zero)
    program = _CacheProgram(config, refs, splits)
    for i in range(SLOTS):
        program.copy_keys(program.first + i)
        program.copy_values(program.first + i)
    program.copy_rows()
    kind = len(config.similarities) > 1

    def step(t, sums):
        slot = program.slot(t)
        plgpu.barrier_wait(refs.key_ready.at[slot])
        (q,) = anew(refs.zero, (refs.q_tile,))
        (scores,) = products(((q, transposed(refs.key_slots.at[slot])),))
        seen, gap = program.seen(slot), program.gap(slot)
        sums, weights = _add_weights(config, sums, scores, seen, gap, program.row("kind") if kind else None)
        # All warps are done with the keys.
        plgpu.commit_smem()
        program.copy_keys(t + SLOTS)
        dtype = refs.v.dtype
        parts = split_bf16(weights, config.parts) if dtype != jnp.float16 else (weights.astype(dtype),)
        plgpu.barrier_wait(refs.value_ready.at[slot])
        values = program.values_of(slot)

        def block(c):
            columns = pl.ds(c * BLOCK, BLOCK)
            return partial_products(parts, tuple(x.at[:, columns] for x in values))

        sums = sums._replace(values=tuple(tiles.accumulate(x, block(c)) for c, x in enumerate(sums.values)))
        plgpu.commit_smem()
        program.copy_values(t + SLOTS)
        return sums

    sums = lax.fori_loop(program.first, program.stop, step, _start(refs.v.shape[3]))
    rows, place = pl.ds(0, _tile_rows(config)), (program.b, program.g, program.split)
    for i, x in enumerate((sums.top, sums.total)):
        refs.stats_tile.at[i][...] = x
    target = pl.ds(program.tile * TILE, _tile_rows(config))
    for c, x in enumerate(sums.values):
        refs.o_tile[...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.o_tile.at[rows], refs.o.at[(*place, target, pl.ds(c * BLOCK, BLOCK))])
        plgpu.wait_smem_to_gmem(0)
    for i in range(2):
        plgpu.copy_smem_to_gmem(refs.stats_tile.at[i, rows], refs.stats.at[(*place, i, target)])
    plgpu.wait_smem_to_gmem(0)


def _splits(programs: int, slots: int) -> int:
    """Programs that share the slots of a key head."""
    return max(1, min(-(-PROGRAMS // programs), slots // TILE // LEAST_TILES))


def _scratch(config: CacheConfig, q: Array, k: Array, v: Array) -> dict[str, Any]:
    key, value = k.shape[3], v.shape[3]
    scratch: dict[str, Any] = {
        "zero": plgpu.SMEM((1,), jnp.int32),
        "q_tile": shared_block(1, TILE, key, dtype=q.dtype),
        "row_scalars": plgpu.SMEM((len(_row_names(config)), TILE), jnp.float32),
        "key_slots": shared_block(SLOTS, TILE, key, dtype=k.dtype),
        "mask_slots": plgpu.SMEM((SLOTS, len(_mask_names(config)), TILE), jnp.float32),
        "o_tile": shared_block(TILE, BLOCK, columns=32, dtype=jnp.float32),
        "stats_tile": plgpu.SMEM((2, TILE), jnp.float32),
        "rows_ready": plgpu.Barrier(num_arrivals=2),
        "key_ready": plgpu.Barrier(num_arrivals=2 + bool(config.decays), num_barriers=SLOTS),
        "value_ready": plgpu.Barrier(num_barriers=SLOTS),
    }
    if config.decays:
        scratch["decay_slots"] = plgpu.SMEM((SLOTS, len(_decay_names(config)), TILE), jnp.float32)
    if v.dtype == jnp.float32:
        scratch["value_slots"] = shared_block(SLOTS, TILE, value, columns=32, dtype=jnp.float32)
        scratch |= {f"part{n}": shared_block(1, TILE, value) for n in range(config.parts)}
    else:
        scratch["value_slots"] = shared_block(SLOTS, TILE, value, dtype=v.dtype)
    return scratch


def _read(config: CacheConfig, *arrays: Array) -> tuple[Array, Array]:
    """One device's shard: q [B, G, R, K], k, v, bounds [B, 2], and numbers of rows, slots and decays by tile."""
    inputs = dict(zip(("q", "k", "v", "bounds", "masks", "rows", "decays"), arrays, strict=False))
    k, v = inputs["k"], inputs["v"]
    batch, slots, groups, value = v.shape
    splits = _splits(batch * groups * _row_tiles(config), slots)
    rows = _tile_rows(config) * _row_tiles(config)
    outputs = {"o": (batch, groups, splits, rows, value), "stats": (batch, groups, splits, 2, rows)}
    scratch = _scratch(config, inputs["q"], k, v)
    names = (*inputs, *outputs, *scratch)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, names=names, splits=splits),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="memformer_attention_decode",
        **launch_grid((batch, groups, splits * _row_tiles(config)), ("batch_row", "head", "block")),
    )
    o, stats = (vary_like(x, *arrays) for x in kernel(*arrays))
    top = jnp.max(stats[:, :, :, 0], axis=2, keepdims=True)
    factor = jnp.exp2(stats[:, :, :, 0] - top)
    total = jnp.sum(factor * stats[:, :, :, 1], axis=2)
    value_sum = jnp.sum(factor[..., None] * o, axis=2)
    return value_sum, jnp.stack([top[:, :, 0] / LOG2E, total], axis=2)


def _rows(x: Array, groups: int) -> Array:
    """[B, T, H, ...] to the rows of each key head [B, G, T H / G, ...]."""
    batch, length, heads = x.shape[:3]
    x = jnp.moveaxis(x.reshape(batch, length, groups, heads // groups, *x.shape[3:]), 2, 1)
    return x.reshape(batch, groups, -1, *x.shape[4:])


def _row_scalars(config: CacheConfig, read: CacheRead) -> Array:
    """[B, G, row tiles, names, 64]; rows of padding see nothing."""
    groups, shape = read.k.shape[2], read.q.shape[:3]
    values: dict[str, Any] = {name: x[..., None] for name, x in token_values(read).items()}
    place = jnp.arange(shape[2], dtype=jnp.int32) % (shape[2] // groups)
    values |= {"head": place, "kind": jnp.asarray(read.kinds * groups, jnp.int32)}
    if read.decay is not None:
        digits = (repeat_heads(x, shape[2] // x.shape[2]) for x in decay_digits(read.decay[0]))
        values |= dict(zip(DECAY, digits, strict=True))
    padding = ((0, 0), (0, 0), (0, -config.rows % TILE))
    rows = (jnp.broadcast_to(values[name].astype(jnp.float32), shape) for name in _row_names(config))
    packed = [jnp.pad(_rows(x, groups), padding, constant_values=float(BLIND)) for x in rows]
    return jnp.stack([x.reshape(*x.shape[:2], -1, TILE) for x in packed], axis=3)


def _by_tile(x: Array, fill: float) -> Array:
    """[..., S] to [..., tiles, 64]; the last tile ends with the cache, and holds `fill` where it repeats a slot."""
    slots, whole = x.shape[-1], x.shape[-1] // TILE * TILE
    if whole < slots:
        repeated = jnp.full((*x.shape[:-1], whole + TILE - slots), fill, x.dtype)
        x = jnp.concatenate([x[..., :whole], repeated, x[..., whole:]], axis=-1)
    return x.reshape(*x.shape[:-1], -1, TILE)


def _slot_masks(config: CacheConfig, read: CacheRead) -> Array:
    """[B, tiles, names, 64]."""
    slots = jnp.broadcast_to(jnp.arange(read.k.shape[1], dtype=jnp.int32), read.key_segment.shape)
    values = {"segment": read.key_segment, "slot": slots}
    packed = [_by_tile(values[name].astype(jnp.float32), float(UNSEEN)) for name in _mask_names(config)]
    return jnp.stack(packed, axis=2)


def _slot_decays(config: CacheConfig, decay: CumulativeDecay) -> Array:
    """[B, G, tiles, names, 64] from the decays of all slots, [B, S, heads]."""
    digits = [x.astype(jnp.float32).reshape(*x.shape[:2], -1, config.decays) for x in decay_digits(decay)]
    packed = [_by_tile(jnp.moveaxis(x[..., i], 1, 2), 0.0) for i in range(config.decays) for x in digits]
    return jnp.stack(packed, axis=3)


def _bounds(read: CacheRead) -> Array:
    """The first tile of slots that any row sees, and one more than the last in use, [B, 2]."""
    stop = lax.div(jnp.asarray(read.used, jnp.int32) + jnp.int32(TILE - 1), jnp.int32(TILE))
    stop = jnp.broadcast_to(stop, read.k.shape[:1])
    first = jnp.zeros_like(stop) if read.first_slot is None else jnp.min(read.first_slot, axis=1) // TILE
    return jnp.stack([first, stop], axis=-1)


def _check(op: str, read: CacheRead) -> None:
    check_chip(op, interpreting_for("gpu") or is_hopper(), "an sm_90 GPU")
    served = "implementation='recurrent' or 'chunked' serves it"
    written = read.v.dtype == jnp.float32
    allowed = ("bfloat16", "float16")
    check_dtypes(
        op, (read.q, read.k) + (() if written else (read.v,)), allowed, "for decoding takes bfloat16 or float16"
    )
    if read.q.dtype != read.k.dtype or (not written and read.v.dtype != read.k.dtype):
        raise unsupported(op, "for decoding takes queries and a cache of one dtype", served)
    if read.precision != lax.Precision.DEFAULT:
        raise unsupported(op, "for decoding has products at default precision only", served)
    (slots, key), value = (read.k.shape[1], read.k.shape[3]), read.v.shape[3]
    most = MOST_WRITTEN if written else MOST_CHANNELS
    if key % BLOCK or value % BLOCK or max(key, value) > most:
        raise unsupported(
            op, f"for decoding takes channels in multiples of {BLOCK} up to {most}, got {key} and {value}", served
        )
    # Copies are of whole rows of 8 slots.
    if slots % 8 or not TILE <= slots <= MOST_SLOTS:
        message = f"for decoding takes a capacity in multiples of 8 from {TILE} to 2^24, got {slots}"
        raise unsupported(op, message, served)


def run(op: str, read: CacheRead) -> CacheSums:
    """Reads a cache at a few queries.

    Args:
      op: name of the public function.
      read: queries and cache.

    Raises:
      NotImplementedError: not an sm_90 GPU; dtypes, channels or a capacity that the kernel does not take.
    """
    _check(op, read)
    batch, length, heads, _ = read.q.shape
    groups = read.k.shape[2]
    config = CacheConfig.of(read)
    q = jnp.pad(_rows(read.q, groups), ((0, 0), (0, 0), (0, -config.rows % _tile_rows(config)), (0, 0)))
    arrays = [q, read.k, read.v, _bounds(read), _slot_masks(config, read), _row_scalars(config, read)]
    axes: list[int | None] = [1, 2, 2, None, None, 1]
    if read.decay is not None:
        arrays.append(_slot_decays(config, read.decay[1]))
        axes.append(1)
    arrays = [vary_like(x, *arrays) for x in arrays]
    kernel = split_batch_and_heads(_read, (config,), config.axes, operands=tuple(axes), results=(1, 1))
    value, stats = kernel(*arrays)

    def tokens(x):
        x = x[:, :, : config.rows].reshape(batch, groups, length, heads // groups, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(batch, length, heads, *x.shape[4:])

    return CacheSums(tokens(stats[:, :, 0]), tokens(stats[:, :, 1]), tokens(value))
