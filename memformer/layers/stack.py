"""The shape that the blocks of a Transformer share, and stacks of equal blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from memformer.core.checks import check_choice, check_size
from memformer.core.types import Array
from memformer.layers.basic import LayerNorm
from memformer.layers.config import BaseConfig
from memformer.layers.feedforward import ACTIVATIONS

__all__ = ["TransformerShape", "build_stack", "layer_of", "run_stack"]

NORM_PLACES = ("pre", "post")
PLACES = (None, "sinusoidal", "learned", "rotary")


@dataclasses.dataclass(frozen=True)
class TransformerShape(BaseConfig):
    """What the blocks of a Transformer have in common.

    Attributes:
      width: D.
      heads: H; must divide D.
      hidden: of the feedforward layer; None is 4 D.
      activation: of the feedforward layer: "relu", "gelu" (tanh), "gelu_exact" (erf) or "silu".
      norm_place: "pre", x + f(norm(x)), or "post", norm(x + f(x)).
      norm_epsilon: added to the variance in every layer norm.
      positions: None (or "none"), "sinusoidal" or "learned" at the embedding, or "rotary" in self-attention.
      max_length: size of a table of learned positions.
      dropout: rate on the embedding and on what each sublayer adds; active after `model.train()`.

    Raises:
      ValueError: names the key, what was expected and what came.

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
        if self.hidden is not None:
            check_size("hidden", self.hidden)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("norm_place", self.norm_place, NORM_PLACES)
        check_choice("positions", self.positions, PLACES)
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon must be above 0, got {self.norm_epsilon!r}")

    @property
    def key_width(self) -> int:
        """K of each head."""
        return self.width // self.heads

    def norm(self, rngs: nnx.Rngs) -> LayerNorm:
        """A layer norm of this width."""
        return LayerNorm(self.width, epsilon=self.norm_epsilon, dtypes=self.dtypes, rngs=rngs)


def build_stack(block: Callable[..., nnx.Module], shape: TransformerShape, depth: int, *, rngs: nnx.Rngs) -> Any:
    """`depth` blocks as one module whose parameters have a leading axis "layers": compiled once, then scanned.

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
    """Scans `step(block, x, each[i]) -> (x, result)` over the blocks; results have a leading axis of layers."""
    graph, parameters = nnx.split(stack)

    def body(x: Array, xs: Any) -> tuple[Array, Any]:
        return step(nnx.merge(graph, xs[0]), x, xs[1])

    return lax.scan(body, x, (parameters, each))


def layer_of(stack: Any, index: int) -> Any:
    """One block of a stack."""
    graph, parameters = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], parameters))
