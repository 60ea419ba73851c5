"""Fields of Hugging Face configs and of ours: what both sides say, with every default written out."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from memformer.core.checks import check_choice
from memformer.layers.base import MemoryLayer
from memformer.layers.feedforward import FEEDFORWARDS
from memformer.layers.memory import known_options
from memformer.layers.positions import SCALINGS
from memformer.layers.table import MEMORIES
from memformer.models.config import LanguageModelConfig

__all__ = ["explicit", "memory_options", "read_rope", "require", "write_rope"]

# What a checkpoint does not fix: how a model is computed, not which function it is.
FREE = ("dtype", "param_dtype", "dropout", "remat", "scan_layers")
FREE_FEEDFORWARD = ("dispatch", "balance_weight")


def require(raw: Mapping[str, Any], **expected: Any) -> None:
    """Raises ValueError unless each of these fields of config.json is absent or has the expected value.

    Example:
      >>> require({"hidden_act": "gelu"}, hidden_act="silu")
      Traceback (most recent call last):
      ...
      ValueError: config.json's hidden_act must be one of 'silu', got 'gelu'
    """
    for name, value in expected.items():
        if raw.get(name) is not None:
            check_choice(f"config.json's {name}", raw[name], value if isinstance(value, tuple) else (value,))


def read_rope(raw: Mapping[str, Any], theta: float = 1e4, partial: float = 1.0) -> dict[str, Any]:
    """The rotary options of a config.json, which has them as rope_parameters, or as rope_theta and rope_scaling.

    Args:
      raw: contents of config.json.
      theta: default of rope_theta.
      partial: default of partial_rotary_factor.

    Raises:
      ValueError: a rope_type that `rotate` does not have.

    Example:
      >>> read_rope({"rope_theta": 5e5})["rope_theta"]
      500000.0
    """
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    # before "rope_type" the key was "type"
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_choice("config.json's rope_type", kind, ("default", *SCALINGS))
    scaling = None
    if kind != "default":
        scaling = {"rope_type": kind, **{name: rope.get(name) for name in SCALINGS[kind]}}
    return {
        "rotary": True,
        "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", theta))),
        "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", partial)),
        "rope_scaling": scaling,
    }


def write_rope(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that say the rotary options of a memory, in the form of transformers 4 and 5."""
    theta, scaling = options["rope_theta"], options["rope_scaling"]
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    if options["partial_rotary_factor"] != 1:
        rope["partial_rotary_factor"] = options["partial_rotary_factor"]
    # transformers 4 reads the fields outside of rope_parameters
    return {"rope_parameters": rope, "rope_theta": theta, **({"rope_scaling": dict(scaling)} if scaling else {})}


def memory_options(config: LanguageModelConfig, name: str) -> dict[str, Any]:
    """Every option of a memory of a model, sizes included, as plain values.

    Example:
      >>> config = LanguageModelConfig(memory="softmax_attention", width=64, heads=4)
      >>> memory_options(config, "softmax_attention")["groups"]
      4
    """
    row = MEMORIES[name]
    options: dict[str, Any] = {}
    for owner in (MemoryLayer, row.layer):
        for key, parameter in inspect.signature(owner.__init__).parameters.items():
            if key in known_options(name) and parameter.default is not inspect.Parameter.empty:
                options[key] = parameter.default
    sizes = {key: getattr(config, key) for key in ("heads", "key_width", "value_width")}
    options = {**options, **sizes, **row.options, **config.options_of(name)}
    heads = options["heads"]
    for key, default in (("key_width", config.width // heads), ("groups", heads), ("key_heads", heads)):
        if key in options and options[key] is None:
            options[key] = default
    if options["value_width"] is None:
        options["value_width"] = options["key_width"]
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in options.items()}


def explicit(config: LanguageModelConfig, hidden: int | None = None) -> dict[str, Any]:
    """The fields that fix the function a model computes, defaults written out: equal for equal functions.

    Args:
      config: of the model.
      hidden: hidden width of its feedforward layers, where the config leaves it out.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields = {key: value for key, value in fields.items() if key not in FREE}
    if config.positions != "learned":
        del fields["max_length"]
    for key in ("heads", "key_width", "value_width", *(() if config.dense_layers else ("dense_hidden",))):
        del fields[key]
    groups = config.depth // len(config.pattern)
    fields["memory"], fields["norm_place"] = config.pattern * groups, config.norm_places * groups
    fields["memory_options"] = {name: memory_options(config, name) for name in config.pattern}
    if config.feedforward is not None:
        parameters = inspect.signature(FEEDFORWARDS[config.feedforward].__init__).parameters
        defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        options = {**defaults, **({"hidden": hidden} if hidden else {}), **config.feedforward_options}
        fields["feedforward_options"] = {key: value for key, value in options.items() if key not in FREE_FEEDFORWARD}
    return fields
