"""The scan over chunks: two Mosaic GPU kernels that carry a state, forward and backward.

With S the state that enters a chunk, P and X from prepare.py, c, b and w the rows enter, beta and leave (rows.py), s
the scale, the forward scan computes

    W = X (V - c K S)      U = b W      O = s c Q S + P U      S' = c_C S + K^T (w U)

and the backward scan, from the last chunk to the first, with S and dS now gradients

    dV = X^T b (P^T dO + w K dS')       dS = c_C dS' + Q^T (s c dO) - K^T (c dV)

Where writes add, X and b are one, W = V and the last term is not there.

What cancels when keys repeat (K S, X times what is missing, K^T U, and the same backward) takes its float32
operands as sums of two bfloat16 halves, 16 bits: with identical keys and beta 2 a single bfloat16 operand was
seen to lose 11% of the output in 128 tokens.

A warpgroup walks one head and a block of value columns, which know nothing of each other: the state stays in
registers as wgmma's accumulators, the next chunk is on its way (TMA) while one is computed. Two warpgroups of a
program share what all value columns need; the first asks for it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.common import AXES, Cut, call_kernel, pairs, products, put, put_parts, shared, turned
from memformer.pallas.gpu.matrix_memory.token_scalars import Tokens

__all__ = ["backward", "forward"]


class _Walk:
    """Brings the blocks of one program, chunk by chunk, into one of two slots of shared memory.

    Args:
      cut: sizes.
      sources: arrays that come chunk by chunk: two with heads of keys, one of values, the rest cut into chunks.
      slots: two blocks for each of them.
      ready: barriers of the slots, that a chunk is there.
      free: barriers of the slots, that no warpgroup needs its chunk any more; nothing where there is one.
    """

    def __init__(self, cut: Cut, sources, slots, ready, free):
        self.cut, self.ready, self.free = cut, ready, free
        kinds = ("key", "key", "value") + ("chunk",) * (len(sources) - 3)
        self.copies = tuple(zip(sources, kinds, slots, strict=True))
        self.walker = lax.axis_index("walker") if free else 0

    def issue(self, n, slot) -> None:
        """Starts the copies of chunk n."""
        for source, kind, target in self.copies:
            for walker in range(self.cut.walkers if kind == "value" else 1):
                block = target.at[slot, walker] if kind == "value" else target.at[slot]
                plgpu.copy_gmem_to_smem(source.at[self.place(kind, n, walker)], block, self.ready.at[slot])

    def place(self, kind: str, n, walker):
        """Where chunk n of this program lies in a key, value or chunked array."""
        b, h, _ = (lax.axis_index(name) for name in AXES)
        tokens = pl.ds(n * self.cut.chunk, self.cut.chunk)
        if kind == "key":
            return b, tokens, lax.div(h, jnp.int32(self.cut.repeat))
        return (b, tokens, h, self.columns(walker)) if kind == "value" else (b, h, n)

    def columns(self, walker):
        """The value columns of a warpgroup."""
        block = lax.axis_index(AXES[2]) * self.cut.walkers + walker
        return pl.ds(block * self.cut.block, self.cut.block)

    def asks(self):
        """Whether this warpgroup asks for chunks."""
        return jnp.bool_(True) if not self.free else self.walker == 0

    def chunks(self, order, step, state: Array) -> Array:
        """step(n, refs, state) for every chunk; order(i) is the i-th one."""

        @pl.when(self.asks())
        def _():
            self.issue(order(0), 0)

        def body(i, state):
            slot, after = lax.rem(i, jnp.int32(2)), lax.rem(i + 1, jnp.int32(2))

            @pl.when((i + 1 < self.cut.chunks) & self.asks())
            def _():
                if self.free:
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(self.free[0].at[after]))
                self.issue(order(i + 1), after)

            plgpu.barrier_wait(self.ready.at[slot])
            refs = [
                target.at[slot, self.walker] if kind == "value" else target.at[slot] for _, kind, target in self.copies
            ]
            state = step(order(i), refs, state)
            if self.free:
                plgpu.barrier_arrive(self.free[0].at[slot])
            return state

        # Under shard_map what is loaded varies over mesh axes by its type, what is computed in a kernel does not.
        return lax.fori_loop(0, self.cut.chunks, body, state * 1.0)


def _forward_kernel(*refs, cut: Cut, save: bool):
    takes = 4 + 2 * cut.beta + bool(cut.names)
    inputs, start, refs = refs[:takes], refs[takes], refs[takes + 1 :]
    (o_g, end_g), refs = refs[:2], refs[2:]
    saved, refs = (refs[: 1 + 2 * cut.beta], refs[1 + 2 * cut.beta :]) if save else ((), refs)
    slots, (*blocks, ready), free = _parted(refs, takes, cut)
    walk = _Walk(cut, inputs, slots, ready, free)
    *state_s, o_s, left_s, w_s, u_s = _own(blocks, walk.walker, (1, 1, 1, 2 * cut.carries, 2 * cut.beta, 2 * cut.beta))
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns = walk.columns(walk.walker)

    def step(n, chunk, state):
        q, k, v, p, *rest = chunk
        tokens, place = Tokens(cut, rest[-1] if cut.names else None), walk.place("value", n, walk.walker)
        put_parts(state_s, state)
        writes = [v]
        if cut.beta or cut.carries:
            u = compat.load(v, plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(state_s[0], saved[0].at[b, h, n, :, columns])
        if cut.beta:
            (stored,) = products([(k, half) for half in state_s])
            put_parts(w_s, u - tokens.times(("enter",), stored))
            plgpu.commit_smem()
            (w,) = products(pairs(rest[:2], w_s))
            if save:
                put_parts(w_s, w)
            u, writes = tokens.times(("beta",), w), u_s
            put_parts(u_s, u)
        left = writes
        if cut.carries:
            left = left_s
            put_parts(left_s, tokens.times(("leave",), u))
        plgpu.commit_smem()
        if save and cut.beta:
            for half, target in zip(w_s, saved[1:], strict=True):
                plgpu.copy_smem_to_gmem(half, target.at[place])
        seen, read, written = products(
            [(q, half) for half in state_s], [(p, half) for half in writes], [(turned(k), half) for half in left]
        )
        put(o_s, read + tokens.times(("enter",), seen) * cut.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[place])
        plgpu.wait_smem_to_gmem(0)
        return tokens.keep(state) + written

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = walk.chunks(lambda i: i, step, state)


def forward(cut: Cut, save: bool, q, k, v, read, inverse, rows, start) -> tuple[Array, ...]:
    """O, the last state, and if `save` the states that enter chunks and, where writes replace, W by halves.

    Args:
      cut: sizes.
      save: whether the backward pass follows.
      q, k: [B, T, G, K] bfloat16.
      v: [B, T, H, V] bfloat16.
      read: P [B, H, N, C, C] bfloat16.
      inverse: X as two halves [B, H, N, C, C] bfloat16; () where writes add.
      rows: of the tokens.
      start: [B, H, K, V] float32.
    """
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    if save:
        out += [_states(cut), *[jax.ShapeDtypeStruct(v.shape, v.dtype)] * (2 * cut.beta)]
    body = functools.partial(_forward_kernel, cut=cut, save=save)
    return _call(cut, "forward", body, out, (q, k, v, read, *inverse, *rows), start, 1 + 2 * cut.carries + 4 * cut.beta)


def _backward_kernel(*refs, cut: Cut):
    takes = 4 + 2 * cut.beta + bool(cut.names)
    inputs, start, refs = refs[:takes], refs[takes], refs[takes + 1 :]
    (dv_g, states_g, end_g), refs = refs[:3], refs[3:]
    slots, (*blocks, ready), free = _parted(refs, takes, cut)
    walk = _Walk(cut, inputs, slots, ready, free)
    *state_s, dv_s, entered_s, u_s = _own(blocks, walk.walker, (1, 1, 1, 1, 2 * cut.beta))
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns = walk.columns(walk.walker)

    def step(n, chunk, state):
        q, k, do, p, *rest = chunk
        tokens = Tokens(cut, rest[-1] if cut.names else None)
        put_parts(state_s, state)
        put(entered_s, tokens.times(("enter",), compat.load(do, plgpu.Layout.WGMMA).astype(jnp.float32)) * cut.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s[0], states_g.at[b, h, n, :, columns])
        written, dv = products([(k, half) for half in state_s], ((turned(p), do),))
        dv = tokens.times(("beta",), dv + tokens.times(("leave",), written))
        sums = [(turned(q), entered_s)]
        if cut.beta:
            put_parts(u_s, dv)
            plgpu.commit_smem()
            (dv,) = products(pairs([turned(half) for half in rest[:2]], u_s))
            # Into the same buffers: the product above has been waited for.
            put_parts(u_s, tokens.times(("enter",), -dv))
            sums += [(turned(k), half) for half in u_s]
        put(dv_s, dv)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dv_s, dv_g.at[walk.place("value", n, walk.walker)])
        (before,) = products(sums)
        plgpu.wait_smem_to_gmem(0)
        return tokens.keep(state) + before

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = walk.chunks(lambda i: cut.chunks - 1 - i, step, state)


def backward(cut: Cut, q, k, do, read, inverse, rows, dend) -> tuple[Array, ...]:
    """dV, the gradients of the states that leave chunks, and that of the first state.

    Args:
      cut: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output [B, T, H, V] bfloat16.
      read, inverse, rows: as `forward` takes them.
      dend: gradient of the last state, [B, H, K, V] float32.
    """
    out = [jax.ShapeDtypeStruct(do.shape, do.dtype), _states(cut), jax.ShapeDtypeStruct(dend.shape, jnp.float32)]
    body = functools.partial(_backward_kernel, cut=cut)
    return _call(cut, "backward", body, out, (q, k, do, read, *inverse, *rows), dend, 2 + 2 * cut.beta)


def _parted(refs, takes: int, cut: Cut):
    """Slots, scratch, and barriers that a slot is free, of a kernel's scratch."""
    slots, rest = refs[:takes], refs[takes:]
    return (slots, rest[:-1], rest[-1:]) if cut.walkers > 1 else (slots, rest, ())


def _own(blocks, walker, counts: tuple[int, ...]) -> list:
    """The blocks of one warpgroup: one where the count is 1, else a list of so many."""
    left = iter([ref.at[walker] for ref in blocks])
    return [next(left) if count == 1 else [next(left) for _ in range(count)] for count in counts]


def _states(cut: Cut) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.chunks, cut.key, cut.value), jnp.bfloat16)


def _call(cut: Cut, name: str, body, out, chunked, state, values: int) -> tuple[Array, ...]:
    """One scan; `values` blocks of a chunk's value columns are its scratch, beside two of a state."""
    C, K, V, walkers = cut.chunk, cut.key, cut.block, cut.walkers
    block = functools.partial(shared, V)
    scratch = [block(2, C, K), block(2, C, K), block(2, walkers, C, V)]
    scratch += [block(2, C, C)] * (1 + 2 * cut.beta)
    scratch += [plgpu.SMEM((2, len(cut.names), C), jnp.float32)] * bool(cut.names)
    scratch += [block(walkers, K, V)] * 2 + [block(walkers, C, V)] * values
    scratch.append(plgpu.Barrier(num_arrivals=len(chunked) - 1 + walkers, num_barriers=2))
    threads = {}
    if walkers > 1:
        scratch.append(plgpu.Barrier(num_arrivals=walkers, num_barriers=2))
        threads = {"num_threads": walkers, "thread_name": "walker"}
    grid = (cut.batch, cut.heads, cut.value // (cut.block * walkers))
    return call_kernel(cut, name, body, grid, out, scratch, (*chunked, state), **threads)
