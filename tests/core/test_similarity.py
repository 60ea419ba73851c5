"""Similarity kernels: values against numpy, gradients, default scales, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core.similarity import KERNELS, Kernel, resolve_kernel, similarity
from tests.numeric import assert_close

SCORES = np.array([[-2.3, -0.4, 0.1, 0.26, 1.74]], np.float32)

# kernel, value in numpy, derivative in numpy
VALUES = {
    "linear": (Kernel("linear"), lambda s: s, np.ones_like),
    "relu": (Kernel("relu"), lambda s: np.maximum(s, 0), lambda s: s > 0),
    "exp": (Kernel("exp"), np.exp, np.exp),
    "softmax": (Kernel("softmax"), np.exp, np.exp),
    "round": (Kernel("round"), np.round, np.ones_like),
    "round to a tenth": (Kernel("round", decimals=1), lambda s: np.round(s, 1), np.ones_like),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_and_gradients(case):
    kernel, value, derivative = VALUES[case]
    wide = SCORES.astype(np.float64)
    values, gradient = jax.jit(lambda s: (similarity(kernel, s), jax.grad(lambda s: similarity(kernel, s).sum())(s)))(
        SCORES
    )
    assert_close(values, value(wide), 1e-6)
    assert_close(gradient, np.asarray(derivative(wide), np.float64), 1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_keeps_the_dtype(name):
    assert similarity(Kernel(name), jnp.asarray(SCORES, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_table_has_every_kernel():
    assert {kernel.name for kernel, _, _ in VALUES.values()} == set(KERNELS)


DEFAULT_SCALE = {"linear": 1.0, "relu": 1.0, "round": 1.0, "exp": 0.25, "softmax": 0.25}


@pytest.mark.parametrize("name", KERNELS)
def test_scales(name):
    assert Kernel(name).scale_for(16) == DEFAULT_SCALE[name]
    assert Kernel(name, scale=0.7).scale_for(16) == 0.7
    assert Kernel(name).normalized == (name == "softmax")


def test_resolve_kernel():
    kernel = Kernel("round", decimals=2)
    assert resolve_kernel("write_kernel", kernel) is kernel
    assert resolve_kernel("write_kernel", "relu") == Kernel("relu")


@pytest.mark.parametrize("value", ["cosine", None, 3])
def test_resolve_kernel_names_the_argument(value):
    with pytest.raises(ValueError, match=f"write_kernel must be a Kernel or one of linear, .* got {value!r}"):
        resolve_kernel("write_kernel", value)


def test_kernel_errors():
    with pytest.raises(ValueError, match="kernel name must be one of linear, relu, exp, softmax, round, got 'cosine'"):
        Kernel("cosine")
    with pytest.raises(ValueError, match="decimals is for the round kernel only, got decimals=2 with 'exp'"):
        Kernel("exp", decimals=2)
    for scale in (np.nan, np.inf, "1", True):
        with pytest.raises(ValueError, match="scale must be a finite number or None"):
            Kernel("exp", scale)


def test_scalars_of_numpy_and_jax_are_settings():
    kernel = Kernel("round", jnp.float32(0.5), np.int64(2))
    assert kernel == Kernel("round", 0.5, 2) and hash(kernel) == hash(Kernel("round", 0.5, 2))
