"""ARMT's associative memory against float64 NumPy: values, gradients, and gamma."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.ops.associative import AssociativeMemory, associative_read, associative_write, dpfp
from tests.numeric import FORWARD, assert_close, slopes

B, T, K, V = 2, 3, 4, 5
P = 6 * K


write, read, features = (
    jax.jit(associative_write, static_argnames="correction"),
    jax.jit(associative_read),
    jax.jit(dpfp),
)


def oracle_dpfp(x):
    """The features of arXiv 2102.11174, one by one: products with the neighbour j places before, at unit length."""
    r = [max(value, 0.0) for value in x] + [max(-value, 0.0) for value in x]
    phi = np.array([r[i] * r[i - j] for j in (1, 2, 3) for i in range(len(r))])
    return phi / np.linalg.norm(phi) if phi.any() else phi


def oracle(segments, correction):
    """Reads and writes segments [(q, k, v, beta)] of one batch row; returns (reads, A, z)."""
    a, z, reads = np.zeros((V, P)), np.zeros(P), []
    for q, k, v, beta in segments:
        reads.append([a @ f / (z @ f + 1e-5) for f in map(oracle_dpfp, q)])
        new_a, new_z = a.copy(), z.copy()
        for key, value, weight in zip(k, v, beta, strict=True):
            f = oracle_dpfp(key)
            held = a @ f / (z @ f + 1e-5)
            gamma = np.clip(1 - z @ f / (f @ f), 0, 1) if correction else 1.0
            new_a += weight * np.outer(value - held, f)
            new_z += gamma * f
        a, z = new_a, new_z
    return np.array(reads), a.T, z


def draw(segments, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = [(segments, B, T, K), (segments, B, T, K), (segments, B, T, V)]
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    # One key repeats in the next segment, another within its segment: z . phi exceeds 1, which gamma clips.
    k[1, :, 0] = k[0, :, 0]
    k[1, :, 1:] = k[1, :, 1:2]
    k[2, :, 0] = k[1, :, 1]
    q[2, :, 0] = k[1, :, 1]
    return [x.astype(dtype) for x in (q, k, v, rng.uniform(0.2, 1, size=(segments, B, T)))]


def empty(dtype):
    return AssociativeMemory(jnp.zeros((B, P, V), dtype), jnp.zeros((B, P), dtype))


@functools.partial(jax.jit, static_argnames="correction")
def walk(memory, q, k, v, beta, correction):
    reads = []
    for s in range(len(q)):
        reads.append(associative_read(memory, dpfp(q[s])))
        memory = associative_write(memory, dpfp(k[s]), v[s], beta[s], correction=correction)
    return jnp.stack(reads), memory


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_segments_agree_with_the_oracle(dtype, correction):
    arrays = draw(4, dtype)
    with jax.enable_x64(dtype == "float64"):
        reads, memory = walk(empty(dtype), *map(jnp.asarray, arrays), correction)
        assert reads.dtype == memory.matrix.dtype == memory.normaliser.dtype == dtype
        for row in range(B):
            want = oracle([[x[s, row].astype(np.float64) for x in arrays] for s in range(4)], correction)
            got = (reads[:, row], memory.matrix[row], memory.normaliser[row])
            assert_close(got, want, FORWARD[dtype])
    assert not np.any(np.asarray(reads[0])), "the first segment read something"


def test_features_of_bfloat16_and_of_nothing():
    assert features(jnp.ones((2, K), jnp.bfloat16)).dtype == jnp.float32
    phi = features(jnp.zeros((1, 1, K)))
    assert not np.any(np.asarray(phi))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(dpfp(x))))(jnp.zeros(K))
    assert np.all(np.isfinite(slope))
    memory = AssociativeMemory(jnp.ones((1, P, V)), jnp.ones((1, P)))
    after = write(memory, phi, jnp.ones((1, 1, V)), jnp.ones((1, 1)))
    assert_close(after.matrix, memory.matrix, 0.0)
    assert_close(read(memory, phi), np.zeros((1, 1, V)), 0.0)


def test_gamma_counts_a_key_once():
    phi = features(draw(3, np.float32)[1][0, :, :1])
    one, value = jnp.ones((B, 1)), jnp.ones((B, 1, V))
    memory, counted = empty("float32"), empty("float32")
    for _ in range(5):
        memory = write(memory, phi, value, one)
        counted = write(counted, phi, value, one, correction=False)
    assert_close(memory.normaliser, np.asarray(phi)[:, 0], 1e-5)
    assert_close(counted.normaliser, 5 * np.asarray(phi)[:, 0], 1e-5)
    # With gamma the value is read back; without it the normaliser has grown.
    assert_close(read(memory, phi), value, 1e-4)
    assert float(np.asarray(read(counted, phi))[0, 0, 0]) < 0.9


def test_gamma_is_clipped_and_has_no_gradient():
    q, k, v, beta = draw(3, np.float32)
    phi = np.asarray(features(k[0]))
    full = AssociativeMemory(np.ones((B, P, V), np.float32), 2 * np.sum(phi, axis=1))
    after = write(full, phi, v[0], beta[0])
    assert_close(after.normaliser, full.normaliser, 0.0)

    def grown(z, scale):
        return jnp.sum(associative_write(AssociativeMemory(full.matrix, z), scale * phi, v[0], beta[0]).normaliser)

    some = np.float32(0.1) * full.normaliser
    by_memory, by_scale = jax.jit(jax.grad(grown, argnums=(0, 1)))(some, jnp.ones(()))
    assert_close(by_memory, np.ones((B, P)), 1e-6)
    total = np.einsum("bp,btp->bt", some, phi)
    # With gamma fixed, the slope is the features times gamma.
    assert_close(by_scale, np.sum((1 - total)[:, :, None] * phi), 1e-4)


@pytest.mark.parametrize("correction", [True, False])
def test_gradients_by_finite_differences(correction):
    with jax.enable_x64(True):
        q, k, v, beta = draw(3)

        @jax.jit
        @jax.value_and_grad
        def loss(at):
            # gamma has no gradient: with it, only gradients that bypass the keys can be compared with differences.
            keys = k if correction else at["k"]
            reads, memory = walk(empty("float64"), at["q"], keys, at["v"], at["beta"], correction)
            return jnp.sum(jnp.sin(reads)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(memory))

        at = {"q": q, "v": v, "beta": beta} | ({} if correction else {"k": k})
        for seed in range(3):
            assert_close(*slopes(loss, at, seed=seed), 1e-6)
