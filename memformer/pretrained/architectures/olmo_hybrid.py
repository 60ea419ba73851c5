"""OLMo-Hybrid: layers of the gated delta rule, every fourth of softmax attention with norms of outputs."""

from collections.abc import Mapping
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.fields import memory_options, read_rope, require, write_rope
from memformer.pretrained.architectures.llama import attention_rules
from memformer.pretrained.architectures.qwen3_next import ATTENTION, KINDS, L2NORM_EPSILON, LINEAR, repeating
from memformer.pretrained.architectures.rules import Rule, convolution, copy, projection, transposed

__all__ = ["olmo_config", "olmo_fields", "olmo_rules"]

# Epsilon of the norm of what the delta rule reads, the same in every checkpoint.
READ_EPSILON = 1e-5
NO_POSITIONS = {"rope_type": "default", "rope_theta": None}
PLACES = {LINEAR: "pre", ATTENTION: "output"}


def olmo_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` for the config.json of an OLMo-Hybrid."""
    require(raw, hidden_act="silu", attention_bias=False)
    depth, width, heads = raw["num_hidden_layers"], raw["hidden_size"], raw["num_attention_heads"]
    kinds = raw.get("layer_types") or [_kind(i, depth) for i in range(depth)]
    for kind in kinds:
        require({"layer_types": kind}, layer_types=tuple(KINDS))
    epsilon, key_heads = raw.get("rms_norm_eps", 1e-6), raw.get("linear_num_key_heads") or heads
    key_width = raw.get("linear_key_head_dim") or int(0.75 * width / key_heads)
    pattern = repeating([KINDS[kind] for kind in kinds])
    names = (pattern,) if isinstance(pattern, str) else pattern
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
    return {
        "memory": pattern,
        "memory_options": {name: options[name] for name in dict.fromkeys(names)},
        "norm_place": tuple(PLACES[name] for name in names),
        "width": width,
        "depth": depth,
        "heads": heads,
        "key_width": raw.get("head_dim") or width // heads,
        "feedforward": "swiglu",
        "feedforward_options": {"hidden": raw["intermediate_size"]},
        "norm": "rms",
        "norm_epsilon": epsilon,
        "max_length": raw.get("max_position_embeddings", 65536),
        "scale_embeddings": False,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def _kind(layer: int, depth: int) -> str:
    full = layer % 4 == 3 or (depth < 4 and layer == depth - 1)
    return "full_attention" if full else "linear_attention"


def olmo_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """Fields of config.json for an OLMo-Hybrid."""
    attention, linear = memory_options(config, ATTENTION), memory_options(config, LINEAR)
    names = {memory: kind for kind, memory in KINDS.items()}
    return {
        "vocab_size": vocab,
        "hidden_size": config.width,
        "intermediate_size": config.feedforward_options["hidden"],
        "num_hidden_layers": config.depth,
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["groups"],
        "head_dim": attention["key_width"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": False,
        "linear_num_key_heads": linear["key_heads"],
        "linear_num_value_heads": linear["heads"],
        "linear_key_head_dim": linear["key_width"],
        "linear_value_head_dim": linear["value_width"],
        "linear_conv_kernel_dim": linear["conv_width"],
        "linear_allow_neg_eigval": linear["beta_limit"] == 2,
        "layer_types": [names[memory] for memory in config.pattern] * (config.depth // len(config.pattern)),
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        **(write_rope(attention) if attention["rotary"] else {"rope_parameters": NO_POSITIONS}),
    }


def olmo_rules(config: LanguageModelConfig) -> list[Rule]:
    """The rules of an OLMo-Hybrid."""
    rules = [copy("model.embed_tokens.weight", "embedding.table"), copy("model.norm.weight", "norm.scale")]
    if not config.tie_embeddings:
        rules.append(transposed("lm_head.weight", "head.kernel"))
    for i in range(config.depth):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        if config.pattern[i % len(config.pattern)] == LINEAR:
            rules += _linear_rules(f"{theirs}.linear_attn", f"{ours}.memory")
            norms = ("input_layernorm", "post_attention_layernorm")
        else:
            options = memory_options(config, ATTENTION)
            rules += attention_rules(f"{theirs}.self_attn", f"{ours}.memory", options)
            norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        for name in ("gate", "up", "down"):
            rules += projection(f"{theirs}.mlp.{name}_proj", f"{ours}.feedforward.{name}")
        rules.append(copy(f"{theirs}.{norms[0]}.weight", f"{ours}.norm.scale"))
        rules.append(copy(f"{theirs}.{norms[1]}.weight", f"{ours}.feedforward_norm.scale"))
    return rules


def _linear_rules(theirs: str, ours: str) -> list[Rule]:
    rules = []
    for name in ("query", "key", "value"):
        rules += projection(f"{theirs}.{name[0]}_proj", f"{ours}.projections.{name}")
        weights = f"{ours}.convolutions.{name}.weights"
        rules.append(convolution(f"{theirs}.{name[0]}_conv1d.weight", (weights,)))
    return [
        *rules,
        transposed(f"{theirs}.a_proj.weight", f"{ours}.decay.up.kernel"),
        transposed(f"{theirs}.b_proj.weight", f"{ours}.beta.weights.kernel"),
        transposed(f"{theirs}.g_proj.weight", f"{ours}.gate.kernel"),
        transposed(f"{theirs}.o_proj.weight", f"{ours}.out.kernel"),
        copy(f"{theirs}.A_log", f"{ours}.decay.rate"),
        copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
        copy(f"{theirs}.o_norm.weight", f"{ours}.norm.scale"),
    ]
