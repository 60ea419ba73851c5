"""The T x T forms in plain JAX: the textbook implementations that the library is timed against."""

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from memformer.core.types import Array

__all__ = ["deltaformer", "linear_attention", "softmax_attention"]


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bthk,bshk->bhts", q, k)


def _causal_mask(length: int, diagonal: int) -> np.ndarray:
    return np.tril(np.ones((length, length), bool), diagonal)


def _softmax(scores: Array, mask: np.ndarray) -> Array:
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def softmax_attention(q: Array, k: Array, v: Array) -> Array:
    """Causal softmax attention from the full score matrix; q, k, v [B, T, H, K], result [B, T, H, V]."""
    weights = _softmax(_scores(q, k) * q.shape[-1] ** -0.5, _causal_mask(q.shape[1], 0))
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def linear_attention(q: Array, k: Array, v: Array, decay: Array) -> Array:
    """Linear attention with a log decay per head, [B, T, H], from the full score matrix."""
    total = jnp.moveaxis(jnp.cumsum(decay, axis=1), 1, 2)
    mask = _causal_mask(q.shape[1], 0)
    gap = jnp.where(mask, total[..., :, None] - total[..., None, :], 0.0)
    scores = jnp.where(mask, _scores(q, k) * jnp.exp(gap), 0.0) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshv->bthv", scores, v)


def deltaformer(q: Array, k: Array, v: Array, w: Array, beta: Array) -> Array:
    """DeltaFormer with softmax similarities, by one T x T triangular solve."""
    scale = q.shape[-1] ** -0.5
    write = _softmax(_scores(w, k) * scale, _causal_mask(q.shape[1], -1))
    system = jnp.moveaxis(beta, 1, 2)[..., None] * write
    u = solve_triangular(system, jnp.moveaxis(v, 1, 2), lower=True, unit_diagonal=True)
    read = _softmax(_scores(q, k) * scale, _causal_mask(q.shape[1], 0))
    return jnp.moveaxis(read @ u, 1, 2)
