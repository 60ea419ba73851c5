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
from memformer.core.mask import Mask, row_bounds
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.layout import block_mask, heads_first, join_slots
from memformer.pallas.pair_decay import LOG2E, QueryKeyDecay, fraction_gradient, join_decay
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu.attention import tiles
from memformer.pallas.tpu.attention.backward import attention_backward
from memformer.pallas.tpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.tpu.attention.tiles import SumRefs, TokenMask
from memformer.pallas.tpu.interleave import interleave

__all__ = ["attend_with_sinks", "output_dtype", "read", "run", "score_operand", "value_operand"]


def _kernel(bounds_ref, k_ref, q_ref, x_ref, *refs, config: AttentionConfig, parts: int):
    rows, keys = (refs[0][0, 0, 0], refs[1]) if config.scalars else (None, None)
    o_ref, lse_ref, *sums = refs[2 * config.scalars :]
    sums = SumRefs(*sums)
    i, part = pl.program_id(2), pl.program_id(3)
    row = tiles.row_mask(config, rows) if config.scalars else TokenMask()

    @pl.when(part == 0)
    def _():
        tiles.clear_sums(sums)

    q, k, x = q_ref.at[0, 0], k_ref.at[0, 0], x_ref.at[0, 0]

    def of_keys(j, own):
        """Segments and ranks of a block of slots, and its decay."""
        if not config.scalars:
            return TokenMask(), None
        columns = tiles.to_columns(keys[0, 0, j])
        decay = tiles.block_decay(config, rows, keys[0, 0, j], columns, own=own) if config.decay else None
        return tiles.column_mask(config, columns), decay

    def block(j, carry):
        column, decay = of_keys(j, False)
        tiles.add_block(config, [(sums, q, k, x, decay)], j, row, column)
        return carry

    start = part * config.resident
    before = config.before + i if config.own else config.before
    first = jnp.maximum(bounds_ref[pl.program_id(0), i], start)
    stop = before if config.causal else bounds_ref[pl.program_id(0), pl.num_programs(2) + i]
    lax.fori_loop(first - start, jnp.minimum(stop, start + config.resident) - start, block, 0)

    if config.own:

        @pl.when(part == before // config.resident)
        def _():
            j = before - start
            (column, decay), chains = of_keys(j, True), []
            for own in config.sub_blocks:
                prefix = slice(0, own.stop)
                mask = tiles.diagonal_mask(config, own, prefix, transposed=True)
                mask = tiles.mask_tokens(config, mask, row, column, own, prefix)
                columns = tiles.block_slice(config, j, 0, own.stop)
                gap = None if decay is None else functools.partial(decay.gap, own, prefix)
                chains.append(tiles.add_tile(config, sums, own, q, k, x, columns, mask, gap))
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


def _read(config: AttentionConfig, dtype: Any, k, q, x, bounds, *scalars):
    """One device's shard of `read`; scalars: of queries and of keys, where there are any."""
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

    # Decays are of query heads.
    share = 1 if config.decay else repeat
    scalar_blocks = [
        pl.BlockSpec((1, 1, 1, 8, size), lambda b, h, i, p, *_: (b, h // share, i, 0, 0)),
        pl.BlockSpec((1, 1, resident, 8, size), lambda b, h, i, p, *_: (b, h // share, part_of(i, p), 0, 0)),
    ]
    lse = pl.BlockSpec((1, 1, 1, 1, size), lambda b, h, i, p, *_: (b, h, i, 0, 0))
    like = (k, q, x, *scalars)
    return pl.pallas_call(
        functools.partial(_kernel, config=dataclasses.replace(config, resident=resident), parts=parts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // size, parts),
            in_specs=[slots_of(key), rows_of(key), slots_of(value), *(scalar_blocks if scalars else [])],
            out_specs=[rows_of(value), lse],
            scratch_shapes=list(tiles.sums_scratch(config, value).values()),
        ),
        out_shape=[
            varying_result((batch, heads, length, value), dtype, *like),
            varying_result((batch, heads, length // size, 1, size), jnp.float32, *like),
        ],
        compiler_params=tiles.compiler_params(4),
        name="memformer_attention_forward",
    )(bounds[:, 0], k, q, x, *scalars)


def read(
    config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask, decay: QueryKeyDecay | None
) -> tuple[Array, Array]:
    """Reads x [B, G, S, V] at the queries q [B, H, T, K]; T and S are multiples of R.

    Args:
      config: sizes.
      dtype: of the output.
      k: [B, G, S, K].
      q: queries.
      x: values.
      mask: over whole blocks.
      decay: of query heads, or None.

    Returns:
      The output [B, H, T, V], and the log-sum-exp of the rows to base 2, [B, H, T].
    """
    groups = k.shape[1]
    scalars: tuple[Array, ...] = ()
    if config.scalars:
        heads = q.shape[1] if config.decay else groups
        query, key = (None, None) if decay is None else decay
        scalars = (
            tiles.pack_rows(config, heads, query, **tiles.mask_scalars(config, mask, "query")),
            tiles.pack_keys(config, heads, decay=key, **tiles.mask_scalars(config, mask, "key")),
        )
    bounds = _row_bounds(config, q, mask)
    bounds = jnp.broadcast_to(bounds[:, None], (q.shape[0], groups, bounds.shape[1]))
    call = split_batch_and_heads(_read, (config, dtype), config.axes, results=2, shared=True)
    o, lse = call(k, q, x, bounds, *scalars)
    return o, lse.reshape(q.shape[:3])


def _row_bounds(config: AttentionConfig, q: Array, mask: Mask) -> Array:
    """The first block of slots that each block of rows sees, [B, N]; without causality also the end, [B, 2 N]."""
    size, rows = config.block, (q.shape[0], q.shape[2] // config.block)
    pair = row_bounds(mask, size, size, config.window, causal=config.causal)
    pair = pair or (jnp.int32(0), jnp.int32(config.before))
    return jnp.concatenate([jnp.broadcast_to(x, rows) for x in (pair[:1] if config.causal else pair)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask, decay: QueryKeyDecay | None
) -> tuple[Array, Array]:
    """`read`, differentiable in k, q, x and the fractions of the decay; memory is linear in time, backward too.

    The log-sum-exp has a gradient where `config.sinks` is set. Saved: the inputs, the output and the log-sum-exp.
    """
    return read(config, dtype, k, q, value_operand(config, x), mask, decay)


def value_operand(config: AttentionConfig, x: Array) -> Array:
    """Values or gradients as products take them."""
    return x.astype(jnp.bfloat16 if config.value_passes == 1 else jnp.float32)


def _attend_forward(config, dtype, k, q, x, mask, decay):
    o, lse = read(config, dtype, k, q, value_operand(config, x), mask, decay)
    return (o, lse), (k, q, x, mask, decay, o if config.similarity.normalized else None, lse)


def _attend_backward(config, dtype, saved, cotangents):
    k, q, x, mask, decay, o, lse = saved
    do, dlse = cotangents
    delta = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    if config.sinks:
        # The log-sum-exp is to base 2.
        delta = delta - dlse * LOG2E
    operands = (value_operand(config, x), mask, decay, lse, delta, value_operand(config, do))
    dk, dq, dx, ddecay = _gradients(config, k, q, *operands)
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None, ddecay


attend.defvjp(_attend_forward, _attend_backward)


def _gradients(
    config: AttentionConfig,
    k: Array,
    q: Array,
    x: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
    lse: Array,
    delta: Array | None,
    do: Array,
) -> tuple[Array, Array, Array, QueryKeyDecay | None]:
    """Gradients of k, q, x and the decay, in spans of queries that fit in VMEM.

    Args:
      config, k, q, x, mask, decay: as in `read`.
      lse: log-sum-exp of the rows, from `read`.
      delta: sum of output times do per row, [B, H, T]; None without a normaliser.
      do: gradient of the output, [B, H, T, V].
    """
    length, span = q.shape[2], config.resident * config.block
    if length <= span:
        found = attention_backward(config, k, q, x, do, mask, decay, {"lse": lse, "delta": delta})
        return found.dk, found.dq, found.dx, found.decay
    rows_of, dk, dx = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    key_decay = None if decay is None else jnp.zeros(decay.key.fraction.shape, jnp.float32)
    for start in range(0, length, span):
        rows = slice(start, min(start + span, length))
        slots = config.before * config.block + (rows.stop if config.own else 0)
        before = config.before + start // config.block if config.own else config.before
        scalars = {"lse": lse[:, :, rows], "delta": None if delta is None else delta[:, :, rows]}
        part = attention_backward(
            dataclasses.replace(config, before=before),
            k[:, :, :slots],
            q[:, :, rows],
            x[:, :, :slots],
            do[:, :, rows],
            mask.part(rows, slice(slots)),
            None if decay is None else decay.part(rows, slice(slots)),
            scalars,
        )
        rows_of.append((part.dq, None if part.decay is None else part.decay.query.fraction))
        dk, dx = dk.at[:, :, :slots].add(part.dk), dx.at[:, :, :slots].add(part.dx)
        if part.decay is not None:
            key_decay = key_decay.at[:, :, :slots].add(part.decay.key.fraction)
    dq, query_decay = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *rows_of)
    return dk, dq, dx, None if decay is None else fraction_gradient(query_decay, key_decay)


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention.

    Returns:
      The output, bfloat16 where v is and products have one pass, else float32.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    config = plan_call(call, call.read_kernel)
    mask = block_mask(call, config.block)
    cache_k, cache_v = (None, None) if call.cache is None else (call.cache.k, call.cache.values)
    arrays = (
        join_slots(cache_k, score_operand(config, call.k), config.block),
        heads_first(score_operand(config, call.q), config.block),
        join_slots(cache_v, call.v, config.block),
        join_decay(call, config.block),
    )
    k, q, v, decay = jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves((arrays, mask))), arrays)
    o = attend_with_sinks(config, call, k, q, v, mask, decay)
    return jnp.swapaxes(o, 1, 2)[:, : call.q.shape[1]]


def attend_with_sinks(
    config: AttentionConfig, call: AttentionCall, k: Array, q: Array, x: Array, mask: Mask, decay: QueryKeyDecay | None
) -> Array:
    """`attend` with the sinks of the call: one more term in the sum that divides."""
    dtype = output_dtype(config, call)
    if call.sinks is None:
        return attend(config, dtype, k, q, x, mask, decay)[0]
    o, lse = attend(dataclasses.replace(config, sinks=True), jnp.float32, k, q, x, mask, decay)
    sinks = call.sinks.astype(jnp.float32).reshape(-1, q.shape[1], 1)
    return (o * jax.nn.sigmoid(lse / LOG2E - sinks)[..., None]).astype(dtype)


def score_operand(config: AttentionConfig, x: Array) -> Array:
    """Queries or keys as the products of scores take them."""
    return x.astype(jnp.bfloat16 if config.passes == 1 else jnp.float32)


def output_dtype(config: AttentionConfig, call: AttentionCall) -> Any:
    """bfloat16 where v is and products have one pass, else float32."""
    return jnp.bfloat16 if call.v.dtype == jnp.bfloat16 and config.passes == 1 else jnp.float32
