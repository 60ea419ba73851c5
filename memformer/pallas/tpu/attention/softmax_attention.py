"""Softmax attention on TPU, and the read with any similarity kernel that it shares with DeltaFormer.

    o_t = sum_i p_ti x_i;  p_ti = kappa(q_t . k_i), for softmax divided by its sum over the visible slots

A program computes one block of queries of one head. The keys and values of that head stay in VMEM from block to block,
or are loaded in parts where they do not fit.

Source: arXiv 2205.14135 (tiles with a running maximum), 2307.08691 (backward from the log-sum-exp).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, first_tiles, join_cache
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.layout import heads_first, join_slots
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.backward import attention_backward
from memformer.pallas.tpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.tpu.attention.tiles import SumRefs
from memformer.pallas.tpu.interleave import interleave

__all__ = ["attend", "output_dtype", "read", "run", "score_operand", "value_operand"]


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
    o, lse = split_batch_and_heads(_read, (config, dtype), config.axes, results=2)(k, q, x, first, *scalars)
    return o, lse.reshape(q.shape[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask) -> Array:
    """`read`, differentiable in k, q and x; memory is linear in time, backward too.

    Saved: the inputs, the output and the log-sum-exp.
    """
    return read(config, dtype, k, q, value_operand(config, x), mask)[0]


def value_operand(config: AttentionConfig, x: Array) -> Array:
    """Values or gradients as products take them."""
    return x.astype(jnp.bfloat16 if config.value_passes == 1 else jnp.float32)


def _attend_forward(config, dtype, k, q, x, mask):
    o, lse = read(config, dtype, k, q, value_operand(config, x), mask)
    return o, (k, q, x, mask, o if config.similarity.normalized else None, lse)


def _attend_backward(config, dtype, saved, do):
    k, q, x, mask, o, lse = saved
    delta = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    operands = (value_operand(config, x), mask, lse, delta, value_operand(config, do))
    dk, dq, dx = _gradients(config, k, q, *operands)
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


def _gradients(
    config: AttentionConfig, k: Array, q: Array, x: Array, mask: Mask, lse: Array, delta: Array | None, do: Array
) -> tuple[Array, Array, Array]:
    """Gradients of k, q and x, in spans of queries that fit in VMEM.

    Args:
      config, k, q, x, mask: as in `read`.
      lse: log-sum-exp of the rows, from `read`.
      delta: sum of output times do per row, [B, H, T]; None without a normaliser.
      do: gradient of the output, [B, H, T, V].
    """
    length, span = q.shape[2], config.resident * config.block
    if length <= span:
        return attention_backward(config, k, q, x, do, mask, {"lse": lse, "delta": delta})
    dq, dk, dx = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    for start in range(0, length, span):
        rows = slice(start, min(start + span, length))
        slots = config.before * config.block + (rows.stop if config.own else 0)
        before = config.before + start // config.block if config.own else config.before
        part_mask = mask
        if config.segments:
            part_mask = Mask(query_segment=mask.query_segment[:, rows], key_segment=mask.key_segment[:, :slots])
        scalars = {"lse": lse[:, :, rows], "delta": None if delta is None else delta[:, :, rows]}
        part_dk, part_dq, part_dx = attention_backward(
            dataclasses.replace(config, before=before),
            k[:, :, :slots],
            q[:, :, rows],
            x[:, :, :slots],
            do[:, :, rows],
            part_mask,
            scalars,
        )
        dq.append(part_dq)
        dk, dx = dk.at[:, :, :slots].add(part_dk), dx.at[:, :, :slots].add(part_dx)
    return dk, jnp.concatenate(dq, axis=2), dx


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention, causal and without a window.

    Returns:
      The output, bfloat16 where v is and products have one pass, else float32.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    config = plan_call(call, call.read_kernel)
    mask = join_cache(call.mask, config.block)
    cache_k, cache_v = (None, None) if call.cache is None else (call.cache.k, call.cache.values)
    arrays = (
        join_slots(cache_k, score_operand(config, call.k), config.block),
        heads_first(score_operand(config, call.q), config.block),
        join_slots(cache_v, call.v, config.block),
    )
    k, q, v = (vary_like(x, *arrays, *jax.tree.leaves(mask)) for x in arrays)
    o = attend(config, output_dtype(config, call), k, q, v, mask)
    return jnp.swapaxes(o, 1, 2)[:, : call.q.shape[1]]


def score_operand(config: AttentionConfig, x: Array) -> Array:
    """Queries or keys as the products of scores take them."""
    return x.astype(jnp.bfloat16 if config.passes == 1 else jnp.float32)


def output_dtype(config: AttentionConfig, call: AttentionCall) -> Any:
    """bfloat16 where v is and products have one pass, else float32."""
    return jnp.bfloat16 if call.v.dtype == jnp.bfloat16 and config.passes == 1 else jnp.float32
