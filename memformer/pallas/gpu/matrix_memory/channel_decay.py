"""Linear attention and the delta rule with a log decay per key channel on Hopper: forward kernels.

They also serve an erase vector w and a write strength alpha; a decay per head is repeated for every channel. With S the
state that enters the chunk, G the cumulative decay [C, K], a = alpha, b = beta, s the scale:

    M_ri = sum_c W_rc K_ic exp(G_rc - G_ic), i < r      X = (I + b M)^-1    U = X (a V - (b e^G W) S)
    P_ri = s sum_c Q_rc K_ic exp(G_rc - G_ic), i <= r   O = (s e^G Q) S + P U
    S' = e^G_C S + (e^(G_C - G) K)^T U

Without beta, in linear attention, U = V. Across the start of a segment reads of S, M, P and writes are masked.

XLA scales the operands of the state's products, elementwise. One kernel computes P of all chunks in parallel, one X
(both in one spill), by the ladder of scores (pallas/tpu/matrix_memory/channel_decay.py): at each level exponents are
sums of log decays over blocks, products with a matrix of zeros and ones that the tensor cores sum exactly in float32.
None is positive. The last kernel scans the chunks of one head and one block of value columns.

What cancels when keys repeat has operands in two bfloat16 parts. With P in one, equal keys at beta 2 were off by
2.2e-2, now by 2e-3. The backward pass is not here: see ops/matrix_memory/kernels.py.

Source: arXiv 2312.06635 (linear attention), 2510.26692 (delta rule); the ladder: ops/matrix_memory/scores.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import MatrixCall
from memformer.core.decay import cumulative_decay, decay_to_end
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas import token_scalars
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.inverse import inverse_scratch, write_inverse
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel, plan_call
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    iotas,
    load_column,
    partial_products,
    products,
    shared_block,
    split_outside,
    store,
    store_split,
    transposed,
)
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

# Key channels whose factors are in shared memory at a time.
KEY_BLOCK = 64

# exp of this is 0: stands for all stronger decays.
FORGOTTEN = -1024.0


@dataclasses.dataclass(frozen=True)
class ChannelConfig(ScanConfig):
    """Sizes of a call whose decay is in the scaled operands, not in the token scalars."""

    @property
    def carries(self) -> bool:
        """Never: the scaled operands have the decay of the state."""
        return False

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the token scalars."""
        return ("beta", "alpha") * self.beta + ("segment", "-segment") * self.segments


def _pairs(places, half) -> Array:
    """The pairs (row, column) of the level with blocks of `half` tokens [C, C]."""
    row, column = places
    block = lax.div(row, 2 * half) == lax.div(column, 2 * half)
    return block & (lax.div(row, half) > lax.div(column, half))


def _between(places, half) -> Array:
    """1 where the column's log decay is part of the exponent of the row [C, C].

    In odd blocks of `half` tokens from the start of the block up to the row; in even ones after the row to
    the end of the block.
    """
    row, column = places
    block, odd = lax.div(row, half), lax.rem(lax.div(row, half), 2) == 1
    chosen = (block == lax.div(column, half)) & ((odd & (column <= row)) | (~odd & (column > row)))
    return jnp.where(chosen, 1.0, 0.0)


def _load_float32(ref) -> Array:
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _intra_chunk_kernel(*refs, config: ChannelConfig, erase: bool):
    named = bool(config.scalars)
    (rows_g, k_g, decay_g), refs = refs[:3], refs[3:]
    scalars_g, refs = refs[:named], refs[named:]
    out_g, refs = refs[:2], refs[2:]
    (rows_s, k_s), scalars_s, refs = refs[:2], refs[2 : 2 + named], refs[2 + named :]
    decay_s, scaled_k, scaled_rows, refs = refs[:3], refs[3:5], refs[5:7], refs[7:]
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
            # Computed anew: kept over the loop they take the registers of the products.
            places, half = iotas(config.chunk), lax.shift_left(jnp.int32(1), level)
            store(between_s, _between(places, half))
            plgpu.commit_smem()
            (exponent,) = products([(between_s, part) for part in decay_s])
            factor = jnp.exp(exponent)
            store_split(scaled_rows, factor * _load_float32(rows_s.at[i]))
            store_split(scaled_k, factor * _load_float32(k_s.at[i]))
            plgpu.commit_smem()
            k_t = [transposed(part) for part in scaled_k]
            (added,) = products(partial_products(scaled_rows, k_t))
            return scores + jnp.where(_pairs(iotas(config.chunk), half), added, 0.0)

        # A loop: unrolled levels spill.
        scores = lax.fori_loop(0, config.chunk.bit_length() - 1, add_level, scores)
    (scores,) = scalars.mask_and_decay(iotas(config.chunk), scores)
    if erase:
        write_inverse(scalars.scale_rows(("beta",), scores), scratch, out_g, (b, h, n))
    else:
        store_split(scratch, scores * config.scale)
        plgpu.commit_smem()
        for source, target in zip(scratch, out_g, strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def _intra_chunk(config: ChannelConfig, rows, k, decay, scalars, erase: bool) -> tuple[Array, ...]:
    """P of rows q or, with erase, X of rows w: [B, H, N, C, C] in two bfloat16 parts."""
    C, blocks = config.chunk, config.key // KEY_BLOCK
    squares = jax.ShapeDtypeStruct((config.batch, config.heads, config.chunks, C, C), jnp.bfloat16)
    scratch = [shared_block(blocks, C, KEY_BLOCK)] * 2
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * len(scalars)
    # The log decay in three parts, k and the rows in two; the matrix of zeros and ones.
    scratch += [shared_block(C, KEY_BLOCK)] * (3 + 2 + 2) + [shared_block(C, C)]
    scratch += inverse_scratch() if erase else [shared_block(C, C)] * 2
    scratch.append(plgpu.Barrier(num_arrivals=2 * blocks + len(scalars)))
    body = functools.partial(_intra_chunk_kernel, config=config, erase=erase)
    grid, name = (config.batch, config.heads, config.chunks), "channel_inverse" if erase else "channel_scores"
    return call_kernel(config, name, body, grid, [squares] * 2, scratch, (rows, k, decay, *scalars))


def _scan_kernel(*refs, config: ChannelConfig):
    count = 7 + 5 * config.beta
    inputs, start, (o_g, end_g), refs = refs[:count], refs[count], refs[count + 1 : count + 3], refs[count + 3 :]
    slots, refs = refs[:count], refs[count:]
    *blocks, ready = refs
    state_s, o_s, u_s, difference_s = blocks[:2], blocks[2], blocks[3:5], blocks[5:]
    b, h, block = (lax.axis_index(name) for name in AXES)
    columns = pl.ds(block * config.value_block, config.value_block)
    # q, k and w in two parts | v | chunk decay, P and X in two parts, scalars.
    wide = 3 + 2 * config.beta

    def step(n, state):
        tokens = pl.ds(n * config.chunk, config.chunk)
        places = [(b, tokens, h)] * wide + [(b, tokens, h, columns)] + [(b, h, n)] * (count - wide - 1)
        for source, place, target in zip(inputs, places, slots, strict=True):
            plgpu.copy_gmem_to_smem(source.at[place], target, ready)
        store_split(state_s, state)
        plgpu.commit_smem()
        plgpu.barrier_wait(ready)
        q, *k = slots[:3]
        (v, decay, *p), rest = slots[wide : wide + 4], slots[wide + 4 :]
        decayed = state * load_column(decay, config.value_block)
        writes = [v]
        if config.beta:
            u = TokenScalars(config, rest[2]).scale_rows(
                ("alpha",), compat.load(v, plgpu.Layout.WGMMA).astype(jnp.float32)
            )
            (stored,) = products(partial_products(slots[3:5], state_s))
            store_split(difference_s, u - stored)
            plgpu.commit_smem()
            (u,) = products(partial_products(rest[:2], difference_s))
            store_split(u_s, u)
            plgpu.commit_smem()
            writes = u_s
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


def _scan(config: ChannelConfig, operands, start) -> tuple[Array, ...]:
    """O and the last state of q, k and w (2 parts each), v, chunk decay, P, X (2 each), scalars; w and X with beta."""
    C, K, V = config.chunk, config.key, config.value_block
    block = functools.partial(shared_block, columns=V)
    scratch = [block(C, K)] * (3 + 2 * config.beta) + [block(C, V), plgpu.SMEM((K,), jnp.float32)]
    scratch += [block(C, C)] * (2 + 2 * config.beta)
    scratch += [plgpu.SMEM((len(config.scalars), C), jnp.float32)] * config.beta
    scratch += [block(K, V)] * 2 + [block(C, V)] * 5
    scratch.append(plgpu.Barrier(num_arrivals=len(operands)))
    v = operands[3 + 2 * config.beta]
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    grid = (config.batch, config.heads, config.value // V)
    body = functools.partial(_scan_kernel, config=config)
    return call_kernel(config, "channel_chunk_scan", body, grid, out, scratch, (*operands, start))


def _kernels(config: ChannelConfig, q, k, v, *rest) -> tuple[Array, ...]:
    """One device's shard of the call; rest: w with beta, the log decay, the scaled operands, scalars, state."""
    config = config.local(q, v)
    keys, rest = (q, k, *rest[: config.beta]), rest[config.beta :]
    wide = 3 + 2 * config.beta
    decay, scaled, (chunk_decay, *scalars, start) = rest[0], rest[1 : 1 + wide], rest[1 + wide :]
    squares = _intra_chunk(config, keys[0], keys[1], decay, scalars, erase=False)
    if config.beta:
        squares += _intra_chunk(config, keys[2], keys[1], decay, scalars, erase=True)
    return _scan(config, (*scaled, v, chunk_decay, *squares, *scalars[: config.beta]), start)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a matrix memory with a decay per channel, an erase vector or a write strength; forward only.

    Returns:
      The output in bfloat16, and the state in float32.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    plan, width = plan_call(call), call.q.shape[3]
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    config = ChannelConfig(**fields | {"decay": False})
    length, value = call.q.shape[1], call.v.shape[-1]

    def pad(x, width):
        return pad_time(pad_time(x, config.chunk), width, axis=3)

    decay = jnp.zeros(call.v.shape[:3], jnp.float32) if call.decay is None else call.decay.astype(jnp.float32)
    decay = decay if decay.ndim == 4 else jnp.broadcast_to(decay[..., None], (*decay.shape, width))
    decay = jnp.maximum(pad(decay, config.key), FORGOTTEN)
    q, k, v = pad(call.q, config.key), pad(call.k, config.key), pad(call.v, config.value)
    w = k if call.w is None else pad(call.w, config.key)
    scalars = token_scalars.token_scalars(config, call)
    scalars = {"alpha": scalars["beta"]} | scalars if config.beta else scalars
    chunks = (config.batch, config.chunks, config.chunk, config.heads, config.key)
    by_chunk = decay.reshape(chunks)
    sums = cumulative_decay(by_chunk, axis=2).total()
    growth = jnp.exp(sums) * scalars["decay_in"][..., None]
    rest = jnp.exp(jnp.moveaxis(decay_to_end(jnp.moveaxis(by_chunk, 2, 3)), 3, 2)) * scalars["decay_out"][..., None]
    chunk_decay = growth[:, :, -1].swapaxes(1, 2)

    def scale(x, factor):
        x = x.astype(jnp.float32).reshape(*chunks[:3], config.groups, 1, config.key)
        x = x * factor.reshape(*chunks[:3], config.groups, config.repeat, config.key)
        return x.reshape(decay.shape)

    scaled = [(config.scale * scale(q, growth)).astype(q.dtype), *split_outside(scale(k, rest))]
    if config.beta:
        scaled += split_outside(scale(w, growth * scalars["beta"][..., None]))
        keys = (q, k, v, w)
    else:
        keys = (q, k, v)
    named = ()
    if config.scalars:
        scalars |= {f"-{name}": -scalars[name] for name in ("segment",) if name in scalars}
        named = (jnp.stack([scalars[name] for name in config.scalars], axis=-1).transpose(0, 3, 1, 4, 2),)
    state = pad_time(pad_time(call.state.astype(jnp.float32), config.key, axis=2), config.value, axis=3)
    operands = (*keys, decay, *scaled, chunk_decay, *named)
    operands = (*operands, vary_like(state, *operands))
    heads = (2,) * (len(operands) - 2 - len(named)) + (1,) * (2 + len(named))
    kernels = split_batch_and_heads(_kernels, (config,), config.axes, operands=heads, results=(2, 1))
    o, end = kernels(*operands)
    return o[:, :length, :, :value], end[:, :, :width, :value]
