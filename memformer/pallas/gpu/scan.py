"""The scan over chunks: two Mosaic GPU kernels that carry a state, forward and backward.

With S the state that enters a chunk, X = (I + A)^-1 (inverse.py), D the decay between tokens (0 where
hidden), c and w the rows enter and leave (rows.py), s the scale, the forward scan computes

    U = X beta (V - c K S)         O = s c Q S + s D (Q K^T) U        S' = c_C S + K^T (w U)

and the backward scan, from the last chunk to the first, with S and dS now gradients

    dU = (s D (Q K^T))^T dO + w K dS'      dR = X^T dU      dS = c_C dS' + Q^T (s c dO) - K^T (c beta dR)

Where writes add, U = V, dR = dU and the last term is not there.

What cancels when keys repeat (K S, X times what is missing, K^T U, and the same backward) takes its float32
operands as sums of two bfloat16 halves, 16 bits: with identical keys and beta 2 a single bfloat16 operand was
seen to lose 11% of the output in 128 tokens.

A program is one warpgroup that walks
one head and a block of value columns, which know nothing of each other: the state stays in registers as
wgmma's accumulators, the next chunk is on its way (TMA) while one is computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core import compat
from memformer.core.chunking import vary_like
from memformer.core.types import Array
from memformer.pallas.gpu.common import AXES, Cut, column, iotas, products, row, shared, turned

__all__ = ["backward", "forward"]


class _Tokens:
    """The rows of one chunk in shared memory."""

    def __init__(self, cut: Cut, ref):
        self.cut, self.ref = cut, ref
        if cut.carries:
            # Now, although it is needed last: commit_smem must come between this read and the next copy to this slot.
            self.kept = ref[cut.names.index("enter"), cut.chunk - 1]

    def named(self, name: str):
        return self.ref.at[self.cut.names.index(name)]

    def times(self, names: tuple[str, ...], x: Array) -> Array:
        """x [C, width], its rows multiplied by what of `names` is there."""
        for name in names:
            if name in self.cut.names:
                x = x * column(self.named(name), x.shape[1])
        return x

    def keep(self, state: Array) -> Array:
        """What stays of a state [K, V] over the chunk."""
        return state * self.kept if self.cut.carries else state

    def weigh(self, scores: Array, later: int) -> Array:
        """s D times scores [C, C], 0 where hidden; `later` is the axis of the reading token."""
        places = iotas(self.cut.chunk)
        visible = places[later] >= places[1 - later]
        size = self.cut.chunk
        of_reader, of_writer = (column, row) if later == 0 else (row, column)
        if self.cut.segments:
            apart = of_reader(self.named("segment"), size) + of_writer(self.named("-segment"), size)
            visible = visible & (apart == 0.0)
        weights = self.cut.scale
        if self.cut.decay:
            gap = of_reader(self.named("total"), size) + of_writer(self.named("-total"), size)
            # Where hidden the gap may be positive and overflow.
            weights = jnp.exp(jnp.where(visible, gap, 0.0)) * self.cut.scale
        return jnp.where(visible, scores * weights, 0.0)


class _Walk:
    """Brings the blocks of one program, chunk by chunk, into one of two slots of shared memory."""

    def __init__(self, cut: Cut, sources, slots, barrier):
        self.cut, self.barrier = cut, barrier
        self.pairs = tuple(zip(sources, slots, strict=True))

    def issue(self, n, slot) -> None:
        """Starts the copies of chunk n."""
        b, h, block = (lax.axis_index(name) for name in AXES)
        for (source, kind), target in self.pairs:
            place = self.place(kind, n, b, h, block)
            plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], self.barrier.at[slot])

    def place(self, kind: str, n, b, h, block):
        """Where chunk n of this program lies in a key, value or chunked array."""
        tokens = pl.ds(n * self.cut.chunk, self.cut.chunk)
        if kind == "key":
            return b, tokens, lax.div(h, jnp.int32(self.cut.repeat))
        if kind == "value":
            return b, tokens, h, pl.ds(block * self.cut.block, self.cut.block)
        return b, h, n

    def chunks(self, order, step, state: Array) -> Array:
        """step(n, refs, state) for every chunk; order(i) is the i-th one."""
        self.issue(order(0), 0)

        def body(i, state):
            slot = lax.rem(i, jnp.int32(2))

            @pl.when(i + 1 < self.cut.chunks)
            def _():
                self.issue(order(i + 1), lax.rem(i + 1, jnp.int32(2)))

            plgpu.barrier_wait(self.barrier.at[slot])
            return step(order(i), [target.at[slot] for _, target in self.pairs], state)

        # Under shard_map what is loaded varies over mesh axes by its type, what is computed in a kernel does not.
        return lax.fori_loop(0, self.cut.chunks, body, state * 1.0)


def _put(ref, x: Array) -> None:
    ref[...] = x.astype(ref.dtype)


def _put_halves(refs, x: Array) -> None:
    """x as the sum of two bfloat16 blocks, to 16 bits."""
    high, low = refs
    _put(high, x)
    _put(low, x - x.astype(jnp.bfloat16).astype(jnp.float32))


def _forward_kernel(*refs, cut: Cut, save: bool):
    takes = 3 + 2 * cut.beta + bool(cut.names)
    inputs, start, refs = refs[:takes], refs[takes], refs[takes + 1 :]
    (o_g, end_g), refs = refs[:2], refs[2:]
    saved, refs = (refs[:2], refs[2:]) if save else ((), refs)
    slots, (*blocks, p_s, barrier) = refs[:takes], refs[takes:]
    state_s, (r_s, r_low), u_s, left_s = (blocks[i : i + 2] for i in range(0, 8, 2))
    walk = _Walk(cut, _sources(inputs), slots, barrier)
    b, h, block = (lax.axis_index(name) for name in AXES)
    columns = pl.ds(block * cut.block, cut.block)

    def step(n, chunk, state):
        q, k, v, *rest = chunk
        tokens = _Tokens(cut, rest[-1] if cut.names else None)
        _put_halves(state_s, state)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(state_s[0], saved[0].at[b, h, n, :, columns])
        scores, *stored = products(((q, turned(k)),), *([[(k, half) for half in state_s]] if cut.beta else []))
        _put(p_s, tokens.weigh(scores, 0))
        u = compat.load(v, plgpu.Layout.WGMMA).astype(jnp.float32)
        if cut.beta:
            u = u - tokens.times(("enter",), stored[0])
            _put_halves((r_s, r_low), tokens.times(("beta",), u))
            plgpu.commit_smem()
            (u,) = products(((rest[0], r_s), (rest[0], r_low), (rest[1], r_s)))
        _put_halves(u_s, u)
        if cut.carries:
            _put_halves(left_s, tokens.times(("leave",), u))
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(u_s[0], saved[1].at[walk.place("value", n, b, h, block)])
        (seen,) = products([(q, half) for half in state_s])
        (read,) = products([(p_s, half) for half in u_s])
        _put(r_s, read + tokens.times(("enter",), seen) * cut.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r_s, o_g.at[walk.place("value", n, b, h, block)])
        (written,) = products([(turned(k), half) for half in (left_s if cut.carries else u_s)])
        plgpu.wait_smem_to_gmem(0)
        return tokens.keep(state) + written

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = walk.chunks(lambda i: i, step, state)


def forward(cut: Cut, save: bool, q, k, v, inverse, rows, start) -> tuple[Array, ...]:
    """O, the last state, and if `save` the states that enter chunks and U.

    Args:
      cut: sizes.
      save: whether the backward pass follows.
      q, k: [B, T, G, K] bfloat16.
      v: [B, T, H, V] bfloat16.
      inverse: X as two halves [B, H, N, C, C] bfloat16; () where writes add.
      rows: of the tokens.
      start: [B, H, K, V] float32.
    """
    C, K, V = cut.chunk, cut.key, cut.block
    operands = (q, k, v, *inverse, *rows)
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    if save:
        states = (cut.batch, cut.heads, cut.chunks, cut.key, cut.value)
        out += [jax.ShapeDtypeStruct(states, jnp.bfloat16), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    scratch = [*_slots(cut, inverse, rows), *(shared(cut, K, V),) * 2, *(shared(cut, C, V),) * 6, shared(cut, C, C)]
    body = functools.partial(_forward_kernel, cut=cut, save=save)
    return _call(cut, "forward", body, out, scratch, len(operands), (*operands, start))


def _backward_kernel(*refs, cut: Cut):
    takes = 3 + 2 * cut.beta + bool(cut.names)
    inputs, start, refs = refs[:takes], refs[takes], refs[takes + 1 :]
    (dr_g, states_g, end_g), refs = refs[:3], refs[3:]
    slots, (*state_s, r_s, u_s, u_low, entered_s, p_s, barrier) = refs[:takes], refs[takes:]
    walk = _Walk(cut, _sources(inputs), slots, barrier)
    b, h, block = (lax.axis_index(name) for name in AXES)
    columns = pl.ds(block * cut.block, cut.block)

    def step(n, chunk, state):
        q, k, do, *rest = chunk
        tokens = _Tokens(cut, rest[-1] if cut.names else None)
        (scores,) = products(((k, turned(q)),))
        _put(p_s, tokens.weigh(scores, 1))
        _put_halves(state_s, state)
        _put(entered_s, tokens.times(("enter",), compat.load(do, plgpu.Layout.WGMMA).astype(jnp.float32)) * cut.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s[0], states_g.at[b, h, n, :, columns])
        written, dr = products([(k, half) for half in state_s], ((p_s, do),))
        dr = dr + tokens.times(("leave",), written)
        pairs = [(turned(q), entered_s)]
        if cut.beta:
            high, low = turned(rest[0]), turned(rest[1])
            _put_halves((u_s, u_low), dr)
            plgpu.commit_smem()
            (dr,) = products(((high, u_s), (high, u_low), (low, u_s)))
            # Into the same buffers: the product above has been waited for.
            _put_halves((u_s, u_low), tokens.times(("beta", "enter"), -dr))
            pairs += [(turned(k), u_s), (turned(k), u_low)]
        _put(r_s, dr)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r_s, dr_g.at[walk.place("value", n, b, h, block)])
        (before,) = products(tuple(pairs))
        plgpu.wait_smem_to_gmem(0)
        return tokens.keep(state) + before

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = walk.chunks(lambda i: cut.chunks - 1 - i, step, state)


def backward(cut: Cut, q, k, do, inverse, rows, dend) -> tuple[Array, ...]:
    """dR, the gradients of the states that leave chunks, and that of the first state.

    Args:
      cut: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output [B, T, H, V] bfloat16.
      inverse, rows: as `forward` takes them.
      dend: gradient of the last state, [B, H, K, V] float32.
    """
    C, K, V = cut.chunk, cut.key, cut.block
    states = (cut.batch, cut.heads, cut.chunks, cut.key, cut.value)
    operands = (q, k, do, *inverse, *rows)
    out = [
        jax.ShapeDtypeStruct(do.shape, do.dtype),
        jax.ShapeDtypeStruct(states, jnp.bfloat16),
        jax.ShapeDtypeStruct(dend.shape, jnp.float32),
    ]
    scratch = [*_slots(cut, inverse, rows), *(shared(cut, K, V),) * 2, *(shared(cut, C, V),) * 4, shared(cut, C, C)]
    body = functools.partial(_backward_kernel, cut=cut)
    return _call(cut, "backward", body, out, scratch, len(operands), (*operands, dend))


def _sources(inputs) -> tuple:
    """The arrays that come chunk by chunk, each with its kind."""
    kinds = ("key", "key", "value") + ("chunk",) * (len(inputs) - 3)
    return tuple(zip(inputs, kinds, strict=True))


def _slots(cut: Cut, inverse, rows) -> list:
    C, K, V = cut.chunk, cut.key, cut.block
    slots = [shared(cut, 2, C, K), shared(cut, 2, C, K), shared(cut, 2, C, V)] + [shared(cut, 2, C, C)] * len(inverse)
    return slots + [plgpu.SMEM((2, len(cut.names), C), jnp.float32)] * len(rows)


def _call(cut: Cut, name: str, body, out, scratch, copies: int, operands) -> tuple[Array, ...]:
    memory = "delta_rule" if cut.beta else "linear_attention"
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=copies, num_barriers=2)],
        grid=(cut.batch, cut.heads, cut.value // cut.block),
        grid_names=AXES,
        kernel_name=f"memformer_{memory}_{name}",
    )
    # Under shard_map results vary as the operands do; the kernel's own types do not say so.
    return tuple(vary_like(x, *operands) for x in kernel(*operands))
