"""Training in one compiled call, for experiments with many small models on generated data.

Tasks are trained by the trainer (memformer.training); this is for losses and streams of a single study.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from memformer.core.types import Array

__all__ = ["fit"]


@functools.partial(jax.jit, static_argnames=("graph", "loss", "draw", "steps", "rate"))
def fit(
    graph: Any,
    params: Any,
    key: Array,
    *,
    loss: Callable[[Any, Any], Array],
    draw: Callable[[Array], Any],
    steps: int,
    rate: float,
) -> tuple[Any, Array]:
    """AdamW with a short warm-up and a cosine; the same program for every key and every start.

    Args:
      graph: of the module, from `nnx.split`.
      params: its parameters, from the same split.
      key: of the batches.
      loss: (module, batch) -> scalar; a named function, so that it is compiled once.
      draw: key -> batch; the same.
      steps: of training.
      rate: the highest learning rate.

    Returns:
      (parameters, losses [steps]).

    Example:
      >>> graph, params = nnx.split(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
      >>> def draw(key): return jax.random.normal(key, (8, 2))
      >>> def loss(module, x): return jnp.mean((module(x)[:, 0] - x[:, 0] + x[:, 1]) ** 2)
      >>> params, losses = fit(graph, params, jax.random.key(0), loss=loss, draw=draw, steps=300, rate=0.1)
      >>> jnp.round(params["kernel"][...][:, 0], 2).tolist()
      [1.0, -1.0]
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.05 * rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def objective(params: Any, batch: Any) -> Array:
        return loss(nnx.merge(graph, params), batch)

    def step(carry: tuple, key: Array) -> tuple[tuple, Array]:
        params, state = carry
        value, slope = jax.value_and_grad(objective)(params, draw(key))
        # optax is not clean under strict promotion
        with jax.numpy_dtype_promotion("standard"):
            change, state = tx.update(slope, state, params)
            params = optax.apply_updates(params, change)
        return (params, state), value

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
    return params, losses
