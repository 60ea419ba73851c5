"""Cumulative log decays, and differences of them that lose no digits."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float

__all__ = ["CumulativeDecay", "cumulative_decay"]

# exp of this is 0 even in float64, and a chunk may hold 2^14 tokens of it before whole numbers stop adding exactly.
FORGOTTEN = -1024.0


class CumulativeDecay(NamedTuple):
    """A cumulative log decay as the sum of a whole number and a small fraction.

    Whole numbers add exactly, so that a token that forgets everything (-1e4, or -inf) does not blur the decays of its
    neighbours, as the difference of two large sums would.
    """

    whole: Array
    fraction: Array

    def __getitem__(self, at) -> "CumulativeDecay":  # type: ignore[override]
        return CumulativeDecay(self.whole[at], self.fraction[at])

    def since(self, other: "CumulativeDecay") -> Array:
        """The log decay between the two."""
        return (self.whole - other.whole) + (self.fraction - other.fraction)

    def total(self) -> Array:
        """The log decay from the start."""
        return self.whole + self.fraction


def cumulative_decay(decay: Float[Array, "*N C K"], axis: int = -2) -> CumulativeDecay:
    """Sums log decays along `axis`, each token included."""
    decay = jnp.maximum(decay, jnp.asarray(FORGOTTEN, decay.dtype))
    whole = lax.stop_gradient(jnp.round(decay))
    return CumulativeDecay(jnp.cumsum(whole, axis=axis), jnp.cumsum(decay - whole, axis=axis))
