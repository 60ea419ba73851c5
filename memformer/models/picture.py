"""Image encoders that return a grid of vectors to attend to: convolutions, or a Transformer on patches."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_size
from memformer.core.types import Array, Float
from memformer.layers.basic import Dtypes, LayerNorm, linear, named, stochastic_keys
from memformer.layers.positions import sinusoid
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape
from memformer.layers.transformer import EncoderBlock

__all__ = ["ConvGrid", "PatchGrid", "add_places"]


def add_places(grid: Float[Array, "B R C F"]) -> Float[Array, "B R C F"]:
    """Adds fixed 2-D positions: sines and cosines of the row in one half of the channels, of the column in the other.

    Without them the vectors of a small network depend only on their neighbourhood, not on where it is.

    Example:
      >>> add_places(jnp.zeros((1, 2, 3, 8))).shape
      (1, 2, 3, 8)
    """
    _, rows, columns, width = grid.shape
    down = sinusoid(jnp.arange(rows, dtype=jnp.int32)[None], width // 2)[0]
    along = sinusoid(jnp.arange(columns, dtype=jnp.int32)[None], width // 2)[0]
    places = jnp.concatenate(
        [
            jnp.broadcast_to(down[:, None], (rows, columns, width // 2)),
            jnp.broadcast_to(along[None], (rows, columns, width // 2)),
        ],
        axis=-1,
    )
    return grid + places.astype(grid.dtype)[None]


def _check_width(what: str, width: int) -> None:
    if width % 4:
        raise ValueError(f"{what} must be a multiple of 4 (sines and cosines of row and column), got {width}")


class ConvGrid(nnx.Module):
    """3 x 3 convolutions, each with a layer norm over channels and a ReLU; all but the last halve the picture.

    Args:
      channels: of each convolution; n of them reduce the sides of the picture by 2^(n - 1).
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: no convolution, a channel count that is not a positive integer, or a last one that is not a multiple
        of 4.

    Example:
      >>> ConvGrid((8, 8, 16), dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.ones((1, 32, 32, 3))).shape
      (1, 8, 8, 16)
    """

    def __init__(self, channels: Sequence[int], *, dtypes: Dtypes, rngs: nnx.Rngs):
        if not channels:
            raise ValueError("channels must have at least one entry, one per convolution, got ()")
        for count in channels:
            check_size("channels", count)
        _check_width("the last of channels", channels[-1])
        self.width, self.dtypes = channels[-1], dtypes
        self.convolutions = nnx.List(
            [self._convolution(i, (3, *channels)[i : i + 2], len(channels), rngs) for i in range(len(channels))]
        )
        self.norms = nnx.List([LayerNorm(count, dtypes=dtypes, rngs=rngs) for count in channels])

    def _convolution(self, index: int, sizes: Sequence[int], count: int, rngs: nnx.Rngs) -> nnx.Conv:
        stride = 1 if index == count - 1 else 2
        return nnx.Conv(
            sizes[0],
            sizes[1],
            kernel_size=(3, 3),
            strides=(stride, stride),
            use_bias=False,
            kernel_init=named(nnx.initializers.he_normal(), None, None, None, "embed"),
            dtype=self.dtypes.compute,
            param_dtype=self.dtypes.param,
            rngs=rngs,
        )

    @auto_axes
    def __call__(self, picture: Float[Array, "B Y X 3"], key: Array | None = None) -> Float[Array, "B R C F"]:
        """The grid of a picture in [0, 1]; there is no dropout, so `key` has no effect."""
        x = (2 * picture - 1).astype(self.dtypes.compute)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return add_places(x)


class PatchGrid(nnx.Module):
    """Embedding of square patches followed by Transformer encoder blocks.

    Args:
      shape: config of the blocks.
      patch: side of a patch in pixels; must divide the sides of the picture.
      depth: number of blocks.
      rngs: random streams.

    Raises:
      ValueError: a size that is not a positive integer, or a width that is not a multiple of 4.

    Source: arXiv 2010.11929 section 3.1 (with fixed positions, and without a class token).

    Example:
      >>> shape = TransformerShape(width=16, heads=2, positions=None)
      >>> PatchGrid(shape, patch=4, depth=1, rngs=nnx.Rngs(0))(jnp.ones((1, 16, 16, 3))).shape
      (1, 4, 4, 16)
    """

    def __init__(self, shape: TransformerShape, *, patch: int, depth: int, rngs: nnx.Rngs):
        check_size("patch", patch)
        check_size("encoder_depth", depth)
        _check_width("width", shape.width)
        self.width, self.patch, self.dtypes = shape.width, patch, shape.dtypes
        same: dict[str, Any] = {"dtypes": shape.dtypes, "rngs": rngs}
        self.embedding = linear(3 * patch * patch, shape.width, (None, "embed"), bias=True, **same)
        self.blocks = nnx.List([EncoderBlock(shape, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(shape.width, **same)

    @auto_axes
    def __call__(self, picture: Float[Array, "B Y X 3"], key: Array | None = None) -> Float[Array, "B R C F"]:
        """The grid of a picture in [0, 1]; `key` is the random key of dropout, None disables it.

        Raises:
          ValueError: a picture whose sides are not multiples of `patch`.
        """
        batch, height, width, _ = picture.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"picture must have sides that patch = {self.patch} divides, got {picture.shape}")
        rows, columns = height // self.patch, width // self.patch
        x = (2 * picture - 1).astype(self.dtypes.compute)
        x = x.reshape(batch, rows, self.patch, columns, self.patch, 3).swapaxes(2, 3)
        x = add_places(self.embedding(x.reshape(batch, rows, columns, -1)))
        x = x.reshape(batch, rows * columns, self.width)
        keys = stochastic_keys(key, len(self.blocks))
        for i, block in enumerate(self.blocks):
            x = block(x, None if keys is None else keys[i])
        return self.norm(x).reshape(batch, rows, columns, self.width)
