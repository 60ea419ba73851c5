"""Matrix memories in the chunkwise form on Hopper: the scan over chunks, the order of all kernels, and their gradients.

Forward: intra-chunk terms for all chunks in parallel (intra_chunk.py), then the scan over chunks, two Mosaic GPU
kernels here that carry the state. Backward: the reverse scan gives the gradients that flow through the state; the rest
is parallel over chunks again (intra_chunk_backward.py). Saved: the inputs, P, X, W and the state that enters each
chunk, or the inputs alone (`remat`). Arrays stay as the call has them, [B, T, H, K].

With S the state that enters a chunk, P and X from intra_chunk.py, c, b and w the token scalars decay_in, beta and
decay_out, s the scale, the forward scan computes

    W = X (V - c K S)      U = b W      O = s c Q S + P U      S' = c_C S + K^T (w U)

and the backward scan, from the last chunk to the first, with dS and dS' the gradients of S and S',

    dV = X^T b (P^T dO + w K dS')       dS = c_C dS' + Q^T (s c dO) - K^T (c dV)

Where writes add, X and b are one, W = V and the last term is absent.

What cancels when keys repeat (K S, X times the difference, K^T U, and their gradients) takes its float32 operands as
sums of two bfloat16 parts, 16 bits. With identical keys and beta 2, single bfloat16 operands lost 11% of the output in
128 tokens.

Each warpgroup scans the chunks of one head and one block of value columns, which are independent of each other. The
state stays in registers as wgmma's accumulators, and the next chunk is copied (TMA) while one is computed. Two
warpgroups of a program share what all value columns need; the first one issues the copies.

Source: arXiv 2406.06484 (chunkwise delta rule), 2312.06635 (linear attention), 2412.06464 and 2405.21060 (per-head
decay).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import MatrixCall
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel, plan_call
from memformer.pallas.gpu.matrix_memory.intra_chunk import intra_chunk
from memformer.pallas.gpu.matrix_memory.intra_chunk_backward import intra_chunk_backward
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars, stack_scalars
from memformer.pallas.gpu.wgmma import partial_products, products, shared_block, store, store_split, transposed
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]

# Where the heads are: in arrays over time, and in all others.
TIME, OTHER = 2, 1


class _ChunkStream:
    """Copies the blocks of one program, chunk by chunk, into one of two slots of shared memory.

    Args:
      config: sizes.
      sources: arrays to copy: two with key heads, one of values, then those that have an axis of chunks.
      slots: two blocks for each of them.
      ready: barriers of the slots: the chunk has arrived.
      free: barriers of the slots: no warpgroup needs the chunk any more. Empty with one warpgroup.
    """

    def __init__(self, config: ScanConfig, sources, slots, ready, free):
        self.config, self.ready, self.free = config, ready, free
        kinds = ("key", "key", "value") + ("chunk",) * (len(sources) - 3)
        self.copies = tuple(zip(sources, kinds, slots, strict=True))
        self.warpgroup = lax.axis_index("warpgroup") if free else 0

    def issue(self, n, slot) -> None:
        """Starts the copies of chunk n."""
        for source, kind, target in self.copies:
            for warpgroup in range(self.config.warpgroups if kind == "value" else 1):
                block = target.at[slot, warpgroup] if kind == "value" else target.at[slot]
                plgpu.copy_gmem_to_smem(source.at[self.place(kind, n, warpgroup)], block, self.ready.at[slot])

    def place(self, kind: str, n, warpgroup):
        """Index of chunk n of this program in an array of this kind."""
        b, h, _ = (lax.axis_index(name) for name in AXES)
        tokens = pl.ds(n * self.config.chunk, self.config.chunk)
        if kind == "key":
            return b, tokens, lax.div(h, jnp.int32(self.config.repeat))
        return (b, tokens, h, self.columns(warpgroup)) if kind == "value" else (b, h, n)

    def columns(self, warpgroup):
        """The value columns of a warpgroup."""
        block = lax.axis_index(AXES[2]) * self.config.warpgroups + warpgroup
        return pl.ds(block * self.config.value_block, self.config.value_block)

    def issues_copies(self):
        """Whether this warpgroup issues the copies."""
        return jnp.bool_(True) if not self.free else self.warpgroup == 0

    def scan(self, order, step, state: Array) -> Array:
        """Carries a state through step(n, refs, state) of every chunk; order(i) is the i-th chunk."""

        @pl.when(self.issues_copies())
        def _():
            self.issue(order(0), 0)

        def body(i, state):
            slot, after = lax.rem(i, jnp.int32(2)), lax.rem(i + 1, jnp.int32(2))

            @pl.when((i + 1 < self.config.chunks) & self.issues_copies())
            def _():
                if self.free:
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(self.free[0].at[after]))
                self.issue(order(i + 1), after)

            plgpu.barrier_wait(self.ready.at[slot])
            refs = [
                target.at[slot, self.warpgroup] if kind == "value" else target.at[slot]
                for _, kind, target in self.copies
            ]
            state = step(order(i), refs, state)
            if self.free:
                plgpu.barrier_arrive(self.free[0].at[slot])
            return state

        # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
        return lax.fori_loop(0, self.config.chunks, body, state * 1.0)


def _forward_kernel(*refs, config: ScanConfig, save: bool):
    count = 4 + 2 * config.beta + bool(config.scalars)
    inputs, start, refs = refs[:count], refs[count], refs[count + 1 :]
    (o_g, end_g), refs = refs[:2], refs[2:]
    saved, refs = (refs[: 1 + 2 * config.beta], refs[1 + 2 * config.beta :]) if save else ((), refs)
    slots, (*blocks, ready), free = _split_scratch(config, refs, count)
    stream = _ChunkStream(config, inputs, slots, ready, free)
    counts = (1, 1, 1, 2 * config.carries, 2 * config.beta, 2 * config.beta)
    *state_s, o_s, decayed_s, w_s, u_s = _own_blocks(blocks, stream.warpgroup, counts)
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns = stream.columns(stream.warpgroup)

    def step(n, chunk, state):
        q, k, v, p, *rest = chunk
        scalars = TokenScalars(config, rest[-1] if config.scalars else None)
        place = stream.place("value", n, stream.warpgroup)
        store_split(state_s, state)
        writes = [v]
        if config.beta or config.carries:
            u = compat.load(v, plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(state_s[0], saved[0].at[b, h, n, :, columns])
        if config.beta:
            (stored,) = products([(k, part) for part in state_s])
            store_split(w_s, u - scalars.scale_rows(("decay_in",), stored))
            plgpu.commit_smem()
            (w,) = products(partial_products(rest[:2], w_s))
            if save:
                store_split(w_s, w)
            u, writes = scalars.scale_rows(("beta",), w), u_s
            store_split(u_s, u)
        decayed = writes
        if config.carries:
            decayed = decayed_s
            store_split(decayed_s, scalars.scale_rows(("decay_out",), u))
        plgpu.commit_smem()
        if save and config.beta:
            for part, target in zip(w_s, saved[1:], strict=True):
                plgpu.copy_smem_to_gmem(part, target.at[place])
        from_state, from_chunk, written = products(
            [(q, part) for part in state_s],
            [(p, part) for part in writes],
            [(transposed(k), part) for part in decayed],
        )
        store(o_s, from_chunk + scalars.scale_rows(("decay_in",), from_state) * config.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[place])
        plgpu.wait_smem_to_gmem(0)
        return scalars.decay_state(state) + written

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = stream.scan(lambda i: i, step, state)


def _scan_forward(config: ScanConfig, save: bool, q, k, v, qk, inverse, scalars, start) -> tuple[Array, ...]:
    """O, the last state and, to be saved, the states that enter chunks and W in two parts (without beta no W).

    Args:
      config: sizes.
      save: whether the backward pass follows.
      q, k: [B, T, G, K] bfloat16.
      v: [B, T, H, V] bfloat16.
      qk: P [B, H, N, C, C] bfloat16.
      inverse: X in two parts [B, H, N, C, C] bfloat16; () where writes add.
      scalars: the token scalars, if there are any.
      start: [B, H, K, V] float32.
    """
    out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    if save:
        out += [_states(config), *[jax.ShapeDtypeStruct(v.shape, v.dtype)] * (2 * config.beta)]
    body = functools.partial(_forward_kernel, config=config, save=save)
    operands = (q, k, v, qk, *inverse, *scalars)
    blocks = 1 + 2 * config.carries + 4 * config.beta
    return _call(config, "chunk_scan_forward", body, out, operands, start, blocks)


def _backward_kernel(*refs, config: ScanConfig):
    count = 4 + 2 * config.beta + bool(config.scalars)
    inputs, start, refs = refs[:count], refs[count], refs[count + 1 :]
    (dv_g, states_g, end_g), refs = refs[:3], refs[3:]
    slots, (*blocks, ready), free = _split_scratch(config, refs, count)
    stream = _ChunkStream(config, inputs, slots, ready, free)
    *state_s, dv_s, do_s, du_s = _own_blocks(blocks, stream.warpgroup, (1, 1, 1, 1, 2 * config.beta))
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns = stream.columns(stream.warpgroup)

    def step(n, chunk, state):
        q, k, do, p, *rest = chunk
        scalars = TokenScalars(config, rest[-1] if config.scalars else None)
        store_split(state_s, state)
        decayed = scalars.scale_rows(("decay_in",), compat.load(do, plgpu.Layout.WGMMA).astype(jnp.float32))
        store(do_s, decayed * config.scale)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s[0], states_g.at[b, h, n, :, columns])
        through_state, dv = products([(k, part) for part in state_s], ((transposed(p), do),))
        dv = scalars.scale_rows(("beta",), dv + scalars.scale_rows(("decay_out",), through_state))
        sums = [(transposed(q), do_s)]
        if config.beta:
            store_split(du_s, dv)
            plgpu.commit_smem()
            (dv,) = products(partial_products([transposed(part) for part in rest[:2]], du_s))
            # The product above has finished, so its blocks can be reused.
            store_split(du_s, scalars.scale_rows(("decay_in",), -dv))
            sums += [(transposed(k), part) for part in du_s]
        store(dv_s, dv)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dv_s, dv_g.at[stream.place("value", n, stream.warpgroup)])
        (through_chunk,) = products(sums)
        plgpu.wait_smem_to_gmem(0)
        return scalars.decay_state(state) + through_chunk

    state = compat.load(start.at[b, h, :, columns], plgpu.Layout.WGMMA, optimized=False)
    end_g[b, h, :, columns] = stream.scan(lambda i: config.chunks - 1 - i, step, state)


def _scan_backward(config: ScanConfig, q, k, do, qk, inverse, scalars, dend) -> tuple[Array, ...]:
    """dV, the gradients of the states that leave chunks, and the gradient of the first state.

    Args:
      config: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      qk, inverse, scalars: see `_scan_forward`.
      dend: gradient of the last state, [B, H, K, V] float32.
    """
    out = [jax.ShapeDtypeStruct(do.shape, do.dtype), _states(config), jax.ShapeDtypeStruct(dend.shape, jnp.float32)]
    body = functools.partial(_backward_kernel, config=config)
    operands = (q, k, do, qk, *inverse, *scalars)
    return _call(config, "chunk_scan_backward", body, out, operands, dend, 2 + 2 * config.beta)


def _split_scratch(config: ScanConfig, refs, count: int):
    """Slots, scratch and the barriers of free slots."""
    slots, rest = refs[:count], refs[count:]
    return (slots, rest[:-1], rest[-1:]) if config.warpgroups > 1 else (slots, rest, ())


def _own_blocks(blocks, warpgroup, counts: tuple[int, ...]) -> list:
    """The scratch of one warpgroup: a block where the count is 1, else a list of blocks."""
    own = iter([ref.at[warpgroup] for ref in blocks])
    return [next(own) if count == 1 else [next(own) for _ in range(count)] for count in counts]


def _states(config: ScanConfig) -> jax.ShapeDtypeStruct:
    shape = (config.batch, config.heads, config.chunks, config.key, config.value)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _call(config: ScanConfig, name: str, body, out, operands, state, blocks: int) -> tuple[Array, ...]:
    """Launches a scan with `blocks` blocks of a chunk's value columns as scratch, beside two of a state."""
    C, K, V, warpgroups = config.chunk, config.key, config.value_block, config.warpgroups
    block = functools.partial(shared_block, columns=V)
    scratch = [block(2, C, K), block(2, C, K), block(2, warpgroups, C, V)]
    scratch += [block(2, C, C)] * (1 + 2 * config.beta)
    scratch += [plgpu.SMEM((2, len(config.scalars), C), jnp.float32)] * bool(config.scalars)
    scratch += [block(warpgroups, K, V)] * 2 + [block(warpgroups, C, V)] * blocks
    scratch.append(plgpu.Barrier(num_arrivals=len(operands) - 1 + warpgroups, num_barriers=2))
    threads = {}
    if warpgroups > 1:
        scratch.append(plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2))
        threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
    grid = (config.batch, config.heads, config.value // (V * warpgroups))
    return call_kernel(config, name, body, grid, out, scratch, (*operands, state), **threads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(config: ScanConfig, q, k, v, scalars, start):
    return _forward(config, False, q, k, v, scalars, start)[:2]


def _chunkwise_forward(config, q, k, v, scalars, start):
    if config.remat == "inputs":
        return _chunkwise(config, q, k, v, scalars, start), (q, k, v, scalars, start)
    o, end, *saved = _forward(config, True, q, k, v, scalars, start)
    return (o, end), (q, k, v, scalars, saved)


def _chunkwise_backward(config, inputs, cotangents):
    q, k, v, scalars, saved = inputs
    do, dend = cotangents
    if config.remat == "inputs":
        saved = _forward(config, True, q, k, v, scalars, saved)[2:]
    squares = 1 + 2 * config.beta
    kernels = split_batch_and_heads(
        _backward_kernels,
        (config,),
        config.axes,
        operands=(TIME,) * 4 + (OTHER,) * (2 + squares) + (TIME,) * (2 * config.beta) + (OTHER,) * len(scalars),
        results=(TIME,) * 3 + (OTHER,) * (1 + len(scalars)),
    )
    dq, dk, dv, dstart, *dscalars = kernels(q, k, v, do, dend, *saved, *scalars)
    return dq, dk, dv, tuple(dscalars), dstart


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def _forward(config: ScanConfig, save: bool, q, k, v, scalars, start) -> tuple[Array, ...]:
    """O, the last state and, to be saved, P, X, the states that enter chunks, and W."""
    squares = 1 + 2 * config.beta
    kernels = split_batch_and_heads(
        _forward_kernels,
        (config, save),
        config.axes,
        operands=(TIME,) * 3 + (OTHER,) * (1 + len(scalars)),
        results=(TIME, OTHER) + ((OTHER,) * (squares + 1) + (TIME,) * (2 * config.beta)) * save,
    )
    return tuple(kernels(q, k, v, start, *scalars))


def _forward_kernels(config: ScanConfig, save: bool, q, k, v, start, *scalars) -> tuple[Array, ...]:
    """One device's shard of `_forward`."""
    config = config.local(q, v)
    qk, inverse = intra_chunk(config, q, k, scalars)
    o, end, *saved = _scan_forward(config, save, q, k, v, qk, inverse, scalars, start)
    return (o, end, qk, *inverse, *saved) if save else (o, end)


def _backward_kernels(config: ScanConfig, q, k, v, do, dend, qk, *rest) -> tuple[Array, ...]:
    """One device's shard of the gradients; rest: X, the states that enter chunks, W and the token scalars."""
    config, parts = config.local(q, v), 2 * config.beta
    inverse, states, w, scalars = rest[:parts], rest[parts], rest[parts + 1 : 2 * parts + 1], rest[2 * parts + 1 :]
    dv, dstates, dstart = _scan_backward(config, q, k, do, qk, inverse, scalars, dend)
    values = (w, (dv,)) if config.beta else ((v,), ())
    dq, dk, dscalars = intra_chunk_backward(config, q, k, do, *values, states, dstates, scalars)
    return (dq, dk, dv, dstart, *dscalars)


def run(call: MatrixCall, remat: str = tuning.REMAT[0]) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the delta rule, or linear attention where the call has no beta; one write per token.

    Args:
      call: one write per token.
      remat: see `ScanConfig`.

    Returns:
      The output in bfloat16, and the state in float32.

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    config = plan_call(call, remat)
    length, key, value = call.q.shape[1], call.q.shape[-1], call.v.shape[-1]

    def pad(x, width):
        return pad_time(pad_time(x, config.chunk), width, axis=3)

    q, k, v = pad(call.q, config.key), pad(call.k, config.key), pad(call.v, config.value)
    scalars = stack_scalars(config, call)
    state = pad_time(pad_time(call.state.astype(jnp.float32), config.key, axis=2), config.value, axis=3)
    o, end = _chunkwise(config, q, k, v, scalars, vary_like(state, q, k, v, *scalars))
    return o[:, :length, :, :value], end[:, :, :key, :value]
