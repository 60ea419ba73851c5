"""Cumulative log decays, and differences of them that lose no digits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Float

__all__ = ["CumulativeDecay", "FORGOTTEN_PAIR", "add_decay", "cumulative_decay", "decay_to_end", "running_decay"]

# exp of this is 0 even in float64, and a chunk may hold 2^14 tokens of it before whole numbers stop adding exactly.
FORGOTTEN = -1024.0

# Attention adds decays to logits, where no finite number hides a pair for sure: a pair with this much decay between
# its tokens is masked. -inf counts as this.
FORGOTTEN_PAIR = -8192


class CumulativeDecay(NamedTuple):
    """A cumulative log decay as the sum of a whole number (a float, or int32) and a small fraction.

    Whole numbers add exactly, so that a token that forgets everything (-1e4, or -inf) does not blur the decays of its
    neighbours, as the difference of two large sums would.
    """

    whole: Array
    fraction: Array

    def __getitem__(self, at) -> "CumulativeDecay":  # type: ignore[override]
        return CumulativeDecay(self.whole[at], self.fraction[at])

    def since(self, other: "CumulativeDecay") -> Array:
        """The log decay between the two."""
        whole = self.whole - other.whole
        return whole.astype(self.fraction.dtype) + (self.fraction - other.fraction)

    def total(self) -> Array:
        """The log decay from the start."""
        return self.whole + self.fraction


def cumulative_decay(
    decay: Float[Array, "*N C K"], axis: int = -2, sums: Callable[..., Array] = jnp.cumsum
) -> CumulativeDecay:
    """Sums log decays along `axis`, each token included.

    Args:
      decay: log decays in the accumulation dtype.
      axis: of the tokens.
      sums: computes running sums, as `jnp.cumsum` does, of whole numbers without error.
    """
    return CumulativeDecay(*(sums(x, axis=axis) for x in _split(decay, FORGOTTEN)))


def running_decay(decay: Float[Array, "B T H"], start: CumulativeDecay | None = None) -> CumulativeDecay:
    """Sums log decays over a sequence of any length, each token included: int32, and a fraction of at most 1/2.

    The fraction is rounded off after every sum, so that differences between far tokens are as exact as those between
    neighbours; whole numbers are exact for 2^18 tokens that forget everything.

    Args:
      decay: log decays in the accumulation dtype.
      start: [B, 1, H], the sum before the first token.
    """
    parts = _split(decay, FORGOTTEN_PAIR)
    whole, fraction = _running_sums(lax.stop_gradient((parts[0].astype(jnp.int32), parts[1])))
    # The gradient of a plain sum: adding a number less itself changes no digit.
    plain = jnp.cumsum(parts[1], axis=1)
    fraction = fraction + (plain - lax.stop_gradient(plain))
    if start is None:
        return CumulativeDecay(whole, fraction)
    return CumulativeDecay(*_add((whole, fraction), tuple(start)))


def add_decay(a: CumulativeDecay, b: CumulativeDecay) -> CumulativeDecay:
    """The sum of two running decays, its fraction rounded off."""
    return CumulativeDecay(*_add(tuple(a), tuple(b)))


def _running_sums(parts: tuple[Array, Array]) -> tuple[Array, Array]:
    if not is_symbolic(parts[0].shape[1]):
        return lax.associative_scan(_add, parts, axis=1)

    def step(total, part):
        total = _add(total, part)
        return total, total

    start = tuple(jnp.zeros_like(x[:, 0]) for x in parts)
    sums = lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in parts))[1]
    return jnp.moveaxis(sums[0], 0, 1), jnp.moveaxis(sums[1], 0, 1)


def _add(a, b):
    fraction = a[1] + b[1]
    carry = lax.stop_gradient(jnp.round(fraction))
    return a[0] + b[0] + carry.astype(jnp.int32), fraction - carry


@jax.custom_jvp
def decay_to_end(decay: Float[Array, "*N C K"]) -> Float[Array, "*N C K"]:
    """Sums the log decays after each token, along the axis before the last.

    The gradient of the difference of two cumulative decays would be lost in rounding where decays are strong: the last
    token, which decays by nothing, would add its gradient and subtract it again. Its derivative here is a sum as well.
    """
    total = cumulative_decay(decay)
    return CumulativeDecay(*(x[..., -1:, :] for x in total)).since(total)


@decay_to_end.defjvp
def _decay_to_end_jvp(primals, tangents):
    (decay,), (tangent,) = primals, tangents
    tangent = jnp.where(decay >= FORGOTTEN, tangent, jnp.zeros_like(tangent))
    later = jnp.pad(tangent[..., 1:, :], [(0, 0)] * (tangent.ndim - 2) + [(0, 1), (0, 0)])
    return decay_to_end(decay), lax.cumsum(later, axis=later.ndim - 2, reverse=True)


def _split(decay: Array, least: float) -> tuple[Array, Array]:
    """Each log decay, at least `least`, as a whole number and a fraction."""
    decay = jnp.maximum(decay, jnp.asarray(least, decay.dtype))
    whole = lax.stop_gradient(jnp.round(decay))
    return whole, decay - whole
