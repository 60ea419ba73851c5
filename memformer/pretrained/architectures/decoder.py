"""Decoders of the Llama family: shared fields of config.json, rules of embedding, norms and feedforward layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memformer.models.config import LanguageModelConfig
from memformer.pretrained.architectures.fields import require
from memformer.pretrained.architectures.rules import Rule, convolution, copy, projection, transposed

__all__ = [
    "L2NORM_EPSILON",
    "convolved_rules",
    "decoder_config",
    "decoder_fields",
    "decoder_rules",
    "layer_kinds",
    "memory_fields",
    "step_rules",
    "swiglu_rules",
]

# FLA's convention: x / sqrt(|x|^2 + 1e-6)
L2NORM_EPSILON = 1e-3

# Rules of a part of a layer, from the prefix of the keys of the layer, that of the parameters of the part, and the
# number of the layer.
LayerRules = Callable[[str, str, int], list[Rule]]


def decoder_fields(raw: Mapping[str, Any], *, epsilon: float = 1e-6, length: int = 2048) -> dict[str, Any]:
    """Fields of `LanguageModelConfig` that mean the same in every config.json of such a model.

    Args:
      raw: contents of config.json.
      epsilon: default of rms_norm_eps.
      length: default of max_position_embeddings.
    """
    require(raw, hidden_act="silu")
    return {
        "width": raw["hidden_size"],
        "depth": raw["num_hidden_layers"],
        "norm": "rms",
        "norm_epsilon": raw.get("rms_norm_eps", epsilon),
        "max_length": raw.get("max_position_embeddings", length),
        "scale_embeddings": False,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }


def decoder_config(config: LanguageModelConfig, vocab: int) -> dict[str, Any]:
    """The inverse of `decoder_fields`, with the number of ids."""
    return {
        "vocab_size": vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
    }


def memory_fields(kinds: Sequence[str], memories: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields memory and memory_options for the layer_types of a hybrid.

    Args:
      kinds: layer_types.
      memories: the memory of each kind.
      options: of each memory.

    Raises:
      ValueError: an unknown kind.
    """
    for kind in kinds:
        require({"layer_types": kind}, layer_types=tuple(memories))
    layers = tuple(memories[kind] for kind in kinds)
    sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    # the shortest pattern that repeats over the layers
    size = next(n for n in sizes if layers[:n] * (len(layers) // n) == layers)
    used = {name: options[name] for name in dict.fromkeys(layers)}
    return {"memory": layers[0] if size == 1 else layers[:size], "memory_options": used}


def layer_kinds(config: LanguageModelConfig, memories: Mapping[str, str]) -> list[str]:
    """layer_types of a hybrid; the inverse of `memory_fields`."""
    names = {memory: kind for kind, memory in memories.items()}
    return [names[memory] for memory in config.pattern] * (config.depth // len(config.pattern))


def decoder_rules(
    config: LanguageModelConfig,
    memory: LayerRules,
    *,
    feedforward: LayerRules | None = None,
    norms: Callable[[int], tuple[str, str]] = lambda _: ("input_layernorm", "post_attention_layernorm"),
    embedding: str = "model.embed_tokens",
) -> list[Rule]:
    """The rules of a decoder.

    Args:
      config: of the model.
      memory: rules of the memory of a layer.
      feedforward: rules of its feedforward layer; None for a SwiGLU "mlp" in every layer.
      norms: names of the two norms of a layer by its number.
      embedding: name of the embedding.
    """
    rules = [copy(f"{embedding}.weight", "embedding.table"), copy("model.norm.weight", "norm.scale")]
    if not config.tie_embeddings:
        rules.append(transposed("lm_head.weight", "head.kernel"))
    for i in range(config.depth):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        rules += memory(theirs, f"{ours}.memory", i)
        mixed = f"{ours}.feedforward"
        rules += swiglu_rules(f"{theirs}.mlp", mixed) if feedforward is None else feedforward(theirs, mixed, i)
        first, second = norms(i)
        rules.append(copy(f"{theirs}.{first}.weight", f"{ours}.norm.scale"))
        rules.append(copy(f"{theirs}.{second}.weight", f"{ours}.feedforward_norm.scale"))
    return rules


def swiglu_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of a SwiGLU, stored as {gate,up,down}_proj."""
    return [rule for name in ("gate", "up", "down") for rule in projection(f"{theirs}.{name}_proj", f"{ours}.{name}")]


def convolved_rules(theirs: str, ours: str, conv_width: int) -> list[Rule]:
    """Rules of {q,k,v,o}_proj and, with a width, of {q,k,v}_conv1d."""
    rules = [*projection(f"{theirs}.o_proj", f"{ours}.out")]
    for name in ("query", "key", "value"):
        rules += projection(f"{theirs}.{name[0]}_proj", f"{ours}.projections.{name}")
        if conv_width:
            weights = f"{ours}.convolutions.{name}.weights"
            rules.append(convolution(f"{theirs}.{name[0]}_conv1d.weight", (weights,)))
    return rules


def step_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of a decay per head from a_proj, A_log and dt_bias."""
    return [
        *projection(f"{theirs}.a_proj", f"{ours}.decay.up"),
        copy(f"{theirs}.A_log", f"{ours}.decay.rate"),
        copy(f"{theirs}.dt_bias", f"{ours}.decay.bias"),
    ]
