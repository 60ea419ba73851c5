"""Choice of the next token from logits: temperature, top-k, top-p, min-p, repetition penalty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.core.checks import check, check_number, check_positive
from memformer.core.types import Array, Bool, Float, Int

__all__ = ["Sampling", "sample"]


class Sampling(NamedTuple):
    """Choice of the next token; fields are the arguments of `generate` of the same names."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def checked(self, vocab: int) -> "Sampling":
        """The same settings as Python numbers, so that they are hashable.

        Raises:
          ValueError: a setting out of range.
        """
        temperature = check_number("temperature", self.temperature, at_least=0)
        top_k = check_positive("top_k", self.top_k)
        check(top_k is None or top_k <= vocab, "top_k", f"None or in [1, {vocab}] (the number of classes)", top_k)
        top_p, min_p = _fraction("top_p", self.top_p), _fraction("min_p", self.min_p)
        penalty = check_number("repetition_penalty", self.repetition_penalty, above=0)
        return Sampling(temperature, top_k, top_p, min_p, penalty)

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return self.repetition_penalty != 1


def _fraction(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    value = check_number(name, value, above=0)
    check(value <= 1, name, "None or in (0, 1]", value)
    return value


def sample(
    logits: Float[Array, "B V"], key: Array | None, sampling: Sampling, seen: Bool[Array, "B V"] | None = None
) -> Int[Array, "B"]:
    """Chooses one token per row.

    A logit of a token that was seen is divided by the repetition penalty where it is positive, and multiplied by it
    elsewhere. Logits are then divided by the temperature and restricted to the top_k largest, to the smallest set of
    most probable tokens whose probability reaches top_p (at least one token), and to the tokens that are at least min_p
    times as probable as the most probable one. A token is sampled from the softmax of what remains.

    Args:
      logits: float32.
      key: random key; with None or temperature 0 the most probable token is taken.
      sampling: the settings.
      seen: tokens of the prompt and those generated before; read where there is a repetition penalty.

    Source: top-p, arXiv 1904.09751; min-p, arXiv 2407.01082; repetition penalty, arXiv 1909.05858.

    Example:
      >>> sample(jnp.array([[0.0, 2.0, 1.0]]), None, Sampling())
      Array([1], dtype=int32)
    """
    if sampling.penalizes and seen is not None:
        penalty = jnp.asarray(sampling.repetition_penalty, logits.dtype)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    # A temperature below the smallest normal number is 0 on devices that flush denormals.
    if key is None or sampling.temperature < jnp.finfo(logits.dtype).tiny:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit is 0 before the division, which then cannot overflow to infinity minus infinity.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.asarray(sampling.temperature, logits.dtype)
    low = jnp.asarray(-jnp.inf, logits.dtype)
    if sampling.top_k is not None:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, low, logits)
    if sampling.top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        chance = jax.nn.softmax(ranked, axis=-1)
        # A token is kept if those before it have not reached top_p, so the first always is.
        before = jnp.cumsum(chance, axis=-1) - chance
        ranked = jnp.where(before < sampling.top_p, ranked, low)
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.take_along_axis(ranked, rank, axis=-1)
    if sampling.min_p is not None:
        # The most probable token has logit 0 and is always kept.
        logits = jnp.where(logits < jnp.asarray(np.log(sampling.min_p), logits.dtype), low, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
