"""Kimi-Linear: layers of Kimi delta attention, every fourth of latent attention without positions; experts."""

from collections.abc import Mapping
from typing import Any

from memformer.core.types import Array
from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.decoder import (
    L2NORM_EPSILON,
    convolved_rules,
    decoder_config,
    decoder_fields,
    decoder_rules,
    layer_kinds,
    memory_fields,
    swiglu_rules,
)
from memformer.pretrained.architectures.fields import memory_options, require
from memformer.pretrained.architectures.rules import Rule, copy, experts, projection, transposed

__all__ = ["kimi_config", "kimi_fields", "kimi_rules"]

ATTENTION, LINEAR = "softmax_attention", "kda"
KINDS = {"linear_attention": LINEAR, "full_attention": ATTENTION}
# Fields with two names: that of transformers 5, and that of the release.
OLDER = {
    "num_local_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token", "norm_topk_prob":
    "moe_renormalize", "n_shared_experts": "num_shared_experts", "n_group": "num_expert_group",
    "max_position_embeddings": "model_max_length",
}  # fmt: skip


def kimi_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Kimi-Linear."""
    raw = {**{new: raw[old] for new, old in OLDER.items() if old in raw}, **raw}
    require(raw, attention_bias=False, n_group=1, moe_router_activation_func="sigmoid")
    if raw.get("q_lora_rank") is not None:
        raise ValueError(f"config.json's q_lora_rank must be null, got {raw['q_lora_rank']}")
    linear, depth = raw.get("linear_attn_config") or {}, raw["num_hidden_layers"]
    width = linear.get("head_dim", raw.get("linear_head_dim", 128))
    options = {
        ATTENTION: {
            "rotary": False,
            "latent_rank": raw["kv_lora_rank"],
            "shared_key_width": raw["qk_rope_head_dim"],
        },
        LINEAR: {
            "heads": linear.get("num_heads", raw.get("linear_num_heads", 32)),
            "key_width": width,
            "value_width": width,
            "conv_width": linear.get("short_conv_kernel_size", raw.get("linear_conv_kernel_dim", 4)),
            "decay_rank": width,
            "output_gate_rank": width,
            "beta_bias": False,
            "l2norm_epsilon": L2NORM_EPSILON,
            "norm_epsilon": raw.get("rms_norm_eps", 1e-5),
        },
    }
    return {
        **decoder_fields(raw, epsilon=1e-5, length=1048576),
        **memory_fields(_layer_types(raw, linear, depth), KINDS, options),
        "heads": raw["num_attention_heads"],
        "key_width": raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"],
        "value_width": raw["v_head_dim"],
        "feedforward": "moe",
        "feedforward_options": {
            "experts": raw["num_local_experts"],
            "active": raw["num_experts_per_tok"],
            "hidden": raw["moe_intermediate_size"],
            "norm_topk_prob": raw.get("norm_topk_prob", True),
            "shared_hidden": raw["moe_intermediate_size"] * raw.get("n_shared_experts", 1),
            "router": "sigmoid",
            "routed_scaling_factor": raw.get("routed_scaling_factor", 2.446),
            "dispatch": "ragged",
        },
        "dense_layers": _dense_layers(raw, depth),
        "dense_hidden": raw["intermediate_size"],
    }


def _layer_types(raw: Mapping[str, Any], linear: Mapping[str, Any], depth: int) -> list[str]:
    if raw.get("layer_types"):
        return list(raw["layer_types"])
    if "full_attn_layers" in linear:
        full = [layer - 1 for layer in linear["full_attn_layers"]]
    else:
        full = list(range(4, depth, 4))
    return ["full_attention" if i in full else "linear_attention" for i in range(depth)]


def _dense_layers(raw: Mapping[str, Any], depth: int) -> int:
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        return raw.get("first_k_dense_replace", 1)
    count = list(kinds).count("dense")
    if list(kinds) != ["dense"] * count + ["sparse"] * (depth - count):
        raise ValueError(f"config.json's mlp_layer_types must be dense in the first layers only, got {kinds}")
    return count


def kimi_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a Kimi-Linear."""
    attention, linear = memory_options(config, ATTENTION), memory_options(config, LINEAR)
    options = config.feedforward_options
    return {
        **decoder_config(config, vocab),
        "intermediate_size": config.dense_hidden,
        "moe_intermediate_size": options["hidden"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["heads"],
        "kv_lora_rank": attention["latent_rank"],
        "q_lora_rank": None,
        "qk_rope_head_dim": attention["shared_key_width"],
        "qk_nope_head_dim": attention["key_width"] - attention["shared_key_width"],
        "v_head_dim": attention["value_width"],
        "linear_num_heads": linear["heads"],
        "linear_head_dim": linear["key_width"],
        "linear_conv_kernel_dim": linear["conv_width"],
        "num_local_experts": options["experts"],
        "num_experts_per_tok": options["active"],
        "n_shared_experts": options["shared_hidden"] // options["hidden"],
        "norm_topk_prob": options["norm_topk_prob"],
        "routed_scaling_factor": options["routed_scaling_factor"],
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense" if i < config.dense_layers else "sparse" for i in range(config.depth)],
        "layer_types": layer_kinds(config, KINDS),
        "attention_bias": False,
    }


def kimi_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a Kimi-Linear."""

    def memory(theirs: str, ours: str, layer: int) -> list[Rule]:
        if config.pattern[layer % len(config.pattern)] == LINEAR:
            return _linear_rules(f"{theirs}.self_attn", ours, memory_options(config, LINEAR))
        return _attention_rules(f"{theirs}.self_attn", ours)

    def feedforward(theirs: str, ours: str, layer: int) -> list[Rule]:
        if layer < config.dense_layers:
            return swiglu_rules(f"{theirs}.mlp", ours)
        return _expert_rules(f"{theirs}.block_sparse_moe", ours, config.feedforward_options["experts"])

    return decoder_rules(config, memory, feedforward=feedforward)


def _attention_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        transposed(f"{theirs}.q_proj.weight", f"{ours}.projections.query.kernel"),
        transposed(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.latent.down.kernel"),
        copy(f"{theirs}.kv_a_layernorm.weight", f"{ours}.latent.norm.scale"),
        transposed(f"{theirs}.kv_b_proj.weight", f"{ours}.latent.up.kernel"),
        transposed(f"{theirs}.o_proj.weight", f"{ours}.out.kernel"),
    ]


def _linear_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    def load(x: Array) -> tuple[Array]:
        return (x.reshape(-1),)

    def save(x: Array) -> tuple[Array]:
        return (x.reshape(1, 1, -1, 1),)

    return [
        *convolved_rules(theirs, ours, options["conv_width"]),
        Rule((f"{theirs}.A_log",), (f"{ours}.decay.rate",), load, save),
        copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
        transposed(f"{theirs}.f_a_proj.weight", f"{ours}.decay.down.kernel"),
        transposed(f"{theirs}.f_b_proj.weight", f"{ours}.decay.up.kernel"),
        transposed(f"{theirs}.b_proj.weight", f"{ours}.beta.weights.kernel"),
        transposed(f"{theirs}.g_a_proj.weight", f"{ours}.gate_down.kernel"),
        transposed(f"{theirs}.g_b_proj.weight", f"{ours}.gate.kernel"),
        copy(f"{theirs}.o_norm.weight", f"{ours}.norm.scale"),
    ]


def _expert_rules(theirs: str, ours: str, count: int) -> list[Rule]:
    rules = [
        transposed(f"{theirs}.gate.weight", f"{ours}.router.kernel"),
        copy(f"{theirs}.gate.e_score_correction_bias", f"{ours}.correction"),
    ]
    for key, name in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        rules.append(experts([f"{theirs}.experts.{e}.{key}.weight" for e in range(count)], f"{ours}.{name}"))
        rules += projection(f"{theirs}.shared_experts.{name}_proj", f"{ours}.shared.{name}")
    return rules
