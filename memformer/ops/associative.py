"""The associative memory of ARMT: features of keys, and a read and a write per segment.

Source: Rodkin et al. 2024, "Associative recurrent memory transformer" (arXiv 2407.04841).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype, l2norm, matmul_precision
from memformer.core.sharding import keep_shardings
from memformer.core.types import Array, Float

__all__ = ["NEIGHBOURS", "AssociativeMemory", "associative_read", "associative_write", "dpfp"]

# Features of DPFP-3 are products with the 1st, 2nd and 3rd neighbour.
NEIGHBOURS = 3
# Added to a normaliser, so that a query that matches nothing, and any query of an empty memory, reads 0.
EPSILON = 1e-5


def dpfp(x: Float[Array, "... K"]) -> Float[Array, "... P"]:
    """Computes the DPFP-3 features of keys or queries, at unit length: P = 6 K features, none negative.

        r = [relu(x), relu(-x)]        phi_(j, i) = r_i r_(i - j), j = 1, 2, 3        phi / |phi|

    Args:
      x: keys or queries.

    Returns:
      float32 (float64 for float64), 0 where every product is 0.

    Source: arXiv 2102.11174, equation 37; at unit length in the code of arXiv 2407.04841.

    Example:
      >>> dpfp(jnp.array([3.0, -4.0])).shape
      (12,)
    """
    x = x.astype(accumulation_dtype(x))
    parts = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    products = [parts * jnp.roll(parts, j, axis=-1) for j in range(1, NEIGHBOURS + 1)]
    return l2norm(jnp.concatenate(products, axis=-1))


@partial(jax.tree_util.register_dataclass, data_fields=["matrix", "normaliser"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AssociativeMemory:
    """The state of one layer between segments.

    Attributes:
      matrix: A, values by feature.
      normaliser: z, the sum of the features written so far.
    """

    matrix: Float[Array, "B P V"]
    normaliser: Float[Array, "B P"]


@keep_shardings
def associative_read(memory: AssociativeMemory, phi: Float[Array, "B T P"]) -> Float[Array, "B T V"]:
    """Reads A phi / (z . phi + 1e-5), which is 0 for an empty memory: the first segment reads nothing.

    Source: arXiv 2407.04841, section 2 (the small term: its code).

    Example:
      >>> empty = AssociativeMemory(jnp.zeros((1, 6, 2)), jnp.zeros((1, 6)))
      >>> associative_read(empty, jnp.ones((1, 1, 6)))
      Array([[[0., 0.]]], dtype=float32)
    """
    return _read(memory, phi)[0]


def _read(memory: AssociativeMemory, phi: Array) -> tuple[Array, Array]:
    """The values stored at the features, and z . phi."""
    precision = matmul_precision(None, phi)
    total = jnp.einsum("bp,btp->bt", memory.normaliser, phi, precision=precision)
    stored = jnp.einsum("btp,bpv->btv", phi, memory.matrix, precision=precision)
    return stored / (total + jnp.asarray(EPSILON, total.dtype))[:, :, None], total


@keep_shardings
def associative_write(
    memory: AssociativeMemory,
    phi: Float[Array, "B T P"],
    v: Float[Array, "B T V"],
    beta: Float[Array, "B T"],
    *,
    correction: bool = True,
) -> AssociativeMemory:
    """Writes T values at once, each replacing the value stored at its key; all see the memory before the call.

        vbar = A phi / (z . phi)        A <- A + sum_t beta_t (v_t - vbar_t) phi_t^T
        gamma = clip(1 - z . phi / |phi|^2, 0, 1), without gradient; 1 without correction
        z <- z + sum_t gamma_t phi_t

    A new key (z . phi = 0) is added to z in full, a stored one (z . phi = |phi|^2) not at all.

    Args:
      memory: before the segment.
      phi: features of the keys, such as `dpfp(k)`.
      v: values.
      beta: in (0, 1), the fraction of the stored value that is replaced.
      correction: whether to use gamma.

    Source: arXiv 2407.04841, section 2.

    Example:
      >>> memory = AssociativeMemory(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2)))
      >>> phi, one = jnp.array([[[1.0, 0.0]]]), jnp.ones((1, 1))
      >>> for value in (3.0, 5.0):
      ...     memory = associative_write(memory, phi, jnp.array([[[value]]]), one)
      >>> round(float(associative_read(memory, phi)[0, 0, 0]), 3), memory.normaliser.tolist()
      (5.0, [[1.0, 0.0]])
    """
    stored, total = _read(memory, phi)
    gamma = jnp.ones_like(total)
    if correction:
        square = jnp.sum(phi * phi, axis=-1)
        known = lax.stop_gradient(total / jnp.maximum(square, jnp.asarray(EPSILON, square.dtype)))
        gamma = jnp.clip(gamma - known, 0, 1)
    new = beta[:, :, None] * (v - stored)
    precision = matmul_precision(None, phi)
    matrix = memory.matrix + jnp.einsum("btp,btv->bpv", phi, new, precision=precision)
    return AssociativeMemory(matrix, memory.normaliser + jnp.einsum("bt,btp->bp", gamma, phi, precision=precision))
