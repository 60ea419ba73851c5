"""What of a chunk needs no state, for all chunks and heads at once: a Mosaic GPU kernel.

With D the decay between tokens (0 where hidden), s the scale, beta on the columns:

    P = s D (Q K^T), i <= r        X = (I + M beta)^-1 with M = D (K K^T), i < r
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu.common import AXES, Cut, call_kernel, iotas, products, put, put_parts, shared, turned
from memformer.pallas.gpu.inverse import inverse_scratch, unit_lower_inverse
from memformer.pallas.gpu.matrix_memory.token_scalars import Tokens

__all__ = ["prepare"]


def _kernel(*refs, cut: Cut):
    takes = 2 + bool(cut.names)
    (q_g, k_g, *rows_g), (read_g, *inverse_g), refs = refs[:takes], refs[takes : takes + 1 + 2 * cut.beta], refs[takes:]
    q_s, k_s, *rows_s, read_s = refs[1 + 2 * cut.beta : 2 + 2 * cut.beta + takes]
    *scratch, barrier = refs[2 + 2 * cut.beta + takes :]
    b, h, n = (lax.axis_index(name) for name in AXES)
    keys = (b, pl.ds(n * cut.chunk, cut.chunk), lax.div(h, jnp.int32(cut.repeat)))
    plgpu.copy_gmem_to_smem(q_g.at[keys], q_s, barrier)
    plgpu.copy_gmem_to_smem(k_g.at[keys], k_s, barrier)
    if cut.names:
        plgpu.copy_gmem_to_smem(rows_g[0].at[b, h, n], rows_s[0], barrier)
    plgpu.barrier_wait(barrier)
    tokens, places = Tokens(cut, rows_s[0] if cut.names else None), iotas(cut.chunk)
    read, *match = products(((q_s, turned(k_s)),), *([((k_s, turned(k_s)),)] if cut.beta else []))
    read, *match = tokens.weigh(places, read, *match)
    put(read_s, read * cut.scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(read_s, read_g.at[b, h, n])
    if cut.beta:
        match = jnp.where(places[0] > places[1], match[0], 0.0)
        sides = unit_lower_inverse(tokens.times_beta(match), scratch)
        for i, x in enumerate(sides):
            # The first blocks of the scratch are free again.
            put_parts(scratch[i], x)
        plgpu.commit_smem()
        for i, x in enumerate(sides):
            for source, target in zip(scratch[i], inverse_g, strict=True):
                plgpu.copy_smem_to_gmem(source, target.at[b, h, n, :, pl.ds(i * x.shape[1], x.shape[1])])
    plgpu.wait_smem_to_gmem(0)


def prepare(cut: Cut, q: Array, k: Array, rows: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """P [B, H, N, C, C] bfloat16, and X as the sum of two such halves; () in its place where writes add.

    Args:
      cut: sizes.
      q, k: [B, T, G, K] bfloat16.
      rows: of the tokens.
    """
    squares = jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.chunks, cut.chunk, cut.chunk), jnp.bfloat16)
    scratch = [shared(64, cut.chunk, cut.key), shared(64, cut.chunk, cut.key)]
    scratch += [plgpu.SMEM((len(cut.names), cut.chunk), jnp.float32)] * len(rows)
    scratch += [shared(64, cut.chunk, cut.chunk), *(inverse_scratch() if cut.beta else [])]
    scratch.append(plgpu.Barrier(num_arrivals=2 + len(rows)))
    body = functools.partial(_kernel, cut=cut)
    grid = (cut.batch, cut.heads, cut.chunks)
    read, *inverse = call_kernel(cut, "prepare", body, grid, [squares] * (1 + 2 * cut.beta), scratch, (q, k, *rows))
    return read, tuple(inverse)
