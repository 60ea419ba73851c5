"""The scans over chunks, forward and backward: Mosaic GPU kernels. Equations and letters: chunk_scan.py.

A program scans the chunks of one head. Each of its computing warpgroups keeps the transpose of 64 value columns of the
state, S^T [64, K], in registers, as wgmma leaves its accumulators, and computes the transpose of each equation: what
depends on the state is then the left operand of a product, which wgmma takes from registers. So nothing of the chain
of a chunk passes through shared memory, and right operands have 64 columns or more: with 32 the tensor cores wait for
shared memory. Another warpgroup copies the blocks of the chunks (TMA) into slots ahead of those that compute.

These kernels have no automatic barriers. Threads of a warpgroup exchange data through shared memory only where a block
is staged for a copy to global memory, which `_stage` orders. Slots are written by copies alone; every thread waits for
their barrier, and releases the slot itself after its last read.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.gpu.matrix_memory.config import AXES, ScanConfig, call_kernel
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import products, shared_block, split_bf16, transposed

__all__ = ["scan_backward", "scan_forward"]


class _Refs(dict):
    """References of a kernel by name."""

    __getattr__ = dict.__getitem__


class _Chunks:
    """The chunks of a program, in slots of shared memory.

    Args:
      config: sizes.
      refs: of the kernel: each of `names`, its slots, and the barriers `ready` (a chunk has arrived) and `free` (no
        warpgroup needs it any more).
      names: of the arrays to copy.
      order: from the number of a step to the chunk.
    """

    def __init__(self, config: ScanConfig, refs: _Refs, names: Sequence[str], order: Callable):
        self.config, self.refs, self.names, self.order = config, refs, names, order

    def place(self, name: str, n, warpgroup=0):
        """Index of chunk n of this program in an array."""
        b, h, _ = (lax.axis_index(axis) for axis in AXES)
        tokens = pl.ds(n * self.config.chunk, self.config.chunk)
        if name in ("q", "k"):
            return b, tokens, lax.div(h, jnp.int32(self.config.repeat))
        return (b, tokens, h, self.columns(warpgroup)) if name in ("v", "do", "o") else (b, h, n)

    def columns(self, warpgroup):
        """The value columns of a warpgroup."""
        width = self.config.value_rows
        return pl.ds((lax.axis_index(AXES[2]) * self.config.warpgroups + warpgroup) * width, width)

    def copy(self) -> None:
        """Copies all chunks, each once its slot is free."""
        refs, chunks = self.refs, self.config.chunks

        @pl.loop(0, chunks)
        def _(i):
            slot, n = lax.rem(i, jnp.int32(tuning.SCAN_SLOTS)), self.order(i)
            pl.when(i >= tuning.SCAN_SLOTS)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            for name in self.names:
                for g in range(self.config.warpgroups if name in ("v", "do") else 1):
                    target = refs[f"{name}_slots"].at[slot]
                    target = target.at[g] if name in ("v", "do") else target
                    plgpu.copy_gmem_to_smem(refs[name].at[self.place(name, n, g)], target, refs.ready.at[slot])

        # The last releases.
        @pl.loop(max(chunks - tuning.SCAN_SLOTS, 0), chunks)
        def _(i):
            plgpu.barrier_wait(refs.free.at[lax.rem(i, jnp.int32(tuning.SCAN_SLOTS))])

    def scan(self, warpgroup, step: Callable, state: Array) -> Array:
        """Carries a state through step(n, refs, release, state) of every chunk; each step calls `release` once."""

        def body(i, state):
            slot = lax.rem(i, jnp.int32(tuning.SCAN_SLOTS))
            plgpu.barrier_wait(self.refs.ready.at[slot])
            blocks = {name: self.refs[f"{name}_slots"].at[slot] for name in self.names}
            own = {name: block.at[warpgroup] for name, block in blocks.items() if name in ("v", "do")}
            release = functools.partial(plgpu.barrier_arrive, self.refs.free.at[slot])
            return step(self.order(i), _Refs(blocks | own), release, state)

        # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
        return lax.fori_loop(0, self.config.chunks, body, state * 1.0)


def _load_transposed(ref) -> Array:
    """The transpose of a block of shared memory, as wgmma leaves its accumulators."""
    return plgpu.layout_cast(compat.load(transposed(ref), plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)


def _stage(states: Sequence[tuple] = (), tokens: Sequence[tuple] = ()) -> None:
    """Starts copies of bfloat16 matrices to global memory, through shared memory.

    Args:
      states: of a state, S^T [64, K]: the matrix, the block of shared memory and the target.
      tokens: of what is stored per token: the matrix, as its transpose [64, C], the block and the target.
    """
    # Every thread waits here until the last copies have read their blocks.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for x, block, _ in states:
        block[...] = x
    for x, block, _ in tokens:
        transposed(block)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    for _, block, target in (*states, *tokens):
        plgpu.copy_smem_to_gmem(block, target)


def _accumulator(config: ScanConfig):
    return plgpu.ACC((config.value_rows, config.chunk), jnp.float32)


def _forward_kernel(refs: _Refs, chunks: _Chunks, config: ScanConfig, save: bool, g) -> None:
    b, h, _ = (lax.axis_index(axis) for axis in AXES)
    columns = chunks.columns(g)

    def step(n, chunk: _Refs, release, state):
        scalars = TokenScalars(config, chunk.get("scalars"))
        place, operand = chunks.place("o", n, g), state.astype(jnp.bfloat16)
        saved = [(operand, refs.state_stage.at[g], refs.states.at[b, h, n, columns])] if save else []
        # Products run in the order in which they are issued. What the thread computes between an issue and the wait
        # for it overlaps.

        def read(from_state, *stored):
            for accumulator, ref in zip((*stored, from_state), (chunk.k, chunk.q)[1 - len(stored) :], strict=True):
                plgpu.wgmma(accumulator, operand, transposed(ref))
            v = _load_transposed(chunk.v)
            if not config.beta:
                if save:
                    _stage(saved)
                o = scalars.scale_tokens(("decay_in",), from_state[...], config.scale)
                return write(o, v.astype(jnp.float32), (v,))
            erased = scalars.scale_tokens(("decay_in",), plgpu.wgmma_accumulator_load(stored[0], wait_n=1))
            difference = v.astype(jnp.float32) - erased

            def solve(accumulator):
                high, low = split_bf16(difference, 2)
                for part, x in ((high, "x0"), (high, "x1"), (low, "x0")):
                    plgpu.wgmma(accumulator, part, transposed(chunk[x]))
                o = scalars.scale_tokens(
                    ("decay_in",), plgpu.wgmma_accumulator_load(from_state, wait_n=3), config.scale
                )
                return o, accumulator[...]

            o, w = pl.run_scoped(solve, _accumulator(config))
            if save:
                parts = zip(split_bf16(w, 2), ("o_stage", "w_stage"), ("w0", "w1"), strict=True)
                _stage(saved, [(x, refs[block].at[g], refs[name].at[place]) for x, block, name in parts])
            u = scalars.scale_tokens(("beta",), w)
            return write(o, u, split_bf16(u, 2))

        def write(o, u, writes):
            def run(accumulators):
                of_output, of_state = accumulators
                for part in writes:
                    plgpu.wgmma(of_output, part, transposed(chunk.p))
                decayed = split_bf16(scalars.scale_tokens(("decay_out",), u), 2) if config.carries else writes
                for part in decayed:
                    plgpu.wgmma(of_state, part, chunk.k)
                o = plgpu.wgmma_accumulator_load(of_output, wait_n=len(decayed))
                _stage(tokens=[(o.astype(jnp.bfloat16), refs.o_stage.at[g], refs.o.at[place])])

            return pl.run_state(run)((plgpu.ACC.init(o), plgpu.ACC.init(scalars.decay_state(state))))[1]

        after = pl.run_scoped(read, *[_accumulator(config)] * (1 + config.beta))
        release()
        return after

    state = compat.load(refs.start.at[b, h, columns], plgpu.Layout.WGMMA, optimized=False)
    refs.end[b, h, columns] = chunks.scan(g, step, state)
    plgpu.wait_smem_to_gmem(0)


def scan_forward(config: ScanConfig, save: bool, q, k, v, qk, inverse, scalars, start) -> tuple[Array, ...]:
    """O, the last state and, to be saved, the states that enter chunks and W in two parts (without beta no W).

    Args:
      config: sizes.
      save: whether the backward pass follows.
      q, k: [B, T, G, K] bfloat16.
      v: [B, T, H, V] bfloat16.
      qk: P [B, H, N, C, C] bfloat16.
      inverse: X in two parts [B, H, N, C, C] bfloat16; () where writes add.
      scalars: the token scalars, if there are any.
      start: [B, H, V, K] float32.
    """
    out = {"o": (v.shape, v.dtype), "end": (start.shape, jnp.float32)}
    stages = {"o_stage": (config.chunk, config.value_rows)}
    if save:
        out["states"] = _states(config)
        stages["state_stage"] = (config.value_rows, config.key)
        if config.beta:
            out |= {f"w{i}": (v.shape, v.dtype) for i in range(2)}
            stages["w_stage"] = stages["o_stage"]
    inputs = {"q": q, "k": k, "v": v, "p": qk}
    kernel = functools.partial(_forward_kernel, save=save)
    return _call(config, "chunk_scan_forward", kernel, lambda i: i, inputs, inverse, scalars, start, out, stages)


def _backward_kernel(refs: _Refs, chunks: _Chunks, config: ScanConfig, g) -> None:
    b, h, _ = (lax.axis_index(axis) for axis in AXES)
    columns = chunks.columns(g)

    def step(n, chunk: _Refs, release, state):
        scalars = TokenScalars(config, chunk.get("scalars"))
        operand, do = state.astype(jnp.bfloat16), _load_transposed(chunk.do)
        through_state, dv = products([(operand, transposed(chunk.k))], [(do, chunk.p)])
        dv = scalars.scale_tokens(("beta",), dv + scalars.scale_tokens(("decay_out",), through_state))
        decayed = scalars.scale_tokens(("decay_in",), do.astype(jnp.float32), config.scale).astype(jnp.bfloat16)

        def run(of_state):
            def solve(accumulator):
                high, low = split_bf16(dv, 2)
                for part, x in ((high, "x0"), (high, "x1"), (low, "x0")):
                    plgpu.wgmma(accumulator, part, chunk[x])
                plgpu.wgmma(of_state, decayed, chunk.q)
                return plgpu.wgmma_accumulator_load(accumulator, wait_n=1)

            if config.beta:
                of_values = pl.run_scoped(solve, _accumulator(config))
                for part in split_bf16(scalars.scale_tokens(("decay_in",), -of_values), 2):
                    plgpu.wgmma(of_state, part, chunk.k)
            else:
                of_values = dv
                plgpu.wgmma(of_state, decayed, chunk.q)
            _stage(
                [(operand, refs.state_stage.at[g], refs.states.at[b, h, n, columns])],
                [(of_values.astype(jnp.bfloat16), refs.dv_stage.at[g], refs.dv.at[chunks.place("do", n, g)])],
            )

        after = pl.run_state(run)(plgpu.ACC.init(scalars.decay_state(state)))
        release()
        return after

    state = compat.load(refs.start.at[b, h, columns], plgpu.Layout.WGMMA, optimized=False)
    refs.end[b, h, columns] = chunks.scan(g, step, state)
    plgpu.wait_smem_to_gmem(0)


def scan_backward(config: ScanConfig, q, k, do, qk, inverse, scalars, dend) -> tuple[Array, ...]:
    """dV, the gradients of the states that leave chunks, and the gradient of the first state.

    Args:
      config: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      qk, inverse, scalars: see `scan_forward`.
      dend: gradient of the last state, [B, H, V, K] float32.
    """
    out = {"dv": (do.shape, do.dtype), "states": _states(config), "end": (dend.shape, jnp.float32)}
    stages = {"dv_stage": (config.chunk, config.value_rows), "state_stage": (config.value_rows, config.key)}
    inputs, last = {"q": q, "k": k, "do": do, "p": qk}, config.chunks - 1
    return _call(
        config, "chunk_scan_backward", _backward_kernel, lambda i: last - i, inputs, inverse, scalars, dend, out, stages
    )


def _states(config: ScanConfig) -> tuple[tuple[int, ...], Any]:
    return (config.batch, config.heads, config.chunks, config.value, config.key), jnp.bfloat16


def _call(
    config: ScanConfig, name: str, kernel: Callable, order: Callable, inputs, inverse, scalars, start, out, stages
) -> tuple[Array, ...]:
    """Launches a scan.

    Args:
      config: sizes.
      name: of the kernel.
      kernel: body of a computing warpgroup.
      order: from the number of a step to the chunk.
      inputs: arrays of keys, values and P by name.
      inverse, scalars: see `scan_forward`.
      start: [B, H, V, K] float32.
      out: shapes and dtypes of the results by name.
      stages: shapes of a warpgroup's blocks for copies to global memory, by name.
    """
    inputs = inputs | {f"x{i}": x for i, x in enumerate(inverse)} | dict(zip(["scalars"], scalars, strict=False))
    C, warpgroups, slots = config.chunk, config.warpgroups, tuning.SCAN_SLOTS
    shapes = {"q": (C, config.key), "k": (C, config.key)}
    shapes |= dict.fromkeys(("v", "do"), (warpgroups, C, config.value_rows))
    scratch: dict[str, Any] = {
        f"{name}_slots": shared_block(slots, *shapes.get(name, (C, C))) for name in inputs if name != "scalars"
    }
    if scalars:
        scratch["scalars_slots"] = plgpu.SMEM((slots, len(config.scalars), C), jnp.float32)
    scratch |= {name: shared_block(warpgroups, *shape) for name, shape in stages.items()}
    copies = len(inputs) - 1 + warpgroups
    scratch["ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    scratch["free"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots)
    names = (*inputs, "start", *out, *scratch)

    def body(*flat):
        refs, warpgroup = _Refs(zip(names, flat, strict=True)), lax.axis_index("warpgroup")
        chunks = _Chunks(config, refs, tuple(inputs), order)

        @pl.when(warpgroup < warpgroups)
        def _():
            if warpgroups > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[0], action="increase")
            kernel(refs, chunks, config=config, g=warpgroup if warpgroups > 1 else 0)

        @pl.when(warpgroup == warpgroups)
        def _():
            if warpgroups > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[1], action="decrease")
            chunks.copy()

    return call_kernel(
        config,
        name,
        body,
        (config.batch, config.heads, config.value // (config.value_rows * warpgroups)),
        [jax.ShapeDtypeStruct(*shape) for shape in out.values()],
        list(scratch.values()),
        (*inputs.values(), start),
        automatic_barriers=False,
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )
