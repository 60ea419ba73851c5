"""The Neural Turing Machine: equality with NumPy, gradients, packing, continuation, and learning to copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import build_model
from memformer.tasks import make_task
from memformer.training.losses import count_batch
from tests.models.learning import draw, learn
from tests.modules import compiled, random_module
from tests.numeric import FORWARD, assert_close, slopes

B, T, F, CLASSES = 2, 7, 3, 4
SHAPE = {"type": "ntm", "width": 6, "slots": 5, "slot_width": 3}
VARIANTS = {
    "lstm": {},
    "feedforward, heads": {"controller": "feedforward", "read_heads": 2, "write_heads": 3, "initial_focus": "learned"},
}
INPUTS = np.random.default_rng(1).normal(size=(B, T, F)).astype(np.float32)


def build(variant="lstm", seed=0, **config):
    options = {**SHAPE, **VARIANTS[variant], **config}
    sizes = {"vocab_size": 0, "num_classes": CLASSES, "features": F}
    model = random_module(lambda: build_model(options, **sizes, rngs=nnx.Rngs(0)), seed=seed)
    # With small weights every gate is half open, and mistakes would not show.
    graph, parameters = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: 2 * x, parameters))


def functional(model):
    """The parameters of a model, and its jitted call on them."""
    graph, parameters = nnx.split(model)
    return parameters, jax.jit(lambda parameters, *args, **kwargs: nnx.merge(graph, parameters)(*args, **kwargs))


@functools.cache
def plain(variant):
    return functional(build(variant))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def in_numpy(model, x):
    """Logits, write weights and final memory of one sequence [T, F] from the equations, in float64."""
    config = model.config
    p = {k: np.asarray(v, np.float64) for k, v in {
        "x": model.entering.kernel, "x0": model.entering.bias, "r": model.recurrent.kernel, "h": model.heads.kernel,
        "h0": model.heads.bias, "y": model.head.kernel, "y0": model.head.bias, "reads": model.initial_reads,
    }.items()}  # fmt: skip
    width, heads, reading = config.slot_width, config.heads, config.read_heads
    memory, reads = np.full((config.slots, width), 1e-6), p["reads"]
    weights = np.tile(np.eye(config.slots)[0], (heads, 1))
    if model.initial_weights is not None:
        weights = softmax(np.asarray(model.initial_weights, np.float64))
    h = c = np.zeros(config.width)
    logits, written = [], []
    for t in range(len(x)):
        if config.controller == "feedforward":
            h = np.tanh(x[t] @ p["x"] + p["x0"] + reads @ p["r"])
        else:
            i, f, g, o = np.split(x[t] @ p["x"] + p["x0"] + np.concatenate([reads, h]) @ p["r"], 4)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        rest = np.clip(h @ p["h"] + p["h0"], -20, 20)
        keys, rest = np.tanh(rest[: heads * width]).reshape(heads, width), rest[heads * width :]
        scalars, rest = rest[: heads * 6].reshape(heads, 6), rest[heads * 6 :]
        erases, adds = np.split(rest.reshape(-1, width), 2)
        after = []
        for head in range(heads):
            beta, gate, shift = (
                np.log1p(np.exp(scalars[head, 0])),
                sigmoid(scalars[head, 1]),
                softmax(scalars[head, 2:5]),
            )
            cosines = memory @ keys[head] / np.linalg.norm(keys[head]) / np.sqrt((memory**2).sum(1) + 1e-12)
            w = gate * softmax(beta * cosines) + (1 - gate) * weights[head]
            w = shift[0] * np.roll(w, -1) + shift[1] * w + shift[2] * np.roll(w, 1)
            w = w ** (1 + np.log1p(np.exp(scalars[head, 5])))
            after.append(w / w.sum())
        weights = np.array(after)
        reads = (weights[:reading] @ memory).ravel()
        for w, e in zip(weights[reading:], sigmoid(erases), strict=True):
            memory = memory * (1 - np.outer(w, e))
        for w, a in zip(weights[reading:], np.tanh(adds), strict=True):
            memory = memory + np.outer(w, a)
        logits.append(np.clip(np.concatenate([h, reads]) @ p["y"] + p["y0"], -20, 20))
        written.append(weights[reading:])
    return np.array(logits), np.array(written), memory.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_equations(variant):
    model = build(variant)
    parameters, call = plain(variant)
    output = jax.device_get(call(parameters, INPUTS))
    trace = jax.device_get(jax.jit(model.trace)(INPUTS))
    want = [in_numpy(model, row.astype(np.float64)) for row in INPUTS]
    assert output.logits.shape == (B, T, CLASSES) and output.logits.dtype == jnp.float32 and output.aux == {}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(output.state))
    logits, written, memory = (np.stack(each) for each in zip(*want, strict=True))
    assert_close(output.logits, logits, FORWARD["float32"])
    assert_close(output.state.memory, memory, FORWARD["float32"])
    assert_close(trace.logits, logits, FORWARD["float32"])
    assert_close(trace.write_weights, written, FORWARD["float32"])
    config = model.config
    shapes = [(config.read_heads, 5), (config.write_heads, 5), (config.read_heads, 3), (config.write_heads, 3)]
    assert [x.shape[2:] for x in trace[1:]] == shapes
    assert_close(trace.reads[:, -1].reshape(B, -1), output.state.reads, FORWARD["float32"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_finite_differences(variant):
    with jax.enable_x64(True):
        graph, parameters = nnx.split(build(variant, dtype="float64", param_dtype="float64"))
        segments = np.array([[1, 1, 0, 1], [1, 1, 2, 2]])

        @jax.jit
        @jax.value_and_grad
        def loss(at):
            output = nnx.merge(graph, at[0])(at[1], segment_ids=segments)
            return jnp.sum(jnp.sin(output.logits)) + jnp.sum(jnp.cos(output.state.memory))

        at = (parameters, INPUTS[:, :4].astype(np.float64))
        for seed in range(3):
            assert_close(*slopes(loss, at, seed=seed), 1e-6)
        for path, leaf in jax.tree_util.tree_leaves_with_path(loss(at)[1]):
            assert np.any(leaf) and leaf.dtype == jnp.float64, jax.tree_util.keystr(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_continuing_and_packing_agree_with_the_whole_sequence(variant):
    parameters, call = plain(variant)
    want = call(parameters, INPUTS)
    state, got = build(variant).init_state(B, T), []
    for t in range(T):
        output = call(parameters, INPUTS[:, t : t + 1], state=state)
        state = output.state
        got.append(output.logits)
    assert_close(np.concatenate(got, axis=1), want.logits, FORWARD["float32"])
    assert_close(state, want.state, FORWARD["float32"])
    # The same program: each segment alone, with padding behind it, from the first state.
    start = build(variant).init_state(B, T)
    segments = np.array([[0, 1, 1, 1, 2, 2, 2], [4, 4, 0, 4, 3, 3, 3]], np.int32)
    packed = jax.device_get(call(parameters, INPUTS, segment_ids=segments, state=start))
    for pair, last in (([(0, 1), (1, 4)], False), ([(0, 2), (1, 3)], True)):
        places = [(row, np.flatnonzero(segments[row] == segment)) for row, segment in pair]
        inputs = np.stack([np.pad(INPUTS[row, place], ((0, T - 3), (0, 0))) for row, place in places])
        ids = np.ones_like(segments) * (np.arange(T) < 3).astype(np.int32)
        alone = jax.device_get(call(parameters, inputs, segment_ids=ids, state=start))
        logits = np.stack([packed.logits[row, place] for row, place in places])
        assert_close(logits, alone.logits[:, :3], FORWARD["float32"])
        if last:
            # The state of a row is that of its last segment.
            assert_close(packed.state, alone.state, FORWARD["float32"])
    # Padding leaves the state unchanged, and a call may start inside a segment.
    padded = call(parameters, INPUTS, segment_ids=np.zeros_like(segments), state=state)
    assert_close(padded.state, state, FORWARD["float32"])


def test_ids_are_one_hot_encoded():
    ids = np.array([[0, 2, 1, 1]])
    call, twin = (
        compiled(random_module(lambda sizes=sizes: build_model(SHAPE, **sizes, rngs=nnx.Rngs(0))))
        for sizes in ({"vocab_size": 3}, {"vocab_size": 0, "num_classes": 3, "features": 3})
    )
    want = twin(np.eye(3, dtype=np.float32)[ids])
    assert_close(call(ids).logits, want.logits, FORWARD["float32"])


def test_a_trained_memory_may_have_more_slots():
    graph, parameters = nnx.split(build(slots=5))
    longer, same = nnx.split(build(slots=9, seed=1))
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, same)
    assert jax.eval_shape(nnx.merge(longer, parameters), INPUTS).state.memory.shape == (B, 3, 9)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"controller": "gru"}, "controller must be one of 'lstm', 'feedforward', got 'gru'"),
        ({"slots": 0}, "slots must be a positive integer, got 0"),
        ({"write_heads": True}, "write_heads must be a positive integer, got True"),
        ({"initial_focus": "last"}, "initial_focus must be one of 'first', 'learned', got 'last'"),
        ({"clip": 0.0}, "clip must be a finite number above 0, got 0.0"),
        ({"dtype": "int8"}, "dtype must be a floating dtype"),
        ({"head": 2}, "model 'ntm' has no key 'head'; known keys: controller, "),
    ],
)
def test_user_errors_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match=r"inputs must be \[B, T, F\] with F = 3, got \(2, 7, 4\)"):
        build()(jnp.zeros((B, T, 4)))
    with pytest.raises(ValueError, match="give either vocab_size .* or features"):
        build_model(SHAPE, vocab_size=0, num_classes=2, rngs=nnx.Rngs(0))


def test_learns_to_copy():
    """One or two vectors of three bits: from chance (3 log 2 = 2.1 nats per vector) to below 0.1 nats."""
    task = make_task({"name": "copy", "length": 2, "bits": 3})
    shape = {"type": "ntm", "controller": "feedforward", "width": 16, "slots": 4, "slot_width": 6}
    model = build_model(shape, vocab_size=0, num_classes=3, features=task.features, rngs=nnx.Rngs(0))

    def loss(model, batch):
        logits = model(batch["inputs"], segment_ids=batch["segment_ids"]).logits
        sums = count_batch(logits, batch["targets"], batch["loss_weights"])
        return sums["loss"] / sums["weight"]

    losses = learn(model, loss, draw(task, steps=150, batch_size=16), rate=1e-2)
    assert losses[0] > 1.7 and np.mean(losses[-10:]) < 0.1, losses[::10]
