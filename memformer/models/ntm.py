"""The Neural Turing Machine: a controller with heads that read and write a memory of slots."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import linear, named
from memformer.layers.config import BaseConfig
from memformer.models.config import check_input
from memformer.models.language_model import ModelOutput
from memformer.ops.addressing import Focus, address, read_slots, write_slots

__all__ = ["NTM", "NTMConfig", "NTMState", "NTMTrace"]

CONTROLLERS = ("lstm", "feedforward")

# Of a head's parameters beside its key: strength, gate, three shifts, sharpness.
SCALARS = 6


@dataclasses.dataclass(frozen=True)
class NTMConfig(BaseConfig):
    """The shape of an NTM; the defaults are the paper's memory and the LSTM controller of arXiv 1807.08518.

    Attributes:
      controller: "lstm" or "feedforward" (one tanh layer).
      width: D, units of the controller.
      slots: S, of the memory.
      slot_width: K, entries of a slot.
      read_heads: R.
      write_heads: W.
      initial_focus: "first" (heads start at the first slot) or "learned" (from learned weights over slots).
      initial_slots: what each entry of an empty memory holds.
      clip: what heads and outputs are told lies in [-clip, clip].
      dtype: of what enters and leaves the recurrence, which itself runs in float32 (float64 for "float64").
      param_dtype: of parameters.

    Raises:
      ValueError: names the key, what was expected and what came.

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
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip!r}")

    @property
    def heads(self) -> int:
        """H = R + W: the read heads come first."""
        return self.read_heads + self.write_heads


class NTMState(NamedTuple):
    """What an NTM keeps between steps, float32.

    Attributes:
      memory: slots last.
      weights: of the heads at the last step, read heads first.
      reads: what the read heads read, [B, R * K].
      h: the controller's output.
      c: the cells of an LSTM controller; h again for a feedforward one.
    """

    memory: Float[Array, "B K S"]
    weights: Float[Array, "B H S"]
    reads: Float[Array, "B R*K"]
    h: Float[Array, "B D"]
    c: Float[Array, "B D"]


class NTMTrace(NamedTuple):
    """What the heads did at each step; padding has no meaning here.

    Attributes:
      logits: as the model's.
      read_weights: over slots.
      write_weights: over slots.
      reads: what was read.
      adds: what was to be added where the write weights are.
    """

    logits: Float[Array, "B T classes"]
    read_weights: Float[Array, "B T R S"]
    write_weights: Float[Array, "B T W S"]
    reads: Float[Array, "B T R K"]
    adds: Float[Array, "B T W K"]


class NTM(nnx.Module):
    """A Neural Turing Machine: features (or ids, as one-hot vectors) in, logits of bits or classes out.

        h_t = controller(x_t, r_(t-1))                     clipped heads = W_heads h_t
        w_t = address(heads, w_(t-1), M_(t-1))             of all heads at once
        r_t = sum_s w_s M_(t-1, s)                         logits_t = W_out [h_t, r_t]
        M_t = M_(t-1) (1 - w_s e_t) + w_s a_t              all erases before all adds

    The slots begin at a constant 1e-6 each, and no parameter depends on their number when heads start at the first
    slot: a trained model may be given more of them. Parameters of all heads come from one product a step; what enters
    from x and what leaves are one product each for the whole sequence. The backward pass computes each step again
    and keeps the states alone.

    Source: arXiv 1410.5401; clipping, constant slots and the order (address, read, then write): arXiv 1807.08518.

    Args:
      config: the shape.
      vocab_size: of input ids; 0 where inputs are feature vectors.
      num_classes: bits or classes of the logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams; "params".

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
        """The state before the first step; it does not grow, so that a capacity has nothing to say."""
        check_size("batch", batch)
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
          segment_ids: 0 = padding; the rule of `memformer.core.segments`.
          positions: taken as all models take them; the recurrence keeps its own order.
          state: of the last call; None is the beginning.

        Raises:
          ValueError: an array of another shape or dtype.
        """
        logits, state, _ = self._walk(inputs, segment_ids, state, traced=False)
        return ModelOutput(logits, state, {})

    def trace(self, inputs: Array, *, segment_ids: Array | None = None, state: NTMState | None = None) -> NTMTrace:
        """The same call, returning what each head did at each step.

        Example:
          >>> model = NTM(NTMConfig(slots=8, width=4), vocab_size=3, rngs=nnx.Rngs(0))
          >>> model.trace(jnp.array([[0, 1, 2, 1]])).write_weights.shape
          (1, 4, 1, 8)
        """
        logits, _, (weights, reads, adds) = self._walk(inputs, segment_ids, state, traced=True)
        apart = weights[:, :, : self.config.read_heads], weights[:, :, self.config.read_heads :]
        return NTMTrace(logits, *apart, reads.reshape(*reads.shape[:2], -1, self.config.slot_width), adds)

    def _walk(self, inputs: Array, segment_ids: Array | None, state: NTMState | None, *, traced: bool) -> tuple:
        """(logits, state, what the heads did [B, T, ...] where traced) of a whole call."""
        dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        segments = find_segments(segment_ids, dims)
        config, wide = self.config, self.config.dtypes.wide
        x = inputs if self.features else jax.nn.one_hot(inputs, self.vocab_size)
        entering = jnp.moveaxis(self.entering(x.astype(config.dtypes.compute)).astype(wide), 1, 0)
        initial = self.init_state(dims["B"])
        recurrent, heads, bias = (
            p[...].astype(wide) for p in (self.recurrent.kernel, self.heads.kernel, self.heads.bias)
        )

        def step(state: NTMState, inputs: tuple) -> tuple:
            entering, marks = inputs
            h, c = _control(config, entering, recurrent, state)
            told = jnp.clip(h @ heads + bias[None], -config.clip, config.clip)
            focus, erase, add = _split_heads(config, told)
            weights = address(focus, state.weights, state.memory)
            reads = read_slots(weights[:, : config.read_heads], state.memory).reshape(h.shape[0], -1)
            writing = weights[:, config.read_heads :]
            if marks is not None:
                writing = jnp.where(marks[0][:, None, None], writing, jnp.zeros_like(writing))
            new = NTMState(write_slots(state.memory, writing, erase, add), weights, reads, h, c)
            if marks is not None:
                new = _between(marks, state, new, initial)
            return new, (h, reads, *((weights, add) if traced else ()))

        step = jax.checkpoint(step, prevent_cse=False)
        marks = None
        if segments is not None:
            ends = jnp.diff(segments.index, axis=1, append=segments.index[:, -1:]) != 0
            marks = segments.valid.T, ends.T
        state, outputs = lax.scan(step, initial if state is None else state, (entering, marks))
        h, reads, *seen = (jnp.moveaxis(y, 0, 1) for y in outputs)
        logits = self.head(jnp.concatenate([h, reads], axis=-1).astype(config.dtypes.compute))
        logits = jnp.clip(logits, -config.clip, config.clip)
        return logits, state, (seen[0], reads, seen[1]) if traced else ()


def _head_size(config: NTMConfig) -> int:
    return config.heads * (config.slot_width + SCALARS) + 2 * config.write_heads * config.slot_width


def _control(config: NTMConfig, entering: Array, recurrent: Array, state: NTMState) -> tuple[Array, Array]:
    """The controller's step: (h, c)."""
    if config.controller == "feedforward":
        h = jnp.tanh(entering + state.reads @ recurrent)
        return h, h
    i, f, g, o = jnp.split(entering + jnp.concatenate([state.reads, state.h], axis=1) @ recurrent, 4, axis=1)
    # a forget gate begins open
    c = jax.nn.sigmoid(f + 1) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _split_heads(config: NTMConfig, told: Array) -> tuple[Focus, Array, Array]:
    """The parameters of all heads out of one product: (focus, erase [B, W, K], add [B, W, K])."""
    heads, width, writes = config.heads, config.slot_width, config.write_heads
    ends = (heads * width, heads * (width + SCALARS), heads * (width + SCALARS) + writes * width)
    key, scalars, erase, add = jnp.split(told, ends, axis=1)
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


def _between(marks: tuple[Array, Array], old: NTMState, new: NTMState, initial: NTMState) -> NTMState:
    """The state for the next step: padding leaves it alone, the end of a segment empties it."""
    valid, ends = marks

    def choose(mask: Array, then: Array, otherwise: Array) -> Array:
        return jnp.where(mask.reshape(-1, *[1] * (then.ndim - 1)), then, otherwise)

    # nothing was written at padding, so the memory needs no choice there
    kept = NTMState(new.memory, *(choose(valid, n, o) for n, o in zip(new[1:], old[1:], strict=True)))
    return NTMState(*(choose(ends, i, k) for i, k in zip(initial, kept, strict=True)))
