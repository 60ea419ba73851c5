"""Options of layers that pretrained models need, each against its equation in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers.basic import Dtypes, Embedding, RMSNorm
from memformer.layers.feedforward import MixtureOfExperts
from memformer.layers.memory import build_memory
from memformer.layers.positions import rotate
from memformer.models import LanguageModelConfig, MemoryLM
from memformer.models.language_model import Block
from tests.modules import compiled, random_module
from tests.numeric import FORWARD, assert_close

WIDTH, HEADS, TIME = 8, 2, 5
F32 = Dtypes()
X = np.random.default_rng(0).normal(size=(1, TIME, WIDTH))


def wide(parameter):
    return np.asarray(parameter[...], np.float64)


def build(name, **options):
    return random_module(lambda: build_memory(name, WIDTH, heads=HEADS, options=options, rngs=nnx.Rngs(0)))


def run(layer, x=X):
    return compiled(layer)(x.astype("float32"))[0]


def affine(layer, x):
    bias = 0 if layer.bias is None else wide(layer.bias)
    return x @ wide(layer.kernel) + bias


def rms(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotated(x, rates):
    """Rotates the first 2 n channels of x [B, T, H, K] by the n rates times the position."""
    n = len(rates)
    angle = (np.arange(x.shape[1])[:, None] * np.asarray(rates))[None, :, None]
    a, b = x[..., :n], x[..., n : 2 * n]
    parts = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[..., 2 * n :]
    return np.concatenate(parts, -1)


def latent_parts(latent, x):
    down = affine(latent.down, x)
    c, s = down[..., : latent.rank], down[..., latent.rank :]
    heads = affine(latent.up, rms(c, wide(latent.norm.scale), 1e-6)).reshape(*x.shape[:2], HEADS, -1)
    keys = [np.concatenate([heads[:, :, h, : latent.own], s], -1) for h in range(HEADS)]
    values = [heads[:, :, h, latent.own :] for h in range(HEADS)]
    return {"key": np.concatenate(keys, -1), "value": np.concatenate(values, -1)}


def attention(layer, x, rates=None, epsilon=1e-6):
    """Softmax attention of one row, from the parameters of a layer."""
    parts = {name: affine(projection, x) for name, projection in layer.projections.items()}
    if layer.latent is not None:
        parts |= latent_parts(layer.latent, x)
    if layer.qk_norm == "width":
        for name, norm in layer.qk_norms.items():
            parts[name] = rms(parts[name], wide(norm.scale), epsilon)
    q, k, v = (parts[name] for name in ("query", "key", "value"))
    q, k, v = (part.reshape(*x.shape[:2], -1, part.shape[-1] // HEADS) for part in (q, k, v))
    if layer.qk_norm == "head":
        q, k = (rms(part, wide(layer.qk_norms[name].scale), epsilon) for part, name in ((q, "query"), (k, "key")))
    if rates is not None:
        q, k = rotated(q, rates), rotated(k, rates)
    scores = np.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("bhts,bshv->bthv", weights, v).reshape(*x.shape[:2], -1)
    if layer.gate is not None:
        gate = x if layer.gate_down is None else affine(layer.gate_down, x)
        o = o * sigmoid(affine(layer.gate, gate))
    return affine(layer.out, o)


LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 20,
}  # fmt: skip


def llama3_rates(width, theta):
    """The rates as the release of Llama 3.1 computes them."""
    rates = []
    for rate in theta ** (-np.arange(0, width, 2) / width):
        length = 2 * math.pi / rate
        if length < 20 / 3.0:
            rates.append(rate)
        elif length > 20 / 1.0:
            rates.append(rate / 4)
        else:
            smooth = (20 / length - 1.0) / (3.0 - 1.0)
            rates.append((1 - smooth) * rate / 4 + smooth * rate)
    return rates


GATE = {"output_gate": "sigmoid", "output_gate_rank": 3}
# Options of softmax attention, rates of its rotary positions, epsilon of its norms. Each option is in one row at least,
# with others that its equation does not depend on.
ATTENTION = {
    "biases, norms per head": (
        {"qkv_bias": True, "out_bias": True, "qk_norm": "head", "norm_epsilon": 0.5, "rotary": True, "rope_theta": 50.0}
        | {**GATE, "output_gate_bias": True},
        50.0 ** (-np.arange(0, 4, 2) / 4),
        0.5,
    ),
    "norms over the width": ({"qk_norm": "width", "rotary": True, "partial_rotary_factor": 0.5, **GATE}, [1.0], 1e-6),
    "latent": (
        {"latent_rank": 3, "rotary": True, "rope_scaling": LLAMA3, "rope_theta": 9.0}, llama3_rates(4, 9.0), 1e-6,
    ),
    "latent with a shared part": ({"latent_rank": 3, "shared_key_width": 1, "rotary": False}, None, 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_options_of_attention(name):
    options, rates, epsilon = ATTENTION[name]
    layer = build("softmax_attention", **options)
    assert_close(run(layer), attention(layer, X, rates, epsilon), FORWARD["float32"])


def test_scaled_rates_of_every_kind():
    # Rates that are kept, divided, and in between.
    rates = llama3_rates(16, 1e3)
    x = np.random.default_rng(2).normal(size=(1, 30, 1, 16))
    got = jax.jit(lambda x, places: rotate(x, places, 1e3, scaling=LLAMA3))(x.astype("float32"), np.arange(30)[None])
    assert_close(got, rotated(x, rates), FORWARD["float32"])


def test_sizes_of_one_memory_of_a_pattern():
    sizes = {"heads": 3, "key_width": 5, "value_width": 7, "key_heads": 1}
    config = LanguageModelConfig(
        memory="softmax_attention,gla", memory_options={"gla": sizes}, width=8, heads=2, depth=2, feedforward=None
    )
    make = lambda name: Block(config, name, rngs=nnx.Rngs(0)).memory.init_state(1, 4)["memory"]  # noqa: E731
    shapes = [jax.eval_shape(lambda name=name: make(name)) for name in config.pattern]
    assert shapes[0].k.shape == (1, 4, 2, 4)
    assert shapes[1].shape == (1, 3, 5, 7)


def delta_read(layer, x, epsilon):
    """One token of the delta rule from an empty memory: scale beta (k . q) v."""
    q, k, v = (affine(layer.projections[name], x).reshape(HEADS, -1) for name in ("query", "key", "value"))
    q, k = (part / np.sqrt(np.sum(part**2, -1, keepdims=True) + epsilon) for part in (q, k))
    beta = sigmoid(affine(layer.beta.weights, x)).reshape(HEADS, 1)
    o = np.sum(q * k, -1, keepdims=True) * beta * v * k.shape[-1] ** -0.5
    return affine(layer.out, o.reshape(x.shape))


@pytest.mark.parametrize("options", [{"l2norm_epsilon": 0.3}, {"beta_bias": False}])
def test_options_of_the_delta_rule(options):
    layer = build("delta_rule", conv_width=0, output_norm=False, **options)
    assert (layer.beta.weights.bias is None) == ("beta_bias" in options)
    epsilon = options.get("l2norm_epsilon", 1e-6) ** 2
    assert_close(run(layer, X[:, :1]), delta_read(layer, X[:, :1], epsilon), FORWARD["float32"])


def group_norm(o, scale, groups, epsilon):
    return rms(o.reshape(*o.shape[:-1], groups, -1), 1.0, epsilon).reshape(o.shape) * scale


def linear_read(layer, x, groups, scale, epsilon=1e-6):
    """One token of linear attention, with a convolution of width 1, from an empty memory."""
    parts = {}
    for name, projection in layer.projections.items():
        parts[name] = affine(projection, x)
        if layer.convolutions is not None:
            convolution = layer.convolutions[name]
            y = parts[name] * wide(convolution.weights)[0] + wide(convolution.bias)
            parts[name] = y * sigmoid(y)
    q, k = (np.repeat(parts[name].reshape(groups, -1), HEADS // groups, 0) for name in ("query", "key"))
    o = (np.sum(q * k, -1, keepdims=True) * scale * parts["value"].reshape(HEADS, -1)).reshape(x.shape)
    gate = sigmoid(affine(layer.gate, x)) if layer.gate is not None else 1.0
    o = o if layer.norm_before_gate else o * gate
    if layer.norm is not None:
        o = group_norm(o, wide(layer.norm.scale), groups, epsilon)
    return affine(layer.out, o * gate if layer.norm_before_gate else o)


# Options of linear attention, number of key heads, factor on the read.
LINEAR = {
    "scale, conv_bias": ({"scale": 1.5, "conv_width": 1, "conv_bias": True}, 2, 1.5),
    "output_norm of each group": ({"output_norm": "group", "key_heads": 2, "output_gate": "sigmoid"}, 2, 0.5),
    "output_norm of the width, norm_before_gate": (
        {"output_norm": "group", "key_heads": 1, "output_gate": "sigmoid", "norm_before_gate": False}, 1, 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_options_of_linear_attention(name):
    options, groups, scale = LINEAR[name]
    layer = build("linear_attention", feature_map="identity", normalize=False, **options)
    assert_close(run(layer, X[:, :1]), linear_read(layer, X[:, :1], groups, scale), FORWARD["float32"])


def test_gates_of_hgrn2_have_a_lower_bound():
    layer = build("hgrn2", lower_bound=0.9)
    x = X[:, :3]
    forget = (0.9 + 0.1 * sigmoid(affine(layer.projections["key"], x))).reshape(3, HEADS, -1, 1)
    value = affine(layer.projections["value"], x).reshape(3, HEADS, 1, -1)
    memory = np.zeros((HEADS, WIDTH // HEADS, WIDTH // HEADS))
    for f, v in zip(forget, value, strict=True):
        memory = f * memory + (1 - f) * v
    assert_close(compiled(layer)(x.astype("float32"))[1]["memory"][0], memory, FORWARD["float32"])


def test_embeddings_without_their_scale():
    embedding = Embedding(5, 4, scale=False, dtypes=F32, rngs=nnx.Rngs(0))
    assert np.array_equal(embedding(jnp.array([[3]]))[0, 0], embedding.table[3])


def test_epsilon_of_a_norm():
    norm = RMSNorm(WIDTH, epsilon=0.7, dtypes=F32, rngs=nnx.Rngs(0))
    assert_close(compiled(norm)(X.astype("float32")), rms(X, 1.0, 0.7), FORWARD["float32"])


def test_zero_centered_norms():
    norm = RMSNorm(WIDTH, zero_centered=True, dtypes=F32, rngs=nnx.Rngs(0))
    assert not np.any(norm.scale[...])
    scale = np.linspace(-0.5, 0.5, WIDTH)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    assert_close(compiled(norm)(X.astype("float32")), rms(X, 1 + scale, 1e-6), FORWARD["float32"])
    config = LanguageModelConfig(width=WIDTH, heads=HEADS, zero_centered_norm=True)
    assert nnx.eval_shape(lambda: Block(config, "deltaformer", rngs=nnx.Rngs(0))).norm.zero_centered
    assert build("softmax_attention", qk_norm="head", zero_centered_norm=True).qk_norms["key"].zero_centered
    with pytest.raises(ValueError, match="zero_centered_norm requires norm 'rms', got 'layer'"):
        LanguageModelConfig(norm="layer", zero_centered_norm=True)


def test_first_layers_that_are_dense():
    same = {"memory": "softmax_attention", "width": WIDTH, "heads": HEADS, "depth": 3, "feedforward": "moe"}
    config = LanguageModelConfig(**same, dense_layers=1, dense_hidden=5)
    model = nnx.eval_shape(lambda: MemoryLM(config, vocab_size=7, rngs=nnx.Rngs(0)))
    assert [type(block.feedforward).__name__ for block in model.blocks] == ["SwiGLU"] + ["MixtureOfExperts"] * 2
    assert model.blocks[0].feedforward.up.kernel.shape == (WIDTH, 5)
    output = nnx.eval_shape(lambda model: model(jnp.array([[1, 2, 3]])), model)
    assert output.logits.shape == (1, 3, 7) and list(output.aux) == ["moe_balance"]
    with pytest.raises(ValueError, match="dense_layers must be 0 where layers are scanned, got 1"):
        LanguageModelConfig(**same, dense_layers=1, scan_layers=True)


def test_norms_of_the_output_of_sublayers():
    config = LanguageModelConfig(
        memory="softmax_attention", width=WIDTH, heads=HEADS, norm_place="output", feedforward="mlp", norm_epsilon=1e-3
    )
    block = random_module(lambda: Block(config, "softmax_attention", norm_place="output", rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(block)

    @jax.jit
    def both(parameters, x):
        block = nnx.merge(graph, parameters)
        h = x + block.norm(block.memory(x)[0])
        want = h + block.feedforward_norm(block.feedforward(h)[0])
        return block(x, None, None, segment_ids=None, positions=None)[0], want

    assert_close(*both(parameters, X.astype("float32")), 1e-6)


EXPERTS = {
    "shared expert": {"shared_hidden": 6},
    "probabilities as they are": {"norm_topk_prob": False, "shared_hidden": 6, "shared_gate": True},
    "sigmoid router": {"router": "sigmoid"},
    "routed_scaling_factor": {"router": "sigmoid", "routed_scaling_factor": 2.5, "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_chosen_experts_only(name):
    options = EXPERTS[name]
    build = functools.partial(MixtureOfExperts, WIDTH, experts=5, active=2, hidden=3, dtypes=F32, **options)
    # the same parameters
    dense, ragged = (
        random_module(lambda kind=kind: build(dispatch=kind, rngs=nnx.Rngs(0))) for kind in ("dense", "ragged")
    )
    correction = np.zeros(5)
    scores = X @ wide(dense.router.kernel)
    if "router" in options:
        # Large enough to change the choice.
        correction = np.array([0.0, 0.6, -0.6, 0.3, 0.0])
        dense.correction.set_value(correction.astype("float32"))
        ragged.correction.set_value(correction.astype("float32"))
        probability = sigmoid(scores)
    else:
        probability = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want, got = jax.jit(lambda x: (dense(x)[0], ragged(x)[0]))(X.astype("float32"))
    assert_close(got, want, FORWARD["float32"])
    oracle = np.zeros_like(X)
    for t in range(TIME):
        best = np.argsort(-probability[0, t] - correction)[:2]
        total = probability[0, t, best].sum() if options.get("norm_topk_prob", True) else 1.0
        total /= options.get("routed_scaling_factor", 1.0)
        for e in best:
            a = X[0, t] @ wide(dense.gate)[e]
            oracle[0, t] += (
                probability[0, t, e] / total * (a * sigmoid(a) * (X[0, t] @ wide(dense.up)[e])) @ wide(dense.down)[e]
            )
    if dense.shared is not None:
        a = affine(dense.shared.gate, X)
        shared = affine(dense.shared.down, a * sigmoid(a) * affine(dense.shared.up, X))
        oracle += shared * (1 if dense.shared_gate is None else sigmoid(affine(dense.shared_gate, X)))
    assert_close(want, oracle, FORWARD["float32"])


MISTAKES = {
    "qk_norm": ({"qk_norm": "row"}, "qk_norm must be one of None, 'head', 'width', got 'row'"),
    "rope_theta": ({"rope_theta": 0}, "rope_theta must be a finite number above 0, got 0"),
    "partial": ({"partial_rotary_factor": 2.0}, r"partial_rotary_factor must be in \(0, 1\], got 2.0"),
    "odd": ({"partial_rotary_factor": 0.25}, "even key_width, got 4, of which partial_rotary_factor = 0.25 leaves 1"),
    "rope_type": ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type must be one of 'llama3', got 'ntk'"),
    "field": ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling's factor must be a finite number above 0"),
    "output_norm": ({"output_norm": "all"}, "output_norm must be one of False, True, 'group', got 'all'"),
    "rank": ({"output_gate": "silu", "output_gate_rank": 0}, "output_gate_rank must be a positive integer or None"),
    "latent": ({"latent_rank": 2, "shared_key_width": 4}, "shared_key_width must be below key_width = 4, got 4"),
    "epsilon": ({"norm_epsilon": 0}, "norm_epsilon must be a finite number above 0, got 0"),
}


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        ("softmax_attention", {"sinks": "no"}, "sinks must be True or False, got 'no'"),
        ("delta_rule", {"beta_bias": 0}, "beta_bias must be True or False, got 0"),
        ("ssd", {"qkv_bias": "yes"}, "qkv_bias must be True or False, got 'yes'"),
        ("hgrn2", {"rotary": True}, "rotary must be False: the projection to k holds the logits"),
        ("hgrn2", {"unit_keys": True}, "unit_keys must be False: the projection to k holds the logits"),
        ("mamba3", {"rotary": True}, "rotary must be False: keys and queries turn by angles"),
    ],
)
def test_flags_and_positions_that_a_memory_cannot_take_are_refused(memory, options, message):
    with pytest.raises(ValueError, match=message):
        build(memory, **options)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        build("softmax_attention", **options)


def test_places_of_norms_are_checked():
    with pytest.raises(ValueError, match="norm_place must be one name or 2, one per memory, got 1"):
        LanguageModelConfig(memory="gla,delta_rule", depth=2, norm_place=("pre",))
    with pytest.raises(ValueError, match="norm_place must be one of 'pre', 'output', got 'post'"):
        LanguageModelConfig(norm_place="post")
