"""The delta rule on TPU.

Per chunk and head, with S the state that enters, D the decay between tokens (0 where hidden), c and b
the rows enter and write (rows.py), beta on columns, s the scale:

    M = D (K K^T), i < r           X = (I + M beta)^-1  W = X (V - c K S)
    P = s D (Q K^T), i <= r        O = s c Q S + P beta W    S' = c_C S + K^T (b W)

The writes of MATH.md are U = beta W. M, P and X need no state: they are prepared one chunk ahead.
Backward, where all of this is computed again:

    dW = (P beta)^T dO + b K dS'   dV = X^T dW          E = c dV
    dP = dO W^T                    dM = -dV W^T         F = s D beta dP       N = D beta dM, i < r
    dQ = F K + s c dO S^T          dK = F^T Q + (N + N^T) K - E S^T + b W dS'^T
    dS = c_C dS' + Q^T (s c dO) - K^T E
    J = P dP + M dM                dbeta = columns of J, summed
    dlog D: rows of J beta, summed, less its columns

Source: arXiv 2406.06484 (chunkwise delta rule), 2412.06464 (decay per head).
"""

import functools
from collections.abc import Generator
from typing import Any

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.tpu.common import Cut, cut_call, iotas, product, split
from memformer.pallas.tpu.inverse import unit_lower_inverses
from memformer.pallas.tpu.matrix_memory import chunk_scan as walk
from memformer.pallas.tpu.matrix_memory.token_scalars import TokenGradients, Tokens
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["delta_rule", "run"]


def _kept(cut: Cut, backward: bool) -> list[tuple[tuple[int, ...], Any]]:
    """X split; forward P split, backward D (K K^T) below the diagonal, P and D."""
    square = (cut.chunk, cut.chunk)
    exact = [(square, jnp.float32)]
    parts = [(square, jnp.bfloat16)] * 2 if _fine(cut) == 3 else exact
    return parts + (exact * 3 if backward else parts)


def _fine(cut: Cut) -> int:
    """Passes of a product of what cancels when keys repeat: one leaves percents of noise in state and gradients."""
    return max(cut.passes, 3)


def _exact(cut: Cut, a, b, contract: str) -> Array:
    return product(a, b, contract, _fine(cut))


def _below(x: Array) -> Array:
    row, column = iotas(x.shape)
    return jnp.where(row > column, x, 0.0)


def _prepare(cut: Cut, tokens: Tokens, heads, q, k, kept) -> Generator[None, None, None]:
    parts = 2 if _fine(cut) == 3 else 1
    a = []
    for h, one_q, one_k, refs in zip(heads, q, k, kept, strict=True):
        weights, beta = tokens.weights(h), tokens.row("beta", h)
        match = _below(weights * product(one_k, one_k, "nt", cut.passes))
        a.append(beta * match)
        yield
        read = cut.scale * weights * product(one_q, one_k, "nt", cut.passes)
        backward = len(refs) == parts + 3
        rest = (match, read, weights) if backward else split(beta * read, _fine(cut))
        for ref, x in zip(refs[parts:], rest, strict=True):
            ref[...] = x
        yield
    inverses = yield from unit_lower_inverses(a, _fine(cut))
    for refs, inverse in zip(kept, inverses, strict=True):
        for ref, part in zip(refs, split(inverse, _fine(cut)), strict=False):
            ref[...] = part


def _forward(cut: Cut, tokens: Tokens, h: int, prepared, q, k, v, state):
    mm = functools.partial(product, passes=cut.passes)
    half = len(prepared) // 2
    inverse, read = (tuple(ref[...] for ref in refs) for refs in (prepared[:half], prepared[half:]))
    missing = v.astype(jnp.float32) - tokens.enter(h, mm(k, state[...], "nn"))
    yield
    w = _exact(cut, inverse, missing, "nn")
    yield
    o = cut.scale * tokens.enter(h, mm(q, state[...], "nn"))
    yield
    o += _exact(cut, read, w, "nn")
    yield
    return o, tokens.keep(h, state[...]) + _exact(cut, k, tokens.write(h, w), "tn")


def _backward(cut: Cut, tokens: Tokens, gradients: TokenGradients, h: int, prepared, q, k, v, state, do, ds):
    mm = functools.partial(product, passes=cut.passes)
    *inverse, match, read, weights = prepared
    inverse = tuple(ref[...] for ref in inverse)
    beta = tokens.row("beta", h)
    stored = mm(k, state[...], "nn")
    missing = v.astype(jnp.float32) - tokens.enter(h, stored)
    yield
    w = _exact(cut, inverse, missing, "nn")
    yield
    written = mm(k, ds[...], "nn")
    gradients.add("write", h, jnp.sum(w * written, axis=1, keepdims=True))
    yield
    dw = _exact(cut, beta * read[...], do, "tn") + tokens.write(h, written)
    yield
    dv = _exact(cut, inverse, dw, "tn")
    yield
    # One half of W is enough here: dV keeps what cancels in the sum over the columns of M dM.
    dmatch = -_exact(cut, dv, w if cut.passes > 1 else w.astype(jnp.bfloat16), "nt")
    yield
    dread = _exact(cut, do, w, "nt")
    f = cut.scale * beta * weights[...] * dread
    m = _below(beta * weights[...] * dmatch)
    e = tokens.enter(h, dv)
    entered = tokens.enter(h, cut.scale * do.astype(jnp.float32))
    yield
    dq = _exact(cut, f, k, "nn") + mm(entered, state[...], "nt")
    yield
    dk = mm(f, q, "tn") + mm(m, k, "nn") + mm(m, k, "tn") - mm(e, state[...], "nt")
    yield
    dk += mm(tokens.write(h, w), ds[...], "nt")
    yield
    change = dread * read[...] + dmatch * match[...]
    gradients.add_row("beta", h, jnp.sum(change, axis=0, keepdims=True))
    if cut.decay:
        change = beta * change
        gradients.add("total", h, jnp.sum(change, axis=1, keepdims=True))
        gradients.add_row("total", h, -jnp.sum(change, axis=0, keepdims=True))
    yield
    if cut.carries:
        carried = cut.scale * mm(q, state[...], "nn")
        gradients.add_carry(h, do.astype(jnp.float32) * carried - dv * stored, state[...] * ds[...])
    yield
    return dq, dk, dv, tokens.keep(h, ds[...]) + mm(q, entered, "tn") - _exact(cut, k, e, "tn")


_MEMORY = walk.Memory("delta_rule", _forward, _backward, _prepare, _kept, count=2, wait=8)


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
    sizes: Tuning | None = None,
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
      sizes: chunk, heads and value columns of a program, and what is saved, in place of the table's.
      op: name of the public function, for messages.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: not a TPU; float64; decay per channel; a chunk size that no kernel has.
    """
    options: dict[str, Any] = {"scale": scale, "chunk_size": chunk_size, "precision": precision, "sizes": sizes}
    cut = cut_call(op, q, v, beta=beta, decay=decay, index=index, **options)
    return walk.run(_MEMORY, cut, q, k, v, beta, decay, index, state)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a call with one write per token."""
    return delta_rule(
        call.q,
        call.k,
        call.v,
        call.beta,
        decay=call.decay,
        scale=call.scale,
        index=None if call.segments is None else call.segments.index,
        state=call.state,
        chunk_size=call.chunk_size,
        precision=call.precision,
        op=call.op,
    )
