"""Mamba-3 against its paper's recurrence (arXiv 2603.15569), written token by token in NumPy and float64."""

import jax
import numpy as np
from flax import nnx

from memformer.layers import Dtypes, build_memory
from tests.modules import random_module
from tests.numeric import assert_close

WIDTH, HEADS, KEY, VALUE, TIME = 6, 2, 8, 3, 6


def layer_and_input():
    """A layer whose vectors are random too, and its input."""
    sizes = {"heads": HEADS, "key_width": KEY, "value_width": VALUE}
    sizes["dtypes"] = Dtypes("float64", "float64")
    layer = random_module(lambda: build_memory("mamba3", WIDTH, **sizes, rngs=nnx.Rngs(0)))
    # large steps, so that pairs of channels turn by more than a whole turn
    layer.step_bias.set_value(np.asarray(layer.step_bias[...]) + 6)
    return layer, np.random.default_rng(1).standard_normal((2, TIME, WIDTH))


def softplus(x):
    return np.log1p(np.exp(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def read_parameters(layer):
    named = {name: layer.projections[name].kernel for name in ("query", "key", "value")}
    named |= {name: getattr(layer, name).kernel for name in ("step", "rate", "mix", "turn", "gate", "out")}
    named |= {name: getattr(layer, name) for name in ("step_bias", "query_bias", "key_bias", "skip")}
    named |= {f"{name}_norm": layer.qk_norms[name].scale for name in ("query", "key")}
    return {name: np.asarray(parameter[...]) for name, parameter in named.items()}


def recurrence(weights, x):
    """Output [T, D] of one sequence, and the state after it."""
    pairs = weights["turn"].shape[1]
    angle, state = np.zeros((HEADS, pairs)), np.zeros((HEADS, KEY, VALUE))
    last_key, last_value, outputs = np.zeros((HEADS, KEY)), np.zeros((HEADS, VALUE)), []

    def head_vectors(name, token):
        """Normalised over the channels that all heads share, with the biases of each, turned by the angle so far."""
        y = token @ weights[name]
        y = weights[f"{name}_norm"] * y / np.sqrt(np.mean(y**2) + 1e-5) + weights[f"{name}_bias"].reshape(HEADS, KEY)
        for pair in range(pairs):
            complex_pair = (y[:, 2 * pair] + 1j * y[:, 2 * pair + 1]) * np.exp(1j * angle[:, pair])
            y[:, 2 * pair], y[:, 2 * pair + 1] = complex_pair.real, complex_pair.imag
        return y

    for token in x:
        step = softplus(token @ weights["step"] + weights["step_bias"])
        rate = -np.maximum(softplus(token @ weights["rate"]), 1e-4)
        mix = sigmoid(token @ weights["mix"])
        angle = angle + step[:, None] * np.pi * np.tanh(token @ weights["turn"])
        query, key = head_vectors("query", token), head_vectors("key", token)
        value = (token @ weights["value"]).reshape(HEADS, VALUE)
        alpha = np.exp(step * rate)
        beta, gamma = (1 - mix) * step * alpha, mix * step
        for head in range(HEADS):
            state[head] *= alpha[head]
            state[head] += beta[head] * np.outer(last_key[head], last_value[head])
            state[head] += gamma[head] * np.outer(key[head], value[head])
        read = np.einsum("hkv,hk->hv", state, query) + weights["skip"][:, None] * value
        gate = token @ weights["gate"]
        outputs.append((read.reshape(-1) * gate * sigmoid(gate)) @ weights["out"])
        last_key, last_value = key, value
    return np.stack(outputs), (state, last_key, last_value, angle)


def test_the_layer_is_the_papers_recurrence():
    """In two calls; the state is the paper's: the matrix, the key and value of the last token, and the angles."""
    # Flax promotes to float32 by itself
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        layer, x = layer_and_input()
        call = nnx.jit(lambda layer, x, state: layer(x, state=state))
        start = layer.init_state(2, TIME)
        first, state = call(layer, x[:, :3], start)
        second, state = call(layer, x[:, 3:], state)
        got, memory = np.concatenate([first, second], axis=1), jax.device_get(state["memory"])
        weights = read_parameters(layer)
    for row in range(2):
        want, (matrix, key, value, angle) = recurrence(weights, x[row])
        assert np.abs(angle).max() > 2 * np.pi
        assert_close(got[row], want, 1e-12)
        wanted = (matrix, key, value, np.exp(1j * angle).real)
        found = (memory.matrix[row], memory.key[row], memory.value[row], np.cos(2 * np.pi * memory.turns[row]))
        assert_close(found, wanted, 1e-12)
