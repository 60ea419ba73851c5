"""Scores of a decay per key channel by the ladder, parallel over chunks and heads: Mosaic GPU kernels.

M and P of channel_decay.py. At each level of the ladder (pallas/tpu/matrix_memory/channel_decay.py) a token is either a
row, with its query or erase vector, or a column, with its key: one scaled array Y of a value per token and channel
holds both, and the pairs of the level are those of Y Y^T. Exponents are sums of log decays over blocks, products with a
matrix of zeros and ones that the tensor cores sum exactly in float32. None is positive. One kernel computes P, another
X from M, because one for both spills.

What cancels when keys repeat has operands in two bfloat16 parts. With P in one, equal keys at beta 2 were off by
2.2e-2, now by 2e-3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.inverse import inverse_scratch, write_inverse
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    iotas,
    load_float32,
    partial_products,
    products,
    shared_block,
    store,
    store_split,
    transposed,
)

__all__ = ["KEY_BLOCK", "ChannelConfig", "decay_factor", "intra_chunk", "level_pairs", "levels", "reads"]

# Key channels whose factors are in shared memory at a time.
KEY_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ChannelConfig(ScanConfig):
    """Sizes of a call whose decay is in the scaled operands, not in the token scalars."""

    @property
    def carries(self) -> bool:
        """Never: the scaled operands have the decay of the state."""
        return False

    @property
    def input_parts(self) -> int:
        """bfloat16 arrays whose sum is q, v or the gradient of the output."""
        return 2 if self.dtype == "float16" else 1

    @property
    def gradient_parts(self) -> int:
        """bfloat16 arrays whose sum is dR, or dV without beta."""
        return 2 if self.beta else self.input_parts

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the token scalars."""
        return ("beta", "alpha") * self.beta + ("segment", "-segment") * self.segments


def levels(config: ScanConfig) -> int:
    """Levels of the ladder."""
    return config.chunk.bit_length() - 1


def level_pairs(places, half) -> Array:
    """The pairs of tokens of the level with blocks of `half` tokens, in either order [C, C]."""
    row, column = places
    together = lax.div(row, 2 * half) == lax.div(column, 2 * half)
    return together & (lax.div(row, half) != lax.div(column, half))


def reads(config: ScanConfig, half) -> Array:
    """Whether a token is a row of its level, not a column [C, KEY_BLOCK]: it is in an odd block of `half` tokens."""
    return lax.rem(lax.div(iotas(config.chunk, KEY_BLOCK)[0], half), 2) == 1


def _decay_between(places, half) -> Array:
    """1 where the column's log decay is part of the exponent of the row [C, C].

    In odd blocks of `half` tokens from the start of the block up to the row; in even ones after the row to
    the end of the block.
    """
    row, column = places
    block, odd = lax.div(row, half), lax.rem(lax.div(row, half), 2) == 1
    chosen = (block == lax.div(column, half)) & ((odd & (column <= row)) | (~odd & (column > row)))
    return jnp.where(chosen, 1.0, 0.0)


def decay_factor(config: ScanConfig, half, decay_s, between_s) -> Array:
    """The factor of each token's key channels at the level with blocks of `half` tokens [C, KEY_BLOCK].

    Args:
      config: sizes.
      half: tokens per block.
      decay_s: the log decay in three parts.
      between_s: receives the zeros and ones whose product with it is the exponent.
    """
    store(between_s, _decay_between(iotas(config.chunk), half))
    plgpu.commit_smem()
    (exponent,) = products([(between_s, part) for part in decay_s])
    return jnp.exp(exponent)


def _intra_chunk_kernel(*refs, config: ChannelConfig, erase: bool):
    named = bool(config.scalars)
    (rows_g, k_g, decay_g), refs = refs[:3], refs[3:]
    scalars_g, refs = refs[:named], refs[named:]
    out_g, refs = refs[:2], refs[2:]
    (rows_s, k_s), scalars_s, refs = refs[:2], refs[2 : 2 + named], refs[2 + named :]
    decay_s, scaled, refs = refs[:3], refs[3:5], refs[5:]
    between_s, *scratch, barrier = refs
    b, h, n = (lax.axis_index(name) for name in AXES)
    tokens, group = pl.ds(n * config.chunk, config.chunk), lax.div(h, jnp.int32(config.repeat))
    blocks = [pl.ds(i, KEY_BLOCK) for i in range(0, config.key, KEY_BLOCK)]
    for source, target in ((rows_g, rows_s), (k_g, k_s)):
        for i, block in enumerate(blocks):
            plgpu.copy_gmem_to_smem(source.at[b, tokens, group, block], target.at[i], barrier)
    if named:
        plgpu.copy_gmem_to_smem(scalars_g[0].at[b, h, n], scalars_s[0], barrier)
    plgpu.barrier_wait(barrier)
    scalars, places = TokenScalars(config, scalars_s[0] if named else None), iotas(config.chunk)
    if erase:
        scores = jnp.where(places[0] < 0, 1.0, 0.0)
    else:
        (scores,) = products([(rows_s.at[i], transposed(k_s.at[i])) for i in range(len(blocks))])
        scores = jnp.where(places[0] == places[1], scores, 0.0)
    for i, block in enumerate(blocks):
        store_split(decay_s, compat.load(decay_g.at[b, tokens, h, block], plgpu.Layout.WGMMA, optimized=False))

        def add_level(level, scores, i=i):
            half = lax.shift_left(jnp.int32(1), level)
            factor = decay_factor(config, half, decay_s, between_s)
            tokens = jnp.where(reads(config, half), load_float32(rows_s.at[i]), load_float32(k_s.at[i]))
            store_split(scaled, factor * tokens)
            plgpu.commit_smem()
            (added,) = products(partial_products(scaled, [transposed(part) for part in scaled]))
            # Computed anew: kept over the loop they take the registers of the products.
            places = iotas(config.chunk)
            return scores + jnp.where(level_pairs(places, half) & (places[0] > places[1]), added, 0.0)

        # A loop: unrolled levels spill.
        scores = lax.fori_loop(0, levels(config), add_level, scores)
    (scores,) = scalars.mask_and_decay(iotas(config.chunk), scores)
    if erase:
        write_inverse(scalars.scale_rows(("beta",), scores), scratch, out_g, (b, h, n))
    else:
        store_split(scratch, scores * config.scale)
        plgpu.commit_smem()
        for source, target in zip(scratch, out_g, strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def intra_chunk(config: ChannelConfig, rows, k, decay, scalars, erase: bool) -> tuple[Array, ...]:
    """P of rows q or, with erase, X of rows w: [B, H, N, C, C] in two bfloat16 parts."""
    C, blocks = config.chunk, config.key // KEY_BLOCK
    squares = jax.ShapeDtypeStruct((config.batch, config.heads, config.chunks, C, C), jnp.bfloat16)
    scratch = [shared_block(blocks, C, KEY_BLOCK, dtype=config.dtype)] * 2
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * len(scalars)
    # The log decay in three parts, the scaled tokens in two; the matrix of zeros and ones.
    scratch += [shared_block(C, KEY_BLOCK)] * (3 + 2) + [shared_block(C, C)]
    scratch += inverse_scratch() if erase else [shared_block(C, C)] * 2
    scratch.append(plgpu.Barrier(num_arrivals=2 * blocks + len(scalars)))
    body = functools.partial(_intra_chunk_kernel, config=config, erase=erase)
    grid, name = (config.batch, config.heads, config.chunks), "channel_inverse" if erase else "channel_scores"
    operands = (rows, k, decay, *scalars)
    # Both products of a level follow a `commit_smem`, so that no warp still reads what the next one stores.
    return call_kernel(config, name, body, grid, [squares] * 2, scratch, operands, automatic_barriers=False)
