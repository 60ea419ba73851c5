"""The shared suite of memory layers: a new memory adds a row to SPECS and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.similarity import Kernel
from memformer.layers.basic import Dtypes
from memformer.layers.memory import build_memory, known_options
from memformer.layers.table import MEMORIES
from memformer.ops.delta_product import delta_product
from tests.modules import random_module
from tests.numeric import FORWARD, assert_close, relative_rms

BATCH, TIME, WIDTH, HEADS = 4, 6, 8, 2

# Test name: memory and options. Every row of MEMORIES must be here with its own defaults.
SPECS = {
    **{name: (name, {}) for name in MEMORIES},
    "softmax_attention, grouped, window": ("softmax_attention", {"groups": 1, "window": 3, "rotary": False}),
    "deltaformer, all projections": (
        "deltaformer",
        {"write_query": True, "alpha": "sigmoid", "groups": 1, "rotary": True, "read_kernel": "linear", "steps": 2},
    ),
    "delta_product, decay": ("delta_product", {"steps": 3, "decay": "step", "rotary": True}),
}


# One row of each layer class, the last.
CLASSES = tuple({MEMORIES[name].layer: spec for spec, (name, _) in SPECS.items()}.values())
# One row of each module of layers: gradients, and values in bfloat16. Every op has them in tests/ops and tests/pallas.
ROOMS = ("softmax_attention, grouped, window", "delta_product, decay", "rwkv7", "mamba3", "lstm")


def abstract(name, width=WIDTH, **sizes):
    """A layer without weights."""
    return nnx.eval_shape(lambda: build_memory(name, width, **sizes, rngs=nnx.Rngs(0)))


@functools.cache
def built(spec: str, compute: str = "float32"):
    """A layer, its random parameters, and its jitted call on them."""
    name, options = SPECS[spec]
    sizes = {"heads": HEADS, "options": options, "dtypes": Dtypes(compute)}
    layer = random_module(lambda: build_memory(name, WIDTH, **sizes, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(layer)

    @jax.jit
    def call(parameters, x, segment_ids=None, state=None):
        return nnx.merge(graph, parameters)(x, segment_ids=segment_ids, state=state)

    return layer, parameters, call


@functools.cache
def token(spec: str):
    """The program of one token, in rows with gradients: (parameters, x, state) -> (output, state, gradients)."""
    call = built(spec)[2]
    if spec not in ROOMS:
        return jax.jit(lambda parameters, x, state: (*call(parameters, x, None, state), None))
    weights = inputs(BATCH, 1, seed=2)

    @jax.jit
    def step(parameters, x, state):
        def loss(parameters, x):
            y, after = call(parameters, x, None, state)
            return jnp.sum(y * weights), (y, after)

        gradients, (y, after) = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
        return y, after, gradients

    return step


def inputs(batch: int = BATCH, time: int = TIME, seed: int = 0):
    return np.random.default_rng(seed).standard_normal((batch, time, WIDTH)).astype("float32")


# Of the buffers of caches: as many slots as the packed call and the tokens after it need.
CAPACITY = 12


def decode(spec: str, x, state):
    """Outputs token by token, and the gradients of the last one."""
    _, parameters, _ = built(spec)
    step, got, gradients = token(spec), [], None
    for t in range(x.shape[1]):
        y, state, gradients = step(parameters, x[:, t : t + 1], state)
        got.append(y)
    assert step._cache_size() == 1
    return np.concatenate(got, axis=1), gradients


@functools.cache
def decoded(spec: str):
    """`decode` of each sequence alone, in fixed buffers."""
    return decode(spec, inputs(), built(spec)[0].init_state(BATCH, CAPACITY))


# Left padding, a gap inside a segment, segments side by side, padding at the end: row, segment, its tokens.
PACKED = np.array([[0, 5, 0, 5, 3, 3, 3, 0], [2, 2, 2, 0, 6, 0, 6, 6]])
PIECES = [(0, 5, 2), (0, 3, 3), (1, 2, 3), (1, 6, 3)]


@pytest.mark.parametrize("spec", SPECS)
def test_the_whole_sequence_equals_token_by_token(spec):
    """One call of whole sequences; rows of `CLASSES` pack them and go on from the state, the others have them apart.

    The returned state is that of the last segment. A token that decodes sees no later one, so that both are causal.
    """
    layer, parameters, call = built(spec)
    want, _ = decoded(spec)
    if spec not in CLASSES:
        got, _ = call(parameters, inputs())
        assert got.dtype == jnp.float32
        return assert_close(got, want, FORWARD["float32"])
    x = inputs(2, PACKED.shape[1], seed=3)
    places = [np.flatnonzero(PACKED[row] == segment) for row, segment, _ in PIECES]
    for alone, (row, _, length), place in zip(inputs(), PIECES, places, strict=True):
        x[row, place] = alone[:length]
    # twice, because the program of one token has four rows
    x, ids = np.concatenate([x, x]), np.concatenate([PACKED, PACKED])
    packed, state = call(parameters, x, ids, layer.init_state(BATCH, CAPACITY))
    assert packed.dtype == jnp.float32
    packed = np.asarray(packed)
    for alone, (row, segment, length), place in zip(want, PIECES, places, strict=True):
        assert_close(packed[row, place], alone[:length], FORWARD["float32"], f"segment {segment}: ")
    after, _ = decode(spec, inputs()[[1, 3, 1, 3], 3:], state)
    assert_close(after[:2], want[[1, 3], 3:], FORWARD["float32"])


@pytest.mark.parametrize("spec", CLASSES)
def test_outputs_depend_on_every_parameter(spec):
    """Those of three tokens, one by one, with one parameter changed."""
    layer, parameters, _ = built(spec)
    step, want, rng = token(spec), decoded(spec)[0], np.random.default_rng(4)
    noise = lambda x: rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    for path, _ in jax.tree_util.tree_leaves_with_path(parameters):
        change = lambda at, x, path=path: x + noise(x) if at == path else x  # noqa: E731
        changed = jax.tree_util.tree_map_with_path(change, parameters)
        state, got = layer.init_state(BATCH, CAPACITY), []
        for t in range(3):
            y, state, _ = step(changed, inputs()[:, t : t + 1], state)
            got.append(y)
        assert relative_rms(np.concatenate(got, axis=1), want[:, :3]) > 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("spec", ROOMS)
def test_gradients_reach_every_parameter(spec):
    """Of a token after others; tests/ops compare the gradients of all arguments of the ops with float64."""
    by_parameter, by_input = jax.device_get(decoded(spec)[1])
    assert np.all(np.isfinite(by_input)) and np.all(np.any(by_input, axis=-1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(by_parameter):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("spec", CLASSES)
def test_bfloat16_policy(spec):
    """Dtypes, and values token by token; the layer class sets the dtypes of all its rows."""
    layer, parameters, call = built(spec, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    x, state, got = inputs().astype(jnp.bfloat16), layer.init_state(BATCH, CAPACITY), []
    y, after = jax.eval_shape(call, parameters, x[:, :1], None, state)
    assert y.dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    if spec not in ROOMS:
        return
    for t in range(TIME):
        y, state = call(parameters, x[:, t : t + 1], None, state)
        got.append(y)
    assert relative_rms(np.concatenate(got, axis=1), decoded(spec)[0]) < 3e-2


def test_every_memory_has_a_row():
    assert {name for name, options in SPECS.values() if not options} == set(MEMORIES)
    assert all(all(vars(row).values()) or not row.options for row in MEMORIES.values())


def test_every_row_names_only_known_options():
    for name, row in MEMORIES.items():
        assert set(row.options) <= set(known_options(name))


def test_recurrent_units_are_heads_times_value_width():
    for widths, units in (({}, 8), ({"key_width": 3}, 6), ({"key_width": 3, "value_width": 5}, 10)):
        layer = abstract("lstm", heads=HEADS, **widths)
        assert layer.init_state(BATCH, 1)["memory"].c.shape == (BATCH, units)
        assert layer.out.kernel.shape == (units, WIDTH)


def test_kernels_are_given_by_name_or_by_fields():
    kernels = {"write_kernel": {"name": "round", "decimals": 2}, "read_kernel": "relu"}
    layer = abstract("deltaformer", heads=HEADS, options=kernels)
    assert (layer.write_kernel, layer.read_kernel) == (Kernel("round", decimals=2), Kernel("relu"))


def test_steps_of_deltaformer_are_the_writes_of_delta_product():
    options = {"steps": 3, "decay": "forget", "alpha": "sigmoid", "beta_limit": 2.0, "write_query": True}
    options |= {"write_kernel": "linear", "read_kernel": "linear", "unit_keys": True}
    layer = random_module(lambda: build_memory("deltaformer", WIDTH, heads=HEADS, options=options, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(layer)

    @jax.jit
    def both(parameters, x):
        layer = nnx.merge(graph, parameters)
        parts = layer._shape(layer._project(x, None, None)[0], None)
        alpha, beta = (gate(x).reshape(*x.shape[:2], 3, HEADS) for gate in (layer.alpha, layer.beta))
        scalars = {"alpha": alpha, "beta": beta, "decay": layer.decay(x)[0], "scale": 1.0}
        want, _ = delta_product(**parts, **scalars, segment_ids=PACKED, implementation="recurrent")
        got, state = layer(x, segment_ids=PACKED)
        return got, layer._output(x, want), state

    got, want, state = both(parameters, inputs(2, PACKED.shape[1]))
    assert_close(got, want, FORWARD["float32"])
    assert state["memory"].k.shape[1] == 3 * PACKED.shape[1]


NUMPY = {
    "softmax_attention": {"groups": np.int64(1), "window": np.int32(3)},
    "gla": {"decay_rank": np.int64(4), "conv_width": np.int64(2)},
    "delta_product": {"steps": np.int16(2), "beta_limit": np.float32(2.0)},
    "deltaformer": {"groups": np.int64(2), "beta_limit": np.float64(1.0)},
}


@pytest.mark.parametrize("name", NUMPY)
def test_sizes_may_be_numpy_scalars(name):
    options = {key: value.item() for key, value in NUMPY[name].items()}
    layers = [
        abstract(name, width, heads=heads, key_width=keys, options=options)
        for width, heads, keys, options in [(8, 2, 4, options), (np.int64(8), np.int64(2), np.int32(4), NUMPY[name])]
    ]
    graphs, parameters = zip(*(nnx.split(layer) for layer in layers), strict=True)
    assert hash(graphs[0]) == hash(graphs[1]) and graphs[0] == graphs[1]
    assert jax.tree.map(jnp.shape, parameters[0]) == jax.tree.map(jnp.shape, parameters[1])


# Options of a memory, and the error message.
MISTAKES = {
    "unknown memory": ("delta", {}, "memory must be one of 'softmax_attention', .* got 'delta'"),
    "unknown option": ("gla", {"decy": 1}, "memory_options of 'gla' has no key 'decy'; known keys: .*decay"),
    "recurrent option": (
        "lstm",
        {"conv_width": 4},
        "memory_options of 'lstm' has no key 'conv_width'; known keys: heads, key_width",
    ),
    "units": ("gru", {"heads": 3}, "width must be a multiple of heads .* got 8 and 3"),
    "width not divisible": ("gla", {"heads": 3}, "width must be a multiple of heads .* got 8 and 3"),
    "heads": ("gla", {"heads": 0}, "heads must be a positive integer, got 0"),
    "groups": ("softmax_attention", {"groups": 3}, "groups must divide heads, got groups = 3 and heads = 2"),
    "rotary": ("softmax_attention", {"heads": 8}, "rotary positions require an even key_width, got 1"),
    "decay": ("delta_rule", {"decay": "fast"}, "decay must be one of None, 'step', .* got 'fast'"),
    "decay_rank": ("gla", {"decay_rank": 0}, "decay_rank must be a positive integer or None, got 0"),
    "beta_limit": ("delta_rule", {"beta_limit": -1}, "beta_limit must be a finite number above 0, got -1"),
    "normalize": ("gla", {"normalize": True}, "normalize requires a positive feature_map"),
    "discretize": ("gla", {"discretize": True}, "discretize requires decay 'step'"),
    "feature map": ("gla", {"feature_map": "tanh"}, "feature_map must be one of 'identity', .* got 'tanh'"),
    "kernel": ("deltaformer", {"write_kernel": "cosine"}, "write_kernel must be a Kernel or one of .* got 'cosine'"),
    "kernel field": ("deltaformer", {"read_kernel": {"nme": "exp"}}, "read_kernel has no key 'nme'; known keys: name"),
    "kernel without a name": (
        "deltaformer",
        {"read_kernel": {"decimals": 2}},
        "read_kernel must be a mapping with a name",
    ),
    "rank of erase gates": ("gdn2", {"decay_rank": 0}, "decay_rank must be a positive integer or None, got 0"),
    "rank of rwkv7": ("rwkv7", {"decay_rank": 0}, "decay_rank must be a positive integer, got 0"),
    "correction": ("comba", {"correction": float("nan")}, "correction must be a finite number, got nan"),
    "shared key": ("fox", {"shared_key_width": 2}, "shared_key_width must be 0 without a latent_rank, got 2"),
    "pairs": ("mamba3", {"partial_rotary_factor": 0.1}, "even key_width, got 4, of which .* leaves 0 channels"),
    "gate": ("gla", {"output_gate": "relu"}, "output_gate must be one of None, 'silu', 'sigmoid', got 'relu'"),
    "decay time": ("fox", {"decay_time": (5, 2)}, r"decay_time must be two numbers .* got \(5, 2\)"),
    "no number of tokens": (
        "fox",
        {"decay_time": ("a", "b")},
        "each of decay_time must be a finite number above 0, got 'a'",
    ),
    "decay time of no gate": ("fox", {"decay": "step", "decay_time": (1, 2)}, "must be None for decay 'step'"),
    "lower bound": ("hgrn2", {"lower_bound": 1}, "lower_bound must be below 1, got 1"),
    "window of steps": ("deltaformer", {"steps": 2, "window": 4}, "window must be None with 2 steps, got 4"),
    "steps": ("deltaformer", {"steps": 0}, "steps must be a positive integer, got 0"),
    "alpha": ("deltaformer", {"alpha": "exp"}, "alpha must be one of None, 'sigmoid', got 'exp'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(mistake):
    name, options, message = MISTAKES[mistake]
    options = dict(options)
    heads = options.pop("heads", HEADS)
    with pytest.raises(ValueError, match=message):
        abstract(name, heads=heads, options=options)


def test_wrong_inputs_are_named():
    layer = abstract("softmax_attention", heads=HEADS)
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\] with D = 8, got \(2, 7, 9\)"):
        layer(jnp.zeros((2, 7, 9)))
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, T\] = \(4, 6\), got \(2, 6\)"):
        layer(jnp.asarray(inputs()), segment_ids=jnp.ones((2, 6), jnp.int32))
    with pytest.raises(ValueError, match="capacity must be a positive integer, got 0"):
        layer.init_state(2, 0)
