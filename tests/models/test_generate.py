"""generate: equality with repeated full passes, compilation count, sampling, user errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import MemoryLM, generate
from memformer.models.config import LanguageModelConfig
from memformer.models.generate import Sampling, _decode, _prefill, sample
from tests.modules import random_module

VOCAB, PROMPTS, NEW = 9, [[1, 2, 3, 4], [5, 6]], 4


def build(memory=("gated_delta_rule", "softmax_attention"), **config):
    config = {"width": 8, "heads": 2, "depth": 2, "feedforward": None, **config}
    config = LanguageModelConfig(memory=memory, **config)
    return random_module(lambda: MemoryLM(config, vocab_size=VOCAB, rngs=nnx.Rngs(1)))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def first(model):
    """The first tokens that the model generates, and the lengths with which it was traced for them."""
    traced, call = [], MemoryLM.__call__

    def counting(self, inputs, **kwargs):
        traced.append(inputs.shape[1])
        return call(self, inputs, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLM, "__call__", counting)
        return generate(model, PROMPTS, max_new_tokens=NEW), traced


@pytest.fixture(scope="module")
def greedy(first):
    return first[0]


def test_greedy_equals_repeated_full_passes(model, greedy):
    graph, parameters = nnx.split(model)
    call = jax.jit(lambda parameters, ids: nnx.merge(graph, parameters)(ids).logits)
    # What stands behind the tokens of a row does not reach them.
    ids = np.stack([np.pad([*prompt, *row], (0, 4 - len(prompt))) for prompt, row in zip(PROMPTS, greedy, strict=True)])
    best = np.argmax(call(parameters, ids), axis=-1)
    for prompt, tokens, row in zip(PROMPTS, greedy, best, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 : len(prompt) - 1 + NEW], tokens)


def test_equal_shapes_compile_once(model, greedy):
    before = (_prefill._cache_size(), _decode._cache_size())
    again = generate(model, [[8, 7, 6, 5], [4]], max_new_tokens=NEW)
    assert again.shape == greedy.shape and again.dtype == np.int32
    assert (_prefill._cache_size(), _decode._cache_size()) == before


def test_the_step_is_traced_once_whatever_the_count(first):
    """A loop takes a step once or twice, and four tokens without one would take three."""
    _, traced = first
    assert traced.count(4) == 1 and 1 <= traced.count(1) <= 2 and len(traced) <= 3


def test_a_fixed_state_needs_the_same_space_at_any_length():
    fixed, growing = build(memory="gated_delta_rule"), build(memory="softmax_attention")
    size = lambda model, capacity: sum(x.size for x in jax.tree.leaves(model.init_state(1, capacity)))  # noqa: E731
    assert size(fixed, 10) == size(fixed, 1000)
    assert size(growing, 1000) > 50 * size(growing, 10)


def test_a_stopped_row_repeats_the_stop_token(model, greedy):
    stop = int(greedy[0, 0])
    tokens = generate(model, PROMPTS, max_new_tokens=NEW, stop_token=stop)
    for row, free in zip(tokens, greedy, strict=True):
        where = np.flatnonzero(free == stop)
        end = where[0] if where.size else NEW
        np.testing.assert_array_equal(row[:end], free[:end])
        np.testing.assert_array_equal(row[end:], stop)


DRAWN = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "stop_token": 2}


def test_settings_may_be_scalars_of_numpy_and_jax(model):
    scalars = {
        "max_new_tokens": np.int64(3),
        "temperature": jnp.float32(0.5),
        "top_k": np.int32(4),
        "top_p": np.float32(0.75),
        "stop_token": jnp.int32(2),
    }
    key, before = jax.random.key(0), _decode._cache_size()
    want = generate(model, PROMPTS, key=key, **DRAWN)
    np.testing.assert_array_equal(generate(model, PROMPTS, key=key, **scalars), want)
    assert _decode._cache_size() == before + 1


@pytest.mark.parametrize("temperature", [1e-20, 1e-37, 1e-38, 1e-45])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = jnp.array([[5.0, 9.0, 7.0], [-jnp.inf, -4.0, -3.0]])
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=2), Sampling(temperature, top_p=0.9)):
        assert sample(logits, jax.random.key(0), sampling).tolist() == [1, 2]


def test_sampling_depends_on_the_key(model):
    """In the program of the test before."""
    draws = [generate(model, PROMPTS, key=jax.random.key(seed), **DRAWN) for seed in (0, 0, 1, 2, 3, 4)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert any(np.any(draw != draws[0]) for draw in draws[2:])


LOGITS = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
# Settings, and the expected probability of each token.
DRAWS = {
    "greedy": (Sampling(), [0, 1, 0, 0]),
    "plain": (Sampling(1.0), [0.1, 0.5, 0.25, 0.15]),
    "cold": (Sampling(0.5), np.array([0.01, 0.25, 0.0625, 0.0225]) / 0.345),
    "top_k": (Sampling(1.0, top_k=2), [0, 2 / 3, 1 / 3, 0]),
    "top_p": (Sampling(1.0, top_p=0.6), [0, 2 / 3, 1 / 3, 0]),
    "top_p keeps one": (Sampling(1.0, top_p=0.1), [0, 1, 0, 0]),
    "both": (Sampling(1.0, top_k=3, top_p=0.8), [0, 2 / 3, 1 / 3, 0]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_sample_follows_its_settings(name):
    sampling, want = DRAWS[name]
    count = 4000
    tokens = sample(jnp.broadcast_to(LOGITS[None], (count, 4)), jax.random.key(0), sampling)
    got = np.bincount(np.asarray(tokens), minlength=4) / count
    # Four standard deviations of a frequency.
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / np.sqrt(count))
    assert not np.any(got[np.asarray(want) == 0])


# Arguments, and the error message.
MISTAKES = {
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
    "temperature": ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
    "top_k": ({"top_k": 10}, r"top_k must be None or in \[1, 9\]"),
    "top_p": ({"top_p": 0.0}, "top_p must be a finite number above 0"),
    "top_p above 1": ({"top_p": 1.5}, r"top_p must be None or in \(0, 1\]"),
    "infinite temperature": ({"temperature": np.inf}, "temperature must be a finite number"),
    "fractional count": ({"max_new_tokens": 2.0}, "max_new_tokens must be a positive integer, got 2.0"),
    "fractional stop": ({"stop_token": 2.5}, "stop_token must be an integer of at least 0, got 2.5"),
    "key": ({"temperature": 1.0}, "key must be given where temperature is not 0"),
    "no key": ({"temperature": 1.0, "key": 3}, r"key must be one random key, such as jax.random.key\(0\), got 3"),
    "keys": (
        {"key": jax.random.split(jax.random.key(0), 2)},
        r"key must be one random key.* key<fry> of shape \(2,\)",
    ),
    "stop_token": ({"stop_token": 9}, r"stop_token must be None or in \[0, 9\), got 9"),
    "empty prompt": ({"prompts": [[1], []]}, "prompts must be one or more sequences of at least one integer id"),
    "float prompt": ({"prompts": [[1.0]]}, "prompts must be one or more sequences of at least one integer id"),
    "id": ({"prompts": [[9]]}, r"prompts must have ids in \[0, 9\), got 9 to 9"),
    "id beyond int32": ({"prompts": [[1, 2**40]]}, r"prompts must have ids .* got 1 to 1099511627776"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(model, mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": NEW, **arguments})


def test_more_tokens_than_positions_are_refused_before_anything_runs():
    model = build(positions="learned", max_length=5)
    with pytest.raises(ValueError, match="capacity must be at most max_length = 5, got 7"):
        generate(model, PROMPTS, max_new_tokens=NEW)


def test_a_tagger_cannot_generate():
    config = LanguageModelConfig(width=8, heads=2)
    model = nnx.eval_shape(lambda: MemoryLM(config, vocab_size=4, num_classes=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="model must take ids and give logits over the same ids"):
        generate(model, PROMPTS, max_new_tokens=1)
