"""X = (I + A)^-1 of every chunk and head, all at once."""

import jax.numpy as jnp
from jax import lax

from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array
from memformer.pallas.gpu.common import Cut
from memformer.pallas.gpu.gradients import blocks, product, weights

__all__ = ["chunk_inverse"]


def chunk_inverse(cut: Cut, k: Array, rows: tuple[Array, ...]) -> tuple[Array, ...]:
    """X as the sum of two halves [B, H, N, C, C] bfloat16; () where writes add.

    Args:
      cut: sizes.
      k: [B, T, G, K] bfloat16.
      rows: of the tokens.
    """
    if not cut.beta:
        return ()
    names = {name: rows[0][:, :, :, i] for i, name in enumerate(cut.names)}
    ks = blocks(cut, k, cut.repeat)
    d = weights(cut, names) if cut.carries else weights(cut, names)[None, None, None]
    match = d * product("bhnrk,bhnik->bhnri", ks, ks)
    x = unit_lower_inverse(names["beta"][..., None] * match)
    # The compiler may take a cast to bfloat16 and back for nothing, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)
