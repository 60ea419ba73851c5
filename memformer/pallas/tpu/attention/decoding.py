"""Few tokens of attention over a cache of fixed capacity on TPU: one kernel that reads the slots in use once.

A program reads blocks of slots with all of their key heads, as they lie in the cache: S G keys are the columns of a
tile, T H queries its rows, and pairs of other heads are masked. So no head is gathered from the cache, and the matrix
unit does G times the work, which it has time for: a block of 128 keys and values of 128 channels in bfloat16 takes
83 cycles of a v5p's core to read, its two products 32 with up to 32 queries. Blocks behind the last slot in use are
neither read nor computed.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.decay import FORGOTTEN_PAIR
from memformer.core.mask import BLIND
from memformer.core.sharding import vary_like
from memformer.core.similarity import similarity
from memformer.core.types import Array
from memformer.pallas.cache_decoding import (
    DECAY,
    MOST_SLOTS,
    CacheConfig,
    CacheRead,
    CacheSums,
    column_values,
    row_values,
)
from memformer.pallas.checks import unsupported
from memformer.pallas.pair_decay import RADIX
from memformer.pallas.platform import interpreting_for
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.products import product

__all__ = ["run"]

# Keys of all heads in one block, at most; and numbers of its tile of scores.
KEYS, SCORES = 2048, 2**18

# Stands for the score of a masked pair.
MASKED = -1e30

# Where the heads are in every array.
HEADS = 2


@dataclasses.dataclass(frozen=True)
class BlockConfig(CacheConfig):
    """Static settings: those of a cache, and slots per block."""

    block: int = dataclasses.field(kw_only=True)


def _product(a: Array, b: Array, contract: tuple[int, int], precision: lax.Precision) -> Array:
    """A product of operands as they are, at the precision of the call."""
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _weighted_sum(config: BlockConfig, weights: Array, v: Array, bfloat16: bool) -> Array:
    """Weights times values. Values in float32 of a cache whose keys are in bfloat16 are the writes of DeltaFormer."""
    if v.dtype == jnp.bfloat16 or not bfloat16:
        return _product(weights.astype(v.dtype), v, (1, 0), config.precision)
    return product(weights, v, "nn", 1 if config.parts == 1 else 3)


def _pairs(config: BlockConfig, row, column, group, slots) -> tuple[Array, Array | None]:
    """The mask of slots that the rows see, and the log decay of each pair.

    Args:
      config: settings.
      row, column: functions from a name to that scalar, [R, 1] and [1, S G].
      group: key heads of rows and of columns.
      slots: number of each slot in the cache.
    """
    seen = (row("segment") == column("segment")) & (group[0] == group[1])
    if config.causal:
        seen &= slots <= row("slot")
    if config.window is not None:
        seen &= row("rank") - column("rank") < float(config.window)
    gap = None
    for i in range(config.decays):
        high, low, fraction = (row(name) - column(f"{name}{i}") for name in DECAY)
        found = high * RADIX + low + fraction
        gap = found if gap is None else jnp.where(row("head") == float(i), found, gap)
    if gap is not None:
        seen &= gap > FORGOTTEN_PAIR + 1
        # A pair that is masked may have a positive one.
        gap = jnp.where(seen, gap, 0.0)
    return seen, gap


def _kernel(
    last_ref, q_ref, k_ref, v_ref, columns_ref, places_ref, rows_ref, o_ref, top_ref, total_ref, *, config: BlockConfig
):
    j, last = pl.program_id(1), last_ref[0]
    bfloat16 = q_ref.dtype == jnp.bfloat16

    def row(name):
        at = ("group", *config.row_names).index(name)
        return rows_ref[0, :, at : at + 1]

    def column(name):
        at = config.column_names.index(name)
        return columns_ref[0, at : at + 1]

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(j <= last)
    def _():
        scores = _product(q_ref[0], k_ref[0], (1, 1), config.precision)
        slots = places_ref[0:1] + (j * config.block).astype(jnp.float32)
        seen, gap = _pairs(config, row, column, (row("group"), places_ref[1:2]), slots)
        found = None
        for i, kernel in enumerate(config.similarities):
            mine = seen & (row("kind") == float(i)) if len(config.similarities) > 1 else seen
            scaled = kernel.scale * scores
            if kernel.normalized:
                logits = jnp.where(mine, scaled if gap is None else scaled + gap, MASKED)
                # Rows of another similarity see nothing here: their maximum stays.
                top = jnp.maximum(top_ref[0], jnp.max(logits, axis=1, keepdims=True))
                weights = jnp.where(mine, jnp.exp(logits - top[:, :1]), 0.0)
                rescale = jnp.exp(top_ref[0] - top)
                top_ref[0] = top
                total_ref[0] = rescale * total_ref[0] + jnp.sum(weights, axis=1, keepdims=True)
                o_ref[0] = rescale[:, :1] * o_ref[0]
            else:
                weights = jnp.where(mine, similarity(kernel, jnp.where(mine, scaled, 0.0)), 0.0)
                weights = weights if gap is None else weights * jnp.exp(gap)
            found = weights if found is None else found + weights
        o_ref[0] += _weighted_sum(config, found, v_ref[0], bfloat16)


def _read(op: str, config: BlockConfig, *arrays: Array) -> tuple[Array, Array, Array]:
    """One device's shard: k, q, v, then scalars of rows [B, T, H, names] and of slots [B, S, G, names], and a slot."""
    k, q, v, row, column, last_slot = arrays
    batch, length, heads, key = q.shape
    slots, groups, value = v.shape[1:]
    _check_layout(op, groups, key, value)
    rows, width = length * heads, config.block * groups
    padding = -rows % 16
    group = np.tile(np.arange(heads, dtype=np.float32) // (heads // groups), length)
    group = vary_like(jnp.broadcast_to(jnp.asarray(group)[None, :, None], (batch, rows, 1)), q)
    # Rows of padding see nothing: no slot has their segment.
    of_rows = jnp.concatenate([group, row.reshape(batch, rows, -1)], axis=-1)
    of_rows = jnp.pad(of_rows, ((0, 0), (0, padding), (0, 0)), constant_values=float(BLIND))
    q = jnp.pad(q.reshape(batch, rows, key), ((0, 0), (0, padding), (0, 0)))
    of_columns = jnp.swapaxes(column.reshape(batch, slots * groups, -1), 1, 2)
    places = np.stack([np.repeat(np.arange(config.block), groups), np.tile(np.arange(groups), config.block)])
    last = jnp.max(last_slot) // config.block

    def block(j, last_ref):
        return jnp.minimum(j, last_ref[0])

    of_row = lambda b, j, last_ref: (b, 0, 0)  # noqa: E731
    of_block = lambda b, j, last_ref: (b, block(j, last_ref), 0)  # noqa: E731
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, slots // config.block),
        in_specs=[
            pl.BlockSpec((1, rows + padding, key), of_row),
            pl.BlockSpec((1, width, key), of_block),
            pl.BlockSpec((1, width, value), of_block),
            pl.BlockSpec((1, of_columns.shape[1], width), lambda b, j, last_ref: (b, 0, block(j, last_ref))),
            pl.BlockSpec((2, width), lambda b, j, last_ref: (0, 0)),
            pl.BlockSpec((1, rows + padding, of_rows.shape[2]), of_row),
        ],
        out_specs=[pl.BlockSpec((1, rows + padding, n), of_row) for n in (value, 128, 128)],
    )
    o, *stats = pl.pallas_call(
        functools.partial(_kernel, config=config),
        grid_spec=grid,
        out_shape=[varying_result((batch, rows + padding, n), jnp.float32, *arrays) for n in (value, 128, 128)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="memformer_attention_decode",
    )(
        last[None],
        q,
        k.reshape(batch, slots * groups, key),
        v.reshape(batch, slots * groups, value),
        of_columns,
        vary_like(jnp.asarray(places, jnp.float32), q),
        of_rows,
    )
    top, total = (x[:, :rows, 0].reshape(batch, length, heads) for x in stats)
    return o[:, :rows].reshape(batch, length, heads, value), top, total


def _check_layout(op: str, groups: int, key: int, value: int) -> None:
    """Refuses caches that XLA would copy to a layout in which all key heads of a slot are rows of one array."""
    if interpreting_for("tpu"):
        return
    # Tiles of 2 or 4 heads by 128 channels are those of all heads as rows where channels fill one tile.
    few = groups in (2, 4) and max(key, value) == 128
    if key % 128 or value % 128 or (groups % 8 and not few):
        raise unsupported(
            op,
            "for decoding takes channels in multiples of 128 and, per device, key heads in multiples of 8 (2 or 4 of"
            f" them with 128 channels), got {key} and {value} channels and {groups} heads",
            "implementation='recurrent' or 'chunked' serves it",
        )


def _block_slots(slots: int, groups: int, rows: int) -> int:
    """Slots per block, 0 where no number of them fits."""
    most = min(KEYS, SCORES // rows)
    if slots * groups <= most:
        return slots
    fitting = (size for size in range(most // groups, 0, -1) if slots % size == 0 and size * groups % 128 == 0)
    return next(fitting, 0)


def run(op: str, read: CacheRead) -> CacheSums:
    """Reads a cache at a few queries.

    Args:
      op: name of the public function.
      read: queries and cache.

    Raises:
      NotImplementedError: no TPU; float64; a capacity that no block size divides; a cache that XLA would copy.
    """
    check_tpu(op, read.q, read.k, read.v)
    (batch, length, heads, _), (slots, groups) = read.q.shape, read.k.shape[1:3]
    block = _block_slots(slots, groups, length * heads)
    if not block or slots > MOST_SLOTS:
        raise unsupported(op, f"has no block that divides a cache of {slots} slots and {groups} heads")
    config = BlockConfig.of(read, block=block)
    keys = jnp.bfloat16 if read.q.dtype == read.k.dtype == jnp.bfloat16 else jnp.float32
    # Values in bfloat16 where all three are.
    values = jnp.bfloat16 if read.v.dtype == keys == jnp.bfloat16 else jnp.float32
    # k comes first: its heads divide fewer devices than those of q.
    arrays = [read.k.astype(keys), read.q.astype(keys), read.v.astype(values)]
    arrays += [jnp.stack(names(config, read), axis=-1) for names in (row_values, column_values)]
    arrays.append(jnp.broadcast_to(jnp.maximum(jnp.asarray(read.used, jnp.int32) - 1, 0), (batch, 1, groups)))
    arrays = [vary_like(x, *arrays) for x in arrays]
    kernel = split_batch_and_heads(_read, (op, config), config.axes, operands=(HEADS,) * 6, results=(HEADS,) * 3)
    value, top, total = kernel(*arrays)
    return CacheSums(top, total, value)
