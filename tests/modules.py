"""Modules for tests: random parameters without a program for each shape, and calls in one program."""

import jax
import numpy as np
from flax import nnx


def random_module(make, seed: int = 0):
    """The module that `make` builds, with random parameters from NumPy; initializers compile a program per shape.

    Norms, biases and gates are random too, so that no factor hides. Streams of random numbers start at `seed`.
    """
    graph, shapes = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if np.issubdtype(x.dtype, np.integer):
            return np.zeros(x.shape, x.dtype)
        size = x.shape[-2] ** -0.5 if len(x.shape) > 1 else 0.5
        return (size * rng.standard_normal(x.shape)).astype(x.dtype)

    return nnx.merge(graph, jax.tree.map(draw, shapes))


def compiled(module, method: str = "__call__", **static):
    """A method of the module, jitted: eager execution would compile every operation separately."""
    graph, parameters = nnx.split(module)
    call = jax.jit(lambda at, *args, **kwargs: getattr(nnx.merge(graph, at), method)(*args, **kwargs, **static))
    return lambda *args, **kwargs: call(parameters, *args, **kwargs)


def draws_random_bits(make, call, training: bool) -> bool:
    """Whether a call of the module that `make` builds draws random numbers, as dropout does; it is only traced."""
    module = nnx.eval_shape(make)
    module.train() if training else module.eval()
    graph, state = nnx.split(module)
    return "random_bits" in str(jax.make_jaxpr(lambda state: call(nnx.merge(graph, state)))(state))
