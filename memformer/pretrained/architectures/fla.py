"""Models of flash-linear-attention: DeltaNet, GatedDeltaNet, GLA, RetNet and KDA, one memory in every layer, SwiGLU."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from memformer.core.checks import check
from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.decoder import (
    L2NORM_EPSILON,
    convolved_rules,
    decoder_fields,
    decoder_rules,
    step_rules,
)
from memformer.pretrained.architectures.fields import memory_options, require
from memformer.pretrained.architectures.rules import Rule, copy, projection, transposed

__all__ = [
    "delta_net_config",
    "delta_net_fields",
    "delta_net_rules",
    "gated_delta_net_config",
    "gated_delta_net_fields",
    "gated_delta_net_rules",
    "gla_config",
    "gla_fields",
    "gla_rules",
    "kda_config",
    "kda_fields",
    "kda_rules",
    "retnet_config",
    "retnet_fields",
    "retnet_rules",
]

# Epsilon of the norms and largest length, where config.json leaves them out.
EPSILON, LENGTH = 1e-6, 2048
# Rank of the decay of GLA, which config.json does not say.
GLA_RANK = 16
# Names of the activations of output gates.
GATES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


def _fields(raw: Mapping[str, Any], memory: str, options: Mapping[str, Any], ratio: int = 4) -> dict[str, Any]:
    """Fields that all five share; `ratio` is the default of hidden_ratio."""
    require(raw, hidden_act=("swish", "silu"), elementwise_affine=True, use_output_norm=True)
    for name in ("attn", "attnres_block_size"):
        if raw.get(name) is not None:
            raise ValueError(f"config.json's {name} must be null, got {raw[name]!r}")
    given = {**raw, "rms_norm_eps": raw.get("norm_eps", EPSILON), "hidden_act": "silu"}
    hidden = raw.get("intermediate_size")
    if hidden is None:
        # the multiple of 256 above 2/3 of it
        hidden = 256 * math.ceil(int(raw["hidden_size"] * (raw.get("hidden_ratio") or ratio) * 2 / 3) / 256)
    return {
        **decoder_fields(given, length=LENGTH),
        "memory": memory,
        "memory_options": {**options, "norm_epsilon": given["rms_norm_eps"]},
        "feedforward": "swiglu",
        "feedforward_options": {"hidden": hidden},
    }


def _config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """The inverse of `_fields`."""
    return {
        "vocab_size": vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.feedforward_options["hidden"],
        "hidden_act": "swish",
        "norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _head_width(raw: Mapping[str, Any], key: str, default: float) -> int:
    """Key or value width per head from expand_k or expand_v, a factor of the whole width."""
    heads, whole = raw["num_heads"], round(raw["hidden_size"] * raw.get(key, default))
    check(whole % heads == 0, f"config.json's {key} x hidden_size", f"a multiple of num_heads = {heads}", whole)
    return whole // heads


def _expansions(config: LanguageModelConfig, options: Mapping[str, Any]) -> dict[str, float]:
    heads, width = options["heads"], config.width
    return {f"expand_{name[0]}": heads * options[name] / width for name in ("key_width", "value_width")}


def _require_own_keys(raw: Mapping[str, Any]) -> None:
    if raw.get("num_kv_heads") not in (None, raw["num_heads"]):
        raise ValueError(f"config.json's num_kv_heads must be null or num_heads, got {raw['num_kv_heads']}")
    if raw.get("feature_map") is not None:
        raise ValueError(f"config.json's feature_map must be null, got {raw['feature_map']!r}")


def _rules(
    config: LanguageModelConfig, name: str, memory: Callable[[str, str, Mapping[str, Any]], list[Rule]]
) -> list[Rule]:
    """The rules of a model from those of its memory `name`."""
    options = memory_options(config, name)
    return decoder_rules(
        config,
        lambda theirs, ours, _: memory(f"{theirs}.attn", ours, options),
        norms=lambda _: ("attn_norm", "mlp_norm"),
        embedding="model.embeddings",
    )


def delta_net_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a DeltaNet."""
    require(raw, use_short_conv=True, use_beta=True, qk_norm="l2", qk_activation="silu")
    options = {
        "conv_width": raw.get("conv_size", 4),
        "beta_bias": False,
        "beta_limit": 2.0 if raw.get("allow_neg_eigval") else 1.0,
        "l2norm_epsilon": L2NORM_EPSILON,
        "output_gate": "silu" if raw.get("use_gate", False) else None,
    }
    sizes = {"key_width": _head_width(raw, "expand_k", 1.0), "value_width": _head_width(raw, "expand_v", 1.0)}
    return {**_fields(raw, "delta_rule", options), "heads": raw["num_heads"], **sizes}


def delta_net_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a DeltaNet."""
    options = memory_options(config, "delta_rule")
    return {
        **_config(config, vocab),
        **_expansions(config, options),
        "num_heads": options["heads"],
        "conv_size": options["conv_width"],
        "allow_neg_eigval": options["beta_limit"] == 2,
        "use_gate": options["output_gate"] is not None,
    }


def delta_net_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a DeltaNet."""
    return _rules(config, "delta_rule", _delta_rules)


def _delta_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    rules = convolved_rules(theirs, ours, options["conv_width"])
    rules += projection(f"{theirs}.b_proj", f"{ours}.beta.weights")
    if options["output_gate"] is not None and options["output_gate_rank"] is None:
        rules += projection(f"{theirs}.g_proj", f"{ours}.gate")
    return [*rules, copy(f"{theirs}.o_norm.weight", f"{ours}.norm.scale")]


def _grouped_fields(raw: Mapping[str, Any], memory: str, expand: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of GatedDeltaNet and KDA, whose value heads may share keys."""
    require(raw, use_short_conv=True)
    heads, width = raw["num_heads"], raw["head_dim"]
    return {
        **_fields(
            raw,
            memory,
            {
                "key_heads": heads,
                "conv_width": raw.get("conv_size", 4),
                "beta_bias": False,
                "beta_limit": 2.0 if raw.get("allow_neg_eigval") else 1.0,
                "l2norm_epsilon": L2NORM_EPSILON,
                **options,
            },
        ),
        "heads": raw.get("num_v_heads") or heads,
        "key_width": width,
        "value_width": int(width * raw.get("expand_v", expand)),
    }


def _grouped_config(config: LanguageModelConfig, vocab: int, memory: str) -> dict[str, Any]:
    options = memory_options(config, memory)
    return {
        **_config(config, vocab),
        "num_heads": options["key_heads"],
        "num_v_heads": options["heads"],
        "head_dim": options["key_width"],
        "expand_v": options["value_width"] / options["key_width"],
        "conv_size": options["conv_width"],
        "allow_neg_eigval": options["beta_limit"] == 2,
    }


def gated_delta_net_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a GatedDeltaNet."""
    name = raw.get("output_gate_activation", "swish")
    require({"output_gate_activation": name}, output_gate_activation=tuple(GATES))
    gate = GATES[name] if raw.get("use_gate", True) else None
    return _grouped_fields(raw, "gated_delta_rule", 2.0, {"output_gate": gate})


def gated_delta_net_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a GatedDeltaNet."""
    gate = memory_options(config, "gated_delta_rule")["output_gate"]
    written = {"use_gate": gate is not None, "output_gate_activation": gate or "swish"}
    return {**_grouped_config(config, vocab, "gated_delta_rule"), **written}


def gated_delta_net_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a GatedDeltaNet."""
    return _rules(config, "gated_delta_rule", lambda *where: [*_delta_rules(*where), *step_rules(*where[:2])])


def kda_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a KDA."""
    require(raw, safe_gate=False)
    if raw.get("lower_bound") is not None:
        raise ValueError(f"config.json's lower_bound must be null, got {raw['lower_bound']}")
    rank = int(raw["head_dim"] * raw.get("expand_v", 1.0))
    options = {"decay_rank": rank, "output_gate_rank": rank, "output_gate_bias": True}
    return _grouped_fields(raw, "kda", 1.0, options)


def kda_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a KDA."""
    return _grouped_config(config, vocab, "kda")


def kda_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a KDA."""
    return _rules(config, "kda", _kda_rules)


def _kda_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    return [
        *_delta_rules(theirs, ours, options),
        *projection(f"{theirs}.f_proj.0", f"{ours}.decay.down"),
        *projection(f"{theirs}.f_proj.1", f"{ours}.decay.up"),
        copy(f"{theirs}.A_log", f"{ours}.decay.rate"),
        copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
        *projection(f"{theirs}.g_proj.0", f"{ours}.gate_down"),
        *projection(f"{theirs}.g_proj.1", f"{ours}.gate", bias=True),
    ]


def gla_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a GLA."""
    require(raw, use_output_gate=True, use_gk=True, use_gv=False)
    _require_own_keys(raw)
    if raw.get("clamp_min") is not None:
        raise ValueError(f"config.json's clamp_min must be null, got {raw['clamp_min']}")
    options = {"conv_width": raw.get("conv_size", 4) if raw.get("use_short_conv") else 0, "decay_rank": GLA_RANK}
    sizes = {"key_width": _head_width(raw, "expand_k", 0.5), "value_width": _head_width(raw, "expand_v", 1.0)}
    return {**_fields(raw, "gla", options), "heads": raw["num_heads"], **sizes}


def gla_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a GLA."""
    options = memory_options(config, "gla")
    convolved = {"conv_size": options["conv_width"]} if options["conv_width"] else {}
    return {
        **_config(config, vocab),
        **_expansions(config, options),
        "num_heads": options["heads"],
        "use_short_conv": bool(convolved),
        **convolved,
    }


def gla_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a GLA."""

    def memory(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
        return [
            *_gated_rules(theirs, ours, options),
            *projection(f"{theirs}.gk_proj.0", f"{ours}.decay.down"),
            *projection(f"{theirs}.gk_proj.1", f"{ours}.decay.up", bias=True),
        ]

    return _rules(config, "gla", memory)


def _gated_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    """Rules of linear attention with a norm and a gate of what is read."""
    return [
        *convolved_rules(theirs, ours, options["conv_width"]),
        transposed(f"{theirs}.g_proj.weight", f"{ours}.gate.kernel"),
        copy(f"{theirs}.g_norm_swish_gate.weight", f"{ours}.norm.scale"),
    ]


def retnet_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a RetNet."""
    # its layers have no convolution, whatever config.json says
    require(raw, use_output_gate=True)
    _require_own_keys(raw)
    sizes = {"key_width": _head_width(raw, "expand_k", 1.0), "value_width": _head_width(raw, "expand_v", 2.0)}
    return {**_fields(raw, "retnet", {}, ratio=2), "heads": raw["num_heads"], **sizes}


def retnet_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a RetNet."""
    options = memory_options(config, "retnet")
    return {**_config(config, vocab), **_expansions(config, options), "num_heads": options["heads"]}


def retnet_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a RetNet."""
    return _rules(config, "retnet", _gated_rules)
