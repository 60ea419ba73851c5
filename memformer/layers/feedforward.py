"""Feedforward layers, which are memories whose keys and values are parameters."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.autodiff import in_forward_mode
from memformer.core.checks import check, check_choice, check_flags, check_number, check_positive, check_size
from memformer.core.types import Array, Bool, Float
from memformer.layers.basic import Dtypes, constrain, linear, named
from memformer.layers.experts import apply_experts
from memformer.layers.sharding import auto_axes

__all__ = ["FEEDFORWARDS", "MLP", "MixtureOfExperts", "RouterCorrection", "SwiGLU", "feedforward_keys"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # tanh approximation
    "gelu": nnx.gelu,
    # error function, as in BERT
    "gelu_exact": functools.partial(nnx.gelu, approximate=False),
    "relu": nnx.relu,
    "silu": nnx.silu,
}


def _hidden(width: int, hidden: int | None, factor: float) -> int:
    """The given hidden width, or `factor` times the model width, rounded up to a multiple of 8."""
    given = check_positive("feedforward option hidden", hidden)
    return -int(-width * factor // 8) * 8 if given is None else given


class MLP(nnx.Module):
    """y = W2 activation(W1 x): rows of W1 are keys, columns of W2 the values.

    Args:
      width: D.
      hidden: number of keys; None is 4 D.
      activation: "gelu" (tanh approximation), "gelu_exact" (error function), "relu" or "silu".
      bias: adds a bias to both maps, as in the original Transformer.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: an unknown activation, or a hidden width that is not a positive integer.

    Source: arXiv 1706.03762 section 3.3; as a memory, arXiv 2012.14913.

    Example:
      >>> y, aux = MLP(8, dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.ones((1, 2, 8)))
      >>> y.shape, aux
      ((1, 2, 8), {})
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        hidden = _hidden(width, hidden, 4)
        check_flags(bias=bias)
        check_choice("feedforward option activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.up = linear(width, hidden, ("embed", "mlp"), dtypes=dtypes, rngs=rngs, bias=bias)
        self.down = linear(hidden, width, ("mlp", "embed"), dtypes=dtypes, rngs=rngs, bias=bias)

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns (y, {}); `valid` is ignored, there is no auxiliary loss."""
        h = ACTIVATIONS[self.activation](self.up(x))
        h = constrain(h, "activation_batch", "activation_time", "activation_mlp")
        return self.down(h), {}


class SwiGLU(nnx.Module):
    """y = W2 (silu(Wg x) * W1 x).

    Args:
      width: D.
      hidden: hidden width; None is 8 D / 3, which has as many parameters as an MLP of 4 D.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: a hidden width that is not a positive integer.

    Source: arXiv 2002.05202, equation 6.

    Example:
      >>> y, aux = SwiGLU(8, dtypes=Dtypes(), rngs=nnx.Rngs(0))(jnp.ones((1, 2, 8)))
      >>> y.shape, aux
      ((1, 2, 8), {})
    """

    def __init__(self, width: int, *, hidden: int | None = None, dtypes: Dtypes, rngs: nnx.Rngs):
        hidden = _hidden(width, hidden, 8 / 3)
        self.gate = linear(width, hidden, ("embed", "mlp"), dtypes=dtypes, rngs=rngs)
        self.up = linear(width, hidden, ("embed", "mlp"), dtypes=dtypes, rngs=rngs)
        self.down = linear(hidden, width, ("mlp", "embed"), dtypes=dtypes, rngs=rngs)

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns (y, {}); `valid` is ignored, there is no auxiliary loss."""
        h = nnx.silu(self.gate(x)) * self.up(x)
        h = constrain(h, "activation_batch", "activation_time", "activation_mlp")
        return self.down(h), {}


DISPATCHES = ("dense", "ragged")
ROUTERS = ("softmax", "sigmoid")


class RouterCorrection(nnx.Variable):
    """Added to the scores by which experts are chosen; set from outside and not trained by gradients."""


class MixtureOfExperts(nnx.Module):
    """Mixture of SwiGLU experts: y = sum_e p_e SwiGLU_e(x) over the top k experts, p renormalised over those k.

    With dispatch "dense" every expert is computed for every token, and the weights of unselected experts are zero. This
    costs E / k times the arithmetic and E hidden activations per token; in exchange sharding over experts is trivial.
    Meant for up to about 8 experts. "ragged" sorts the tokens by expert and multiplies each by the weights of its own
    experts only (`memformer.layers.experts`), in a loop that has no second derivative. With both no token is dropped,
    and decoding token by token gives the same result as a whole sequence.

    A mesh axis "expert" divides the experts over its devices, with dispatch "ragged" their work too.

    The auxiliary loss "moe_balance" is balance_weight * E sum_e f_e P_e, where f_e is the fraction of selections (of
    valid tokens) that fell on expert e and P_e its mean probability. It equals balance_weight when balanced. Add it
    to the loss unscaled.

    Args:
      width: D.
      experts: E.
      active: k.
      hidden: hidden width per expert; None is 8 D / (3 k), so that the active experts together are as wide as SwiGLU.
      balance_weight: factor of the auxiliary loss.
      norm_topk_prob: False leaves p as it is instead of renormalising it over the k experts.
      shared_hidden: hidden width of a further SwiGLU that is added for every token (DeepSeek, Qwen); None for none.
      shared_gate: multiplies that one by a sigmoid gate of x (Qwen).
      router: "softmax", or "sigmoid": p_e is a sigmoid of its own, and a correction per expert, which no gradient
        reaches, is added for the choice of experts only (DeepSeek-V3).
      routed_scaling_factor: multiplies p.
      dispatch: "dense" or "ragged".
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: active outside [1, experts].

    Source: arXiv 2101.03961, equations 4 to 6; arXiv 1701.06538.

    Example:
      >>> layer = MixtureOfExperts(8, experts=4, active=2, dtypes=Dtypes(), rngs=nnx.Rngs(0))
      >>> y, aux = layer(jnp.ones((1, 2, 8)))
      >>> y.shape, list(aux)
      ((1, 2, 8), ['moe_balance'])
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int = 8,
        active: int = 2,
        hidden: int | None = None,
        balance_weight: float = 0.01,
        norm_topk_prob: bool = True,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        router: str = "softmax",
        routed_scaling_factor: float = 1.0,
        dispatch: str = "dense",
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        experts = check_size("feedforward option experts", experts)
        active = check_size("feedforward option active", active)
        check(active <= experts, "feedforward option active", f"in [1, experts] = [1, {experts}]", active)
        check_choice("feedforward option dispatch", dispatch, DISPATCHES)
        check_choice("feedforward option router", router, ROUTERS)
        check_flags(norm_topk_prob=norm_topk_prob, shared_gate=shared_gate)
        self.scaling = check_number("feedforward option routed_scaling_factor", routed_scaling_factor, above=0)
        if shared_gate and shared_hidden is None:
            raise ValueError("feedforward option shared_gate requires shared_hidden, got None")
        self.norm_topk_prob, self.dispatch = norm_topk_prob, dispatch
        hidden = _hidden(width, hidden, 8 / 3 / active)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        self.active, self.balance_weight, self.dtypes = active, balance_weight, dtypes
        self.router = linear(width, experts, ("embed", None), dtypes=dtypes, rngs=rngs, wide=True)
        wide, back = named(init, "experts", "embed", "mlp"), named(init, "experts", "mlp", "embed")
        # of each parameter, what a token is multiplied by: the trainer counts FLOPs with it
        share = active / experts
        self.gate = nnx.Param(wide(rngs.params(), (experts, width, hidden), dtypes.param), multiplied=share)
        self.up = nnx.Param(wide(rngs.params(), (experts, width, hidden), dtypes.param), multiplied=share)
        self.down = nnx.Param(back(rngs.params(), (experts, hidden, width), dtypes.param), multiplied=share)
        self.correction: Any = nnx.data(None)
        if router == "sigmoid":
            self.correction = RouterCorrection(jnp.zeros(experts, dtypes.wide))
        self.shared: Any = nnx.data(None)
        self.shared_gate: Any = nnx.data(None)
        if shared_hidden is not None:
            self.shared = SwiGLU(width, hidden=shared_hidden, dtypes=dtypes, rngs=rngs)
        if shared_gate:
            self.shared_gate = linear(width, 1, ("embed", None), dtypes=dtypes, rngs=rngs)

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Returns (y, {"moe_balance": loss}); the loss leaves out padding (where `valid` is False)."""
        probability = self._probability(x)
        score = probability if self.correction is None else probability + self.correction[...][None, None]
        # Sorting is divided over sharded tokens; the compiler gathers the operand of lax.top_k.
        chosen = jnp.argsort(lax.stop_gradient(score), axis=-1, descending=True)[..., : self.active]
        choice = jnp.sum(jax.nn.one_hot(chosen, probability.shape[-1], dtype=probability.dtype), axis=2)
        weight = probability * choice
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True) if self.norm_topk_prob else weight
        weight = weight if self.scaling == 1 else weight * self.scaling
        y = self._ragged(x, weight, chosen) if self.dispatch == "ragged" else self._dense(x, weight)
        if self.shared is not None:
            shared = self.shared(x)[0]
            y = y + (shared if self.shared_gate is None else nnx.sigmoid(self.shared_gate(x)) * shared)
        return y, {"moe_balance": self._balance(probability, choice, valid)}

    def _probability(self, x: Array) -> Array:
        scores = self.router(x)
        return jax.nn.softmax(scores, axis=-1) if self.correction is None else nnx.sigmoid(scores)

    def _dense(self, x: Array, weight: Array) -> Array:
        """Every expert for every token; the weights of those that were not chosen are 0."""
        gate, up, down = (p[...].astype(x.dtype) for p in (self.gate, self.up, self.down))
        h = nnx.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        h = constrain(h, "activation_batch", "activation_time", None, "activation_mlp")
        return jnp.einsum("btef,efd->btd", h * weight.astype(x.dtype)[..., None], down)

    def _ragged(self, x: Array, weight: Array, chosen: Array) -> Array:
        if in_forward_mode(x, weight, self.gate[...], self.up[...], self.down[...]):
            return self._dense(x, weight)
        parameters = (p[...].astype(x.dtype) for p in (self.gate, self.up, self.down))
        return apply_experts(x, chosen, jnp.take_along_axis(weight, chosen, axis=-1), *parameters)

    def _balance(self, probability: Array, choice: Array, valid: Array | None) -> Array:
        ones = jnp.ones(probability.shape[:2], probability.dtype)
        counted = ones if valid is None else valid.astype(probability.dtype)
        total = jnp.maximum(jnp.sum(counted), 1)
        share = jnp.einsum("bte,bt->e", choice, counted) / (total * self.active)
        mean = jnp.einsum("bte,bt->e", probability, counted) / total
        return self.balance_weight * probability.shape[-1] * jnp.sum(share * mean)


FEEDFORWARDS: dict[str, Any] = {"mlp": MLP, "swiglu": SwiGLU, "moe": MixtureOfExperts}


def feedforward_keys(name: str) -> tuple[str, ...]:
    """The options of a feedforward layer, by name of the layer.

    Example:
      >>> feedforward_keys("mlp")
      ('hidden', 'activation', 'bias')
    """
    parameters = inspect.signature(FEEDFORWARDS[name].__init__).parameters
    return tuple(key for key in parameters if key not in ("self", "width", "dtypes", "rngs"))
