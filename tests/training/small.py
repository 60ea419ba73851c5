"""Small runs shared by the tests of training."""

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.models import ModelOutput
from memformer.training.config import default_config


class Counting(nnx.Module):
    """A model that compiles fast: the mean of the inputs so far (ids or features), through one hidden layer."""

    def __init__(self, width, vocab_size, num_classes, rngs, features=0):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (features or vocab_size, width)))
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, inputs, *, segment_ids=None, positions=None, state=None):
        read = inputs @ self.table[...] if inputs.ndim == 3 else jnp.take(self.table[...], inputs, axis=0)
        x = jnp.cumsum(read, axis=1)
        x = x / (positions[..., None].astype(jnp.float32) + 1.0)
        return ModelOutput(self.head(nnx.relu(self.hidden(x))), None, {})


def build_counting(config, *, vocab_size, num_classes, features, rngs):
    """Replaces `build_model`."""
    return Counting(config["width"], vocab_size, num_classes, rngs, features)


def small_config(memory="linear_attention", **changed):
    """Config of a fast run: swap with 3 objects at length 8, width 16, 8 steps; `changed` by dotted key, dots as __."""
    config = default_config()
    config.task = {"name": "swap", "objects": 3, "length": 8}
    config.model.update({"memory": memory, "width": 16, "heads": 2, "depth": 1})
    config.model.memory_options = {"linear_attention": {"conv_width": 0}, "delta_rule": {"conv_width": 0}}
    config.optimizer.learning_rate = 1e-2
    config.mesh.data = 1
    config.train.update({"steps": 8, "batch_size": 8, "log_every": 2, "eval_every": 4, "eval_batches": 2})
    config.train.update({"checkpoint_every": 4, "final_batches": 2, "tensorboard": False})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changed.items()})
    return config
