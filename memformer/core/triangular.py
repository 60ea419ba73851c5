"""The inverse of I + A for strictly lower A, the one triangular inverse of the delta family.

Repeated tokens make identical keys, so A is often a full lower triangle of ones: its powers reach 10^30 while the
entries of the inverse have size 1. Block doubling never forms a power of A. Starting from X = I, it joins pairs of
neighbouring diagonal blocks at block size b = 1, 2, 4, ...:

    [ X1   0  ]         [ X1             0  ]
    [ A21  X2^-1 ]^-1 = [ -X2 A21 X1     X2 ]
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.types import Array, Float

__all__ = ["unit_lower_inverse"]

# Blocks up to this size are inverted whole: products of smaller ones cost more in overhead than in arithmetic.
BASE = 8


@jax.custom_jvp
def unit_lower_inverse(a: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """Computes (I + A)^-1, where A is the strictly lower part of `a`.

    Entries on and above the diagonal are ignored. Any C; leading axes are batch. Products run at the highest
    precision, independent of the caller's. Differentiable in both modes by dX = -X dA X, so that the backward pass
    saves X only.

    Args:
      a: [..., C, C] floating.

    Returns:
      [..., C, C], unit lower triangular, in a's dtype.

    The problem itself is ill conditioned when keys are long: entries of the inverse grow like (1 + beta |k|^2)^C.
    Normalise keys (`memformer.l2norm`) and keep beta in [0, 2].

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
    return _join_blocks(a)[..., :size, :size]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    x = unit_lower_inverse(a)
    return x, -_product(_product(x, jnp.tril(da, -1)), x)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _join_blocks(a: Array) -> Array:
    """Joins diagonal blocks until one is left. C must be a power of two."""
    size = a.shape[-1]
    base = min(BASE, size)
    x = _invert_small(_blocks(a, base, 0, 1))
    while base < size:
        first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_product(_product(second, _blocks(a, base, 1, 2)), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        x = jnp.concatenate([top, bottom], axis=-2)
        base *= 2
    return x[..., 0, :, :]


def _blocks(a: Array, size: int, below: int, step: int) -> Array:
    """Every `step`-th block of the block diagonal `below` the main one, [..., n, size, size]."""
    rows = range(below, a.shape[-1] // size, step)
    # Slices, because a gather of a diagonal is slow on a CPU.
    parts = [a[..., r * size : (r + 1) * size, (r - below) * size : (r - below + 1) * size] for r in rows]
    return jnp.stack(parts, axis=-3)


def _invert_small(a: Array) -> Array:
    """Block doubling on whole small blocks: X <- X - X S_b X, with S_b the part of A that joins blocks of size b."""
    place = np.arange(a.shape[-1])
    x = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    b = 1
    while b < a.shape[-1]:
        block = place // b
        joins = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None, :])
        s = a * lax.expand_dims(jnp.asarray(joins, a.dtype), range(a.ndim - 2))
        # At b = 1 X is still the identity.
        x = x - (s if b == 1 else _product(_product(x, s), x))
        b *= 2
    return x
