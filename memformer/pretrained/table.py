"""The table of architectures: what a config.json may name, and how its config and weights convert."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures import fla, gpt2, kimi_linear, llama, mamba2, olmo_hybrid
from memformer.pretrained.architectures import qwen3_next as qwen
from memformer.pretrained.architectures.rules import Rule

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`.

    Attributes:
      model_type: of its config.json.
      fields: from a config.json to fields of `LanguageModelConfig`.
      config: from a config, with sizes given, and the number of ids to the fields of config.json; None for models that
        are loaded only in part, and so cannot be saved.
      rules: of a config: all tensors of a checkpoint, with the parameters they become.
      prefix: of the keys of the bare model; a checkpoint of the bare model lacks it.
      ignored: pattern of keys that hold no parameters of the language model.
      renames: patterns in keys, and what the rules have in their place.
    """

    model_type: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Callable[[LanguageModelConfig, int], dict[str, Any]] | None
    rules: Callable[[LanguageModelConfig], list[Rule]]
    prefix: str = "model."
    ignored: str = r".*rotary_emb\.inv_freq"
    renames: tuple[tuple[str, str], ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", llama.llama_fields, llama.hf_config, llama.model_rules),
    "Qwen2ForCausalLM": Architecture("qwen2", llama.qwen2_fields, llama.hf_config, llama.model_rules),
    "Qwen3ForCausalLM": Architecture("qwen3", llama.qwen3_fields, llama.hf_config, llama.model_rules),
    "GPT2LMHeadModel": Architecture(
        "gpt2", gpt2.gpt2_fields, gpt2.gpt2_config, gpt2.gpt2_rules, "transformer.", r".*\.attn\.(masked_)?bias"
    ),
    # mtp: a head that predicts several tokens, for speculative decoding
    "Qwen3_5ForCausalLM": Architecture(
        "qwen3_5_text", qwen.qwen3_5_fields, qwen.qwen3_5_config, qwen.qwen3_5_rules, ignored=r"mtp\..*"
    ),
    "Qwen3NextForCausalLM": Architecture(
        "qwen3_next", qwen.moe_fields, qwen.moe_config, qwen.qwen3_next_rules, ignored=r"mtp\..*"
    ),
    "OlmoHybridForCausalLM": Architecture(
        "olmo_hybrid",
        olmo_hybrid.olmo_fields,
        olmo_hybrid.olmo_config,
        olmo_hybrid.olmo_rules,
        # names of the released checkpoints
        renames=((r"attention_layer_norm", "input_layernorm"), (r"feedforward_layer_norm", "post_attention_layernorm")),
    ),
    "Mamba2ForCausalLM": Architecture(
        "mamba2", mamba2.mamba2_fields, mamba2.mamba2_config, mamba2.mamba2_rules, "backbone."
    ),
    "KimiLinearForCausalLM": Architecture(
        "kimi_linear",
        kimi_linear.kimi_fields,
        kimi_linear.kimi_config,
        kimi_linear.kimi_rules,
        # transformers saves dense layers under the name of sparse ones
        renames=((r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj"),),
    ),
    # flash-linear-attention; without fuse_norm its gated norm has another name
    "DeltaNetForCausalLM": Architecture("delta_net", fla.delta_net_fields, fla.delta_net_config, fla.delta_net_rules),
    "GatedDeltaNetForCausalLM": Architecture(
        "gated_deltanet", fla.gated_delta_net_fields, fla.gated_delta_net_config, fla.gated_delta_net_rules
    ),
    "GLAForCausalLM": Architecture(
        "gla", fla.gla_fields, fla.gla_config, fla.gla_rules, renames=((r"\.g_norm\.", ".g_norm_swish_gate."),)
    ),
    "RetNetForCausalLM": Architecture(
        "retnet",
        fla.retnet_fields,
        fla.retnet_config,
        fla.retnet_rules,
        renames=((r"\.g_norm\.", ".g_norm_swish_gate."),),
    ),
    "KDAForCausalLM": Architecture("kda", fla.kda_fields, fla.kda_config, fla.kda_rules),
    # the language model of one that also sees
    "Qwen3_5ForConditionalGeneration": Architecture(
        "qwen3_5",
        qwen.qwen3_5_fields,
        None,
        qwen.qwen3_5_rules,
        ignored=r"(mtp|model\.visual)\..*",
        renames=((r"^model\.language_model\.", "model."),),
    ),
}


def find_architecture(raw: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The row of the architecture that a config.json names.

    Raises:
      ValueError: an architecture that is not in the table; the message lists those that are.

    Example:
      >>> find_architecture({"architectures": ["LlamaForCausalLM"]})[0]
      'LlamaForCausalLM'
    """
    named = tuple(raw.get("architectures") or ())
    for name in named:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    # configs written by hand may lack the list
    for name, row in ARCHITECTURES.items():
        if not named and row.model_type == raw.get("model_type"):
            return name, row
    kind = ", ".join(map(repr, named)) or f"model_type {raw.get('model_type')!r}"
    raise ValueError(f"config.json must name an architecture of {', '.join(ARCHITECTURES)}, got {kind}")
