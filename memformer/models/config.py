"""The shape of a language model, checked when it is written down."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import FrozenDict

from memformer.core.checks import check_choice, check_options, check_size
from memformer.layers.basic import NORMS
from memformer.layers.config import BaseConfig
from memformer.layers.feedforward import FEEDFORWARDS
from memformer.layers.memory import check_memory
from memformer.layers.positions import LearnedPositions, SinusoidalPositions

__all__ = ["POSITIONS", "REMAT", "LanguageModelConfig", "check_input"]

POSITIONS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}

# What the backward pass keeps of a block; the rest is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_input(vocab_size: int, features: int) -> None:
    """Raises ValueError unless inputs are either ids or feature vectors.

    Example:
      >>> check_input(7, 2)
      Traceback (most recent call last):
      ...
      ValueError: give vocab_size for inputs of ids, or features for float inputs, and 0 for the other; got
      vocab_size = 7 and features = 2
    """
    if bool(vocab_size) == bool(features):
        raise ValueError(
            f"give vocab_size for inputs of ids, or features for float inputs, and 0 for the other; got "
            f"vocab_size = {vocab_size} and features = {features}"
        )
    check_size("features" if features else "vocab_size", features or vocab_size)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(BaseConfig):
    """The shape of a MemoryLM.

    Attributes:
      memory: a name in `MEMORIES`, or the pattern of names that repeats over the depth: a tuple, or "a,b,c".
      memory_options: options of the memory; where the pattern has several memories, a mapping from
        memory name to its options.
      width: D.
      depth: layers; a multiple of the pattern's length.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      feedforward: "swiglu", "mlp", "moe" or None (or "none") for blocks without one.
      feedforward_options: options of the feedforward layer.
      positions: None (or "none"), "learned" or "sinusoidal" at the embedding (rotary is an option of a memory).
      max_length: size of the table of learned positions.
      norm: "rms" or "layer".
      tie_embeddings: the read-out is the embedding's table.
      scan_layers: compile the repeating group once and scan it; worth it for deep models.
      remat: None, "full" (a block keeps its input only), "dots" (and all matrix products) or
        "projections" (and products with weights).
      dropout: rate on the embedding and on what each layer adds; active after `model.train()`.

    Raises:
      ValueError: names the key, what was expected and what came.

    Example:
      >>> LanguageModelConfig(memory="delta_rule", width=64, depth=2, heads=2).pattern
      ('delta_rule',)
    """

    memory: str | tuple[str, ...] = "deltaformer"
    memory_options: Mapping[str, Any] = FrozenDict()
    width: int = 128
    depth: int = 1
    heads: int = 4
    key_width: int | None = None
    value_width: int | None = None
    feedforward: str | None = "swiglu"
    feedforward_options: Mapping[str, Any] = FrozenDict()
    positions: str | None = None
    max_length: int = 2048
    norm: str = "rms"
    tie_embeddings: bool = False
    scan_layers: bool = False
    remat: str | None = None
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "memory", _parse_pattern(self.memory))
        for name in self.pattern:
            check_memory(name)
        self.check_sizes("width", "depth", "heads", "max_length")
        if self.depth % len(self.pattern):
            raise ValueError(
                f"depth must be a multiple of the memory pattern's length {len(self.pattern)}, got {self.depth}"
            )
        check_choice("feedforward", self.feedforward, (None, *FEEDFORWARDS))
        check_choice("positions", self.positions, (None, *POSITIONS))
        check_choice("norm", self.norm, tuple(NORMS))
        check_choice("remat", self.remat, (None, *REMAT))

    @property
    def pattern(self) -> tuple[str, ...]:
        """The memories of the repeating group of layers."""
        return (self.memory,) if isinstance(self.memory, str) else self.memory

    def options_of(self, name: str) -> Mapping[str, Any]:
        """The options for one memory of the pattern."""
        if len(set(self.pattern)) == 1 and name not in self.memory_options:
            return self.memory_options
        check_options("memory_options of a pattern", self.memory_options, tuple(dict.fromkeys(self.pattern)))
        return self.memory_options.get(name, {})


def _parse_pattern(memory: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """One name, or the names of "a,b,c" as a tuple."""
    if isinstance(memory, str):
        names = tuple(name.strip() for name in memory.split(","))
        return names if len(names) > 1 else names[0]
    if not memory:
        raise ValueError("memory must be a name or a tuple of at least one name, got ()")
    return memory
