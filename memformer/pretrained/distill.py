"""Distillation of a converted model: a student that carries its teacher, and the losses between them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_number
from memformer.core.segments import find_segments
from memformer.core.types import Array, Bool, Float, Int
from memformer.layers.base import State
from memformer.layers.positions import count_positions
from memformer.layers.sharding import auto_axes
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import MemoryLM, ModelOutput
from memformer.pretrained.convert import converted_layers

__all__ = ["Distillation", "Student", "TeacherWeight", "logit_divergence", "output_error"]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Weights of the losses between student and teacher.

    Attributes:
      logits: of `logit_divergence`.
      outputs: of `output_error`, averaged over the converted layers.
      temperature: divides the logits of both.

    Raises:
      ValueError: a negative weight, or a temperature that is not above 0.
    """

    logits: float = 1.0
    outputs: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        check_number("logits", self.logits, at_least=0)
        check_number("outputs", self.outputs, at_least=0)
        check_number("temperature", self.temperature, above=0)


class TeacherWeight(nnx.Variable):
    """A parameter of the teacher: no parameter of the student, so that nothing trains it."""


class Student(MemoryLM):
    """A language model that carries its teacher, and compares itself with it while it trains.

        aux = logits * KL(teacher, student) + outputs * mean over converted layers of |M h - A h|^2 / |A h|^2

    A is the teacher's attention layer with its input h in the teacher's run, M the student's layer in its place: every
    layer learns from the teacher's inputs, not from those that the student's earlier layers give. In evaluation mode
    the model is a plain `MemoryLM`. The teacher's weights are variables of their own type: checkpoints hold them.

    Args:
      config: of the student, from `convert_config`.
      vocab_size, num_classes: of both; see `MemoryLM`.
      teacher: config of the teacher.
      weights: of the losses.
      rngs: random streams.

    Source: outputs: arXiv 2410.10254 (LoLCATs) section 3.2, 2505.03005 (RADLADS) step 1; both as in MOHAWK, arXiv
    2408.10189; KL of logits: arXiv 1503.02531, 2408.15237.

    Example:
      >>> from memformer.pretrained import convert_config
      >>> teacher = LanguageModelConfig(memory="softmax_attention", width=8, heads=2)
      >>> config = convert_config(teacher, "gated_delta_rule")
      >>> student = Student(config, vocab_size=7, teacher=teacher, weights=Distillation(), rngs=nnx.Rngs(0))
      >>> student.train()
      >>> sorted(student(jnp.array([[1, 2, 3]])).aux)
      ['distill_logits', 'distill_outputs']
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        teacher: LanguageModelConfig,
        weights: Distillation,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocab_size=vocab_size, num_classes=num_classes, rngs=rngs)
        quiet = dataclasses.replace(teacher, dropout=0.0)
        inner = MemoryLM(quiet, vocab_size=vocab_size, num_classes=num_classes, rngs=rngs)
        self.structure, variables = nnx.split(inner)
        flat = nnx.to_flat_state(variables)
        self.paths = tuple(path for path, _ in flat)
        named = {".".join(map(str, path)): TeacherWeight(variable.get_value()) for path, variable in flat}
        self.teacher = nnx.Dict(named)
        self.weights, self.converted = weights, converted_layers(teacher, config)

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        read_at: Int[Array, "B"] | None = None,
    ) -> ModelOutput:
        """As `MemoryLM`; in training mode `aux` has the weighted losses besides."""
        where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
        output = super().__call__(inputs, **where, state=state, read_at=read_at)
        if self.deterministic or not self.paths or state is not None or read_at is not None:
            return output
        return output._replace(aux={**output.aux, **self._compare(inputs, output.logits, **where)})

    def release(self) -> None:
        """Drops the teacher; the model is then a plain one, to be saved or exported."""
        self.teacher, self.paths = nnx.Dict({}), ()

    def _compare(
        self, inputs: Array, logits: Array, segment_ids: Array | None, positions: Array | None
    ) -> dict[str, Array]:
        segments = find_segments(segment_ids, {})
        if positions is None:
            positions = count_positions(segments, (inputs.shape[0], inputs.shape[1]))
        valid = jnp.ones(inputs.shape, bool) if segments is None else segments.valid
        held = [lax.stop_gradient(self.teacher[".".join(map(str, path))].get_value()) for path in self.paths]
        teacher = nnx.merge(self.structure, nnx.from_flat_state(list(zip(self.paths, held, strict=True))))
        x = teacher.embed(inputs, positions, None)
        where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
        errors = []
        for i, block in enumerate(teacher.blocks):
            h, y, _ = block.read(x, None, **where)
            if i in self.converted and self.weights.outputs:
                errors.append(output_error(self.blocks[i].memory(h, **where)[0], y, valid))
            x, _ = block.add(x, y, None, segment_ids=segment_ids)
        aux = {}
        if errors:
            aux["distill_outputs"] = self.weights.outputs * sum(errors[1:], start=errors[0]) / len(errors)
        if self.weights.logits:
            divergence = logit_divergence(logits, teacher.read_out(x), valid, self.weights.temperature)
            aux["distill_logits"] = self.weights.logits * divergence
        return aux


def logit_divergence(
    student: Float[Array, "B T classes"],
    teacher: Float[Array, "B T classes"],
    valid: Bool[Array, "B T"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Mean over valid tokens of s^2 KL(softmax(teacher / s), softmax(student / s)) in nats, s the temperature.

    Example:
      >>> z = jnp.array([[[0.0, 1.0]]])
      >>> float(logit_divergence(z, z, jnp.ones((1, 1), bool)))
      0.0
    """
    wanted = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    found = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    divergence = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
    return temperature**2 * _mean(divergence, valid)


def output_error(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean square of the difference of two layers' outputs over that of the teacher's, over valid tokens.

    Example:
      >>> y = jnp.ones((1, 2, 4))
      >>> float(output_error(0.5 * y, y, jnp.ones((1, 2), bool)))
      0.25
    """
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    error = _mean(jnp.mean((student - teacher) ** 2, axis=-1), valid)
    return error / jnp.maximum(_mean(jnp.mean(teacher**2, axis=-1), valid), jnp.float32(1e-12))


def _mean(x: Array, valid: Array) -> Array:
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), jnp.float32(1))
    return jnp.sum(jnp.where(valid, x, jnp.zeros_like(x))) / count
