"""What each chunk's gradients are once the scans have passed: no chunk knows of another. A Mosaic GPU kernel.

With S the state that enters, dS' the gradient of the one that leaves, dV from the backward scan, and the letters of
scan.py and prepare.py (rows of F and N are tokens that read):

    F = s D (dO W^T), i <= r       N = - D (dV W^T), i < r      G = dO S^T      E = dV S^T      L = W dS'^T
    dQ = F b K + s c G             dK = b (F^T Q + N^T K) + N b K - c E + b w L

b is on the columns of F and N. Its own gradient is W dV / b, summed over value columns: a write is b W, and b times
the gradient of all writes is dV. (Sums over keys of the products above say the same, but cancel when keys repeat.)
Sums over the key channels of the products are the gradients of the other rows:

    c: s Q G - K E, and S dS' for the last token      w: b K L
    log decay of a reader: Q (F b K) + K (N b K); of a writer, negative: b K (F^T Q + N^T K)

Where writes add, b is one, and N and E are not there. Where keys repeat the sum in F b K cancels: F b and W are kept as
two bfloat16 halves there.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.common import AXES, Cut, call_kernel, iotas, products, put, put_parts, shared, turned
from memformer.pallas.gpu.matrix_memory.token_scalars import Tokens

__all__ = ["chunk_gradients"]

# Sums of a token over the key channels, as the kernel writes them.
SUMS = ("reader", "enter", "writer", "left", "reader of keys", "enter of keys")

# Key channels a warpgroup.
HALF = 64


class _Blocks(NamedTuple):
    """Shared memory of a program; q, k, state and dstate are of one warpgroup's key channels.

    Attributes:
      q, k, do, state, dstate: as `chunk_gradients` has them.
      w: W by halves, or V.
      dv: gradient of the values; none where writes add.
      f, n: F and N; f alone where writes add.
      fb, nb: F b by halves, and N b; F and nothing where writes add.
      stage: where dQ goes, once every warpgroup is done with F b.
    """

    q: Any
    k: Any
    do: Any
    w: Sequence[Any]
    dv: Sequence[Any]
    state: Any
    dstate: Any
    f: Any
    n: Sequence[Any]
    fb: Sequence[Any]
    nb: Sequence[Any]
    stage: Any


def _blocks(cut: Cut, half: int, refs, squares) -> _Blocks:
    q, k, do, *values, state, dstate = refs
    w, dv = values[: 1 + cut.beta], values[1 + cut.beta :]
    q, k, state, dstate = (ref.at[half] for ref in (q, k, state, dstate))
    if cut.beta:
        f, n, nb, *fb = squares
        return _Blocks(q, k, do, w, dv, state, dstate, f, (n,), fb, (nb,), fb[half])
    return _Blocks(q, k, do, w, dv, state, dstate, squares[0], (), squares[:1], (), squares[1 + half])


def _kernel(*refs, cut: Cut):
    named = bool(cut.names)
    takes = 6 + 2 * cut.beta + named
    results = 2 + cut.beta + 2 * cut.decay
    inputs, outputs, refs = refs[:takes], refs[takes : takes + results], refs[takes + results :]
    blocks, squares, barriers = refs[:takes], refs[takes:-2], refs[-2:]
    count = _squares(cut)
    squares, sums_s = squares[:count], squares[count:]
    half = lax.axis_index("half")
    pl.when(half == 0)(lambda: _load(cut, inputs, blocks, barriers[0]))
    plgpu.barrier_wait(barriers[0])
    tokens = Tokens(cut, blocks[-1] if named else None)
    for i in range(cut.key // HALF):
        # A branch for each warpgroup: with addresses that are not known, the registers do not suffice.
        of_half = _blocks(cut, i, blocks[: takes - named], squares)
        pl.when(half == i)(functools.partial(_work, cut, i, tokens, of_half, sums_s, outputs, barriers[1]))


def _work(cut: Cut, half: int, tokens: Tokens, blocks: _Blocks, sums_s, outputs, passed) -> None:
    """What one warpgroup does: the gradients of its 64 key channels."""
    b, hp, n = (lax.axis_index(name) for name in AXES)
    place = (b, pl.ds(n * cut.chunk, cut.chunk), hp, pl.ds(half * HALF, HALF))
    (dq_g, dk_g), outputs = outputs[:2], outputs[2:]
    write_s, (sums_s, kept_s) = sums_s[: cut.beta], [x.at[half] for x in sums_s[cut.beta :]] or (None, None)

    def meet():
        plgpu.barrier_arrive(passed)
        plgpu.barrier_wait(passed)

    # All three conditions hold. A branch ends the life of the operands' addresses, which the compiler else keeps from
    # one product to the next and spills.
    @pl.when(b < cut.batch)
    def _():
        if cut.decay:
            kept_s[...] = _sum_of(blocks.state, blocks.dstate)
        if cut.beta and half == 0:
            write_s[0][...] = tokens.over_beta(_sum_of(blocks.w[0], blocks.dv[0]))
        _store_weights(cut, tokens, half, blocks)

    meet()

    @pl.when(n < cut.chunks)
    def _():
        dq = _query_gradients(cut, tokens, sums_s, blocks)
        meet()
        put(blocks.stage, dq)

    @pl.when(hp < cut.heads * (cut.value // _width(cut)))
    def _():
        put(blocks.q, _key_gradients(cut, tokens, sums_s, blocks))

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(blocks.stage, dq_g.at[place])
    plgpu.copy_smem_to_gmem(blocks.q, dk_g.at[place])
    if cut.beta and half == 0:
        plgpu.copy_smem_to_gmem(write_s[0], outputs[0].at[b, hp, n])
    for source, target in zip([sums_s, kept_s] * cut.decay, outputs[cut.beta :], strict=False):
        plgpu.copy_smem_to_gmem(source, target.at[b, hp, n, half])
    plgpu.wait_smem_to_gmem(0)


def _query_gradients(cut: Cut, tokens: Tokens, sums_s, of: _Blocks) -> Array:
    """dQ."""
    (from_state,) = products(((of.do, turned(of.state)),))
    _store_sum(sums_s, "enter", of.q, cut.scale * from_state)
    dq = cut.scale * tokens.times(("enter",), from_state)
    (from_writes,) = products([(part, of.k) for part in of.fb])
    _store_sum(sums_s, "reader", of.q, from_writes)
    return dq + from_writes


def _key_gradients(cut: Cut, tokens: Tokens, sums_s, of: _Blocks) -> Array:
    """dK."""
    (back,) = products([(turned(square), x) for square, x in zip((of.f, *of.n), (of.q, of.k), strict=False)])
    _store_sum(sums_s, "writer", of.k, back)
    dk = tokens.times(("beta",), back)
    (kept,) = products([(of.w[0], turned(of.dstate))])
    _store_sum(sums_s, "left", of.k, kept)
    dk = dk + tokens.times(("beta", "leave"), kept)
    if not cut.beta:
        return dk
    (from_reads,) = products(((of.nb[0], of.k),))
    _store_sum(sums_s, "reader of keys", of.k, from_reads)
    (from_state,) = products(((of.dv[0], turned(of.state)),))
    _store_sum(sums_s, "enter of keys", of.k, from_state)
    return dk + from_reads - tokens.times(("enter",), from_state)


def _store_sum(sums_s, name: str, ref, x: Array) -> None:
    """The sum over key channels of a block times x, where decay wants it."""
    if sums_s is not None:
        sums_s.at[SUMS.index(name)][...] = _over_columns(_wide(ref), x)


def _sum_of(a, b) -> Array:
    """Sums over the value columns of a product, a row each; part by part, or they take half of the registers."""
    parts = [pl.ds(i, HALF) for i in range(0, a.shape[1], HALF)]
    return functools.reduce(jnp.add, (_over_columns(*(_wide(x.at[:, part]) for x in (a, b))) for part in parts))


def _load(cut: Cut, sources, blocks, barrier) -> None:
    """Asks for the blocks of this program: one chunk of a head, one block of value columns."""
    b, hp, n = (lax.axis_index(name) for name in AXES)
    parts = cut.value // _width(cut)
    h, tokens = lax.div(hp, jnp.int32(parts)), pl.ds(n * cut.chunk, cut.chunk)
    columns = pl.ds(lax.rem(hp, jnp.int32(parts)) * _width(cut), _width(cut))
    group = lax.div(h, jnp.int32(cut.repeat))
    keys = [(b, tokens, group, pl.ds(i, HALF)) for i in range(0, cut.key, HALF)]
    states = [(b, h, n, pl.ds(i, HALF), columns) for i in range(0, cut.key, HALF)]
    values = [(b, tokens, h, columns)] * (2 + 2 * cut.beta)
    places = [keys] * 2 + values + [states] * 2 + [(b, h, n)] * bool(cut.names)
    for source, place, block in zip(sources, places, blocks, strict=True):
        several = isinstance(place, list)
        for i, one in enumerate(place if several else [place]):
            plgpu.copy_gmem_to_smem(source.at[one], block.at[i] if several else block, barrier)


def _store_weights(cut: Cut, tokens: Tokens, half: int, of: _Blocks) -> None:
    """F b and N b, then F and N; only F where writes add. Two warpgroups share them out."""
    for i, (of_reader, writes) in enumerate(((of.do, of.w), *((dv, of.w[:1]) for dv in of.dv))):
        if i % (cut.key // HALF) != half:
            continue
        places = iotas(cut.chunk)
        (x,) = tokens.weigh(places, *products([(of_reader, turned(part)) for part in writes]))
        x = jnp.where(places[0] > places[1], -x, 0.0) if i else x * cut.scale
        if cut.beta:
            felt = tokens.times_beta(x)
            if i:
                put(of.nb[0], felt)
            else:
                put_parts(of.fb, felt)
        put(of.n[0] if i else of.f, x)
    plgpu.commit_smem()


def _wide(ref) -> Array:
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _over_columns(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=1)


def _squares(cut: Cut) -> int:
    """Blocks [C, C]: F, N, N b and the halves of F b; or F, and where each warpgroup leaves dQ."""
    return 5 if cut.beta else 1 + cut.key // HALF


def _width(cut: Cut) -> int:
    """Value columns a program: what fits in shared memory beside 128 keys."""
    return 128 if cut.value % 128 == 0 else 64


def chunk_gradients(cut: Cut, q, k, do, w, dv, states, dstates, rows) -> tuple:
    """Gradients of q, k and the rows.

    Args:
      cut: sizes.
      q, k: [B, T, G, K] bfloat16.
      do: gradient of the output, [B, T, H, V] bfloat16.
      w: W by halves, likewise; (V,) where writes add.
      dv: gradient of the values, likewise; () where writes add.
      states, dstates: [B, H, N, K, V] bfloat16, the state that enters each chunk, and the gradient of the one that
        leaves it.
      rows: as token_rows makes them.
    """
    C, V, halves = cut.chunk, _width(cut), cut.key // HALF
    many = cut.heads * (cut.value // V)
    programs = (cut.batch, many, cut.chunks)
    out = [jax.ShapeDtypeStruct((cut.batch, q.shape[1], many, cut.key), q.dtype)] * 2
    scratch = [shared(HALF, halves, C, HALF)] * 2 + [shared(HALF, C, V)] * (2 + 2 * cut.beta)
    scratch += [shared(HALF, halves, HALF, V)] * 2
    scratch += [plgpu.SMEM((len(cut.names), C), jnp.float32)] * len(rows)
    scratch += [shared(HALF, C, C)] * _squares(cut)
    for shape in ((C,),) * cut.beta + ((halves, len(SUMS), C), (halves, HALF)) * cut.decay:
        out.append(jax.ShapeDtypeStruct((*programs, *shape), jnp.float32))
        scratch.append(plgpu.SMEM(shape, jnp.float32))
    operands = (q, k, do, *w, *dv, states, dstates, *rows)
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


def _row_gradients(cut: Cut, rows, *sums: Array) -> tuple[Array, ...]:
    """Gradients of the rows, of sums by program: [C] of writes, then [halves, names, C] and [halves, 64] for decay."""
    sums = [x.reshape(cut.batch, cut.heads, -1, *x.shape[2:]).sum(axis=2) for x in sums]
    values = dict(zip(cut.names, jnp.moveaxis(rows[0], 3, 0), strict=True))
    zero = jnp.zeros_like(rows[0][:, :, :, 0])
    grads = {"beta": sums.pop(0)} if cut.beta else {}
    if cut.decay:
        of = dict(zip(SUMS, jnp.moveaxis(sums[0].sum(axis=3), 3, 0), strict=True))
        beta, enter, reader = values.get("beta", 1.0), of["enter"], of["reader"]
        if cut.beta:
            enter, reader = enter - of["enter of keys"], reader + of["reader of keys"]
        grads |= {
            "enter": enter.at[..., -1].add(sums[1].sum(axis=(3, 4))),
            "leave": beta * of["left"],
            "total": reader,
            "-total": beta * of["writer"],
        }
    return (jnp.stack([grads.get(name, zero) for name in cut.names], axis=3),)
