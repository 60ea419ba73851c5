"""OLMo-Hybrid: layers of the gated delta rule, every fourth of softmax attention with norms of outputs."""

from collections.abc import Mapping
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.decoder import (
    L2NORM_EPSILON,
    convolved_rules,
    decoder_config,
    decoder_fields,
    decoder_rules,
    layer_kinds,
    memory_fields,
    step_rules,
)
from memformer.pretrained.architectures.fields import memory_options, read_rope, require, write_rope
from memformer.pretrained.architectures.llama import attention_rules
from memformer.pretrained.architectures.qwen3_next import ATTENTION, KINDS, LINEAR
from memformer.pretrained.architectures.rules import Rule, copy, transposed

__all__ = ["linear_rules", "olmo_config", "olmo_fields", "olmo_rules"]

# Epsilon of the norm of what the delta rule reads, the same in every checkpoint.
READ_EPSILON = 1e-5
NO_POSITIONS = {"rope_type": "default", "rope_theta": None}
PLACES = {LINEAR: "pre", ATTENTION: "output"}


def olmo_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of an OLMo-Hybrid."""
    require(raw, attention_bias=False)
    depth, width, heads = raw["num_hidden_layers"], raw["hidden_size"], raw["num_attention_heads"]
    kinds = raw.get("layer_types") or [_kind(i, depth) for i in range(depth)]
    epsilon, key_heads = raw.get("rms_norm_eps", 1e-6), raw.get("linear_num_key_heads") or heads
    key_width = raw.get("linear_key_head_dim") or int(0.75 * width / key_heads)
    options = {
        ATTENTION: {
            "groups": raw.get("num_key_value_heads") or heads,
            "qk_norm": "width",
            "norm_epsilon": epsilon,
            # a theta of null is no positions at all
            **(
                {"rotary": False} if (raw.get("rope_parameters") or {}).get("rope_theta", 0) is None else read_rope(raw)
            ),
        },
        LINEAR: {
            "heads": raw.get("linear_num_value_heads") or heads,
            "key_heads": key_heads,
            "key_width": key_width,
            "value_width": raw.get("linear_value_head_dim") or 2 * key_width,
            "conv_width": raw.get("linear_conv_kernel_dim", 4),
            "beta_bias": False,
            "beta_limit": 2.0 if raw.get("linear_allow_neg_eigval", True) else 1.0,
            "l2norm_epsilon": L2NORM_EPSILON,
            "norm_epsilon": READ_EPSILON,
        },
    }
    fields = memory_fields(kinds, KINDS, options)
    names = (fields["memory"],) if isinstance(fields["memory"], str) else fields["memory"]
    return {
        **decoder_fields(raw, length=65536),
        **fields,
        "norm_place": tuple(PLACES[name] for name in names),
        "heads": heads,
        "key_width": raw.get("head_dim") or width // heads,
        "feedforward": "swiglu",
        "feedforward_options": {"hidden": raw["intermediate_size"]},
    }


def _kind(layer: int, depth: int) -> str:
    full = layer % 4 == 3 or (depth < 4 and layer == depth - 1)
    return "full_attention" if full else "linear_attention"


def olmo_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for an OLMo-Hybrid."""
    attention, linear = memory_options(config, ATTENTION), memory_options(config, LINEAR)
    return {
        **decoder_config(config, vocab),
        "intermediate_size": config.feedforward_options["hidden"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["groups"],
        "head_dim": attention["key_width"],
        "attention_bias": False,
        "linear_num_key_heads": linear["key_heads"],
        "linear_num_value_heads": linear["heads"],
        "linear_key_head_dim": linear["key_width"],
        "linear_value_head_dim": linear["value_width"],
        "linear_conv_kernel_dim": linear["conv_width"],
        "linear_allow_neg_eigval": linear["beta_limit"] == 2,
        "layer_types": layer_kinds(config, KINDS),
        **(write_rope(attention) if attention["rotary"] else {"rope_parameters": NO_POSITIONS}),
    }


def olmo_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of an OLMo-Hybrid."""

    def is_linear(layer: int) -> bool:
        return config.pattern[layer % len(config.pattern)] == LINEAR

    def memory(theirs: str, ours: str, layer: int) -> list[Rule]:
        if is_linear(layer):
            return linear_rules(f"{theirs}.linear_attn", ours, memory_options(config, LINEAR))
        return attention_rules(f"{theirs}.self_attn", ours, memory_options(config, ATTENTION))

    def norms(layer: int) -> tuple[str, str]:
        if is_linear(layer):
            return "input_layernorm", "post_attention_layernorm"
        return "post_attention_layernorm", "post_feedforward_layernorm"

    return decoder_rules(config, memory, norms=norms)


def linear_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    """Rules of the gated delta rule, stored as {q,k,v,a,b,g,o}_proj."""
    rules = [*convolved_rules(theirs, ours, options["conv_width"]), *step_rules(theirs, ours)]
    rules.append(transposed(f"{theirs}.b_proj.weight", f"{ours}.beta.weights.kernel"))
    if options["output_gate"] is not None:
        rules.append(transposed(f"{theirs}.g_proj.weight", f"{ours}.gate.kernel"))
    return [*rules, copy(f"{theirs}.o_norm.weight", f"{ours}.norm.scale")]
