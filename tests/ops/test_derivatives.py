"""Derivatives beyond a first gradient: forward mode, Hessians, gradients of gradients, and what is refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from tests.numeric import assert_close


def call(name, x, implementation):
    """One op as a function of one array, which is its query, key and value."""
    half = jnp.full(x.shape[:3], 0.5, x.dtype)
    options = {"implementation": implementation, "chunk_size": 4}
    if name == "delta_rule":
        w = mf.l2norm(jnp.flip(x, -1))
        return mf.delta_rule(x, mf.l2norm(x), x, half, w=w, alpha=half * x[..., 0], decay=-half, **options)[0]
    if name == "linear_attention":
        return mf.linear_attention(x, x, x, decay=-half, **options)[0]
    return getattr(mf, name)(x, x, x, decay=-half * jnp.exp(x[..., 0]), **options)[0]


def loss(name, implementation):
    return lambda x: jnp.sum(jnp.sin(call(name, x, implementation)))


def point():
    return np.random.default_rng(0).standard_normal((1, 6, 1, 2))


def second(function, x):
    """The gradient of a function of the gradient, in reverse mode twice."""
    return jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(function)(x))))(x)


OPS = ("delta_rule", "linear_attention", "softmax_attention", "deltaformer")


def curved(function, x, direction):
    """The gradient, and the Hessian times a direction."""
    return jax.jvp(jax.grad(function), (x,), (direction,))


@functools.cache
def compiled_oracle(name):
    return jax.jit(functools.partial(curved, loss(name, "recurrent")))


def oracle(name, direction):
    """Gradient of the recurrence at `point`, and its Hessian times a direction."""
    with jax.enable_x64(True):
        return jax.device_get(compiled_oracle(name)(point(), direction))


@pytest.mark.parametrize("name", OPS)
def test_chunks_have_forward_mode_and_hessians(name):
    function = loss(name, "chunked")
    with jax.enable_x64(True):
        direction = np.cos(point())
        run = jax.jit(lambda x, to: (jax.jvp(function, (x,), (to,))[1], curved(function, x, to)))
        slope, got = jax.device_get(run(point(), direction))
    gradient, curvature = oracle(name, direction)
    assert_close(slope, np.sum(gradient * direction), 1e-12, f"{name} jvp")
    assert_close(got, (gradient, curvature), 1e-12, f"{name} hessian")


@pytest.mark.parametrize("name", ["delta_rule", "linear_attention"])
def test_matrix_memories_have_gradients_of_gradients(name):
    """The gradient of sum(cos(g)) is -H sin(g)."""
    with jax.enable_x64(True):
        got = np.asarray(jax.jit(functools.partial(second, loss(name, "chunked")))(point()))
    gradient, _ = oracle(name, point())
    assert_close(got, -oracle(name, np.sin(gradient))[1], 1e-12, name)


@pytest.mark.parametrize("name", ["softmax_attention", "deltaformer"])
def test_tiles_refuse_the_gradient_of_a_gradient(name):
    x = jnp.asarray(point(), "float32")
    plain = loss(name, "chunked")
    for function in (plain, jax.jit(plain)) if name == "softmax_attention" else (plain,):
        with pytest.raises(NotImplementedError, match="no reverse mode of its gradient.*implementation='recurrent'"):
            jax.eval_shape(functools.partial(second, function), x)
    if name == "softmax_attention":
        assert jax.eval_shape(functools.partial(second, loss(name, "recurrent")), x).shape == x.shape


@pytest.mark.parametrize("name", OPS)
def test_other_implementations_refuse_forward_mode(name):
    # The kernels for up to 8 tokens have every derivative.
    x = jnp.ones((1, 9, 1, 2))
    with pytest.raises(NotImplementedError, match="pallas form of .* has no forward mode; implementation='chunked' or"):
        jax.eval_shape(lambda x: jax.jvp(loss(name, "pallas"), (x,), (x,)), x)
    # None takes the next one that has it, under vmap too.
    assert jax.eval_shape(jax.jacfwd(loss(name, None)), x).shape == x.shape


def test_recurrent_cells_have_forward_mode():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, w_in, w_state, bias = (jnp.asarray(rng.standard_normal(s)) for s in ((2, 5, 3), (3, 16), (4, 16), (16,)))
        function = lambda x: jnp.sum(jnp.sin(mf.lstm(x, w_in, w_state, bias)[0]))  # noqa: E731
        got, want = jax.jit(lambda x: (jax.jvp(function, (x,), (x,))[1], jnp.sum(jax.grad(function)(x) * x)))(x)
        assert_close(got, want, 1e-12)


HIDING = {
    "jit": lambda f: lambda x: jax.jvp(jax.jit(f), (x,), (x,)),
    "checkpoint": lambda f: lambda x: jax.jvp(jax.checkpoint(f), (x,), (x,)),
    "scan": lambda f: lambda x: jax.jvp(lambda x: jax.lax.map(f, x[None]), (x,), (x,)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
}


@pytest.mark.parametrize(
    ("name", "hiding"),
    [*(("linear_attention", hiding) for hiding in HIDING), ("softmax_attention", "scan"), ("deltaformer", "scan")],
)
def test_hidden_tangents_are_refused_by_name(name, hiding):
    """All ways for one op, and one way for each of the others: `core.dispatch` refuses for all ops."""
    x = jnp.asarray(point(), "float32")
    with pytest.raises(NotImplementedError, match=f"chunked form of {name} .* implementation='recurrent' has it"):
        jax.block_until_ready(HIDING[hiding](loss(name, "chunked"))(x))
    assert jax.tree.leaves(jax.eval_shape(HIDING[hiding](loss(name, "recurrent")), x))


@pytest.mark.parametrize("cell, gates", [("rnn", 1), ("lstm", 4)])
def test_hidden_tangents_of_cells_are_refused(cell, gates):
    x, weights = jnp.ones((1, 3, 2)), (jnp.ones((2, gates * 2)), jnp.ones((2, gates * 2)), jnp.ones(gates * 2))
    function = jax.jit(lambda x: jnp.sum(getattr(mf, cell)(x, *weights)[0]))
    with pytest.raises(NotImplementedError, match="no forward mode inside jit"):
        jax.block_until_ready(jax.jvp(function, (x,), (x,)))
    assert jax.grad(function)(x).shape == x.shape
