"""Matrix memory layers: linear attention, the delta rule, DeltaProduct and mesa."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import (
    check,
    check_choice,
    check_flags,
    check_groups,
    check_number,
    check_positive,
    check_size,
)
from memformer.core.types import Array
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import linear, named
from memformer.layers.gates import DECAYS, SigmoidGate
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.linear_attention import linear_attention
from memformer.ops.log_linear_attention import LogLinearState, log_linear_attention
from memformer.ops.mesa import MesaState, mesa

__all__ = ["DeltaProduct", "DeltaRule", "LinearAttention", "LogLinearAttention", "Mesa"]

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: nnx.elu(x) + jnp.ones_like(x),
    "relu": nnx.relu,
    "taylor": lambda x: _taylor(x),
}


def _taylor(x: Array) -> Array:
    """Features whose inner product is 1 + s + s^2 / 2 with s = x . y / sqrt(K): exp(s) to second order (Based)."""
    x = x * x.shape[-1] ** -0.25
    pairs = x[..., :, None] * x[..., None, :] * 0.5**0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs.reshape(*x.shape[:-1], -1)], axis=-1)


def _build_decay(decay: str | None, layer: MemoryLayer, rank: int | None, rngs: nnx.Rngs) -> Any:
    """Builds the decay module of a layer by name; None for no decay."""
    check_choice("decay", decay, (None, *DECAYS))
    rank = check_positive("decay_rank", rank)
    if decay is None:
        return nnx.data(None)
    return DECAYS[decay](layer.width, layer.heads, layer.key_width, rank, dtypes=layer.dtypes, rngs=rngs)


class LinearAttention(MemoryLayer):
    """Linear attention with an optional feature map and decay.

    Args:
      width: D.
      heads: H.
      feature_map: of q and k: "identity", "elu" (elu + 1), "relu", or "taylor" (exp to second order, of width
        1 + K + K^2).
      normalize: reads are divided by z . q; requires a positive feature map.
      decay: None, or a name in `DECAYS`.
      decay_rank: None for one decay per head; otherwise the rank of per-channel decays.
      key_heads: number of heads of q and k, shared by the H heads of v; None is H.
      discretize: multiplies values by the step size of the "step" decay (Mamba-2).
      skip: adds the written value times a learned scalar per head to the read (Mamba-2).
      scale: factor on the read; None is K ** -0.5 (Mamba-2 has 1).
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        feature_map: str = "identity",
        normalize: bool = False,
        decay: str | None = None,
        decay_rank: int | None = None,
        key_heads: int | None = None,
        discretize: bool = False,
        skip: bool = False,
        scale: float | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_flags(normalize=normalize, discretize=discretize, skip=skip)
        check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
        if normalize and feature_map == "identity":
            raise ValueError("normalize requires a positive feature_map, 'elu', 'relu' or 'taylor', got 'identity'")
        if discretize and (decay != "step" or decay_rank is not None):
            raise ValueError(f"discretize requires decay 'step' without decay_rank, got {decay!r} and {decay_rank!r}")
        keys = check_groups(heads, key_heads)
        super().__init__(width, heads=heads, head_counts=(keys, keys, heads), rngs=rngs, **options)
        self.feature_map, self.normalize, self.discretize = feature_map, normalize, discretize
        self.scale = None if scale is None else check_number("scale", scale, above=0)
        self.decay = _build_decay(decay, self, decay_rank, rngs)
        self.skip = nnx.data(None)
        if skip:
            self.skip = nnx.Param(named(nnx.initializers.ones, "heads")(rngs.params(), (heads,), self.dtypes.param))

    def _apply_op(self, x, parts, segment_ids, memory):
        q, k = (FEATURE_MAPS[self.feature_map](parts[name]) for name in "qk")
        v = parts["v"]
        decay, step = (None, None) if self.decay is None else self.decay(x)
        written, wide = v, self.dtypes.wide
        if step is not None and self.discretize:
            # rounded once: a rounded step would add as much error as the product
            written = (v.astype(wide) * step.astype(wide)[..., None]).astype(v.dtype)
        options: dict[str, Any] = {"decay": decay, "scale": self.scale, "segment_ids": segment_ids}
        o, memory = self._read_write(x, q, k, written, initial_state=memory, **options)
        if self.skip is not None:
            o = (o.astype(wide) + v.astype(wide) * self.skip[...].astype(wide)[None, None, :, None]).astype(v.dtype)
        return o, memory

    def _read_write(self, x, q, k, v, **options):
        return linear_attention(q, k, v, normalize=self.normalize, **options)

    def _init_memory(self, batch, capacity, dtype):
        columns = self.value_width + int(self.normalize)
        rows = jax.eval_shape(FEATURE_MAPS[self.feature_map], jnp.zeros((1, self.key_width))).shape[-1]
        return jnp.zeros((batch, self.heads, rows, columns), self.dtypes.wide)


class LogLinearAttention(LinearAttention):
    """Log-linear attention: linear attention whose past lies on levels of doubling length, with a weight of each.

    The weights are softplus(a W x), with a and W of each head and level.

    Args:
      width: D.
      heads: H.
      levels: L; weights of their own reach back 2^(L - 1) tokens; older tokens share the last level.
      normalize: must be False.
      decay: None, or a name in `DECAYS` with one decay per head.
      decay_rank: must be None.
      rngs: random streams.
      **options: of `LinearAttention` and `MemoryLayer`.

    Source: arXiv 2506.04761.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        levels: int = 15,
        normalize: bool = False,
        decay: str | None = None,
        decay_rank: None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check(normalize is False, "normalize", "False for log-linear attention", normalize)
        check_choice("decay", decay, (None, "step", "fixed", "forget"))
        check(decay_rank is None, "decay_rank", "None for log-linear attention", decay_rank)
        super().__init__(width, heads=heads, decay=decay, rngs=rngs, **options)
        self.levels = check_size("levels", levels)
        size = heads * self.levels
        self.level = linear(width, size, ("embed", "heads"), dtypes=self.dtypes, rngs=rngs, wide=True)
        self.level_scale = nnx.Param(named(nnx.initializers.ones, "heads")(rngs.params(), (size,), self.dtypes.param))

    def _read_write(self, x, q, k, v, **options):
        weights = nnx.softplus(self.level(x) * self.level_scale[...].astype(self.dtypes.wide)[None, None])
        return log_linear_attention(q, k, v, weights.reshape(*v.shape[:3], self.levels), **options)

    def _init_memory(self, batch, capacity, dtype):
        state = super()._init_memory(batch, capacity, dtype)
        levels = jnp.zeros((*state.shape[:2], self.levels, *state.shape[2:]), state.dtype)
        return LogLinearState(levels, jnp.zeros(batch, jnp.int32))

    def state_letters(self, state):
        """The letters of the arrays of a state."""
        letters = super().state_letters(state)
        letters["memory"] = letters["memory"]._replace(levels="B H L K V")
        return letters


class DeltaRule(MemoryLayer):
    """The delta rule: a write replaces the fraction beta of the value stored at its key.

    Args:
      width: D.
      heads: H.
      decay: None, or a name in `DECAYS`.
      decay_rank: None for one decay per head; otherwise the rank of per-channel decays.
      beta_limit: beta is beta_limit * sigmoid(.); 1 interpolates, up to 2 a write can reverse the stored value.
      beta_bias: False leaves out the bias of beta's projection, as pretrained models do.
      key_heads: number of heads of q and k, shared by the H heads of v; None is H.
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        decay: str | None = None,
        decay_rank: int | None = None,
        beta_limit: float = 1.0,
        beta_bias: bool = True,
        key_heads: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        keys = check_groups(heads, key_heads)
        check_flags(beta_bias=beta_bias)
        super().__init__(width, heads=heads, head_counts=(keys, keys, heads), rngs=rngs, **options)
        beta_limit = check_number("beta_limit", beta_limit, above=0)
        self.beta = SigmoidGate(width, heads, beta_limit, bias=beta_bias, dtypes=self.dtypes, rngs=rngs)
        self.decay = _build_decay(decay, self, decay_rank, rngs)

    def _apply_op(self, x, parts, segment_ids, memory):
        decay = None if self.decay is None else self.decay(x)[0]
        return delta_rule(**parts, beta=self.beta(x), decay=decay, segment_ids=segment_ids, initial_state=memory)


class DeltaProduct(MemoryLayer):
    """DeltaProduct: N delta-rule writes per token, each with its own key, value and beta, then one read.

    Args:
      width: D.
      heads: H.
      steps: N.
      decay: None, or a name in `DECAYS`; applied once per token.
      decay_rank: None for one decay per head; otherwise the rank of per-channel decays.
      beta_limit: beta is beta_limit * sigmoid(.).
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        steps: int = 2,
        decay: str | None = None,
        decay_rank: int | None = None,
        beta_limit: float = 1.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        steps = check_size("steps", steps)
        super().__init__(width, heads=heads, writes=steps, rngs=rngs, **options)
        beta_limit = check_number("beta_limit", beta_limit, above=0)
        self.beta = SigmoidGate(width, heads * steps, beta_limit, dtypes=self.dtypes, rngs=rngs)
        self.decay = _build_decay(decay, self, decay_rank, rngs)

    def _apply_op(self, x, parts, segment_ids, memory):
        decay = None if self.decay is None else self.decay(x)[0]
        beta = self.beta(x).reshape(*x.shape[:2], self.heads, self.writes)
        beta = jnp.moveaxis(beta, 3, 2)
        return delta_product(**parts, beta=beta, decay=decay, segment_ids=segment_ids, initial_state=memory)


# The least regularisation of a trained mesa layer, so that no system is singular.
RIDGE = 0.25


class Mesa(MemoryLayer):
    """Mesa: reads with the linear map that fits all writes so far, in the least squares sense.

    The regularisation is 1/4 + softplus(a) with a of each head and key channel, 1 at the start.

    Args:
      width: D.
      heads: H.
      decay: None, or a name in `DECAYS` with one decay per head.
      iterations: of conjugate gradients.
      key_heads: number of heads of q and k, shared by the H heads of v; None is H.
      rngs: random streams.
      **options: of `MemoryLayer`.

    Source: arXiv 2506.05233.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        decay: str | None = None,
        iterations: int = 30,
        key_heads: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_choice("decay", decay, (None, "step", "fixed", "forget"))
        keys = check_groups(heads, key_heads)
        super().__init__(width, heads=heads, head_counts=(keys, keys, heads), rngs=rngs, **options)
        self.iterations = check_size("iterations", iterations)
        self.beta = SigmoidGate(width, heads, 1.0, dtypes=self.dtypes, rngs=rngs)
        self.decay = _build_decay(decay, self, None, rngs)
        init = named(nnx.initializers.constant(math.log(math.expm1(1 - RIDGE))), "heads")
        self.ridge_bias = nnx.Param(init(rngs.params(), (heads * self.key_width,), self.dtypes.param))

    def _apply_op(self, x, parts, segment_ids, memory):
        ridge = RIDGE + nnx.softplus(self.ridge_bias[...].astype(self.dtypes.wide))
        ridge = jnp.broadcast_to(ridge.reshape(1, 1, self.heads, -1), (*x.shape[:2], self.heads, self.key_width))
        decay = None if self.decay is None else self.decay(x)[0]
        options: dict[str, Any] = {"segment_ids": segment_ids, "initial_state": memory}
        return mesa(**parts, beta=self.beta(x), ridge=ridge, decay=decay, iterations=self.iterations, **options)

    def _init_memory(self, batch, capacity, dtype):
        values = super()._init_memory(batch, capacity, dtype)
        return MesaState(jnp.zeros((*values.shape[:3], self.key_width), values.dtype), values)

    def state_letters(self, state):
        """The letters of the arrays of a state."""
        letters = super().state_letters(state)
        letters["memory"] = letters["memory"]._replace(keys="B H K K", values="B H K V")
        return letters
