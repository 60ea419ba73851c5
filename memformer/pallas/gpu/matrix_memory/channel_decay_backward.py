"""Gradients within chunks of a decay per key channel, parallel over chunks, heads and key blocks: Mosaic GPU kernels.

After the scans (channel_decay_scan.py; letters: channel_decay.py). The first kernel has the products over value
columns: those of the scaled operands of the state's products, and the gradients of the scores,

    d(scaled Q) = dO S^T    d(scaled W) = dR S^T    d(scaled K) = U dS'^T    d(chunk decay) = sum over columns of S dS'
    dP = s dO U^T, i <= r   d(b M) = - dR U^T, i < r

each of them as D + D^T, D on and below the diagonal, 0 between segments. The second kernel goes through the ladder. At
a level each token is a row, with its query (or b W), or a column, with its key: x of that, e its decay factor, T the
zeros and ones of the exponents. With D_l the pairs of the level,

    Z = (D_l + D_l^T) (e x)       dx = e Z       d(log decay) += T^T (x dx)

so that one product serves rows and columns, and the gradient of the decay is a sum, with no difference in it. The
diagonal of P has no decay.

What cancels when keys repeat has operands in two bfloat16 parts, as in the forward pass: U and dR alternate in sign,
and with one part the gradient of the decay, a sum over time, was off by 2.1e-2 (equal keys, beta 2).
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
from memformer.pallas.gpu.matrix_memory.channel_decay_scores import (
    KEY_BLOCK,
    ChannelConfig,
    decay_factor,
    level_pairs,
    levels,
    reads,
)
from memformer.pallas.gpu.matrix_memory.config import AXES, call_kernel, take
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    anew,
    broadcast_rows,
    iotas,
    load_float32,
    partial_products,
    products,
    shared_block,
    split_outside,
    start_anew,
    store_split,
    sum_product,
    transposed,
)

__all__ = ["operand_gradients", "score_gradients"]

# Value columns whose blocks are in shared memory apart.
VALUE_BLOCK = 64


def _place(config: ChannelConfig):
    """Chunk and key channels of a program."""
    blocks = jnp.int32(config.key // KEY_BLOCK)
    at = lax.axis_index(AXES[2])
    return lax.div(at, blocks), pl.ds(lax.rem(at, blocks) * KEY_BLOCK, KEY_BLOCK)


def _counts(config: ChannelConfig) -> tuple[int, int, int]:
    """Parts of dO, of U (without beta of V) and of dR (none without beta)."""
    return config.input_parts, 2 if config.beta else config.input_parts, 2 * config.beta


def _operand_kernel(*refs, config: ChannelConfig):
    beta, named = config.beta, config.segments
    counts = _counts(config)
    inputs, (dq_g, dk_g, dchunk_g), dw_g, squares, (*blocks, barrier) = take(
        refs, sum(counts) + 2 + named, 3, beta, 2 + 2 * beta
    )
    do, u, dr, (state, dstate), _ = take(blocks, *counts, 2)
    b, hp, _ = (lax.axis_index(name) for name in AXES)
    n, keys = _place(config)
    parts = config.value // config.value_part
    h, tokens = lax.div(hp, jnp.int32(parts)), pl.ds(n * config.chunk, config.chunk)
    columns = pl.ds(lax.rem(hp, jnp.int32(parts)) * config.value_part, config.value_part)
    places = [(b, tokens, h, columns)] * sum(counts) + [(b, h, n, keys, columns)] * 2 + [(b, h, n)] * named
    for source, place, target in zip(inputs, places, blocks, strict=True):
        whole = len(place) == 3
        for i in range(1 if whole else config.value_part // VALUE_BLOCK):
            one = source.at[place] if whole else source.at[(*place[:-1], _part(place[-1], i))]
            plgpu.copy_gmem_to_smem(one, target if whole else target.at[i], barrier)
    plgpu.barrier_wait(barrier)
    scalars = TokenScalars(config, blocks[-1] if named else None)
    own, stage = (b, tokens, hp, keys), (state.at[0], dstate.at[0])
    (dq_g[own],) = products(_over_values(do, [state]))
    (dk_g[own],) = products(_over_values(u, [dstate]))
    sums = (sum_product(state.at[i], dstate.at[i]) for i in range(state.shape[0]))
    dchunk_g[b, hp, n, keys] = functools.reduce(jnp.add, sums)
    if beta:
        (dw_g[0][own],) = products(_over_values(dr, [state]))

    # One key block of a chunk writes the gradients of P, the last one those of b M.
    @pl.when(keys.start == 0)
    def _():
        _store_square(scalars, config, (do, u), config.scale, stage, squares[:2], (b, hp, n))

    if beta:

        @pl.when(keys.start == config.key - KEY_BLOCK)
        def _():
            _store_square(scalars, config, (dr, u), -1.0, stage, squares[2:], (b, hp, n))


def _part(columns, i: int):
    """The i-th block of value columns."""
    return pl.ds(columns.start + i * VALUE_BLOCK, VALUE_BLOCK)


def _over_values(a, b) -> list:
    """The pairs of blocks whose products sum to a b^T, from the parts of a and of b."""
    pairs = partial_products(a, b)
    return [(x.at[i], transposed(y.at[i])) for x, y in pairs for i in range(x.shape[0])]


def _store_square(scalars: TokenScalars, config: ChannelConfig, operands, factor, stage, targets, place) -> None:
    """Stores D + D^T in two parts, D = factor (readers writers^T) where the reader is not earlier."""
    readers, writers = operands
    below, above = products(_over_values(readers, writers), _over_values(writers, readers))
    row, column = iotas(config.chunk)
    (below,), (above,) = scalars.mask_and_decay((row, column), below), scalars.mask_and_decay((column, row), above)
    store_split(stage, factor * jnp.where(row >= column, below, above))
    plgpu.commit_smem()
    for source, target in zip(stage, targets, strict=True):
        plgpu.copy_smem_to_gmem(source, target.at[place])
    plgpu.wait_smem_to_gmem(0)


def operand_gradients(config: ChannelConfig, do, u, dr, states: Array, dstates: Array, scalars) -> tuple:
    """Gradients of the scaled q and k, of the chunk decay, of the scaled w (with beta), and of the scores as D + D^T.

    Args:
      config: sizes.
      do: gradient of the output, its parts [B, T, H, V] bfloat16.
      u: U in two parts, like do; the parts of V without beta.
      dr: dR in two parts, like do; () without beta.
      states, dstates: [B, H, N, K, V] bfloat16, the state that enters each chunk, and the gradient of the one that
        leaves it.
      scalars: the token scalars, if there are segments.

    Returns:
      [B, T, H, K] float32 for q and k, [B, H, N, K] float32, [B, T, H, K] float32 for w; for P, and with beta for b M,
      two parts [B, H, N, C, C] bfloat16.
    """
    C, V, beta = config.chunk, config.value_part, config.beta
    parts = config.value // V
    many, chunks = config.heads * parts, config.chunks
    row = jax.ShapeDtypeStruct((config.batch, do[0].shape[1], many, config.key), jnp.float32)
    square = jax.ShapeDtypeStruct((config.batch, many, chunks, C, C), jnp.bfloat16)
    out = [row, row, jax.ShapeDtypeStruct((config.batch, many, chunks, config.key), jnp.float32)]
    out += [row] * beta + [square] * (2 + 2 * beta)
    blocks = V // VALUE_BLOCK
    wide = sum(_counts(config))
    scratch = [shared_block(blocks, C, VALUE_BLOCK)] * wide
    scratch += [shared_block(blocks, KEY_BLOCK, VALUE_BLOCK)] * 2
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * len(scalars)
    scratch.append(plgpu.Barrier(num_arrivals=blocks * (2 + wide) + len(scalars)))
    operands = (*do, *u, *dr, states, dstates, *scalars)
    grid = (config.batch, many, chunks * (config.key // KEY_BLOCK))
    body = functools.partial(_operand_kernel, config=config)
    results = call_kernel(config, "channel_operand_gradients", body, grid, out, scratch, operands)
    if parts == 1:
        return results
    dq, dk, dchunk, *rest = results
    dw, squares = rest[:beta], rest[beta:]
    dq, dk, *dw = (x.reshape(*x.shape[:2], -1, parts, config.key).sum(3) for x in (dq, dk, *dw))
    dchunk, *squares = (
        x.astype(jnp.float32).reshape(config.batch, -1, parts, *x.shape[2:]).sum(2) for x in (dchunk, *squares)
    )
    sums = (split_outside(squares[i] + squares[i + 1]) for i in range(0, len(squares), 2))
    return (dq, dk, dchunk, *dw, *(part for pair in sums for part in pair))


def _score_kernel(*refs, config: ChannelConfig, erase: bool):
    arrive = 4 + erase
    inputs, (decay_g,), outputs, (*blocks, zero_s, barrier) = take(refs, arrive, 1, 3)
    b, h, _ = (lax.axis_index(name) for name in AXES)
    n, keys = _place(config)
    tokens, group = pl.ds(n * config.chunk, config.chunk), lax.div(h, jnp.int32(config.repeat))
    places = [(b, tokens, group, keys)] * 2 + [(b, h, n)] * (arrive - 2)
    for source, place, target in zip(inputs, places, blocks, strict=False):
        plgpu.copy_gmem_to_smem(source.at[place], target.at[0], barrier)
    decay = compat.load(decay_g.at[b, tokens, h, keys], plgpu.Layout.WGMMA, optimized=False)
    store_split([ref.at[0] for ref in blocks[arrive : arrive + 3]], decay)
    start_anew(zero_s)
    plgpu.barrier_wait(barrier)

    def load_rows(rows_s):
        rows = load_float32(rows_s)
        return TokenScalars(config, blocks[4].at[0]).scale_rows(("beta",), rows) if erase else rows

    def descend(level, carry):
        drows, dk, ddecay = carry
        half = lax.shift_left(jnp.int32(1), level)
        (rows_s, k_s), squares_s, _, decay_s, scaled, pairs_s, (between_s,) = take(
            anew(zero_s, blocks), 2, 2, arrive - 4, 3, 2, 2
        )
        store_split(pairs_s, jnp.where(level_pairs(iotas(config.chunk), half), _sum(squares_s), 0.0))
        factor = decay_factor(config, half, decay_s, between_s)
        store_split(scaled, factor * jnp.where(reads(config, half), load_rows(rows_s), load_float32(k_s)))
        plgpu.commit_smem()
        (z,) = products(partial_products(pairs_s, scaled))
        # x dx = (e x) Z, read from shared memory once the product has finished.
        store_split(scaled, _sum(scaled) * z)
        plgpu.commit_smem()
        (added,) = products([(transposed(between_s), part) for part in scaled])
        dx, reader = factor * z, reads(config, half)
        return drows + jnp.where(reader, dx, 0.0), dk + jnp.where(reader, 0.0, dx), ddecay + added

    rows_s, k_s, *squares_s = (ref.at[0] for ref in blocks[:4])
    # From shared memory, so that its type varies over the mesh axes that those of the loop do.
    zero = 0.0 * load_float32(k_s)
    carry = (zero, zero, zero)
    if not erase:
        row, column = iotas(config.chunk)
        diagonal = jnp.sum(jnp.where(row == column, _sum(squares_s), 0.0), axis=1)
        diagonal = broadcast_rows(diagonal, KEY_BLOCK)
        carry = (diagonal * load_float32(k_s), diagonal * load_rows(rows_s), zero)
    for target, x in zip(outputs, lax.fori_loop(0, levels(config), descend, carry), strict=True):
        target[b, tokens, h, keys] = x


def _sum(parts) -> Array:
    """The array that two blocks hold the parts of."""
    high, low = (load_float32(ref) for ref in parts)
    return high + low


def score_gradients(
    config: ChannelConfig, rows: Array, k: Array, decay: Array, squares: Sequence[Array], scalars: Sequence[Array]
) -> tuple[Array, ...]:
    """Gradients of the rows, of k and of the log decay by P of rows q or, with scalars, of b w by b M of rows w.

    Args:
      config: sizes.
      rows: q, or w, [B, T, G, K] bfloat16.
      k: like rows.
      decay: [B, T, H, K] float32.
      squares: gradient of the scores as D + D^T, two parts [B, H, N, C, C] bfloat16.
      scalars: the token scalars, which have beta, for rows w; () for rows q.

    Returns:
      Three arrays [B, T, H, K] float32.
    """
    C, erase = config.chunk, bool(scalars)
    # Leading axes of one: see `anew`.
    block, square = shared_block(1, C, KEY_BLOCK), shared_block(1, C, C)
    scratch = [shared_block(1, C, KEY_BLOCK, dtype=config.dtype)] * 2 + [square] * 2
    scratch += [plgpu.SMEM((1, len(config.scalars), C), jnp.float32)] * erase
    # The log decay in three parts, the scaled tokens in two, the pairs of a level in two; the matrix of zeros and ones.
    scratch += [block] * (3 + 2) + [square] * (2 + 1)
    scratch += [plgpu.SMEM((1,), jnp.int32), plgpu.Barrier(num_arrivals=4 + erase)]
    out = [jax.ShapeDtypeStruct(decay.shape, jnp.float32)] * 3
    grid = (config.batch, config.heads, config.chunks * (config.key // KEY_BLOCK))
    name = "channel_inverse_gradients" if erase else "channel_score_gradients"
    body = functools.partial(_score_kernel, config=config, erase=erase)
    return call_kernel(config, name, body, grid, out, scratch, (rows, k, *squares, *scalars, decay))
