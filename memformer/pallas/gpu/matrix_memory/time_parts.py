"""Few heads: parts of the time are scanned at once, each from the state that enters it.

What leaves a part is S' = M S + E: M is the product of its transitions, and E what a state of 0 becomes. Scans of all
parts at once give E, and M as what an identity becomes where all values are 0. The states that enter the parts follow
one from the other, then all parts are scanned. Gradients of states go the other way: dS = M^T dS' + dE. Where writes
add, M is a number.
"""

import jax.numpy as jnp
from jax import lax

from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.pallas.gpu.matrix_memory.config import ScanConfig
from memformer.pallas.gpu.matrix_memory.scan_kernels import scan_backward, scan_states

__all__ = ["part_gradients", "part_states"]


def part_states(config: ScanConfig, k, v, inverse, scalars, start: Array) -> Array:
    """The state that enters each part, [B, H, parts, V, K].

    Args:
      config: sizes.
      k, v, inverse, scalars: see `scan_forward`.
      start: the first state, [B, H, V, K] float32.
    """
    if config.parts == 1:
        return start[:, :, None]
    states, transitions = [start], _transitions(config, 0, k, inverse, scalars)
    left = scan_states(config, 0, k, v, inverse, scalars, _zeros(config, start))
    for i in range(config.parts - 1):
        states.append(_apply(states[-1], transitions[:, :, i]) + left[:, :, i])
    return jnp.stack(states, axis=2)


def part_gradients(config: ScanConfig, q, k, do, qk, inverse, scalars, dend: Array) -> Array:
    """The gradient of the state that leaves each part, [B, H, parts, V, K].

    Args:
      config: sizes.
      q, k, do, qk, inverse, scalars: see `scan_backward`.
      dend: the gradient of the last state, [B, H, V, K] float32.
    """
    if config.parts == 1:
        return dend[:, :, None]
    gradients, transitions = [dend], jnp.swapaxes(_transitions(config, 1, k, inverse, scalars), 3, 4)
    (entered,) = scan_backward(config, False, q, k, do, qk, inverse, scalars, _zeros(config, dend))
    for i in reversed(range(config.parts - 1)):
        gradients.append(_apply(gradients[-1], transitions[:, :, i]) + entered[:, :, i])
    return jnp.stack(gradients[::-1], axis=2)


def _zeros(config: ScanConfig, like: Array) -> Array:
    zeros = jnp.zeros((config.batch, config.heads, config.parts - 1, config.value, config.key), jnp.float32)
    return vary_like(zeros, like)


def _transitions(config: ScanConfig, first: int, k, inverse, scalars) -> Array:
    """M^T of each part from `first` on, but one, [B, H, parts - 1, K, K]; [..., 1, 1] where writes add."""
    parts, shape = config.parts - 1, (config.batch, config.heads)
    if config.beta:
        identity = jnp.broadcast_to(jnp.eye(config.key, dtype=jnp.float32), (*shape, parts, config.key, config.key))
        return scan_states(config, first, k, None, inverse, scalars, vary_like(identity, k))
    if not config.carries:
        return jnp.ones((*shape, parts, 1, 1), jnp.float32)
    decay = scalars[0][:, :, :, config.scalars.index("decay_in"), -1].reshape(*shape, config.parts, -1)
    return jnp.prod(decay, axis=3)[:, :, first : first + parts, None, None]


def _apply(state: Array, transition: Array) -> Array:
    """The transpose of M S, from S^T [V, K] and M^T."""
    if transition.shape[-1] == 1:
        return state * transition
    return jnp.matmul(state, transition, precision=lax.Precision.HIGHEST)
