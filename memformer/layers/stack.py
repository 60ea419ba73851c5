"""The config that Transformer blocks share, and scanned stacks of identical blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from memformer.core.checks import check_choice, check_number, check_positive
from memformer.core.types import Array
from memformer.layers.basic import LayerNorm
from memformer.layers.config import BaseConfig
from memformer.layers.feedforward import ACTIVATIONS

__all__ = ["TransformerShape", "build_stack", "layer_of", "run_stack"]

NORM_PLACES = ("pre", "post")
PLACES = (None, "sinusoidal", "learned", "rotary")


@dataclasses.dataclass(frozen=True)
class TransformerShape(BaseConfig):
    """Config of Transformer blocks.

    Attributes:
      width: D.
      heads: H; must divide D.
      hidden: hidden width of the feedforward layer; None is 4 D.
      activation: of the feedforward layer: "relu", "gelu" (tanh approximation), "gelu_exact" (erf) or "silu".
      norm_place: "pre", x + f(norm(x)), or "post", norm(x + f(x)).
      norm_epsilon: added to the variance in every layer norm.
      positions: None (or "none"), "sinusoidal" or "learned" at the embedding, or "rotary" in self-attention.
      max_length: size of the table of learned positions.
      dropout: rate on the embedding and on the output of each sublayer; active after `model.train()`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> TransformerShape(width=32, heads=2, norm_place="post").key_width
      16
    """

    width: int = 128
    heads: int = 4
    hidden: int | None = None
    activation: str = "relu"
    norm_place: str = "pre"
    norm_epsilon: float = 1e-6
    positions: str | None = "sinusoidal"
    max_length: int = 512
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("width", "heads", "max_length")
        check_positive("hidden", self.hidden)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("norm_place", self.norm_place, NORM_PLACES)
        check_choice("positions", self.positions, PLACES)
        check_number("norm_epsilon", self.norm_epsilon, above=0)

    @property
    def key_width(self) -> int:
        """K."""
        return self.width // self.heads

    def norm(self, rngs: nnx.Rngs) -> LayerNorm:
        """A layer norm of this width."""
        return LayerNorm(self.width, epsilon=self.norm_epsilon, dtypes=self.dtypes, rngs=rngs)


def build_stack(block: Callable[..., nnx.Module], shape: TransformerShape, depth: int, *, rngs: nnx.Rngs) -> Any:
    """Builds `depth` blocks as one module whose parameters have a leading axis "layers", for `run_stack`.

    Example:
      >>> from memformer.layers.transformer import EncoderBlock
      >>> stack = build_stack(EncoderBlock, TransformerShape(width=8, heads=2), 3, rngs=nnx.Rngs(0))
      >>> stack.attention.query.kernel.shape
      (3, 8, 8)
    """

    def build(key: Array) -> nnx.Module:
        return block(shape, rngs=nnx.Rngs(params=key))

    keys = jax.random.split(rngs.params(), depth)
    names = {nnx.PARTITION_NAME: "layers"}
    return nnx.vmap(build, in_axes=0, out_axes=0, axis_size=depth, transform_metadata=names)(keys)


def run_stack(stack: Any, step: Callable[[Any, Array, Any], tuple[Array, Any]], x: Array, each: Any = None) -> Any:
    """Scans `step(block, x, each[i]) -> (x, result)` over the blocks, so that one block is compiled.

    Results have a leading axis of layers.
    """
    graph, parameters = nnx.split(stack)

    def body(x: Array, xs: Any) -> tuple[Array, Any]:
        return step(nnx.merge(graph, xs[0]), x, xs[1])

    return lax.scan(body, x, (parameters, each))


def layer_of(stack: Any, index: int) -> Any:
    """One block of a stack."""
    graph, parameters = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], parameters))
