"""Gates of a memory: decays of the state, and write and erase strengths."""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_number
from memformer.core.types import Array, Float
from memformer.layers.basic import Dtypes, linear, named
from memformer.layers.sharding import auto_axes

LogDecay: TypeAlias = Float[Array, "B T H"] | Float[Array, "B T H K"]

__all__ = ["DECAYS", "BoundedDecay", "FixedDecay", "ForgetDecay", "LogSigmoidDecay", "SigmoidGate", "StepDecay"]


class SigmoidGate(nnx.Module):
    """limit * sigmoid(W x + b) per head, in float32: the beta or alpha of a write.

    Args:
      width: D.
      heads: H.
      limit: 1 interpolates between old and new; 2 allows negative eigenvalues of the transition I - beta k k^T, which
        state tracking requires (arXiv 2411.12537).
      bias: False leaves out b.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: a limit that is not a finite number above 0.
    """

    def __init__(self, width: int, heads: int, limit: float, *, bias: bool = True, dtypes: Dtypes, rngs: nnx.Rngs):
        self.limit = check_number("limit", limit, above=0)
        self.weights = linear(width, heads, ("embed", "heads"), dtypes=dtypes, rngs=rngs, bias=bias, wide=True)

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """Values in (0, limit)."""
        return self.limit * nnx.sigmoid(self.weights(x))


def _rate_init(key: Array, shape: tuple[int, ...], dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def step_bias(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Initial biases whose softplus is log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(0.001), jnp.log(0.1)))
    return jnp.log(jnp.expm1(step))


class StepDecay(nnx.Module):
    """Log decay -exp(a_h) softplus(x W + b), per head or per key channel, in float32.

    With `rank`, W is a product of two matrices of that rank, and there is one decay per key channel.

    Args:
      width: D.
      heads: H.
      key_width: K.
      rank: None for one decay per head; otherwise the rank of the projection to per-channel decays.
      dtypes: the dtype policy.
      rngs: random streams.

    Source: arXiv 2405.21060 (Mamba-2), 2412.06464 (per head), 2510.26692 (per channel).
    """

    def __init__(self, width: int, heads: int, key_width: int, rank: int | None, *, dtypes: Dtypes, rngs: nnx.Rngs):
        size = heads if rank is None else heads * key_width
        inner = width if rank is None else rank
        same: dict[str, Any] = {"dtypes": dtypes, "rngs": rngs, "wide": True}
        self.down = nnx.data(None) if rank is None else linear(width, rank, ("embed", None), **same)
        self.up = linear(inner, size, ("embed" if rank is None else None, "heads"), **same)
        self.rate = nnx.Param(named(_rate_init, "heads")(rngs.params(), (heads,), dtypes.param))
        self.bias = nnx.Param(named(step_bias, "heads")(rngs.params(), (size,), dtypes.param))
        self.heads, self.dtypes = heads, dtypes

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[LogDecay, LogDecay]:
        """Returns (log decay, step softplus(x W + b)): [B, T, H] or [B, T, H, K] both."""
        wide = self.dtypes.wide
        step = self.up(x if self.down is None else self.down(x))
        step = nnx.softplus(step + self.bias[...].astype(wide)[None, None, :])
        rate = jnp.exp(self.rate[...].astype(wide))
        if self.down is None:
            return -rate[None, None, :] * step, step
        step = step.reshape(*step.shape[:2], self.heads, -1)
        return -rate[None, None, :, None] * step, step


class LogSigmoidDecay(nnx.Module):
    """Log decay log(sigmoid(x W1 W2 + b)) / 16 per key channel, in float32.

    Args:
      width: D.
      heads: H.
      key_width: K.
      rank: of W1 W2.
      dtypes: the dtype policy.
      rngs: random streams.

    Source: arXiv 2312.06635 section 4.4.
    """

    def __init__(self, width: int, heads: int, key_width: int, rank: int | None, *, dtypes: Dtypes, rngs: nnx.Rngs):
        rank = 16 if rank is None else rank
        same: dict[str, Any] = {"dtypes": dtypes, "rngs": rngs, "wide": True}
        self.down = linear(width, rank, ("embed", None), **same)
        self.up = linear(rank, heads * key_width, (None, "heads"), bias=self._bias(key_width), **same)
        self.heads = heads

    def _bias(self, key_width: int) -> bool | nnx.Initializer:
        return True

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H K"], None]:
        """Returns (log decay, None)."""
        decay = nnx.log_sigmoid(self.up(self.down(x))) / 16
        return decay.reshape(*decay.shape[:2], self.heads, -1), None


class FixedDecay(nnx.Module):
    """Log decay log(1 - 2^-(5 + h)) for head h, the same for every token; no parameters.

    Source: arXiv 2307.08621, equation 8.
    """

    def __init__(self, width: int, heads: int, key_width: int, rank: int | None, *, dtypes: Dtypes, rngs: nnx.Rngs):
        del width, key_width, rank, rngs
        self.heads, self.dtypes = heads, dtypes

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H"], None]:
        """Returns (log decay, None)."""
        head = jnp.arange(self.heads, dtype=self.dtypes.wide)
        decay = jnp.log1p(-(2.0 ** (-5 - head)))
        return jnp.broadcast_to(decay[None, None, :], (*x.shape[:2], self.heads)), None


def _forget_init(least: float, most: float) -> nnx.Initializer:
    """Initial biases of a sigmoid that is exp(-1 / time) per token."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        rate = 1 / jnp.geomspace(least, most, shape[0], dtype=dtype)
        return -rate - jnp.log1p(-jnp.exp(-rate))

    return init


class ForgetDecay(nnx.Module):
    """Log decay log(sigmoid(x W + b)) per head, in float32: a forget gate.

    Args:
      width: D.
      heads: H.
      key_width, rank: not used.
      time: (least, most) tokens after which a head's memory has faded to 1/e at the start of training, at even ratios
        over the heads; None starts at b = 0, 1.4 tokens.
      dtypes: the dtype policy.
      rngs: random streams.

    Source: arXiv 2503.02130 (Forgetting Transformer), whose code calls `time` decay_time_min and decay_time_max.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_width: int,
        rank: int | None,
        *,
        time: tuple[float, float] | None = None,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        del key_width, rank

        bias: Any = True if time is None else _forget_init(*time)
        self.weights = linear(width, heads, ("embed", "heads"), dtypes=dtypes, rngs=rngs, bias=bias, wide=True)

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H"], None]:
        """Returns (log decay, None)."""
        return nnx.log_sigmoid(self.weights(x)), None


class BoundedDecay(LogSigmoidDecay):
    """Log decay -exp(-1/2) sigmoid(x W1 W2 + b) per key channel, in float32: above -0.61.

    b starts as in the first layer of the paper's models: from -8 in the first channel, which then keeps half for some
    3,000 tokens, to 3 in the last, which keeps it for one.

    Source: arXiv 2503.14456 (RWKV-7).
    """

    def _bias(self, key_width: int) -> nnx.Initializer:
        def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
            channel = jnp.arange(shape[0], dtype=dtype)
            # over all channels, and over those of a head
            rise = channel / max(shape[0] - 1, 1)
            turn = 2 * (channel % key_width) / max(key_width - 1, 1) - 1
            return 6 * rise - 5.5 + 2.5 * turn * jnp.abs(turn)

        return init

    @auto_axes
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H K"], None]:
        """Returns (log decay, None)."""
        decay = -math.exp(-0.5) * nnx.sigmoid(self.up(self.down(x)))
        return decay.reshape(*decay.shape[:2], self.heads, -1), None


DECAYS = {
    "step": StepDecay,
    "log_sigmoid": LogSigmoidDecay,
    "fixed": FixedDecay,
    "forget": ForgetDecay,
    "bounded": BoundedDecay,
}
