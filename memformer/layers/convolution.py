"""Short causal convolution on queries, keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_size
from memformer.core.segments import Segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, named
from memformer.layers.sharding import auto_axes

__all__ = ["ShortConvolution"]


@jax.custom_vjp
def _permute(x: Float[Array, "B T C"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]) -> Array:
    """x[b, order[b, t]]; given `inverse`, the inverse permutation, the backward pass is a gather too."""
    return jnp.take_along_axis(x, order[:, :, None], axis=1, mode="promise_in_bounds")


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved, cotangent):
    order, inverse = saved
    return _permute(cotangent, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution followed by silu: y_t = silu(sum_{j < W} a_j x_{t-j}).

    Inputs before the first token of a segment are zero, and padding is skipped, so packed sequences give the same
    outputs as unpacked ones. The state holds the last W - 1 inputs of the last segment, [B, W-1, C].

    Args:
      channels: C, named "heads" for sharding.
      width: W, at least 1.
      dtypes: the dtype policy.
      rngs: random streams.

    Source: arXiv 2406.06484 section 3.4; arXiv 2312.00752.

    Example:
      >>> layer = ShortConvolution(3, 4, dtypes=Dtypes(), rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((2, 5, 3)))
      >>> y.shape, state.shape
      ((2, 5, 3), (2, 3, 3))
    """

    def __init__(self, channels: int, width: int, *, dtypes: Dtypes, rngs: nnx.Rngs):
        width = check_size("convolution width", width)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=())
        self.weights = nnx.Param(named(init, None, "heads")(rngs.params(), (width, channels), dtypes.param))
        self.channels, self.width, self.dtypes = channels, width, dtypes

    def init_state(self, batch: int) -> Float[Array, "B W C"]:
        """The state before the first token: zeros."""
        return jnp.zeros((batch, self.width - 1, self.channels), self.dtypes.compute)

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T C"], *, segments: Segments | None = None, state: Array | None = None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
        """Returns (y, state)."""
        state = self.init_state(x.shape[0]) if state is None else state
        if segments is None:
            y, history = self._slide(x, state, None)
            return y, history[:, x.shape[1] :]
        # Valid tokens move to the front in their order, so that the convolution meets no padding among them.
        order = jnp.argsort(~segments.valid, axis=1, stable=True)
        inverse = jnp.argsort(order, axis=1)
        index = jnp.take_along_axis(segments.index, order, axis=1)
        y, history = self._slide(_permute(x, order, inverse), state, index)
        return _permute(y, inverse, order), self._last(history, index, segments)

    def _slide(self, x: Array, state: Array, index: Array | None) -> tuple[Array, Array]:
        """Returns the sum over shifted copies, and [state, x] concatenated."""
        weights = self.weights[...].astype(x.dtype)
        width, time = self.width, x.shape[1]
        history = jnp.concatenate([state, x], axis=1)
        # The state belongs to the first segment.
        place = None if index is None else jnp.pad(index, ((0, 0), (width - 1, 0)))
        y = x * weights[None, None, 0]
        for j in range(1, width):
            past = history[:, width - 1 - j : width - 1 - j + time]
            if place is not None and index is not None:
                same = jnp.equal(place[:, width - 1 - j : width - 1 - j + time], index)
                past = jnp.where(same[:, :, None], past, jnp.zeros_like(past))
            y = y + past * weights[None, None, j]
        return nnx.silu(y), history

    def _last(self, history: Array, index: Array, segments: Segments) -> Array:
        """The W - 1 inputs up to the last valid token, zero where they belong to an earlier segment."""
        width = self.width
        count = jnp.sum(segments.valid, axis=1, dtype=jnp.int32)
        take = count[:, None] + jnp.arange(width - 1, dtype=jnp.int32)[None, :]
        place = jnp.pad(index, ((0, 0), (width - 1, 0)))
        here = jnp.take_along_axis(place, take, axis=1) == segments.index[:, -1:]
        last = jnp.take_along_axis(history, take[:, :, None], axis=1)
        return jnp.where(here[:, :, None], last, jnp.zeros_like(last))
