"""Segment recurrence (RMT, ARMT): a Transformer that reads segments in turn and carries a memory between them."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jax import lax

from memformer.core.checks import check_array, check_size
from memformer.core.context import refuse_sharded_time
from memformer.core.segments import chunk_time, find_segments, unchunk_time
from memformer.core.types import Array, Bool, Float, Int
from memformer.layers.base import State
from memformer.layers.basic import NORMS, Embedding, constrain, linear, named
from memformer.layers.config import BaseConfig
from memformer.layers.gates import SigmoidGate
from memformer.layers.positions import count_positions, next_position
from memformer.layers.sharding import auto_axes
from memformer.models.config import REMAT, LanguageModelConfig
from memformer.models.language_model import Block, ModelOutput, check_sizes
from memformer.ops.associative import NEIGHBOURS, AssociativeMemory, associative_read, associative_write, dpfp

__all__ = ["ARMTConfig", "AssociativeLayer", "RMTConfig", "SegmentMemory"]


@dataclasses.dataclass(frozen=True)
class RMTConfig(BaseConfig):
    """Config of a recurrent memory Transformer, whose memory is M token vectors.

    Attributes:
      segment_length: L, number of tokens that attend to each other.
      memory_tokens: M, read before a segment and written after it.
      width: D.
      depth: number of layers.
      heads: of the attention within a segment (with rotary positions).
      feedforward: "swiglu", "mlp", "moe" or None (or "none").
      feedforward_options: options of the feedforward layer.
      norm: "rms" or "layer".
      remat: activations saved per segment: None for all, "full" for the memory before it only, "dots" or "projections"
        as in `LanguageModelConfig`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> RMTConfig(segment_length=6, width=32).memory_tokens
      4
    """

    segment_length: int = 128
    memory_tokens: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4
    feedforward: str | None = "swiglu"
    feedforward_options: Mapping[str, Any] = FrozenDict()
    norm: str = "rms"
    remat: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("segment_length", "memory_tokens")
        # The config of the blocks checks the other fields.
        _ = self.blocks

    @property
    def blocks(self) -> LanguageModelConfig:
        """Config of the blocks that read a segment."""
        same = (
            "width",
            "depth",
            "heads",
            "feedforward",
            "feedforward_options",
            "norm",
            "remat",
            "dtype",
            "param_dtype",
        )
        return LanguageModelConfig(memory="softmax_attention", **{key: getattr(self, key) for key in same})


@dataclasses.dataclass(frozen=True)
class ARMTConfig(RMTConfig):
    """Config of an associative recurrent memory Transformer, whose memory is an associative matrix per layer.

    Attributes:
      key_width: width of keys and queries before the feature map, which has 6 times as many features.
      correction: the normaliser z accumulates only the new part of a key (gamma); if False, all of it at every write.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> ARMTConfig(segment_length=6, width=32, correction=False).key_width
      64
    """

    key_width: int = 64
    correction: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("key_width")


class AssociativeLayer(nnx.Module):
    """The associative memory of a layer: read by the inputs of the layer, written by the outputs of its memory tokens.

    Args:
      config: config of the model.
      rngs: random streams.
    """

    def __init__(self, config: ARMTConfig, *, rngs: nnx.Rngs):
        width = config.width
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        self.query = linear(width, config.key_width, ("embed", None), **same)
        self.key = linear(width, config.key_width, ("embed", None), **same)
        # Zeros as in the code of the paper: initially nothing is stored and the model is a plain Transformer.
        self.value = linear(width, width, ("embed", None), init=nnx.initializers.zeros, **same)
        self.beta = SigmoidGate(width, 1, 1.0, **same)
        self.features, self.width, self.correction = 2 * NEIGHBOURS * config.key_width, width, config.correction
        self.wide = config.dtypes.wide

    def init_state(self, batch: int) -> AssociativeMemory:
        """An empty memory."""
        shape = (batch, self.features, self.width)
        return AssociativeMemory(jnp.zeros(shape, self.wide), jnp.zeros(shape[:2], self.wide))

    def read(self, memory: AssociativeMemory, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The vectors to add to the input x of the layer."""
        return associative_read(memory, dpfp(self.query(x))).astype(x.dtype)

    def write(self, memory: AssociativeMemory, tokens: Float[Array, "B M D"]) -> AssociativeMemory:
        """The memory after a segment, given the outputs of its memory tokens."""
        v, beta = self.value(tokens).astype(self.wide), self.beta(tokens)[:, :, 0]
        return associative_write(memory, dpfp(self.key(tokens)), v, beta, correction=self.correction)


class SegmentMemory(nnx.Module):
    """A causal sequence model that reads segments of L tokens in turn; only a memory passes between them.

        RMT:   [.., y_s, m_s] = blocks([m_(s-1), x_s, m_(s-1)])
        ARMT:  in each layer: h <- h + read(h), h <- block(h), write(h of the memory tokens); the input is [x_s, m]

    In RMT the outputs of the M memory tokens are inputs of the next segment. In ARMT every segment starts with the same
    memory tokens, and each layer writes their outputs to an associative memory that all tokens of later segments read.
    Memory tokens follow the segment, so that causal attention lets them see all of it. A `lax.scan` runs over the
    segments: the program does not grow with their number, and gradients pass through all of them.

    A segment is L consecutive tokens of one sequence, counted from its first; its last segment may be shorter. Every
    sequence therefore starts a segment: the sequences of a packed batch must begin at multiples of L, without padding
    inside, and a state can continue a sequence only after a multiple of L tokens.

    Args:
      config: `ARMTConfig` or `RMTConfig`.
      vocab_size: number of input ids; 0 where inputs are feature vectors.
      num_classes: number of logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams.

    Raises:
      ValueError: sizes that do not fit each other.

    Source: arXiv 2207.06881 (RMT), 2407.04841 (ARMT).

    Example:
      >>> config = ARMTConfig(segment_length=2, width=16, depth=1, heads=2, key_width=4)
      >>> model = SegmentMemory(config, vocab_size=7, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3, 4, 5]])).logits.shape
      (1, 5, 7)
    """

    def __init__(
        self,
        config: RMTConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        blocks = config.blocks
        check_sizes(blocks, vocab_size, num_classes, features)
        self.config, self.vocab_size, self.num_classes, self.features = config, vocab_size, num_classes, features
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        width = config.width
        self.embedding: Any
        if features:
            self.embedding = linear(features, width, (None, "embed"), bias=True, **same)
        else:
            self.embedding = Embedding(vocab_size, width, **same)
        # Entries of unit variance, as in token embeddings.
        init = named(nnx.initializers.normal(1.0), None, "embed")
        self.tokens = nnx.Param(init(rngs.params(), (config.memory_tokens, width), config.dtypes.param))
        self.blocks = nnx.List([Block(blocks, "softmax_attention", rngs=rngs) for _ in range(config.depth)])
        self.memories: Any = nnx.data(None)
        if isinstance(config, ARMTConfig):
            self.memories = nnx.List([AssociativeLayer(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = NORMS[config.norm](width, **same)
        self.head = linear(width, num_classes, ("embed", "vocab"), **same)
        self.head.preferred_element_type = config.dtypes.wide

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = None) -> State:
        """The state before the first token; capacity and dtype, which size a cache, have no effect.

        Raises:
          ValueError: a batch that is not a positive integer.
        """
        batch = check_size("batch", batch)
        return {"memory": self._empty(batch), "position": jnp.zeros(batch, jnp.int32)}

    def _empty(self, batch: int) -> Any:
        if self.memories is not None:
            return tuple(layer.init_state(batch) for layer in self.memories)
        return jnp.broadcast_to(self._tokens()[None], (batch, *self.tokens.shape))

    def _tokens(self) -> Array:
        return self.tokens[...].astype(self.config.dtypes.compute)

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> ModelOutput:
        """Logits at each position; a call with the returned state continues the sequences.

        Args:
          inputs: ids, or float features.
          segment_ids: packed sequences, 0 = padding; each sequence begins at a multiple of segment_length.
          positions: within each sequence; None counts, continuing from the state. Modulo segment_length they must be
            the positions of the tokens in their segments.
          state: from the previous call or from `init_state`; None starts a sequence.

        Raises:
          ValueError: an array of wrong shape or dtype, or sequences that do not start with a segment (under jit, the
            running program raises the same error).
        """
        length = self.config.segment_length
        dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        refuse_sharded_time("the segment memory transformer", dims["T"])
        x = self.embedding(inputs.astype(self.config.dtypes.compute) if self.features else inputs)
        x = constrain(x, "activation_batch", "activation_time", "activation_embed")
        aligned = segment_ids is None and positions is None and state is None
        if segment_ids is None and dims["T"] % length:
            segment_ids = jnp.ones((dims["B"], dims["T"]), jnp.int32)
        segments = find_segments(segment_ids, dims)
        if positions is None:
            positions = count_positions(segments, (dims["B"], dims["T"]), None if state is None else state["position"])
        positions = check_array("positions", positions, "B T", dims, kind=jnp.integer)
        if not aligned:
            _check_alignment(segments, positions, length)
        memory = self._empty(dims["B"]) if state is None else state["memory"]
        xs: tuple = (chunk_time(x, length), None, None)
        if segments is not None:
            xs = (xs[0], chunk_time(segments.valid, length), _starts(segments.index, length))
        segment = self._segment
        if self.config.remat is not None:
            segment = jax.checkpoint(segment, policy=REMAT[self.config.remat], prevent_cse=False)
        memory, (y, aux) = lax.scan(segment, memory, xs)
        logits = self.head(self.norm(unchunk_time(y, dims["T"])))
        logits = constrain(logits, "activation_batch", "activation_time", "activation_vocab")
        state = {"memory": memory, "position": next_position(positions, segments)}
        return ModelOutput(logits, state, jax.tree.map(jnp.mean, aux))

    def _segment(self, memory: Any, xs: tuple) -> tuple[Any, tuple]:
        """A step of the scan: from the memory before a segment to (the memory after it, (outputs, aux))."""
        x, valid, starts = xs
        if starts is not None:
            memory = _choose(starts, self._empty(len(x)), memory)
        after, y, aux = self._read_segment(memory, x, valid)
        if valid is not None:
            after = _choose(jnp.any(valid, axis=1), after, memory)
        return after, (y, aux)

    def _read_segment(self, memory: Any, x: Array, valid: Array | None) -> tuple[Any, Array, dict]:
        """Runs the blocks over a segment and its memory tokens, with the same positions in every segment."""
        count, recurrent = self.config.memory_tokens, self.memories is None
        tokens = memory if recurrent else jnp.broadcast_to(self._tokens()[None], (len(x), *self.tokens.shape))
        front = count if recurrent else 0
        h = jnp.concatenate([tokens, x, tokens] if recurrent else [x, tokens], axis=1)
        ids = None
        if valid is not None:
            ids = jnp.pad(valid.astype(jnp.int32), ((0, 0), (front, count)), constant_values=1)
        positions = jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None], h.shape[:2])
        after, losses = [], []
        for i, block in enumerate(self.blocks):
            if not recurrent:
                h = h + self.memories[i].read(memory[i], h)
            h, _, aux = block(h, None, None, segment_ids=ids, positions=positions)
            losses.append(aux)
            if not recurrent:
                after.append(self.memories[i].write(memory[i], h[:, -count:]))
        aux = jax.tree.map(lambda *a: sum(a[1:], start=a[0]) / len(a), *losses)
        y = h[:, front : front + x.shape[1]]
        return self.norm(h[:, -count:]) if recurrent else tuple(after), y, aux


def _choose(rows: Bool[Array, "B"], yes: Any, no: Any) -> Any:
    """`yes` in the selected rows, `no` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b), yes, no)


def _starts(index: Int[Array, "B T"], length: int) -> Bool[Array, "N B"]:
    """True for rows that start a sequence with segment n: it ends in another sequence than segment n - 1."""
    last = jnp.concatenate([index[:, length - 1 :: length], index[:, -1:]], axis=1)[:, : -(-index.shape[1] // length)]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    return (last != before).T


def _check_alignment(segments: Any, positions: Int[Array, "B T"], length: int) -> None:
    """Raises at once where the arrays are known; under jit, makes the running program raise."""
    place = jnp.arange(positions.shape[1], dtype=positions.dtype)[None] % length
    wrong = positions % length != place
    if segments is not None:
        # The sequence that starts the memory segment of each token.
        first = jnp.repeat(segments.index[:, ::length], length, axis=1)[:, : positions.shape[1]]
        wrong = segments.valid & (wrong | ((segments.index != first) & (place != 0)))
    wrong = jnp.any(wrong)
    if not isinstance(wrong, jax.core.Tracer):
        _raise_alignment(length, wrong)
        return
    lax.cond(wrong, lambda: jax.debug.callback(partial(_raise_alignment, length), wrong), lambda: None)


def _raise_alignment(length: int, wrong: Any) -> None:
    # Under vmap both branches of the condition run, so `wrong` is tested again.
    if np.any(wrong):
        raise ValueError(
            f"segment_ids, positions and state must let every sequence start a memory segment of segment_length = "
            f"{length} tokens: packed sequences begin at multiples of {length} in their row (padded with id 0 at their "
            f"ends, not inside), and a state continues a sequence after a multiple of {length} tokens. Got a token "
            f"whose position modulo {length} is not its position in its segment"
        )
