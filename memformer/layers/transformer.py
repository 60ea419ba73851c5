"""Transformer blocks: self-attention, cross-attention and feedforward, with pre- or post-norm."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.numerics import accumulation_dtype, masked_softmax, matmul_precision
from memformer.core.types import Array, Bool, Float, Int
from memformer.layers.basic import LayerNorm, constrain, constrain_residual, dropout, linear
from memformer.layers.feedforward import MLP
from memformer.layers.positions import rotate
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape
from memformer.ops.attention.cache import KVCache, init_cache
from memformer.ops.softmax_attention import softmax_attention

__all__ = [
    "CrossAttention",
    "DecoderBlock",
    "EncoderBlock",
    "SelfAttention",
    "visible_memory",
]


class _Attention(nnx.Module):
    """Projections, with biases, to queries, keys and values of H heads, and of their outputs back to D."""

    def __init__(self, shape: TransformerShape, *, rngs: nnx.Rngs):
        same: dict[str, Any] = {"dtypes": shape.dtypes, "rngs": rngs, "bias": True}
        self.shape = shape
        self.query = linear(shape.width, shape.width, ("embed", "heads"), **same)
        self.key = linear(shape.width, shape.width, ("embed", "heads"), **same)
        self.value = linear(shape.width, shape.width, ("embed", "heads"), **same)
        self.out = linear(shape.width, shape.width, ("heads", "embed"), **same)

    def _heads(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:2], self.shape.heads, self.shape.key_width)
        return constrain(x, "activation_batch", "activation_time", "activation_heads", None)

    def _weights(self, q: Array, k: Array, visible: Array | None) -> Array:
        """softmax(q k^T / sqrt(K)) over the visible keys: [B, H, T, S] in float32."""
        wide = accumulation_dtype(q, k)
        precision = matmul_precision(None, q, k)
        scores = jnp.einsum("bthk,bshk->bhts", q, k, precision=precision, preferred_element_type=wide)
        scores = scores * self.shape.key_width**-0.5
        if visible is None:
            return jax.nn.softmax(scores, axis=-1)
        return masked_softmax(scores, visible[:, None])

    def _output(self, o: Array) -> Array:
        o = constrain(o, "activation_batch", "activation_time", "activation_heads", None)
        return constrain_residual(self.out(o.reshape(*o.shape[:2], -1)))


class SelfAttention(_Attention):
    """Multi-head self-attention by `memformer.ops.softmax_attention`, in memory linear in T.

    Args:
      shape: config of the block; positions "rotary" rotates queries and keys.
      rngs: random streams.

    Source: arXiv 1706.03762 section 3.2.

    Example:
      >>> layer = SelfAttention(TransformerShape(width=8, heads=2), rngs=nnx.Rngs(0))
      >>> y, cache = layer(jnp.ones((1, 3, 8)), causal=True)
      >>> y.shape, cache.k.shape
      ((1, 3, 8), (1, 3, 2, 4))
    """

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        causal: bool,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns (y, cache); `state`, the cache of an earlier call, requires causal=True."""
        q, k = self._queries_and_keys(x, positions)
        v = self._heads(self.value(x))
        o, state = softmax_attention(q, k, v, causal=causal, segment_ids=segment_ids, initial_state=state)
        return self._output(o), state

    @auto_axes
    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        causal: bool,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B H T T"]:
        """The attention weights of the call, [query, key] in float32: T x T numbers per head, for plots.

        A token sees the tokens of its own segment id; rows of padding are 0.
        """
        q, k = self._queries_and_keys(x, positions)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        visible = _same_segment(ids, ids)
        if causal:
            visible = visible & jnp.tril(jnp.ones((1, *visible.shape[1:]), bool))
        return self._weights(q, k, visible)

    def _queries_and_keys(self, x: Array, positions: Array | None) -> tuple[Array, Array]:
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        if self.shape.positions != "rotary":
            return q, k
        if positions is None:
            raise ValueError("positions must be an array where the config has positions='rotary', got None")
        return rotate(q, positions), rotate(k, positions)


class CrossAttention(_Attention):
    """Multi-head attention of T tokens to a memory of S vectors, with softmax in float32.

    `memformer.ops.softmax_attention` covers sequences that attend to themselves (S = T). Here the memory is another
    sequence, short enough to keep the T x S scores, and the weights are returned for plots.

    Args:
      shape: config of the block.
      rngs: random streams.

    Source: arXiv 1706.03762 section 3.2.3.

    Example:
      >>> layer = CrossAttention(TransformerShape(width=8, heads=2), rngs=nnx.Rngs(0))
      >>> y, weights = layer(jnp.ones((1, 3, 8)), layer.prepare(jnp.ones((1, 5, 8))))
      >>> y.shape, weights.shape
      ((1, 3, 8), (1, 2, 3, 5))
    """

    @auto_axes
    def prepare(self, memory: Float[Array, "B S D"]) -> dict[str, Array]:
        """Keys and values of the memory, {"k": [B, S, H, K], "v": [B, S, H, K]}, computed once per memory."""
        return {"k": self._heads(self.key(memory)), "v": self._heads(self.value(memory))}

    @auto_axes
    def __call__(
        self, x: Float[Array, "B T D"], memory: Mapping[str, Array], visible: Bool[Array, "B T S"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B H T S"]]:
        """Returns (y, weights); `memory` is from `prepare`, and `visible` None makes all of it visible."""
        q, v = self._heads(self.query(x)), memory["v"]
        weights = self._weights(q, memory["k"], visible)
        o = jnp.einsum("bhts,bshv->bthv", weights.astype(v.dtype), v, precision=matmul_precision(None, q, v))
        return self._output(o), weights


def visible_memory(
    segment_ids: Int[Array, "B T"] | None, memory_segment_ids: Int[Array, "B S"] | None, tokens: int
) -> Bool[Array, "B T S"] | None:
    """The mask of the slots of a memory that each token sees; None where all are visible.

    A slot of id 0 is padding and never visible. If both have ids, a token sees the slots of its own id (packed pairs);
    if only the memory has ids, all slots that are not padding.

    Args:
      segment_ids: of the tokens, 0 = padding, or None.
      memory_segment_ids: of the memory, likewise.
      tokens: T.

    Example:
      >>> visible_memory(None, jnp.array([[4, 0]]), 1)
      Array([[[ True, False]]], dtype=bool)
    """
    if memory_segment_ids is None:
        return None
    if segment_ids is not None:
        return _same_segment(segment_ids, memory_segment_ids)
    valid = (memory_segment_ids != 0)[:, None]
    return jnp.broadcast_to(valid, (valid.shape[0], tokens, valid.shape[2]))


def _same_segment(ids: Array, memory_ids: Array) -> Array:
    return (memory_ids != 0)[:, None] & (ids[:, :, None] == memory_ids[:, None])


def _residual(
    shape: TransformerShape, norm: LayerNorm, sublayer: Callable[[Array], tuple[Array, Any]], x: Array, key: Any
) -> tuple[Array, Any]:
    """x + dropout(sublayer(norm(x))) or norm(x + dropout(sublayer(x))), with the second result of the sublayer."""
    pre = shape.norm_place == "pre"
    y, rest = sublayer(norm(x) if pre else x)
    x = constrain_residual(x + dropout(constrain_residual(y), shape.dropout, key))
    return (x if pre else norm(x)), rest


def _feedforward(shape: TransformerShape, rngs: nnx.Rngs) -> MLP:
    return MLP(shape.width, hidden=shape.hidden, activation=shape.activation, bias=True, dtypes=shape.dtypes, rngs=rngs)


class EncoderBlock(nnx.Module):
    """Bidirectional self-attention, then the feedforward layer, each with its norm and residual.

    Args:
      shape: config of the block.
      rngs: random streams.

    Source: arXiv 1706.03762 section 3.1; pre-norm: arXiv 2002.04745.

    Example:
      >>> block = EncoderBlock(TransformerShape(width=8, heads=2), rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 3, 8))).shape
      (1, 3, 8)
    """

    def __init__(self, shape: TransformerShape, *, rngs: nnx.Rngs):
        self.shape = shape
        self.attention = SelfAttention(shape, rngs=rngs)
        self.attention_norm = shape.norm(rngs)
        self.feedforward = _feedforward(shape, rngs)
        self.feedforward_norm = shape.norm(rngs)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: Array | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the shape of x; `key` is the random key of dropout, None disables it."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}

        def attend(x: Array) -> tuple[Array, Any]:
            return self.attention(x, causal=False, **where)

        x, _ = _residual(self.shape, self.attention_norm, attend, x, keys[0])
        x, _ = _residual(self.shape, self.feedforward_norm, self.feedforward, x, keys[1])
        return constrain_residual(x)

    @auto_axes
    def weights(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B H T T"]:
        """The self-attention weights of this block for its input x."""
        x = self.attention_norm(x) if self.shape.norm_place == "pre" else x
        return self.attention.weights(x, causal=False, segment_ids=segment_ids, positions=positions)


class DecoderBlock(nnx.Module):
    """Causal self-attention, cross-attention to a memory, and the feedforward layer, each with its norm and residual.

    Args:
      shape: config of the block.
      rngs: random streams.

    Source: arXiv 1706.03762 section 3.1.

    Example:
      >>> block = DecoderBlock(TransformerShape(width=8, heads=2), rngs=nnx.Rngs(0))
      >>> x, state, weights = block(jnp.ones((1, 3, 8)), block.start(jnp.ones((1, 5, 8))))
      >>> x.shape, weights.shape
      ((1, 3, 8), (1, 2, 3, 5))
    """

    def __init__(self, shape: TransformerShape, *, rngs: nnx.Rngs):
        self.shape = shape
        self.attention = SelfAttention(shape, rngs=rngs)
        self.attention_norm = shape.norm(rngs)
        self.cross = CrossAttention(shape, rngs=rngs)
        self.cross_norm = shape.norm(rngs)
        self.feedforward = _feedforward(shape, rngs)
        self.feedforward_norm = shape.norm(rngs)

    @auto_axes
    def start(self, memory: Float[Array, "B S D"], capacity: int | None = None) -> dict[str, Any]:
        """The state before the first token: keys and values of the memory, and a cache for `capacity` tokens.

        With capacity None the cache grows with each call.
        """
        state: dict[str, Any] = {"memory": self.cross.prepare(memory), "cache": None}
        if capacity is not None:
            width = self.shape.key_width
            state["cache"] = init_cache(
                "softmax_attention",
                batch=memory.shape[0],
                capacity=capacity,
                groups=self.shape.heads,
                key_width=width,
                value_width=width,
                dtype=self.shape.dtypes.compute,
            )
        return state

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Mapping[str, Any],
        key: Array | None = None,
        *,
        visible: Bool[Array, "B T S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any], Float[Array, "B H T S"]]:
        """Returns (x, state, cross-attention weights); `state` is from `start` or an earlier call."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}

        def attend(x: Array) -> tuple[Array, Any]:
            return self.attention(x, causal=True, state=state["cache"], **where)

        def attend_to_memory(x: Array) -> tuple[Array, Any]:
            return self.cross(x, state["memory"], visible)

        x, cache = _residual(self.shape, self.attention_norm, attend, x, keys[0])
        x, weights = _residual(self.shape, self.cross_norm, attend_to_memory, x, keys[1])
        x, _ = _residual(self.shape, self.feedforward_norm, self.feedforward, x, keys[2])
        x = constrain_residual(x)
        return x, {"memory": state["memory"], "cache": cache}, weights
