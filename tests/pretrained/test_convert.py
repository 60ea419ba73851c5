"""Conversion between memories: mapped weights, first values, losses between student and teacher, user errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import LanguageModelConfig, MemoryLM
from memformer.pretrained import (
    Distillation,
    Student,
    convert_config,
    convert_memory,
    converted_layers,
    logit_divergence,
    output_error,
)
from tests.modules import random_module
from tests.numeric import assert_close

IDS = np.array([[1, 2, 3, 4, 5], [0, 0, 6, 2, 1]])
SEGMENTS = (IDS != 0).astype(np.int32)
ATTENTION = {"rotary": True, "groups": 1, "rope_theta": 500.0}


def build():
    fields = {"memory_options": ATTENTION, "width": 8, "depth": 2, "heads": 2, "feedforward": None}
    config = LanguageModelConfig("softmax_attention", **fields)
    return random_module(lambda: MemoryLM(config, vocab_size=7, rngs=nnx.Rngs(0)))


def run(function, *models):
    """function(*models), compiled."""
    graphs, states = zip(*map(nnx.split, models), strict=True)
    return jax.jit(lambda states: function(*map(nnx.merge, graphs, states)))(states)


def read(model):
    output = model(IDS, segment_ids=SEGMENTS)
    return output.logits, output.aux


def values(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


@pytest.fixture(scope="module")
def teacher():
    return build()


def test_a_memory_that_has_attention_as_a_case_starts_as_the_teacher(teacher):
    """Heads of grouped keys and values are repeated: with a decay of 1 fox is softmax attention."""
    student = convert_memory(teacher, "fox", options={"groups": 2}, rngs=nnx.Rngs(1))
    for block in student.blocks:
        assert_close(block.memory.decay.weights.bias[...], np.full(2, 6.0), 1e-6)
        block.memory.decay.weights.bias[...] = jnp.full(2, 40.0)
    assert_close(run(read, student), run(read, teacher), 1e-5)


def test_chosen_layers_are_converted_and_the_rest_is_the_teachers(teacher):
    student = convert_memory(teacher, "gated_delta_rule", layers=(1,), rngs=nnx.Rngs(1))
    assert student.config.pattern == ("softmax_attention", "gated_delta_rule")
    assert converted_layers(teacher.config, student.config) == (1,)
    old, new = values(teacher), values(student)
    for name, x in old.items():
        part = name.removeprefix("blocks.1.memory.projections.")
        wanted = np.tile(x, (1, 2)) if part in ("key.kernel", "value.kernel") else x
        np.testing.assert_array_equal(new[name], wanted)
    added = {name.removeprefix("blocks.1.memory."): x for name, x in new.items() if name not in old}
    assert set(added) == {
        "beta.weights.kernel", "beta.weights.bias", "decay.up.kernel", "decay.rate", "decay.bias", "norm.scale"
    }  # fmt: skip
    assert_close(jax.nn.sigmoid(added["beta.weights.bias"]), np.full(2, 0.9), 1e-6)
    assert not np.any(added["beta.weights.kernel"]) and not np.any(added["decay.rate"])
    assert student.blocks[1].memory.rope_theta == 500.0 and student.blocks[1].memory.convolutions is None


def test_students_forget_little_at_first(teacher):
    """Also RWKV-7, whose decay grows with its bias."""
    for memory in ("gla", "rwkv7"):
        student = convert_memory(teacher, memory, layers=(0,), rngs=nnx.Rngs(1))
        decay = run(lambda model: model.blocks[0].memory.decay(jnp.ones((1, 1, 8)))[0], student)
        assert np.min(decay) > np.log(0.99)


def test_options_of_the_students_memory(teacher):
    config = convert_config(teacher.config, "gated_delta_rule", options={"conv_width": 3})
    assert config.memory == "gated_delta_rule" and config.memory_options["conv_width"] == 3
    assert convert_config(teacher.config, "deltaformer").memory_options["groups"] == 1


def test_losses_over_valid_tokens():
    rng = np.random.default_rng(0)
    found, wanted = (rng.normal(size=(2, 5, 4)) for _ in range(2))
    valid = SEGMENTS.astype(bool)
    p, q = (np.exp(z / 2) / np.exp(z / 2).sum(-1, keepdims=True) for z in (wanted, found))
    want = 4 * np.mean(np.sum(p * np.log(p / q), axis=-1)[valid])
    # what stands in padding has no part
    found[~valid] = np.nan
    arrays = [jnp.asarray(x, jnp.float32) for x in (found, wanted)]
    assert_close(logit_divergence(*arrays, valid, 2.0), want, 1e-5)
    want = np.sum((found - wanted)[valid] ** 2) / np.sum(wanted[valid] ** 2)
    assert_close(output_error(*arrays, valid), want, 1e-5)


def test_a_student_is_compared_while_it_trains(teacher):
    config = convert_config(teacher.config, "retnet", layers=(0,))
    weights = Distillation(outputs=3.0)
    student = Student(config, vocab_size=7, teacher=teacher.config, weights=weights, rngs=nnx.Rngs(1))
    for name, x in values(teacher).items():
        student.teacher[name].set_value(x)
    student.train()

    def compare(teacher, student):
        logits, aux = read(student)
        valid = jnp.asarray(SEGMENTS != 0)
        # the first layer of both reads the teacher's embedding
        h = teacher.blocks[0].norm(teacher.embedding(IDS))
        y, found = (model.blocks[0].memory(h, segment_ids=SEGMENTS)[0] for model in (teacher, student))
        losses = {"distill_logits": logit_divergence(logits, read(teacher)[0], valid)}
        return aux, {**losses, "distill_outputs": 3 * output_error(found, y, valid)}

    assert_close(*run(compare, teacher, student), 1e-5)
    gone = [student, nnx.clone(student)]
    gone[0].eval()
    gone[1].release()
    assert all(jax.eval_shape(lambda model=model: read(model)[1]) == {} for model in gone)


MISTAKES = {
    "recurrent": ({}, ("lstm",), {}, "memory must be one of 'fox', .*got 'lstm'"),
    "out of range": ({}, ("gla",), {"layers": (2,)}, r"layers must be in \[0, 2\), got 2"),
    "none": ({"memory": "gla", "memory_options": {}}, ("kda",), {}, "indices of layers with softmax attention"),
    "other layers": ({"memory": "gla", "memory_options": {}}, ("kda",), {"layers": (0,)}, "got '0 .gla.'"),
    "scanned": ({"scan_layers": True}, ("gla",), {}, "one whose layers are not scanned"),
    "twice": (
        {"memory": ("gla", "softmax_attention"), "memory_options": {}}, ("gla",), {}, "one that no other layer has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors(mistake):
    fields, arguments, options, message = MISTAKES[mistake]
    config = LanguageModelConfig(**{"memory": "softmax_attention", "depth": 2, **fields})
    with pytest.raises(ValueError, match=message):
        convert_config(config, *arguments, **options)


def test_projections_that_do_not_fit(teacher):
    with pytest.raises(ValueError, match="blocks.0.memory.projections.key.kernel must be of shape"):
        convert_memory(teacher, "delta_product", options={"steps": 3}, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        Distillation(temperature=0)
