"""Training of small models as one program: a scan over batches, the parameters in one vector."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from memformer.training.input import make_loader


def learn(model, loss, batches, rate: float) -> np.ndarray:
    """Losses of the steps of Adam.

    Args:
      model: its parameters are not changed.
      loss: of the model and a batch.
      batches: a tree of arrays, one batch per row of the first axis.
      rate: of learning.
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    vector, unravel = ravel_pytree(parameters)
    tx = optax.adam(rate)

    def step(carry, batch):
        vector, state = carry
        value, gradient = jax.value_and_grad(lambda x: loss(nnx.merge(graph, unravel(x), rest), batch))(vector)
        with jax.numpy_dtype_promotion("standard"):
            update, state = tx.update(gradient, state)
        return (vector + update, state), value

    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[1])
    return np.asarray(run((vector, tx.init(vector)), batches))


def draw(task, steps: int, batch_size: int):
    """Batches of a task, one per row."""
    loader = make_loader(task, "train", batch_size=batch_size, seed=0, prefetch=0)
    return jax.tree.map(lambda *rows: np.stack(rows), *(next(loader) for _ in range(steps)))


def cross_entropy(logits, batch):
    """Mean loss of the scored tokens."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(each * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])
