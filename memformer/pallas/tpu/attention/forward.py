"""The read of attention on TPU, with any similarity kernel.

    o_t = sum_i p_ti x_i;  p_ti = kappa(q_t . k_i), for softmax divided by its sum over the visible slots

A program computes one block of queries of one head. The keys and values of that head stay in VMEM from block to block,
or are loaded in parts where they do not fit.

Source: arXiv 2205.14135 (tiles with a running maximum), 2307.08691 (backward from the log-sum-exp).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.mask import Mask, first_tiles
from memformer.core.types import Array
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.config import AttentionConfig
from memformer.pallas.tpu.attention.tiles import SumRefs
from memformer.pallas.tpu.interleave import interleave

__all__ = ["read"]


def _kernel(first_ref, k_ref, q_ref, x_ref, *refs, config: AttentionConfig, parts: int):
    rows, keys = (refs[0][0, 0, 0], refs[1]) if config.segments else (None, None)
    o_ref, lse_ref, *sums = refs[2 * config.segments :]
    sums = SumRefs(*sums)
    i, part = pl.program_id(2), pl.program_id(3)
    segment = rows[:1] if config.segments else None

    @pl.when(part == 0)
    def _():
        tiles.clear_sums(sums)

    q, k, x = q_ref.at[0, 0], k_ref.at[0, 0], x_ref.at[0, 0]

    def key_segment(j):
        return tiles.to_columns(keys[0, 0, j])[:, :1] if config.segments else None

    def block(j, carry):
        tiles.add_block(config, [(sums, q, k, x)], j, segment, key_segment(j))
        return carry

    start = part * config.resident
    before = config.before + i if config.own else config.before
    first = jnp.maximum(first_ref[pl.program_id(0), i], start)
    lax.fori_loop(first - start, jnp.minimum(before, start + config.resident) - start, block, 0)

    if config.own:

        @pl.when(part == before // config.resident)
        def _():
            j = before - start
            key, chains = key_segment(j), []
            for rows in config.sub_blocks:
                prefix = slice(0, rows.stop)
                mask = tiles.diagonal_mask(config, rows, prefix, transposed=True)
                mask = tiles.mask_segments(mask, *((None,) * 2 if key is None else (segment[:, rows], key[prefix])))
                columns = tiles.block_slice(config, j, 0, rows.stop)
                chains.append(tiles.add_tile(config, sums, rows, q, k, x, columns, mask))
            interleave(chains, stagger=1)

    @pl.when(part == parts - 1)
    def _():
        value, lse = sums.value[...], jnp.zeros((1, config.block), jnp.float32)
        if config.similarity.normalized:
            total = jnp.sum(sums.total[...], axis=0, keepdims=True)
            value = value / jnp.where(total > 0, total, 1.0)
            lse = tiles.logsumexp(sums.top[...], sums.total[...])
        o_ref[0, 0] = value.T.astype(o_ref.dtype)
        lse_ref[0, 0, 0] = lse


def _read(config: AttentionConfig, dtype: Any, k, q, x, first, *scalars):
    """One device's shard of `read`; scalars: of queries and of keys, where there are segments."""
    batch, groups, slots, key = k.shape
    heads, length = q.shape[1:3]
    value, size, repeat = x.shape[3], config.block, heads // groups
    resident = min(config.resident, slots // size)
    parts = -(-slots // (size * resident))

    def part_of(i, p):
        # Parts beyond the diagonal are not loaded.
        last = (config.before + i) // resident if config.own else parts - 1
        return jnp.minimum(p, last)

    def slots_of(width):
        return pl.BlockSpec((1, 1, resident * size, width), lambda b, h, i, p, *_: (b, h // repeat, part_of(i, p), 0))

    def rows_of(width):
        return pl.BlockSpec((1, 1, size, width), lambda b, h, i, p, *_: (b, h, i, 0))

    scalar_blocks = [
        pl.BlockSpec((1, 1, 1, 8, size), lambda b, h, i, p, *_: (b, h // repeat, i, 0, 0)),
        pl.BlockSpec((1, 1, resident, 8, size), lambda b, h, i, p, *_: (b, h // repeat, part_of(i, p), 0, 0)),
    ]
    lse = pl.BlockSpec((1, 1, 1, 1, size), lambda b, h, i, p, *_: (b, h, i, 0, 0))
    like = (k, q, x, *scalars)
    return pl.pallas_call(
        functools.partial(_kernel, config=dataclasses.replace(config, resident=resident), parts=parts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // size, parts),
            in_specs=[slots_of(key), rows_of(key), slots_of(value), *(scalar_blocks if config.segments else [])],
            out_specs=[rows_of(value), lse],
            scratch_shapes=list(tiles.sums_scratch(config, value).values()),
        ),
        out_shape=[
            varying_result((batch, heads, length, value), dtype, *like),
            varying_result((batch, heads, length // size, 1, size), jnp.float32, *like),
        ],
        compiler_params=tiles.compiler_params(4),
        name="memformer_attention_forward",
    )(first[:, 0], k, q, x, *scalars)


def read(config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask) -> tuple[Array, Array]:
    """Reads x [B, G, S, V] at the queries q [B, H, T, K]; T and S are multiples of R.

    Args:
      config: sizes.
      dtype: of the output.
      k: [B, G, S, K].
      q: queries.
      x: values.
      mask: over whole blocks.

    Returns:
      The output [B, H, T, V], and the log-sum-exp of the rows to base 2, [B, H, T].
    """
    groups = k.shape[1]
    first = jnp.zeros((q.shape[0], q.shape[2] // config.block), jnp.int32)
    scalars: tuple[Array, ...] = ()
    if config.segments:
        first = first_tiles(mask, config.block, config.block)
        segments = (mask.query_segment, mask.key_segment)
        scalars = tuple(tiles.pack_scalars(config, groups, segment=x) for x in segments)
    first = jnp.broadcast_to(first[:, None], (first.shape[0], groups, first.shape[1]))
    o, lse = split_batch_and_heads(_read, (config, dtype), results=2)(k, q, x, first, *scalars)
    return o, lse.reshape(q.shape[:3])
