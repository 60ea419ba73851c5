"""Builds the parts of a run from its config: task, mesh, model, optimizer. Training and evaluation share them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from memformer.core.checks import check
from memformer.layers import MEMORIES, add_lora
from memformer.layers.recurrent import RecurrentMemory
from memformer.models import build_model
from memformer.tasks import Task
from memformer.training.config import RunError, complete_config, run_errors, task_of
from memformer.training.distill import build_student
from memformer.training.metrics import memory_pattern
from memformer.training.optimizer import check_rate_factors, frozen_names, make_optimizer
from memformer.training.sharding import make_mesh, mesh_scope
from memformer.training.step import Functional, make_functional
from memformer.training.validate import validate

__all__ = ["Run", "build_run", "model_settings"]


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, without arrays.

    Attributes:
      config: the complete config as plain dicts, with machine-dependent choices (`Task.resolved`) made explicit.
      task: the task as configured (a curriculum trains at other lengths).
      mesh: mesh over all devices.
      model: the model as pure functions.
      tx: optimizer.
      schedule: learning rate by step.
    """

    config: dict[str, Any]
    task: Task
    mesh: Mesh
    model: Functional
    tx: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]


def build_run(
    config: Mapping[str, Any], *, task: Task | None = None, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Builds the parts of a run.

    Args:
      config: nested dicts with the sections of `default_config`; missing keys get their defaults.
      task: replaces the config's task, with the same vocabulary (a variant to evaluate).
      devices: devices of the mesh; None for all of this machine.

    Raises:
      RunError: a config from which no run can be built.
    """
    plain: dict[str, Any] = complete_config(config).to_dict()
    validate(plain)
    with run_errors("config.task"):
        trained = task_of(plain)
    with run_errors("config"):
        for key, value in trained.resolved.items():
            plain["data" if key in trained.data_fields else "task"][key] = value
    task = trained if task is None else task
    mesh = make_mesh(plain["mesh"], devices)
    _check_context(plain["model"], mesh.shape["context"])
    sizes = {"vocab_size": trained.vocab_size, "num_classes": trained.num_classes, "features": trained.features}
    if vocab := plain["vocab_size"]:
        with run_errors("config"):
            least = max(trained.vocab_size, trained.num_classes)
            check(trained.vocab_size > 0 and vocab >= least, "vocab_size", f"0 or at least the task's {least}", vocab)
        sizes |= {"vocab_size": vocab, "num_classes": vocab}
    settings, lora = model_settings(plain["model"]), plain["lora"]

    def build(rngs: nnx.Rngs) -> nnx.Module:
        if plain["distill"]["teacher"]:
            module: nnx.Module = build_student(plain["distill"], settings, sizes, rngs)
        else:
            module = build_model(settings, **sizes, rngs=rngs)
        if lora["rank"]:
            with run_errors("config.lora"):
                add_lora(module, **lora, rngs=rngs)
        return module

    with run_errors("config.model"), mesh_scope(mesh):
        model = make_functional(build)
    horizon = plain["optimizer"]["schedule_steps"] or plain["train"]["steps"]
    plain["optimizer"] = {**plain["optimizer"], "schedule_steps": horizon}
    with run_errors("config"):
        model = dataclasses.replace(model, frozen=frozen_names(plain, model.params))
        check_rate_factors(plain["optimizer"], model.trained(model.params))
    tx, schedule = make_optimizer(plain["optimizer"], horizon)
    return Run(plain, task, mesh, model, tx, schedule)


# Models that run one step after the other; of memory_lm those whose memory does.
STEPWISE = ("armt", "rmt", "seq2seq", "ntm", "recurrent_lm")


def _check_context(model: Mapping[str, Any], size: int) -> None:
    """Raises RunError where a mesh has time on several devices and the model cannot divide it."""
    kind = model.get("type", "memory_lm")
    names = [kind] if kind in STEPWISE else []
    if kind == "memory_lm":
        pattern = memory_pattern(model["memory"])
        names = [name for name in pattern if name in MEMORIES and issubclass(MEMORIES[name].layer, RecurrentMemory)]
    if size > 1 and names:
        raise RunError(
            f"config.mesh.context = {size} divides time over devices, which {names[0]} cannot: every step needs the "
            "whole state of the step before. Set --config.mesh.context=1 and --config.mesh.data or --config.mesh.fsdp, "
            "which divide the batch."
        )


def model_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the `model` section to the options of `build_model`.

    `memory` becomes a name or a tuple of names. `memory_options`, which a config keeps by memory name so that one file
    serves every memory, is reduced to the memories in use. Options of models other than memory_lm are unchanged.

    Raises:
      RunError: memory_options that are not sections by memory name.

    Example:
      >>> options = {"delta_rule": {"conv_width": 4}, "softmax_attention": {"rotary": True}}
      >>> model_settings({"memory": "delta_rule", "memory_options": options})
      {'memory': 'delta_rule', 'memory_options': {'conv_width': 4}}
    """
    settings = {key: value for key, value in model.items() if key != "preset"}
    if model.get("type", "memory_lm") != "memory_lm":
        return settings
    pattern = memory_pattern(model["memory"])
    by_name = model["memory_options"]
    for name, options in by_name.items():
        if not isinstance(options, Mapping):
            raise RunError(
                f"config.model.memory_options must have one section of options per memory name, such as "
                f"{{'{pattern[0]}': {{...}}}}, got {name} = {options!r}."
            )
    settings["memory"] = pattern[0] if len(pattern) == 1 else pattern
    used = {name: options for name, options in by_name.items() if name in pattern}
    settings["memory_options"] = used if len(pattern) > 1 else dict(used.get(pattern[0], {}))
    return settings
