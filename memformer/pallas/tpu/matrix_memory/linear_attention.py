"""Linear attention on TPU.

Per chunk and head, with S the state that enters, D the decay between tokens (0 where hidden), c and w
the rows enter and leave (rows.py), s the scale:

    P = s D (Q K^T), i <= r        O = s c Q S + P V    S' = c_C S + K^T (w V)

and backward, where P is computed again:

    F = s D (dO V^T)               dV = P^T dO + w K dS'
    dQ = F K + s c dO S^T          dK = F^T Q + w V dS'^T
    dS = c_C dS' + Q^T (s c dO)

Source: arXiv 2312.06635 (chunkwise form), 2405.21060 (decay per head).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.tpu.common import Cut, cut_call, product
from memformer.pallas.tpu.matrix_memory import chunk_scan as walk
from memformer.pallas.tpu.matrix_memory.token_scalars import TokenGradients, Tokens
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["linear_attention", "run"]


def _forward(cut: Cut, tokens: Tokens, h: int, prepared, q, k, v, state):
    mm = functools.partial(product, passes=cut.passes)
    read = cut.scale * tokens.weights(h) * mm(q, k, "nt")
    yield
    carried = cut.scale * tokens.enter(h, mm(q, state[...], "nn"))
    yield
    o = carried + mm(read, v, "nn")
    yield
    return o, tokens.keep(h, state[...]) + mm(k, tokens.write(h, v), "tn")


def _backward(cut: Cut, tokens: Tokens, gradients: TokenGradients, h: int, prepared, q, k, v, state, do, ds):
    mm = functools.partial(product, passes=cut.passes)
    weights = tokens.weights(h)
    read = cut.scale * weights * mm(q, k, "nt")
    yield
    dread = mm(do, v, "nt")
    f = cut.scale * weights * dread
    yield
    written = mm(k, ds[...], "nn")
    entered = tokens.enter(h, cut.scale * do.astype(jnp.float32))
    yield
    dv = mm(read, do, "tn") + tokens.write(h, written)
    yield
    dq = mm(f, k, "nn") + mm(entered, state[...], "nt")
    yield
    dk = mm(f, q, "tn") + mm(tokens.write(h, v), ds[...], "nt")
    yield
    if cut.carries:
        carried = cut.scale * mm(q, state[...], "nn")
        gradients.add("write", h, jnp.sum(v.astype(jnp.float32) * written, axis=1, keepdims=True))
        gradients.add_carry(h, do.astype(jnp.float32) * carried, state[...] * ds[...])
    yield
    if cut.decay:
        change = dread * read
        gradients.add("total", h, jnp.sum(change, axis=1, keepdims=True))
        gradients.add_row("total", h, -jnp.sum(change, axis=0, keepdims=True))
    return dq, dk, dv, tokens.keep(h, ds[...]) + mm(q, entered, "tn")


_MEMORY = walk.Memory("linear_attention", _forward, _backward)


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    decay: Float[Array, "B T H"] | None,
    scale: float,
    index: Array | None,
    state: Float[Array, "B H K V"] | None,
    chunk_size: int | None = None,
    precision: lax.Precision = lax.Precision.DEFAULT,
    sizes: Tuning | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention by TPU kernels; arguments checked, q, k, v and decay 0 at padding.

    Args:
      q: queries.
      k: keys.
      v: values.
      decay: log decay per head, or None.
      scale: factor on the read.
      index: segment of every token (core.chunking.Segments), or None.
      state: initial state, or None for zeros.
      chunk_size: tokens a chunk; None takes the table's.
      precision: of the products.
      sizes: chunk, heads and value columns of a program, and what is saved, in place of the table's.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: not a TPU; float64; decay per channel; a chunk size that no kernel has.
    """
    options: dict[str, Any] = {"scale": scale, "chunk_size": chunk_size, "precision": precision, "sizes": sizes}
    cut = cut_call("linear_attention", q, v, beta=None, decay=decay, index=index, **options)
    return walk.run(_MEMORY, cut, q, k, v, None, decay, index, state)


def run(call: MatrixCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a call with one write per token."""
    return linear_attention(
        call.q,
        call.k,
        call.v,
        decay=call.decay,
        scale=call.scale,
        index=None if call.segments is None else call.segments.index,
        state=call.state,
        chunk_size=call.chunk_size,
        precision=call.precision,
    )
