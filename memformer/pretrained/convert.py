"""Conversion between memories: the weights of softmax attention as the start of a student with another memory.

As published hybrids are made: projections to queries, keys, values and output are mapped (Mamba in the Llama, arXiv
2408.15237; RADLADS, arXiv 2505.03005, step 0), what the new memory has besides starts near the identity, and the
student is distilled (`memformer.pretrained.Student`).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from memformer.core.checks import check, check_choice
from memformer.core.types import Array, Float
from memformer.layers.base import MemoryLayer
from memformer.layers.cached import DeltaFormer, SoftmaxAttention
from memformer.layers.erasing import RWKV7
from memformer.layers.memory import known_options
from memformer.layers.table import MEMORIES
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import MemoryLM

__all__ = ["convert_config", "convert_memory", "convert_parameters", "converted_layers"]

# Options that a student takes over from the attention it replaces, where its memory has them.
CARRIED = (
    "heads", "key_width", "value_width", "groups", "window", "qk_norm", "norm_epsilon", "zero_centered_norm",
    "qkv_bias", "out_bias", "rotary", "rope_theta", "partial_rotary_factor", "rope_scaling", "output_gate",
    "output_gate_rank",
)  # fmt: skip

# Options of students in the place of those in `MEMORIES`: nothing that stands between the mapped weights and the op.
FIXED = {"conv_width": 0, "output_gate": None, "key_heads": None}

# DeltaFormer with the teacher's keys and softmax writes: with a small beta it is softmax attention.
FAMILIES: dict[Any, dict[str, Any]] = {DeltaFormer: {"unit_keys": False, "write_kernel": "softmax", "beta_limit": 1.0}}

PROJECTIONS = ("projections.query", "projections.key", "projections.value", "out")


def convert_memory(
    model: MemoryLM,
    memory: str = "gated_delta_rule",
    *,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
) -> MemoryLM:
    """A student: the model with another memory in the place of softmax attention.

    Embeddings, norms, feedforward layers and the layers that are not converted are the model's. Of converted layers the
    projections to q, k, v and output are (heads of grouped keys and values repeated where the student has none); what
    the student has besides starts near the identity: beta 0.9 (0.01 in DeltaFormer), little decay, taps of convolutions
    that pass the token itself. A student with memory "fox" or "deltaformer" starts as the model, others near it.

    Args:
      model: with softmax attention in the layers to convert, not scanned.
      memory: a name in `MEMORIES` whose layer projects to q, k and v.
      layers: indices of the layers to convert; None is all with softmax attention.
      options: options of the student's memory, besides those taken over (positions, norms of q and k, biases, sizes).
      rngs: for new parameters.

    Raises:
      ValueError: layers or a memory that cannot be converted, or options that do not fit.

    Source: arXiv 2408.15237, 2408.10189 (MOHAWK), 2410.10254 (LoLCATs), 2505.03005 (RADLADS).

    Example:
      >>> config = LanguageModelConfig(memory="softmax_attention", width=8, depth=2, heads=2)
      >>> teacher = MemoryLM(config, vocab_size=7, rngs=nnx.Rngs(0))
      >>> student = convert_memory(teacher, "gated_delta_rule", layers=(0,), rngs=nnx.Rngs(1))
      >>> student.config.memory
      ('gated_delta_rule', 'softmax_attention')
    """
    config = convert_config(model.config, memory, layers=layers, options=options)
    student = MemoryLM(config, vocab_size=model.vocab_size, num_classes=model.num_classes, rngs=rngs)
    state = nnx.state(student, nnx.Not(nnx.RngState))
    fresh, flat = _values(student), dict(nnx.to_flat_state(state))
    converted = convert_parameters(model.config, config, _values(model), fresh)
    for path, variable in flat.items():
        name = ".".join(map(str, path))
        flat[path] = variable.replace(jnp.asarray(converted[name], fresh[name].dtype))
    nnx.update(student, nnx.from_flat_state(list(flat.items())))
    return student


def convert_config(
    config: LanguageModelConfig,
    memory: str,
    *,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LanguageModelConfig:
    """The config of a student; arguments and errors are those of `convert_memory`.

    Example:
      >>> config = LanguageModelConfig(memory="softmax_attention", depth=2, memory_options={"groups": 2})
      >>> student = convert_config(config, "gated_delta_rule")
      >>> student.memory, "groups" in student.memory_options, student.memory_options["rotary"]
      ('gated_delta_rule', False, True)
    """
    check_choice("memory", memory, tuple(name for name in MEMORIES if _convertible(name)))
    check(not config.scan_layers, "model", "one whose layers are not scanned", "scan_layers = True")
    names = [config.pattern[i % len(config.pattern)] for i in range(config.depth)]
    attention = [i for i, name in enumerate(names) if MEMORIES[name].layer is SoftmaxAttention]
    chosen = attention if layers is None else layers
    check(len(chosen) > 0, "layers", "indices of layers with softmax attention", layers)
    known = known_options(memory)
    given: dict[str, Any] = {}
    for i in chosen:
        check(0 <= i < config.depth, "layers", f"in [0, {config.depth})", i)
        source = MEMORIES[names[i]]
        held = {**source.options, **config.options_of(names[i])}
        usable = source.layer is SoftmaxAttention and held.get("latent_rank") is None
        check(usable, "layers", "layers with softmax attention, without latents", f"{i} ({names[i]})")
        carried = {key: held[key] for key in CARRIED if key in held and key in known}
        check(not given or given == carried, "layers", "layers whose attention has one set of options", layers)
        given = carried
    kept = [name for i, name in enumerate(names) if i not in set(chosen)]
    check(memory not in kept, "memory", "one that no other layer has", memory)
    family = FAMILIES.get(MEMORIES[memory].layer, {})
    fixed = {key: value for key, value in FIXED.items() if key in known}
    new = [memory if i in set(chosen) else name for i, name in enumerate(names)]
    places = [config.norm_places[i % len(config.norm_places)] for i in range(config.depth)]
    size = next(n for n in range(1, len(new) + 1) if _repeats(new, n) and _repeats(places, n))
    by_name = {name: dict(config.options_of(name)) for name in kept}
    by_name[memory] = {**fixed, **family, **given, **(options or {})}
    pattern = tuple(new[:size])
    return dataclasses.replace(
        config,
        memory=pattern if len(pattern) > 1 else pattern[0],
        memory_options=FrozenDict(by_name if len(set(pattern)) > 1 else by_name[pattern[0]]),
        norm_place=tuple(places[:size]) if len(set(places)) > 1 else places[0],
    )


def converted_layers(teacher: LanguageModelConfig, student: LanguageModelConfig) -> tuple[int, ...]:
    """The layers whose memories differ."""

    def name(config: LanguageModelConfig, i: int) -> str:
        return config.pattern[i % len(config.pattern)]

    return tuple(i for i in range(teacher.depth) if name(teacher, i) != name(student, i))


def convert_parameters(
    teacher: LanguageModelConfig, student: LanguageModelConfig, given: Mapping[str, Any], fresh: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of a student by dotted path.

    Args:
      teacher, student: the configs; see `convert_config`.
      given: the teacher's parameters by dotted path.
      fresh: new parameters of the student, which give the shapes, and the values of what starts at random.

    Raises:
      ValueError: projections of the student that do not fit the teacher's.
    """
    converted = converted_layers(teacher, student)
    result = {}
    for name, new in fresh.items():
        old = given.get(name)
        found = re.match(r"blocks\.(\d+)\.memory\.(.*)", name)
        inside = found is not None and int(found[1]) in converted
        if old is not None and found is not None and inside and old.shape != new.shape:
            source = teacher.pattern[int(found[1]) % len(teacher.pattern)]
            held = {"heads": teacher.heads, **MEMORIES[source].options, **teacher.options_of(source)}
            repeats = held["heads"] // (held.get("groups") or held["heads"])
            old = _repeat_heads(found[2], np.asarray(old), held["heads"] // repeats, repeats)
        if old is not None:
            check(old.shape == new.shape, f"parameter {name}", f"of shape {new.shape}, as the student's", old.shape)
        elif inside and found is not None:
            wanted = [f"{part}.kernel" for part in PROJECTIONS]
            check(found[2] not in wanted, "memory", "one with the projections of attention", f"without {name}")
            layer = student.pattern[int(found[1]) % len(student.pattern)]
            old = _start_value(found[2], new, layer, student.options_of(layer))
        result[name] = new if old is None else old
    return result


def _convertible(name: str) -> bool:
    layer = MEMORIES[name].layer
    return issubclass(layer, MemoryLayer) and (name == "fox" or layer is not SoftmaxAttention)


def _repeats(names: Sequence[str], size: int) -> bool:
    return len(names) % size == 0 and all(name == names[i % size] for i, name in enumerate(names))


def _repeat_heads(part: str, x: np.ndarray, groups: int, repeats: int) -> np.ndarray:
    """Keys and values of grouped heads for each head of the group; others as they are."""
    kind = part.split(".")[1] if part.startswith("projections.") else ""
    if kind not in ("key", "value"):
        return x
    heads = x.reshape(*x.shape[:-1], groups, -1)
    return np.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], -1)


def _start_value(part: str, new: Any, memory: str, options: Mapping[str, Any]) -> Any:
    """The first value of a parameter that attention lacks: near the identity, or else as it is."""
    options = {**MEMORIES[memory].options, **options}
    cached = MEMORIES[memory].layer in (DeltaFormer, SoftmaxAttention)
    if re.fullmatch(r"(beta|alpha|decay)\.(weights|up)\.kernel", part):
        return np.zeros(new.shape, np.float32)
    if part == "beta.weights.bias":
        limit = options.get("beta_limit") or 1.0
        return np.full(new.shape, _logit((0.01 if cached else 0.9) / limit), np.float32)
    if part == "alpha.weights.bias":
        return np.full(new.shape, _logit(0.99), np.float32)
    # log(sigmoid(6)) = -0.0025: half is forgotten after 280 tokens; RWKV-7 forgets by exp(-1/2) sigmoid(b)
    if part in ("decay.weights.bias", "decay.up.bias"):
        return np.full(new.shape, -6.0 if MEMORIES[memory].layer is RWKV7 else 6.0, np.float32)
    # steps start in [0.001, 0.1], times a rate of 1
    if part == "decay.rate":
        return np.zeros(new.shape, np.float32)
    if re.fullmatch(r"convolutions\.\w+\.weights", part):
        taps = np.zeros(new.shape, np.float32)
        taps[0] = 1.0
        return taps
    return new


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _values(model: MemoryLM) -> dict[str, Float[Array, "..."]]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}
