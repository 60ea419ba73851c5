"""The run config: every key with its default, checks, and overrides whose typos are errors.

The sections are `task` and `model` (fields of the dataclass that the section's `name` or `type` selects), `data`
(those fields of the task that say where stored data are), `lora`, `distill`, `optimizer`, `train`, `mesh` and
`checkpoint`. A file of configs/ starts from `default_config()` and overrides.
"""

import ast
import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections import config_dict

from memformer.core.checks import check_choice
from memformer.layers.feedforward import FEEDFORWARDS, feedforward_keys
from memformer.layers.memory import known_options
from memformer.layers.table import MEMORIES
from memformer.models import MODELS, preset_fields
from memformer.tasks import TASKS, Task, import_tasks, make_task
from memformer.training.distill import DISTILL, apply_start

__all__ = [
    "RunError",
    "add_options",
    "apply_preset",
    "complete_config",
    "default_config",
    "drop_options",
    "run_errors",
    "set_values",
    "task_of",
    "unknown_key",
]


class RunError(ValueError):
    """User error: one paragraph with what was expected, what was given and what to do."""


def default_config(
    model: str = "memory_lm", task: str = "swap", *, preset: str | None = None
) -> ml_collections.ConfigDict:
    """Returns the locked config of a run: every key with its default.

    Args:
      model: a name in `memformer.models.MODELS`; section `model` has the fields of its config.
      task: a name in `memformer.tasks.TASKS`; section `task` has the fields of its dataclass.
      preset: a name in `memformer.models.PRESETS`, for memory_lm.

    Raises:
      RunError: an unknown name.

    Example:
      >>> config = default_config(task="mqar")
      >>> config.optimizer.schedule, config.task.pairs
      ('cosine', 4)
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    # module that registers the task, for one from outside the package
    config.task_module = ""
    # folder of a pretrained model in the Hugging Face format, whose config and weights a new run takes; "" = none
    config.init_from = ""
    # number of ids of the model, at least those of the task; 0 = those of the task
    config.vocab_size = 0
    # low-rank changes of the linear maps whose paths have one of `targets`, all else frozen; rank 0 = none
    config.lora = ml_collections.ConfigDict({"rank": 0, "alpha": 16.0, "targets": "query, value"})
    config.distill = ml_collections.ConfigDict(DISTILL)
    config.task, config.data = _task_sections(task)
    config.model = _model_section(model)
    config.optimizer = ml_collections.ConfigDict(
        {
            # adamw | muon: Muon for the matrices inside the model, AdamW for the rest
            "name": "adamw",
            "learning_rate": 1e-3,
            # constant | cosine | warmup_stable_decay | rsqrt | exponential
            "schedule": "cosine",
            # steps that cosine and warmup_stable_decay span; None = train.steps of the first start of the run
            "schedule_steps": config_dict.placeholder(int),
            "warmup_steps": 0,
            # cosine and warmup_stable_decay end at this fraction of the learning rate
            "end_factor": 0.1,
            # warmup_stable_decay: fraction of the steps that decay
            "decay_fraction": 0.2,
            # exponential: multiplied by `step_factor` every `step_every` steps
            "step_factor": 0.7,
            "step_every": 500,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            # muon: decay of its average of the gradients
            "momentum": 0.95,
            # factors of the learning rate by a word of the parameters' paths, such as "embedding:0.5, decay:0.1"
            "rate_factors": "",
            # patterns in the paths of parameters that stay as they are, such as r"embedding, blocks\.[01]\."
            "freeze": "",
            "weight_decay": 0.01,
            # maximum global norm of the gradient; 0 = no clipping
            "clip_norm": 1.0,
            # decay of the moving average of the parameters that evaluation uses; 0 = no average
            "ema": 0.0,
        }
    )
    config.train = _train_section()
    # one axis may be -1: the devices that the others leave; slices are outer data, 0 = as TPUs report
    config.mesh = ml_collections.ConfigDict(
        {"data": -1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, "slices": 0}
    )
    config.checkpoint = ml_collections.ConfigDict({"keep_last": 2, "keep_best": 1})
    if preset is not None:
        apply_preset(config, preset)
    return config.lock()


def _task_sections(name: str) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """Sections `task` and `data`, which the fields of the task's dataclass share."""
    if name not in TASKS:
        raise RunError(
            f"config.task.name must be one of {', '.join(TASKS)}, got {name!r}. A task of your own is registered "
            "by the module that you give as --task_module=MODULE."
        )
    task, data = _section({"name": name}, TASKS[name]), ml_collections.ConfigDict()
    for key in TASKS[name].data_fields:
        data[key] = task.get_ref(key)
        del task[key]
    return task, data


def task_of(config: Mapping[str, Any]) -> Task:
    """Builds the task of a run's config, from its sections `task` and `data`.

    Raises:
      ValueError: an option that the task does not have, or rejects.
    """
    return make_task({**config["task"], **config.get("data", {})})


def _model_section(name: str) -> ml_collections.ConfigDict:
    with run_errors("config"):
        check_choice("model.type", name, tuple(MODELS))
    # a preset is written into the other keys when it is set, so that a config always shows the sizes in use
    own = {"type": name, "preset": config_dict.placeholder(str)} if name == "memory_lm" else {"type": name}
    return _section(own, MODELS[name][0])


def _section(own: Mapping[str, Any], shape: type) -> ml_collections.ConfigDict:
    """The keys of `own`, then one typed key per field of the dataclass `shape`."""
    section = ml_collections.ConfigDict(own)
    hints = typing.get_type_hints(shape)
    for field in dataclasses.fields(shape):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        section[field.name] = _typed(default, hints[field.name])
    return section


def _typed(default: Any, hint: Any) -> Any:
    """The default as ml_collections stores it: optional fields accept None, unions any type."""
    if isinstance(default, Mapping):
        return dict(default)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    optional = type(None) in typing.get_args(hint)
    if typing.get_origin(hint) is tuple or not (kinds or optional):
        return default
    kind = kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else object
    return config_dict.FieldReference(default, field_type=kind)


def _train_section() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "steps": 1000,
            "batch_size": 64,
            # micro-batches per step: same gradient, less memory
            "accumulate": 1,
            # processes per host that make the batches; 0 = a thread
            "input_workers": 0,
            # weight of the uniform distribution in the targets of the training loss
            "label_smoothing": 0.0,
            "log_every": 10,
            # 0 = only at the end, as for checkpoints
            "eval_every": 100,
            # 0 = each example of a stored split once
            "eval_batches": 4,
            "checkpoint_every": 500,
            # stop when training and held-out accuracy reach it; 0 = never
            "stop_accuracy": 0.0,
            # abort | skip: what to do with a step whose loss or gradient is not finite
            "on_nan": "abort",
            # skip: so many skipped steps in a row stop the run with an error
            "max_skips": 20,
            "curriculum": {"enabled": False, "start": 32, "stop": 256, "factor": 2, "accuracy": 0.99},
            # lengths of the final table; () = the task's own length
            "final_lengths": (),
            # as eval_batches
            "final_batches": 8,
            # trace of steps (first, last), counted from 1, to <workdir>/profile; (0, 0) = none
            "profile": (0, 0),
            # folder of compiled programs shared between runs; "" = none
            "compile_cache": "",
            "tensorboard": True,
            # project at Weights & Biases (package wandb); "" = none
            "wandb": "",
            "progress": True,
        }
    )


def complete_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a locked config with every key: those of `config`, and defaults for the rest.

    A `model.preset` in `config` replaces the model's defaults; values of `config` that differ from them stay.

    Raises:
      RunError: a key that no such run has, or a value of another type than its default.

    Example:
      >>> complete_config({"task": {"name": "swap", "length": 8}}).task.objects
      5
    """
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    model, task = plain.get("model", {}), plain.get("task", {})
    name, module = task.get("name", "swap"), plain.get("task_module")
    unknown = {*(names.split(",") if isinstance(names := model.get("memory") or (), str) else names)} - {*MEMORIES}
    if module and (unknown or name not in TASKS):
        with run_errors("config"):
            import_tasks(module)
    whole = default_config(model.get("type", "memory_lm"), name)
    default = whole.model.to_dict()
    with whole.unlocked():
        _merge(whole, plain, "config")
    preset = whole.model.get("preset")
    if preset is not None:
        given = [f"model.{key}" for key, value in whole.model.to_dict().items() if value != default[key]]
        apply_preset(whole, preset, given)
    apply_start(whole)
    return whole


def _merge(section: ml_collections.ConfigDict, values: Mapping[str, Any], prefix: str, known: bool = True) -> None:
    """Sets `values` in place; `known` = False accepts new keys (options, which the layer that takes them checks)."""
    for key, value in values.items():
        path = f"{prefix}.{key}"
        if known and key not in section:
            raise RunError(unknown_key(section, key, prefix) or "")
        if isinstance(value, Mapping):
            if not isinstance(section.get(key), ml_collections.ConfigDict):
                section[key] = {}
            _merge(section[key], value, path, known and not key.endswith("_options"))
            continue
        try:
            # None has no type: a placeholder accepts a first value of any type
            new = config_dict.placeholder(object) if value is None and key not in section else value
            section[key] = _cast(new, section, key)
        except TypeError as error:
            raise RunError(f"{path} cannot be {value!r}: {error}") from error


def _cast(value: Any, section: ml_collections.ConfigDict, key: str) -> Any:
    """The value in the type of its key where that loses nothing: 1e3 for a whole number, a list for a tuple."""
    kind = section.get_type(key) if key in section else None
    if isinstance(value, np.generic):
        value = value.item()
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        items = [item.item() if isinstance(item, np.generic) else item for item in value]
        return tuple(items) if kind is tuple else type(value)(items)
    return value


def apply_preset(config: ml_collections.ConfigDict, name: str, given: Sequence[str] = ()) -> None:
    """Writes the fields of a preset into section `model`, except the dotted keys in `given`.

    Raises:
      RunError: an unknown preset, or a model that has none.
    """
    with run_errors("config.model.preset"):
        fields = preset_fields(name)
    if "preset" not in config.model:
        raise RunError(f"config.model.preset must be None for model {config.model.type!r}, got {name!r}.")
    for key, value in fields.items():
        if f"model.{key}" not in given:
            config.model[key] = value
    config.model.preset = None


def add_options(config: ml_collections.ConfigDict) -> set[str]:
    """Adds every option of every memory and feedforward layer, unset; returns the dotted keys added.

    A locked config then accepts overrides of them. `drop_options` removes those that stayed unset.
    """
    model, added = config.model, set()
    known: dict[tuple[str, ...], tuple[str, ...]] = {("memory_options", name): known_options(name) for name in MEMORIES}
    keys = tuple(dict.fromkeys(key for name in FEEDFORWARDS for key in feedforward_keys(name)))
    known[("feedforward_options",)] = keys
    with config.unlocked():
        for path, options in known.items():
            if path[0] not in model:
                continue
            section = model[path[0]]
            if len(path) > 1:
                section[path[1]] = section.get(path[1], ml_collections.ConfigDict())
                section = section[path[1]]
            for key in options if isinstance(section, ml_collections.ConfigDict) else ():
                if key not in section:
                    section[key] = config_dict.placeholder(object)
                    added.add(".".join(("model", *path, key)))
    return added


def drop_options(config: ml_collections.ConfigDict, keys: set[str]) -> None:
    """Removes the options `keys` (dotted) from section `model`, and sections that this leaves empty."""
    with config.unlocked():
        for path in keys:
            *parents, last = path.split(".")
            holder = config
            for name in parents:
                holder = holder[name]
            del holder[last]
        sections = config.model.get("memory_options", {})
        for name, section in list(sections.items()):
            if isinstance(section, ml_collections.ConfigDict) and not section:
                del sections[name]


def unknown_key(config: Mapping[str, Any], path: str, prefix: str = "config") -> str | None:
    """Returns the error message for a dotted `path` that is not in `config`, or None if it is there.

    Example:
      >>> unknown_key({"train": {"steps": 1, "log_every": 2}}, "train.step")
      'config.train has no key step (from config.train.step); did you mean steps? It has: log_every, steps.'
    """
    at, here = prefix, config
    for part in path.split("."):
        if not isinstance(here, (Mapping, ml_collections.ConfigDict)):
            return f"{at} is a value, not a section, so {prefix}.{path} cannot be set; set {at} itself."
        if part not in here:
            near = difflib.get_close_matches(part, list(here), 3, 0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            return f"{at} has no key {part} (from {prefix}.{path}){hint} It has: {', '.join(sorted(here))}."
        at, here = f"{at}.{part}", here[part]
    return None


def set_values(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Applies assignments such as "task.objects=6" in place.

    Raises:
      RunError: an unknown key, or a value of another type.

    Example:
      >>> config = default_config()
      >>> set_values(config, ["train.steps=20"])
      >>> config.train.steps
      20
    """
    added = add_options(config)
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign:
            raise RunError(f"settings (--set) must be of the form key=value, such as task.length=64, got {text!r}.")
        message = unknown_key(config, path)
        if message:
            raise RunError(message)
        *parents, last = path.split(".")
        section = config
        for name in parents:
            section = section[name]
        try:
            section[last] = _cast(_literal(value), section, last)
        except (TypeError, ValueError) as error:
            raise RunError(f"config.{path} cannot be set to {value!r}: {error}") from error
        if path == "model.preset":
            apply_preset(config, section[last])
        added.discard(path)
    drop_options(config, added)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextlib.contextmanager
def run_errors(what: str) -> Iterator[None]:
    """Turns a ValueError or OSError of the enclosed set-up into a `RunError` that starts with `what`."""
    try:
        yield
    except RunError:
        raise
    except (ValueError, OSError) as error:
        raise RunError(f"{what}: {error}") from error
