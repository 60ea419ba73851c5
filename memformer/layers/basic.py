"""Building blocks of all layers: dtype policy, logical axis names, norms, linear maps, embedding, dropout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from memformer.core.checks import check, check_floating, check_key, check_number
from memformer.core.types import Array, Float, Int
from memformer.layers.sharding import auto_axes, dividing_prefix

__all__ = [
    "NORMS",
    "Dtypes",
    "Embedding",
    "GroupRMSNorm",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "check_rate",
    "constrain",
    "constrain_residual",
    "dropout",
    "linear",
    "named",
    "stochastic_keys",
]


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """The dtype policy of a model.

    Attributes:
      compute: dtype of activations and matrix products; norms, gates, decays and logits stay float32.
      param: dtype of parameters.

    Example:
      >>> Dtypes("bfloat16").compute
      dtype(bfloat16)
    """

    compute: Any = jnp.float32
    param: Any = jnp.float32

    def __post_init__(self):
        for name in ("compute", "param"):
            dtype = check_floating(f"{name} dtype", getattr(self, name))
            object.__setattr__(self, name, dtype)

    @property
    def wide(self) -> jnp.dtype:
        """Dtype of norms, gates and logits: float32, or float64 where activations are float64."""
        return jnp.dtype("float64") if self.compute == jnp.float64 else jnp.dtype("float32")


def named(init: nnx.Initializer, *names: str | None) -> nnx.Initializer:
    """Attaches logical axis names to the parameter that `init` creates.

    The names are metadata that a trainer maps to mesh axes by one table of rules. Nothing is placed on devices, so a
    model can be built with or without a mesh.
    """
    return nnx.with_partitioning(init, names, eager_sharding=False)


def constrain(x: Array, *names: str | None) -> Array:
    """Shards an activation by the logical names of its axes; the identity outside a mesh.

    Rules come from `nnx.logical_axis_rules`, the mesh from `jax.set_mesh`. Of several mesh axes the first ones that
    divide the array axis are taken, and none where the first does not (a single token under a context axis). Names
    without a rule are left to the compiler, mesh axes that do not exist left out. Inside shard_map nothing is
    constrained.

    Args:
      x: activation.
      *names: per axis, "activation_batch", "activation_time", "activation_norm_time" (time between layers),
        "activation_embed", "activation_heads", "activation_mlp", "activation_vocab" or None.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), spmd.get_logical_axis_rules()
    if mesh.empty or not rules or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    table: dict[str | None, Any] = {**dict(reversed(tuple(rules))), None: None}
    spec: list[Any] = []
    for size, name in zip(x.shape, names, strict=True):
        rule = table.get(name, PartitionSpec.UNCONSTRAINED)
        if rule is not PartitionSpec.UNCONSTRAINED:
            rule = dividing_prefix(rule, size, mesh.shape) or None
        spec.append(rule)
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Shards what lies between layers: with a tensor axis each of its devices keeps a part of the tokens.

    Norms, residual sums and what is saved for the backward pass are divided so; the sum after a layer becomes a
    reduce-scatter, and an all-gather precedes the next layer (Megatron's sequence parallelism, arXiv 2205.05198).
    """
    return constrain(x, "activation_batch", "activation_norm_time", "activation_embed")


def linear(
    size_in: int,
    size_out: int,
    names: tuple[str | None, str | None],
    *,
    dtypes: Dtypes,
    rngs: nnx.Rngs,
    init: nnx.Initializer | None = None,
    bias: bool | nnx.Initializer = False,
    wide: bool = False,
) -> "Linear":
    """A linear map with logical axis names; `wide` computes it in float32 (gates, decays, routers).

    A bias starts at zero, or by the initializer that is given for it.
    """
    init = nnx.initializers.lecun_normal() if init is None else init
    return Linear(
        size_in,
        size_out,
        use_bias=bias is not False,
        kernel_init=named(init, *names),
        bias_init=named(nnx.initializers.zeros if isinstance(bias, bool) else bias, names[1]),
        dtype=dtypes.wide if wide else dtypes.compute,
        param_dtype=dtypes.param,
        rngs=rngs,
        channels=names[1],
    )


class Linear(nnx.Linear):
    """x W + b, and with the parameters of `add_lora` x (W + lora_scale A B) + b.

    Over a tensor axis each device has its part of the channels of all tokens, as the ops want them.
    """

    def __init__(self, *args: Any, channels: str | None = None, **options: Any):
        super().__init__(*args, **options)
        self.channels = channels
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_scale = 1.0

    def __call__(self, inputs: Float[Array, "... D"], out_sharding: Any = None) -> Float[Array, "... F"]:
        """The map of the last axis."""
        y = super().__call__(inputs, out_sharding)
        if self.lora_a is not None:
            x, a, b = (each.astype(self.dtype) for each in (inputs, self.lora_a[...], self.lora_b[...]))
            y = y + self.lora_scale * jnp.matmul(jnp.matmul(x, a), b, preferred_element_type=y.dtype)
        if y.ndim != 3 or self.channels not in ("heads", "mlp", "vocab"):
            return y
        return constrain(y, "activation_batch", "activation_time", f"activation_{self.channels}")


# Norms square their input times this, a power of two: the same bits, and no overflow of float32 below 1e28.
SHRINK = 2.0**-30


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32; entries below 1e28.

    With `zero_centered` the factor is 1 + scale, and scale starts at 0 (Qwen3-Next): in bfloat16 small differences from
    1 keep their digits, and weight decay pulls the factor to 1.

    Source: arXiv 1910.07467.

    Example:
      >>> RMSNorm(2, dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.array([[3.0, 4.0]])).shape
      (1, 2)
    """

    def __init__(
        self, size: int, *, epsilon: float = 1e-6, zero_centered: bool = False, dtypes: Dtypes, rngs: nnx.Rngs
    ):
        init = nnx.initializers.zeros if zero_centered else nnx.initializers.ones
        same: dict[str, Any] = {"dtype": dtypes.wide, "param_dtype": dtypes.param, "rngs": rngs}
        super().__init__(size, epsilon=epsilon * SHRINK**2, scale_init=init, **same)
        self.zero_centered = zero_centered

    def __call__(self, x: Float[Array, "... D"], mask: Array | None = None) -> Float[Array, "... D"]:
        """Returns the shape and dtype of x; statistics cover only the entries where `mask` is True."""
        wide = x.astype(self.dtype) * SHRINK
        if not self.zero_centered:
            return super().__call__(wide, mask=mask).astype(x.dtype)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True, where=mask)
        scale: Any = self.scale
        factor = 1 + scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * lax.rsqrt(square + self.epsilon) * factor).astype(x.dtype)


class GroupRMSNorm(nnx.Module):
    """RMSNorm whose mean square is taken over each of `groups` equal parts of the last axis, in float32.

    Source: arXiv 2405.21060 section 7.2 (Mamba-2).

    Example:
      >>> GroupRMSNorm(4, 2, dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.array([[3.0, 3.0, 5.0, -5.0]])).round(3)
      Array([[ 1.,  1.,  1., -1.]], dtype=float32)
    """

    def __init__(self, size: int, groups: int, *, epsilon: float = 1e-6, dtypes: Dtypes, rngs: nnx.Rngs):
        self.scale = nnx.Param(named(nnx.initializers.ones, "heads")(rngs.params(), (size,), dtypes.param))
        self.groups, self.epsilon, self.dtypes = groups, epsilon, dtypes

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the shape and dtype of x."""
        wide = x.astype(self.dtypes.wide).reshape(*x.shape[:-1], self.groups, -1) * SHRINK
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon * SHRINK**2)
        scale = self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide.reshape(x.shape) * scale).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32; entries below 1e28.

    Source: arXiv 1607.06450.

    Example:
      >>> LayerNorm(2, dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.array([[3.0, 4.0]])).shape
      (1, 2)
    """

    def __init__(self, size: int, *, epsilon: float = 1e-6, dtypes: Dtypes, rngs: nnx.Rngs):
        same: dict[str, Any] = {"dtype": dtypes.wide, "param_dtype": dtypes.param, "rngs": rngs}
        super().__init__(size, epsilon=epsilon * SHRINK**2, use_fast_variance=False, **same)

    def __call__(self, x: Float[Array, "... D"], mask: Array | None = None) -> Float[Array, "... D"]:
        """Returns the shape and dtype of x; statistics cover only the entries where `mask` is True."""
        return super().__call__(x.astype(self.dtype) * SHRINK, mask=mask).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Embedding(nnx.Module):
    """Token embedding, with an optional tied read-out.

        x_t = sqrt(D) E[id_t]        logits_t = E x_t

    E is initialised with standard deviation D^-0.5: embeddings have entries of unit variance, and so have tied logits
    of a normalised x. An id outside [0, V) gives NaN instead of the vector of another token.

    Args:
      vocab: V.
      width: D.
      scale: False leaves out the factor sqrt(D), as most pretrained models do.
      dtypes: the dtype policy.
      rngs: random streams.

    Example:
      >>> embedding = Embedding(5, 8, dtypes=Dtypes(), rngs=nnx.Rngs(0))
      >>> embedding.attend(embedding(jnp.array([[1, 2, 3]]))).shape
      (1, 3, 5)
    """

    def __init__(self, vocab: int, width: int, *, scale: bool = True, dtypes: Dtypes, rngs: nnx.Rngs):
        init = named(nnx.initializers.normal(width**-0.5), "vocab", "embed")
        self.table = nnx.Param(init(rngs.params(), (vocab, width), dtypes.param))
        self.scale, self.dtypes = scale, dtypes

    @auto_axes
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of the ids, in the compute dtype."""
        # Gathers the table over fsdp; the compiler would otherwise gather the larger activations.
        table = constrain(self.table[...].astype(self.dtypes.compute), "activation_vocab", None)
        x = jnp.take(table, ids, axis=0)
        return x * jnp.asarray(table.shape[1] ** 0.5, table.dtype) if self.scale else x

    @auto_axes
    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T classes"]:
        """Inner products with the embeddings of all tokens, in float32."""
        table = self.table[...].astype(self.dtypes.compute)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=self.dtypes.wide)


def check_rate(name: str, rate: Any) -> float:
    """Returns a dropout rate as a float; it must be a number in [0, 1)."""
    check(0 <= check_number(name, rate) < 1, name, "in [0, 1)", rate)
    return float(rate)


def stochastic_keys(key: Array | None, count: int) -> Array | None:
    """Splits a key into `count` keys; None (no dropout) stays None."""
    if key is None:
        return None
    check_key("key", key)
    return jax.random.split(key, count)


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      x: activations.
      rate: in [0, 1).
      key: a random key; None disables dropout.

    Example:
      >>> dropout(jnp.ones(3), 0.5, None)
      Array([1., 1., 1.], dtype=float32)
    """
    if key is None or rate == 0:
        return x
    check_key("key", key)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))
