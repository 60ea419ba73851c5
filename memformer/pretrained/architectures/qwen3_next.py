"""Qwen3-Next and Qwen3.5: layers of the gated delta rule, every fourth of gated softmax attention; dense or experts."""

from collections.abc import Mapping
from typing import Any

from memformer.core.types import Array
from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.decoder import (
    L2NORM_EPSILON,
    decoder_config,
    decoder_fields,
    decoder_rules,
    layer_kinds,
    memory_fields,
    swiglu_rules,
)
from memformer.pretrained.architectures.fields import memory_options, read_rope, require, write_rope
from memformer.pretrained.architectures.llama import attention_rules
from memformer.pretrained.architectures.rules import (
    Rule,
    concatenate,
    convolution,
    copy,
    experts,
    fused,
    projection,
    transposed,
)

__all__ = [
    "moe_config",
    "moe_fields",
    "qwen3_5_config",
    "qwen3_5_fields",
    "qwen3_5_rules",
    "qwen3_next_rules",
]

ATTENTION, LINEAR = "softmax_attention", "gated_delta_rule"
KINDS = {"linear_attention": LINEAR, "full_attention": ATTENTION}


def _hybrid_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    require(raw, attention_bias=False)
    depth, epsilon = raw["num_hidden_layers"], raw.get("rms_norm_eps", 1e-6)
    every = raw.get("full_attention_interval") or 4
    kinds = raw.get("layer_types")
    kinds = kinds or ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(depth)]
    options = {
        ATTENTION: {
            "groups": raw["num_key_value_heads"],
            "qk_norm": "head",
            "zero_centered_norm": True,
            "output_gate": "sigmoid",
            "norm_epsilon": epsilon,
            **read_rope(raw, partial=0.25),
        },
        LINEAR: {
            "heads": raw["linear_num_value_heads"],
            "key_heads": raw["linear_num_key_heads"],
            "key_width": raw["linear_key_head_dim"],
            "value_width": raw["linear_value_head_dim"],
            "conv_width": raw.get("linear_conv_kernel_dim", 4),
            "beta_bias": False,
            "l2norm_epsilon": L2NORM_EPSILON,
            "norm_epsilon": epsilon,
        },
    }
    return {
        **decoder_fields(raw, length=32768),
        **memory_fields(kinds, KINDS, options),
        "heads": raw["num_attention_heads"],
        "key_width": raw.get("head_dim") or 256,
        "zero_centered_norm": True,
    }


def qwen3_5_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Qwen3.5, or for the text part of one that also sees."""
    return {
        **_hybrid_fields(raw),
        "feedforward": "swiglu",
        "feedforward_options": {"hidden": raw["intermediate_size"]},
    }


def moe_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of a Qwen3-Next."""
    fields = _hybrid_fields(raw)
    dense = set(raw.get("mlp_only_layers") or ())
    step = raw.get("decoder_sparse_step", 1)
    sparse = [
        raw.get("num_experts", 512) > 0 and (i + 1) % step == 0 and i not in dense for i in range(fields["depth"])
    ]
    if not any(sparse):
        return {**fields, "feedforward": "swiglu", "feedforward_options": {"hidden": raw["intermediate_size"]}}
    if not all(sparse):
        raise ValueError(
            "config.json's mlp_only_layers and decoder_sparse_step must give every layer experts, or none, got "
            f"experts in {sum(sparse)} of {len(sparse)} layers"
        )
    return {
        **fields,
        "feedforward": "moe",
        "feedforward_options": {
            "experts": raw["num_experts"],
            "active": raw["num_experts_per_tok"],
            "hidden": raw["moe_intermediate_size"],
            "norm_topk_prob": raw.get("norm_topk_prob", True),
            "shared_hidden": raw["shared_expert_intermediate_size"],
            "shared_gate": True,
            "dispatch": "ragged",
            "balance_weight": raw.get("router_aux_loss_coef", 0.001),
        },
    }


def qwen3_5_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a Qwen3.5."""
    attention, linear = memory_options(config, ATTENTION), memory_options(config, LINEAR)
    return {
        **decoder_config(config, vocab),
        "intermediate_size": config.feedforward_options["hidden"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["groups"],
        "head_dim": attention["key_width"],
        "attention_bias": False,
        "linear_conv_kernel_dim": linear["conv_width"],
        "linear_key_head_dim": linear["key_width"],
        "linear_value_head_dim": linear["value_width"],
        "linear_num_key_heads": linear["key_heads"],
        "linear_num_value_heads": linear["heads"],
        "layer_types": layer_kinds(config, KINDS),
        **write_rope(attention),
        "partial_rotary_factor": attention["partial_rotary_factor"],
    }


def moe_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for a Qwen3-Next."""
    fields, options = qwen3_5_config(config, vocab), config.feedforward_options
    # intermediate_size is that of layers without experts
    fields |= {"num_experts": 0, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if config.feedforward == "moe":
        fields |= {
            "num_experts": options["experts"],
            "num_experts_per_tok": options["active"],
            "moe_intermediate_size": options["hidden"],
            "shared_expert_intermediate_size": options["shared_hidden"],
            "norm_topk_prob": options["norm_topk_prob"],
            "router_aux_loss_coef": options["balance_weight"],
        }
    return fields


def qwen3_5_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a Qwen3.5, whose projections are stored apart."""
    return _model_rules(config, interleaved=False)


def qwen3_next_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of a Qwen3-Next, whose projections are stored interleaved per key head."""
    return _model_rules(config, interleaved=True)


def _model_rules(config: LanguageModelConfig, interleaved: bool) -> list[Rule]:
    def memory(theirs: str, ours: str, layer: int) -> list[Rule]:
        name = config.pattern[layer % len(config.pattern)]
        options = memory_options(config, name)
        if name == LINEAR:
            return _linear_rules(f"{theirs}.linear_attn", ours, options, interleaved)
        return _gated_attention_rules(f"{theirs}.self_attn", ours, options)

    def feedforward(theirs: str, ours: str, _: int) -> list[Rule]:
        return _feedforward_rules(f"{theirs}.mlp", ours, config)

    return decoder_rules(config, memory, feedforward=feedforward)


def _gated_attention_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[Rule]:
    """Attention whose q_proj holds query and gate of each head in turn."""
    query = f"{theirs}.q_proj.weight"
    rules = [rule for rule in attention_rules(theirs, ours, options) if query not in rule.keys]
    paths = (f"{ours}.projections.query.kernel", f"{ours}.gate.kernel")
    width = options["key_width"]
    rules.append(_grouped(query, paths, options["heads"], (width, width)))
    return rules


def _grouped(key: str, parameters: tuple[str, ...], groups: int, sizes: tuple[int, ...]) -> Rule:
    """One tensor whose rows are, group by group, `sizes` rows of each parameter."""

    def load(x: Array) -> tuple[Array, ...]:
        x = x.reshape(groups, sum(sizes), x.shape[-1])
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = (x[:, end - size : end] for size, end in zip(sizes, ends, strict=True))
        return tuple(part.reshape(-1, x.shape[-1]).T for part in parts)

    def save(*parts: Array) -> tuple[Array]:
        rows = [part.T.reshape(groups, -1, part.shape[0]) for part in parts]
        return (concatenate(rows, 1).reshape(-1, parts[0].shape[0]),)

    return Rule((key,), parameters, load, save)


def _linear_rules(theirs: str, ours: str, options: Mapping[str, Any], interleaved: bool) -> list[Rule]:
    heads, groups = options["heads"], options["key_heads"]
    keys, values = options["key_width"], options["value_width"]
    parts = [f"{ours}.projections.{name}.kernel" for name in ("query", "key", "value")]
    gate, beta, step = f"{ours}.gate.kernel", f"{ours}.beta.weights.kernel", f"{ours}.decay.up.kernel"
    sizes = (groups * keys, groups * keys, heads * values)
    if interleaved:
        shared = heads // groups
        rules = [
            _grouped(f"{theirs}.in_proj_qkvz.weight", (*parts, gate), groups, (keys, keys, *(shared * values,) * 2)),
            _grouped(f"{theirs}.in_proj_ba.weight", (beta, step), groups, (shared, shared)),
        ]
    else:
        rules = [
            fused(f"{theirs}.in_proj_qkv.weight", parts, sizes),
            transposed(f"{theirs}.in_proj_z.weight", gate),
            transposed(f"{theirs}.in_proj_b.weight", beta),
            transposed(f"{theirs}.in_proj_a.weight", step),
        ]
    channels = [f"{ours}.convolutions.{name}.weights" for name in ("query", "key", "value")]
    return [
        *rules,
        convolution(f"{theirs}.conv1d.weight", channels, sizes),
        copy(f"{theirs}.A_log", f"{ours}.decay.rate"),
        copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
        copy(f"{theirs}.norm.weight", f"{ours}.norm.scale"),
        transposed(f"{theirs}.out_proj.weight", f"{ours}.out.kernel"),
    ]


def _feedforward_rules(theirs: str, ours: str, config: LanguageModelConfig) -> list[Rule]:
    if config.feedforward != "moe":
        return swiglu_rules(theirs, ours)
    rules = [transposed(f"{theirs}.gate.weight", f"{ours}.router.kernel")]
    for name in ("gate", "up", "down"):
        keys = [f"{theirs}.experts.{e}.{name}_proj.weight" for e in range(config.feedforward_options["experts"])]
        rules.append(experts(keys, f"{ours}.{name}"))
        rules += projection(f"{theirs}.shared_expert.{name}_proj", f"{ours}.shared.{name}")
    return [*rules, *projection(f"{theirs}.shared_expert_gate", f"{ours}.shared_gate")]
