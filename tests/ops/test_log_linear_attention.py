"""Log-linear attention beyond the shared suite: the definition, one level, and what is refused.

The definition is that of the naive form of the library flash-linear-attention, written with loops.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memformer as mf
from memformer.layers.memory import build_memory
from tests.numeric import relative_rms
from tests.ops.specs import HEADS, WIDTH, recurrent_arrays

TIME, LEVELS = 37, 7


def arrays(levels=LEVELS, time=TIME):
    rng = np.random.default_rng(5)
    x = recurrent_arrays(decay="head", beta=False, groups=1)(rng, 2, time)
    return x | {"level_weights": rng.uniform(0.0, 2.0, (2, time, HEADS, levels))}


def naive(q, k, v, level_weights, decay):
    """Each pair of tokens by itself."""
    output, total = np.zeros(v.shape), np.cumsum(decay, axis=1)
    for t in range(v.shape[1]):
        for i in range(t + 1):
            level = min((t ^ i).bit_length(), level_weights.shape[-1] - 1)
            score = np.sum(q[:, t] * k[:, i], axis=-1) * WIDTH**-0.5
            factor = level_weights[:, t, :, level] * np.exp(total[:, t] - total[:, i]) * score
            output[:, t] += factor[..., None] * v[:, i]
    return output


@pytest.mark.parametrize("levels", [LEVELS, 3])
def test_equals_the_definition(levels):
    """With levels for all tokens, and with fewer: older tokens are then on the last."""
    x = arrays(levels)
    want = naive(**x)
    with jax.enable_x64(True):
        for implementation in ("recurrent", "chunked"):
            # compiled whole: eager operations are compiled one by one
            call = jax.jit(functools.partial(mf.log_linear_attention, implementation=implementation))
            got, _ = call(**x)
            assert relative_rms(got, want) < 1e-13


def test_equal_weights_are_linear_attention():
    x = jax.tree.map(lambda x: jnp.asarray(x, "float32"), arrays())
    x["level_weights"] = jnp.ones_like(x["level_weights"])
    got, state = jax.jit(mf.log_linear_attention)(**x)
    del x["level_weights"]
    want, matrix = jax.jit(mf.linear_attention)(**x)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(np.sum(state.levels, axis=2), matrix, atol=2e-6)
    # 37 is 100101 in binary: a block for each bit; the last token alone is on level 0.
    filled = np.any(np.asarray(state.levels) != 0, axis=(0, 1, 3, 4))
    assert list(filled) == [level in (0, 3, 6) for level in range(LEVELS)] and list(state.length) == [37, 37]


def test_bad_state():
    x = jax.tree.map(lambda x: jnp.asarray(x, "float32"), arrays(time=3))
    levels, length = jnp.zeros((2, HEADS, LEVELS, WIDTH, 4)), jnp.zeros(2, jnp.int32)
    wrong = {
        "initial_state must be a LogLinearState, got": levels,
        r"initial_state.levels must be \[B, H, L, K, V\] = .*got": mf.LogLinearState(levels[:, :, 1:], length),
        r"initial_state.length must be \[B\] = \(2,\), got": mf.LogLinearState(levels, levels),
    }
    for message, state in wrong.items():
        with pytest.raises(ValueError, match=message):
            mf.log_linear_attention(**x, initial_state=state)
    with pytest.raises(ValueError, match=r"decay must be \[B, T, H\]"):
        mf.log_linear_attention(**x | {"decay": -jnp.ones((2, 3, HEADS, WIDTH))})


@pytest.mark.parametrize("options", [{"normalize": True}, {"decay": "log_sigmoid"}, {"decay_rank": 4}, {"levels": 0}])
def test_the_layer_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*got"):
        build_memory("log_linear_attention", 8, heads=2, options=options, rngs=nnx.Rngs(0))
