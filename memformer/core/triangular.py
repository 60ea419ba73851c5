"""The inverse of I + A for strictly lower A: the one linear solve of the delta family.

Repeated tokens make identical keys, so A is often a full lower triangle of ones: its powers
reach 10^30 while the inverse itself has entries of size 1. Block doubling ("the ladder") never
forms a power of A. Starting from X = I, at block size b = 1, 2, 4, ... the pairs of neighbouring
diagonal blocks are joined:

    [ X1   0  ]         [ X1             0  ]
    [ A21  X2^-1 ]^-1 = [ -X2 A21 X1     X2 ]
"""

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float

__all__ = ["unit_lower_inverse"]


@jax.custom_jvp
def unit_lower_inverse(a: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """(I + A)^-1, where A is the strictly lower part of `a`.

    Entries on and above the diagonal are ignored. Any C; leading axes are batch. Products run at
    the highest precision whatever the caller's matrix products use. Differentiable in both modes by
    dX = -X dA X, so that a backward pass keeps X alone.

    Args:
      a: [..., C, C] floating.

    Returns:
      [..., C, C], unit lower triangular, in a's dtype.

    The problem itself is ill conditioned when keys are long: entries of the inverse grow like
    (1 + beta |k|^2)^C. Normalise keys (`memformer.l2norm`) and keep beta in [0, 2].

    Example:
      >>> unit_lower_inverse(jnp.array([[0.0, 0.0], [2.0, 0.0]]))
      Array([[ 1.,  0.],
             [-2.,  1.]], dtype=float32)
    """
    size = a.shape[-1]
    padded = 1 << max(size - 1, 0).bit_length()
    if padded != size:
        width = [(0, 0)] * (a.ndim - 2) + [(0, padded - size)] * 2
        a = jnp.pad(a, width)
    return _ladder(a)[..., :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    x = unit_lower_inverse(a)
    return x, -_product(_product(x, jnp.tril(da, -1)), x)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _ladder(a: Array) -> Array:
    """Joins diagonal blocks until one is left. C must be a power of two."""
    batch, size = a.shape[:-2], a.shape[-1]
    # Diagonal blocks so far, as [..., blocks, b, b].
    x = jnp.ones((*batch, size, 1, 1), a.dtype)
    b = 1
    while b < size:
        pairs = size // (2 * b)
        # The block just left of the diagonal in every odd block row.
        grid = a.reshape(*batch, pairs, 2, b, pairs, 2, b)
        below = jnp.diagonal(grid[..., :, 1, :, :, 0, :], axis1=-4, axis2=-2)
        below = jnp.moveaxis(below, -1, -3)
        first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_product(_product(second, below), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        x = jnp.concatenate([top, bottom], axis=-2)
        b *= 2
    return x[..., 0, :, :]
