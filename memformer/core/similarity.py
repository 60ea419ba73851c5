"""Similarity kernels: how strongly a key matches a query.

For x, y in R^K and s = x . y:

    linear   scale * s
    relu     max(scale * s, 0)
    exp      exp(scale * s)
    softmax  exp(scale * s) / sum of the same over the visible keys; an empty sum gives 0
    round    nearest multiple of 10^-decimals to scale * s, with a straight-through gradient

The default scale is K^-0.5 for exp and softmax, and 1 for linear, relu and round.
"""

import dataclasses
import operator

import jax.numpy as jnp
from jax import lax

from memformer.core.checks import check_number
from memformer.core.types import Array, Float

__all__ = ["KERNELS", "Kernel", "resolve_kernel", "similarity", "similarity_slope"]

KERNELS = ("linear", "relu", "exp", "softmax", "round")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A similarity kernel.

    Attributes:
      name: one of `KERNELS`.
      scale: factor on the inner product; None is K^-0.5 for exp and softmax, 1 for the others.
      decimals: for round only, the number of decimals kept.

    Raises:
      ValueError: an unknown name, a scale that is not a finite number, or decimals for another kernel than round.

    Source: arXiv 2505.19488 section 2 (capacity by kernel); DeltaFormer (NeurIPS 2025) for round.

    Example:
      >>> Kernel("round", decimals=2)
      Kernel(name='round', scale=None, decimals=2)
    """

    name: str
    scale: float | None = None
    decimals: int = 0

    def __post_init__(self):
        if self.name not in KERNELS:
            raise ValueError(f"kernel name must be one of {', '.join(KERNELS)}, got {self.name!r}")
        if isinstance(self.decimals, bool) or not hasattr(self.decimals, "__index__"):
            raise ValueError(f"decimals must be an integer, got {self.decimals!r}")
        # NumPy and JAX scalars become Python's, so that a kernel stays hashable.
        object.__setattr__(self, "decimals", operator.index(self.decimals))
        if self.decimals and self.name != "round":
            raise ValueError(f"decimals is for the round kernel only, got decimals={self.decimals} with {self.name!r}")
        if self.scale is not None:
            try:
                object.__setattr__(self, "scale", check_number("scale", self.scale))
            except ValueError:
                raise ValueError(f"scale must be a finite number or None, got {self.scale!r}") from None

    @property
    def normalized(self) -> bool:
        """Whether the value of one key depends on the others (softmax)."""
        return self.name == "softmax"

    def scale_for(self, width: int) -> float:
        """The scale for keys of this width."""
        if self.scale is not None:
            return self.scale
        return width**-0.5 if self.name in ("exp", "softmax") else 1.0


def resolve_kernel(name: str, kernel: str | Kernel) -> Kernel:
    """Returns the argument `name` as a Kernel; ValueError for an unknown name."""
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str) and kernel in KERNELS:
        return Kernel(kernel)
    raise ValueError(f"{name} must be a Kernel or one of {', '.join(KERNELS)}, got {kernel!r}")


def similarity(kernel: Kernel, scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Evaluates a kernel at scaled inner products; for softmax, before normalising.

    Args:
      kernel: the kernel.
      scores: scale * (x . y). For softmax, subtract the row's maximum first.

    Returns:
      The same shape and dtype.

    Example:
      >>> similarity(Kernel("relu"), jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """
    if kernel.name == "linear":
        return scores
    if kernel.name == "relu":
        return jnp.maximum(scores, jnp.zeros_like(scores))
    if kernel.name == "round":
        return scores + lax.stop_gradient(jnp.round(scores, kernel.decimals) - scores)
    return jnp.exp(scores)


def similarity_slope(kernel: Kernel, scores: Float[Array, "..."], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The derivative of `similarity` with respect to the scaled inner product; straight-through for round.

    Args:
      kernel: the kernel.
      scores: the scaled inner products.
      values: `similarity` of them.

    Example:
      >>> scores = jnp.array([-1.0, 2.0])
      >>> similarity_slope(Kernel("relu"), scores, similarity(Kernel("relu"), scores))
      Array([0., 1.], dtype=float32)
    """
    if kernel.name == "relu":
        return (scores > 0).astype(scores.dtype)
    if kernel.name in ("linear", "round"):
        return jnp.ones_like(scores)
    return values
