"""Few tokens of softmax attention over a cache of fixed capacity on TPU: one kernel that reads the slots in use once.

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

from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.checks import unsupported
from memformer.pallas.decoding import CacheRead
from memformer.pallas.platform import interpreting_for
from memformer.pallas.sharding import KernelAxes, kernel_axes, split_batch_and_heads, varying_result
from memformer.pallas.tpu.checks import check_tpu

__all__ = ["run"]

# Keys of all heads in one block, at most; and numbers of its tile of scores.
KEYS, SCORES = 2048, 2**18

# Stands for the score of a masked pair.
MASKED = -1e30

# Where the heads are in every array.
HEADS = 2


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Static settings: slots per block, factor on scores, precision, mesh axes of batch and heads."""

    block: int
    scale: float
    precision: lax.Precision
    axes: KernelAxes = dataclasses.field(default_factory=kernel_axes, kw_only=True)


def _kernel(
    last_ref, q_ref, k_ref, v_ref, segment_ref, columns_ref, rows_ref, o_ref, top_ref, sum_ref, *, config: CacheConfig
):
    j, last = pl.program_id(1), last_ref[0]

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        o_ref[...] = jnp.zeros_like(o_ref)

    def product(a, b, contract):
        return lax.dot_general(
            a,
            b,
            ((contract[:1], contract[1:]), ((), ())),
            precision=config.precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when(j <= last)
    def _():
        v = v_ref[0]
        scores = config.scale * product(q_ref[0], k_ref[0], (1, 1))
        segment, limit, group = (rows_ref[0, :, i : i + 1] for i in range(3))
        slot = columns_ref[0:1] + j * config.block
        seen = (segment_ref[0] == segment) & (slot <= limit) & (columns_ref[1:2] == group)
        scores = jnp.where(seen, scores, MASKED)
        top = jnp.maximum(top_ref[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - top[:, :1]), 0.0)
        rescale = jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        sum_ref[...] = rescale * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        o_ref[0] = rescale[:, :1] * o_ref[0] + product(weights.astype(v.dtype), v, (1, 0))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = sum_ref[:, :1]
        o_ref[0] = o_ref[0] / jnp.where(total > 0, total, 1.0)


def _read(config: CacheConfig, *arrays: Array) -> tuple[Array]:
    """One device's shard: q, k, v, then [B, S, G] segment of the slots, [B, T, H] segment and last slot of queries."""
    q, k, v, key_segment, query_segment, last_slot = arrays
    batch, length, heads, key = q.shape
    slots, groups, value = v.shape[1:]
    _check_layout(groups, key, value)
    rows, width = length * heads, config.block * groups
    padding = -rows % 16
    group = np.tile(np.arange(heads, dtype=np.int32) // (heads // groups), length)
    of_rows = [query_segment.reshape(batch, rows), last_slot.reshape(batch, rows)]
    of_rows = jnp.stack([*of_rows, jnp.broadcast_to(jnp.asarray(group), (batch, rows))], axis=-1)
    # Rows of padding see nothing: no slot has their segment.
    of_rows = jnp.pad(of_rows, ((0, 0), (0, padding), (0, 0)), constant_values=jnp.iinfo(jnp.int32).min)
    q = jnp.pad(q.reshape(batch, rows, key), ((0, 0), (0, padding), (0, 0)))
    of_columns = np.stack([np.repeat(np.arange(config.block), groups), np.tile(np.arange(groups), config.block)])
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
            pl.BlockSpec((1, 1, width), lambda b, j, last_ref: (b, 0, block(j, last_ref))),
            pl.BlockSpec((2, width), lambda b, j, last_ref: (0, 0)),
            pl.BlockSpec((1, rows + padding, 3), of_row),
        ],
        out_specs=pl.BlockSpec((1, rows + padding, value), of_row),
        scratch_shapes=[pltpu.VMEM((rows + padding, 128), jnp.float32)] * 2,
    )
    o = pl.pallas_call(
        functools.partial(_kernel, config=config),
        grid_spec=grid,
        out_shape=varying_result((batch, rows + padding, value), jnp.float32, *arrays),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="memformer_attention_decode",
    )(
        last[None],
        q,
        k.reshape(batch, slots * groups, key),
        v.reshape(batch, slots * groups, value),
        key_segment.reshape(batch, 1, slots * groups),
        vary_like(jnp.asarray(of_columns, jnp.int32), q),
        of_rows,
    )
    return (o[:, :rows].reshape(batch, length, heads, value),)


def _check_layout(groups: int, key: int, value: int) -> None:
    """Refuses caches that XLA would copy to a layout in which all key heads of a slot are rows of one array."""
    if interpreting_for("tpu"):
        return
    if key % 128 or value % 128 or (groups % 8 and groups not in (2, 4)):
        raise unsupported(
            "softmax_attention",
            "for decoding takes channels in multiples of 128 and, per device, 2, 4 or a multiple of 8 key heads, got"
            f" {key} and {value} channels and {groups} heads",
            "implementation='recurrent' or 'chunked' serves it",
        )


def _block_slots(slots: int, groups: int, rows: int) -> int:
    """Slots per block, 0 where no number of them fits."""
    most = min(KEYS, SCORES // rows)
    if slots * groups <= most:
        return slots
    fitting = (size for size in range(most // groups, 0, -1) if slots % size == 0 and size * groups % 128 == 0)
    return next(fitting, 0)


def run(op: str, read: CacheRead) -> Float[Array, "B T H V"]:
    """Reads a cache at a few queries; the output is in float32.

    Args:
      op: name of the public function.
      read: queries and cache.

    Raises:
      NotImplementedError: no TPU; float64; a capacity that no block size divides; a cache that XLA would copy.
    """
    check_tpu(op, read.q, read.k, read.v)
    heads, groups = read.q.shape[HEADS], read.k.shape[HEADS]
    block = _block_slots(read.k.shape[1], groups, read.q.shape[1] * heads)
    if not block:
        raise unsupported(op, f"has no block that divides a cache of {read.k.shape[1]} slots and {groups} heads")
    config = CacheConfig(block, read.scale, read.precision)
    # bfloat16 where all three are.
    dtype = jnp.bfloat16 if read.q.dtype == read.k.dtype == read.v.dtype == jnp.bfloat16 else jnp.float32
    arrays = [x.astype(dtype) for x in (read.q, read.k, read.v)]
    for x, count in ((read.key_segment, groups), (read.query_segment, heads), (read.last_slot, heads)):
        arrays.append(jnp.broadcast_to(x[..., None], (*x.shape, count)))
    arrays = [vary_like(x, *arrays) for x in arrays]
    kernel = split_batch_and_heads(_read, (config,), config.axes, operands=(HEADS,) * 6, results=(HEADS,))
    return kernel(*arrays)[0]
