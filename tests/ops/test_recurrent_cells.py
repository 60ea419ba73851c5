"""rnn, lstm and gru against their equations in NumPy, one suite for the three."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.ops.recurrent_cells import gru, lstm, rnn
from tests.numeric import FORWARD, GRADIENT, assert_close, slopes

B, T, F, D = 4, 6, 3, 5

# Left padding, a gap inside a segment, segments side by side, padding at the end, a row that is all padding.
SEGMENTS = np.array([[0, 5, 5, 0, 5, 3], [2, 2, 7, 7, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rnn_step(x, h, w_in, w_state, b):
    return (np.tanh(x @ w_in + h[0] @ w_state + b),)


def lstm_step(x, state, w_in, w_state, b):
    i, f, g, o = np.split(x @ w_in + state[0] @ w_state + b, 4)
    c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru_step(x, h, w_in, w_state, b, b_state):
    r, z, n = np.split(x @ w_in + b, 3)
    r_state, z_state, n_state = np.split(h[0] @ w_state, 3)
    z = sigmoid(z + z_state)
    return ((1 - z) * np.tanh(n + sigmoid(r + r_state) * (n_state + b_state)) + z * h[0],)


class Spec(NamedTuple):
    op: object
    gates: int
    states: int
    step: object


SPECS = {"rnn": Spec(rnn, 1, 1, rnn_step), "lstm": Spec(lstm, 4, 2, lstm_step), "gru": Spec(gru, 3, 1, gru_step)}


def arguments(name, dtype=np.float32):
    """x, weights and initial states, as NumPy arrays."""
    rng, spec = np.random.default_rng(0), SPECS[name]
    shapes = [(B, T, F), (F, spec.gates * D), (D, spec.gates * D), (spec.gates * D,), *[(D,)] * (name == "gru")]
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    states = tuple(rng.normal(size=(B, D)).astype(dtype) for _ in range(spec.states))
    return arrays, states


def packed_state(states):
    return states[0] if len(states) == 1 else states


@functools.partial(jax.jit, static_argnums=0)
def call(name, arrays, states, segments):
    y, state = SPECS[name].op(*arrays, initial_state=packed_state(states), segment_ids=segments)
    return y, tuple(jax.tree.leaves(state))


def oracle(name, arrays, states, segments):
    """One token at a time, in float64."""
    x, *weights = (np.asarray(a, np.float64) for a in arrays)
    y, last = np.zeros((B, T, D)), [np.zeros((B, D)) for _ in states]
    for row in range(B):
        state, segment = [np.asarray(s[row], np.float64) for s in states], None
        for t in range(T):
            if segments[row, t]:
                if segment not in (None, segments[row, t]):
                    state = [np.zeros(D) for _ in states]
                segment = segments[row, t]
                state = SPECS[name].step(x[row, t], state, *weights)
                y[row, t] = state[0]
        for all_, part in zip(last, state, strict=True):
            all_[row] = part
    return y, tuple(last)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_equations_segments_and_states(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays, states = arguments(name)
        # Values at padding must not matter.
        arrays[0] = np.where((SEGMENTS == 0)[..., None], np.nan, arrays[0])
        arrays, states = jax.tree.map(lambda a: jnp.asarray(a, dtype), (arrays, states))
        y, state = call(name, arrays, states, jnp.asarray(SEGMENTS))
        wide = "float64" if dtype == "float64" else "float32"
        assert y.dtype == dtype and {s.dtype for s in state} == {jnp.dtype(wide)}
        want = oracle(name, arrays, states, SEGMENTS)
        assert_close((y, state), want, FORWARD[dtype])


@pytest.mark.parametrize("name", SPECS)
def test_gradients_through_time_against_finite_differences(name):
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def loss(at):
            y, state = call(name, *at, SEGMENTS)
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(s**2) for s in state)

        for seed in range(3):
            assert_close(*slopes(loss, arguments(name, np.float64), seed=seed), 1e-6)


def test_under_vmap_and_shard_map_as_alone():
    """The cell of two states: one loop runs all three."""
    name = "lstm"
    arrays, states = arguments(name)
    segments = SEGMENTS

    def loss(weights, x, states, segments):
        y, state = call(name, [x, *weights], states, segments)
        return jnp.sum(y**2) + sum(jnp.sum(s) for s in state)

    x, *weights = arrays
    want = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(weights, x, states, segments)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("batch")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), rows, rows, rows), out_specs=jax.P())
    def everywhere(*arguments):
        return jax.lax.psum(loss(*arguments), "batch")

    got = jax.jit(jax.grad(everywhere, argnums=(0, 1, 2)))(weights, x, states, segments)
    assert_close(got, want, GRADIENT["float32"])

    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
    def by_row(weights, x, states, segments):
        return loss(weights, x[None], jax.tree.map(lambda s: s[None], states), segments[None])

    got = jax.jit(jax.grad(lambda *a: jnp.sum(by_row(*a)), argnums=(0, 1, 2)))(weights, x, states, segments)
    assert_close(got, want, GRADIENT["float32"])


# Position of the argument, its replacement, and the expected error.
MISTAKES = {
    "x": (0, np.zeros((B, F), np.float32), r"x must be \[B, T, F\], got \(4, 3\)"),
    "w_in": (1, np.zeros((F, D), np.float32), r"w_in must be \[F, E\] = \(3, 20\), got \(3, 5\)"),
    "w_state": (2, np.zeros((D, D), np.float32), r"w_state must be \[D, 4 \* D\], got \(5, 5\)"),
    "bias": (3, np.zeros(D, np.float32), r"bias must be \[E\] = \(20,\), got \(5,\)"),
    "ids": (0, np.zeros((B, T, F), np.int32), "x must have a floating dtype, got int32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_argument(mistake):
    place, wrong, message = MISTAKES[mistake]
    arrays, _ = jax.tree.map(jnp.asarray, arguments("lstm"))
    arrays[place] = wrong
    with pytest.raises(ValueError, match=message):
        lstm(*arrays)


def test_wrong_states_and_segments_are_named():
    arrays, (h, _) = jax.tree.map(jnp.asarray, arguments("lstm"))
    with pytest.raises(ValueError, match=r"initial_state must be a tuple \(h, c\), got ArrayImpl"):
        lstm(*arrays, initial_state=h)
    with pytest.raises(ValueError, match=r"initial_state.c must be \[B, D\] = \(4, 5\), got \(4, 4\)"):
        lstm(*arrays, initial_state=(h, h[:, :4]))
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, T\] = \(4, 6\), got \(4, 5\)"):
        lstm(*arrays, segment_ids=jnp.ones((B, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"bias_state must be \[D\] = \(5,\), got \(4,\)"):
        gru(*jax.tree.map(jnp.asarray, arguments("gru")[0][:4]), jnp.zeros(4))
