"""GPT-2: softmax attention with biases, learned positions, an MLP, LayerNorm; linear maps are stored as [in, out]."""

from collections.abc import Mapping
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.fields import memory_options, require
from memformer.pretrained.architectures.rules import Rule, copy, fused, transposed

__all__ = ["gpt2_config", "gpt2_fields", "gpt2_rules"]

ATTENTION = "softmax_attention"
# names of activations there and here; the last one of each kind is written
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu": "gelu_exact", "relu": "relu", "silu": "silu"}


def gpt2_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a GPT-2."""
    require(raw, activation_function=tuple(ACTIVATIONS), scale_attn_weights=True, add_cross_attention=False)
    require(raw, scale_attn_by_inverse_layer_idx=False)
    return {
        "memory": ATTENTION,
        "memory_options": {"rotary": False, "qkv_bias": True, "out_bias": True},
        "width": raw["n_embd"],
        "depth": raw["n_layer"],
        "heads": raw["n_head"],
        "feedforward": "mlp",
        "feedforward_options": {
            "hidden": raw.get("n_inner") or 4 * raw["n_embd"],
            "activation": ACTIVATIONS[raw.get("activation_function", "gelu_new")],
            "bias": True,
        },
        "positions": "learned",
        "max_length": raw["n_positions"],
        "norm": "layer",
        "norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "scale_embeddings": False,
        "tie_embeddings": raw.get("tie_word_embeddings", True),
    }


def gpt2_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a GPT-2."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": vocab,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": memory_options(config, ATTENTION)["heads"],
        "n_inner": config.feedforward_options["hidden"],
        "activation_function": names[config.feedforward_options.get("activation", "gelu")],
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def gpt2_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a GPT-2."""
    rules = [copy("transformer.wte.weight", "embedding.table"), copy("transformer.wpe.weight", "positions.table")]
    rules += _norm_rules("transformer.ln_f", "norm")
    if not config.tie_embeddings:
        rules.append(transposed("lm_head.weight", "head.kernel"))
    options = memory_options(config, ATTENTION)
    width = options["heads"] * options["key_width"]
    for i in range(config.depth):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        projections = [f"{ours}.memory.projections.{name}" for name in ("query", "key", "value")]
        for key, part in (("weight", "kernel"), ("bias", "bias")):
            paths = [f"{path}.{part}" for path in projections]
            rules.append(fused(f"{theirs}.attn.c_attn.{key}", paths, (width,) * 3, transpose=False))
            rules.append(copy(f"{theirs}.attn.c_proj.{key}", f"{ours}.memory.out.{part}"))
            rules.append(copy(f"{theirs}.mlp.c_fc.{key}", f"{ours}.feedforward.up.{part}"))
            rules.append(copy(f"{theirs}.mlp.c_proj.{key}", f"{ours}.feedforward.down.{part}"))
        rules += [
            *_norm_rules(f"{theirs}.ln_1", f"{ours}.norm"),
            *_norm_rules(f"{theirs}.ln_2", f"{ours}.feedforward_norm"),
        ]
    return rules


def _norm_rules(key: str, parameter: str) -> list[Rule]:
    return [copy(f"{key}.weight", f"{parameter}.scale"), copy(f"{key}.bias", f"{parameter}.bias")]
