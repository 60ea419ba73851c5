"""Matrix products on the MXU in one, three or six bfloat16 passes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array

__all__ = ["PASSES", "exact_passes", "iotas", "joined_products", "product", "split_bf16"]

# bfloat16 passes of the MXU per product: 1, 3 (16 bits of each operand), 6 (all of float32).
PASSES = {lax.Precision.DEFAULT: 1, lax.Precision.HIGH: 3, lax.Precision.HIGHEST: 6}


def exact_passes(passes: int) -> int:
    """Passes of products that cancel when keys repeat; one leaves an error of percents in state and gradients."""
    return max(passes, 3)


def split_bf16(x: Array, passes: int) -> tuple[Array, ...]:
    """Splits x into summands that `product` accepts: 1 pass, bfloat16; 3, two of bfloat16; 6, float32."""
    if passes == 6:
        return (x.astype(jnp.float32),)
    high = x.astype(jnp.bfloat16)
    if passes == 1 or x.dtype == jnp.bfloat16:
        return (high,)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def product(
    a: Array | tuple[Array, ...], b: Array | tuple[Array, ...], contract: str, passes: int, stacked: str | None = None
) -> Array:
    """Matrix product in float32.

    Args:
      a: a matrix, or its summands from `split_bf16`.
      b: likewise.
      contract: "nn" for a b, "nt" for a b^T, "tn" for a^T b.
      passes: 1 rounds operands to bfloat16, 3 keeps 16 bits (2 where one operand is bfloat16), 6 keeps float32.
      stacked: where both operands have two summands: "rows", those of a are the rows of one left operand, so that b is
        loaded once for both; "square", one product [a0 a1] [[b0 b1] [b0 0]], which fills an MXU of 256 x 256; None,
        three products.
    """
    axes = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    precision = lax.Precision.HIGHEST if passes == 6 else None
    a, b = (x if isinstance(x, tuple) else split_bf16(x, passes) for x in (a, b))

    def one_pass(x, y):
        return lax.dot_general(x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    if stacked and contract != "tn" and len(a) == len(b) == 2:
        if stacked == "rows":
            high, low = jnp.split(one_pass(jnp.concatenate(a), b[0]), 2)
            return high + low + one_pass(a[0], b[1])
        inner, outer = axes[1][0], 1 - axes[1][0]
        columns = jnp.concatenate([b[0], b[0]], inner), jnp.concatenate([b[1], jnp.zeros_like(b[1])], inner)
        return jnp.add(*jnp.split(one_pass(jnp.concatenate(a, 1), jnp.concatenate(columns, outer)), 2, 1))
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    return functools.reduce(jnp.add, (one_pass(x, y) for x, y in pairs))


def joined_products(terms: Sequence[tuple[Any, Any, int]], contract: str, stacked: str | None = None) -> Array:
    """The sum of several products.

    Args:
      terms: a, b and passes of each, see `product`.
      contract: of all of them.
      stacked: "square" joins passes in pairs along the contraction, which fills an MXU of 256 x 256: no result waits
        in registers to be added to the next. Otherwise as in `product`.
    """
    if stacked != "square" or any(passes == 6 for *_, passes in terms):
        return functools.reduce(jnp.add, (product(a, b, contract, passes, stacked) for a, b, passes in terms))
    axes = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[contract]
    pairs = []
    for a, b, passes in terms:
        a, b = (x if isinstance(x, tuple) else split_bf16(x, passes) for x in (a, b))
        pairs += [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    parts = []
    for first in range(0, len(pairs), 2):
        sides = zip(*pairs[first : first + 2], strict=True)
        a, b = (jnp.concatenate(side, axis) for side, axis in zip(sides, axes, strict=True))
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        parts.append(lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32))
    return functools.reduce(jnp.add, parts)


def iotas(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Row and column index of every entry of a matrix."""
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
