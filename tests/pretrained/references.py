"""Small models of transformers with random weights, saved as Hugging Face folders."""

import dataclasses
from typing import Any

import numpy as np

VOCAB = 61


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of transformers: its config class and fields, and what its tests leave out."""

    config: str
    model: str
    fields: dict[str, Any]


LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# Compilation takes most of the time.
SHALLOW = {"num_hidden_layers": 1}
SCALED = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# One layer of each kind; two value heads share a key head.
HYBRID = {
    **LLAMA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
# As many channels of keys as of values: transformers 5.24 saves three equal parts of the convolution.
OLMO = {"head_dim": 8, "linear_key_head_dim": 12, "linear_value_head_dim": 6}
MAMBA2 = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 12, "state_size": 8,
    "chunk_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# Widths of experts are multiples of 8: torch multiplies them in groups only then, in bfloat16.
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip

REFERENCES: dict[str, Reference] = {
    "llama": Reference("LlamaConfig", "LlamaForCausalLM", LLAMA),
    # Llama 3: scaled rotary rates; tied embeddings, a head width of its own, biases
    "llama3": Reference(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            **LLAMA, **SHALLOW, "rope_parameters": SCALED, "tie_word_embeddings": True, "head_dim": 12,
            "attention_bias": True,
        },
    ),
    "qwen2": Reference("Qwen2Config", "Qwen2ForCausalLM", {**LLAMA, **SHALLOW, "tie_word_embeddings": True}),
    "qwen3": Reference("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, **SHALLOW, "head_dim": 16}),
    "gpt2": Reference(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
            "eos_token_id": None, "pad_token_id": 0,
        },
    ),
    "qwen3_5": Reference("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", HYBRID),
    "olmo_hybrid": Reference(
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {**HYBRID, **OLMO, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    ),
    "olmo_hybrid, rotary": Reference(
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {**HYBRID, **OLMO, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    ),
    "mamba2": Reference("Mamba2Config", "Mamba2ForCausalLM", {**MAMBA2, **SHALLOW, "n_groups": 1}),
    "mamba2, groups": Reference(
        "Mamba2Config", "Mamba2ForCausalLM", {**MAMBA2, "n_groups": 2, "tie_word_embeddings": True}
    ),
    "kimi_linear": Reference(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            **LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 4, "moe_intermediate_size": 24,
            "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
            "num_experts_per_tok": 2, "num_local_experts": 6, "n_group": 1, "linear_head_dim": 8,
            "linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3_next": Reference("Qwen3NextConfig", "Qwen3NextForCausalLM", {**HYBRID, **EXPERTS}),
    "qwen3_next dense": Reference("Qwen3NextConfig", "Qwen3NextForCausalLM", {**HYBRID, "num_experts": 0}),
}  # fmt: skip


# Rows whose options show in logits, gradients and the way back.
VARIANTS = ("llama3", "olmo_hybrid, rotary", "mamba2, groups")


def build(name: str, torch: Any, transformers: Any, *, initial: bool = False) -> Any:
    """A reference with random weights: biases and norms start as zeros and ones, which could hide an error.

    With `initial` the weights are those that transformers draws.
    """
    row = REFERENCES[name]
    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**row.fields)
    model = getattr(transformers, row.model)._from_config(config, dtype=torch.float32).eval()
    if initial:
        return model
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1 and "A_log" not in path:
                # A gain of 2 in every map, so that each token matters for the greedy choice.
                parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
            elif "A_log" not in path:
                parameter.add_(0.2 * noise)
        for path, buffer in model.named_buffers():
            if "correction" in path:
                buffer.copy_(0.3 * torch.randn(buffer.shape))
    return model


def prompts(lengths=(5, 1, 9, 3), seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths; ids 0 and 1 are special."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, VOCAB, size=length).tolist() for length in lengths]
