"""The walk over the chunks that every memory with a matrix state takes: two Pallas calls and their rule.

A memory is what it does with one chunk of one head, forward and backward; the walk brings the blocks,
keeps the state in VMEM from chunk to chunk, and saves for the backward pass the inputs and the state
that enters each chunk, nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.common import Cut, abreast, lockstep
from memformer.pallas.tpu.matrix_memory.token_scalars import TokenGradients, Tokens, pack, token_rows, unpack

__all__ = ["Memory", "run"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory, by what it does with one chunk of one head. All are generators that yield between products.

    Attributes:
      name: of its kernels.
      forward: (cut, tokens, head, prepared, q, k, v, state) to (o [C, V], the state that leaves); state is a
        reference.
      backward: (cut, tokens, gradients, head, prepared, q, k, v, state, do, ds) to (dq, dk, dv, ds of the state
        that enters), likewise, and adds to gradients what the rows get; state and ds are references.
      prepare: what needs no state, for one or two heads: (cut, tokens, heads, q, k, kept) writes into kept, the
        references of each head, what forward and backward are given as `prepared` in the next step; or None.
      kept: (cut, backward) to shape and dtype of what prepare writes for a head.
      count: heads that are walked side by side while the next chunk is prepared.
      wait: steps of prepare before the walk begins: its products fill what the inverse leaves of the MXU.
    """

    name: str
    forward: Callable[..., Generator[None, None, tuple[Array, Array]]]
    backward: Callable[..., Generator[None, None, tuple[Array, Array, Array, Array]]]
    prepare: Callable[..., Generator[None, None, None]] | None = None
    kept: Callable[[Cut, bool], list[tuple[tuple[int, ...], Any]]] | None = None
    count: int = 2
    wait: int = 0

    @property
    def lag(self) -> int:
        """Steps from preparing a chunk to walking it."""
        return 0 if self.prepare is None else 1


def run(
    memory: Memory, cut: Cut, q: Array, k: Array, v: Array, beta, decay, index, state: Array | None
) -> tuple[Array, Array]:
    """q, k [B, T, G, K], v [B, T, H, V], beta and decay [B, T, H], index [B, T]: o [B, T, H, V] and the last state."""

    def by_head(x):
        return jnp.swapaxes(pad_time(x, cut.chunk), 1, 2)

    width = v.shape[3]
    v, beta, decay, state = _split_values(cut, v, beta, decay, state)
    # bfloat16 where all three are.
    dtype = jnp.bfloat16 if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    arrays = (by_head(x.astype(dtype)) for x in (q, k, v))
    rows = token_rows(cut, beta, decay, index)
    if state is None:
        state = vary_like(jnp.zeros((cut.batch, cut.heads, cut.key, cut.value), jnp.float32), q, k, v, *rows)
    o, end = _walk(memory, cut, *arrays, rows, state.astype(jnp.float32))
    return _join_values(jnp.swapaxes(o, 1, 2)[:, : q.shape[1]], end, width)


def _split_values(cut: Cut, v, beta, decay, state):
    """Blocks of value columns as heads of their own."""
    blocks = v.shape[3] // cut.value
    if blocks == 1:
        return v, beta, decay, state
    v = v.reshape(*v.shape[:2], -1, cut.value)
    beta, decay = (x if x is None else jnp.repeat(x, blocks, axis=2) for x in (beta, decay))
    if state is not None:
        state = jnp.swapaxes(state.reshape(*state.shape[:3], blocks, cut.value), 2, 3)
        state = state.reshape(cut.batch, cut.heads, cut.key, cut.value)
    return v, beta, decay, state


def _join_values(o, end, width: int):
    """The inverse, for results."""
    if o.shape[3] == width:
        return o, end
    blocks = width // o.shape[3]
    end = end.reshape(end.shape[0], -1, blocks, *end.shape[2:])
    return o.reshape(*o.shape[:2], -1, width), jnp.swapaxes(end, 2, 3).reshape(*end.shape[:2], end.shape[3], width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(memory: Memory, cut: Cut, q, k, v, rows, start):
    call = split_batch_and_heads(_forward, (memory, cut, False), results=2)
    return tuple(call(q, k, v, start, *rows))


def _walk_forward(memory, cut, q, k, v, rows, start):
    if cut.remat == "inputs":
        return _walk(memory, cut, q, k, v, rows, start), (q, k, v, rows, start)
    o, end, states = _states(memory, cut, q, k, v, rows, start)
    return (o, end), (q, k, v, rows, states)


def _states(memory, cut, q, k, v, rows, start):
    call = split_batch_and_heads(_forward, (memory, cut, True), results=3)
    return call(q, k, v, start, *rows)


def _walk_backward(memory, cut, saved, cotangents):
    q, k, v, rows, states = saved
    if cut.remat == "inputs":
        *_, states = _states(memory, cut, q, k, v, rows, states)
    call = split_batch_and_heads(_backward, (memory, cut), results=4 + len(rows))
    dq, dk, dv, dstart, *drows = call(q, k, v, states, *cotangents, *rows)
    return dq, dk, dv, tuple(drows), dstart


_walk.defvjp(_walk_forward, _walk_backward)


class _Chunks:
    """What a kernel has of its chunk: the heads' inputs, and what the step before prepared for them.

    A memory that prepares is one chunk ahead there: step n prepares chunk n while chunk n - 1 is walked, so
    that the compiler has work for every unit at every time.
    """

    def __init__(self, memory: Memory, cut: Cut, q_ref, k_ref, rows, kept):
        self.memory, self.cut = memory, cut
        self._keys = (q_ref.at[0], k_ref.at[0])
        self.tokens = Tokens(cut, rows[:1])
        if memory.prepare is not None:
            self._ahead = Tokens(cut, rows[1:])
            now = pl.program_id(2) % 2
            self._next = [ref.at[now] for ref in kept]
            self._kept = [ref.at[1 - now] for ref in kept]

    def prepare(self) -> list[Generator[None, None, None]]:
        """The chunk ahead: for the heads two by two."""
        if self.memory.prepare is None:
            return []
        return [self._prepare_heads(heads) for heads in self.cut.pairs]

    def _prepare_heads(self, heads: tuple[int, ...]) -> Generator[None, None, None]:
        places = [h // self.cut.sharing for h in heads]
        for copy, ref in zip(self._next, self._keys, strict=False):
            for g in set(places):
                copy[g] = ref[g]
        keys = [[ref[g] for g in places] for ref in self._keys]
        kept = [[ref.at[h] for ref in self._next[2:]] for h in heads]
        yield from self.memory.prepare(self.cut, self._ahead, heads, *keys, kept)

    def head(self, h: int):
        """q, k and what was prepared, of one head of this chunk."""
        g = h // self.cut.sharing
        if self.memory.prepare is None:
            return *(ref[g] for ref in self._keys), ()
        return *(ref[g] for ref in self._kept[:2]), [ref.at[h] for ref in self._kept[2:]]

    def run(self, heads: list[Generator[None, None, None]]) -> None:
        """Walks all heads, and prepares meanwhile."""
        ahead = self.prepare()
        lockstep([*ahead, abreast(heads, self.memory.count, self.memory.wait)] if ahead else heads)


def _kept(memory: Memory, cut: Cut, q, backward: bool) -> list[pltpu.VMEM]:
    """Scratch for what is prepared, in two copies: q and k, then what the memory names."""
    if memory.prepare is None:
        return []
    keys = [pltpu.VMEM((2, cut.key_block, cut.chunk, cut.key), q.dtype)] * 2
    return keys + [pltpu.VMEM((2, cut.block, *shape), dtype) for shape, dtype in memory.kept(cut, backward)]


def _forward_kernel(q_ref, k_ref, v_ref, rows, start_ref, o_ref, end_ref, *refs, memory: Memory, cut: Cut, save: bool):
    states_ref, s_ref, *kept = refs if save else (None, *refs)
    n = pl.program_id(2)

    @pl.when(n == memory.lag)
    def _():
        pltpu.sync_copy(start_ref.at[0], s_ref)

    chunks = _Chunks(memory, cut, q_ref, k_ref, rows, kept)

    def walk(h):
        if states_ref is not None:
            states_ref[0, h, 0] = s_ref[h]
        q, k, prepared = chunks.head(h)
        o, state = yield from memory.forward(cut, chunks.tokens, h, prepared, q, k, v_ref[0, h], s_ref.at[h])
        o_ref[0, h] = o.astype(o_ref.dtype)
        s_ref[h] = state

    chunks.run([walk(h) for h in range(cut.block)])

    @pl.when(n == cut.chunks - 1 + memory.lag)
    def _():
        pltpu.sync_copy(s_ref, end_ref.at[0])


def _forward(memory: Memory, cut: Cut, save: bool, q, k, v, start, *rows):
    """q, k [B, G, T, K], v [B, H, T, V], start [B, H, K, V], rows [B, H, names, N, C], of one device.

    Returns o, the last state and, to save them, the states that enter chunks [B, H, N, K, V].
    """
    cut = cut.local(q, v)
    block = _blocks(cut, memory.lag)
    like = (q, k, v, start, *rows)
    out_specs = [block.value, block.state]
    out_shape = [varying_result(v.shape, v.dtype, *like), varying_result(start.shape, jnp.float32, *like)]
    if save:
        out_specs.append(block.states)
        states = (cut.batch, cut.heads, cut.chunks, cut.key, cut.value)
        out_shape.append(varying_result(states, jnp.float32, *like))
    rows, rows_blocks = _rows(memory, cut, block, rows)
    return pl.pallas_call(
        functools.partial(_forward_kernel, memory=memory, cut=cut, save=save),
        grid=block.grid,
        in_specs=[block.key, block.key, block.value, rows_blocks, block.state],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((cut.block, cut.key, cut.value), jnp.float32), *_kept(memory, cut, q, False)],
        compiler_params=_compiler_params(),
        name=f"memformer_{memory.name}_forward",
    )(q, k, v, rows, start)


def _backward_kernel(
    q_ref, k_ref, v_ref, rows, states_ref, do_ref, dend_ref, dq_ref, dk_ref, dv_ref, drows, dstart_ref, ds_ref, *kept,
    memory: Memory, cut: Cut,
):  # fmt: skip
    n = pl.program_id(2)

    @pl.when(n == memory.lag)
    def _():
        pltpu.sync_copy(dend_ref.at[0], ds_ref)

    chunks = _Chunks(memory, cut, q_ref, k_ref, rows, kept)
    gradients = TokenGradients(cut)
    shared = [[] for _ in range(cut.key_block)]

    def walk(h):
        q, k, prepared = chunks.head(h)
        inputs = (prepared, q, k, v_ref[0, h], states_ref.at[0, h, 0], do_ref[0, h], ds_ref.at[h])
        dq, dk, dv, ds = yield from memory.backward(cut, chunks.tokens, gradients, h, *inputs)
        dv_ref[0, h] = dv.astype(dv_ref.dtype)
        ds_ref[h] = ds
        shared[h // cut.sharing].append((dq, dk))

    chunks.run([walk(h) for h in range(cut.block)])
    for g, parts in enumerate(shared):
        dq, dk = (functools.reduce(jnp.add, x) for x in zip(*parts, strict=True))
        dq_ref[0, g], dk_ref[0, g] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    gradients.store(drows)

    @pl.when(n == cut.chunks - 1 + memory.lag)
    def _():
        pltpu.sync_copy(ds_ref, dstart_ref.at[0])


def _backward(memory: Memory, cut: Cut, q, k, v, states, do, dend, *rows):
    """Gradients of q, k, v, the initial state and the rows."""
    cut = cut.local(q, v)
    block = _blocks(cut, memory.lag, reverse=True)
    like = (q, k, v, states, do, dend, *rows)
    # One part for every program that shares a head.
    parts = (cut.batch, cut.heads // min(cut.block, cut.repeat), *q.shape[2:])
    rows, rows_blocks = _rows(memory, cut, block, rows)
    dq, dk, dv, drows, dstart = pl.pallas_call(
        functools.partial(_backward_kernel, memory=memory, cut=cut),
        grid=block.grid,
        in_specs=[block.key, block.key, block.value, rows_blocks, block.states, block.value, block.state],
        out_specs=[block.part, block.part, block.value, rows_blocks[:1], block.state],
        out_shape=[
            varying_result(parts, q.dtype, *like),
            varying_result(parts, k.dtype, *like),
            varying_result(v.shape, v.dtype, *like),
            [varying_result(x.shape, jnp.float32, *like) for x in rows[:1]],
            varying_result(dend.shape, jnp.float32, *like),
        ],
        scratch_shapes=[pltpu.VMEM((cut.block, cut.key, cut.value), jnp.float32), *_kept(memory, cut, q, True)],
        compiler_params=_compiler_params(),
        name=f"memformer_{memory.name}_backward",
    )(q, k, v, rows, states, do, dend)
    return _sum_parts(cut, dq), _sum_parts(cut, dk), dv, dstart, *(unpack(cut, x) for x in drows)


def _rows(memory: Memory, cut: Cut, block: "_Blocks", rows):
    """Rows as the kernel has them, and where: of the chunk that is walked, then of the one that is prepared."""
    rows = [pack(cut, x) for x in rows]
    if not rows or memory.prepare is None:
        return rows, [block.rows] * len(rows)
    return rows * 2, [block.rows, block.rows_ahead]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The steps of a kernel, and what a program sees of every kind of array."""

    grid: tuple[int, int, int]
    key: pl.BlockSpec
    part: pl.BlockSpec
    value: pl.BlockSpec
    rows: pl.BlockSpec
    rows_ahead: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec


def _blocks(cut: Cut, lag: int, reverse: bool = False) -> _Blocks:
    """Blocks for a walk from the first chunk to the last, or the other way; q and k come `lag` steps early."""
    C, K, V, P = cut.chunk, cut.key, cut.value, cut.block
    shared = max(1, cut.repeat // P)

    def turned(n):
        return cut.chunks - 1 - n if reverse else n

    def at(n):
        return turned(jnp.maximum(n - lag, 0) if lag else n)

    def ahead(n):
        return turned(jnp.minimum(n, cut.chunks - 1) if lag else n)

    def by_head(b, h, n):
        return (b, h, at(n), 0)

    rows = (1, 1, 1, len(cut.names) * P, C)
    return _Blocks(
        grid=(cut.batch, cut.heads // P, cut.chunks + lag),
        key=pl.BlockSpec((1, cut.key_block, C, K), lambda b, h, n: (b, h // shared, ahead(n), 0)),
        part=pl.BlockSpec((1, cut.key_block, C, K), by_head),
        value=pl.BlockSpec((1, P, C, V), by_head),
        rows=pl.BlockSpec(rows, lambda b, h, n: (b, h, at(n), 0, 0)),
        rows_ahead=pl.BlockSpec(rows, lambda b, h, n: (b, h, ahead(n), 0, 0)),
        state=pl.BlockSpec((1, P, K, V), lambda b, h, n: (b, h, 0, 0)),
        states=pl.BlockSpec((1, P, 1, K, V), lambda b, h, n: (b, h, at(n), 0, 0)),
    )


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tuning.VMEM_LIMIT
    )


def _sum_parts(cut: Cut, x: Array) -> Array:
    """[B, parts, T, K] gradients of shared heads, summed to [B, G, T, K]."""
    if x.shape[1] == cut.groups:
        return x
    x = x.reshape(cut.batch, cut.groups, -1, *x.shape[2:])
    return jnp.sum(x, axis=2, dtype=jnp.float32).astype(x.dtype)
