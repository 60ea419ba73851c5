"""The delta rule on TPU.

Per chunk and head, with S the state that enters, D the decay between tokens (0 where hidden), c and w
the rows enter and leave (rows.py), s the scale:

    A = beta D (K K^T), i < r      X = (I + A)^-1       U = X beta (V - c K S)
    P = s D (Q K^T), i <= r        O = s c Q S + P U    S' = c_C S + K^T (w U)

and backward, where all of this is computed again:

    dU = P^T dO + w K dS'          dR = X^T dU          dV = beta dR          E = c dV
    dP = dO U^T                    dA = -dR U^T         F = s D dP            M = beta D dA, i < r
    dQ = F K + s c dO S^T          dK = F^T Q + (M + M^T) K - E S^T + w U dS'^T
    dS = c_C dS' + Q^T (s c dO) - K^T E

Source: arXiv 2406.06484 (chunkwise delta rule), 2412.06464 (decay per head).
"""

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float
from memformer.pallas.tpu import walk
from memformer.pallas.tpu.common import Cut, cut_call, iotas, product
from memformer.pallas.tpu.inverse import unit_lower_inverse
from memformer.pallas.tpu.rows import TokenGradients, Tokens

__all__ = ["delta_rule"]


class _Chunk(NamedTuple):
    """What both directions need: D, D (K K^T) below the diagonal, X, K S, V - c K S, U and P."""

    weights: Array
    match: Array
    inverse: Array
    stored: Array
    missing: Array
    u: Array
    read: Array


def _chunk(cut: Cut, tokens: Tokens, h: int, q, k, v, state) -> Generator[None, None, _Chunk]:
    mm = functools.partial(product, passes=cut.passes)
    weights = tokens.weights(h)
    beta = tokens.column("beta", h)
    match = _below(weights * mm(k, k, "nt"))
    yield
    inverse = yield from unit_lower_inverse(beta * match, max(cut.passes, 3))
    yield
    stored = mm(k, state, "nn")
    missing = v.astype(jnp.float32) - tokens.enter(h, stored)
    yield
    u = _exact(cut, inverse, beta * missing, "nn")
    yield
    read = cut.scale * weights * mm(q, k, "nt")
    return _Chunk(weights, match, inverse, stored, missing, u, read)


def _exact(cut: Cut, a: Array, b: Array, contract: str) -> Array:
    """A product of what cancels when keys repeat: one pass would leave percents of noise in the state."""
    return product(a, b, contract, max(cut.passes, 3))


def _below(x: Array) -> Array:
    row, column = iotas(x.shape)
    return jnp.where(row > column, x, 0.0)


def _forward(cut: Cut, tokens: Tokens, h: int, q, k, v, state):
    mm = functools.partial(product, passes=cut.passes)
    chunk = yield from _chunk(cut, tokens, h, q, k, v, state)
    yield
    carried = cut.scale * tokens.enter(h, mm(q, state, "nn"))
    yield
    o = carried + _exact(cut, chunk.read, chunk.u, "nn")
    yield
    return o, tokens.keep(h, state) + _exact(cut, k, tokens.leave(h, chunk.u), "tn")


def _backward(cut: Cut, tokens: Tokens, gradients: TokenGradients, h: int, q, k, v, state, do, ds):
    mm = functools.partial(product, passes=cut.passes)
    chunk = yield from _chunk(cut, tokens, h, q, k, v, state)
    beta = tokens.column("beta", h)
    yield
    written = mm(k, ds, "nn")
    yield
    du = mm(chunk.read, do, "tn") + tokens.leave(h, written)
    yield
    dr = _exact(cut, chunk.inverse, du, "tn")
    dv = beta * dr
    yield
    da = -mm(dr, chunk.u, "nt")
    yield
    dread = mm(do, chunk.u, "nt")
    f = cut.scale * chunk.weights * dread
    m = _below(beta * chunk.weights * da)
    e = tokens.enter(h, dv)
    entered = tokens.enter(h, cut.scale * do.astype(jnp.float32))
    yield
    dq = mm(f, k, "nn") + mm(entered, state, "nt")
    yield
    dk = mm(f, q, "tn") + mm(m, k, "nn") + mm(m, k, "tn") - mm(e, state, "nt")
    yield
    dk += mm(tokens.leave(h, chunk.u), ds, "nt")

    yield
    matched = da * chunk.match
    dbeta = jnp.sum(dr * chunk.missing, axis=1, keepdims=True) + jnp.sum(matched, axis=1, keepdims=True)
    gradients.add("beta", h, dbeta)
    yield
    if cut.carries:
        carried = cut.scale * mm(q, state, "nn")
        gradients.add_carry(h, do.astype(jnp.float32) * carried - dv * chunk.stored, chunk.u * written, state * ds)
    yield
    if cut.decay:
        gradients.add_weights(h, dread * chunk.read + beta * matched)
    return dq, dk, dv, tokens.keep(h, ds) + mm(q, entered, "tn") - _exact(cut, k, e, "tn")


_MEMORY = walk.Memory("delta_rule", _forward, _backward)


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    decay: Float[Array, "B T H"] | None,
    scale: float,
    index: Array | None,
    state: Float[Array, "B H K V"] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
    op: str = "delta_rule",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule by TPU kernels; arguments checked, q, k, v, beta and decay 0 at padding.

    Args:
      q: queries.
      k: keys.
      v: values.
      beta: strength of the write.
      decay: log decay per head, or None.
      scale: factor on the read.
      index: segment of every token (core.chunking.Segments), or None.
      state: initial state, or None for zeros.
      chunk_size: tokens a chunk; None takes the table's.
      precision: of the products; the inverse runs at HIGH at least.
      op: name of the public function, for messages.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: not a TPU; float64; decay per channel; a chunk size that no kernel has.
    """
    options: dict[str, Any] = {"scale": scale, "chunk_size": chunk_size, "precision": precision}
    cut = cut_call(op, q, v, beta=beta, decay=decay, index=index, **options)
    return walk.run(_MEMORY, cut, q, k, v, beta, decay, index, state)
