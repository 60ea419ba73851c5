"""The loss and what is counted beside it, as sums that add up over steps, shards and batches."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.types import Array, Float, Int

__all__ = ["count_batch", "means"]


def count_batch(
    logits: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> dict[str, Float[Array, ""]]:
    """Cross entropy and hits of one batch, as float32 sums.

    `loss` = sum of w (logsumexp(z) - z[target]) in nats, `weight` = sum of w, `correct` = w of hits,
    `sequences` = rows with a scored position, `sequences_correct` = rows without a miss.

    The target's logit and the winner are picked by comparison with the class index, not by a gather:
    with classes split over devices each shard then answers for its own and [B, T] is summed.

    Example:
      >>> sums = count_batch(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.ones((1, 2)))
      >>> float(sums["correct"]), round(float(sums["loss"]), 3)
      (2.0, 2.773)
    """
    logits = logits.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponents = jnp.sum(jnp.exp(logits - jax.lax.stop_gradient(top)), axis=-1)
    normaliser = jnp.log(exponents) + jax.lax.stop_gradient(top[..., 0])
    picked = jnp.sum(jnp.where(classes == targets[..., None], logits, jnp.float32(0)), axis=-1)
    # the lowest class index that attains the maximum, as argmax has it
    winner = jnp.min(jnp.where(logits == top, classes, jnp.iinfo(targets.dtype).max), axis=-1)
    scored = weights > 0
    # a weight of 0 must also hide a target that is no class
    losses = jnp.where(scored, normaliser - picked, jnp.float32(0))
    hit = (winner == targets) & scored
    row_scored = jnp.any(scored, axis=1)
    row_right = row_scored & jnp.all(hit | ~scored, axis=1)
    return {
        "loss": jnp.sum(losses * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(jnp.where(hit, weights, jnp.float32(0))),
        "sequences": jnp.sum(row_scored.astype(jnp.float32)),
        "sequences_correct": jnp.sum(row_right.astype(jnp.float32)),
    }


def means(sums: Mapping[str, float | np.ndarray], scores: tuple[str, ...] = ("accuracy",)) -> dict[str, float]:
    """Loss and the named scores from the sums of `count_batch`.

    `bits_per_byte` takes one position for one byte.

    Example:
      >>> means({"loss": 2.0, "weight": 4.0, "correct": 1.0}, ("accuracy",))
      {'loss': 0.5, 'accuracy': 0.25}
    """
    weight = float(sums["weight"])
    loss = float(sums["loss"]) / weight if weight else math.nan
    result = {"loss": loss}
    for score in scores:
        if score == "accuracy":
            result[score] = float(sums["correct"]) / weight if weight else math.nan
        elif score == "sequence_accuracy":
            rows = float(sums["sequences"])
            result[score] = float(sums["sequences_correct"]) / rows if rows else math.nan
        elif score == "bits_per_byte":
            result[score] = loss / math.log(2)
        else:
            raise ValueError(f"scores must be of accuracy, sequence_accuracy, bits_per_byte, got {score!r}")
    return result
