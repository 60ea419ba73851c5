"""From a config to the pieces of a run: task, mesh, model, optimiser. Training and evaluation share them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from memformer.models import build_model
from memformer.tasks import Task, make_task
from memformer.training.config import RunError, run_errors, validate
from memformer.training.metrics import memory_pattern
from memformer.training.optimizer import make_optimizer
from memformer.training.sharding import make_mesh, mesh_scope
from memformer.training.step import Functional, make_functional

__all__ = ["Run", "build_run", "model_settings"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes, without arrays.

    Attributes:
      config: the config as plain dicts, what it left to this machine (`Task.settled`) decided.
      task: as configured (a curriculum trains at other lengths).
      mesh: over all devices.
      model: as pure functions.
      tx: optimiser.
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
    """Builds the pieces of a run.

    Args:
      config: plain nested dicts, the sections of `default_config`.
      task: instead of the config's, whose vocabulary it must share (a variant to evaluate).
      devices: of the mesh; None for all that are here (others can be compiled for).

    Raises:
      RunError: what no run can be built from, in one paragraph.
    """
    config = {name: config[name] for name in config}
    validate(config)
    with run_errors("config.task"):
        trained = make_task(config["task"])
        config["task"] = {**config["task"], **trained.settled}
    task = trained if task is None else task
    mesh = make_mesh(config["mesh"], devices)
    sizes = {"vocab_size": trained.vocab_size, "num_classes": trained.num_classes, "features": trained.features}
    settings = model_settings(config["model"])

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return build_model(settings, **sizes, rngs=rngs)

    with run_errors("config.model"), mesh_scope(mesh):
        model = make_functional(build)
    tx, schedule = make_optimizer(config["optimizer"], config["train"]["steps"])
    return Run(config, task, mesh, model, tx, schedule)


def model_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section as `build_model` takes it.

    `memory` becomes a name or the tuple of a pattern; `memory_options`, kept by memory name in a config,
    becomes those of the memories in use: one config file then serves every memory. The keys of other
    models than memory_lm pass as they are.

    Raises:
      RunError: options that are not kept by memory name.

    Example:
      >>> options = {"delta_rule": {"conv_width": 4}, "softmax_attention": {"rotary": True}}
      >>> model_settings({"memory": "delta_rule", "memory_options": options})
      {'memory': 'delta_rule', 'memory_options': {'conv_width': 4}}
    """
    settings = dict(model)
    if model.get("type", "memory_lm") != "memory_lm":
        return settings
    pattern = memory_pattern(model["memory"])
    by_name = model["memory_options"]
    for name, options in by_name.items():
        if not isinstance(options, Mapping):
            raise RunError(
                f"config.model.memory_options must hold a section of options for each memory by its name, such as "
                f"{{'{pattern[0]}': {{...}}}}, got {name} = {options!r}."
            )
    settings["memory"] = pattern[0] if len(pattern) == 1 else pattern
    used = {name: options for name, options in by_name.items() if name in pattern}
    settings["memory_options"] = used if len(pattern) > 1 else dict(used.get(pattern[0], {}))
    return settings
