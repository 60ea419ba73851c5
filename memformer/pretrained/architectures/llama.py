"""Llama, Qwen2 and Qwen3: softmax attention with grouped heads and rotary positions, SwiGLU, RMSNorm."""

from collections.abc import Mapping
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.decoder import decoder_config, decoder_fields, decoder_rules
from memformer.pretrained.architectures.fields import memory_options, read_rope, require, write_rope
from memformer.pretrained.architectures.rules import Rule, copy, projection

__all__ = ["attention_rules", "hf_config", "llama_fields", "model_rules", "qwen2_fields", "qwen3_fields"]

ATTENTION = "softmax_attention"


def _fields(raw: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    require(raw, mlp_bias=False, pretraining_tp=1)
    _require_full_attention(raw)
    heads = raw["num_attention_heads"]
    sizes = {"groups": raw.get("num_key_value_heads") or heads}
    return {
        **decoder_fields(raw),
        "memory": ATTENTION,
        "memory_options": {**sizes, **read_rope(raw), "norm_epsilon": raw.get("rms_norm_eps", 1e-6), **options},
        "heads": heads,
        "key_width": raw.get("head_dim") or raw["hidden_size"] // heads,
        "feedforward": "swiglu",
        "feedforward_options": {"hidden": raw["intermediate_size"]},
    }


def _require_full_attention(raw: Mapping[str, Any]) -> None:
    """One set of options serves every layer: a window on some layers only cannot be said."""
    kinds = raw.get("layer_types")
    if kinds is None and raw.get("use_sliding_window") and raw.get("sliding_window") is not None:
        kinds = ["sliding_attention"] * max(0, raw["num_hidden_layers"] - raw.get("max_window_layers", 28))
    others = sorted(set(kinds or ()) - {"full_attention"})
    if others:
        raise ValueError(
            f"config.json's layer_types must be 'full_attention' in every layer, got {', '.join(map(repr, others))}"
        )


def llama_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Llama."""
    bias = raw.get("attention_bias", False)
    return _fields(raw, {"qkv_bias": bias, "out_bias": bias})


def qwen2_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Qwen2."""
    return _fields(raw, {"qkv_bias": True})


def qwen3_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Qwen3."""
    bias = raw.get("attention_bias", False)
    fields = _fields(raw, {"qkv_bias": bias, "out_bias": bias, "qk_norm": "head"})
    return {**fields, "key_width": raw.get("head_dim") or 128}


def hf_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a model of this family."""
    options = memory_options(config, ATTENTION)
    return {
        **decoder_config(config, vocab),
        "intermediate_size": config.feedforward_options["hidden"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": options["groups"],
        "head_dim": options["key_width"],
        "attention_bias": options["out_bias"],
        **write_rope(options),
    }


def attention_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    """Rules of softmax attention, stored as {q,k,v,o}_proj, with the biases and norms that its options have."""
    names = {"q_proj": "projections.query", "k_proj": "projections.key", "v_proj": "projections.value"}
    rules = []
    for key, path in names.items():
        rules += projection(f"{theirs}.{key}", f"{ours}.{path}", options["qkv_bias"])
    rules += projection(f"{theirs}.o_proj", f"{ours}.out", options["out_bias"])
    if options["qk_norm"] is not None:
        for name in ("query", "key"):
            rules.append(copy(f"{theirs}.{name[0]}_norm.weight", f"{ours}.qk_norms.{name}.scale"))
    return rules


def model_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a model of this family."""
    options = memory_options(config, ATTENTION)
    return decoder_rules(config, lambda theirs, ours, _: attention_rules(f"{theirs}.self_attn", ours, options))
