"""The walk over the chunks that every memory with a matrix state takes, and its rule of differentiation.

Forward: the inverses of all chunks, then the scan. Backward: the scan from the end gives the gradients that
flow through the state; what is left knows of no other chunk and is one pass of XLA's products over all of
them (gradients.py). Saved: the inputs, the inverses, U and the states that enter the chunks.
"""

import functools

import jax
import jax.numpy as jnp

from memformer.core.chunking import pad_time, vary_like
from memformer.core.types import Array
from memformer.pallas.gpu import scan
from memformer.pallas.gpu.common import Cut
from memformer.pallas.gpu.gradients import chunk_gradients
from memformer.pallas.gpu.inverse import chunk_inverse
from memformer.pallas.gpu.rows import token_rows
from memformer.pallas.partition import split_batch_and_heads

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
    return _forward(cut, False, q, k, v, chunk_inverse(cut, k, rows), rows, start)


def _walk_forward(cut, q, k, v, rows, start):
    inverse = chunk_inverse(cut, k, rows)
    o, end, states, u = _forward(cut, True, q, k, v, inverse, rows, start)
    return (o, end), (q, k, v, rows, inverse, states, u)


def _walk_backward(cut, saved, cotangents):
    q, k, v, rows, inverse, states, u = saved
    do, dend = cotangents
    dr, dstates, dstart = _backward(cut, q, k, do, inverse, rows, dend)
    return *chunk_gradients(cut, q, k, v, rows, states, u, do, dr, dstates), dstart


_walk.defvjp(_walk_forward, _walk_backward)


def _forward(cut: Cut, save: bool, q, k, v, inverse, rows, start) -> tuple[Array, ...]:
    """scan.forward on every device's part."""
    operands = (*_by_time(q, k, v), start, *inverse, *rows)
    o, end, *saved = split_batch_and_heads(_forward_part, (cut, save), results=4 if save else 2)(*operands)
    return (*_by_time(o), end, *saved[:1], *_by_time(*saved[1:]))


def _forward_part(cut: Cut, save: bool, q, k, v, start, *rest) -> tuple[Array, ...]:
    q, k, v = _by_time(q, k, v)
    o, end, *saved = scan.forward(cut.local(q, v), save, q, k, v, *_grouped(cut, rest), start)
    return (*_by_time(o), end, *saved[:1], *_by_time(*saved[1:]))


def _backward(cut: Cut, q, k, do, inverse, rows, dend) -> tuple[Array, ...]:
    """scan.backward on every device's part."""
    operands = (*_by_time(q, k, do), dend, *inverse, *rows)
    dr, dstates, dstart = split_batch_and_heads(_backward_part, (cut,), results=3)(*operands)
    return (*_by_time(dr), dstates, dstart)


def _backward_part(cut: Cut, q, k, do, dend, *rest) -> tuple[Array, ...]:
    q, k, do = _by_time(q, k, do)
    dr, dstates, dstart = scan.backward(cut.local(q, do), q, k, do, *_grouped(cut, rest), dend)
    return (*_by_time(dr), dstates, dstart)


def _by_time(*arrays: Array) -> tuple[Array, ...]:
    """Heads before time, or back: what splits a call over devices wants heads second, the kernels read time second.

    Around a call one of these undoes the other, and the compiler drops both.
    """
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def _grouped(cut: Cut, rest) -> tuple:
    """The halves of the inverse and the rows, in tuples that may be empty."""
    halves = 2 * cut.beta
    return tuple(rest[:halves]), tuple(rest[halves:])
