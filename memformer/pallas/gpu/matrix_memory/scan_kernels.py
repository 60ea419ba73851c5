"""The scans over chunks, forward and backward: Mosaic GPU kernels. Equations and letters: chunk_scan.py.

A program scans the chunks of one head. Each of its computing warpgroups keeps the transpose of 64 value columns of the
state, S^T [64, K], in registers, as wgmma leaves its accumulators, and computes the transpose of each equation: what
depends on the state is then the left operand of a product, which wgmma takes from registers. So nothing of the chain
of a chunk passes through shared memory, and right operands have 64 columns or more: with 32 the tensor cores wait for
shared memory. Another warpgroup copies the blocks of the chunks (TMA) into slots ahead of those that compute.

Of 256 key channels two warpgroups have half each, because the registers of one hold no more. Each adds its half of K S,
exchanged through shared memory, and computes W; the first one adds up the output. The blocks that they exchange have as
many slots as chunks have: that a chunk has arrived says that both are done with the slot.

These kernels have no automatic barriers. Threads of a warpgroup exchange data through shared memory only where a block
is staged for a copy to global memory, which `_stage` orders. Slots are written by copies alone; every thread waits for
their barrier, and releases the slot itself after its last read.
"""

import functools
import math
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
from memformer.pallas.gpu.wgmma import Refs, products, shared_block, split_bf16, start_anew, transposed

__all__ = ["scan_backward", "scan_forward", "scan_states"]

# Inputs of which each warpgroup has its own columns.
VALUES = ("v", "do")

# Inputs of whose key channels each warpgroup may have half.
KEYS = ("q", "k")

# What those warpgroups exchange of a chunk: parts of K S (of K dS' in the backward pass), and the second half of Q S.
EXCHANGED = ("of_keys", "of_queries")

# Columns between the rows of those blocks, so that the rows of a warp lie in different banks.
PADDING = 8


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
        self.slots = refs.k_slots.shape[0]
        # Programs of one part are neighbours.
        programs = refs.start.shape[3] // (config.value_rows * warpgroups)
        self.part, self.block = (lax.div(index, jnp.int32(programs)), lax.rem(index, jnp.int32(programs)))
        if parts == 1:
            self.part, self.block = 0, index
        if "spans" in refs:
            # A part is a document.
            self.begin, self.steps = (refs.spans[self.batch_row, self.part, i] for i in range(2))
        else:
            self.steps = config.chunks // config.parts
            self.begin = (self.part + first) * self.steps

    def chunk(self, i):
        """The chunk of a step."""
        return self.begin + (self.steps - 1 - i if self.reverse else i)

    def columns(self, warpgroup):
        """The value columns of a warpgroup."""
        width = self.config.value_rows
        return pl.ds((self.block * self.warpgroups + (warpgroup if self.config.key_groups == 1 else 0)) * width, width)

    def keys(self, warpgroup):
        """The key channels of a warpgroup, as the last indices of an array; () for all."""
        width = self.config.key // self.config.key_groups
        return (pl.ds(warpgroup * width, width),) if self.config.key_groups > 1 else ()

    def place(self, name: str, n, warpgroup=0):
        """Index of chunk n of this program in an array."""
        b, h, tokens = self.batch_row, self.head, pl.ds(n * self.config.chunk, self.config.chunk)
        if name in KEYS:
            return b, tokens, lax.div(h, jnp.int32(self.config.repeat)), *self.keys(warpgroup)
        if name == "states":
            return b, h, n, self.columns(warpgroup), *self.keys(warpgroup)
        return (b, tokens, h, self.columns(warpgroup)) if name in (*VALUES, "o", "w0", "w1", "dv") else (b, h, n)

    def copy(self) -> None:
        """Copies all chunks, each once its slot is free."""
        refs, slots = self.refs, self.slots
        if slots == 1:
            start_anew(refs.zero)

        @pl.loop(0, self.steps)
        def _(i):
            slot, n = lax.rem(i, jnp.int32(slots)), self.chunk(i)
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            for name in self.names:
                blocks = _blocks(self.config, self.warpgroups, name)
                for g in range(blocks or 1):
                    target = refs[f"{name}_slots"].at[slot]
                    target = target.at[g] if blocks else target
                    plgpu.copy_gmem_to_smem(refs[name].at[self.place(name, n, g)], target, refs.ready.at[slot])

        # The last releases.
        last = self.steps - slots

        @pl.loop(max(last, 0) if isinstance(last, int) else jnp.maximum(last, 0), self.steps)
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
            slot, n = lax.rem(i, jnp.int32(self.slots)), self.chunk(i)
            plgpu.barrier_wait(refs.ready.at[slot])
            # The compiler would keep the addresses of all products with a single slot over the loop: see `anew`.
            at = refs.zero[0] if self.slots == 1 else slot
            blocks = {name: refs[f"{name}_slots"].at[at] for name in self.names}
            divided = self.config.key_groups == 2
            own = {name: block.at[0 if divided else warpgroup] for name, block in blocks.items() if name in VALUES}
            if divided:
                own |= {name: block.at[warpgroup] for name, block in blocks.items() if name in KEYS}
                own |= {name: refs[name].at[at] for name in EXCHANGED if name in refs}

            def targets(name, block):
                g = 0 if divided and name != "states" else warpgroup
                return refs[block].at[g], refs[name].at[self.place(name, n, warpgroup)]

            state = step(Refs(blocks | own), targets, state)
            plgpu.barrier_arrive(refs.free.at[slot])
            return state

        place = (self.batch_row, self.head, self.part, self.columns(warpgroup), *self.keys(warpgroup))
        state = compat.load(refs.start.at[place], plgpu.Layout.WGMMA, optimized=False)
        # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
        refs.end[place] = lax.fori_loop(0, self.steps, body, state * 1.0)
        plgpu.wait_smem_to_gmem(0)


def _blocks(config: ScanConfig, warpgroups: int, name: str) -> int:
    """Blocks of an input that warpgroups have each for themselves; 0 for one that all share."""
    return warpgroups if name in VALUES else config.key_groups if name in KEYS and config.key_groups > 1 else 0


def _meet(barrier) -> None:
    """Both warpgroups have stored what they exchange."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _exchanged(ref):
    """A block without its padding."""
    return ref.at[:, pl.ds(0, ref.shape[1] - PADDING)]


def _load_exchanged(ref) -> Array:
    return compat.load(_exchanged(ref), plgpu.Layout.WGMMA, optimized=False)


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
        scalars, divided = TokenScalars(config, chunk.get("scalars")), config.key_groups == 2
        # The second half of the keys has no output: its part of Q S goes to the first.
        queries, reads = "q" in chunk, "q" in chunk and not (divided and g == 1)
        operand, meet = state.astype(jnp.bfloat16), functools.partial(_meet, chunks.refs.get("meet"))
        saved = [(operand, targets("states", "state_stage"))] if saves else []
        # Products run in the order in which they are issued. What the thread computes between an issue and the wait
        # for it overlaps.

        def read(*accumulators):
            for accumulator, name in zip(accumulators, "k" * config.beta + "q" * queries, strict=True):
                plgpu.wgmma(accumulator, operand, transposed(chunk[name]))
            v = _load_transposed(chunk.v) if "v" in chunk else None
            erased = plgpu.wgmma_accumulator_load(accumulators[0], wait_n=int(queries)) if config.beta else None
            if divided:
                if config.beta:
                    _exchanged(chunk.of_keys.at[g])[...] = erased
                if queries and not reads:
                    _exchanged(chunk.of_queries)[...] = plgpu.wgmma_accumulator_load(accumulators[-1], wait_n=0)
                # The states alone, without an erase, exchange nothing.
                if config.beta or queries:
                    meet()
            if not config.beta:
                if saves:
                    _stage(saved)
                return write(_output(accumulators[-1], 0) if reads else None, v.astype(jnp.float32), (v,))
            if divided:
                if saves:
                    # Early: beside what the solve holds there are no registers for it.
                    _stage(saved)
                erased = erased + _load_exchanged(chunk.of_keys.at[1 - g])
            erased = scalars.scale_tokens(("decay_in",), erased)
            difference = -erased if v is None else v.astype(jnp.float32) - erased

            def solve(accumulator):
                high, low = split_bf16(difference, 2)
                for part, x in ((high, "x0"), (high, "x1"), (low, "x0")):
                    plgpu.wgmma(accumulator, part, transposed(chunk[x]))
                return _output(accumulators[-1], 3) if reads else None, accumulator[...]

            o, w = pl.run_scoped(solve, _accumulator(config))
            if saves:
                parts = list(zip(split_bf16(w, 2), ("w0", "w1"), ("o_stage", "w_stage"), strict=True))
                parts = [(x, targets(name, block)) for x, name, block in (parts[g : g + 1] if divided else parts)]
                _stage([] if divided else saved, parts)
            u = scalars.scale_tokens(("beta",), w)
            return write(o, u, split_bf16(u, 2))

        def _output(accumulator, wait):
            x = plgpu.wgmma_accumulator_load(accumulator, wait_n=wait)
            if divided:
                x = x + _load_exchanged(chunk.of_queries)
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

        count = config.beta + queries
        return pl.run_scoped(read, *[_accumulator(config)] * count) if count else read()

    chunks.scan(g, step)


def scan_forward(config: ScanConfig, save: bool, q, k, v, qk, inverse, scalars, start, spans=()) -> tuple[Array, ...]:
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
      spans: with states per document, which are the parts then, the first chunk and the number of chunks of each,
        [B, P, 2] int32. What belongs to no document is not written.
    """
    out = {"o": (v.shape, v.dtype), "end": (start.shape, jnp.float32)}
    stages = {"o_stage": (config.chunk, config.value_rows)}
    if save:
        out["states"] = _states(config)
        stages["state_stage"] = (config.value_rows, config.key // config.key_groups)
        if config.beta:
            out |= {f"w{i}": (v.shape, v.dtype) for i in range(2)}
            stages["w_stage"] = stages["o_stage"]
    inputs = {"q": q, "k": k, "v": v, "p": qk}
    return _call(config, "chunk_scan_forward", _forward_kernel, inputs, inverse, scalars, start, out, stages, spans)


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
        scalars, divided = TokenScalars(config, chunk.get("scalars")), config.key_groups == 2
        operand, do = state.astype(jnp.bfloat16), _load_transposed(chunk.do)
        through_state, dv = products([(operand, transposed(chunk.k))], [(do, chunk.p)])
        if divided:
            _exchanged(chunk.of_keys.at[g])[...] = through_state
            _meet(chunks.refs.meet)
            through_state = through_state + _load_exchanged(chunk.of_keys.at[1 - g])
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
                # The second half of the keys has the same dV.
                stages = not (divided and g == 1)
                _stage(states, [(of_values.astype(jnp.bfloat16), targets("dv", "dv_stage"))] * stages)
            else:
                plgpu.commit_smem()

        return pl.run_state(run)(plgpu.ACC.init(scalars.decay_state(state)))

    chunks.scan(g, step)


def scan_backward(config: ScanConfig, save: bool, q, k, do, qk, inverse, scalars, dend, spans=()) -> tuple[Array, ...]:
    """The gradients of the states that enter parts; with `save`, dV and those of the chunks' states come first.

    Args:
      config: sizes.
      save: whether dV and the gradients of the states that leave chunks are wanted. Otherwise the parts are all but
        the first.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      qk, inverse, scalars, spans: see `scan_forward`.
      dend: gradients of the states that leave parts, [B, H, parts, V, K] float32.
    """
    out, stages = {}, {}
    if save:
        out = {"dv": (do.shape, do.dtype), "states": _states(config)}
        stages = {"dv_stage": (config.chunk, config.value_rows)}
        stages["state_stage"] = (config.value_rows, config.key // config.key_groups)
    out["end"] = (dend.shape, jnp.float32)
    inputs = {"q": q, "k": k, "do": do, "p": qk}
    name, first = ("chunk_scan_backward", 0) if save else ("chunk_scan_state_gradients", 1)
    options = {"first": first, "reverse": True}
    return _call(config, name, _backward_kernel, inputs, inverse, scalars, dend, out, stages, spans, **options)


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
    spans=(),
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
      spans: see `scan_forward`.
      first: of the parts.
      reverse: whether the last chunk comes first.
    """
    inputs = inputs | {f"x{i}": x for i, x in enumerate(inverse)} | dict(zip(["scalars"], scalars, strict=False))
    C, key_groups, parts = config.chunk, config.key_groups, start.shape[2]
    blocks = start.shape[3] // config.value_rows
    warpgroups = config.warpgroups(blocks, parts)
    # Each warpgroup's part of the keys and values; other inputs are squares.
    widths = dict.fromkeys(KEYS, config.key // key_groups) | dict.fromkeys(VALUES, config.value_rows)
    counts = {name: _blocks(config, warpgroups, name) for name in inputs}
    shapes = {name: (C, widths.get(name, C)) for name in inputs if name != "scalars"}
    shapes = {name: (counts[name], *shape) if counts[name] else shape for name, shape in shapes.items()}
    stages = {name: (key_groups if name == "state_stage" else 1, *shape) for name, shape in stages.items()}
    stages = {name: (warpgroups * count, *shape) for name, (count, *shape) in stages.items()}
    exchanged = {"of_keys": (2, C, C + PADDING)} if key_groups == 2 and (config.beta or reverse) else {}
    exchanged |= {"of_queries": (C, C + PADDING)} if key_groups == 2 and "q" in inputs and not reverse else {}
    numbers = [sum(map(math.prod, x.values())) for x in (shapes, exchanged, stages)]
    slot = 2 * numbers[0] + 4 * (numbers[1] + len(config.scalars) * C)
    slots = min(tuning.SCAN_SLOTS, (tuning.SHARED_MEMORY - 2 * numbers[2]) // slot)
    scratch: dict[str, Any] = {f"{name}_slots": shared_block(slots, *shape) for name, shape in shapes.items()}
    if scalars:
        scratch["scalars_slots"] = plgpu.SMEM((slots, len(config.scalars), C), jnp.float32)
    scratch |= {name: plgpu.SMEM((slots, *shape), jnp.float32) for name, shape in exchanged.items()}
    scratch |= {name: shared_block(*shape) for name, shape in stages.items()}
    computing = warpgroups * key_groups
    copies = sum(count or 1 for count in counts.values())
    scratch["ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    scratch["free"] = plgpu.Barrier(num_arrivals=computing, num_barriers=slots)
    if slots == 1:
        scratch["zero"] = plgpu.SMEM((1,), jnp.int32)
    if exchanged:
        scratch["meet"] = plgpu.Barrier(num_arrivals=computing)
    names = (*inputs, "start", *["spans"] * len(spans), *out, *scratch)

    def body(*flat):
        refs, warpgroup = Refs(zip(names, flat, strict=True)), lax.axis_index("warpgroup")
        chunks = _Chunks(config, refs, tuple(inputs), parts, first, warpgroups, reverse)

        def compute(g):
            if computing > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[0], action="increase")
            kernel(chunks, config, g)

        if key_groups == 1:
            pl.when(warpgroup < computing)(lambda: compute(warpgroup if warpgroups > 1 else 0))
        else:
            for half in range(key_groups):
                pl.when(warpgroup == half)(functools.partial(compute, half))

        @pl.when(warpgroup == computing)
        def _():
            if computing > 1:
                plgpu.set_max_registers(tuning.SCAN_REGISTERS[1], action="decrease")
            chunks.copy()

    return call_kernel(
        config,
        name,
        body,
        (config.batch, config.heads, parts * blocks // warpgroups),
        [jax.ShapeDtypeStruct(*shape) for shape in out.values()],
        list(scratch.values()),
        (*inputs.values(), start, *spans),
        automatic_barriers=False,
        num_threads=computing + 1,
        thread_name="warpgroup",
    )
