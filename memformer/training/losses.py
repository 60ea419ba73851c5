"""Loss and scores as sums, which add up over steps, shards and batches."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.types import Array, Float, Int

__all__ = ["SCORES", "count_batch", "means", "smoothing_loss"]


def count_batch(
    logits: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"] | Float[Array, "B T vocab"],
    weights: Float[Array, "B T"],
) -> dict[str, Float[Array, ""]]:
    """Loss and correct answers of one batch, as float32 sums.

    - loss: sum of w l in nats; l = logsumexp(z) - z[target] for classes, sum over bits of log(1 + exp z) - y z
      for bits y
    - weight: sum of w
    - correct: sum of w over correct positions (bits: every bit on its side of 1/2)
    - errors: wrong answers at scored positions (bits: wrong bits)
    - sequences: rows with a scored position
    - sequences_correct: rows of these without an error

    Args:
      logits: z.
      targets: classes, or zeros and ones of the logits' shape.
      weights: w; positions of weight 0 are not scored.

    Example:
      >>> sums = count_batch(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
      >>> float(sums["correct"]), round(float(sums["loss"]), 3)
      (2.0, 2.773)
    """
    logits = logits.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    scored = weights > 0
    if targets.ndim == 3:
        losses, errors = _bit_losses(logits, targets)
    else:
        losses, errors = _class_losses(logits, targets)
    # at weight 0 a target need not be a class
    losses = jnp.where(scored, losses, jnp.float32(0))
    errors = jnp.where(scored, errors, jnp.float32(0))
    hit = scored & (errors == 0)
    row_scored = jnp.any(scored, axis=1)
    row_correct = row_scored & jnp.all(hit | ~scored, axis=1)
    return {
        "loss": jnp.sum(losses * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(jnp.where(hit, weights, jnp.float32(0))),
        "errors": jnp.sum(errors),
        "sequences": jnp.sum(row_scored.astype(jnp.float32)),
        "sequences_correct": jnp.sum(row_correct.astype(jnp.float32)),
    }


def _class_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Cross entropy and errors.

    The target's logit and the argmax are selected by comparison with the class index, not by a gather: with classes
    sharded over devices, each shard handles its own and only [B, T] is reduced.
    """
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    picked = jnp.sum(jnp.where(classes == targets[..., None], logits, jnp.float32(0)), axis=-1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    # the lowest class index that attains the maximum, like argmax
    winner = jnp.min(jnp.where(logits == top, classes, jnp.iinfo(targets.dtype).max), axis=-1)
    return _logsumexp(logits) - picked, (winner != targets).astype(jnp.float32)


def _bit_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    losses = jax.nn.softplus(logits) - targets * logits
    wrong = (logits > 0) != (targets > 0.5)
    return jnp.sum(losses, axis=-1), jnp.sum(wrong.astype(jnp.float32), axis=-1)


def _logsumexp(logits: Array) -> Array:
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]


def smoothing_loss(logits: Float[Array, "B T vocab"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Sum of w times the cross entropy against the uniform distribution, in nats.

    Label smoothing (arXiv 1512.00567, section 7) weights it by e and the loss of `count_batch` by 1 - e: the target
    distribution gives the class 1 - e + e / classes.

    Example:
      >>> round(float(smoothing_loss(jnp.zeros((1, 2, 4)), jnp.ones((1, 2)))), 3)
      2.773
    """
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    losses = _logsumexp(logits) - jnp.mean(logits, axis=-1)
    return jnp.sum(jnp.where(weights > 0, losses, jnp.float32(0)) * weights)


# Score: (numerator, denominator, function of their quotient).
SCORES: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "accuracy": ("correct", "weight", float),
    "sequence_accuracy": ("sequences_correct", "sequences", float),
    # per position; `means` divides by the bytes of one
    "bits_per_byte": ("loss", "weight", lambda nats: nats / math.log(2)),
    "perplexity": ("loss", "weight", lambda nats: math.exp(min(nats, 700.0))),
    "bits_per_sequence": ("loss", "sequences", lambda nats: nats / math.log(2)),
    "bit_errors": ("errors", "sequences", float),
}


def means(
    sums: Mapping[str, float | np.ndarray], scores: tuple[str, ...] = ("accuracy",), bytes_per_step: float = 1.0
) -> dict[str, float]:
    """Loss and the named scores from the sums of `count_batch`.

    Args:
      sums: from `count_batch`.
      scores: names in `SCORES`.
      bytes_per_step: bytes of text per scored position, of which bits_per_byte is counted.

    Raises:
      ValueError: a score not in `SCORES`.

    Example:
      >>> means({"loss": 2.0, "weight": 4.0, "correct": 1.0}, ("accuracy",))
      {'loss': 0.5, 'accuracy': 0.25}
    """
    result = {"loss": _quotient(sums, "loss", "weight")}
    for score in scores:
        if score not in SCORES:
            raise ValueError(f"scores must be of {', '.join(SCORES)}, got {score!r}")
        above, below, finish = SCORES[score]
        result[score] = finish(_quotient(sums, above, below))
    if "bits_per_byte" in result:
        result["bits_per_byte"] /= bytes_per_step
    return result


def _quotient(sums: Mapping[str, float | np.ndarray], above: str, below: str) -> float:
    divisor = float(sums[below])
    return float(sums[above]) / divisor if divisor else math.nan
