"""Language models of common sizes, for any memory.

Each function returns a `LanguageModelConfig`; keyword arguments override its fields. Sizes count the
blocks' parameters of softmax attention with SwiGLU, embeddings left out.
"""

from typing import Any

from memformer.models.config import LanguageModelConfig

__all__ = ["PRESETS", "large_760m", "medium_350m", "mini_10m", "small_125m", "tiny", "xlarge_1300m"]


def tiny(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """0.4 M parameters: tests and first tries on a laptop.

    Example:
      >>> tiny("gla", depth=4).depth
      4
    """
    return _preset(fields, memory=memory, width=128, depth=2, heads=4)


def mini_10m(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """11 M parameters: an hour's work for one GPU."""
    return _preset(fields, memory=memory, width=384, depth=6, heads=6)


def small_125m(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """85 M parameters in blocks, about 125 M with a vocabulary of 50,000."""
    return _preset(fields, memory=memory, width=768, depth=12, heads=12, tie_embeddings=True)


def medium_350m(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """302 M parameters in blocks."""
    return _preset(fields, memory=memory, width=1024, depth=24, heads=16, tie_embeddings=True, remat="projections")


def large_760m(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """679 M parameters in blocks."""
    return _preset(fields, memory=memory, width=1536, depth=24, heads=12, tie_embeddings=True, remat="projections")


def xlarge_1300m(memory: str | tuple[str, ...] = "delta_rule", **fields: Any) -> LanguageModelConfig:
    """1208 M parameters in blocks."""
    return _preset(fields, memory=memory, width=2048, depth=24, heads=16, remat="full")


PRESETS = {
    "tiny": tiny,
    "mini_10m": mini_10m,
    "small_125m": small_125m,
    "medium_350m": medium_350m,
    "large_760m": large_760m,
    "xlarge_1300m": xlarge_1300m,
}


def _preset(fields: dict[str, Any], **defaults: Any) -> LanguageModelConfig:
    """Accelerator sizes compute in bfloat16; the two small ones in float32."""
    dtype = "float32" if defaults["depth"] <= 6 else "bfloat16"
    return LanguageModelConfig(**{"dtype": dtype, **defaults, **fields})
