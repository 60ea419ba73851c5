"""Runs that distil a teacher: the student's config and first weights, and the model that carries the teacher."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from memformer.core.checks import check
from memformer.models import LanguageModelConfig, build_config
from memformer.pretrained import (
    Distillation,
    Student,
    convert_config,
    convert_parameters,
    read_model_config,
    read_parameters,
)
from memformer.training.initial import KEPT, apply_pretrained, place, plain, write_model

__all__ = ["DISTILL", "apply_start", "apply_teacher", "build_student", "start_student"]

# Section `distill` of a run's config.
DISTILL: dict[str, Any] = {
    # folder of the teacher, a run of train.py or a pretrained model in the Hugging Face format; "" = no distillation
    "teacher": "",
    # memory of the student in the place of the teacher's softmax attention, and options of it
    "memory": "gated_delta_rule",
    "memory_options": {},
    # layers that are converted, such as (0, 2); () = all with softmax attention
    "layers": (),
    # weights of the losses beside the task's own: divergence of the logits, error of the outputs of converted layers
    "logits": 1.0,
    "outputs": 1.0,
    "temperature": 1.0,
    # the teacher's config, written when the run starts
    "teacher_config": "",
}


def apply_start(config: ml_collections.ConfigDict) -> None:
    """Writes the model that `init_from` or `distill.teacher` names into the config of a run that has not started.

    A run that has started keeps its model in its own config.

    Raises:
      RunError: a folder that cannot be used.
    """
    # config.py imports this module
    from memformer.training.config import run_errors

    if config.init_from and not config.vocab_size:
        with run_errors("config.init_from"), config.unlocked():
            apply_pretrained(config, config.init_from)
    if config.distill.teacher and not config.distill.teacher_config:
        with run_errors("config.distill"), config.unlocked():
            apply_teacher(config)


def apply_teacher(config: ml_collections.ConfigDict) -> None:
    """Writes a student of `distill.teacher` into section `model`, and the teacher's config beside it.

    Raises:
      ValueError: a folder that is neither a run nor a pretrained model, or a model that cannot be converted.
    """
    distill = config.distill
    check(not config.init_from, "init_from", "empty where distill.teacher is given", config.init_from)
    check(config.model.type == "memory_lm", "model.type", "'memory_lm' where a teacher is given", config.model.type)
    _weights(distill)
    teacher, vocab = _read_config(distill.teacher)
    teacher = dataclasses.replace(teacher, **{name: config.model[name] for name in KEPT})
    student = convert_config(
        teacher, distill.memory, layers=tuple(distill.layers) or None, options=distill.memory_options.to_dict()
    )
    write_model(config, student)
    config.vocab_size = vocab
    fields = {field.name: plain(getattr(teacher, field.name)) for field in dataclasses.fields(teacher)}
    distill.teacher_config = json.dumps(fields)


def build_student(
    distill: Mapping[str, Any], settings: Mapping[str, Any], sizes: Mapping[str, Any], rngs: nnx.Rngs
) -> Student:
    """Builds the model of a run that distils.

    Args:
      distill: section of the config.
      settings: of the student, as `memformer.models.build_config` takes them.
      sizes: vocab_size, num_classes and features of the task.
      rngs: random streams.

    Raises:
      ValueError: a task with other inputs than ids.
    """
    check(not sizes["features"], "task", "one whose inputs are ids, where distill.teacher is given", "features")
    config: Any = build_config(settings)[1]
    shape = {"vocab_size": sizes["vocab_size"], "num_classes": sizes["num_classes"]}
    return Student(config, **shape, teacher=_teacher_config(distill), weights=_weights(distill), rngs=rngs)


def start_student(config: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The train state at step 0 of a run that distils: the teacher's weights, and the student's made of them.

    Args:
      config: of the run; without a teacher the state is left as it is.
      state: from `init_state`.

    Raises:
      ValueError: weights that do not fit the model.
    """
    # build.py imports this module
    from memformer.training.build import model_settings

    distill = config["distill"]
    if not distill["teacher"]:
        return state
    student: Any = build_config(model_settings(config["model"]))[1]
    given, rest = _read_weights(distill["teacher"]), dict(state["rest"])
    converted = convert_parameters(_teacher_config(distill), student, given, state["params"])
    params = {name: place(x, state["params"][name]) for name, x in converted.items()}
    for name, old in rest.items():
        found = given.get(name.removeprefix("teacher."))
        shape = None if found is None else found.shape
        check(shape == old.shape, f"{name} of {distill['teacher']}", f"of shape {old.shape} by the run's config", shape)
        rest[name] = place(found, old)
    state = {**state, "params": params, "rest": rest}
    if "ema" in state:
        # a copy: the step donates both
        state["ema"] = {name: jnp.array(params[name], jnp.float32, copy=True) for name in state["ema"]}
    return state


def _weights(distill: Mapping[str, Any]) -> Distillation:
    return Distillation(**{name: distill[name] for name in ("logits", "outputs", "temperature")})


def _teacher_config(distill: Mapping[str, Any]) -> LanguageModelConfig:
    # JSON has no tuples
    read = json.loads(distill["teacher_config"])
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in read.items()}
    return LanguageModelConfig(**fields)


def _is_run(folder: str) -> bool:
    path = pathlib.Path(folder, "config.json")
    return path.is_file() and {"model", "task"} <= json.loads(path.read_text()).keys()


def _read_config(folder: str) -> tuple[LanguageModelConfig, int]:
    """The teacher's config, and the number of its ids, 0 for that of the task."""
    if not _is_run(folder):
        return read_model_config(folder)
    from memformer.training.build import model_settings

    raw = json.loads(pathlib.Path(folder, "config.json").read_text())
    kind, config = build_config(model_settings(raw["model"]))
    check(kind == "memory_lm", "teacher", "a run with model.type = 'memory_lm'", kind)
    return config, raw["vocab_size"]  # type: ignore[return-value]


def _read_weights(folder: str) -> dict[str, Any]:
    if not _is_run(folder):
        return dict(read_parameters(folder))
    from memformer.training.evaluation import load_run

    params, rest = load_run(folder).weights
    return {name: jax.device_get(x) for name, x in (*params.items(), *rest.items())}
