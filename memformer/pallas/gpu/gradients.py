"""What each chunk's gradients are once the scans have passed: no chunk knows of another. A Mosaic GPU kernel.

With S the state that enters, dS' the gradient of the one that leaves, dV from the backward scan, and the letters of
scan.py and prepare.py (rows of F and N are tokens that read):

    F = s D (dO W^T), i <= r       N = - D (dV W^T), i < r      G = dO S^T      E = dV S^T      L = W dS'^T
    dQ = F b K + s c G             dK = b (F^T Q + N^T K) + N b K - c E + b w L

b is on the columns of F and N. Sums over the key channels of the same products are the gradients of the rows:

    b: K (F^T Q + N^T K) + w K L       c: s Q G - K E, and S dS' for the last token      w: b K L
    log decay of a reader: Q (F b K) + K (N b K); of a writer, negative: b K (F^T Q + N^T K)

Where writes add, b is one, and N and E are not there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core import compat
from memformer.core.types import Array
from memformer.pallas.gpu.common import AXES, Cut, call_kernel, iotas, products, put, shared, turned
from memformer.pallas.gpu.rows import Tokens

__all__ = ["chunk_gradients"]

# Sums of a token over the key channels, as the kernel writes them.
SUMS = ("reader", "enter", "writer", "left", "reader of keys", "enter of keys")

# Key channels a warpgroup.
HALF = 64


def _kernel(*refs, cut: Cut):
    named = bool(cut.names)
    takes = 6 + cut.beta + named
    inputs, outputs, refs = refs[:takes], refs[takes : takes + 2 + 2 * named], refs[takes + 2 + 2 * named :]
    blocks, stage, squares, barriers = refs[:takes], refs[takes : takes + 2], refs[takes + 2 : -2], refs[-2:]
    squares, sums_s = squares[: 1 + 3 * cut.beta], squares[1 + 3 * cut.beta :]
    half = lax.axis_index("half")
    pl.when(half == 0)(lambda: _load(cut, inputs, blocks, barriers[0]))
    plgpu.barrier_wait(barriers[0])
    for i in range(cut.key // HALF):
        # A branch for each warpgroup: with addresses that are not known, the registers do not suffice.
        work = functools.partial(_work, cut, i, blocks, stage, squares, sums_s, outputs, barriers[1])
        pl.when(half == i)(work)


def _work(cut: Cut, half: int, blocks, stage, squares, sums_s, outputs, stored) -> None:
    """What one warpgroup does: the gradients of its 64 key channels."""
    q, k, do, w, *dv, state, dstate = blocks[: 6 + cut.beta]
    tokens = Tokens(cut, blocks[-1] if cut.names else None)
    b, hp, n = (lax.axis_index(name) for name in AXES)
    place = (b, pl.ds(n * cut.chunk, cut.chunk), hp, pl.ds(half * HALF, HALF))
    q, k, state, dstate, *stage = (ref.at[half] for ref in (q, k, state, dstate, *stage))
    sums_s = [ref.at[half] for ref in sums_s]

    # All three conditions hold. A branch ends the life of the operands' addresses, which the compiler else keeps from
    # one product to the next and spills.
    @pl.when(b < cut.batch)
    def _():
        if cut.names:
            _store_kept(cut, sums_s[1], state, dstate)
        _store_weights(cut, tokens, half, (do, *dv), w, squares)

    plgpu.barrier_arrive(stored)
    plgpu.barrier_wait(stored)

    @pl.when(n < cut.chunks)
    def _():
        put(stage[0], _query_gradients(cut, tokens, sums_s, (q, k, do, state, squares)))

    @pl.when(hp < cut.heads * (cut.value // _width(cut)))
    def _():
        put(stage[1], _key_gradients(cut, tokens, sums_s, (q, k, w, dv, state, dstate, squares)))

    plgpu.commit_smem()
    for source, target in zip(stage, outputs[:2], strict=True):
        plgpu.copy_smem_to_gmem(source, target.at[place])
    for source, target in zip(sums_s, outputs[2:], strict=True):
        plgpu.copy_smem_to_gmem(source, target.at[b, hp, n, half])
    plgpu.wait_smem_to_gmem(0)


def _query_gradients(cut: Cut, tokens: Tokens, sums_s, refs) -> Array:
    """dQ."""
    q, k, do, state, squares = refs
    (from_state,) = products(((do, turned(state)),))
    _store_sum(sums_s, "enter", q, cut.scale * from_state)
    dq = cut.scale * tokens.times(("enter",), from_state)
    (from_writes,) = products(((squares[0], k),))
    _store_sum(sums_s, "reader", q, from_writes)
    return dq + from_writes


def _key_gradients(cut: Cut, tokens: Tokens, sums_s, refs) -> Array:
    """dK."""
    q, k, w, dv, state, dstate, squares = refs
    (back,) = products([(turned(square), x) for square, x in zip(squares[-1 - cut.beta :], (q, k), strict=False)])
    _store_sum(sums_s, "writer", k, back)
    dk = tokens.times(("beta",), back)
    (kept,) = products([(w, turned(dstate))])
    _store_sum(sums_s, "left", k, kept)
    dk = dk + tokens.times(("beta", "leave"), kept)
    if not cut.beta:
        return dk
    (from_reads,) = products(((squares[1], k),))
    _store_sum(sums_s, "reader of keys", k, from_reads)
    (from_state,) = products(((dv[0], turned(state)),))
    _store_sum(sums_s, "enter of keys", k, from_state)
    return dk + from_reads - tokens.times(("enter",), from_state)


def _store_sum(sums_s, name: str, ref, x: Array) -> None:
    """The sum over key channels of a block times x, where the rows have gradients."""
    if sums_s:
        sums_s[0].at[SUMS.index(name)][...] = _over_keys(_wide(ref), x)


def _store_kept(cut: Cut, target, state, dstate) -> None:
    """Sums over the value columns of S dS', a key channel each; part by part, or they take half of the registers."""
    parts = [pl.ds(i, HALF) for i in range(0, _width(cut), HALF)]
    target[...] = functools.reduce(
        jnp.add, (_over_keys(*(_wide(x.at[:, part]) for x in (state, dstate))) for part in parts)
    )


def _load(cut: Cut, sources, blocks, barrier) -> None:
    """Asks for the blocks of this program: one chunk of a head, one block of value columns."""
    b, hp, n = (lax.axis_index(name) for name in AXES)
    parts = cut.value // _width(cut)
    h, tokens = lax.div(hp, jnp.int32(parts)), pl.ds(n * cut.chunk, cut.chunk)
    columns = pl.ds(lax.rem(hp, jnp.int32(parts)) * _width(cut), _width(cut))
    group = lax.div(h, jnp.int32(cut.repeat))
    keys = [(b, tokens, group, pl.ds(i, HALF)) for i in range(0, cut.key, HALF)]
    states = [(b, h, n, pl.ds(i, HALF), columns) for i in range(0, cut.key, HALF)]
    places = [keys] * 2 + [(b, tokens, h, columns)] * (2 + cut.beta) + [states] * 2 + [(b, h, n)] * bool(cut.names)
    for source, place, block in zip(sources, places, blocks, strict=True):
        several = isinstance(place, list)
        for i, one in enumerate(place if several else [place]):
            plgpu.copy_gmem_to_smem(source.at[one], block.at[i] if several else block, barrier)


def _store_weights(cut: Cut, tokens: Tokens, half: int, of_readers, w, squares) -> None:
    """F b and N b, then F and N; only F where writes add. Two warpgroups share them out."""
    count = len(of_readers)
    for i, of_reader in enumerate(of_readers):
        if i % (cut.key // HALF) != half:
            continue
        places = iotas(cut.chunk)
        (x,) = tokens.weigh(places, *products(((of_reader, turned(w)),)))
        x = jnp.where(places[0] > places[1], -x, 0.0) if i else x * cut.scale
        if cut.beta:
            put(squares[i], tokens.times_beta(x))
        put(squares[i - count], x)
    plgpu.commit_smem()


def _wide(ref) -> Array:
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _over_keys(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=1)


def _width(cut: Cut) -> int:
    """Value columns a program: what fits in shared memory beside 128 keys."""
    return 128 if cut.value % 128 == 0 else 64


def chunk_gradients(cut: Cut, q, k, do, w, dv, states, dstates, rows) -> tuple:
    """Gradients of q, k and the rows.

    Args:
      cut: sizes.
      q, k: [B, T, G, K] bfloat16.
      do, w: gradient of the output, and W (V where writes add), [B, T, H, V] bfloat16.
      dv: gradient of the values, likewise; () where writes add.
      states, dstates: [B, H, N, K, V] bfloat16, the state that enters each chunk, and the gradient of the one that
        leaves it.
      rows: as token_rows makes them.
    """
    C, V, halves = cut.chunk, _width(cut), cut.key // HALF
    many = cut.heads * (cut.value // V)
    programs = (cut.batch, many, cut.chunks)
    out = [jax.ShapeDtypeStruct((cut.batch, q.shape[1], many, cut.key), q.dtype)] * 2
    keys = [shared(HALF, halves, C, HALF)] * 2
    scratch = [*keys, *[shared(HALF, C, V)] * (2 + cut.beta), *[shared(HALF, halves, HALF, V)] * 2]
    scratch += [plgpu.SMEM((len(cut.names), C), jnp.float32)] * len(rows)
    scratch += [*keys, *[shared(HALF, C, C)] * (4 if cut.beta else 1)]
    for shape in ((halves, len(SUMS), C), (halves, HALF)) if cut.names else ():
        out.append(jax.ShapeDtypeStruct((*programs, *shape), jnp.float32))
        scratch.append(plgpu.SMEM(shape, jnp.float32))
    operands = (q, k, do, w, *dv, states, dstates, *rows)
    copies = len(operands) + 4 * (halves - 1)
    scratch += [plgpu.Barrier(num_arrivals=copies), plgpu.Barrier(num_arrivals=halves)]
    body = functools.partial(_kernel, cut=cut)
    threads = {"num_threads": halves, "thread_name": "half"}
    dq, dk, *sums = call_kernel(cut, "gradients", body, programs, out, scratch, operands, **threads)
    return _joined(dq, q), _joined(dk, k), _row_gradients(cut, rows, *sums) if cut.names else ()


def _joined(x: Array, like: Array) -> Array:
    """[B, T, many, K] gradients, summed over those that share a head of `like`."""
    if x.shape == like.shape:
        return x
    x = x.reshape(*like.shape[:3], -1, like.shape[3])
    return jnp.sum(x.astype(jnp.float32), axis=3).astype(like.dtype)


def _row_gradients(cut: Cut, rows, sums: Array, kept: Array) -> tuple[Array, ...]:
    """Gradients of the rows, of sums [B, H * parts, N, halves, 4, C] and kept [B, H * parts, N, halves, 64]."""
    sums, kept = (x.reshape(cut.batch, cut.heads, -1, *x.shape[2:]).sum(axis=(2, 4)) for x in (sums, kept))
    of = dict(zip(SUMS, jnp.moveaxis(sums, 3, 0), strict=True))
    values = dict(zip(cut.names, jnp.moveaxis(rows[0], 3, 0), strict=True))
    one = jnp.ones_like(of["left"])
    beta, leave = values.get("beta", one), values.get("leave", one)
    enter, reader = of["enter"], of["reader"]
    if cut.beta:
        enter, reader = enter - of["enter of keys"], reader + of["reader of keys"]
    grads = {
        "enter": enter.at[..., -1].add(kept.sum(axis=-1)),
        "leave": beta * of["left"],
        "beta": of["writer"] + leave * of["left"],
        "total": reader,
        "-total": beta * of["writer"],
    }
    return (jnp.stack([grads.get(name, jnp.zeros_like(one)) for name in cut.names], axis=3),)
