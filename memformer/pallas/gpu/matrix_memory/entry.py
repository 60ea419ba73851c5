"""The walk over the chunks that every memory with a matrix state takes, and its rule of differentiation.

Forward: what needs no state, for all chunks at once (prepare.py), then the scan. Backward: the scan from the end
gives the gradients that flow through the state; the rest knows of no other chunk (gradients.py). Saved: the inputs,
P, X, W and the states that enter the chunks.
"""

import functools

import jax
import jax.numpy as jnp

from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.pallas.gpu.common import Cut
from memformer.pallas.gpu.matrix_memory import chunk_scan as scan
from memformer.pallas.gpu.matrix_memory.intra_chunk import prepare
from memformer.pallas.gpu.matrix_memory.intra_chunk_backward import chunk_gradients
from memformer.pallas.gpu.matrix_memory.token_scalars import token_rows
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]


def run(cut: Cut, q: Array, k: Array, v: Array, beta, decay, index, state: Array | None) -> tuple[Array, Array]:
    """q, k [B, T, G, K], v [B, T, H, V], beta and decay [B, T, H], index [B, T]: o [B, T, H, V] and the last state."""
    length, key, value = q.shape[1], q.shape[-1], v.shape[-1]
    rows = token_rows(cut, beta, decay, index)
    if state is None:
        state = vary_like(jnp.zeros((cut.batch, cut.heads, key, value), jnp.float32), q, k, v, *rows)

    def widen(x, width):
        return pad_time(pad_time(x, cut.chunk), width, axis=3)

    state = pad_time(pad_time(state.astype(jnp.float32), cut.key, axis=2), cut.value, axis=3)
    o, end = _walk(cut, widen(q, cut.key), widen(k, cut.key), widen(v, cut.value), rows, state)
    return o[:, :length, :, :value], end[:, :, :key, :value]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(cut: Cut, q, k, v, rows, start):
    return tuple(_forward(cut, False, q, k, v, rows, start))


def _walk_forward(cut, q, k, v, rows, start):
    o, end, *saved = _forward(cut, True, q, k, v, rows, start)
    return (o, end), (q, k, v, rows, saved)


def _walk_backward(cut, inputs, cotangents):
    q, k, v, rows, saved = inputs
    do, dend = cotangents
    operands = (*_by_time(q, k, v, do), dend, *saved, *rows)
    call = split_batch_and_heads(_backward_part, (cut,), results=4 + len(rows))
    dq, dk, dv, dstart, *drows = call(*operands)
    return *_by_time(dq, dk, dv), tuple(drows), dstart


_walk.defvjp(_walk_forward, _walk_backward)


def _forward(cut: Cut, save: bool, q, k, v, rows, start) -> list[Array]:
    """O, the last state, and what the backward pass wants of them, on every device's part."""
    results = 2 + (2 + 4 * cut.beta if save else 0)
    call = split_batch_and_heads(_forward_part, (cut, save), results=results)
    o, end, *saved = call(*_by_time(q, k, v), start, *rows)
    return [*_by_time(o), end, *saved]


def _forward_part(cut: Cut, save: bool, q, k, v, start, *rows) -> tuple[Array, ...]:
    """o [B, H, T, V], the last state; to save them P, X, the states that enter chunks, and W."""
    q, k, v = _by_time(q, k, v)
    cut = cut.local(q, v)
    read, inverse = prepare(cut, q, k, rows)
    o, end, *saved = scan.forward(cut, save, q, k, v, read, inverse, rows, start)
    if save:
        saved = [read, *inverse, *saved[:1], *_by_time(*saved[1:])]
    return (*_by_time(o), end, *saved)


def _backward_part(cut: Cut, q, k, v, do, dend, read, *rest) -> tuple[Array, ...]:
    q, k, v, do = _by_time(q, k, v, do)
    cut = cut.local(q, v)
    inverse, (states, *w), rows = rest[: 2 * cut.beta], rest[2 * cut.beta : 1 + 4 * cut.beta], rest[1 + 4 * cut.beta :]
    w = _by_time(*w)
    dv, dstates, dstart = scan.backward(cut, q, k, do, read, inverse, rows, dend)
    values = (w, (dv,)) if cut.beta else ((v,), ())
    dq, dk, drows = chunk_gradients(cut, q, k, do, *values, states, dstates, rows)
    return (*_by_time(dq, dk, dv), dstart, *drows)


def _by_time(*arrays: Array) -> tuple[Array, ...]:
    """Heads before time, or back: what splits a call over devices wants heads second, the kernels read time second.

    Around a call one of these undoes the other, and the compiler drops both.
    """
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)
