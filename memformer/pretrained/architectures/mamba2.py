"""Mamba2: linear attention with per-head decay (state space duality), without feedforward layers."""

import math
from collections.abc import Mapping
from typing import Any

from memformer.core.checks import check
from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.fields import memory_options, require
from memformer.pretrained.architectures.rules import Rule, convolution, copy, fused, transposed

__all__ = ["mamba2_config", "mamba2_fields", "mamba2_rules"]

MEMORY = "ssd"


def mamba2_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Mamba2."""
    require(raw, hidden_act="silu", use_bias=False)
    limit = tuple(raw.get("time_step_limit") or (0.0, math.inf))
    require({"time_step_limit": limit}, time_step_limit=((0.0, math.inf),))
    epsilon = raw.get("layer_norm_epsilon", 1e-5)
    return {
        "memory": MEMORY,
        "memory_options": {
            "key_heads": raw.get("n_groups", 8),
            "conv_width": raw.get("conv_kernel", 4),
            "conv_bias": raw.get("use_conv_bias", True),
            "scale": 1.0,
            "output_norm": "group",
            "norm_before_gate": False,
            "norm_epsilon": epsilon,
        },
        "width": raw["hidden_size"],
        "depth": raw["num_hidden_layers"],
        "heads": raw["num_heads"],
        "key_width": raw["state_size"],
        "value_width": raw["head_dim"],
        "feedforward": None,
        "norm": "rms",
        "norm_epsilon": epsilon,
        "scale_embeddings": False,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def mamba2_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a Mamba2."""
    options = memory_options(config, MEMORY)
    inner = options["heads"] * options["value_width"]
    check(inner % config.width == 0, "heads x value_width", f"a multiple of width {config.width}", inner)
    return {
        "vocab_size": vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_heads": options["heads"],
        "head_dim": options["value_width"],
        "state_size": options["key_width"],
        "expand": inner // config.width,
        "n_groups": options["key_heads"],
        "conv_kernel": options["conv_width"],
        "use_conv_bias": options["conv_bias"],
        "use_bias": False,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def mamba2_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a Mamba2: values are its x, keys its B, queries its C, the step its dt, the gate its z."""
    rules = [copy("backbone.embeddings.weight", "embedding.table"), copy("backbone.norm_f.weight", "norm.scale")]
    if not config.tie_embeddings:
        rules.append(transposed("lm_head.weight", "head.kernel"))
    options = memory_options(config, MEMORY)
    inner, keys = options["heads"] * options["value_width"], options["key_heads"] * options["key_width"]
    sizes = (inner, keys, keys)
    for i in range(config.depth):
        theirs, ours = f"backbone.layers.{i}.mixer", f"blocks.{i}.memory"
        projected = [f"{ours}.projections.{name}.kernel" for name in ("value", "key", "query")]
        convolved = [f"{ours}.convolutions.{name}" for name in ("value", "key", "query")]
        paths = (f"{ours}.gate.kernel", *projected, f"{ours}.decay.up.kernel")
        rules.append(fused(f"{theirs}.in_proj.weight", paths, (inner, *sizes, options["heads"])))
        rules.append(convolution(f"{theirs}.conv1d.weight", [f"{path}.weights" for path in convolved], sizes))
        if options["conv_bias"]:
            paths = tuple(f"{path}.bias" for path in convolved)
            rules.append(fused(f"{theirs}.conv1d.bias", paths, sizes, transpose=False))
        rules += [
            copy(f"{theirs}.A_log", f"{ours}.decay.rate"),
            copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
            copy(f"{theirs}.D", f"{ours}.skip"),
            copy(f"{theirs}.norm.weight", f"{ours}.norm.scale"),
            transposed(f"{theirs}.out_proj.weight", f"{ours}.out.kernel"),
            copy(f"backbone.layers.{i}.norm.weight", f"blocks.{i}.norm.scale"),
        ]
    return rules
