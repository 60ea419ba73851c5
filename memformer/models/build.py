"""Models by name, built from a plain mapping (the `model` section of a run's config)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from memformer.core.checks import check_options
from memformer.layers.config import BaseConfig
from memformer.models.captioner import Captioner, CaptionerConfig
from memformer.models.config import LanguageModelConfig
from memformer.models.encoder import Encoder, EncoderConfig
from memformer.models.language_model import MemoryLM
from memformer.models.ntm import NTM, NTMConfig
from memformer.models.presets import preset_fields
from memformer.models.recurrent import RecurrentConfig, RecurrentLM
from memformer.models.segment_memory import ARMTConfig, RMTConfig, SegmentMemory
from memformer.models.seq2seq import Seq2Seq, Seq2SeqConfig
from memformer.models.transformer import Transformer, TransformerConfig

__all__ = ["MODELS", "build_config", "build_model", "default_options", "model_keys"]

# Name to (config class, module class).
MODELS: dict[str, tuple[type[BaseConfig], Callable[..., nnx.Module]]] = {
    "memory_lm": (LanguageModelConfig, MemoryLM),
    "captioner": (CaptionerConfig, Captioner),
    "armt": (ARMTConfig, SegmentMemory),
    "rmt": (RMTConfig, SegmentMemory),
    "seq2seq": (Seq2SeqConfig, Seq2Seq),
    "transformer": (TransformerConfig, Transformer),
    "encoder": (EncoderConfig, Encoder),
    "ntm": (NTMConfig, NTM),
    "recurrent_lm": (RecurrentConfig, RecurrentLM),
}


def model_keys(kind: str = "memory_lm") -> tuple[str, ...]:
    """The fields of a model's config: the keys that its options may have besides "type" and "preset".

    Raises:
      ValueError: an unknown model.

    Example:
      >>> "memory_options" in model_keys()
      True
    """
    if kind not in MODELS:
        raise ValueError(f"model type must be one of {', '.join(MODELS)}, got {kind!r}")
    names = [field.name for field in dataclasses.fields(MODELS[kind][0])]
    shared = [field.name for field in dataclasses.fields(BaseConfig)]
    return (*(name for name in names if name not in shared), *shared)


def default_options(kind: str = "memory_lm", preset: str | None = None) -> dict[str, Any]:
    """Every option of a model with its default, as a new plain dict that `build_model` accepts.

    Args:
      kind: a name in `MODELS`.
      preset: a name in `PRESETS` whose fields replace the defaults (memory_lm only); None or "none" for none.

    Returns:
      {"type": kind, "preset": preset, ...}, then one key per field of the config. Values are plain: dicts, tuples,
      strings, numbers, booleans and None.

    Raises:
      ValueError: an unknown model or preset, or a preset of a model that has none.

    Example:
      >>> options = default_options(preset="small_125m")
      >>> options["type"], options["preset"], options["depth"], options["memory_options"]
      ('memory_lm', 'small_125m', 12, {})
    """
    keys = model_keys(kind)
    fields = {}
    if preset is not None and preset != "none":
        if kind != "memory_lm":
            raise ValueError(f"preset must be None for model {kind!r}: presets are for 'memory_lm', got {preset!r}")
        fields = preset_fields(preset)
    config = MODELS[kind][0](**fields)
    options = {key: getattr(config, key) for key in keys}
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {"type": kind, "preset": preset if fields else None, **plain}


def build_config(options: Mapping[str, Any]) -> tuple[str, BaseConfig]:
    """The kind of a model and its checked config.

    Args:
      options: "type" (a name in `MODELS`, default "memory_lm"), "preset" (see `default_options`) and fields of that
        model's config. A preset fills in only what is not given.

    Raises:
      ValueError: an unknown type, preset or key (the message lists the known ones), or a value that does not fit.

    Example:
      >>> build_config({"preset": "tiny", "width": 64})[1].depth
      2
    """
    fields = dict(options)
    kind, preset = fields.pop("type", "memory_lm"), fields.pop("preset", None)
    defaults, keys = default_options(kind, preset), model_keys(kind)
    check_options(f"model {kind!r}", fields, keys)
    return kind, MODELS[kind][0](**{key: fields.get(key, defaults[key]) for key in keys})


def build_model(
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    num_classes: int | None = None,
    features: int = 0,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds the model that a mapping describes.

    Args:
      config: see `build_config`.
      vocab_size: of the input ids; 0 where inputs are feature vectors.
      num_classes: of the logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams.

    Returns:
      A module called as `model(inputs, segment_ids=, positions=, state=) -> ModelOutput`.

    Raises:
      ValueError: an unknown type, preset or key (the message lists the known ones), or a value that does not fit.

    Example:
      >>> model = build_model({"memory": "gla", "width": 16, "heads": 2}, vocab_size=5, rngs=nnx.Rngs(0))
      >>> model.config.memory
      'gla'
    """
    kind, checked = build_config(config)
    return MODELS[kind][1](checked, vocab_size=vocab_size, num_classes=num_classes, features=features, rngs=rngs)
