"""The walk over the chunks that every memory with a matrix state takes: two Pallas calls and their rule.

A memory is what it does with one chunk of one head, forward and backward; the walk brings the blocks,
keeps the state in VMEM from chunk to chunk, and saves for the backward pass the inputs and the state
that enters each chunk, nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.chunking import pad_time, vary_like
from memformer.core.types import Array
from memformer.pallas.partition import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.common import Cut, lockstep
from memformer.pallas.tpu.rows import TokenGradients, Tokens, pack, token_rows, unpack

__all__ = ["Memory", "run"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory, by what it does with one chunk of one head.

    Attributes:
      name: of its kernels.
      forward: (cut, tokens, head, q, k, v, state) to (o [C, V], the state that leaves), as a generator
        that yields between products (`common.lockstep`).
      backward: (cut, tokens, gradients, head, q, k, v, state, do, ds) to (dq, dk, dv, ds of the state
        that enters), likewise, and adds to gradients what the rows get.
    """

    name: str
    forward: Callable[..., Generator[None, None, tuple[Array, Array]]]
    backward: Callable[..., Generator[None, None, tuple[Array, Array, Array, Array]]]


def run(
    memory: Memory, cut: Cut, q: Array, k: Array, v: Array, beta, decay, index, state: Array | None
) -> tuple[Array, Array]:
    """q, k [B, T, G, K], v [B, T, H, V], beta and decay [B, T, H], index [B, T]: o [B, T, H, V] and the last state."""

    def by_head(x):
        return jnp.swapaxes(pad_time(x, cut.chunk), 1, 2)

    # bfloat16 where all three are.
    dtype = jnp.bfloat16 if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    arrays = (by_head(x.astype(dtype)) for x in (q, k, v))
    rows = token_rows(cut, beta, decay, index)
    if state is None:
        state = vary_like(jnp.zeros((cut.batch, cut.heads, cut.key, cut.value), jnp.float32), q, k, v, *rows)
    o, end = _walk(memory, cut, *arrays, rows, state.astype(jnp.float32))
    return jnp.swapaxes(o, 1, 2)[:, : q.shape[1]], end


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(memory: Memory, cut: Cut, q, k, v, rows, start):
    call = split_batch_and_heads(_forward, (memory, cut, False), results=2)
    return tuple(call(q, k, v, start, *rows))


def _walk_forward(memory, cut, q, k, v, rows, start):
    call = split_batch_and_heads(_forward, (memory, cut, True), results=3)
    o, end, states = call(q, k, v, start, *rows)
    return (o, end), (q, k, v, rows, states)


def _walk_backward(memory, cut, saved, cotangents):
    q, k, v, rows, states = saved
    call = split_batch_and_heads(_backward, (memory, cut), results=4 + len(rows))
    dq, dk, dv, dstart, *drows = call(q, k, v, states, *cotangents, *rows)
    return dq, dk, dv, tuple(drows), dstart


_walk.defvjp(_walk_forward, _walk_backward)


def _forward_kernel(q_ref, k_ref, v_ref, rows, start_ref, o_ref, end_ref, *refs, memory: Memory, cut: Cut):
    *states_ref, s_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        s_ref[...] = start_ref[0]

    tokens = Tokens(cut, rows)
    heads = []
    for h in range(cut.block):
        state = s_ref[h]
        for ref in states_ref:
            ref[0, h, 0] = state
        g = h // cut.sharing
        heads.append(memory.forward(cut, tokens, h, q_ref[0, g], k_ref[0, g], v_ref[0, h], state))
    for h, (o, state) in enumerate(lockstep(heads)):
        o_ref[0, h] = o.astype(o_ref.dtype)
        s_ref[h] = state

    @pl.when(n == cut.chunks - 1)
    def _():
        end_ref[0] = s_ref[...]


def _forward(memory: Memory, cut: Cut, save: bool, q, k, v, start, *rows):
    """q, k [B, G, T, K], v [B, H, T, V], start [B, H, K, V], rows [B, H, names, N, C], of one device.

    Returns o, the last state and, to save them, the states that enter chunks [B, H, N, K, V].
    """
    cut = cut.local(q, v)
    block = _blocks(cut)
    like = (q, k, v, start, *rows)
    out_specs = [block.value, block.state]
    out_shape = [varying_result(v.shape, v.dtype, *like), varying_result(start.shape, jnp.float32, *like)]
    if save:
        out_specs.append(block.states)
        states = (cut.batch, cut.heads, cut.chunks, cut.key, cut.value)
        out_shape.append(varying_result(states, jnp.float32, *like))
    return pl.pallas_call(
        functools.partial(_forward_kernel, memory=memory, cut=cut),
        grid=cut.grid,
        in_specs=[block.key, block.key, block.value, [block.rows] * len(rows), block.state],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((cut.block, cut.key, cut.value), jnp.float32)],
        compiler_params=_compiler_params(),
        name=f"memformer_{memory.name}_forward",
    )(q, k, v, [pack(cut, x) for x in rows], start)


def _backward_kernel(
    q_ref, k_ref, v_ref, rows, states_ref, do_ref, dend_ref, dq_ref, dk_ref, dv_ref, drows, dstart_ref, ds_ref,
    *, memory: Memory, cut: Cut,
):  # fmt: skip
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        ds_ref[...] = dend_ref[0]

    tokens, gradients = Tokens(cut, rows), TokenGradients(cut)
    heads = []
    for h in range(cut.block):
        g = h // cut.sharing
        inputs = (q_ref[0, g], k_ref[0, g], v_ref[0, h], states_ref[0, h, 0], do_ref[0, h], ds_ref[h])
        heads.append(memory.backward(cut, tokens, gradients, h, *inputs))
    shared = [[] for _ in range(cut.key_block)]
    for h, (dq, dk, dv, ds) in enumerate(lockstep(heads)):
        dv_ref[0, h] = dv.astype(dv_ref.dtype)
        ds_ref[h] = ds
        shared[h // cut.sharing].append((dq, dk))
    for g, parts in enumerate(shared):
        dq, dk = (functools.reduce(jnp.add, x) for x in zip(*parts, strict=True))
        dq_ref[0, g], dk_ref[0, g] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    gradients.store(drows)

    @pl.when(n == cut.chunks - 1)
    def _():
        dstart_ref[0] = ds_ref[...]


def _backward(memory: Memory, cut: Cut, q, k, v, states, do, dend, *rows):
    """Gradients of q, k, v, the initial state and the rows."""
    cut = cut.local(q, v)
    block = _blocks(cut, reverse=True)
    like = (q, k, v, states, do, dend, *rows)
    # One part for every program that shares a head.
    parts = (cut.batch, cut.heads // min(cut.block, cut.repeat), *q.shape[2:])
    rows = [pack(cut, x) for x in rows]
    rows_blocks = [block.rows] * len(rows)
    dq, dk, dv, drows, dstart = pl.pallas_call(
        functools.partial(_backward_kernel, memory=memory, cut=cut),
        grid=cut.grid,
        in_specs=[block.key, block.key, block.value, rows_blocks, block.states, block.value, block.state],
        out_specs=[block.part, block.part, block.value, rows_blocks, block.state],
        out_shape=[
            varying_result(parts, q.dtype, *like),
            varying_result(parts, k.dtype, *like),
            varying_result(v.shape, v.dtype, *like),
            [varying_result(x.shape, jnp.float32, *like) for x in rows],
            varying_result(dend.shape, jnp.float32, *like),
        ],
        scratch_shapes=[pltpu.VMEM((cut.block, cut.key, cut.value), jnp.float32)],
        compiler_params=_compiler_params(),
        name=f"memformer_{memory.name}_backward",
    )(q, k, v, rows, states, do, dend)
    return _sum_parts(cut, dq), _sum_parts(cut, dk), dv, dstart, *(unpack(cut, x) for x in drows)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What a program sees of every kind of array."""

    key: pl.BlockSpec
    part: pl.BlockSpec
    value: pl.BlockSpec
    rows: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec


def _blocks(cut: Cut, reverse: bool = False) -> _Blocks:
    """Blocks for a walk from the first chunk to the last, or the other way."""
    C, K, V, P = cut.chunk, cut.key, cut.value, cut.block
    shared = max(1, cut.repeat // P)

    def at(n):
        return cut.chunks - 1 - n if reverse else n

    def by_head(b, h, n):
        return (b, h, at(n), 0)

    return _Blocks(
        key=pl.BlockSpec((1, cut.key_block, C, K), lambda b, h, n: (b, h // shared, at(n), 0)),
        part=pl.BlockSpec((1, cut.key_block, C, K), by_head),
        value=pl.BlockSpec((1, P, C, V), by_head),
        rows=pl.BlockSpec((1, 1, 1, len(cut.names) * P, C), lambda b, h, n: (b, h, at(n), 0, 0)),
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
