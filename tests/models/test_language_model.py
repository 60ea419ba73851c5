"""MemoryLM: patterns, scan, remat, dtypes, packing, decoding, features, presets, user errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from memformer.models import (
    MODELS,
    PRESETS,
    LanguageModelConfig,
    MemoryLM,
    build_config,
    build_model,
    default_options,
    from_preset,
    model_keys,
)
from tests.modules import draws_random_bits, random_module
from tests.numeric import FORWARD, GRADIENT, assert_close, relative_rms

VOCAB, TIME = 7, 7
HYBRID = {
    "memory": ("delta_rule", "softmax_attention"),
    "memory_options": {"delta_rule": {"conv_width": 2}},
    "width": 8,
    "heads": 2,
    "depth": 4,
    "feedforward_options": {"hidden": 8},
}
IDS = np.random.default_rng(5).integers(0, VOCAB, (2, TIME), np.int32)


def build(vocab_size=VOCAB, seed=0, num_classes=None, features=0, **config):
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "features": features}
    return build_model({**HYBRID, "scan_layers": True, **config}, rngs=nnx.Rngs(seed), **sizes)


def functional(model):
    """The parameters of a model, and its jitted call on them."""
    graph, parameters = nnx.split(model)

    @jax.jit
    def call(parameters, *args, **kwargs):
        return nnx.merge(graph, parameters)(*args, **kwargs)

    return parameters, call


def random(**config):
    """A model with random parameters."""
    return random_module(lambda: build(**config))


def loss_and_gradients(model, ids=IDS):
    graph, parameters = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def run(parameters):
        output = nnx.merge(graph, parameters)(ids)
        return jnp.mean(jax.nn.log_softmax(output.logits)[:, :, 0]) + sum(output.aux.values())

    return run(parameters)


def by_layer(state):
    """Parameters of scanned blocks as one list, layer by layer."""
    flat = nnx.to_pure_dict(state)["blocks"]
    return [jax.tree.map(lambda leaf, i=i: leaf[i // 2], flat[i % 2]) for i in range(4)]


def test_scanned_equals_unrolled():
    pattern = {"memory": ("linear_attention", "softmax_attention"), "memory_options": {}, "feedforward": None}
    scanned, unrolled = random(**pattern), random(**pattern, scan_layers=False)
    # the same parameters
    state, flat = nnx.state(unrolled), nnx.to_pure_dict(nnx.state(scanned))
    nnx.replace_by_pure_dict(state, flat | {"blocks": dict(enumerate(by_layer(nnx.state(scanned))))})
    nnx.update(unrolled, state)
    got, want = (call(parameters, IDS).logits for parameters, call in map(functional, (scanned, unrolled)))
    assert_close(got, want, FORWARD["float32"])


SMALL = {"memory": "linear_attention", "memory_options": {}, "depth": 2}


@pytest.mark.parametrize("remat", ["full", "dots", "projections"])
def test_remat_changes_memory_and_not_results(remat):
    """jax.checkpoint recomputes the same operations under any policy: the results are those of one."""
    model = random(**SMALL, remat=remat)
    assert "remat" in str(jax.make_jaxpr(model)(IDS))
    if remat != "projections":
        return
    loss, gradients = loss_and_gradients(random(**SMALL))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(leaf), jax.tree_util.keystr(path)
    other_loss, other_gradients = loss_and_gradients(model)
    assert_close(other_loss, loss, FORWARD["float32"])
    assert_close(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), GRADIENT["float32"])


def two_layers(**config):
    """A model of depth 2, its parameters and its jitted call; without options always the same."""
    if not config:
        return hybrid()
    model = random(depth=2, **config)
    return model, functional(model)


@functools.cache
def hybrid():
    model = random(depth=2)
    return model, functional(model)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scan_layers": False, "memory": ("retnet", "linear_attention"), "memory_options": {}, "feedforward": None},
        {"positions": "learned", "max_length": TIME, "norm": "layer", "feedforward": "mlp", "tie_embeddings": True},
        {"positions": "sinusoidal", "feedforward": "moe", "feedforward_options": {"experts": 3, "hidden": 8}},
    ],
    ids=["scanned", "unrolled", "learned, tied", "sinusoidal, experts"],
)
def test_decoding_and_packing_agree_with_the_whole_sequence(config):
    model, (parameters, call) = two_layers(**config)
    segments = np.array([[0, 1, 1, 1, 2, 2, 2], [4, 4, 0, 4, 3, 3, 3]], np.int32)
    ones = np.ones_like(segments)
    want = call(parameters, IDS, segment_ids=ones)
    assert want.logits.shape == (2, TIME, VOCAB) and want.logits.dtype == jnp.float32
    state, got = model.init_state(2, TIME), []
    for t in range(TIME):
        output = call(parameters, IDS[:, t : t + 1], state=state)
        state = output.state
        got.append(output.logits)
    assert_close(np.concatenate(got, axis=1), want.logits, FORWARD["float32"])
    packed = np.asarray(call(parameters, IDS, segment_ids=segments).logits)
    for pair in ([(0, 1), (1, 4)], [(0, 2), (1, 3)]):
        # The same program: each segment alone, with padding behind it.
        places = [(row, np.flatnonzero(segments[row] == segment)) for row, segment in pair]
        ids = np.stack([np.pad(IDS[row, place], (0, TIME - 3)) for row, place in places])
        alone = np.asarray(call(parameters, ids, segment_ids=ones * (np.arange(TIME) < 3)).logits)[:, :3]
        assert_close(np.stack([packed[row, place] for row, place in places]), alone, FORWARD["float32"])


def test_bfloat16_policy():
    _, (parameters, call) = two_layers()
    ones = np.ones_like(IDS)
    want = call(parameters, IDS, segment_ids=ones).logits
    parameters, call = functional(random(depth=2, dtype="bfloat16"))
    logits = call(parameters, IDS, segment_ids=ones).logits
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    assert relative_rms(logits, want) < 5e-2
    stored = nnx.eval_shape(lambda: build(**SMALL, param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype("bfloat16")}


def test_features_in_and_classes_out():
    model = random(**SMALL, vocab_size=0, features=3, num_classes=2)
    logits = jax.eval_shape(model, jax.ShapeDtypeStruct((1, 4, 3), "float32")).logits
    assert logits.shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"inputs must be \[B, T, F\] with F = 3, got \(1, 4, 2\)"):
        model(jnp.ones((1, 4, 2)))


def test_dropout_differs_between_calls_and_applies_only_in_training():
    make = lambda: build(**SMALL, dropout=0.5)  # noqa: E731
    assert not draws_random_bits(make, lambda model: model(IDS).logits, training=False)
    model = random_module(make)
    model.train()
    call = jax.jit(lambda graph, *state: nnx.merge(graph, *state, copy=True)(IDS).logits, static_argnums=0)

    def run(*, copies):
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        return [call(graph, parameters, jax.tree.map(lambda leaf: leaf, rest)) for _ in range(copies)]

    first, same = run(copies=2)
    assert_close(first, same, 0.0)
    model.dropout_stream()
    (second,) = run(copies=1)
    assert relative_rms(first, second) > 0.1


def test_an_id_outside_the_vocabulary_gives_nan():
    parameters, call = functional(random(**SMALL))
    assert np.all(np.isnan(call(parameters, np.array([[VOCAB]])).logits))


def test_parameters_carry_logical_names():
    names = {
        jax.tree_util.keystr(path): leaf.get_metadata().get("out_sharding")
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            nnx.state(nnx.eval_shape(build)), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    }
    find = lambda *parts: next(v for k, v in names.items() if all(part in k for part in parts))  # noqa: E731
    assert find("embedding", "table") == ("vocab", "embed")
    assert find("memory", "query", "kernel") == ("layers", "embed", "heads")
    assert find("memory", "out", "kernel") == ("layers", "heads", "embed")
    assert find("feedforward", "down", "kernel") == ("layers", "mlp", "embed")
    assert find("head", "kernel") == ("embed", "vocab")


RULES = (
    ("layers", None),
    ("activation_batch", ("data", "fsdp")),
    ("activation_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)


@pytest.mark.parametrize("memory", ["delta_rule", "deltaformer"])
def test_under_a_mesh_results_agree_and_only_weights_are_gathered(memory):
    model = random(memory=memory, memory_options={}, depth=1, vocab_size=8, width=16)
    ids = np.random.default_rng(5).integers(0, 8, (4, 12), np.int32)
    graph, parameters = nnx.split(model)
    want = jax.jit(lambda p, ids: nnx.merge(graph, p)(ids).logits)(parameters, ids)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        placed = jax.device_put(parameters, nnx.get_named_sharding(parameters, mesh))
        rows = jax.device_put(ids, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        compiled = jax.jit(lambda p, ids: nnx.merge(graph, p)(ids).logits).lower(placed, rows).compile()
        assert_close(compiled(placed, rows), want, FORWARD["float32"])
    largest = max(leaf.size for leaf in jax.tree.leaves(parameters))
    for line in compiled.as_text().splitlines():
        if " all-gather(" in line:
            shape = line.split("= ")[1].split("{")[0].split("[")[1].rstrip("]")
            assert np.prod([int(n) for n in shape.split(",")]) <= largest, line


def test_presets_have_their_sizes():
    sizes = {"tiny": 0.4e6, "mini_10m": 10.6e6, "small_125m": 85e6, "medium_350m": 302e6, "large_760m": 679e6}
    for name, size in {**sizes, "xlarge_1300m": 1208e6, "huge_2700m": 2516e6, "giant_7b": 6442e6}.items():
        # one of the blocks, which are all alike
        config = from_preset(name, memory="softmax_attention", depth=1)
        model = nnx.eval_shape(lambda config=config: MemoryLM(config, vocab_size=64, rngs=nnx.Rngs(0)))
        count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model.blocks, nnx.Param)))
        count *= PRESETS[name]["depth"]
        assert abs(count / size - 1) < 0.05, (name, count)


def test_model_keys_are_those_of_the_config():
    assert set(model_keys()) == {field.name for field in dataclasses.fields(LanguageModelConfig)}
    assert next(iter(MODELS)) == "memory_lm"


@pytest.mark.parametrize("kind", MODELS)
def test_default_options_are_those_of_the_config(kind):
    options = default_options(kind)
    assert build_config(options) == build_config({"type": kind}) == (kind, MODELS[kind][0]())
    assert tuple(options) == ("type", "preset", *model_keys(kind))
    plain = (dict, tuple, str, int, float, bool, type(None))
    assert {type(value) for value in options.values()} <= set(plain)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_defaults_that_explicit_keys_override(name):
    config = build_config({"preset": name, "depth": 3, "memory": "gla"})[1]
    assert config == from_preset(name, depth=3, memory="gla")
    assert config.width == PRESETS[name]["width"] and config.depth == 3
    assert build_config(default_options(preset=name)) == ("memory_lm", from_preset(name))


def test_a_pattern_may_be_written_with_commas():
    config = LanguageModelConfig(memory="delta_rule, softmax_attention", depth=2)
    assert config == LanguageModelConfig(memory=["delta_rule", "softmax_attention"], depth=2)
    assert config.pattern == config.memory == ("delta_rule", "softmax_attention")
    assert LanguageModelConfig(memory="gla").memory == "gla"


def test_configs_are_hashable_and_normalised():
    plain = LanguageModelConfig(memory_options={"gla": {"decay_rank": 4}}, memory="gla", width=8, depth=2)
    other = LanguageModelConfig(
        memory_options=FrozenDict({"gla": FrozenDict({"decay_rank": 4})}),
        memory=("gla",),
        width=np.int64(8),
        depth=jnp.int32(2),
        dropout=np.float32(0),
        dtype=jnp.float32,
    )
    assert hash(plain) == hash(dataclasses.replace(other, memory="gla")) and type(other.width) is int


def test_none_by_name():
    """A command line cannot express None otherwise."""
    config = LanguageModelConfig(feedforward="none", positions="none", remat="none")
    assert (config.feedforward, config.positions, config.remat) == (None, None, None)


# Config, and the error message.
MISTAKES = {
    "type": ({"type": "rnn"}, "model type must be one of memory_lm, .* got 'rnn'"),
    "key": ({"widht": 8}, "model 'memory_lm' has no key 'widht'; known keys: memory, .*width"),
    "memory": ({"memory": "delta"}, "memory must be one of .* got 'delta'"),
    "pattern": ({"memory": ()}, "memory must be a name or a tuple of at least one name"),
    "pattern in one string": ({"memory": "gla,"}, "memory must be one of .* got ''"),
    "preset": ({"preset": "huge"}, "preset must be one of tiny, .*xlarge_1300m, .*giant_7b, got 'huge'"),
    "preset of another model": ({"type": "ntm", "preset": "tiny"}, "presets are for 'memory_lm', got 'tiny'"),
    "depth": ({"depth": 3}, "depth must be a multiple of the memory pattern's length 2, got 3"),
    "width": ({"width": 0}, "width must be a positive integer, got 0"),
    "heads": ({"heads": 3}, "width must be a multiple of heads .* got 8 and 3"),
    "option": ({"memory_options": {"gla": {}}}, "memory_options of a pattern has no key 'gla'; known keys: delta_rule"),
    "memory option": (
        {"memory_options": {"delta_rule": {"gat": 1}}},
        "memory_options of 'delta_rule' has no key 'gat'",
    ),
    "options": ({"memory_options": 3}, "memory_options must be a mapping, got 3"),
    "feedforward": ({"feedforward": "glu"}, "feedforward must be one of None, 'mlp', 'swiglu', 'moe', got 'glu'"),
    "feedforward option": (
        {"feedforward_options": {"size": 1}},
        "feedforward_options of 'swiglu' has no key 'size'; known keys: hidden",
    ),
    "positions": ({"positions": "rotary"}, "positions must be one of None, 'learned', 'sinusoidal', got 'rotary'"),
    "norm": ({"norm": "batch"}, "norm must be one of 'rms', 'layer', got 'batch'"),
    "remat": ({"remat": "some"}, "remat must be one of None, 'full', .* got 'some'"),
    "switch": ({"scan_layers": "no"}, "scan_layers must be True or False, got 'no'"),
    "dropout as text": ({"dropout": "0.1"}, "dropout must be a finite number, got '0.1'"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "dtype": ({"dtype": "int8"}, "dtype must be a floating dtype .* got 'int8'"),
    "tied": ({"tie_embeddings": True, "num_classes": 3}, "tie_embeddings requires ids in and the same ids out"),
    "both inputs": ({"features": 2}, "give either vocab_size .* or features"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(mistake):
    config, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**config))


def test_more_tokens_than_learned_positions_are_refused():
    model = random(**SMALL, positions="learned", max_length=4)
    with pytest.raises(ValueError, match="inputs must have at most max_length = 4 tokens, got 7"):
        model(IDS)
    with pytest.raises(ValueError, match="capacity must be at most max_length = 4, got 5"):
        model.init_state(1, 5)
