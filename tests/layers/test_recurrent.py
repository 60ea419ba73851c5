"""Recurrent layers and stacks: packing in both directions, states, single steps, parity with PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers.basic import Dtypes
from memformer.layers.recurrent import CELLS, LSTM, RecurrentStack
from tests.modules import compiled, draws_random_bits, random_module
from tests.numeric import FORWARD, assert_close

B, T, F, D = 2, 7, 3, 4
KINDS = tuple(CELLS)


def inputs(time=T, batch=B):
    return np.random.default_rng(1).standard_normal((batch, time, F)).astype("float32")


@functools.cache
def built(kind, layers=2, bidirectional=False):
    """A stack and its jitted call."""
    make = lambda: RecurrentStack(kind, F, D, layers, bidirectional=bidirectional, rngs=nnx.Rngs(0))  # noqa: E731
    stack = random_module(make)
    graph, parameters = nnx.split(stack)

    @jax.jit
    def call(x, segment_ids=None, state=None):
        return nnx.merge(graph, parameters)(x, segment_ids=segment_ids, state=state)

    return stack, call


# Left padding, a gap inside a segment, two segments side by side, padding at the end.
PACKED = np.array([[0, 5, 5, 0, 5, 5, 3, 3, 3, 3, 0], [2, 2, 2, 2, 0, 0, 6, 0, 6, 6, 6]])
PIECES = [(0, 5), (0, 3), (1, 2), (1, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_unpacked(kind):
    """Both directions: the forward one is that of a stack without the other."""
    _, call = built(kind, bidirectional=True)
    x = inputs(PACKED.shape[1])
    got = np.asarray(call(x, PACKED)[0])
    assert got.shape == (B, PACKED.shape[1], 2 * D)
    assert not np.any(got[PACKED == 0])
    places = [np.flatnonzero(PACKED[row] == segment) for row, segment in PIECES]
    got = np.stack([got[row, place] for (row, _), place in zip(PIECES, places, strict=True)])
    # The same program: each piece alone, with padding behind it.
    pieces = np.stack([x[row, place] for (row, _), place in zip(PIECES, places, strict=True)])
    alone, length = np.zeros_like(x), pieces.shape[1]
    mask, want = (np.arange(x.shape[1]) < length).astype(PACKED.dtype) * np.ones_like(PACKED), []
    for pair in (pieces[:2], pieces[2:]):
        alone[:, :length] = pair
        want.append(np.asarray(call(alone, mask)[0])[:, :length])
    assert_close(got, np.concatenate(want), FORWARD["float32"])


def test_the_backward_direction_reads_from_the_end():
    stack, call = built("lstm", layers=1, bidirectional=True)
    x = inputs()
    y, ((_, last),) = jax.device_get(call(x))
    want, state = jax.device_get(nnx.jit(lambda layer, x: layer(x))(stack.backward[0], x[:, ::-1]))
    assert_close((y[..., D:], last), (want[:, ::-1], state), FORWARD["float32"])
    # Its last state is the one after the whole sequence, wherever there is padding.
    padded = np.pad(x, ((0, 0), (2, 3), (0, 0)), constant_values=9.0)
    _, ((_, last),) = call(padded, np.pad(np.ones((B, T), np.int32), ((0, 0), (2, 3))))
    assert_close(last, state, FORWARD["float32"])


@pytest.mark.parametrize("kind", KINDS)
def test_single_steps_equal_the_whole_sequence(kind):
    stack, call = built(kind)
    x = inputs()
    want, end = call(x)
    state, got = stack.init_state(B), []
    step = jax.jit(lambda x, state: stack.step(x, state))
    for t in range(T):
        y, state = step(x[:, t], state)
        got.append(y)
    assert_close((np.stack(got, axis=1), state), (want, end), FORWARD["float32"])


def test_dropout_applies_between_layers_and_requires_a_key():
    make = lambda: RecurrentStack("gru", F, D, 2, dropout=0.5, rngs=nnx.Rngs(0))  # noqa: E731
    x = inputs()
    assert not draws_random_bits(make, lambda stack: stack(x)[0], training=True)
    dropped, states = compiled(random_module(make))(x, key=jax.random.key(0))
    y, plain = built("gru")[1](x)
    assert np.abs(np.asarray(dropped) - np.asarray(y)).max() > 0.01
    assert_close(states[0], plain[0], FORWARD["float32"])


def test_initial_values():
    layer = LSTM(F, 16, rngs=nnx.Rngs(0))
    i, f, g, o = np.split(np.asarray(layer.bias[...]), 4)
    assert np.all(f == 1) and not np.any([i, g, o])
    for gate in np.split(np.asarray(layer.w_state[...]), 4, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(16), atol=1e-5)
    half = lambda: LSTM(F, 4, dtypes=Dtypes("bfloat16", "bfloat16"), rngs=nnx.Rngs(0))  # noqa: E731
    y, state = jax.eval_shape(lambda x: half()(x), inputs())
    assert y.dtype == jnp.bfloat16 and {s.dtype for s in state} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(half)))} == {jnp.dtype("bfloat16")}


# Arguments, and the error message.
MISTAKES = {
    "kind": ({"kind": "elman"}, "kind must be one of 'rnn', 'lstm', 'gru', got 'elman'"),
    "layers": ({"layers": 0}, "layers must be a positive integer, got 0"),
    "width": ({"width": 0}, "width must be a positive integer, got 0"),
    "dropout": ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        RecurrentStack(**{"kind": "rnn", "in_features": F, "width": D, "rngs": nnx.Rngs(0), **changed})


def test_a_bidirectional_stack_refuses_a_state():
    stack, _ = built("rnn", bidirectional=True)
    with pytest.raises(ValueError, match="state must be None for a bidirectional stack"):
        stack.init_state(B)
    with pytest.raises(ValueError, match=r"x must be \[B, T, F\] with F = 3, got \(2, 7, 4\)"):
        stack(jnp.zeros((B, T, 4)))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_with_the_same_weights(kind, bidirectional):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[peers]'")
    torch.manual_seed(0)
    peer = getattr(torch.nn, kind.upper())(F, D, 2, batch_first=True, bidirectional=bidirectional).double()
    with jax.enable_x64(True):
        stack = RecurrentStack(
            kind, F, D, 2, bidirectional=bidirectional, dtypes=Dtypes("float64", "float64"), rngs=nnx.Rngs(0)
        )
        for row, end in [(stack.forward, "")] + [(stack.backward, "_reverse")] * bidirectional:
            for place, layer in enumerate(row):
                copy_from_torch(layer, {p: value(peer, f"{p}_l{place}{end}") for p in PARTS})
        x = np.random.default_rng(0).normal(size=(B, T, F))
        y, states = stack(jnp.asarray(x))
        y_peer, last = peer(torch.from_numpy(x))
        assert_close(y, y_peer.detach().numpy(), FORWARD["float64"])
        # PyTorch stacks [layer, direction] in one axis, of h and (LSTM) of c.
        ours = [jax.tree.leaves(state) for pair in states for state in (pair if bidirectional else (pair,))]
        theirs = last if isinstance(last, tuple) else (last,)
        want = [part.detach().numpy() for part in theirs]
        assert_close([np.stack(part) for part in zip(*ours, strict=True)], want, FORWARD["float64"])


PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def value(module, name):
    return getattr(module, name).detach().numpy()


def copy_from_torch(layer, parts):
    """Copies the weights of a PyTorch layer, as the docstrings describe."""
    layer.w_in[...], layer.w_state[...] = jnp.asarray(parts["weight_ih"].T), jnp.asarray(parts["weight_hh"].T)
    both = parts["bias_ih"] + parts["bias_hh"]
    if layer.gates == 3:
        both[2 * D :] = parts["bias_ih"][2 * D :]
        layer.bias_state[...] = jnp.asarray(parts["bias_hh"][2 * D :])
    layer.bias[...] = jnp.asarray(both)
