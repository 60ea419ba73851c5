"""Gradients within chunks, once the chunk scans are done, parallel over chunks and heads: a Mosaic GPU kernel.

With S the state that enters, dS' the gradient of the state that leaves, dV from the backward scan, and the letters of
chunk_scan.py and intra_chunk.py (rows of F and N are tokens that read):

    F = s D (dO W^T), i <= r       N = - D (dV W^T), i < r      G = dO S^T      E = dV S^T      L = W dS'^T
    dQ = F b K + s c G             dK = b (F^T Q + N^T K) + N b K - c E + b w L

b stands on the columns of F and N. Its own gradient is W dV / b, summed over value columns: a write is b W, and b
times the gradient of all writes is dV. (Sums over keys of the products above give the same, but cancel when keys
repeat.) Sums over the key channels of the products are the gradients of the other token scalars:

    c: s Q G - K E, and S dS' for the last token      w: b K L
    log decay: Q (F b K) + K (N b K) for the token that reads, minus b K (F^T Q + N^T K) for the token that writes

Where writes add, b is one, and N and E are absent. Where keys repeat the sum in F b K cancels, so F b and W are split
into two bfloat16 parts there.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    iotas,
    load_float32,
    products,
    shared_block,
    store,
    store_split,
    sum_product,
    transposed,
)

__all__ = ["intra_chunk_backward"]

# Sums over the key channels, one per token, as the kernel writes them: Q (F b K), Q G, K (F^T Q + N^T K), K L,
# K (N b K) and K E.
SUMS = ("qk_reader", "q_decay_in", "writer", "decay_out", "kk_reader", "k_decay_in")

# Key channels per warpgroup.
KEY_BLOCK = 64


class _Blocks(NamedTuple):
    """Shared memory of a program; q, k, state and dstate hold one warpgroup's key channels.

    Attributes:
      q, k, do, state, dstate: see `intra_chunk_backward`.
      w: W in two parts, or V.
      dv: gradient of the values; empty where writes add.
      f, n: F and N; n is empty where writes add.
      fb, nb: F b in two parts, and N b; F alone, and empty, where writes add.
      stage: where dQ goes once every warpgroup is done with F b.
    """

    q: Any
    k: Any
    do: Any
    w: Sequence[Any]
    dv: Sequence[Any]
    state: Any
    dstate: Any
    f: Any
    n: Sequence[Any]
    fb: Sequence[Any]
    nb: Sequence[Any]
    stage: Any


def _own_blocks(config: ScanConfig, warpgroup: int, refs, squares) -> _Blocks:
    q, k, do, *values, state, dstate = refs
    w, dv = values[: 1 + config.beta], values[1 + config.beta :]
    q, k, state, dstate = (ref.at[warpgroup] for ref in (q, k, state, dstate))
    if config.beta:
        f, n, nb, *fb = squares
        return _Blocks(q, k, do, w, dv, state, dstate, f, (n,), fb, (nb,), fb[warpgroup])
    return _Blocks(q, k, do, w, dv, state, dstate, squares[0], (), squares[:1], (), squares[1 + warpgroup])


def _place(config: ScanConfig):
    """Chunk and part of the key channels of a program."""
    at, parts = lax.axis_index(AXES[2]), config.key // config.key_part
    return (at, 0) if parts == 1 else (lax.div(at, jnp.int32(parts)), lax.rem(at, jnp.int32(parts)))


def _keys(config: ScanConfig, key_part, warpgroup: int):
    """Key channels of a warpgroup."""
    return pl.ds(key_part * config.key_part + warpgroup * KEY_BLOCK, KEY_BLOCK)


def _kernel(*refs, config: ScanConfig):
    named = bool(config.scalars)
    count, results = 6 + 2 * config.beta + named, 2 + config.beta + 2 * config.decay
    inputs, outputs, refs = refs[:count], refs[count : count + results], refs[count + results :]
    blocks, squares, barriers = refs[:count], refs[count:-2], refs[-2:]
    squares, sums_s = squares[: _squares(config)], squares[_squares(config) :]
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(lambda: _load(config, inputs, blocks, barriers[0]))
    plgpu.barrier_wait(barriers[0])
    scalars = TokenScalars(config, blocks[-1] if named else None)
    for i in range(config.key_part // KEY_BLOCK):
        # One branch per warpgroup: with addresses that are not static, the registers do not suffice.
        own = _own_blocks(config, i, blocks[: count - named], squares)
        pl.when(warpgroup == i)(functools.partial(_compute, config, i, scalars, own, sums_s, outputs, barriers[1]))


def _compute(
    config: ScanConfig, warpgroup: int, scalars: TokenScalars, blocks: _Blocks, sums_s, outputs, barrier
) -> None:
    """Computes the gradients of one warpgroup's key channels."""
    (b, hp, _), (n, key_part) = (lax.axis_index(name) for name in AXES), _place(config)
    place = (b, pl.ds(n * config.chunk, config.chunk), hp, _keys(config, key_part, warpgroup))
    (dq_g, dk_g), outputs = outputs[:2], outputs[2:]
    dbeta_s = sums_s[: config.beta]
    sums_s, states_s = [x.at[warpgroup] for x in sums_s[config.beta :]] or (None, None)

    def synchronize():
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    # All three conditions hold. A branch ends the live range of the operands' addresses, which the compiler otherwise
    # keeps from one product to the next and spills.
    @pl.when(b < config.batch)
    def _():
        if config.decay:
            states_s[...] = sum_product(blocks.state, blocks.dstate)
        if config.beta and warpgroup == 0:
            dbeta_s[0][...] = scalars.divide_by_beta(sum_product(blocks.w[0], blocks.dv[0]))
        _store_weights(config, scalars, warpgroup, blocks)

    synchronize()

    @pl.when(n < config.chunks)
    def _():
        dq = _query_gradients(config, scalars, sums_s, blocks)
        synchronize()
        store(blocks.stage, dq)

    @pl.when(hp < config.heads * (config.value // config.value_part))
    def _():
        dk = _key_gradients(config, scalars, sums_s, blocks)
        # All warps have finished the products with q, so its block can be reused.
        plgpu.commit_smem()
        store(blocks.q, dk)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(blocks.stage, dq_g.at[place])
    plgpu.copy_smem_to_gmem(blocks.q, dk_g.at[place])
    if config.beta and warpgroup == 0:
        # Equal in all parts of the key channels.
        plgpu.copy_smem_to_gmem(dbeta_s[0], outputs[0].at[b, hp, n, key_part])
    block = key_part * (config.key_part // KEY_BLOCK) + warpgroup
    for source, target in zip([sums_s, states_s] * config.decay, outputs[config.beta :], strict=False):
        plgpu.copy_smem_to_gmem(source, target.at[b, hp, n, block])
    plgpu.wait_smem_to_gmem(0)


def _query_gradients(config: ScanConfig, scalars: TokenScalars, sums_s, blocks: _Blocks) -> Array:
    """dQ."""
    (through_state,) = products(((blocks.do, blocks.state),))
    _store_sum(sums_s, "q_decay_in", blocks.q, config.scale * through_state)
    dq = config.scale * scalars.scale_rows(("decay_in",), through_state)
    (through_chunk,) = products([(part, blocks.k) for part in blocks.fb])
    _store_sum(sums_s, "qk_reader", blocks.q, through_chunk)
    return dq + through_chunk


def _key_gradients(config: ScanConfig, scalars: TokenScalars, sums_s, blocks: _Blocks) -> Array:
    """dK."""
    squares, operands = (blocks.f, *blocks.n), (blocks.q, blocks.k)
    (as_writer,) = products([(transposed(square), x) for square, x in zip(squares, operands, strict=False)])
    _store_sum(sums_s, "writer", blocks.k, as_writer)
    dk = scalars.scale_rows(("beta",), as_writer)
    (through_end,) = products([(blocks.w[0], blocks.dstate)])
    _store_sum(sums_s, "decay_out", blocks.k, through_end)
    dk = dk + scalars.scale_rows(("beta", "decay_out"), through_end)
    if not config.beta:
        return dk
    (as_reader,) = products(((blocks.nb[0], blocks.k),))
    _store_sum(sums_s, "kk_reader", blocks.k, as_reader)
    (through_start,) = products(((blocks.dv[0], blocks.state),))
    _store_sum(sums_s, "k_decay_in", blocks.k, through_start)
    return dk + as_reader - scalars.scale_rows(("decay_in",), through_start)


def _store_sum(sums_s, name: str, ref, x: Array) -> None:
    """Stores the sum over key channels of a block times x, where the gradient of the decay needs it."""
    if sums_s is not None:
        sums_s.at[SUMS.index(name)][...] = jnp.sum(load_float32(ref) * x, axis=1)


def _load(config: ScanConfig, sources, blocks, barrier) -> None:
    """Starts the copies of this program's blocks: one chunk of a head, and one block of value columns."""
    (b, hp, _), (n, key_part) = (lax.axis_index(name) for name in AXES), _place(config)
    width = config.value_part
    parts = config.value // width
    h, tokens = lax.div(hp, jnp.int32(parts)), pl.ds(n * config.chunk, config.chunk)
    columns = pl.ds(lax.rem(hp, jnp.int32(parts)) * width, width)
    group = lax.div(h, jnp.int32(config.repeat))
    own = [_keys(config, key_part, i) for i in range(config.key_part // KEY_BLOCK)]
    keys = [(b, tokens, group, block) for block in own]
    states = [(b, h, n, columns, block) for block in own]
    values = [(b, tokens, h, columns)] * (2 + 2 * config.beta)
    places = [keys] * 2 + values + [states] * 2 + [(b, h, n)] * bool(config.scalars)
    for source, place, block in zip(sources, places, blocks, strict=True):
        several = isinstance(place, list)
        for i, one in enumerate(place if several else [place]):
            plgpu.copy_gmem_to_smem(source.at[one], block.at[i] if several else block, barrier)


def _store_weights(config: ScanConfig, scalars: TokenScalars, warpgroup: int, blocks: _Blocks) -> None:
    """Stores F b and N b, then F and N; only F where writes add. Two warpgroups take one of them each."""
    readers = ((blocks.do, blocks.w), *((dv, blocks.w[:1]) for dv in blocks.dv))
    for i, (reader, writes) in enumerate(readers):
        if i % (config.key_part // KEY_BLOCK) != warpgroup:
            continue
        places = iotas(config.chunk)
        scores = products([(reader, transposed(part)) for part in writes])
        (x,) = scalars.mask_and_decay(places, *scores)
        x = jnp.where(places[0] > places[1], -x, 0.0) if i else x * config.scale
        if config.beta:
            scaled = scalars.scale_columns(x)
            if i:
                store(blocks.nb[0], scaled)
            else:
                store_split(blocks.fb, scaled)
        store(blocks.n[0] if i else blocks.f, x)
    plgpu.commit_smem()


def _squares(config: ScanConfig) -> int:
    """Blocks [C, C]: F, N, N b and the two parts of F b; or F, and where each warpgroup stages dQ."""
    return 5 if config.beta else 1 + config.key_part // KEY_BLOCK


def intra_chunk_backward(config: ScanConfig, q, k, do, w, dv, states, dstates, scalars) -> tuple:
    """Gradients of q, k and the token scalars.

    Args:
      config: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      w: W in two parts, like do; (V,) where writes add.
      dv: gradient of the values, like do; () where writes add.
      states, dstates: [B, H, N, V, K] bfloat16, the state that enters each chunk, and the gradient of the one that
        leaves it.
      scalars: the token scalars, if there are any.
    """
    C, V, warpgroups = config.chunk, config.value_part, config.key_part // KEY_BLOCK
    many, parts = config.heads * (config.value // V), config.key // config.key_part
    programs = (config.batch, many, config.chunks)
    out = [jax.ShapeDtypeStruct((config.batch, q.shape[1], many, config.key), q.dtype)] * 2
    scratch = [shared_block(warpgroups, C, KEY_BLOCK)] * 2 + [shared_block(C, V)] * (2 + 2 * config.beta)
    scratch += [shared_block(warpgroups, V, KEY_BLOCK)] * 2
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * len(scalars)
    scratch += [shared_block(C, C)] * _squares(config)
    if config.beta:
        out.append(jax.ShapeDtypeStruct((*programs, parts, C), jnp.float32))
        scratch.append(plgpu.SMEM((C,), jnp.float32))
    for shape in ((len(SUMS), C), (V,)) * config.decay:
        out.append(jax.ShapeDtypeStruct((*programs, parts * warpgroups, *shape), jnp.float32))
        scratch.append(plgpu.SMEM((warpgroups, *shape), jnp.float32))
    operands = (q, k, do, *w, *dv, states, dstates, *scalars)
    copies = len(operands) + 4 * (warpgroups - 1)
    scratch += [plgpu.Barrier(num_arrivals=copies), plgpu.Barrier(num_arrivals=warpgroups)]
    body = functools.partial(_kernel, config=config)
    # Barriers are where blocks are used again.
    threads = {"num_threads": warpgroups, "thread_name": "warpgroup", "automatic_barriers": False}
    grid = (*programs[:2], config.chunks * parts)
    dq, dk, *sums = call_kernel(config, "intra_chunk_backward", body, grid, out, scratch, operands, **threads)
    dscalars = _scalar_gradients(config, scalars, *sums) if config.scalars else ()
    return _sum_over_sharing(dq, q), _sum_over_sharing(dk, k), dscalars


def _sum_over_sharing(x: Array, like: Array) -> Array:
    """Gradients [B, T, many, K], summed over the programs that share a head of `like`."""
    if x.shape == like.shape:
        return x
    x = x.reshape(*like.shape[:3], -1, like.shape[3])
    return jnp.sum(x.astype(jnp.float32), axis=3).astype(like.dtype)


def _scalar_gradients(config: ScanConfig, scalars, *sums: Array) -> tuple[Array, ...]:
    """Gradients of the token scalars.

    Args:
      config: sizes.
      scalars: their array.
      *sums: by chunk and head, [parts of the keys, C] of beta, if there is one; with a decay, [key blocks, SUMS, C] and
        [key blocks, columns].
    """
    sums = [x.reshape(config.batch, config.heads, -1, *x.shape[2:]).sum(axis=2) for x in sums]
    values = dict(zip(config.scalars, jnp.moveaxis(scalars[0], 3, 0), strict=True))
    zero = jnp.zeros_like(scalars[0][:, :, :, 0])
    grads = {"beta": sums.pop(0)[..., 0, :]} if config.beta else {}
    if config.decay:
        named = dict(zip(SUMS, jnp.moveaxis(sums[0].sum(axis=3), 3, 0), strict=True))
        beta, decay_in, reader = values.get("beta", 1.0), named["q_decay_in"], named["qk_reader"]
        if config.beta:
            decay_in, reader = decay_in - named["k_decay_in"], reader + named["kk_reader"]
        grads |= {
            "decay_in": decay_in.at[..., -1].add(sums[1].sum(axis=(3, 4))),
            "decay_out": beta * named["decay_out"],
            "fraction": reader,
            "-fraction": beta * named["writer"],
        }
    return (jnp.stack([grads.get(name, zero) for name in config.scalars], axis=3),)
