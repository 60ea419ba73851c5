"""Matrix memories that erase elsewhere than at the key, or whose keys are gates: Comba, GDN-2, RWKV-7, HGRN2, GSA."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check, check_number, check_positive, check_size
from memformer.core.numerics import l2norm
from memformer.core.types import Array
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import linear, named
from memformer.layers.gates import BoundedDecay, SigmoidGate, StepDecay
from memformer.layers.matrix import DeltaRule
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.linear_attention import linear_attention

__all__ = ["Comba", "GatedErase", "GatedSlots", "GatedSlotState", "HGRN2", "RWKV7"]


class Comba(DeltaRule):
    """The gated delta rule with feedback: it erases at w = d k, and reads at q - c w.

    d = sigmoid(.) and c are learned, one of each per key head.

    Args:
      width: D.
      heads: H.
      correction: initial c.
      rngs: random streams.
      **options: of `DeltaRule` and `MemoryLayer`.

    Source: arXiv 2506.02475.
    """

    def __init__(self, width: int, *, heads: int, correction: float = 1.0, rngs: nnx.Rngs, **options: Any):
        super().__init__(width, heads=heads, rngs=rngs, **options)
        keys = self.head_counts[1]

        def scalars(value):
            init = named(nnx.initializers.constant(value), "heads")
            return nnx.Param(init(rngs.params(), (keys,), self.dtypes.param))

        self.erase_scale = scalars(1.0)
        self.correction_scale = scalars(check_number("correction", correction))

    def _apply_op(self, x, parts, segment_ids, memory):
        q, k = parts["q"], parts["k"]
        w = k * nnx.sigmoid(self.erase_scale[...]).astype(k.dtype)[None, None, :, None]
        q = q - w * self.correction_scale[...].astype(k.dtype)[None, None, :, None]
        return super()._apply_op(x, {**parts, "q": q, "w": w}, segment_ids, memory)


class GatedErase(MemoryLayer):
    """Gated DeltaNet-2: erases at b * k, with a gate b per key channel, and writes a * v, with one per value channel.

    Args:
      width: D.
      heads: H.
      decay_rank: rank of the per-channel decays; None for one decay per head.
      erase_limit: b is erase_limit * sigmoid(.).
      rngs: random streams.
      **options: of `MemoryLayer`.

    Source: Gated DeltaNet-2, as in the library flash-linear-attention (fla.ops.gdn2).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        decay_rank: int | None = 16,
        erase_limit: float = 1.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(width, heads=heads, rngs=rngs, **options)
        decay_rank = check_positive("decay_rank", decay_rank)
        same: dict[str, Any] = {"dtypes": self.dtypes, "rngs": rngs}
        erase_limit = check_number("erase_limit", erase_limit, above=0)
        self.erase = SigmoidGate(width, heads * self.key_width, erase_limit, bias=False, **same)
        self.write = SigmoidGate(width, heads * self.value_width, 1.0, bias=False, **same)
        self.decay = StepDecay(width, heads, self.key_width, decay_rank, **same)

    def _apply_op(self, x, parts, segment_ids, memory):
        q, k, v = (parts[name] for name in "qkv")
        w = k * self.erase(x).reshape(k.shape).astype(k.dtype)
        v = v * self.write(x).reshape(v.shape).astype(v.dtype)
        ones = jnp.ones(v.shape[:3], self.dtypes.wide)
        return delta_rule(q, k, v, ones, w=w, decay=self.decay(x)[0], segment_ids=segment_ids, initial_state=memory)


class RWKV7(MemoryLayer):
    """The memory of RWKV-7: a transition diag(exp(g)) - (a * n) n^T, with n the unit key, and a write at k.

    As two writes per token: at a * n, which erases at n exp(-g), and then at k, which erases nothing. The layer has
    the projections of this library (a short convolution of width 2 takes the place of the token shift) and no bonus.

    Args:
      width: D.
      heads: H.
      decay_rank: rank of the per-channel decays.
      rngs: random streams.
      **options: of `MemoryLayer`.

    Source: arXiv 2503.14456.
    """

    def __init__(self, width: int, *, heads: int, decay_rank: int = 16, rngs: nnx.Rngs, **options: Any):
        super().__init__(width, heads=heads, rngs=rngs, **options)
        decay_rank = check_size("decay_rank", decay_rank)
        same: dict[str, Any] = {"dtypes": self.dtypes, "rngs": rngs}
        self.rate = SigmoidGate(width, heads * self.key_width, 1.0, **same)
        self.decay = BoundedDecay(width, heads, self.key_width, decay_rank, **same)
        init = named(nnx.initializers.ones, "heads")
        shape = (heads * self.key_width,)
        self.erase_scale = nnx.Param(init(rngs.params(), shape, self.dtypes.param))
        self.rate_scale = nnx.Param(init(rngs.params(), shape, self.dtypes.param))

    def _apply_op(self, x, parts, segment_ids, memory):
        q, k, v = (parts[name] for name in "qkv")
        decay, rate = self.decay(x)[0], self.rate(x).reshape(k.shape).astype(k.dtype)

        def per_channel(scale):
            return scale[...].astype(k.dtype).reshape(1, 1, *k.shape[2:])

        unit = l2norm(k * per_channel(self.erase_scale))
        k = k * (1 + (rate - 1) * per_channel(self.rate_scale))

        def writes(first, second):
            return jnp.stack([first, second], axis=2)

        keys, erased = writes(unit * rate, k), unit * jnp.exp(-decay).astype(k.dtype)
        return delta_product(
            q,
            keys,
            writes(jnp.zeros_like(v), v),
            jnp.ones((*v.shape[:2], 2, v.shape[2]), self.dtypes.wide),
            w=writes(erased, jnp.zeros_like(erased)),
            decay=decay,
            scale=1.0,
            segment_ids=segment_ids,
            initial_state=memory,
        )


class HGRN2(MemoryLayer):
    """Gated linear attention whose key is what the forget gate f lets go: k = 1 - f, decay log f.

        f = l + (1 - l) sigmoid(W x)

    Args:
      width: D.
      heads: H.
      lower_bound: l. The paper learns one per layer, from 0 in the first layer up; at 0 a channel forgets half of what
        it holds with every token at the start of training.
      rngs: random streams.
      **options: of `MemoryLayer`.

    Raises:
      ValueError: a lower bound outside [0, 1), or rotary positions or unit keys: the keys are the decays' logits.

    Source: arXiv 2404.07904.
    """

    def __init__(self, width: int, *, heads: int, lower_bound: float = 0.0, rngs: nnx.Rngs, **options: Any):
        super().__init__(width, heads=heads, rngs=rngs, **options)
        for name in ("rotary", "unit_keys"):
            check(not getattr(self, name), name, "False: the projection to k holds the logits of the decay", True)
        self.lower_bound = check_number("lower_bound", lower_bound, at_least=0)
        check(self.lower_bound < 1, "lower_bound", "below 1", lower_bound)

    def _apply_op(self, x, parts, segment_ids, memory):
        logits: Array = parts["k"].astype(self.dtypes.wide)
        k = nnx.sigmoid(-logits)
        decay = nnx.log_sigmoid(logits)
        if self.lower_bound:
            k = (1 - self.lower_bound) * k
            decay = jnp.log1p(-k)
        q = nnx.silu(parts["q"])
        k = k.astype(parts["k"].dtype)
        return linear_attention(q, k, parts["v"], decay=decay, segment_ids=segment_ids, initial_state=memory)


class GatedSlotState(NamedTuple):
    """The memory of `GatedSlots`.

    Attributes:
      keys: [B, H, M, K], float32.
      values: [B, H, M, V], float32.
    """

    keys: Array
    values: Array


class GatedSlots(MemoryLayer):
    """Gated slot attention: softmax attention over M slots, each an average of keys and of values with its own decay.

        f_t = sigmoid(W x_t)^(1 / 8)
        A_t = diag(f_t) A_{t-1} + (1 - f_t) k_t^T,    B_t = diag(f_t) B_{t-1} + (1 - f_t) v_t^T
        o_t = B_t^T softmax(A_t q_t / sqrt(K))

    Two linear attentions: A has a decay per channel of its values, so that each slot is a head of one value.

    Args:
      width: D.
      heads: H.
      slots: M.
      rngs: random streams.
      **options: of `MemoryLayer`.

    Raises:
      ValueError: slots that are no positive integer.

    Source: arXiv 2409.07146.
    """

    def __init__(self, width: int, *, heads: int, slots: int = 64, rngs: nnx.Rngs, **options: Any):
        super().__init__(width, heads=heads, rngs=rngs, **options)
        self.slots = check_size("slots", slots)
        self.forget = linear(width, heads * slots, ("embed", "heads"), dtypes=self.dtypes, rngs=rngs, wide=True)

    def _apply_op(self, x, parts, segment_ids, memory):
        q, k, v = (nnx.silu(parts[name]) for name in "qkv")
        decay = nnx.log_sigmoid(self.forget(x)).reshape(*v.shape[:3], self.slots) / 8
        written = -jnp.expm1(decay).astype(v.dtype)

        def slots_as_heads(a):
            return a.reshape(*a.shape[:2], -1)

        state = memory or self._init_memory(v.shape[0], 0, v.dtype)
        keys = state.keys.reshape(v.shape[0], -1, self.key_width, 1)
        scores, keys = linear_attention(
            q,
            k,
            slots_as_heads(written)[..., None],
            decay=slots_as_heads(decay),
            segment_ids=segment_ids,
            initial_state=keys,
        )
        weights = nnx.softmax(scores.reshape(decay.shape).astype(self.dtypes.wide), axis=-1).astype(v.dtype)
        o, values = linear_attention(
            weights, written, v, decay=decay, scale=1.0, segment_ids=segment_ids, initial_state=state.values
        )
        return o, GatedSlotState(keys.reshape(state.keys.shape), values)

    def _init_memory(self, batch, capacity, dtype):
        def zeros(width):
            return jnp.zeros((batch, self.heads, self.slots, width), self.dtypes.wide)

        return GatedSlotState(zeros(self.key_width), zeros(self.value_width))

    def state_letters(self, state):
        """The letters of the arrays of a state."""
        letters = super().state_letters(state)
        letters["memory"] = letters["memory"]._replace(keys="B H M K", values="B H M V")
        return letters
