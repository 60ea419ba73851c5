"""X = (I + A)^-1 of every chunk and head, all at once."""

import jax.numpy as jnp

from memformer.core.triangular import unit_lower_inverse
from memformer.core.types import Array
from memformer.pallas.gpu.common import Cut
from memformer.pallas.gpu.gradients import blocks, product, weights

__all__ = ["chunk_inverse"]


def chunk_inverse(cut: Cut, k: Array, rows: tuple[Array, ...]) -> tuple[Array, ...]:
    """X [B, H, N, C, C] bfloat16, in a tuple; () where writes add.

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
    return (unit_lower_inverse(names["beta"][..., None] * match).astype(jnp.bfloat16),)
