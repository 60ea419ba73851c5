"""DeltaFormer: identities, kernels, the theorem on exact tracking, repeated keys, its own errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from tests.numeric import FORWARD, GRADIENT, assert_close


def arrays(length=39, dtype="float32", seed=2):
    """Grouped heads, unit keys and w."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal((2, length, *shape))

    given = {"q": normal(4, 8), "k": normal(2, 8), "v": normal(2, 6), "w": normal(2, 8)}
    for name in ("k", "w"):
        given[name] /= np.linalg.norm(given[name], axis=-1, keepdims=True)
    given |= {"alpha": rng.uniform(0.5, 1.5, (2, length, 2)), "beta": rng.uniform(0.0, 1.0, (2, length, 2))}
    return {name: x.astype(dtype) for name, x in given.items()}


def evaluate(function, given):
    """Output, and gradients of all arrays given."""

    def loss(given):
        output = function(**given)
        return jnp.sum(jnp.sin(output)), output

    (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    return output, gradient


def test_linear_kernels_are_the_delta_rule_with_its_erase_vector():
    """The same w, alpha and beta, and decay, in both, to the last digit of float64."""
    with jax.enable_x64(True):
        given = arrays(39, "float64")
        given["q"] = given["q"][:, :, :2]
        given["decay"] = -given["alpha"]
        given["decay"][:, 20] = -np.inf
        linear = {"write_kernel": "linear", "read_kernel": "linear"}
        got = evaluate(lambda **x: mf.deltaformer(**x, chunk_size=16, **linear)[0], given)
        want = evaluate(lambda **x: mf.delta_rule(**x, scale=1.0)[0], given)
        assert_close(got[0], want[0], 1e-14, "output")
        assert_close(got[1], want[1], 1e-13, "gradient")


def test_without_erasure_it_is_softmax_attention():
    given = {name: x for name, x in arrays().items() if name in ("q", "k", "v")}
    zero = np.zeros(given["k"].shape[:3], np.float32)
    got = evaluate(lambda **x: mf.deltaformer(**x, beta=zero, chunk_size=16)[0], given)
    want = evaluate(lambda **x: mf.softmax_attention(**x)[0], given)
    assert_close(got[0], want[0], FORWARD["float32"], "output")
    assert_close(got[1], want[1], GRADIENT["float32"], "gradient")


@pytest.mark.parametrize(
    ("write", "read"),
    [
        ("softmax", "relu"),
        (mf.Kernel("round", decimals=2), mf.Kernel("exp", scale=0.3)),
    ],
    ids=lambda kernel: getattr(kernel, "name", kernel),
)
def test_kernels_against_the_recurrence(write, read):
    """Every kernel, gradients of every array, in float64 (the shared suite has the linear one)."""
    with jax.enable_x64(True):
        given = arrays(23, "float64")
        got, want = (
            evaluate(lambda kind=kind, **x: mf.deltaformer(**x, write_kernel=write, read_kernel=read, **kind)[0], given)
            for kind in ({"implementation": "chunked", "chunk_size": 8}, {"implementation": "recurrent"})
        )
        assert_close(got[0], want[0], FORWARD["float64"], "output")
        assert_close(got[1], want[1], GRADIENT["float64"], "gradient")


def spread_keys(count, width, coherence, steps=400):
    """Unit vectors whose inner products are at most `coherence`: clip the Gram matrix, project to rank, repeat."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((count, width))
    for _ in range(steps):
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        gram = keys @ keys.T
        if np.max(np.abs(gram - np.eye(count))) <= coherence:
            return keys
        gram = np.clip(gram, -0.95 * coherence, 0.95 * coherence)
        np.fill_diagonal(gram, 1.0)
        values, vectors = np.linalg.eigh(gram)
        keys = vectors[:, -width:] * np.sqrt(np.maximum(values[-width:], 0.0))
    raise AssertionError("no such keys found")


def test_round_kernels_track_a_thousand_swaps_exactly():
    """Theorem 1 of the paper: 128 objects in keys of width 64; the linear kernel drifts."""
    objects, swaps, width = 128, 1000, 64
    keys, rng = spread_keys(objects, width, 1 / 8), np.random.default_rng(1)
    pairs = np.stack([rng.choice(objects, 2, replace=False) for _ in range(swaps)])
    held = rng.integers(-1000, 1000, (objects, 4)).astype(np.float64)
    nothing = np.zeros((objects, width))
    # Write every object, then swap pairs and read one of the two, then read every object.
    k = np.concatenate([keys, keys[pairs[:, 0]] - keys[pairs[:, 1]], nothing])
    v = np.concatenate([held, np.zeros((swaps + objects, 4))])
    q = np.concatenate([keys, keys[pairs[:, 0]], keys])
    reads = [held.copy()]
    for a, b in pairs:
        held[[a, b]] = held[[b, a]]
        reads.append(held[[a]])
    want = np.concatenate([*reads, held])
    given = [jnp.asarray(x[None, :, None], "float32") for x in (q, k, v)]
    kernels = lambda name: {"write_kernel": name, "read_kernel": name}  # noqa: E731
    run = jax.jit(lambda *given: [mf.deltaformer(*given, **kernels(name))[0] for name in ("round", "linear")])
    exact, drifting = jax.device_get(run(*given))
    assert np.array_equal(exact[0, :, 0], want)
    assert np.max(np.abs(drifting[0, -objects:, 0] - want[-objects:])) > 100


@functools.cache
def linear_write(implementation):
    """A compiled call whose write kernel is linear."""
    options = {"write_kernel": "linear", "implementation": implementation}
    return jax.jit(lambda q, k, v, beta: mf.deltaformer(q, k, v, beta=beta, **options)[0])


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_repeated_keys(noise):
    """Identical and nearly identical keys, linear write, beta 1 and 2: the inverse stays small."""
    length, rng = 160, np.random.default_rng(3)
    k = np.ones(16) + noise * rng.standard_normal((2, length, 1, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = np.broadcast_to(np.array([1.0, 2.0])[:, None, None], (2, length, 1))
    q, v = rng.standard_normal((2, length, 1, 16)), rng.standard_normal((2, length, 1, 8))
    outputs = []
    for dtype, implementation in (("float32", "chunked"), ("float64", "recurrent")):
        with jax.enable_x64(dtype == "float64"):
            # Rounded to float32 first, so that both see the same keys.
            given = [jnp.asarray(x.astype("float32"), dtype) for x in (q, k, v, beta)]
            outputs.append(np.asarray(linear_write(implementation)(*given)))
    assert_close(outputs[0], outputs[1], FORWARD["float32"], f"noise {noise}")


def test_a_write_forgets_everything():
    """After a decay of -inf a softmax write sees nothing before it: u is alpha v there, as at the start."""
    given = {name: np.asarray(x) for name, x in arrays(20).items() if name in ("q", "k", "v")}
    decay = np.zeros((2, 20, 2), np.float32)
    decay[:, 10] = -np.inf
    halves = {name: x.reshape(4, 10, *x.shape[2:]) for name, x in given.items()}
    output, cache = jax.jit(mf.deltaformer)(**halves)
    want = (np.reshape(output, (2, 20, 4, 6)), np.reshape(cache.u, (2, 20, 2, 6)))
    for kind in ({"implementation": "recurrent"}, {"implementation": "chunked", "chunk_size": 8}):
        call = jax.jit(functools.partial(mf.deltaformer, **kind))
        output, cache = call(**given, decay=decay)
        assert_close((output, cache.u), want, FORWARD["float32"])


def test_errors():
    given = arrays(5)
    sizes = {"batch": 2, "capacity": 8, "groups": 2, "key_width": 8, "value_width": 6}
    for message, changes in (
        (
            "write_kernel must be a Kernel or one of linear, relu, exp, softmax, round, got 'cosine'",
            {"write_kernel": "cosine"},
        ),
        ("read_kernel must be a Kernel or one of", {"read_kernel": None}),
        (
            "sinks must be None where read_kernel is not softmax, got a relu",
            {"sinks": jnp.ones(4), "read_kernel": "relu"},
        ),
        (r"decay must be \[B, T, G\] = \(2, 5, 2\), got \(2, 5, 4\)", {"decay": jnp.ones((2, 5, 4))}),
        (r"beta must be \[B, T, G\] = \(2, 5, 2\), got \(2, 5, 4\)", {"beta": jnp.ones((2, 5, 4))}),
        (r"alpha must be \[B, T, G\] = \(2, 5, 2\), got \(5, 2\)", {"alpha": jnp.ones((5, 2))}),
        (r"w must be \[B, T, G, K\] = \(2, 5, 2, 8\), got \(2, 5, 4, 8\)", {"w": given["q"]}),
        ("initial_state must be a DeltaCache", {"initial_state": mf.init_cache("softmax_attention", **sizes)}),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda changes=changes: mf.deltaformer(**{**given, **changes}))
