"""Sequence-to-sequence LSTMs: with the last encoder state only, or with additive attention over all of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.segments import find_segments
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.additive import AdditiveAttention
from memformer.layers.base import State
from memformer.layers.basic import Embedding, constrain, dropout, linear, stochastic_keys
from memformer.layers.config import BaseConfig
from memformer.layers.recurrent import RecurrentStack
from memformer.layers.sharding import auto_axes
from memformer.models.language_model import ModelOutput
from memformer.ops.recurrent_cells import LSTMState

__all__ = ["Seq2Seq", "Seq2SeqConfig"]

ATTENTIONS = ("none", "additive")


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig(BaseConfig):
    """Config of an LSTM encoder-decoder.

    Attributes:
      attention: "none", the decoder sees the source only through its initial state; or "additive", it attends to the
        states of a bidirectional encoder at each token.
      width: D: of embeddings, of each LSTM and of the attention network.
      depth: number of LSTM layers of the encoder, and of the decoder.
      dropout: rate on embeddings, between encoder layers and before the read-out; active after `model.train()`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> Seq2SeqConfig(attention="additive", width=64).depth
      1
    """

    attention: str = "additive"
    width: int = 128
    depth: int = 1
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("attention", self.attention, ATTENTIONS)
        self.check_sizes("width", "depth")


class Seq2Seq(nnx.Module):
    """An LSTM encoder-decoder.

        m_1 ... m_S = LSTM(E source)                        (both directions with attention)
        s_0 = tanh(W_0 m_S), or of the backward m_1 with attention
        e_tj = v . tanh(W s_{t-1} + U m_j);  a_t = softmax(e_t);  r_t = sum_j a_tj m_j
        s_t = LSTM([E y_{t-1}; r_t], s_{t-1});  logits_t = E tanh(W_o [E y_{t-1}; s_t; r_t])

    Without attention there is no r_t. W_0 gives h and c of every decoder layer; e_tj uses h of the last one. Source,
    target and read-out share the table E.

    Args:
      config: config of the model.
      vocab_size: number of source and input ids.
      num_classes: must be None or vocab_size.
      features: must be 0: source and inputs are ids.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Source: without attention arXiv 1409.3215, with s_0 as in arXiv 1406.1078; with attention arXiv 1409.0473,
    appendix A, with LSTMs instead of gated units and a tanh layer instead of maxout.

    Example:
      >>> model = Seq2Seq(Seq2SeqConfig(width=8), vocab_size=7, rngs=nnx.Rngs(0))
      >>> source, inputs = jnp.array([[4, 5, 6, 0]]), jnp.array([[1, 2, 3]])
      >>> model(inputs, source=source, source_segment_ids=jnp.array([[1, 1, 1, 0]])).logits.shape
      (1, 3, 7)
      >>> state = model.start(source, jnp.array([[1, 1, 1, 0]]))
      >>> output = model(inputs[:, :1], state=state)
      >>> model(inputs[:, 1:2], state=output.state).logits.shape
      (1, 1, 7)
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        check_size("vocab_size", vocab_size)
        if features:
            raise ValueError(f"features must be 0 (source and inputs of a seq2seq model are ids), got {features}")
        if num_classes not in (None, vocab_size):
            raise ValueError(f"num_classes must be vocab_size = {vocab_size} (they share a table), got {num_classes}")
        self.config, self.vocab_size, self.num_classes, self.features = config, vocab_size, vocab_size, 0
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        width, depth, attends = config.width, config.depth, config.attention == "additive"
        read = 2 * width if attends else 0
        self.embedding = Embedding(vocab_size, width, **same)
        self.encoder = RecurrentStack(
            "lstm", width, width, depth, bidirectional=attends, dropout=config.dropout, **same
        )
        self.first = linear(width, 2 * depth * width, ("embed", None), bias=True, wide=True, **same)
        self.attention: Any = AdditiveAttention(width, read, width, **same) if attends else nnx.data(None)
        self.decoder = RecurrentStack("lstm", width + read, width, depth, **same)
        self.out = linear(2 * width + read, width, ("embed", None), bias=True, **same)
        # Set by model.train() and model.eval().
        self.deterministic = True
        self.dropout_stream: Any = rngs.dropout.fork() if config.dropout else nnx.data(None)

    @auto_axes
    def start(
        self,
        source: Int[Array, "B S"],
        source_segment_ids: Int[Array, "B S"] | None = None,
        capacity: int | None = None,
    ) -> State:
        """The state before the first token of the target; of packed sources, the first of each row is used.

        Args:
          source: ids.
          source_segment_ids: 0 = padding; None for no padding.
          capacity: checked, but has no effect on a recurrent state.

        Raises:
          ValueError: an array of wrong shape or dtype, or a capacity that is not a positive integer.
        """
        if capacity is not None:
            check_size("capacity", capacity)
        memory = self._encode(source, source_segment_ids, None)
        segments = memory["segments"]
        place = jnp.argmax(segments != 0, axis=1)[:, None]
        segment = jnp.take_along_axis(segments, place, axis=1)
        decoder = jax.tree.map(lambda x: x[:, 0], self._first(memory, segment))
        return self._state(memory, decoder, segment[:, 0])

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> ModelOutput:
        """Logits of the id after each input; a call with the returned state continues the last target of each row.

        Args:
          inputs: the target so far, beginning with its start token.
          source: for the first call (state None); later calls have it in their state.
          source_segment_ids: 0 = padding. Packed pairs have the same id in source and target.
          segment_ids: of the inputs, 0 = padding; with a state they only mark padding.
          positions: ignored: recurrence implies the order.
          state: from the previous call or from `start`.

        Raises:
          ValueError: both or neither of source and state, or an array of wrong shape or dtype.
        """
        return self._run(inputs, source, source_segment_ids, segment_ids, state)[0]

    @auto_axes
    def alignments(
        self,
        inputs: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"],
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B L H T S"]:
        """Attention weights over the source at each target position (one layer, one head), in float32.

        Row t belongs to the prediction of the id after inputs[t]; rows of padding are 0.

        Raises:
          ValueError: a model without attention.
        """
        if self.attention is None:
            raise ValueError("alignments require a model with attention, got attention='none'")
        return self._run(inputs, source, source_segment_ids, segment_ids, None)[1][:, None, None]

    def _encode(self, source: Array, segment_ids: Array | None, keys: Array | None) -> dict[str, Array]:
        """The encoder states, their segment ids, and with attention their keys."""
        dims: Dims = {}
        source = check_array("source", source, "B S", dims, kind=jnp.integer)
        if segment_ids is None:
            segments = jnp.ones(source.shape, jnp.int32)
        else:
            segments = check_array("source_segment_ids", segment_ids, "B S", dims, kind=jnp.integer)
        x = dropout(self.embedding(source), self.config.dropout, None if keys is None else keys[0])
        x = constrain(x, "activation_batch", "activation_time", "activation_embed")
        states, _ = self.encoder(x, segment_ids=segments, key=None if keys is None else keys[1])
        memory = {"segments": segments, "states": states}
        return memory if self.attention is None else {**memory, "keys": self.attention.prepare(states)}

    def _first(self, memory: dict[str, Array], ids: Int[Array, "B T"]) -> tuple[LSTMState, ...]:
        """The initial decoder state for a target with the segment id of each position, [B, T, D]."""
        belongs = memory["segments"][:, None, :] == ids[:, :, None]
        states = memory["states"]
        if self.attention is None:
            place = belongs.shape[2] - 1 - jnp.argmax(jnp.flip(belongs, 2), axis=2)
        else:
            # The backward direction has read the whole source at its first token.
            place, states = jnp.argmax(belongs, axis=2), states[..., self.config.width :]
        whole = jnp.take_along_axis(states, place[..., None], axis=1)
        parts = jnp.split(jnp.tanh(self.first(whole)), 2 * self.config.depth, axis=-1)
        return tuple(LSTMState(h, c) for h, c in zip(parts[::2], parts[1::2], strict=True))

    def _state(self, memory: dict[str, Array], decoder: tuple[LSTMState, ...], segment: Array) -> State:
        # Without attention the decoder needs nothing but its own state.
        return {"decoder": decoder, "segment": segment, "memory": {} if self.attention is None else memory}

    def _run(self, inputs, source, source_segment_ids, segment_ids, state) -> tuple[ModelOutput, Array]:
        """Returns (output, attention weights [B, T, S])."""
        if (state is None) == (source is None):
            given = "neither" if source is None else "both"
            raise ValueError(f"give either source, to start targets, or state, to continue them; got {given}")
        dims: Dims = {}
        inputs = check_array("inputs", inputs, "B T", dims, kind=jnp.integer)
        find_segments(segment_ids, dims)
        ids = jnp.ones(inputs.shape, jnp.int32) if segment_ids is None else segment_ids
        dropping = self.config.dropout and not self.deterministic
        keys = stochastic_keys(self.dropout_stream() if dropping else None, 4)
        if state is not None:
            ids = jnp.where(ids != 0, state["segment"][:, None], 0)
            memory, decoder, fresh = state["memory"], state["decoder"], None
            segment = state["segment"]
        else:
            check_array("source", source, "B S", dims, kind=jnp.integer)
            memory = self._encode(source, source_segment_ids, keys)
            fresh = self._first(memory, ids)
            decoder = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), fresh)
            segment = jnp.zeros(dims["B"], ids.dtype)
        x = dropout(self.embedding(inputs), self.config.dropout, None if keys is None else keys[2])
        (decoder, segment), (outputs, weights) = self._decode(x, ids, memory, fresh, (decoder, segment))
        outputs = jnp.tanh(self.out(jnp.concatenate([x, outputs], axis=-1)))
        outputs = dropout(outputs, self.config.dropout, None if keys is None else keys[3])
        logits = constrain(self.embedding.attend(outputs), "activation_batch", "activation_time", "activation_vocab")
        return ModelOutput(logits, self._state(memory, decoder, segment), {}), weights

    def _decode(self, x, ids, memory, fresh, now) -> tuple:
        """Returns ((decoder state, its segment), ([s_t; r_t], weights or None without attention) [B, T, ...])."""

        def step(now: tuple, inputs: tuple) -> tuple:
            (state, segment), (word, each, first) = now, inputs
            valid = each != 0
            if first is not None:
                begins = valid & (each != segment)
                state = jax.tree.map(lambda new, old: jnp.where(begins[:, None], new, old), first, state)
            read: tuple[Array, ...] = ()
            weights = None
            if self.attention is not None:
                visible = (memory["segments"] == each[:, None]) & valid[:, None]
                query = state[-1].h.astype(word.dtype)
                seen, weights = self.attention(query, memory["states"], memory["keys"], visible)
                read = (seen,)
            y, after = self.decoder.step(jnp.concatenate([word, *read], axis=-1), state)
            after = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), after, state)
            return (after, jnp.where(valid, each, segment)), (jnp.concatenate([y, *read], axis=-1), weights)

        by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (x, ids, fresh))
        result: tuple[Any, Any] = lax.scan(step, now, by_time)
        last, outputs = result
        return last, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)
