"""The memory of the Neural Turing Machine: addressing, read and write of one step.

A memory is [B, K, S]: S slots of width K. Slots are the last axis, so that a head's weights [B, H, S] and a slot's
neighbours are contiguous. Every function is pure and differentiable in all its arguments; sums are computed in their
dtype. Source of all: Graves et al. 2014, "Neural Turing machines" (arXiv 1410.5401), section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memformer.core.numerics import l2norm
from memformer.core.sharding import keep_shardings
from memformer.core.types import Array, Float

__all__ = [
    "Focus",
    "address",
    "content_weights",
    "interpolate",
    "read_slots",
    "sharpen",
    "shift_weights",
    "write_slots",
]

# Far below the length of any written slot: slots are initialised to 1e-6 in each entry.
EPSILON = 1e-6


class Focus(NamedTuple):
    """The addressing parameters of the heads.

    Attributes:
      key: content to look up.
      strength: beta >= 0, the sharpness of content addressing.
      gate: g in [0, 1], 1 for content, 0 for the weights of the last step.
      shifts: s, a distribution over moves by (-1, 0, +1) slots.
      sharpness: gamma >= 1.
    """

    key: Float[Array, "B H K"]
    strength: Float[Array, "B H"]
    gate: Float[Array, "B H"]
    shifts: Float[Array, "B H 3"]
    sharpness: Float[Array, "B H"]


@keep_shardings
def content_weights(
    key: Float[Array, "B H K"], strength: Float[Array, "B H"], memory: Float[Array, "B K S"]
) -> Float[Array, "B H S"]:
    """Computes content weights: softmax over slots of beta cos(k, M_s).

    A slot or key of zeros has cosine 0. Source: equations 5 and 6.

    Example:
      >>> memory = jnp.eye(2)[None]
      >>> content_weights(jnp.array([[[3.0, 0.0]]]), jnp.array([[100.0]]), memory)
      Array([[[1., 0.]]], dtype=float32)
    """
    products = jnp.einsum("bhk,bks->bhs", l2norm(key), l2norm(memory, EPSILON, axis=1))
    return jax.nn.softmax(strength[..., None] * products)


@keep_shardings
def interpolate(
    content: Float[Array, "B H S"], before: Float[Array, "B H S"], gate: Float[Array, "B H"]
) -> Float[Array, "B H S"]:
    """Interpolates weights: g w_content + (1 - g) w_before. Source: equation 7.

    Example:
      >>> interpolate(jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0, 1.0]]]), jnp.array([[0.25]]))
      Array([[[0.25, 0.75]]], dtype=float32)
    """
    return before + gate[..., None] * (content - before)


@keep_shardings
def shift_weights(weights: Float[Array, "B H S"], shifts: Float[Array, "B H 3"]) -> Float[Array, "B H S"]:
    """Shifts weights around the circle of slots: w'_i = sum over j in (-1, 0, 1) of s_j w_(i - j).

    Source: equation 8.

    Example:
      >>> shift_weights(jnp.array([[[0.0, 0.0, 1.0]]]), jnp.array([[[0.0, 0.0, 1.0]]]))
      Array([[[1., 0., 0.]]], dtype=float32)
    """
    circle = jnp.concatenate([weights[..., -1:], weights, weights[..., :1]], axis=-1)
    back, stay, forward = (shifts[..., j : j + 1] for j in range(3))
    return back * circle[..., 2:] + stay * weights + forward * circle[..., :-2]


@keep_shardings
def sharpen(weights: Float[Array, "B H S"], sharpness: Float[Array, "B H"]) -> Float[Array, "B H S"]:
    """Sharpens weights: w_i^gamma / sum_j w_j^gamma. Source: equation 9.

    Computed as a softmax of gamma log w, which does not overflow for any gamma.

    Example:
      >>> sharp = sharpen(jnp.array([[[0.25, 0.75]]]), jnp.array([[2.0]]))
      >>> [round(float(weight), 3) for weight in sharp[0, 0]]
      [0.1, 0.9]
    """
    # Keeps the gradient of a weight of exactly 0 finite.
    least = jnp.asarray(1e-16, weights.dtype)
    return jax.nn.softmax(sharpness[..., None] * jnp.log(weights + least))


@keep_shardings
def address(focus: Focus, before: Float[Array, "B H S"], memory: Float[Array, "B K S"]) -> Float[Array, "B H S"]:
    """Computes the weights of all heads: content, interpolation, shift, sharpening. Source: figure 2.

    Example:
      >>> forward = jnp.array([[[0.0, 0.0, 1.0]]])
      >>> focus = Focus(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)), jnp.zeros((1, 1)), forward, jnp.ones((1, 1)))
      >>> jax.jit(address)(focus, jnp.array([[[1.0, 0.0, 0.0]]]), jnp.zeros((1, 2, 3))).round(3)
      Array([[[0., 1., 0.]]], dtype=float32)
    """
    weights = content_weights(focus.key, focus.strength, memory)
    weights = interpolate(weights, before, focus.gate)
    return sharpen(shift_weights(weights, focus.shifts), focus.sharpness)


@keep_shardings
def read_slots(weights: Float[Array, "B H S"], memory: Float[Array, "B K S"]) -> Float[Array, "B H K"]:
    """Reads r = sum over slots of w_s M_s. Source: equation 2.

    Example:
      >>> read_slots(jnp.array([[[0.5, 0.5]]]), jnp.array([[[2.0, 4.0]]]))
      Array([[[3.]]], dtype=float32)
    """
    return jnp.einsum("bhs,bks->bhk", weights, memory)


@keep_shardings
def write_slots(
    memory: Float[Array, "B K S"],
    weights: Float[Array, "B H S"],
    erase: Float[Array, "B H K"],
    add: Float[Array, "B H K"],
) -> Float[Array, "B K S"]:
    """Writes M_s <- M_s prod over heads of (1 - w_s e) + sum over heads of w_s a: all erases before all adds.

    Source: equations 3 and 4.

    Example:
      >>> one = jnp.ones((1, 1, 1))
      >>> write_slots(7 * one, one, erase=one, add=3 * one)
      Array([[[3.]]], dtype=float32)
    """
    for head in range(weights.shape[1]):
        memory = memory * (1 - erase[:, head, :, None] * weights[:, head, None, :])
    return memory + jnp.einsum("bhk,bhs->bks", add, weights)
