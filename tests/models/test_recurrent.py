"""RecurrentLM: ids and features, decoding, packing, both directions, dropout, training, user errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import build_model, generate
from memformer.tasks import Parity
from tests.models.learning import cross_entropy, draw, learn
from tests.modules import draws_random_bits, random_module
from tests.numeric import FORWARD, assert_close

VOCAB, TIME, WIDTH = 7, 6, 8
IDS = np.random.default_rng(5).integers(0, VOCAB, (2, TIME), np.int32)


def build(vocab_size=VOCAB, features=0, num_classes=None, **config):
    config = {"type": "recurrent_lm", "width": WIDTH, "depth": 2, **config}
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "features": features}
    return build_model(config, rngs=nnx.Rngs(0), **sizes)


def functional(model):
    graph, parameters = nnx.split(model)
    return jax.jit(lambda *args, **kwargs: nnx.merge(graph, parameters)(*args, **kwargs))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_decoding_and_packing_agree_with_the_whole_sequence(cell):
    model = random_module(lambda: build(cell=cell))
    call = functional(model)
    want = call(IDS, segment_ids=np.ones_like(IDS))
    assert want.logits.shape == (2, TIME, VOCAB) and want.logits.dtype == jnp.float32 and want.aux == {}
    state, got = model.init_state(2, TIME), []
    for t in range(TIME):
        output = call(IDS[:, t : t + 1], state=state)
        state = output.state
        got.append(output.logits)
    assert_close((np.concatenate(got, axis=1), state), (want.logits, want.state), FORWARD["float32"])
    # the same program: the first halves of both sequences, side by side in each row
    halves = lambda x: np.concatenate([x[:, : TIME // 2], x[::-1, : TIME // 2]], axis=1)  # noqa: E731
    packed = call(halves(IDS), segment_ids=np.array([[1] * (TIME // 2) + [2] * (TIME // 2)] * 2, np.int32))
    assert_close(packed.logits, halves(np.asarray(want.logits)), FORWARD["float32"])


def test_generate_follows_the_logits():
    model = random_module(lambda: build(cell="gru"))
    got = generate(model, [[4], [1, 2, 3]], max_new_tokens=3)
    # A recurrent cell does not look ahead: one pass over the prompt and what was generated shows every choice.
    logits = functional(model)(np.array([[1, 2, 3, *got[1, :-1]]])).logits
    assert got[1].tolist() == np.argmax(logits, axis=-1)[0, 2:].tolist()


def test_features_both_directions_and_bfloat16():
    config = {"features": 3, "num_classes": 2, "bidirectional": True, "dtype": "bfloat16"}
    model = random_module(lambda: build(vocab_size=0, **config))
    x, call = np.random.default_rng(0).standard_normal((2, TIME, 3)).astype("float32"), functional(model)
    output = call(x)
    assert output.logits.shape == (2, TIME, 2) and output.logits.dtype == jnp.float32
    changed = call(x + (np.arange(TIME) == TIME - 1).astype("float32")[:, None]).logits
    assert np.all(np.any(np.asarray(output.logits != changed), axis=(0, 2))), "the first token must see the last"
    with pytest.raises(ValueError, match="state must be None for a bidirectional stack"):
        model.init_state(2, TIME)


def test_dropout_only_in_training():
    make = lambda: build(dropout=0.5)  # noqa: E731
    assert not draws_random_bits(make, lambda model: model(IDS).logits, training=False)
    model, call = random_module(make), nnx.jit(lambda model, ids: model(ids).logits)
    model.train()
    first, second = np.asarray(call(model, IDS)), np.asarray(call(model, IDS))
    assert np.abs(first - second).max() > 1e-3


def test_an_lstm_learns_parity():
    """Chance is a loss of 0.69; the parity of up to 6 bits must be learned in 100 steps."""
    model = build_model({"type": "recurrent_lm", "width": 16}, vocab_size=2, num_classes=2, rngs=nnx.Rngs(0))

    def loss(model, batch):
        return cross_entropy(model(batch["inputs"], segment_ids=batch["segment_ids"]).logits, batch)

    losses = learn(model, loss, draw(Parity(length=6), steps=100, batch_size=32), rate=2e-2)
    assert losses[0] > 0.6 and np.mean(losses[-10:]) < 0.1, losses[::10]


MISTAKES = {
    "cell": ({"cell": "elman"}, "cell must be one of 'rnn', 'lstm', 'gru', got 'elman'"),
    "width": ({"width": 0}, "width must be a positive integer, got 0"),
    "depth": ({"depth": 1.5}, "depth must be a positive integer, got 1.5"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "dtype": ({"dtype": "int8"}, "dtype must be a floating dtype .* got 'int8'"),
    "key": ({"memory": "lstm"}, "model 'recurrent_lm' has no key 'memory'; known keys: cell, .*width"),
    "both inputs": ({"features": 2}, "give either vocab_size .* or features"),
    "classes": ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(mistake):
    config, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        build(**config)
