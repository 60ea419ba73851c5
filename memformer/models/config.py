"""Config of MemoryLM, checked at construction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict

from memformer.core.checks import (
    check_at_least,
    check_choice,
    check_number,
    check_options,
    check_positive,
    check_size,
)
from memformer.layers.basic import NORMS
from memformer.layers.config import BaseConfig
from memformer.layers.feedforward import FEEDFORWARDS
from memformer.layers.memory import check_memory
from memformer.layers.positions import LearnedPositions, SinusoidalPositions

__all__ = ["POSITIONS", "REMAT", "LanguageModelConfig", "check_input"]

POSITIONS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}

# Where the norm of a sublayer f stands: x + f(norm(x)) or x + norm(f(x)).
NORM_PLACES = ("pre", "output")

# Activations of a block that are saved for the backward pass; all others are recomputed.
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
      ValueError: give either vocab_size (inputs are ids) or features (inputs are float vectors) and 0 for the other,
      got vocab_size = 7 and features = 2
    """
    if bool(vocab_size) == bool(features):
        raise ValueError(
            f"give either vocab_size (inputs are ids) or features (inputs are float vectors) and 0 for the other, "
            f"got vocab_size = {vocab_size} and features = {features}"
        )
    check_size("features" if features else "vocab_size", features or vocab_size)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(BaseConfig):
    """Config of a MemoryLM.

    Attributes:
      memory: a name in `MEMORIES`, or the pattern of names that repeats over the depth: a tuple, or "a,b,c".
      memory_options: options of the memory; for a pattern of several memories, a mapping from name to options. Options
        heads, key_width and value_width replace those below.
      width: D.
      depth: number of layers; a multiple of the length of the pattern.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      feedforward: "swiglu", "mlp", "moe", or None (or "none") for blocks without a feedforward layer.
      feedforward_options: options of the feedforward layer.
      dense_layers: number of first layers that have a SwiGLU in the place of the feedforward layer (DeepSeek).
      dense_hidden: its hidden width; None is the default of `SwiGLU`.
      positions: None (or "none"), "learned" or "sinusoidal" at the embedding; rotary positions are an option of a
        memory.
      max_length: size of the table of learned positions.
      norm: "rms" or "layer".
      zero_centered_norm: norms "rms" of blocks and read-out multiply by 1 + scale (Qwen3-Next).
      norm_place: "pre", x + f(norm(x)), or "output", x + norm(f(x)) (OLMo 2), or one of them per memory of the pattern.
      norm_epsilon: added to the mean square or variance in the norms of blocks and read-out.
      scale_embeddings: embeddings are multiplied by sqrt(D); False as in most pretrained models.
      tie_embeddings: the read-out shares the embedding table.
      scan_layers: compile the repeating group of layers once and scan it; worth it for deep models.
      remat: activations saved per block: None for all, "full" for its input only, "dots" for that and all matrix
        products, "projections" for that and products with weights.
      dropout: rate on the embedding and on the output of each layer; active after `model.train()`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

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
    dense_layers: int = 0
    dense_hidden: int | None = None
    positions: str | None = None
    max_length: int = 2048
    norm: str = "rms"
    zero_centered_norm: bool = False
    norm_place: str | tuple[str, ...] = "pre"
    norm_epsilon: float = 1e-6
    scale_embeddings: bool = True
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
        check_at_least("dense_layers", self.dense_layers, 0)
        check_positive("dense_hidden", self.dense_hidden)
        if self.dense_layers and self.scan_layers:
            raise ValueError(f"dense_layers must be 0 where layers are scanned, got {self.dense_layers}")
        check_choice("positions", self.positions, (None, *POSITIONS))
        check_choice("norm", self.norm, tuple(NORMS))
        check_number("norm_epsilon", self.norm_epsilon, above=0)
        if self.zero_centered_norm and self.norm != "rms":
            raise ValueError(f"zero_centered_norm requires norm 'rms', got {self.norm!r}")
        places = self.norm_places
        if len(places) != len(self.pattern):
            raise ValueError(f"norm_place must be one name or {len(self.pattern)}, one per memory, got {len(places)}")
        for place in places:
            check_choice("norm_place", place, NORM_PLACES)
        check_choice("remat", self.remat, (None, *REMAT))

    @property
    def pattern(self) -> tuple[str, ...]:
        """Memories of the repeating group of layers."""
        return (self.memory,) if isinstance(self.memory, str) else self.memory

    @property
    def norm_places(self) -> tuple[str, ...]:
        """Place of the norms in each block of the repeating group."""
        return (self.norm_place,) * len(self.pattern) if isinstance(self.norm_place, str) else self.norm_place

    def build_norm(self, rngs: nnx.Rngs) -> nnx.Module:
        """A norm of the width D."""
        options = {"zero_centered": True} if self.zero_centered_norm else {}
        return NORMS[self.norm](self.width, epsilon=self.norm_epsilon, dtypes=self.dtypes, rngs=rngs, **options)

    def options_of(self, name: str) -> Mapping[str, Any]:
        """Options of one memory of the pattern."""
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
