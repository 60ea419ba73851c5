"""The Neural Turing Machine: a controller whose heads read and write a memory of slots."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_array, check_choice, check_number, check_size
from memformer.core.context import refuse_sharded_time
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import linear, named
from memformer.layers.config import BaseConfig
from memformer.layers.sharding import auto_axes
from memformer.models.config import check_input
from memformer.models.language_model import ModelOutput
from memformer.ops.addressing import Focus, address, read_slots, write_slots

__all__ = ["NTM", "NTMConfig", "NTMState", "NTMTrace"]

CONTROLLERS = ("lstm", "feedforward")

# Scalar parameters per head besides its key: strength, gate, three shifts, sharpness.
SCALARS = 6


@dataclasses.dataclass(frozen=True)
class NTMConfig(BaseConfig):
    """Config of an NTM; the defaults are the memory of the paper and the LSTM controller of arXiv 1807.08518.

    The recurrence runs in float32 (float64 for dtype "float64"); dtype is that of its inputs and outputs.

    Attributes:
      controller: "lstm" or "feedforward" (one tanh layer).
      width: D, units of the controller.
      slots: S, number of memory slots.
      slot_width: K, entries per slot.
      read_heads: R.
      write_heads: W.
      initial_focus: "first" (heads start at the first slot) or "learned" (learned initial weights over slots).
      initial_slots: initial value of every memory entry.
      clip: head parameters and outputs are clipped to [-clip, clip].

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> NTMConfig(controller="feedforward").heads
      2
    """

    controller: str = "lstm"
    width: int = 100
    slots: int = 128
    slot_width: int = 20
    read_heads: int = 1
    write_heads: int = 1
    initial_focus: str = "first"
    initial_slots: float = 1e-6
    clip: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("controller", self.controller, CONTROLLERS)
        self.check_sizes("width", "slots", "slot_width", "read_heads", "write_heads")
        check_choice("initial_focus", self.initial_focus, ("first", "learned"))
        check_number("clip", self.clip, above=0)
        check_number("initial_slots", self.initial_slots)

    @property
    def heads(self) -> int:
        """H = R + W; read heads come first."""
        return self.read_heads + self.write_heads


class NTMState(NamedTuple):
    """The state of an NTM between steps, in float32.

    Attributes:
      memory: slots on the last axis.
      weights: of all heads at the last step, read heads first.
      reads: vectors read by the read heads, concatenated.
      h: output of the controller.
      c: cell state of an LSTM controller; equal to h for a feedforward one.
    """

    memory: Float[Array, "B K S"]
    weights: Float[Array, "B H S"]
    reads: Float[Array, "B R*K"]
    h: Float[Array, "B D"]
    c: Float[Array, "B D"]


class NTMTrace(NamedTuple):
    """The activity of the heads at each step; unspecified at padding.

    Attributes:
      logits: of the model.
      read_weights: weights of the read heads over slots.
      write_weights: weights of the write heads over slots.
      reads: vectors read.
      adds: vectors added, before weighting by write_weights.
    """

    logits: Float[Array, "B T classes"]
    read_weights: Float[Array, "B T R S"]
    write_weights: Float[Array, "B T W S"]
    reads: Float[Array, "B T R K"]
    adds: Float[Array, "B T W K"]


class NTM(nnx.Module):
    """A Neural Turing Machine: feature vectors (or ids, as one-hot vectors) in, logits at each step out.

        h_t = controller(x_t, r_(t-1))                     heads_t = clip(W_heads h_t)
        w_t = address(heads_t, w_(t-1), M_(t-1))           for all heads at once
        r_t = sum_s w_s M_(t-1, s)                         logits_t = W_out [h_t, r_t]
        M_t = M_(t-1) (1 - w_s e_t) + w_s a_t              all erases before all adds

    Slots start at a constant. No parameter depends on their number if heads start at the first slot, so a trained
    model can be given more slots. The parameters of all heads come from one matrix product per step; the projections of
    inputs and outputs are one product for the whole sequence. The backward pass saves only the states and recomputes
    each step.

    Source: arXiv 1410.5401; clipping, constant slots and the order (address, read, write): arXiv 1807.08518.

    Args:
      config: config of the model.
      vocab_size: number of input ids; 0 where inputs are feature vectors.
      num_classes: number of logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams: "params".

    Raises:
      ValueError: both or neither of vocab_size and features.

    Example:
      >>> model = NTM(NTMConfig(slots=8, width=16), vocab_size=0, num_classes=3, features=5, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 4, 5))).logits.shape
      (2, 4, 3)
    """

    def __init__(
        self,
        config: NTMConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        check_input(vocab_size, features)
        num_classes = vocab_size if num_classes is None else num_classes
        check_size("num_classes", num_classes)
        self.config, self.vocab_size, self.features, self.num_classes = config, vocab_size, features, num_classes
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        width, reads = config.width, config.read_heads * config.slot_width
        entering = 4 * width if config.controller == "lstm" else width
        fed_back = reads + width if config.controller == "lstm" else reads
        self.entering = linear(vocab_size or features, entering, (None, None), bias=True, **same)
        self.recurrent = linear(fed_back, entering, (None, None), **same)
        self.heads: Any = linear(width, _head_size(config), (None, None), bias=True, **same)
        self.head = linear(width + reads, num_classes, (None, "vocab"), bias=True, **same)
        self.head.preferred_element_type = config.dtypes.wide
        small = named(nnx.initializers.normal(0.1), None)
        self.initial_reads = nnx.Param(small(rngs.params(), (reads,), config.dtypes.param))
        self.initial_weights: Any = nnx.data(None)
        if config.initial_focus == "learned":
            spread = named(nnx.initializers.normal(0.2), None, None)
            self.initial_weights = nnx.Param(spread(rngs.params(), (config.heads, config.slots), config.dtypes.param))

    def init_state(self, batch: int, capacity: int | None = None, dtype: Any = None) -> NTMState:
        """The state before the first step; capacity and dtype, which size a cache, have no effect."""
        batch = check_size("batch", batch)
        config = self.config
        wide = config.dtypes.wide
        if self.initial_weights is None:
            weights = jnp.zeros((config.heads, config.slots), wide).at[:, 0].set(1)
        else:
            weights = jax.nn.softmax(self.initial_weights[...].astype(wide))
        zeros = jnp.zeros((batch, config.width), wide)
        return NTMState(
            memory=jnp.full((batch, config.slot_width, config.slots), config.initial_slots, wide),
            weights=jnp.broadcast_to(weights, (batch, *weights.shape)),
            reads=jnp.broadcast_to(self.initial_reads[...].astype(wide), (batch, self.initial_reads.shape[0])),
            h=zeros,
            c=zeros,
        )

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: NTMState | None = None,
    ) -> ModelOutput:
        """Logits at each step; a call with the returned state continues the sequences.

        Args:
          inputs: float features, or ids.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: ignored: recurrence implies the order.
          state: from the previous call or from `init_state`; None starts a sequence.

        Raises:
          ValueError: an array of wrong shape or dtype.
        """
        logits, state, _ = self._run(inputs, segment_ids, state, traced=False)
        return ModelOutput(logits, state, {})

    @auto_axes
    def trace(self, inputs: Array, *, segment_ids: Array | None = None, state: NTMState | None = None) -> NTMTrace:
        """Runs a call and returns the activity of the heads at each step.

        Example:
          >>> model = NTM(NTMConfig(slots=8, width=4), vocab_size=3, rngs=nnx.Rngs(0))
          >>> model.trace(jnp.array([[0, 1, 2, 1]])).write_weights.shape
          (1, 4, 1, 8)
        """
        logits, _, (weights, reads, adds) = self._run(inputs, segment_ids, state, traced=True)
        by_kind = weights[:, :, : self.config.read_heads], weights[:, :, self.config.read_heads :]
        return NTMTrace(logits, *by_kind, reads.reshape(*reads.shape[:2], -1, self.config.slot_width), adds)

    def _run(self, inputs: Array, segment_ids: Array | None, state: NTMState | None, *, traced: bool) -> tuple:
        """Returns (logits, state, (weights, reads, adds) [B, T, ...] if traced)."""
        dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        refuse_sharded_time("the Neural Turing Machine", dims["T"])
        segments = find_segments(segment_ids, dims)
        config, wide = self.config, self.config.dtypes.wide
        x = inputs if self.features else jax.nn.one_hot(inputs, self.vocab_size)
        entering = jnp.moveaxis(self.entering(x.astype(config.dtypes.compute)).astype(wide), 1, 0)
        initial = self.init_state(dims["B"])
        recurrent, heads, bias = (
            p[...].astype(wide) for p in (self.recurrent.kernel, self.heads.kernel, self.heads.bias)
        )

        def step(state: NTMState, inputs: tuple) -> tuple:
            entering, flags = inputs
            h, c = _control(config, entering, recurrent, state)
            parameters = jnp.clip(h @ heads + bias[None], -config.clip, config.clip)
            focus, erase, add = _split_heads(config, parameters)
            weights = address(focus, state.weights, state.memory)
            reads = read_slots(weights[:, : config.read_heads], state.memory).reshape(h.shape[0], -1)
            writing = weights[:, config.read_heads :]
            if flags is not None:
                writing = jnp.where(flags[0][:, None, None], writing, jnp.zeros_like(writing))
            new = NTMState(write_slots(state.memory, writing, erase, add), weights, reads, h, c)
            if flags is not None:
                new = _next_state(flags, state, new, initial)
            return new, (h, reads, *((weights, add) if traced else ()))

        step = jax.checkpoint(step, prevent_cse=False)
        flags = None
        if segments is not None:
            ends = jnp.diff(segments.index, axis=1, append=segments.index[:, -1:]) != 0
            flags = segments.valid.T, ends.T
        state, outputs = lax.scan(step, initial if state is None else state, (entering, flags))
        h, reads, *trace = (jnp.moveaxis(y, 0, 1) for y in outputs)
        logits = self.head(jnp.concatenate([h, reads], axis=-1).astype(config.dtypes.compute))
        logits = jnp.clip(logits, -config.clip, config.clip)
        return logits, state, (trace[0], reads, trace[1]) if traced else ()


def _head_size(config: NTMConfig) -> int:
    return config.heads * (config.slot_width + SCALARS) + 2 * config.write_heads * config.slot_width


def _control(config: NTMConfig, entering: Array, recurrent: Array, state: NTMState) -> tuple[Array, Array]:
    """A step of the controller; returns (h, c)."""
    if config.controller == "feedforward":
        h = jnp.tanh(entering + state.reads @ recurrent)
        return h, h
    i, f, g, o = jnp.split(entering + jnp.concatenate([state.reads, state.h], axis=1) @ recurrent, 4, axis=1)
    # The bias of 1 opens the forget gate initially.
    c = jax.nn.sigmoid(f + 1) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _split_heads(config: NTMConfig, parameters: Array) -> tuple[Focus, Array, Array]:
    """Splits the parameters of all heads into (focus, erase [B, W, K], add [B, W, K])."""
    heads, width, writes = config.heads, config.slot_width, config.write_heads
    ends = (heads * width, heads * (width + SCALARS), heads * (width + SCALARS) + writes * width)
    key, scalars, erase, add = jnp.split(parameters, ends, axis=1)
    scalars = scalars.reshape(-1, heads, SCALARS)
    focus = Focus(
        key=jnp.tanh(key).reshape(-1, heads, width),
        strength=jax.nn.softplus(scalars[..., 0]),
        gate=jax.nn.sigmoid(scalars[..., 1]),
        shifts=jax.nn.softmax(scalars[..., 2:5]),
        sharpness=1 + jax.nn.softplus(scalars[..., 5]),
    )
    shape = (-1, writes, width)
    return focus, jax.nn.sigmoid(erase).reshape(shape), jnp.tanh(add).reshape(shape)


def _next_state(flags: tuple[Array, Array], old: NTMState, new: NTMState, initial: NTMState) -> NTMState:
    """The state before the next step: unchanged by padding, reset at the end of a segment."""
    valid, ends = flags

    def choose(mask: Array, then: Array, otherwise: Array) -> Array:
        return jnp.where(mask.reshape(-1, *[1] * (then.ndim - 1)), then, otherwise)

    # Write weights are 0 at padding, so the memory is unchanged there already.
    kept = NTMState(new.memory, *(choose(valid, n, o) for n, o in zip(new[1:], old[1:], strict=True)))
    return NTMState(*(choose(ends, i, k) for i, k in zip(initial, kept, strict=True)))
