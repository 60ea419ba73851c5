"""Signal to noise inside models: heads answer as their layer does, and the choice of the signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.similarity import Kernel
from memformer.lab.snr_trained import Head, inverse_snr, read_heads
from memformer.layers.memory import build_memory

BARE = {"output_norm": False, "unit_queries": True}


@pytest.mark.parametrize(
    ("name", "options"), [("softmax_attention", {}), ("delta_rule", BARE), ("deltaformer", {"conv_width": 2})]
)
def test_heads_answer_as_the_layer_does(name, options):
    layer = build_memory(name, 8, heads=2, options=options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    outputs = []
    for head in read_heads(layer, x):
        answers = head.answers(head.queries[:, 4], np.array([4, 4])).sum(axis=1)
        if head.kernel.normalized:
            scores = np.einsum("bk,btk->bt", head.queries[:, 4], head.keys[:, :5]) / 2
            answers /= np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)
        else:
            # the op's scale
            answers /= 2
        outputs.append(answers)
    want, got = nnx.jit(lambda layer, x, read: (layer(x)[0][:, 4], layer.out(read)))(layer, x, np.hstack(outputs))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_other_memories_are_refused():
    layer = build_memory("gla", 8, heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="softmax_attention, delta_rule and deltaformer, got LinearAttention"):
        read_heads(layer, jnp.ones((1, 3, 8)))


def test_orthogonal_keys_answer_without_noise():
    eye = np.eye(4, dtype=np.float32)[None]
    head = Head(eye, eye, eye, Kernel("linear"))
    answers = head.answers(eye[0, 1:2], np.array([3]))
    assert inverse_snr(answers, np.array([1])).tolist() == [0] and inverse_snr(answers).tolist() == [0]
    assert inverse_snr(answers, np.array([2]))[0] > 1e6
