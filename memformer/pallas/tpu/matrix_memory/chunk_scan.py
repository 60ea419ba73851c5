"""The scan over chunks of every matrix memory on TPU: a forward and a backward kernel, and their custom_vjp.

A memory is given by what it computes for one chunk of one head, see `ChunkStep`. The scan loads the blocks, keeps the
state in VMEM from chunk to chunk, and saves the inputs and the state that enters each chunk for the backward pass,
nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import MatrixCall
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.documents import align, restore
from memformer.pallas.sharding import split_batch_and_heads, varying_result
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.interleave import Steps, delayed, interleave, interleave_groups
from memformer.pallas.tpu.matrix_memory.config import ScanConfig
from memformer.pallas.tpu.matrix_memory.token_scalars import (
    ScalarGradients,
    TokenScalars,
    pack_scalars,
    stack_scalars,
    unpack_scalars,
)

__all__ = ["ChunkStep", "backward", "forward", "run_scan"]


@dataclasses.dataclass(frozen=True)
class ChunkStep:
    """A memory, given by its computation for one chunk of one head. All functions are generators (`Steps`).

    Attributes:
      name: of the kernels.
      forward: (config, scalars, head, prepared, keys, v, state) to (o [C, V], the state that leaves the chunk); keys
        are q, k and, with an erase vector, w, each [C, K]; state is a reference.
      backward: (config, scalars, gradients, head, prepared, keys, v, state, do, ds) to (gradients of the keys and, with
        a decay per channel, of that; dv; ds of the state that enters the chunk); state, ds and, where `transposed`, do
        are references. Adds the gradients of the token scalars to `gradients`.
      prepare: what does not depend on the state, for one or two heads, in stages, each one chunk ahead of the next: the
        first is (config, scalars, heads, keys, refs), with the keys of each head, followed by the decay [C, K] where
        it is per channel; the others are (config, refs). They store into refs, the references of each head, what
        forward and backward then receive as `prepared`. () where nothing is prepared.
      prepared: (config, backward) to shape and dtype of what the stages store per head.
      delay: steps of the stages before the heads start: their products fill the MXU where the inverse leaves it idle.
      stagger: steps of the first stage by which each pair of heads starts after the one before it, so that its work for
        the vector unit lies beside that of other stages for the MXU.
      heads_first: whether the heads are traced before the stages of later chunks: what they hold is freed sooner.
      transposed: whether states are [V, K]. Tokens then lie in lanes: their scalars are rows, and what is computed of a
        state streams through the MXU past operands that are known a chunk earlier.
    """

    name: str
    forward: Callable[..., Steps]
    backward: Callable[..., Steps]
    prepare: tuple[Callable[..., Steps], ...] = ()
    prepared: Callable[[ScanConfig, bool], list[tuple[tuple[int, ...], Any]]] | None = None
    delay: int = 0
    stagger: int = 0
    heads_first: bool = False
    transposed: bool = False

    def state_shape(self, config: ScanConfig) -> tuple[int, int]:
        """Shape of a state in the kernels."""
        return (config.value, config.key) if self.transposed else (config.key, config.value)

    @property
    def prefetch(self) -> int:
        """Grid steps from loading a chunk to computing it."""
        return len(self.prepare)


def run_scan(
    step: ChunkStep, config: ScanConfig, call: MatrixCall
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the scan over the chunks of a call with one write per token."""
    length, width = call.v.shape[1], call.v.shape[3]
    documents, places = None, ()
    if config.documents:
        call, documents = align(call, config.chunk)
        places = (documents.by_chunk(config.chunks),)
    call = _split_values(config, call)
    # bfloat16 where all three are.
    dtype = jnp.bfloat16 if call.q.dtype == call.k.dtype == call.v.dtype == jnp.bfloat16 else jnp.float32

    def by_head(x, dtype):
        return jnp.swapaxes(pad_time(x.astype(dtype), config.chunk), 1, 2)

    keys = tuple(by_head(x, dtype) for x in (call.q, call.k, call.w) if x is not None)
    v = by_head(call.v, dtype)
    channels = (by_head(call.decay, jnp.float32),) if config.channels else ()
    scalars = stack_scalars(config, call)

    def oriented(states):
        return jnp.swapaxes(states, -1, -2) if step.transposed else states

    state = vary_like(oriented(call.state.astype(jnp.float32)), *keys, v, *channels, *scalars)
    if documents is None:
        o, end = _scan(step, config, keys, v, channels, scalars, state, places)
        return _join_values(jnp.swapaxes(o, 1, 2)[:, :length], oriented(end), width)
    # The kernels neither read nor write the states of documents without tokens.
    present = (documents.chunks > 0)[:, None, :, None, None]
    o, end = _scan(step, config, keys, v, channels, scalars, jnp.where(present, state, 0.0), places)
    return restore(documents, *_join_values(jnp.swapaxes(o, 1, 2), oriented(jnp.where(present, end, state)), width))


def _split_values(config: ScanConfig, call: MatrixCall) -> MatrixCall:
    """Turns blocks of value columns into heads."""
    blocks = call.v.shape[3] // config.value
    if blocks == 1:
        return call
    v = call.v.reshape(*call.v.shape[:2], -1, config.value)
    scalars = (call.alpha, call.beta, call.decay)
    alpha, beta, decay = (x if x is None else jnp.repeat(x, blocks, axis=2) for x in scalars)
    state = jnp.moveaxis(call.state.reshape(*call.state.shape[:-1], blocks, config.value), -2, 2)
    state = state.reshape(config.batch, config.heads, *state.shape[3:])
    return dataclasses.replace(call, v=v, alpha=alpha, beta=beta, decay=decay, state=state)


def _join_values(o: Array, state: Array, width: int) -> tuple[Array, Array]:
    """The inverse of `_split_values`, for the results."""
    if o.shape[3] == width:
        return o, state
    blocks = width // o.shape[3]
    state = jnp.moveaxis(state.reshape(state.shape[0], -1, blocks, *state.shape[2:]), 2, -2)
    return o.reshape(*o.shape[:2], -1, width), state.reshape(*state.shape[:-2], width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(step: ChunkStep, config: ScanConfig, keys, v, channels, scalars, state, documents):
    return tuple(_call_forward(step, config, False, keys, v, channels, scalars, state, documents))


def _scan_forward(step, config, keys, v, channels, scalars, state, documents):
    if config.remat == "inputs":
        results = _scan(step, config, keys, v, channels, scalars, state, documents)
        return results, (keys, v, channels, scalars, state, documents)
    o, end, states = _call_forward(step, config, True, keys, v, channels, scalars, state, documents)
    return (o, end), (keys, v, channels, scalars, states, documents)


def _call_forward(step, config, save, keys, v, channels, scalars, state, documents):
    arrays = (*keys, v, *channels, state, *scalars)
    return _split(config, len(arrays), forward, (step, config, save), 2 + save)(*arrays, *documents)


def _scan_backward(step, config, saved, cotangents):
    keys, v, channels, scalars, states, documents = saved
    if config.remat == "inputs":
        *_, states = _call_forward(step, config, True, keys, v, channels, scalars, states, documents)
    arrays = (*keys, v, *channels, states, *cotangents, *scalars)
    results = len(keys) + len(channels) + len(scalars) + 2
    call = _split(config, len(arrays), backward, (step, config), results)
    dkeys, dv, dchannels, dstate, dscalars = _split_arrays(config, call(*arrays, *documents), 1)
    return dkeys, dv, dchannels, dscalars, dstate, None


_scan.defvjp(_scan_forward, _scan_backward)


def _split(config: ScanConfig, count: int, function: Callable, static: tuple[Any, ...], results: int) -> Callable:
    """`function` on each device's shard of `count` arrays and, where documents have states, of their places."""
    operands = (1,) * count + (None,) * bool(config.documents)
    return split_batch_and_heads(function, static, config.axes, results=results, operands=operands, shared=True)


def _split_arrays(config: ScanConfig, arrays: Sequence[Array], others: int) -> tuple[Any, ...]:
    """The arrays of a kernel's call as keys, v, channels, `others` more, and the scalars."""
    keys, v, rest = tuple(arrays[: config.keys]), arrays[config.keys], arrays[config.keys + 1 :]
    count = int(config.channels)
    return keys, v, tuple(rest[:count]), *rest[count : count + others], tuple(rest[count + others :])


class _Chunk:
    """The chunk of a program, and, where the memory prepares, the chunks ahead of it.

    Grid step n takes chunk n through the first stage, chunk n - 1 through the second and so on, and computes the chunk
    that has passed all of them: short chains that do not wait for each other, so that the compiler has work for every
    unit at every time. What is prepared lies in as many copies as chunks are under way.
    """

    def __init__(self, step: ChunkStep, config: ScanConfig, keys, channels, scalars, prepared):
        self.step, self.config = step, config
        self._keys = tuple(ref.at[0] for ref in keys)
        self._channels = tuple(ref.at[0] for ref in channels)
        self.scalars = TokenScalars(config, scalars[:1])
        if step.prepare:
            self._next_scalars = TokenScalars(config, scalars[1:])
            copies, n = step.prefetch + 1, pl.program_id(2)
            self._slots = [[ref.at[lax.rem(n + copies - s, copies)] for ref in prepared] for s in range(copies)]

    def head(self, h: int):
        """The prepared arrays and the keys of one head."""
        g, count = h // self.config.heads_per_key, self.config.keys
        if not self.step.prepare:
            return (), tuple(ref[g] for ref in self._keys)
        *_, prepared = self._slots
        return [ref.at[h] for ref in prepared[count:]], tuple(ref[g] for ref in prepared[:count])

    def run(self, heads: list[Steps], interleaved: int) -> None:
        """Computes all heads, in groups of `interleaved`, interleaved with preparing later chunks."""
        if not self.step.prepare:
            interleave(heads)
            return
        chains = []
        for stage in range(self.step.prefetch):
            stagger = 0 if stage else self.step.stagger
            pairs = enumerate(self.config.head_pairs)
            chains += [delayed(self._prepare(stage, pair), i * stagger) for i, pair in pairs]
        groups = delayed(interleave_groups(heads, interleaved), self.step.delay)
        interleave([groups, *chains] if self.step.heads_first else [*chains, groups])

    def _prepare(self, stage: int, heads: tuple[int, ...]) -> Steps:
        count, slot = self.config.keys, self._slots[stage]
        refs = [[ref.at[h] for ref in slot[count:]] for h in heads]
        if stage:
            yield from self.step.prepare[stage](self.config, refs)
            return
        places = [h // self.config.heads_per_key for h in heads]
        for copy, ref in zip(slot, self._keys, strict=False):
            for g in set(places):
                copy[g] = ref[g]
        keys = [[ref[g] for ref in self._keys] for g in places]
        keys = [[*own, *(ref[h] for ref in self._channels)] for h, own in zip(heads, keys, strict=True)]
        yield from self.step.prepare[0](self.config, self._next_scalars, heads, keys, refs)


def _prepared_scratch(step: ChunkStep, config: ScanConfig, q, backward: bool) -> list[pltpu.VMEM]:
    """Scratch for what is prepared, a copy per chunk under way: the keys, then the arrays of the memory."""
    if not step.prepare:
        return []
    copies = step.prefetch + 1
    keys = [pltpu.VMEM((copies, config.program_keys, config.chunk, config.key), q.dtype)] * config.keys
    arrays = step.prepared(config, backward)
    return keys + [pltpu.VMEM((copies, config.program_heads, *shape), dtype) for shape, dtype in arrays]


def _bounds(config: ScanConfig, prefetch: int, documents, reverse: bool = False) -> tuple[Array, Array]:
    """Whether the state of the row, or of a document, enters before the chunk of a program, and leaves after it."""
    n = pl.program_id(2)
    if not documents:
        return n == prefetch, n == config.chunks - 1 + prefetch
    step, row = n - prefetch, pl.program_id(0) * config.chunks

    def document(step):
        chunk = jnp.clip(step, 0, config.chunks - 1)
        return documents[0][row + (config.chunks - 1 - chunk if reverse else chunk)]

    first, last = step == 0, step == config.chunks - 1
    return first | (document(step) != document(step - 1)), last | (document(step) != document(step + 1))


def _block(config: ScanConfig, ref):
    """The block [P, K, V] of a program's states, of the row or of one document."""
    return ref.at[0, :, 0] if config.documents else ref.at[0]


def _forward_kernel(*refs, step: ChunkStep, config: ScanConfig, save: bool):
    documents, refs = _split_documents(config, refs)
    keys, v_ref, channels, scalars, start_ref, o_ref, end_ref, *refs = refs
    states_ref, s_ref, *prepared = refs if save else (None, *refs)
    enters, leaves = _bounds(config, step.prefetch, documents)

    @pl.when(enters)
    def _():
        pltpu.sync_copy(_block(config, start_ref), s_ref)

    chunk = _Chunk(step, config, keys, channels, scalars, prepared)

    def compute(h):
        if states_ref is not None:
            states_ref[0, h, 0] = s_ref[h].astype(states_ref.dtype)
        prepared, keys = chunk.head(h)
        o, state = yield from step.forward(config, chunk.scalars, h, prepared, keys, v_ref[0, h], s_ref.at[h])
        o_ref[0, h] = o.astype(o_ref.dtype)
        s_ref[h] = state

    chunk.run([compute(h) for h in range(config.program_heads)], config.interleaved)

    @pl.when(leaves)
    def _():
        pltpu.sync_copy(s_ref, _block(config, end_ref))


def _split_documents(config: ScanConfig, arrays: Sequence[Any], last: bool = False) -> tuple[Sequence[Any], Any]:
    """The document of each chunk, which comes first or last where documents have states, and the other arrays."""
    if not config.documents:
        return (), arrays
    return (arrays[-1:], arrays[:-1]) if last else (arrays[:1], arrays[1:])


def forward(step: ChunkStep, config: ScanConfig, save: bool, *arrays):
    """One device's shard: keys [B, G, T, K], v [B, H, T, V], with a decay per channel that, [B, H, T, K], start
    [B, H, K, V], scalars [B, H, names, N, C].

    States are [V, K] where the memory has them transposed. With states per document start is [B, H, P, K, V], and the
    last array is the document of each chunk [B, N].

    Returns o, the last state, and, if `save`, the states that enter the chunks [B, H, N, K, V], in `states_dtype`.
    States of documents without chunks are not written.
    """
    documents, arrays = _split_documents(config, arrays, last=True)
    keys, v, channels, start, scalars = _split_arrays(config, arrays, 1)
    config = config.local(keys[0], v)
    blocks = _make_blocks(step, config)
    like = arrays
    out_specs = [blocks.value, blocks.state]
    out_shape = [varying_result(v.shape, v.dtype, *like), varying_result(start.shape, jnp.float32, *like)]
    if save:
        out_specs.append(blocks.states)
        states = (config.batch, config.heads, config.chunks, *step.state_shape(config))
        out_shape.append(varying_result(states, config.states_dtype, *like))
    scalars, scalar_blocks = _scalar_inputs(step, config, blocks, scalars)
    state = pltpu.VMEM((config.program_heads, *step.state_shape(config)), jnp.float32)
    in_specs = [
        [blocks.key] * len(keys),
        blocks.value,
        [blocks.channels] * len(channels),
        scalar_blocks,
        blocks.state,
    ]
    return pl.pallas_call(
        functools.partial(_forward_kernel, step=step, config=config, save=save),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(documents),
            grid=blocks.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[state, *_prepared_scratch(step, config, keys[0], False)],
        ),
        out_shape=out_shape,
        compiler_params=_compiler_params(),
        name=f"memformer_{step.name}_forward",
    )(*(x.reshape(-1) for x in documents), list(keys), v, list(channels), scalars, start)


def _backward_kernel(*refs, step: ChunkStep, config: ScanConfig):
    documents, refs = _split_documents(config, refs)
    keys, v_ref, channels, scalars, states_ref, do_ref, dend_ref, *refs = refs
    dkeys, dv_ref, dchannels, dscalars, dstart_ref, ds_ref, *prepared = refs
    enters, leaves = _bounds(config, step.prefetch, documents, reverse=True)

    @pl.when(enters)
    def _():
        pltpu.sync_copy(_block(config, dend_ref), ds_ref)

    chunk = _Chunk(step, config, keys, channels, scalars, prepared)
    gradients = ScalarGradients(config, dscalars)
    key_gradients = [[] for _ in range(config.program_keys)]

    def store(g):
        for ref, summands in zip(dkeys, zip(*key_gradients[g], strict=True), strict=True):
            ref[0, g] = functools.reduce(jnp.add, summands).astype(ref.dtype)

    def compute(h):
        do = do_ref.at[0, h] if step.transposed else do_ref[0, h]
        inputs = (*chunk.head(h), v_ref[0, h], states_ref.at[0, h, 0], do, ds_ref.at[h])
        by_key, dv, ds = yield from step.backward(config, chunk.scalars, gradients, h, *inputs)
        dv_ref[0, h] = dv.astype(dv_ref.dtype)
        ds_ref[h] = ds
        g = h // config.heads_per_key
        key_gradients[g].append(by_key[: config.keys])
        if len(key_gradients[g]) == config.heads_per_key:
            store(g)
        for ref, gradient in zip(dchannels, by_key[config.keys :], strict=True):
            ref[0, h] = gradient

    chunk.run([compute(h) for h in range(config.program_heads)], config.interleaved)
    gradients.store()

    @pl.when(leaves)
    def _():
        pltpu.sync_copy(ds_ref, _block(config, dstart_ref))


def backward(step: ChunkStep, config: ScanConfig, *arrays):
    """Gradients of keys, v, decay per channel, initial state and token scalars, of one device's shard."""
    documents, arrays = _split_documents(config, arrays, last=True)
    keys, v, channels, states, do, dend, scalars = _split_arrays(config, arrays, 3)
    config = config.local(keys[0], v)
    blocks = _make_blocks(step, config, reverse=True)
    like = arrays
    # One part for every program that shares a query and key head.
    parts = (config.batch, config.heads // min(config.program_heads, config.repeat), *keys[0].shape[2:])
    scalars, scalar_blocks = _scalar_inputs(step, config, blocks, scalars)
    state = pltpu.VMEM((config.program_heads, *step.state_shape(config)), jnp.float32)
    in_specs = [
        [blocks.key] * len(keys),
        blocks.value,
        [blocks.channels] * len(channels),
        scalar_blocks,
        blocks.states,
        blocks.value,
        blocks.state,
    ]
    out_specs = [
        [blocks.key_part] * len(keys),
        blocks.value,
        [blocks.channel_part] * len(channels),
        scalar_blocks[:1],
        blocks.state,
    ]
    dkeys, dv, dchannels, dscalars, dstart = pl.pallas_call(
        functools.partial(_backward_kernel, step=step, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(documents),
            grid=blocks.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[state, *_prepared_scratch(step, config, keys[0], True)],
        ),
        out_shape=[
            [varying_result(parts, x.dtype, *like) for x in keys],
            varying_result(v.shape, v.dtype, *like),
            [varying_result(x.shape, jnp.float32, *like) for x in channels],
            [varying_result(x.shape, jnp.float32, *like) for x in scalars[:1]],
            varying_result(dend.shape, jnp.float32, *like),
        ],
        compiler_params=_compiler_params(),
        name=f"memformer_{step.name}_backward",
    )(*(x.reshape(-1) for x in documents), list(keys), v, list(channels), scalars, states, do, dend)
    dkeys = [_sum_parts(config, x) for x in dkeys]
    return *dkeys, dv, *dchannels, dstart, *(unpack_scalars(config, x) for x in dscalars)


def _scalar_inputs(step: ChunkStep, config: ScanConfig, blocks: "_ScanBlocks", scalars):
    """The token scalars as the kernel reads them, and their blocks: of the chunk, then of the chunk ahead."""
    scalars = [pack_scalars(config, x) for x in scalars]
    if not scalars or not step.prepare:
        return scalars, [blocks.scalars] * len(scalars)
    return scalars * 2, [blocks.scalars, blocks.next_scalars]


@dataclasses.dataclass(frozen=True)
class _ScanBlocks:
    """The grid of a kernel, and the block of every kind of array."""

    grid: tuple[int, int, int]
    key: pl.BlockSpec
    key_part: pl.BlockSpec
    value: pl.BlockSpec
    channels: pl.BlockSpec
    channel_part: pl.BlockSpec
    scalars: pl.BlockSpec
    next_scalars: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec


def _make_blocks(step: ChunkStep, config: ScanConfig, reverse: bool = False) -> _ScanBlocks:
    """Blocks for a scan over the chunks, from the last one if `reverse`; keys are loaded `prefetch` steps early."""
    C, K, V, P = config.chunk, config.key, config.value, config.program_heads
    matrix, prefetch = step.state_shape(config), step.prefetch
    programs_per_key = max(1, config.repeat // P)

    def chunk_at(n):
        return config.chunks - 1 - n if reverse else n

    def now(n):
        return chunk_at(jnp.maximum(n - prefetch, 0) if prefetch else n)

    def ahead(n):
        return chunk_at(jnp.minimum(n, config.chunks - 1) if prefetch else n)

    def value_index(b, h, n, *_):
        return (b, h, now(n), 0)

    def document(b, n, places):
        return places[b * config.chunks + now(n)]

    scalars = (1, 1, 1, len(config.scalars) * P, C)
    state = pl.BlockSpec((1, P, *matrix), lambda b, h, n: (b, h, 0, 0))
    if config.documents:
        state = pl.BlockSpec((1, P, 1, *matrix), lambda b, h, n, places: (b, h, document(b, n, places), 0, 0))
    return _ScanBlocks(
        grid=(config.batch, config.heads // P, config.chunks + prefetch),
        key=pl.BlockSpec((1, config.program_keys, C, K), lambda b, h, n, *_: (b, h // programs_per_key, ahead(n), 0)),
        key_part=pl.BlockSpec((1, config.program_keys, C, K), value_index),
        value=pl.BlockSpec((1, P, C, V), value_index),
        channels=pl.BlockSpec((1, P, C, K), lambda b, h, n, *_: (b, h, ahead(n), 0)),
        channel_part=pl.BlockSpec((1, P, C, K), value_index),
        scalars=pl.BlockSpec(scalars, lambda b, h, n, *_: (b, h, now(n), 0, 0)),
        next_scalars=pl.BlockSpec(scalars, lambda b, h, n, *_: (b, h, ahead(n), 0, 0)),
        state=state,
        states=pl.BlockSpec((1, P, 1, *matrix), lambda b, h, n, *_: (b, h, now(n), 0, 0)),
    )


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tuning.VMEM_LIMIT
    )


def _sum_parts(config: ScanConfig, x: Array) -> Array:
    """Sums [B, parts, T, K] gradients of shared heads to [B, G, T, K]."""
    if x.shape[1] == config.groups:
        return x
    x = x.reshape(config.batch, config.groups, -1, *x.shape[2:])
    return jnp.sum(x, axis=2, dtype=jnp.float32).astype(x.dtype)
