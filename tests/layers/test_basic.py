"""Parts of layers: norms, embedding, positions, short convolution, feedforward layers, gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.segments import find_segments
from memformer.layers.basic import Dtypes, Embedding, LayerNorm, RMSNorm, constrain, dropout
from memformer.layers.convolution import ShortConvolution
from memformer.layers.feedforward import FEEDFORWARDS, MixtureOfExperts, feedforward_keys
from memformer.layers.gates import BoundedDecay, FixedDecay, ForgetDecay, LogSigmoidDecay, SigmoidGate, StepDecay
from memformer.layers.memory import build_memory
from memformer.layers.positions import LearnedPositions, count_positions, next_position, rotate, sinusoid
from tests.modules import compiled, random_module
from tests.numeric import FORWARD, assert_close

F32, BF16 = Dtypes(), Dtypes("bfloat16")


def rngs():
    return nnx.Rngs(0)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=["float32", "bfloat16"])
def test_norms_compute_in_float32(dtypes):
    x = jnp.asarray(normal(2, 3, 8) * 3 + 100, dtypes.compute)
    wide = np.asarray(x, np.float64)
    rms = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True))
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
    # The result is rounded to bfloat16; the statistics are not.
    tolerance = 1e-5 if dtypes is F32 else 4e-3
    for norm, want in [(RMSNorm, rms), (LayerNorm, layer)]:
        got = norm(8, dtypes=dtypes, rngs=rngs())(x)
        assert got.dtype == dtypes.compute
        assert_close(got.astype(jnp.float32), want, tolerance)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e20, 1e27])
def test_norms_of_large_and_small_vectors(size):
    """float32 cannot hold the squares of entries above 1e19."""
    x = normal(1, 2, 8) * np.float32(size)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    for norm, part, statistics in [(RMSNorm, wide, wide), (LayerNorm, centred, centred)]:
        got = norm(8, dtypes=F32, rngs=rngs())(jnp.asarray(x))
        assert_close(got, part / np.sqrt(np.mean(statistics**2, -1, keepdims=True) + 1e-6), 1e-5)


def test_tied_logits_have_unit_variance_and_are_float32():
    @jax.jit
    def run(ids):
        embedding = Embedding(50, 64, dtypes=BF16, rngs=rngs())
        x = embedding(ids)
        return x, embedding.attend(x)

    x, logits = jax.device_get(run(np.arange(50)[None]))
    assert x.dtype == jnp.bfloat16 and 0.9 < np.std(x.astype(np.float32)) < 1.1
    assert logits.dtype == jnp.float32 and logits.shape == (1, 50, 50)
    assert np.array_equal(np.argmax(logits[0], axis=-1), np.arange(50))


def test_constrain_does_nothing_outside_a_mesh():
    x = jnp.ones((2, 3))
    assert constrain(x, "activation_batch", None) is x


def test_constrain_shards_what_divides():
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("activation_batch", "data"), ("activation_time", "context"))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        place = jax.jit(lambda x: constrain(x, "activation_batch", "activation_time"))
        assert place(jnp.ones((2, 8))).sharding.spec == jax.P("data", "context")
        # A single token cannot be divided by four.
        assert place(jnp.ones((2, 1))).sharding.spec == jax.P("data")


def test_dropout_keeps_the_mean():
    x = dropout(jnp.ones(10000), 0.25, jax.random.key(0))
    assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
    # Four standard deviations of the mean.
    assert abs(float(jnp.mean(x)) - 1) < 4 * np.sqrt(0.25 / 0.75 / 10000)


SEGMENTS = np.array([[0, 4, 4, 0, 4, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])


def test_positions_count_within_segments():
    @jax.jit
    def run(ids, start):
        segments = find_segments(ids, {})
        positions, plain = count_positions(segments, ids.shape, start), count_positions(None, (3, 2), start)
        return positions, next_position(positions, segments), plain, next_position(plain, None)

    positions, after, plain, after_plain = jax.device_get(run(SEGMENTS, np.array([10, 20, 30], np.int32)))
    assert positions[0][SEGMENTS[0] != 0].tolist() == [10, 11, 12, 0, 1]
    assert positions[1][SEGMENTS[1] != 0].tolist() == [20, 21]
    assert after.tolist() == [2, 22, 30]
    assert plain.tolist() == [[10, 11], [20, 21], [30, 31]]
    assert after_plain.tolist() == [12, 22, 32]


def test_rotary_products_depend_on_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=2)
    at = jax.jit(lambda x, place: rotate(x, place))
    product = lambda i, j: np.sum(at(q, np.full((1, 1), i)) * np.asarray(at(k, np.full((1, 1), j))))  # noqa: E731
    assert_close(product(107, 104), product(3, 0), 1e-5)
    assert abs(float(product(3, 0) - product(4, 0))) > 1e-3
    with pytest.raises(ValueError, match="rotary positions require an even key width, got 3"):
        rotate(jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1), jnp.int32))


def test_sinusoids_are_unit_pairs():
    table = sinusoid(jnp.arange(50)[None], 8)[0]
    assert_close(table[:, :4] ** 2 + table[:, 4:] ** 2, jnp.ones((50, 4)), 1e-6)
    assert_close(table[0], jnp.array([0.0] * 4 + [1.0] * 4), 0.0)


def test_learned_positions_outside_the_table_are_nan():
    layer = LearnedPositions(4, 3, dtypes=F32, rngs=rngs())
    y = layer(jnp.zeros((1, 2, 4)), jnp.array([[2, 3]]))
    assert np.all(np.isfinite(y[0, 0])) and np.all(np.isnan(y[0, 1]))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_convolution_is_the_sum_over_the_last_inputs(width):
    layer = random_module(lambda: ShortConvolution(3, width, dtypes=F32, rngs=rngs()))
    x = np.asarray(normal(2, 6, 3), np.float64)
    weights = np.asarray(layer.weights[...], np.float64)
    want = np.zeros_like(x)
    for t in range(6):
        for j in range(min(width, t + 1)):
            want[:, t] += weights[j] * x[:, t - j]
    y, state = compiled(layer)(x.astype(np.float32))
    assert_close(y, want / (1 + np.exp(-want)), FORWARD["float32"])
    assert_close(state, np.concatenate([np.zeros((2, width, 3)), x], axis=1)[:, 7:], 1e-6) if width > 1 else None
    assert state.shape == (2, width - 1, 3)


def test_short_convolution_backward_through_packing():
    layer = random_module(lambda: ShortConvolution(2, 3, dtypes=F32, rngs=rngs()))
    ids = np.array([[0, 1, 0, 1, 2, 2]], np.int32)
    weights = normal(1, 6, 2, seed=3) * (ids != 0)[:, :, None].astype("float32")
    packed = lambda x: jnp.sum(layer(x, segments=find_segments(ids, {}))[0] * weights)  # noqa: E731
    apart = lambda x: sum(  # noqa: E731
        jnp.sum(layer(x[:, at])[0] * weights[:, at]) for at in (np.array([1, 3]), np.array([4, 5]))
    )
    x = normal(1, 6, 2)
    got, want = jax.jit(lambda x: (jax.grad(packed)(x), jax.grad(apart)(x)))(x)
    assert_close(got, want, FORWARD["float32"])


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_feedforward_layers_keep_shape_and_dtype(name):
    make = lambda x: FEEDFORWARDS[name](8, hidden=6, dtypes=BF16, rngs=rngs())(x)  # noqa: E731
    y, aux = jax.eval_shape(make, jax.ShapeDtypeStruct((2, 3, 8), jnp.bfloat16))
    assert y.shape == (2, 3, 8) and y.dtype == jnp.bfloat16
    assert list(aux) == (["moe_balance"] if name == "moe" else [])
    assert "hidden" in feedforward_keys(name)
    with pytest.raises(ValueError, match="feedforward option hidden must be a positive integer or None, got 0"):
        FEEDFORWARDS[name](8, hidden=0, dtypes=F32, rngs=rngs())


def test_the_output_is_the_weighted_sum_of_the_selected_experts():
    layer = random_module(lambda: MixtureOfExperts(4, experts=3, active=2, hidden=5, dtypes=F32, rngs=rngs()))
    x = normal(1, 6, 4)
    y, _ = compiled(layer)(x)
    x, router, gate, up, down = (
        np.asarray(a, np.float64)
        for a in (x[0], layer.router.kernel[...], layer.gate[...], layer.up[...], layer.down[...])
    )
    probability = np.exp(x @ router) / np.exp(x @ router).sum(-1, keepdims=True)
    for t in range(6):
        best = np.argsort(-probability[t])[:2]
        want = 0
        for e in best:
            a = x[t] @ gate[e]
            hidden = a / (1 + np.exp(-a)) * (x[t] @ up[e])
            want = want + probability[t, e] / probability[t, best].sum() * (hidden @ down[e])
        assert_close(y[0, t], want, FORWARD["float32"])
    with pytest.raises(ValueError, match=r"active must be in \[1, experts\] = \[1, 3\], got 4"):
        MixtureOfExperts(4, experts=3, active=4, dtypes=F32, rngs=rngs())


def test_the_balance_loss_does_not_count_padding():
    sizes = {"experts": 3, "active": 1, "hidden": 5, "balance_weight": 1.0}
    layer = random_module(lambda: MixtureOfExperts(4, **sizes, dtypes=F32, rngs=rngs()))
    x = normal(1, 6, 4)
    call = nnx.jit(lambda layer, *given: layer(*given)[1]["moe_balance"])
    assert_close(call(layer, x, np.arange(6)[None] < 4), call(layer, x[:, :4]), FORWARD["float32"])
    layer.router.kernel.set_value(np.zeros_like(layer.router.kernel[...]))
    # With equal probabilities E sum_e f_e / E = 1, whichever experts are selected.
    assert_close(call(layer, x[:, :4]), np.float32(1.0), 1e-6)


# Class, its rank, and the shape of its log decay.
DECAYS = {
    "head": (StepDecay, None, (1, 5, 2)),
    "channel": (StepDecay, 4, (1, 5, 2, 3)),
    "log_sigmoid": (LogSigmoidDecay, None, (1, 5, 2, 3)),
    "forget": (ForgetDecay, None, (1, 5, 2)),
    "bounded": (BoundedDecay, None, (1, 5, 2, 3)),
    "fixed": (FixedDecay, None, (1, 5, 2)),
}


@pytest.mark.parametrize("name", DECAYS)
def test_decays_are_negative_logs_in_float32(name):
    kind, rank, shape = DECAYS[name]
    call = jax.jit(lambda x: kind(8, 2, 3, rank, dtypes=BF16, rngs=rngs())(x)[0])
    decay = call(normal(1, 5, 8).astype(jnp.bfloat16))
    assert decay.shape == shape and decay.dtype == jnp.float32
    assert np.all(decay < 0) and np.all(np.isfinite(decay))


def test_a_forget_gate_starts_as_slowly_as_asked():
    options = {"decay_time": (5, 50)}

    @jax.jit
    def both(x):
        decay = ForgetDecay(8, 3, 3, None, time=(0.01, 1e4), dtypes=F32, rngs=rngs())
        layer = build_memory("gated_deltaformer", 8, heads=2, options=options, rngs=rngs())
        return decay(x)[0][0, 0], layer.decay(x)[0][0, 0]

    one, other = both(np.zeros((1, 1, 8), np.float32))
    assert_close(one, -1 / np.array([0.01, 10, 1e4]), 1e-3)
    assert_close(other, -1 / np.array([5.0, 50.0]), 1e-5)


def test_rwkv7_starts_with_slow_and_fast_channels():
    """Biases of the reference's first layer (fla.layers.rwkv7), two heads of three channels."""
    make = lambda x: BoundedDecay(8, 2, 3, None, dtypes=F32, rngs=rngs())(x)[0]  # noqa: E731
    decay = jax.jit(make)(np.zeros((1, 1, 8), np.float32))
    bias = np.array([-8, -4.3, -0.6, -4.4, -0.7, 3.0])
    assert_close(decay[0, 0].ravel(), -np.exp(-0.5) / (1 + np.exp(-bias)), 1e-5)


def test_fixed_decay_is_retnets():
    decay, _ = FixedDecay(8, 2, 3, None, dtypes=BF16, rngs=rngs())(jnp.ones((1, 1, 8)))
    assert_close(jnp.exp(decay[0, 0]), jnp.array([1 - 2.0**-5, 1 - 2.0**-6]), 1e-6)


def test_sigmoid_gates_stay_below_their_limit():
    make = lambda x: SigmoidGate(8, 2, 2.0, dtypes=BF16, rngs=rngs())(x)  # noqa: E731
    beta = jax.jit(make)((100 * normal(1, 50, 8)).astype(jnp.bfloat16))
    assert beta.dtype == jnp.float32 and float(beta.min()) >= 0 and 1.5 < float(beta.max()) <= 2


@pytest.mark.parametrize("name", ["int32", "flot32", None])
def test_a_dtype_that_is_not_floating_is_refused(name):
    if name is None:
        assert Dtypes(jnp.float16).compute == jnp.float16
        return
    with pytest.raises(ValueError, match=f"compute dtype must be a floating dtype such as 'float32', got '{name}'"):
        Dtypes(name)
