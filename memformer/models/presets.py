"""Sizes of language models by name, for any memory."""

from typing import Any

from memformer.models.config import LanguageModelConfig

__all__ = ["PRESETS", "from_preset", "preset_fields"]

# Fields of `LanguageModelConfig` that differ from its defaults. Comments count the parameters of the blocks (softmax
# attention with SwiGLU), without embeddings.
PRESETS: dict[str, dict[str, Any]] = {
    # 0.4 M: tests and first experiments on a laptop
    "tiny": {"width": 128, "depth": 2, "heads": 4},
    # 11 M: an hour of training on one GPU
    "mini_10m": {"width": 384, "depth": 6, "heads": 6, "scan_layers": True},
    # 85 M; 125 M with a vocabulary of 50,000
    "small_125m": {
        "width": 768, "depth": 12, "heads": 12, "tie_embeddings": True, "dtype": "bfloat16", "scan_layers": True,
    },
    # 302 M
    "medium_350m": {
        "width": 1024, "depth": 24, "heads": 16, "tie_embeddings": True, "remat": "projections", "dtype": "bfloat16",
        "scan_layers": True,
    },
    # 679 M
    "large_760m": {
        "width": 1536, "depth": 24, "heads": 12, "tie_embeddings": True, "remat": "projections", "dtype": "bfloat16",
        "scan_layers": True,
    },
    # 1208 M
    "xlarge_1300m": {
        "width": 2048, "depth": 24, "heads": 16, "remat": "full", "dtype": "bfloat16", "scan_layers": True,
    },
    # 2516 M
    "huge_2700m": {
        "width": 2560, "depth": 32, "heads": 20, "remat": "full", "dtype": "bfloat16", "scan_layers": True,
    },
    # 6442 M
    "giant_7b": {
        "width": 4096, "depth": 32, "heads": 32, "remat": "full", "dtype": "bfloat16", "scan_layers": True,
    },
}  # fmt: skip


def preset_fields(name: str) -> dict[str, Any]:
    """The fields that a preset sets.

    Raises:
      ValueError: an unknown preset.

    Example:
      >>> preset_fields("tiny")
      {'width': 128, 'depth': 2, 'heads': 4}
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])


def from_preset(name: str, **fields: Any) -> LanguageModelConfig:
    """A preset as a config.

    Args:
      name: a key of `PRESETS`.
      **fields: fields of `LanguageModelConfig`; they override those of the preset.

    Raises:
      ValueError: an unknown preset, or a value that does not fit.

    Example:
      >>> from_preset("tiny", memory="gla", depth=4).depth
      4
    """
    return LanguageModelConfig(**{**preset_fields(name), **fields})
