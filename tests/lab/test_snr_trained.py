"""Signal to noise inside models: heads answer as their layer does, and the choice of the signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.similarity import Kernel
from memformer.lab.snr_trained import Head, Questions, ask_head, inverse_snr, read_heads
from memformer.layers.memory import build_memory

BARE = {"output_norm": False, "unit_queries": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax_attention", {"rotary": True}),
        ("delta_rule", BARE),
        ("gated_delta_rule", {**BARE, "output_gate": None}),
        ("deltaformer", {"conv_width": 2}),
    ],
)
def test_heads_answer_as_the_layer_does(name, options):
    """The second row is two documents; the query belongs to the second of them."""
    layer = build_memory(name, 8, heads=2, options=options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    segments = np.array([[1] * 6, [1, 1, 2, 2, 2, 2]])
    rows, last, outputs = np.arange(2), np.array([4, 4]), []
    seen = (np.arange(6) <= 4) & (segments == segments[:, 4:5])
    for head in read_heads(layer, x, segment_ids=segments):
        answers = head.answers(rows, head.queries[:, 4], last).sum(axis=1)
        if head.kernel.normalized:
            scores = np.einsum("bk,btk->bt", head.queries[:, 4], head.keys) / 2
            scores = np.where(seen, scores, -np.inf)
            answers /= np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)
        else:
            # the op's scale
            answers /= 2
        outputs.append(answers)

    @nnx.jit
    def compare(layer, x, read):
        return layer(x, segment_ids=segments)[0][:, 4], layer.out(read)

    want, got = compare(layer, x, np.hstack(outputs))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("name", "got"), [("gla", "got LinearAttention"), ("kda", "got one per channel")])
def test_other_memories_are_refused(name, got):
    layer = build_memory(name, 8, heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=got):
        read_heads(layer, jnp.ones((1, 3, 8)))


def test_a_stored_key_is_of_the_querys_document():
    """Keys of two documents; in each of them all keys are orthogonal, and those of the other one are the same."""
    eye = np.eye(4, dtype=np.float32)[None]
    both = np.concatenate([eye, eye], axis=1)
    questions = Questions(np.zeros(8, int), np.arange(8), np.arange(8))
    mixed = ask_head(Head(both, both, both, Kernel("linear")), questions)
    split = ask_head(Head(both, both, both, Kernel("linear"), np.repeat([[1, 2]], 4, axis=1)), questions)
    assert mixed["own query"].max() >= 1 and mixed["target pair"].max() >= 1
    assert all(values.max() == 0 for values in split.values())


def test_orthogonal_keys_answer_without_noise():
    eye = np.eye(4, dtype=np.float32)[None]
    head = Head(eye, eye, eye, Kernel("linear"))
    answers = head.answers(np.array([0]), eye[0, 1:2], np.array([3]))
    assert inverse_snr(answers, np.array([1])).tolist() == [0] and inverse_snr(answers).tolist() == [0]
    assert inverse_snr(answers, np.array([2]))[0] > 1e6
