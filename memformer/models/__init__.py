"""Models by name, built from a plain mapping (the `model` part of a run's config)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from memformer.layers.basic import check_options
from memformer.models.captioner import Captioner, CaptionerConfig
from memformer.models.config import LanguageModelConfig
from memformer.models.encoder import Encoder, EncoderConfig
from memformer.models.generate import generate
from memformer.models.language_model import MemoryLM, ModelOutput
from memformer.models.ntm import NTM, NTMConfig
from memformer.models.recurrent import RecurrentConfig, RecurrentLM
from memformer.models.segment_memory import ARMTConfig, RMTConfig, SegmentMemory
from memformer.models.seq2seq import Seq2Seq, Seq2SeqConfig
from memformer.models.transformer import Transformer, TransformerConfig

__all__ = ["MODELS", "LanguageModelConfig", "MemoryLM", "ModelOutput", "build_model", "generate", "model_keys"]

# Name to (frozen dataclass of its keys, module class).
MODELS: dict[str, tuple[type, Callable[..., nnx.Module]]] = {
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
    """The keys a config of this model may have, besides "type".

    Raises:
      ValueError: unknown model.

    Example:
      >>> model_keys()[:2]
      ('memory', 'memory_options')
    """
    if kind not in MODELS:
        raise ValueError(f"model type must be one of {', '.join(MODELS)}, got {kind!r}")
    return tuple(field.name for field in dataclasses.fields(MODELS[kind][0]))


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
      config: "type" (a name in `MODELS`, default "memory_lm") and that model's keys.
      vocab_size: of the input ids; 0 where inputs are feature vectors.
      num_classes: of the logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams.

    Returns:
      A module called as `model(inputs, segment_ids=, positions=, state=) -> ModelOutput`.

    Raises:
      ValueError: unknown type or key (naming the known ones), or a value that does not fit.

    Example:
      >>> model = build_model({"memory": "gla", "width": 16, "heads": 2}, vocab_size=5, rngs=nnx.Rngs(0))
      >>> model.config.memory
      'gla'
    """
    options = dict(config)
    kind = options.pop("type", "memory_lm")
    check_options(f"model {kind!r}", options, model_keys(kind))
    shape, build = MODELS[kind]
    return build(shape(**options), vocab_size=vocab_size, num_classes=num_classes, features=features, rngs=rngs)
