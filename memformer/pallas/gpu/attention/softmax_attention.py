"""Softmax attention on Hopper: the read of slots with any similarity kernel, its rule of differentiation, and the op.

    o_t = sum_i p_ti x_i;  p_ti = kappa(q_t . k_i), for softmax divided by its sum over the visible slots

A program is one block of queries of one head.

Source: arXiv 2205.14135 (tiles with a running maximum), 2407.08608 (warpgroups that compute and one that copies).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.backward import key_gradients, query_gradients, sums_scores
from memformer.pallas.gpu.attention.config import TILE, AttentionConfig, fit, plan_call
from memformer.pallas.gpu.attention.scalars import (
    column_names,
    column_values,
    key_mask,
    pack_scalars,
    pair_gap,
    query_mask,
    row_names,
    row_values,
)
from memformer.pallas.gpu.attention.tiles import LOW, Refs, Ring, split_values
from memformer.pallas.gpu.wgmma import broadcast_rows, partial_products, products, shared_block
from memformer.pallas.layout import block_mask, heads_first, join_slots
from memformer.pallas.pair_decay import LOG2E, QueryKeyDecay, fraction_gradient, join_decay
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["RunningSums", "add_tile", "attend_with_sinks", "read", "rescale", "run", "start_sums"]


class RunningSums(NamedTuple):
    """Running sums of a tile of rows: maximum and sum of exponentials [64], weighted sum of values [64, V]."""

    top: Array
    total: Array
    value: Array


def start_sums(width: int) -> RunningSums:
    """Sums over no column."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    top, total = (plgpu.layout_cast(jnp.full((TILE,), x, jnp.float32), layout) for x in (LOW / 2, 0.0))
    return RunningSums(top, total, tiles.zeros(width))


def rescale(sums: RunningSums, scores: Array) -> tuple[RunningSums, Array]:
    """Adds masked scores to maximum and sum, rescales the values to the new maximum; also the exponentials."""
    top = jnp.maximum(sums.top, jnp.max(scores, axis=1))
    factor = jnp.exp2(sums.top - top)
    weights = jnp.exp2(scores - broadcast_rows(top, TILE))
    total = sums.total * factor + jnp.sum(weights, axis=1)
    return RunningSums(top, total, sums.value * broadcast_rows(factor, sums.value.shape[1])), weights


def add_tile(config: AttentionConfig, ring: Ring, refs: Refs, sums: RunningSums, count, g, q, of_slot) -> RunningSums:
    """Adds one tile of columns to the sums.

    Args:
      config, ring, refs: of the kernel.
      sums: of the rows.
      count: of the tile in the ring.
      g: the warpgroup.
      q: the rows' queries in shared memory.
      of_slot: function from the slot to the mask of the tile and the decay of its pairs.
    """
    slot = ring.wait_key(count)
    scores = tiles.compute_scores(config, q, refs.key_slots.at[slot])
    mask, gap = of_slot(slot)
    if config.similarity.normalized:
        sums, weights = rescale(sums, tiles.mask_scores(scores, mask, gap))
    else:
        weights = tiles.attention_weights(config, scores, mask, None, gap)
    parts = tiles.split(config, weights, config.parts)
    ring.wait_value(count)
    values = tuple(refs[f"value_slots{n}"].at[slot] for n in range(config.parts))
    (value,) = products(partial_products(parts, values))
    ring.release(count)
    return sums._replace(value=sums.value + value)


def _compute(refs: Refs, config: AttentionConfig) -> None:
    b, h, g = (lax.axis_index(name) for name in ("batch_row", "head", "warpgroup"))
    i, first, own, stop = tiles.row_extent(config, refs)
    ring = tiles.column_ring(config, refs, config.parts)
    rows = pl.ds(i * config.rows + g * TILE, TILE)
    q, start = refs.q_tile.at[g], refs.bound[b, h, 1] * TILE if "bound" in refs else 0
    source = refs.q.at[b, h, pl.ds(start + i * config.rows + g * TILE, TILE)]
    plgpu.copy_gmem_to_smem(source, q, refs.own_ready.at[g])
    names = row_names(config)
    if names:
        # Decays are of query heads.
        head = h if config.decay else tiles.key_head(refs)
        source = refs.q_scalars.at[b, head, i * config.warpgroups + g]
        plgpu.copy_gmem_to_smem(source, refs.own_scalars.at[g], refs.own_ready.at[g])
    plgpu.barrier_wait(refs.own_ready.at[g])

    def row(name):
        return refs.own_scalars.at[g, names.index(name)]

    def tile(t, sums, diagonal=None):
        def of_slot(slot):
            column = tiles.column_scalar(config, refs, slot)
            mask = tiles.tile_mask(config, diagonal, row, column)
            return mask, pair_gap(config, row, column, diagonal=diagonal is not None) if config.decay else None

        return add_tile(config, ring, refs, sums, t - first, g, q, of_slot)

    last = own + g if config.own else stop
    sums = lax.fori_loop(first, last, tile, start_sums(config.value))
    if config.own:
        sums = tile(last, sums, "<" if config.strict else "<=")
        ring.skip(last + 1 - first, stop - first)

    value = sums.value
    if config.similarity.normalized:
        total = jnp.where(sums.total > 0, sums.total, 1.0)
        value = value / broadcast_rows(total, config.value)
        # To base 2; a large negative number where a row sees nothing.
        refs.lse_tile.at[g][...] = sums.top + jnp.log2(total)
    tiles.store_tile(refs.get("o_tile"), g, value, refs.o.at[b, h, rows])
    if config.similarity.normalized:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.lse_tile.at[g], refs.lse.at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)


def _read(config: AttentionConfig, dtype: Any, length: int, k, q, *rest) -> tuple[Array, ...]:
    """One device's shard of `read`; rest: parts of the values, bound, scalars of queries and keys, bounds of rows."""
    batch, heads = q.shape[:2]
    scalars = row_names(config)
    names = tuple(f"x{n}" for n in range(config.parts)) + ("bound",) * (config.causal and not config.own)
    names += ("q_scalars", "k_scalars") * bool(scalars)
    names += ("first",) * config.bounded + ("stop",) * (not config.causal)
    inputs = {"k": k, "q": q, **dict(zip(names, rest, strict=True))}
    scratch = tiles.ring_scratch(config, config.value, config.parts, len(column_names(config)))
    scratch["q_tile"] = shared_block(config.warpgroups, TILE, config.key, dtype=config.dtype)
    if dtype != jnp.float32:
        scratch["o_tile"] = shared_block(config.warpgroups, TILE, config.value, dtype=dtype)
    outputs = {"o": ((batch, heads, length, config.value), dtype)}
    if config.similarity.normalized:
        outputs["lse"] = ((batch, heads, length), jnp.float32)
        scratch["lse_tile"] = plgpu.SMEM((config.warpgroups, TILE), jnp.float32)
    scratch["own_ready"] = plgpu.Barrier(num_arrivals=1 + bool(scalars), num_barriers=config.warpgroups)
    if scalars:
        scratch["own_scalars"] = plgpu.SMEM((config.warpgroups, len(scalars), TILE), jnp.float32)
    return tiles.call(
        config,
        "attention_forward",
        functools.partial(_compute, config=config),
        functools.partial(tiles.copy_columns, config=config, values=config.parts),
        (batch, heads, length // config.rows),
        inputs,
        outputs,
        scratch,
    )


def read(
    config: AttentionConfig,
    dtype: Any,
    k: Array,
    q: Array,
    x: tuple[Array, ...],
    mask: Mask,
    decay: QueryKeyDecay | None,
    bound: tuple[Array, int] | None = None,
) -> tuple[Array, Array | None]:
    """Reads x [B, G, S, V] at the queries q [B, H, T, K]; T and S are multiples of `config.rows`.

    Args:
      config: sizes.
      dtype: of the output.
      k: [B, G, S, K].
      q: queries, of which a bound selects T.
      x: parts of the values, see `tiles.split_values`.
      mask: over whole tiles.
      decay: of query heads, or None.
      bound: where `config.causal` but not `config.own`, `tiles.bounds` of how many slots the queries see and of the
        first query; and T. The heads of q are those of k then.

    Returns:
      The output [B, H, T, V], and the log-sum-exp of the rows to base 2, [B, H, T], None without a normaliser.
    """
    width, blocks = min(config.value, tuning.SUMMED), []
    for start in range(0, config.value, width):
        block = dataclasses.replace(config, value=width, value_start=start)
        blocks.append(fit(block, config.key + config.parts * width, config.key + width * (dtype != jnp.float32)))
    config = blocks[0]
    operands, length = (k, q, *x[: config.parts]), q.shape[2]
    if bound is not None:
        operands, length = (*operands, bound[0]), bound[1]
    group, names = k.shape[1], row_names(config)
    if names:
        heads = q.shape[1] if config.decay else group
        query, key = (None, None) if decay is None else decay
        rows = pack_scalars(names, heads, row_values(query_mask(mask), query))
        operands += (rows, pack_scalars(column_names(config), heads, column_values(key_mask(mask), key)))
    operands += tuple(tiles.row_bounds(config, k, length, mask).values())
    values, results = [], 1 + config.similarity.normalized
    for block in blocks:
        o, *lse = split_batch_and_heads(_read, (block, dtype, length), config.axes, results=results)(*operands)
        values.append(o)
    return values[0] if len(values) == 1 else jnp.concatenate(values, axis=3), lse[0] if lse else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask, decay: QueryKeyDecay | None
) -> tuple[Array, Array | None]:
    """`read`, differentiable in k, q, x and the fractions of the decay, its log-sum-exp too.

    Memory is linear in time, backward too. Saved: the inputs, the output and the log-sum-exp.
    """
    return read(config, dtype, k, q, split_values(config, x), mask, decay)


def _attend_forward(config, dtype, k, q, x, mask, decay):
    o, lse = read(config, dtype, k, q, split_values(config, x), mask, decay)
    return (o, lse), (k, q, x, mask, decay, o if config.similarity.normalized or config.decay else None, lse)


def _attend_backward(config, dtype, saved, cotangents):
    k, q, x, mask, decay, o, lse = saved
    do, dlse = cotangents
    delta = None
    if config.similarity.normalized:
        # The log-sum-exp is to base 2. Where nothing reads it, the compiler drops the zeros.
        delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - LOG2E * dlse
    scalars = {"lse": lse, "delta": delta}
    operands = (k, q, split_values(config, x), split_values(config, do), mask, decay, scalars)
    dq, *query_decay = query_gradients(config, *operands)
    if not config.similarity.normalized and (config.decay or config.mixed):
        # In two kernels: together they spill registers, or keep 8 bits of the weights.
        (dk,), (dx,) = (key_gradients(config, *operands, (name,)) for name in ("dk", "dx"))
        key_decay = []
        if config.decay:
            query_decay = [jnp.sum(o * do, axis=-1)]
            key_decay = [_per_query_head(-jnp.sum(x * dx, axis=-1), q.shape[1])]
    else:
        dk, dx, *key_decay = key_gradients(config, *operands, ("dk", "dx") + ("ddecay",) * sums_scores(config))
    ddecay = fraction_gradient(*query_decay, *key_decay) if config.decay else None
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None, ddecay


attend.defvjp(_attend_forward, _attend_backward)


def _per_query_head(x: Array, heads: int) -> Array:
    """Gradients [B, G, S] of decays that the query heads of a group share, as [B, H, S] parts of equal size."""
    repeats = heads // x.shape[1]
    return jnp.repeat(x / repeats, repeats, axis=1)


def attend_with_sinks(
    config: AttentionConfig,
    sinks: Array | None,
    k: Array,
    q: Array,
    x: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
) -> Float[Array, "B H T V"]:
    """`attend` in 16 bits, with a slot of value 0 in the normaliser whose logit per head is the sink, if any."""
    if config.decay and not config.similarity.normalized:
        # The gradient of the decay is a difference of sums of the output.
        return attend(config, jnp.float32, k, q, x, mask, decay)[0].astype(config.dtype)
    if sinks is None:
        return attend(config, jnp.dtype(config.dtype), k, q, x, mask, decay)[0]
    # In float32, so that the output is rounded once.
    o, lse = attend(config, jnp.float32, k, q, x, mask, decay)
    share = jax.nn.sigmoid(lse / LOG2E - sinks.astype(jnp.float32).reshape(-1, q.shape[1], 1))
    return (o * share[..., None]).astype(config.dtype)


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention.

    Returns:
      The output in the dtype of q, k and v.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    operands = {"q": call.q, "k": call.k, "v": call.v}
    config = plan_call(call, call.read_kernel, operands)
    length, width = call.v.shape[1], call.v.shape[3]
    mask = block_mask(call, config.rows)
    cache_k, cache_v = (None, None) if call.cache is None else (call.cache.k, call.cache.values)
    arrays = (
        join_slots(_pad(cache_k, config.key), _pad(call.k, config.key), config.rows),
        heads_first(_pad(call.q, config.key), config.rows),
        join_slots(_pad(cache_v, config.value), _pad(call.v, config.value), config.rows),
        join_decay(call, config.rows),
    )
    k, q, v, decay = jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves((arrays, mask))), arrays)
    o = attend_with_sinks(config, call.sinks, k, q, v, mask, decay)
    return jnp.swapaxes(o, 1, 2)[:, :length, :, :width]


def _pad(x: Array | None, width: int) -> Array | None:
    return None if x is None else pad_time(x, width, axis=3)
