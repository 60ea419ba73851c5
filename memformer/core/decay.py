"""Cumulative log decays, and differences of them that lose no digits."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from memformer.core.types import Array, Float

__all__ = ["CumulativeDecay", "cumulative_decay", "decay_to_end"]

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
    return CumulativeDecay(*(jnp.cumsum(x, axis=axis) for x in _split(decay)))


def decay_to_end(decay: Float[Array, "*N C K"]) -> Float[Array, "*N C K"]:
    """Sums the log decays after each token, along the axis before the last.

    As the difference of two cumulative decays it would have a gradient that is lost in rounding where decays are
    strong: the last token, which decays by nothing, would add its gradient and subtract it again.
    """
    later = (jnp.pad(x[..., 1:, :], [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) for x in _split(decay))
    whole, fraction = (lax.cumsum(x, axis=x.ndim - 2, reverse=True) for x in later)
    return whole + fraction


def _split(decay: Array) -> tuple[Array, Array]:
    """Each log decay as a whole number and a fraction."""
    decay = jnp.maximum(decay, jnp.asarray(FORGOTTEN, decay.dtype))
    whole = lax.stop_gradient(jnp.round(decay))
    return whole, decay - whole
