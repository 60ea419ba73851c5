"""The scans over chunks of a decay per key channel, forward and backward: Mosaic GPU kernels.

Equations and letters: channel_decay.py. Each warpgroup scans the chunks of one head and one block of value columns, the
state in registers. XLA scales the operands, so that the scans have no decay but that of the chunk.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.matrix_memory.channel_decay_scores import ChannelConfig
from memformer.pallas.gpu.matrix_memory.config import AXES, call_kernel, take
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    anew,
    load_column,
    partial_products,
    products,
    shared_block,
    start_anew,
    store,
    store_split,
    transposed,
)

__all__ = ["scan_backward", "scan_forward"]


def _copy_chunk(config: ChannelConfig, n, columns, sources, targets, barrier) -> None:
    """Starts the copies of chunk n: scaled q, k and w, values, then what has an axis of chunks."""
    b, h, _ = (lax.axis_index(name) for name in AXES)
    tokens, wide = pl.ds(n * config.chunk, config.chunk), 3 + 2 * config.beta
    places = [(b, tokens, h)] * wide + [(b, tokens, h, columns)] + [(b, h, n)] * (len(sources) - wide - 1)
    for source, place, target in zip(sources, places, targets, strict=True):
        plgpu.copy_gmem_to_smem(source.at[place], target, barrier)


def _columns(config: ChannelConfig):
    """The value columns of a program."""
    return pl.ds(lax.axis_index(AXES[2]) * config.value_block, config.value_block)


def _forward_kernel(*refs, config: ChannelConfig, save: bool):
    count, kept = 7 + 5 * config.beta, save * (1 + 2 * config.beta)
    inputs, (start, o_g, end_g), saved, arrivals, (*blocks, zero_s, ready) = take(refs, count, 3, kept, count)
    start_anew(zero_s)
    state_s, o_s, u_s, difference_s = blocks[:2], blocks[2], blocks[3:5], blocks[5:]
    b, h, _ = (lax.axis_index(name) for name in AXES)
    # q, k and w in two parts | v | chunk decay, P and X in two parts, scalars.
    wide, columns = 3 + 2 * config.beta, _columns(config)

    def step(n, state):
        slots = anew(zero_s, arrivals)
        tokens = pl.ds(n * config.chunk, config.chunk)
        _copy_chunk(config, n, columns, inputs, slots, ready)
        store_split(state_s, state)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(state_s[0], saved[0].at[b, h, n, :, columns])
        plgpu.barrier_wait(ready)
        q, *k = slots[:3]
        (v, decay, *p), rest = slots[wide : wide + 4], slots[wide + 4 :]
        decayed = state * load_column(decay, config.value_block)
        writes = [v]
        if config.beta:
            writes = u_s
            u = compat.load(v, plgpu.Layout.WGMMA).astype(jnp.float32)
            u = TokenScalars(config, rest[2]).scale_rows(("alpha",), u)
            (erased,) = products(partial_products(slots[3:5], state_s))
            store_split(difference_s, u + erased)
            plgpu.commit_smem()
            (u,) = products(partial_products(rest[:2], difference_s))
            store_split(u_s, u)
            plgpu.commit_smem()
            for part, target in zip(u_s, saved[1:], strict=False):
                plgpu.copy_smem_to_gmem(part, target.at[b, tokens, h, columns])
        (o,) = products([*partial_products([q], state_s), *partial_products(p, writes)])
        store(o_s, o)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[b, tokens, h, columns])
        # After o: both accumulators at once spill.
        (written,) = products(partial_products([transposed(part) for part in k], writes))
        plgpu.wait_smem_to_gmem(0)
        return decayed + written

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
    end_g[b, h, :, columns] = lax.fori_loop(0, config.chunks, step, state * 1.0)


def scan_forward(config: ChannelConfig, save: bool, operands: Sequence[Array], start: Array) -> tuple[Array, ...]:
    """O, the last state and, to be saved, the states that enter chunks and, with beta, U in two parts.

    Args:
      config: sizes.
      save: whether the backward pass follows.
      operands: scaled q, k and w (k and w in two parts each; w with beta), v, chunk decay, P, X (two parts each; X with
        beta), the token scalars (with beta).
      start: [B, H, K, V] float32.
    """
    v = operands[3 + 2 * config.beta]
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    if save:
        out += [_states(config), *[jax.ShapeDtypeStruct(v.shape, v.dtype)] * (2 * config.beta)]
    body = functools.partial(_forward_kernel, config=config, save=save)
    return _call(config, "channel_chunk_scan", body, out, operands, start, 5)


def _backward_kernel(*refs, config: ChannelConfig):
    count, beta = 7 + 4 * config.beta, config.beta
    inputs, (start,), dr_g, (dstates_g, dstart_g), arrivals, (*blocks, zero_s, ready) = take(
        refs, count, 1, 1 + beta, 2, count
    )
    start_anew(zero_s)
    state_s, dr_s, du_s = take(blocks, 2, 1 + beta)
    b, h, _ = (lax.axis_index(name) for name in AXES)
    wide, columns = 3 + 2 * beta, _columns(config)

    def step(i, state):
        slots = anew(zero_s, arrivals)
        n = config.chunks - 1 - i
        _copy_chunk(config, n, columns, inputs, slots, ready)
        store_split(state_s, state)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s[0], dstates_g.at[b, h, n, :, columns])
        plgpu.barrier_wait(ready)
        q, *k = slots[:3]
        (do, decay, *p), inverse = slots[wide : wide + 4], slots[wide + 4 :]
        decayed = state * load_column(decay, config.value_block)
        (dr,) = products([*partial_products(k, state_s), *partial_products([transposed(x) for x in p], [do])])
        if beta:
            store_split(du_s, dr)
            plgpu.commit_smem()
            (dr,) = products(partial_products([transposed(x) for x in inverse], du_s))
        store_split(dr_s, dr)
        plgpu.commit_smem()
        for part, target in zip(dr_s, dr_g, strict=True):
            plgpu.copy_smem_to_gmem(part, target.at[b, pl.ds(n * config.chunk, config.chunk), h, columns])
        w_t = [transposed(part) for part in slots[3:wide]]
        (through_chunk,) = products([(transposed(q), do), *(partial_products(w_t, dr_s) if beta else ())])
        plgpu.wait_smem_to_gmem(0)
        return decayed + through_chunk

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    dstart_g[b, h, :, columns] = lax.fori_loop(0, config.chunks, step, state * 1.0)


def scan_backward(config: ChannelConfig, operands: Sequence[Array], dend: Array) -> tuple[Array, ...]:
    """dR in two parts (without beta dU = dV in one), the gradients of the states that leave chunks, and of the first.

    Args:
      config: sizes.
      operands: as of `scan_forward`, with dO for v and without token scalars.
      dend: gradient of the last state, [B, H, K, V] float32.
    """
    do = operands[3 + 2 * config.beta]
    out = [jax.ShapeDtypeStruct(do.shape, do.dtype)] * (1 + config.beta)
    out += [_states(config), jax.ShapeDtypeStruct(dend.shape, jnp.float32)]
    body = functools.partial(_backward_kernel, config=config)
    return _call(config, "channel_chunk_scan_backward", body, out, operands, dend, 1 + 3 * config.beta)


def _states(config: ChannelConfig) -> jax.ShapeDtypeStruct:
    shape = (config.batch, config.heads, config.chunks, config.key, config.value)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _call(config: ChannelConfig, name: str, body, out, operands, state, blocks: int) -> tuple[Array, ...]:
    """Launches a scan with `blocks` blocks of a chunk's value columns as scratch, beside two of a state."""
    C, K, V, beta = config.chunk, config.key, config.value_block, config.beta
    block = functools.partial(shared_block, columns=V)
    # What arrives has a leading axis of one: see `anew`.
    scratch = [block(1, C, K)] * (3 + 2 * beta) + [block(1, C, V), plgpu.SMEM((1, K), jnp.float32)]
    scratch += [block(1, C, C)] * (2 + 2 * beta)
    named = len(operands) - len(scratch)
    scratch += [plgpu.SMEM((1, len(config.scalars), C), jnp.float32)] * named
    scratch += [block(K, V)] * 2 + [block(C, V)] * blocks + [plgpu.SMEM((1,), jnp.int32)]
    scratch.append(plgpu.Barrier(num_arrivals=len(operands)))
    grid = (config.batch, config.heads, config.value // V)
    return call_kernel(config, name, body, grid, out, scratch, (*operands, state))
