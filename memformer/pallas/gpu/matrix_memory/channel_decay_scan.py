"""The scans over chunks of a decay per key channel, forward and backward: Mosaic GPU kernels.

Equations and letters: channel_decay.py. Each warpgroup scans the chunks of one head and one block of value columns, the
state in registers. XLA scales the operands, so that the scans have no decay but that of the chunk. Of 256 key channels
shared memory holds one of scaled k and w: what is needed last takes the place of the other one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.gpu.matrix_memory.channel_decay_scores import ChannelConfig
from memformer.pallas.gpu.matrix_memory.config import AXES, call_kernel, take
from memformer.pallas.gpu.matrix_memory.token_scalars import TokenScalars
from memformer.pallas.gpu.wgmma import (
    anew,
    load_column,
    load_float32,
    partial_products,
    products,
    shared_block,
    start_anew,
    store,
    store_split,
    transposed,
)

__all__ = ["scan_backward", "scan_forward"]

Parts = dict[str, list[Any]]


def _group(counts: Mapping[str, int], values: Sequence[Any]) -> tuple[Parts, Sequence[Any]]:
    """The first values by kind of input, and what is left."""
    *groups, rest = take(values, *counts.values())
    return {kind: list(group) for kind, group in zip(counts, groups, strict=True)}, rest


def _inputs(config: ChannelConfig, scalars: bool) -> dict[str, int]:
    """Arrays of each kind of input, in the order of the operands: scaled q, k and w, then v or dO, and so on."""
    beta, parts = config.beta, config.input_parts
    counts = {"q": parts, "k": 2, "w": 2 * beta, "v": parts, "decay": 1, "p": 2, "x": 2 * beta}
    return counts | {"scalars": int(scalars)}


def _arriving(config: ChannelConfig, counts: dict[str, int], last: str) -> dict[str, int]:
    """The inputs that have blocks of their own: all, or all but the one that is needed last."""
    shares = config.beta and config.key > tuning.KEYS[-1]
    return counts | {last: 0} if shares else counts


def _columns(config: ChannelConfig):
    """The value columns of a program."""
    block = lax.axis_index(AXES[2])
    if config.documents:
        block = lax.rem(block, jnp.int32(config.value // config.value_block))
    return pl.ds(block * config.value_block, config.value_block)


class _Part(NamedTuple):
    """The chunks of a program: of a row or, with states per document, of one document.

    Attributes:
      state: index of its state in an array [B, H, K, V] or [B, H, P, K, V].
      first, steps: its first chunk, and how many it has.
    """

    state: tuple[Any, ...]
    first: Any
    steps: Any


def _find_part(config: ChannelConfig, spans: Sequence) -> _Part:
    b, h, block = (lax.axis_index(name) for name in AXES)
    state = (slice(None), _columns(config))
    if not spans:
        return _Part((b, h, *state), 0, config.chunks)
    # Programs of one document are neighbours.
    p = lax.div(block, jnp.int32(config.value // config.value_block))
    return _Part((b, h, p, *state), spans[0][b, p, 0], spans[0][b, p, 1])


def _scan(part: _Part, start, end, step: Callable) -> None:
    """Carries the state from `start` to `end` through step(i, state) of every chunk."""
    state = compat.load(start.at[part.state], plgpu.Layout.WGMMA, optimized=False)
    # Under shard_map loaded values vary over mesh axes by their type, values computed in the kernel do not.
    end[part.state] = lax.fori_loop(0, part.steps, step, state * 1.0)


def _copy(config: ChannelConfig, n, kind: str, sources: list, targets: list, barrier) -> None:
    """Starts the copies of one kind of input of chunk n."""
    b, h, _ = (lax.axis_index(name) for name in AXES)
    tokens = pl.ds(n * config.chunk, config.chunk)
    places = dict.fromkeys(("q", "k", "w"), (b, tokens, h)) | {"v": (b, tokens, h, _columns(config))}
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source.at[places.get(kind, (b, h, n))], target, barrier)


def _start(config: ChannelConfig, n, inputs: Parts, blocks: Parts, zero, barrier) -> Parts:
    """Starts the copies of chunk n, and gives their targets."""
    counts = {kind: len(parts) for kind, parts in blocks.items()}
    slots, _ = _group(counts, anew(zero, [ref for parts in blocks.values() for ref in parts]))
    for kind, targets in slots.items():
        _copy(config, n, kind, inputs[kind][: len(targets)], targets, barrier)
    return slots


def _replace(config: ChannelConfig, n, inputs: Parts, slots: Parts, first: str, last: str, barriers) -> None:
    """Starts the copies of the input that is needed last where it has no blocks of its own; `first` has been read."""
    if not slots[last] and inputs[last]:
        slots[last] = slots[first]
        _copy(config, n, last, inputs[last], slots[last], barriers[1])


def _forward_kernel(*refs, config: ChannelConfig, save: bool):
    counts = _inputs(config, config.beta)
    inputs, refs = _group(counts, refs)
    (start, *spans), (o_g, end_g), saved, refs = take(refs, 1 + bool(config.documents), 2, save * (1 + 2 * config.beta))
    blocks, refs = _group(_arriving(config, counts, "k"), refs)
    scratch, (zero_s, *barriers) = take(refs, 7)
    start_anew(zero_s)
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns, part = _columns(config), _find_part(config, spans)

    def step(i, state):
        n = part.first + i
        tokens = pl.ds(n * config.chunk, config.chunk)
        slots = _start(config, n, inputs, blocks, zero_s, barriers[0])
        state_s, (o_s,), u_s, difference_s, _ = take(anew(zero_s, scratch), 2, 1, 2, 2)
        store_split(state_s, state)
        plgpu.commit_smem()
        if save:
            plgpu.copy_smem_to_gmem(state_s[0], saved[0].at[b, h, n, :, columns])
        plgpu.barrier_wait(barriers[0])
        decayed = state * load_column(slots["decay"][0], config.value_block)
        writes = slots["v"]
        if config.beta:
            writes = u_s
            u = functools.reduce(jnp.add, map(load_float32, slots["v"]))
            u = TokenScalars(config, slots["scalars"][0]).scale_rows(("alpha",), u)
            (erased,) = products(partial_products(slots["w"], state_s))
            _replace(config, n, inputs, slots, "w", "k", barriers)
            store_split(difference_s, u + erased)
            plgpu.commit_smem()
            (u,) = products(partial_products(slots["x"], difference_s))
            store_split(u_s, u)
            plgpu.commit_smem()
            for x, target in zip(u_s, saved[1:], strict=False):
                plgpu.copy_smem_to_gmem(x, target.at[b, tokens, h, columns])
        (o,) = products([*partial_products(slots["q"], state_s), *partial_products(slots["p"], writes)])
        store(o_s, o)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[b, tokens, h, columns])
        if len(barriers) > 1:
            plgpu.barrier_wait(barriers[1])
        # After o: both accumulators at once spill.
        (written,) = products(partial_products([transposed(x) for x in slots["k"]], writes))
        plgpu.wait_smem_to_gmem(0)
        return decayed + written

    _scan(part, start, end_g, step)


def scan_forward(
    config: ChannelConfig, save: bool, operands: Sequence[Array], start: Array, spans: Sequence[Array] = ()
) -> tuple[Array, ...]:
    """O, the last state and, to be saved, the states that enter chunks and, with beta, U in two parts.

    Args:
      config: sizes.
      save: whether the backward pass follows.
      operands: scaled q, k and w (k and w in two parts each; w with beta), v, chunk decay, P, X (two parts each; X with
        beta), the token scalars (with beta). Of float16, q and v have two parts each.
      start: [B, H, K, V] float32, or [B, H, P, K, V] with states per document.
      spans: the first chunk and the number of chunks of each document, [B, P, 2] int32. What belongs to no document is
        not written.
    """
    counts = _inputs(config, config.beta)
    shape = _group(counts, operands)[0]["v"][0].shape
    out = [jax.ShapeDtypeStruct(shape, config.dtype), jax.ShapeDtypeStruct(start.shape, jnp.float32)]
    if save:
        out += [_states(config), *[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * (2 * config.beta)]
    body = functools.partial(_forward_kernel, config=config, save=save)
    blocks = [config.dtype, *["bfloat16"] * 4]
    return _call(config, "channel_chunk_scan", body, out, operands, counts, "k", (start, *spans), blocks)


def _backward_kernel(*refs, config: ChannelConfig):
    beta, counts = config.beta, _inputs(config, False)
    inputs, refs = _group(counts, refs)
    (start, *spans), dr_g, (dstates_g, dstart_g), refs = take(
        refs, 1 + bool(config.documents), config.gradient_parts, 2
    )
    blocks, refs = _group(_arriving(config, counts, "w"), refs)
    parts = (2, config.gradient_parts, 2 * beta)
    scratch, (zero_s, *barriers) = take(refs, sum(parts))
    start_anew(zero_s)
    b, h, _ = (lax.axis_index(name) for name in AXES)
    columns, part = _columns(config), _find_part(config, spans)

    def step(i, state):
        n = part.first + part.steps - 1 - i
        slots = _start(config, n, inputs, blocks, zero_s, barriers[0])
        state_s, dr_s, du_s, _ = take(anew(zero_s, scratch), *parts)
        store_split(state_s, state)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s[0], dstates_g.at[b, h, n, :, columns])
        plgpu.barrier_wait(barriers[0])
        decayed = state * load_column(slots["decay"][0], config.value_block)
        p_t, x_t = ([transposed(x) for x in slots[name]] for name in "px")
        (dr,) = products([*partial_products(slots["k"], state_s), *partial_products(p_t, slots["v"])])
        if beta:
            _replace(config, n, inputs, slots, "k", "w", barriers)
            store_split(du_s, dr)
            plgpu.commit_smem()
            (dr,) = products(partial_products(x_t, du_s))
        store_split(dr_s, dr)
        plgpu.commit_smem()
        for x, target in zip(dr_s, dr_g, strict=True):
            plgpu.copy_smem_to_gmem(x, target.at[b, pl.ds(n * config.chunk, config.chunk), h, columns])
        if len(barriers) > 1:
            plgpu.barrier_wait(barriers[1])
        q_t, w_t = ([transposed(x) for x in slots[name]] for name in "qw")
        pairs = (*partial_products(q_t, slots["v"]), *(partial_products(w_t, dr_s) if beta else ()))
        (through_chunk,) = products(pairs)
        plgpu.wait_smem_to_gmem(0)
        return decayed + through_chunk

    _scan(part, start, dstart_g, step)


def scan_backward(
    config: ChannelConfig, operands: Sequence[Array], dend: Array, spans: Sequence[Array] = ()
) -> tuple[Array, ...]:
    """The parts of dR (without beta of dU = dV), the gradients of the states that leave chunks, and of the first.

    Args:
      config: sizes.
      operands: as of `scan_forward`, with dO for v and without token scalars.
      dend: gradient of the last state, [B, H, K, V] float32, or of the documents', [B, H, P, K, V].
      spans: as of `scan_forward`.
    """
    counts, parts = _inputs(config, False), config.gradient_parts
    shape = _group(counts, operands)[0]["v"][0].shape
    out = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * parts
    out += [_states(config), jax.ShapeDtypeStruct(dend.shape, jnp.float32)]
    body = functools.partial(_backward_kernel, config=config)
    blocks = ["bfloat16"] * (parts + 2 * config.beta)
    return _call(config, "channel_chunk_scan_backward", body, out, operands, counts, "w", (dend, *spans), blocks)


def _states(config: ChannelConfig) -> jax.ShapeDtypeStruct:
    shape = (config.batch, config.heads, config.chunks, config.key, config.value)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _call(
    config: ChannelConfig, name: str, body, out, operands, counts, last: str, others, blocks: Sequence[str]
) -> tuple[Array, ...]:
    """Launches a scan.

    Args:
      config: sizes.
      name: of the kernel.
      body: the kernel.
      out: shapes and dtypes of the results.
      operands: see `scan_forward`; `counts` is their number by kind.
      counts: see `_inputs`.
      last: the kind that is needed last, see `_arriving`.
      others: the states, and the chunks of documents.
      blocks: dtypes of the blocks of a chunk's value columns, scratch beside two of a state.
    """
    C, K, V = config.chunk, config.key, config.value_block
    block = functools.partial(shared_block, columns=V)
    # Leading axes of one: see `anew`.
    kinds = dict.fromkeys(("q", "k", "w"), block(1, C, K)) | dict.fromkeys(("p", "x"), block(1, C, C))
    kinds |= {"v": block(1, C, V), "decay": plgpu.SMEM((1, K), jnp.float32)}
    kinds["scalars"] = plgpu.SMEM((1, len(config.scalars), C), jnp.float32)
    arriving = _arriving(config, counts, last)
    scratch = [kinds[kind] for kind, count in arriving.items() for _ in range(count)]
    barriers = [plgpu.Barrier(num_arrivals=len(scratch))]
    if arriving != counts:
        barriers.append(plgpu.Barrier(num_arrivals=counts[last]))
    scratch += [block(1, K, V)] * 2 + [block(1, C, V, dtype=dtype) for dtype in blocks]
    scratch.append(plgpu.SMEM((1,), jnp.int32))
    grid = (config.batch, config.heads, max(config.documents, 1) * config.value // V)
    return call_kernel(config, name, body, grid, out, [*scratch, *barriers], (*operands, *others))
