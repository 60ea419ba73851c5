"""Causal softmax attention on a CPU where nothing but time hides a token: one head at a time.

The general form (tiled.py) serves masks, caches, decays and windows. Without them a head is read alone, in tiles of
keys by queries that stay in the cache of one core:

    scores  [D, C]      keys in rows, queries in columns, so that sums over keys are those of vectors
    values  [V + 1, D]  a row of ones sums the weights in the product that sums the values

A product of these sizes is one piece of work for XLA, and independent loops run side by side. So the heads are divided
into chains, one per core, each a loop over its heads, and no core waits for another inside a head. Where the norms of
queries and keys bound the scores of a head, its exponentials are taken as they are, without a running maximum.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.autodiff import in_forward_mode, reverse_once
from memformer.core.calls import AttentionCall
from memformer.core.numerics import accumulation_dtype
from memformer.core.sharding import vary_like
from memformer.core.symbolic import is_symbolic, padding_to
from memformer.core.types import Array, Float
from memformer.ops.attention import parts
from memformer.ops.attention.tiles import REVERSE_ONCE

__all__ = ["causal_attention", "serves"]

# Queries and keys per tile. XLA would divide products with longer sums over all cores.
QUERIES, KEYS = 256, 128

# Scores below this need no maximum: their exponentials, and sums of 2^60 of them, are normal float32 numbers.
SMALL = 40.0

# Each chain is compiled on its own.
MOST_CHAINS = 4


class _Sizes(NamedTuple):
    """Static settings of one call: the scale and precision of scores, and the number of chains."""

    scale: float
    precision: lax.Precision
    chains: int


def serves(call: AttentionCall) -> bool:
    """Whether a call is one of these: causal softmax over two tiles of float32 queries or more, on one CPU device."""
    batch, length, heads, _ = call.q.shape
    plain = call.causal and call.window is None and call.cache is None and call.decay is None
    if not (plain and call.read_kernel.normalized and call.chunk_size is None and parts.on_one_cpu()):
        return False
    if is_symbolic(batch, length) or in_forward_mode(call.q, call.k, call.v):
        return False
    arrays = call.q, call.k, call.v
    return (
        all(x is None for x in call.mask)
        and accumulation_dtype(*arrays) == jnp.float32
        and length >= 2 * QUERIES
        and 1 < parts.cores() <= min(MOST_CHAINS, batch * heads)
    )


def causal_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G V"], call: AttentionCall
) -> Float[Array, "B T H V"]:
    """Reads v by the softmax kernel of a call that this form serves; the output is in float32."""
    sizes = _Sizes(call.read_kernel.scale_for(q.shape[-1]), call.precision, parts.cores())
    arrays = (a.astype(jnp.float32) for a in (q, k, v))
    output, lse = _read(sizes, *(vary_like(a, q, k, v) for a in arrays))
    if call.sinks is None:
        return output
    sinks = call.sinks.astype(output.dtype).reshape(-1, 1, q.shape[2])
    return output * jax.nn.sigmoid(lse - sinks)[..., None]


def _split(sizes, batch, heads):
    """Heads of each chain, as numbers b H + h."""
    count = batch * heads
    bounds = [count * i // sizes.chains for i in range(sizes.chains + 1)]
    return [jnp.arange(first, last, dtype=jnp.int32) for first, last in itertools.pairwise(bounds)]


def _pad(x):
    """Tokens up to whole tiles; padded keys lie in the future of all queries."""
    return jnp.pad(x, ((0, 0), (0, padding_to(x.shape[1], QUERIES)), (0, 0), (0, 0)))


def _head(x, place, heads):
    """The tokens of head number `place`, [T, ...], of an array with `heads` per example or fewer."""
    example, head = place // heads, place % heads // (heads // x.shape[2])
    return lax.dynamic_slice(x, (example, 0, head, 0), (1, x.shape[1], 1, x.shape[3]))[0, :, 0]


def _join(pieces, batch, heads, length):
    """[B, T, H, ...] of the heads of all chains, each [n, N, C, ...]."""
    x = jnp.concatenate(pieces)
    x = x.reshape(batch, heads, -1, *x.shape[3:])[:, :, :length]
    return jnp.moveaxis(x, 1, 2)


def _product(sizes, a, b):
    return jnp.dot(a, b, precision=sizes.precision)


def _read_plain(sizes, q, k, v):
    batch, length, heads, _ = q.shape
    q, k, v = map(_pad, (q, k, v))

    def head(place):
        return _read_head(sizes, *(_head(x, place, heads) for x in (q, k, v)))

    results = [lax.map(head, places) for places in _split(sizes, batch, heads)]
    return tuple(_join(pieces, batch, heads, length) for pieces in zip(*results, strict=True))


def _read_head(sizes, q, k, v):
    """Output [N, C, V] and log-sum-exp [N, C] of one head."""
    ones = jnp.ones_like(v[:, :1])
    v = jnp.swapaxes(jnp.concatenate([v, ones], axis=1).reshape(-1, KEYS, v.shape[1] + 1), 1, 2)
    q = (q * sizes.scale).reshape(-1, QUERIES, q.shape[1])
    largest = _longest(q) * _longest(k)
    k = k.reshape(-1, KEYS, k.shape[1])
    rows = functools.partial(_small_scores, sizes), functools.partial(_any_scores, sizes)
    small, any_size = (functools.partial(_rows, row) for row in rows)
    return lax.cond(largest < SMALL, small, any_size, q, k, v)


def _longest(x):
    """The largest Euclidean norm of the vectors x."""
    return jnp.sqrt(jnp.max(jnp.sum(x * x, axis=-1)))


def _rows(row, q, k, v):
    """Output and log-sum-exp of all rows of tiles; `row` sums over the keys of one."""

    def one(_, inputs):
        i, q = inputs
        total, top = row(i, q.T, k, v)
        lse = jnp.log(total[-1])
        return None, ((total[:-1] / total[-1:]).T, lse if top is None else top + lse)

    return lax.scan(one, None, (jnp.arange(len(q), dtype=jnp.int32), q))[1]


def _small_scores(sizes, i, q, k, v):
    """Sums of exponentials, times values and alone, for queries whose scores need no maximum."""
    pieces = QUERIES // KEYS

    def tile(j, total):
        return total + _product(sizes, v[j], jnp.exp(_product(sizes, k[j], q)))

    total = lax.fori_loop(0, i * pieces, tile, vary_like(jnp.zeros((v.shape[1], QUERIES), q.dtype), q))
    for piece in range(pieces):
        # Only the later queries see the later keys of the diagonal.
        start, j = piece * KEYS, i * pieces + piece
        scores = _product(sizes, k[j], q[:, start:])
        weights = jnp.where(_order(*scores.shape) <= 0, jnp.exp(scores), jnp.zeros_like(scores))
        later = total[:, start:] + _product(sizes, v[j], weights)
        total = jnp.concatenate([total[:, :start], later], axis=1)
    return total, None


def _any_scores(sizes, i, q, k, v):
    """The same sums relative to a running maximum, and the maximum."""
    least = jnp.finfo(q.dtype).min

    def tile(j, sums):
        total, top = sums
        seen = _order(KEYS, QUERIES) <= i * QUERIES - j * KEYS
        scores = jnp.where(seen, _product(sizes, k[j], q), least)
        higher = jnp.maximum(top, jnp.max(scores, axis=0))
        weights = jnp.exp(scores - higher[None])
        return total * jnp.exp(top - higher)[None] + _product(sizes, v[j], weights), higher

    start = vary_like(jnp.zeros((v.shape[1], QUERIES), q.dtype), q), jnp.full_like(q[0], least / 2)
    return lax.fori_loop(0, (i + 1) * (QUERIES // KEYS), tile, start)


def _order(keys, queries):
    """The place of each key less that of each query, of a tile on the diagonal."""
    return jnp.arange(keys, dtype=jnp.int32)[:, None] - jnp.arange(queries, dtype=jnp.int32)[None]


_read = jax.custom_vjp(_read_plain, nondiff_argnums=(0,))


def _read_forward(sizes, q, k, v):
    output, lse = reverse_once(REVERSE_ONCE, *_read_plain(sizes, q, k, v))
    return (output, lse), (q, k, v, output, lse)


def _read_backward(sizes, saved, cotangents):
    q, k, v, output, lse = saved
    do, dlse = cotangents
    batch, length, heads, _ = q.shape
    delta = jnp.sum(output * do, axis=-1) - dlse
    groups = k.shape[2]
    q, k, v, do, lse, delta = map(_pad, (q, k, v, do, lse[..., None], delta[..., None]))

    def head(place):
        return _gradient_head(sizes, *(_head(x, place, heads) for x in (q, k, v, do, lse, delta)))

    results = [lax.map(head, places) for places in _split(sizes, batch, heads)]
    dq, dk, dv = (_join(pieces, batch, heads, length) for pieces in zip(*results, strict=True))
    dk, dv = (jnp.sum(x.reshape(batch, length, groups, -1, x.shape[-1]), axis=3) for x in (dk, dv))
    return reverse_once(REVERSE_ONCE, dq, dk, dv)


def _gradient_head(sizes, q, k, v, do, lse, delta):
    """Gradients of q, [N, C, K], k and v, [M, D, ...], of one head; the last two arguments are [T, 1]."""
    pieces = QUERIES // KEYS
    k, v = (x.reshape(-1, KEYS, x.shape[1]) for x in (k, v))
    columns = jnp.swapaxes(k, 1, 2)
    least = jnp.finfo(q.dtype).min

    def row(keys, inputs):
        i, q, do, lse, delta = inputs
        q = q * sizes.scale
        q_columns, do_columns, lse, delta = q.T, do.T, lse.T, delta.T

        def tile(j, carry):
            dq, dk, dv = carry
            scores = _product(sizes, k[j], q_columns) - lse
            seen = _order(KEYS, QUERIES) <= i * QUERIES - j * KEYS
            weights = jnp.exp(jnp.where(seen, scores, least))
            dscores = weights * (_product(sizes, v[j], do_columns) - delta)
            dq = dq + _product(sizes, columns[j], dscores)
            return dq, dk.at[j].add(_product(sizes, dscores, q)), dv.at[j].add(_product(sizes, weights, do))

        dq, *keys = lax.fori_loop(0, (i + 1) * pieces, tile, (jnp.zeros_like(q_columns), *keys))
        return tuple(keys), (dq * sizes.scale).T

    rows = [x.reshape(-1, QUERIES, x.shape[1]) for x in (q, do, lse, delta)]
    start = jnp.zeros_like(k), jnp.zeros_like(v)
    (dk, dv), dq = lax.scan(row, start, (jnp.arange(len(rows[0]), dtype=jnp.int32), *rows))
    return dq, dk, dv


_read.defvjp(_read_forward, _read_backward)
