"""The feedforward layer as a memory: its pairs, their interference, and dropping them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.lab.ffn import Dropped, Pairs, inverse_snr, overlap, read_pairs
from memformer.layers.basic import Dtypes
from memformer.layers.feedforward import FEEDFORWARDS

LAYERS = {
    "mlp": {"hidden": 16, "activation": "relu"},
    "swiglu": {"hidden": 16},
    "moe": {"hidden": 8, "experts": 4, "active": 2},
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_pairs_are_the_layer(name):
    layer = FEEDFORWARDS[name](8, **LAYERS[name], dtypes=Dtypes(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    want, dropped = nnx.jit(lambda layer, dropped, x: (layer(x)[0], dropped(x)[0]))(layer, Dropped(layer, 0), x)
    want = np.asarray(want)
    np.testing.assert_allclose(dropped, want, atol=1e-5)
    pairs = read_pairs(layer)
    if name != "moe":
        np.testing.assert_allclose(pairs.answers(np.asarray(x[0])) @ pairs.values, want[0], atol=1e-5)
    assert len(pairs.keys) == (32 if name == "moe" else 16)


def test_dropping_takes_the_largest_or_as_many_at_random():
    layer = FEEDFORWARDS["mlp"](8, hidden=16, dtypes=Dtypes(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    pairs = read_pairs(layer)
    each = pairs.answers(np.asarray(x[0]))[..., None] * pairs.values
    largest = np.linalg.norm(each, axis=2).argmax(axis=1)
    want = np.asarray(layer(x)[0][0]) - each[np.arange(6), largest]
    np.testing.assert_allclose(Dropped(layer, 1)(x)[0][0], want, atol=1e-5)
    assert not np.allclose(Dropped(layer, 1, 0)(x)[0], Dropped(layer, 1, 1)(x)[0])
    assert not jnp.any(Dropped(layer, 16, 0)(x)[0])


@pytest.mark.parametrize(("gated", "theory"), [(False, 2.0), (True, 2 * 256 / 64**2)])
def test_gaussian_keys_follow_theory(gated, theory):
    rng = np.random.default_rng(0)
    keys, factors, values = rng.standard_normal((3, 256, 64), np.float32)
    pairs = Pairs(keys, factors if gated else None, values, "silu" if gated else "relu")
    assert np.median(inverse_snr(pairs)) == pytest.approx(theory, rel=0.25)


def test_overlap_of_equal_rows_is_one():
    assert overlap(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))[1] == pytest.approx(1)
