"""Intra-chunk terms, parallel over chunks and heads: a Mosaic GPU kernel.

With D the decay between tokens (0 where masked), s the scale, beta on the columns:

    P = s D (Q K^T), i <= r        X = (I + M beta)^-1 with M = D (K K^T), i < r
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu.inverse import inverse_scratch, write_inverse
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import iotas, products, shared_block, store, transposed

__all__ = ["intra_chunk"]


def _kernel(*refs, config: ScanConfig):
    count = 2 + bool(config.scalars)
    (q_g, k_g, *scalars_g), refs = refs[:count], refs[count:]
    (qk_g, *inverse_g), refs = refs[: 1 + 2 * config.beta], refs[1 + 2 * config.beta :]
    (q_s, k_s, *scalars_s, qk_s), (*scratch, barrier) = refs[: count + 1], refs[count + 1 :]
    b, h, n = (lax.axis_index(name) for name in AXES)
    keys = (b, pl.ds(n * config.chunk, config.chunk), lax.div(h, jnp.int32(config.repeat)))
    plgpu.copy_gmem_to_smem(q_g.at[keys], q_s, barrier)
    plgpu.copy_gmem_to_smem(k_g.at[keys], k_s, barrier)
    if config.scalars:
        plgpu.copy_gmem_to_smem(scalars_g[0].at[b, h, n], scalars_s[0], barrier)
    plgpu.barrier_wait(barrier)
    scalars, places = TokenScalars(config, scalars_s[0] if config.scalars else None), iotas(config.chunk)
    k_t = transposed(k_s)
    qk, *kk = products(((q_s, k_t),), *([((k_s, k_t),)] if config.beta else []))
    qk, *kk = scalars.mask_and_decay(places, qk, *kk)
    store(qk_s, qk * config.scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(qk_s, qk_g.at[b, h, n])
    if config.beta:
        kk = jnp.where(places[0] > places[1], kk[0], 0.0)
        write_inverse(scalars.scale_columns(kk), scratch, inverse_g, (b, h, n))
    plgpu.wait_smem_to_gmem(0)


def intra_chunk(config: ScanConfig, q: Array, k: Array, scalars: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """P [B, H, N, C, C] in bfloat16, and X in two bfloat16 parts; () instead of X where writes add.

    Args:
      config: sizes.
      q, k: [B, T, G, K] bfloat16.
      scalars: the token scalars, if there are any.
    """
    C, K = config.chunk, config.key
    squares = jax.ShapeDtypeStruct((config.batch, config.heads, config.chunks, C, C), jnp.bfloat16)
    scratch = [shared_block(C, K), shared_block(C, K)]
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * len(scalars)
    scratch += [shared_block(C, C), *(inverse_scratch() if config.beta else [])]
    scratch.append(plgpu.Barrier(num_arrivals=2 + len(scalars)))
    body = functools.partial(_kernel, config=config)
    grid = (config.batch, config.heads, config.chunks)
    out = [squares] * (1 + 2 * config.beta)
    operands = (q, k, *scalars)
    # Barriers are where inverse.py needs them; the block of P is stored once.
    qk, *inverse = call_kernel(config, "intra_chunk", body, grid, out, scratch, operands, automatic_barriers=False)
    return qk, tuple(inverse)
