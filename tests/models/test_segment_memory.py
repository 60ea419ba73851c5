"""ARMT and RMT: state, packing, visibility, gradients through segments, user errors, a small training run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import build_model
from memformer.tasks import Rewrite
from tests.models.learning import cross_entropy, draw, learn
from tests.modules import random_module
from tests.numeric import FORWARD, assert_close, slopes

LENGTH, VOCAB = 3, 11
TYPES = {
    "armt": {"type": "armt", "key_width": 4},
    "armt without gamma": {"type": "armt", "key_width": 4, "correction": False},
    "rmt": {"type": "rmt"},
}
SMALL = {"segment_length": LENGTH, "memory_tokens": 2, "width": 8, "depth": 1, "heads": 2}
SMALL["feedforward_options"] = {"hidden": 8}
IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 3 * LENGTH), np.int32)


@functools.cache
def functional(name, **config):
    """Random parameters of a model, and its jitted call on them."""
    sizes = {"features": config.pop("features", 0)}
    sizes |= {"vocab_size": 0, "num_classes": 5} if sizes["features"] else {"vocab_size": VOCAB}
    model = random_module(lambda: build_model({**SMALL, **TYPES[name], **config}, rngs=nnx.Rngs(0), **sizes))
    graph, parameters = nnx.split(model)

    @jax.jit
    def call(parameters, *args, **kwargs):
        return nnx.merge(graph, parameters)(*args, **kwargs)

    return parameters, call


def whole(name):
    parameters, call = functional(name)
    return call(parameters, IDS)


@functools.cache
def model(name, **config):
    """The module itself."""
    graph = nnx.eval_shape(lambda: build_model({**SMALL, **TYPES[name], **config}, vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(graph), functional(name, **config)[0])


@pytest.mark.parametrize("name, config", [("armt", {"depth": 2}), ("rmt", {})])
def test_segments_one_by_one_equal_the_whole(name, config):
    """From the state before the first token; the whole starts without one."""
    parameters, call = functional(name, **config)
    want = call(parameters, IDS)
    assert want.logits.shape == (2, 3 * LENGTH, VOCAB) and want.logits.dtype == jnp.float32 and want.aux == {}
    state, got = model(name, **config).init_state(2, capacity=100), []
    for start in range(0, 3 * LENGTH, LENGTH):
        output = call(parameters, IDS[:, start : start + LENGTH], state=state)
        state = output.state
        got.append(output.logits)
    assert_close(np.concatenate(got, axis=1), want.logits, FORWARD["float32"])
    assert_close(jax.tree.leaves(state), jax.tree.leaves(want.state), FORWARD["float32"])


@pytest.mark.parametrize("name", ["armt", "rmt"])
def test_packed_and_padded_sequences_equal_those_alone(name):
    parameters, call = functional(name)
    # A sequence of two segments, the last one short; a whole segment of padding; a new sequence with an earlier id.
    segments = np.array([[7, 7, 7, 7, 7, 0, 2, 2, 2], [0, 0, 0, 5, 5, 5, 7, 7, 0]])
    packed = call(parameters, IDS, segment_ids=segments)
    pieces = [(0, slice(0, 5)), (0, slice(6, 9)), (1, slice(3, 6)), (1, slice(6, 8))]
    packed = jax.device_get(packed)
    for row, place in pieces:
        ids, known, length = np.zeros_like(IDS), np.zeros_like(segments), place.stop - place.start
        ids[0, :length], known[0, :length] = IDS[row, place], 1
        alone = call(parameters, ids, segment_ids=known).logits
        assert_close(
            packed.logits[row, place], np.asarray(alone)[0, :length], FORWARD["float32"], f"row {row}, {place}: "
        )
    if name == "rmt":
        # the last segment is short: the program that the tests below need
        short = call(parameters, IDS[:, : LENGTH + 1]).logits
        assert_close(short, np.asarray(whole(name).logits)[:, : LENGTH + 1], FORWARD["float32"])
    # The state is that of the last sequence: row 0 ended with `2 2 2`.
    again = call(parameters, IDS[:, :LENGTH], state=packed.state, segment_ids=np.array([[2, 2, 2], [0, 0, 0]]))
    again = jax.device_get(again)
    joined = np.concatenate([IDS[:, 6:], IDS[:, :LENGTH], np.zeros_like(IDS[:, :LENGTH])], axis=1)
    known = np.broadcast_to(np.arange(3 * LENGTH) < 2 * LENGTH, IDS.shape).astype(segments.dtype)
    want = np.asarray(call(parameters, joined, segment_ids=known).logits)[0, LENGTH : 2 * LENGTH]
    assert_close(again.logits[0], want, FORWARD["float32"])
    assert_close(jax.tree.map(lambda x: x[1], again.state), jax.tree.map(lambda x: x[1], packed.state), 0.0)


def test_first_segment_does_not_read():
    parameters, call = functional("armt")
    want = whole("armt").logits

    def other(path, x):
        return -x if "query" in jax.tree_util.keystr(path) and "memories" in jax.tree_util.keystr(path) else x

    want, got = np.asarray(want), np.asarray(call(jax.tree_util.tree_map_with_path(other, parameters), IDS).logits)
    assert_close(got[:, :LENGTH], want[:, :LENGTH], 0.0)
    assert np.all(np.abs(got - want)[:, LENGTH:].max(axis=(1, 2)) > 1e-3)


def test_armt_starts_as_a_transformer_and_rmt_reads_its_tokens():
    """Values start at zero, so an untrained ARMT carries nothing between segments; an RMT of random numbers does."""
    changed = np.concatenate([(IDS[:, :1] + 1) % VOCAB, IDS[:, 1:]], axis=1)
    for name, passes in (("armt", False), ("rmt", True)):
        parameters, call = functional(name)
        if name == "armt":
            untrained = build_model({**SMALL, **TYPES[name]}, vocab_size=VOCAB, rngs=nnx.Rngs(0))
            parameters = jax.device_get(nnx.state(untrained))
        one, other = (np.asarray(call(parameters, ids).logits) for ids in (IDS, changed))
        later = np.abs(one - other)[:, LENGTH:]
        assert (later.max() > 0) == passes, name


@pytest.mark.parametrize("name, remat", [("armt without gamma", None), ("rmt", "full")])
def test_gradient_passes_through_all_segments(name, remat):
    """Equals finite differences in float64, without gamma, which has no gradient; every parameter has one."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        parameters, call = functional(name, features=2, dtype="float64", param_dtype="float64", remat=remat)
        x = np.random.default_rng(3).standard_normal((1, 3 * LENGTH, 2))

        def loss(given):
            return jnp.sum(jnp.sin(call(*given).logits[:, 2 * LENGTH :]))

        traced = jax.jit(jax.value_and_grad(loss)).trace((parameters, x))
        assert ("remat" in str(traced.jaxpr)) == (remat is not None)
        run = traced.lower().compile()
        by_parameter, by_input = jax.device_get(run((parameters, x))[1])
        for path, leaf in jax.tree_util.tree_leaves_with_path(by_parameter):
            assert np.any(leaf), jax.tree_util.keystr(path)
        # The loss is on the last segment, so gradients reach the first one through two memories.
        assert np.all(np.abs(by_input[0, :LENGTH]).max(axis=-1) > 1e-8)
        assert_close(*slopes(run, (parameters, x)), 1e-6)


def test_bfloat16_policy():
    parameters, call = functional("armt", dtype="bfloat16")
    output = call(parameters, IDS)
    assert output.logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(output.state["memory"])} == {jnp.dtype("float32")}
    assert np.abs(np.asarray(output.logits) - whole("armt").logits).max() < 0.2


UNALIGNED = [
    {"segment_ids": np.array([[1] * 4 + [2] * 5] * 2)},
    {"segment_ids": np.array([[0] + [1] * 8] * 2)},
    {"segment_ids": np.array([[1, 1, 0] + [1] * 6] * 2)},
    {"segment_ids": np.array([[1, 1, 2] + [3] * 6] * 2), "positions": np.arange(9)[None].repeat(2, 0)},
    {"positions": 1 + np.arange(9)[None].repeat(2, 0)},
    {"state": "after four tokens"},
]


@pytest.mark.parametrize("case", UNALIGNED, ids=lambda case: "-".join(case))
def test_sequences_that_do_not_start_a_segment_are_named(case):
    parameters, call = functional("rmt")
    if "state" in case:
        case = {"state": call(parameters, IDS[:, :4]).state}
    with pytest.raises(ValueError, match="every sequence start a memory segment of segment_length = 3 tokens"):
        model("rmt")(IDS, **case)


def test_under_jit_the_running_program_raises_the_same_error():
    parameters, call = functional("rmt")
    with pytest.raises(Exception, match="a memory segment of segment_length = 3 tokens"):
        jax.block_until_ready(call(parameters, IDS, segment_ids=np.array([[1] * 4 + [2] * 5] * 2)))
    jax.effects_barrier()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"segment_length": 0}, "segment_length must be a positive integer, got 0"),
        ({"memory_tokens": 0}, "memory_tokens must be a positive integer, got 0"),
        ({"key_width": 0}, "key_width must be a positive integer, got 0"),
        ({"correction": "no"}, "correction must be True or False, got 'no'"),
        ({"remat": "half"}, "remat must be one of None, 'full'"),
        ({"segments": 3}, "model 'armt' has no key 'segments'; known keys: segment_length"),
    ],
    ids=str,
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_model({**SMALL, **TYPES["armt"], **config}, vocab_size=VOCAB, rngs=nnx.Rngs(0))


def test_training_carries_values_between_segments():
    """A pair, and a question in the next segment: without a memory between them the loss stays at log 4 = 1.39."""
    task = Rewrite(length=1, queries=1, symbols=4)
    shape = {**SMALL, **TYPES["armt"], "segment_length": task.segment_length, "width": 16, "heads": 1, "key_width": 8}
    shape |= {"memory_tokens": 1, "feedforward": None, "feedforward_options": {}}
    model = build_model(shape, vocab_size=task.vocab_size, rngs=nnx.Rngs(0))

    def loss(model, batch):
        # whole segments without padding, whose places the model counts
        return cross_entropy(model(batch["inputs"]).logits, batch)

    losses = learn(model, loss, draw(task, steps=60, batch_size=16), rate=1e-2)
    assert np.mean(losses[-10:]) < 0.3, losses[::10]
