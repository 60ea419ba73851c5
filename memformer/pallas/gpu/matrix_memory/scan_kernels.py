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
from memformer.pallas.gpu.wgmma import Refs, products, shared_block, split_bf16, transposed

__all__ = ["scan_backward", "scan_forward", "scan_states"]

# Inputs of which each warpgroup has its own columns.
VALUES = ("v", "do")


class _Chunks:
    """The chunks of a program, in slots of shared memory.

    Args:
      config: sizes.
      refs: of the kernel: each of `names`, its slots, and the barriers `ready` (a chunk has arrived) and `free` (no
        warpgroup needs it any more).
      names: of the arrays to copy.
      parts: of the time that are scanned; `first` is the first of them.
      warpgroups: that compute.
      reverse: whether the last chunk comes first.
    """

    def __init__(
        self, config: ScanConfig, refs: Refs, names: Sequence[str], parts: int, first: int, warpgroups: int, reverse
    ):
        self.config, self.refs, self.names, self.warpgroups, self.reverse = config, refs, names, warpgroups, reverse
        self.batch_row, self.head, index = (lax.axis_index(axis) for axis in AXES)
        self.steps = config.chunks // config.parts
        # Programs of one part are neighbours.
        programs = refs.start.shape[3] // (config.value_rows * warpgroups)
        self.part, self.block = (lax.div(index, jnp.int32(programs)), lax.rem(index, jnp.int32(programs)))
        if parts == 1:
            self.part, self.block = 0, index
        self.begin = (self.part + first) * self.steps

    def chunk(self, i):
        """The chunk of a step."""
        return self.begin + (self.steps - 1 - i if self.reverse else i)

    def columns(self, warpgroup):
        """The value columns of a warpgroup."""
        width = self.config.value_rows
        return pl.ds((self.block * self.warpgroups + warpgroup) * width, width)

    def place(self, name: str, n, warpgroup=0):
        """Index of chunk n of this program in an array."""
        b, h, tokens = self.batch_row, self.head, pl.ds(n * self.config.chunk, self.config.chunk)
        if name in ("q", "k"):
            return b, tokens, lax.div(h, jnp.int32(self.config.repeat))
        if name == "states":
            return b, h, n, self.columns(warpgroup)
        return (b, tokens, h, self.columns(warpgroup)) if name in (*VALUES, "o", "w0", "w1", "dv") else (b, h, n)

    def copy(self) -> None:
        """Copies all chunks, each once its slot is free."""
        refs, slots = self.refs, tuning.SCAN_SLOTS

        @pl.loop(0, self.steps)
        def _(i):
            slot, n = lax.rem(i, jnp.int32(slots)), self.chunk(i)
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            for name in self.names:
                for g in range(self.warpgroups if name in VALUES else 1):
                    target = refs[f"{name}_slots"].at[slot]
                    target = target.at[g] if name in VALUES else target
                    plgpu.copy_gmem_to_smem(refs[name].at[self.place(name, n, g)], target, refs.ready.at[slot])

        # The last releases.
        @pl.loop(max(self.steps - slots, 0), self.steps)
        def _(i):
            plgpu.barrier_wait(refs.free.at[lax.rem(i, jnp.int32(slots))])

    def scan(self, warpgroup, step: Callable) -> None:
        """Carries the state through step(refs, targets, state) of every chunk, from `start` to `end`.

        Args:
          warpgroup: this one.
          step: of one chunk; targets(name, block) is a block of shared memory and the place in the array of that name
            to which it goes.
        """
        refs = self.refs

        def body(i, state):
            slot, n = lax.rem(i, jnp.int32(tuning.SCAN_SLOTS)), self.chunk(i)
            plgpu.barrier_wait(refs.ready.at[slot])
            blocks = {name: refs[f"{name}_slots"].at[slot] for name in self.names}
            own = {name: block.at[warpgroup] for name, block in blocks.items() if name in VALUES}

            def targets(name, block):
                return refs[block].at[warpgroup], refs[name].at[self.place(name, n, warpgroup)]

            state = step(Refs(blocks | own), targets, state)
            plgpu.barrier_arrive(refs.free.at[slot])
            return state

        place = (self.batch_row, self.head, self.part, self.columns(warpgroup))
        state = compat.load(refs.start.at[place], plgpu.Layout.WGMMA, optimized=False)
        # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
        refs.end[place] = lax.fori_loop(0, self.steps, body, state * 1.0)
        plgpu.wait_smem_to_gmem(0)


def _load_transposed(ref) -> Array:
    """The transpose of a block of shared memory, as wgmma leaves its accumulators."""
    return plgpu.layout_cast(compat.load(transposed(ref), plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)


def _stage(states: Sequence[tuple] = (), tokens: Sequence[tuple] = ()) -> None:
    """Starts copies of bfloat16 matrices to global memory, through shared memory.

    The barrier in it also ends this warpgroup's loads from a slot: copies to it come after.

    Args:
      states: of a state, S^T [64, K]: the matrix, and the block of shared memory with the target.
      tokens: of what is stored per token: the matrix, as its transpose [64, C], and block and target.
    """
    # Every thread waits here until the last copies have read their blocks.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for x, (block, _) in states:
        block[...] = x
    for x, (block, _) in tokens:
        transposed(block)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    for _, (block, target) in (*states, *tokens):
        plgpu.copy_smem_to_gmem(block, target)


def _accumulator(config: ScanConfig):
    return plgpu.ACC((config.value_rows, config.chunk), jnp.float32)


def _forward_kernel(chunks: _Chunks, config: ScanConfig, g) -> None:
    saves = "states" in chunks.refs

    def step(chunk: Refs, targets, state):
        scalars, reads = TokenScalars(config, chunk.get("scalars")), "q" in chunk
        operand = state.astype(jnp.bfloat16)
        saved = [(operand, targets("states", "state_stage"))] if saves else []
        # Products run in the order in which they are issued. What the thread computes between an issue and the wait
        # for it overlaps.

        def read(*accumulators):
            for accumulator, name in zip(accumulators, "k" * config.beta + "q" * reads, strict=True):
                plgpu.wgmma(accumulator, operand, transposed(chunk[name]))
            v = _load_transposed(chunk.v) if "v" in chunk else None
            if not config.beta:
                if saves:
                    _stage(saved)
                return write(_output(accumulators[-1], 0) if reads else None, v.astype(jnp.float32), (v,))
            erased = scalars.scale_tokens(
                ("decay_in",), plgpu.wgmma_accumulator_load(accumulators[0], wait_n=int(reads))
            )
            difference = -erased if v is None else v.astype(jnp.float32) - erased

            def solve(accumulator):
                high, low = split_bf16(difference, 2)
                for part, x in ((high, "x0"), (high, "x1"), (low, "x0")):
                    plgpu.wgmma(accumulator, part, transposed(chunk[x]))
                return _output(accumulators[-1], 3) if reads else None, accumulator[...]

            o, w = pl.run_scoped(solve, _accumulator(config))
            if saves:
                parts = zip(split_bf16(w, 2), ("w0", "w1"), ("o_stage", "w_stage"), strict=True)
                _stage(saved, [(x, targets(name, block)) for x, name, block in parts])
            u = scalars.scale_tokens(("beta",), w)
            return write(o, u, split_bf16(u, 2))

        def _output(accumulator, wait):
            x = plgpu.wgmma_accumulator_load(accumulator, wait_n=wait)
            return scalars.scale_tokens(("decay_in",), x, config.scale)

        def write(o, u, writes):
            def run(accumulators):
                *of_output, of_state = accumulators
                for part in writes * reads:
                    plgpu.wgmma(of_output[0], part, transposed(chunk.p))
                decayed = split_bf16(scalars.scale_tokens(("decay_out",), u), 2) if config.carries else writes
                for part in decayed:
                    plgpu.wgmma(of_state, part, chunk.k)
                if reads:
                    o = plgpu.wgmma_accumulator_load(of_output[0], wait_n=len(decayed))
                    _stage(tokens=[(o.astype(jnp.bfloat16), targets("o", "o_stage"))])
                else:
                    plgpu.commit_smem()

            begin = (o, scalars.decay_state(state)) if reads else (scalars.decay_state(state),)
            return pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in begin))[-1]

        count = config.beta + reads
        return pl.run_scoped(read, *[_accumulator(config)] * count) if count else read()

    chunks.scan(g, step)


def scan_forward(config: ScanConfig, save: bool, q, k, v, qk, inverse, scalars, start) -> tuple[Array, ...]:
    """O, the last states and, to be saved, the states that enter chunks and W in two parts (without beta no W).

    Args:
      config: sizes.
      save: whether the backward pass follows.
      q, k: [B, T, G, K] bfloat16.
      v: [B, T, H, V] bfloat16.
      qk: P [B, H, N, C, C] bfloat16.
      inverse: X in two parts [B, H, N, C, C] bfloat16; () where writes add.
      scalars: the token scalars, if there are any.
      start: the state that enters each part, [B, H, parts, V, K] float32.
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
    return _call(config, "chunk_scan_forward", _forward_kernel, inputs, inverse, scalars, start, out, stages)


def scan_states(config: ScanConfig, first: int, k, v, inverse, scalars, start) -> Array:
    """The states that leave parts, [B, H, parts - 1, W, K].

    Args:
      config: sizes.
      first: of the parts, 0 or 1; one part less than there are.
      k: [B, T, G, K] bfloat16.
      v: [B, T, H, W] bfloat16, or None for values of 0.
      inverse, scalars: see `scan_forward`.
      start: the states that enter them, [B, H, parts - 1, W, K] float32.
    """
    inputs = {"k": k} if v is None else {"k": k, "v": v}
    out = {"end": (start.shape, jnp.float32)}
    return _call(config, "chunk_scan_states", _forward_kernel, inputs, inverse, scalars, start, out, {}, first=first)[0]


def _backward_kernel(chunks: _Chunks, config: ScanConfig, g) -> None:
    def step(chunk: Refs, targets, state):
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
            if "dv" in chunks.refs:
                states = [(operand, targets("states", "state_stage"))]
                _stage(states, [(of_values.astype(jnp.bfloat16), targets("dv", "dv_stage"))])
            else:
                plgpu.commit_smem()

        return pl.run_state(run)(plgpu.ACC.init(scalars.decay_state(state)))

    chunks.scan(g, step)


def scan_backward(config: ScanConfig, save: bool, q, k, do, qk, inverse, scalars, dend) -> tuple[Array, ...]:
    """The gradients of the states that enter parts; with `save`, dV and those of the chunks' states come first.

    Args:
      config: sizes.
      save: whether dV and the gradients of the states that leave chunks are wanted. Otherwise the parts are all but
        the first.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      qk, inverse, scalars: see `scan_forward`.
      dend: gradients of the states that leave parts, [B, H, parts, V, K] float32.
    """
    out, stages = {}, {}
    if save:
        out = {"dv": (do.shape, do.dtype), "states": _states(config)}
        stages = {"dv_stage": (config.chunk, config.value_rows), "state_stage": (config.value_rows, config.key)}
    out["end"] = (dend.shape, jnp.float32)
    inputs = {"q": q, "k": k, "do": do, "p": qk}
    name, first = ("chunk_scan_backward", 0) if save else ("chunk_scan_state_gradients", 1)
    return _call(config, name, _backward_kernel, inputs, inverse, scalars, dend, out, stages, first=first, reverse=True)


def _states(config: ScanConfig) -> tuple[tuple[int, ...], Any]:
    return (config.batch, config.heads, config.chunks, config.value, config.key), jnp.bfloat16


def _call(
    config: ScanConfig,
    name: str,
    kernel: Callable,
    inputs,
    inverse,
    scalars,
    start,
    out,
    stages,
    *,
    first: int = 0,
    reverse: bool = False,
) -> tuple[Array, ...]:
    """Launches a scan.

    Args:
      config: sizes.
      name: of the kernel.
      kernel: body of a computing warpgroup.
      inputs: arrays of keys, values and P by name.
      inverse, scalars: see `scan_forward`.
      start: [B, H, parts, W, K] float32.
      out: shapes and dtypes of the results by name.
      stages: shapes of a warpgroup's blocks for copies to global memory, by name.
      first: of the parts.
      reverse: whether the last chunk comes first.
    """
    inputs = inputs | {f"x{i}": x for i, x in enumerate(inverse)} | dict(zip(["scalars"], scalars, strict=False))
    C, slots, parts = config.chunk, tuning.SCAN_SLOTS, start.shape[2]
    blocks = start.shape[3] // config.value_rows
    warpgroups = config.warpgroups(blocks, parts)
    shapes = {"q": (C, config.key), "k": (C, config.key)}
    shapes |= dict.fromkeys(VALUES, (warpgroups, C, config.value_rows))
    scratch: dict[str, Any] = {
        f"{name}_slots": shared_block(slots, *shapes.get(name, (C, C))) for name in inputs if name != "scalars"
    }
    if scalars:
        scratch["scalars_slots"] = plgpu.SMEM((slots, len(config.scalars), C), jnp.float32)
    scratch |= {name: shared_block(warpgroups, *shape) for name, shape in stages.items()}
    copies = sum(warpgroups if name in VALUES else 1 for name in inputs)
    scratch["ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    scratch["free"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots)
    names = (*inputs, "start", *out, *scratch)

    def body(*flat):
        refs, warpgroup = Refs(zip(names, flat, strict=True)), lax.axis_index("warpgroup")
        chunks = _Chunks(config, refs, tuple(inputs), parts, first, warpgroups, reverse)

        @pl.when(warpgroup < warpgroups)
        def _():
            if warpgroups > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[0], action="increase")
            kernel(chunks, config, warpgroup if warpgroups > 1 else 0)

        @pl.when(warpgroup == warpgroups)
        def _():
            if warpgroups > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[1], action="decrease")
            chunks.copy()

    return call_kernel(
        config,
        name,
        body,
        (config.batch, config.heads, parts * blocks // warpgroups),
        [jax.ShapeDtypeStruct(*shape) for shape in out.values()],
        list(scratch.values()),
        (*inputs.values(), start),
        automatic_barriers=False,
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )
