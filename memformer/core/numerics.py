"""Numerics shared by all memories: accumulation dtype, precision, norms and softmax."""

import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Bool, Float

__all__ = ["accumulation_dtype", "l2norm", "masked_softmax", "matmul_precision", "repeat_heads"]


# Entries whose squares, and sums of them, are normal numbers of float32.
LEAST, MOST = 1e-15, 1e15


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of states and sums: float64 if any array is float64, otherwise float32.

    Example:
      >>> accumulation_dtype(jnp.zeros(2, jnp.bfloat16))
      dtype('float32')
    """
    double = any(a.dtype == jnp.float64 for a in arrays if a is not None)
    return jnp.dtype("float64" if double else "float32")


def matmul_precision(precision: str | lax.Precision | None, *arrays: Array) -> lax.Precision:
    """Resolves the precision of an op's matrix products.

    None is the precision of the inputs: HIGHEST when every input is float32 or wider (TPUs and tensor cores would
    otherwise round operands to bfloat16 or tf32), DEFAULT otherwise.

    Args:
      precision: None, "default", "high", "highest", or a `jax.lax.Precision`.
      *arrays: the inputs of the op.

    Raises:
      ValueError: for a name that is none of these.
    """
    if precision is None:
        wide = all(a.dtype in (jnp.float32, jnp.float64) for a in arrays if a is not None)
        return lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT
    if isinstance(precision, lax.Precision):
        return precision
    try:
        return lax.Precision[precision.upper()]
    except (AttributeError, KeyError):
        raise ValueError(
            f"precision must be None, 'default', 'high', 'highest' or a jax.lax.Precision, got {precision!r}"
        ) from None


def l2norm(x: Float[Array, "... K"], epsilon: float = 1e-6, *, axis: int = -1) -> Float[Array, "... K"]:
    """Normalises vectors to unit length: x / sqrt(sum(x^2) + epsilon^2) over one axis, in x's dtype.

    The sum is computed in float32, of scaled entries where their squares would overflow or underflow. The gradient is
    finite at x = 0, where the result is 0.

    Raises:
      ValueError: x is no array of floating dtype, or its axis `axis` is missing or empty.

    Example:
      >>> l2norm(jnp.array([3.0, 4.0]))
      Array([0.6, 0.8], dtype=float32)
    """
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(f"x must be an array of floating dtype, got {getattr(x, 'dtype', type(x).__name__)}")
    if not -x.ndim <= axis < x.ndim or x.shape[axis] == 0:
        raise ValueError(f"x must have an axis {axis} that is not empty, got shape {x.shape}")
    x = jnp.asarray(x)
    wide = x.astype(accumulation_dtype(x))
    top = lax.stop_gradient(jnp.max(jnp.abs(wide), axis=axis, keepdims=True))
    # The reciprocal of more than 1e37 would not be a normal number.
    scale = 1 / jnp.where((top > LEAST) & (top < MOST), 1.0, jnp.clip(top, max(epsilon, LEAST), 1e37))
    wide, small = wide * scale, jnp.asarray(epsilon, wide.dtype) * scale
    square = jnp.sum(wide * wide, axis=axis, keepdims=True)
    return (wide * lax.rsqrt(square + small * small)).astype(x.dtype)


def masked_softmax(scores: Float[Array, "... S"], mask: Bool[Array, "... S"]) -> Float[Array, "... S"]:
    """Softmax over the entries of the last axis where `mask` holds; 0 elsewhere.

    A row with no such entry is 0 (an empty sum), and so is its gradient.

    Example:
      >>> masked_softmax(jnp.zeros((2, 2)), jnp.array([[True, False], [False, False]]))
      Array([[1., 0.],
             [0., 0.]], dtype=float32)
    """
    low = jnp.asarray(jnp.finfo(scores.dtype).min, scores.dtype)
    masked = jnp.where(mask, scores, low)
    top = lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, masked - top, jnp.zeros_like(scores))), jnp.zeros_like(scores))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, jnp.ones_like(total))


def repeat_heads(x: Float[Array, "B T G *rest"], repeats: int) -> Float[Array, "B T H *rest"]:
    """Repeats each of G heads `repeats` times along axis 2: head g serves heads g repeats and the following."""
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)
