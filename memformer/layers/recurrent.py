"""RNN, LSTM and GRU: as layers, as uni- or bidirectional stacks, and as memories of a block."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_choice, check_flags, check_size
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, check_rate, constrain, dropout, linear, named, stochastic_keys
from memformer.layers.sharding import auto_axes, state_letters
from memformer.ops.recurrent_cells import LSTMState, gru, lstm, rnn

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "GRUMemory",
    "LSTMMemory",
    "RNNMemory",
    "RecurrentLayer",
    "RecurrentMemory",
    "RecurrentStack",
]

# Logical axes of weights. A step needs all units at once, so units are never sharded.
NAMES = ("embed", None)


def orthogonal_gates(gates: int) -> nnx.Initializer:
    """An initializer of [D, gates * D]: one orthogonal matrix per gate, drawn in float32."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        square = (shape[0], shape[0])
        each = [nnx.initializers.orthogonal()(k, square, jnp.float32) for k in jax.random.split(key, gates)]
        return jnp.concatenate(each, axis=1).astype(dtype)

    return init


class RecurrentLayer(nnx.Module):
    """A recurrent op with its weights: orthogonal for the state, LeCun normal for the input.

    Weights have the layout of `memformer.ops.recurrent_cells`: `w_in` [F, gates * D] and `w_state` [D, gates * D] are
    the transposes of PyTorch's weight_ih and weight_hh, and `bias` is the sum of its two biases.

    Args:
      in_features: F.
      width: D, the number of units.
      dtypes: the dtype policy; the state is always float32.
      rngs: random streams.

    Raises:
      ValueError: a size that is not a positive integer.
    """

    gates: ClassVar[int]

    def __init__(self, in_features: int, width: int, *, dtypes: Dtypes | None = None, rngs: nnx.Rngs):
        in_features, width = check_size("in_features", in_features), check_size("width", width)
        self.in_features, self.width, self.dtypes = in_features, width, Dtypes() if dtypes is None else dtypes
        self.w_in = self._param((in_features, self.gates * width), nnx.initializers.lecun_normal(), NAMES, rngs)
        self.w_state = self._param((width, self.gates * width), orthogonal_gates(self.gates), NAMES, rngs)
        self.bias = self._param((self.gates * width,), self._init_bias, (None,), rngs)

    def _param(self, shape: tuple[int, ...], init: Any, names: tuple[str | None, ...], rngs: nnx.Rngs) -> nnx.Param:
        return nnx.Param(named(init, *names)(rngs.params(), shape, self.dtypes.param))

    def _init_bias(self, key, shape, dtype, out_sharding=None):
        return jnp.zeros(shape, dtype)

    def _apply_op(self, x: Array, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no op")

    def init_state(self, batch: int) -> Any:
        """The state before the first token: zeros [B, D] in float32."""
        return jnp.zeros((check_size("batch", batch), self.width), self.dtypes.wide)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns (y, state); a call with that state continues the last segment.

        Args:
          x: input.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: ignored: recurrence implies the order.
          state: from the previous call or from `init_state`; None is zeros.

        Raises:
          ValueError: an array of wrong shape or dtype.
        """
        check_array("x", x, "B T F", {"F": self.in_features})
        return self._apply_op(x.astype(self.dtypes.compute), segment_ids, state)

    def step(self, x: Float[Array, "B F"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        """One token; returns (y, state)."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state


class RNN(RecurrentLayer):
    """Elman network: `memformer.ops.recurrent_cells.rnn` with weights.

    Example:
      >>> y, h = RNN(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3)))
      >>> y.shape, h.shape
      ((2, 5, 4), (2, 4))
    """

    gates = 1

    def _apply_op(self, x, segment_ids, state):
        weights = (self.w_in[...], self.w_state[...], self.bias[...])
        return rnn(x, *weights, segment_ids=segment_ids, initial_state=state)


class LSTM(RecurrentLayer):
    """Long short-term memory: `memformer.ops.recurrent_cells.lstm` with weights. The forget bias is initialised to 1.

    Source: Hochreiter and Schmidhuber 1997; forget bias, Jozefowicz et al. 2015.

    Example:
      >>> layer = LSTM(3, 4, rngs=nnx.Rngs(0))
      >>> y, (h, c) = layer(jnp.ones((2, 5, 3)))
      >>> y.shape, c.shape
      ((2, 5, 4), (2, 4))
      >>> y, state = layer.step(jnp.ones((2, 3)), (h, c))
      >>> y.shape
      (2, 4)
    """

    gates = 4

    def _init_bias(self, key, shape, dtype, out_sharding=None):
        forget = slice(self.width, 2 * self.width)
        return jnp.zeros(shape, dtype).at[forget].set(1)

    def _apply_op(self, x, segment_ids, state):
        weights = (self.w_in[...], self.w_state[...], self.bias[...])
        return lstm(x, *weights, segment_ids=segment_ids, initial_state=state)

    def init_state(self, batch: int) -> LSTMState:
        """The state before the first token: (h, c) of zeros [B, D] in float32."""
        zeros = super().init_state(batch)
        return LSTMState(zeros, zeros)


class GRU(RecurrentLayer):
    """Gated recurrent unit: `memformer.ops.recurrent_cells.gru` with weights.

    `bias_state` [D] is PyTorch's bias_hh of n; `bias` is the sum of its two biases for r and z, bias_ih for n.

    Example:
      >>> y, h = GRU(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3)))
      >>> y.shape, h.shape
      ((2, 5, 4), (2, 4))
    """

    gates = 3

    def __init__(self, in_features: int, width: int, *, dtypes: Dtypes | None = None, rngs: nnx.Rngs):
        super().__init__(in_features, width, dtypes=dtypes, rngs=rngs)
        self.bias_state = self._param((width,), self._init_bias, (None,), rngs)

    def _apply_op(self, x, segment_ids, state):
        weights = (self.w_in[...], self.w_state[...], self.bias[...], self.bias_state[...])
        return gru(x, *weights, segment_ids=segment_ids, initial_state=state)


CELLS: dict[str, type[RecurrentLayer]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


class RecurrentStack(nnx.Module):
    """A stack of recurrent layers, uni- or bidirectional.

    A bidirectional layer reads each segment forwards and backwards and concatenates the two outputs, forward first:
    [B, T, 2 * D]. The backward state is the one after the first token of the first segment of a row; with one sequence
    per row it summarises the whole sequence.

    Args:
      kind: "rnn", "lstm" or "gru".
      in_features: F of the first layer.
      width: D, units per layer and direction.
      layers: number of layers.
      bidirectional: reads in both directions.
      dropout: rate on the input of every layer but the first, where a key is given.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: an unknown kind, or a value out of range.

    Example:
      >>> stack = RecurrentStack("gru", 3, 4, 2, bidirectional=True, rngs=nnx.Rngs(0))
      >>> y, state = stack(jnp.ones((2, 5, 3)))
      >>> y.shape, len(state), state[0][1].shape
      ((2, 5, 8), 2, (2, 4))
    """

    def __init__(
        self,
        kind: str,
        in_features: int,
        width: int,
        layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dtypes: Dtypes | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice("kind", kind, tuple(CELLS))
        check_flags(bidirectional=bidirectional)
        layers, width = check_size("layers", layers), check_size("width", width)
        self.bidirectional, self.dropout = bidirectional, check_rate("dropout", dropout)
        self.out_features = width * (2 if bidirectional else 1)
        sizes = [in_features] + [self.out_features] * (layers - 1)

        def row() -> nnx.List:
            return nnx.List([CELLS[kind](size, width, dtypes=dtypes, rngs=rngs) for size in sizes])

        self.forward = row()
        self.backward: Any = row() if bidirectional else nnx.data(None)

    def init_state(self, batch: int) -> tuple:
        """The state before the first token, one entry per layer.

        Raises:
          ValueError: a bidirectional stack, which cannot continue a sequence.
        """
        self._check_state(not self.bidirectional)
        return tuple(layer.init_state(batch) for layer in self.forward)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: tuple | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """Returns (y, state); the state has one entry per layer, a pair (forward, backward) if bidirectional.

        Args:
          x: input of the first layer.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: ignored: recurrence implies the order.
          state: from the previous call or from `init_state`; must be None if bidirectional.
          key: random key for dropout; None disables it.

        Raises:
          ValueError: an array of wrong shape or dtype, or a state for a bidirectional stack.
        """
        self._check_state(state is None or not self.bidirectional)
        keys = stochastic_keys(key, len(self.forward))
        # Reversing time is correct for packed rows too: each segment is read from its end and resets at its boundary.
        reversed_ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
        states = []
        for i, layer in enumerate(self.forward):
            if i:
                x = dropout(x, self.dropout, None if keys is None else keys[i])
            y, new = layer(x, segment_ids=segment_ids, state=None if state is None else state[i])
            if self.bidirectional:
                back, last = self.backward[i](jnp.flip(x, 1), segment_ids=reversed_ids)
                y, new = jnp.concatenate([y, jnp.flip(back, 1)], axis=-1), (new, last)
            x = y
            states.append(new)
        return x, tuple(states)

    def step(self, x: Float[Array, "B F"], state: tuple) -> tuple[Float[Array, "B D"], tuple]:
        """One token; returns (y, state)."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    def _check_state(self, fits: bool) -> None:
        if not fits:
            raise ValueError("state must be None for a bidirectional stack, which reads whole sequences")


class RecurrentMemory(nnx.Module):
    """A recurrent layer as the memory of a block: y = Wo h, with heads * value_width units.

    Heads determine only the number of units; the recurrent weights connect all of them.

    Args:
      width: D of x and y.
      heads: H.
      key_width: default of value_width (a recurrent state has no keys); None is D // H.
      value_width: V, units per head; None is key_width.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: a width that heads does not divide where both widths are None, or a size that is not a positive
        integer.
    """

    cell: ClassVar[type[RecurrentLayer]]

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key_width: int | None = None,
        value_width: int | None = None,
        dtypes: Dtypes | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes = Dtypes() if dtypes is None else dtypes
        width, heads = check_size("width", width), check_size("heads", heads)
        if key_width is None and value_width is None and width % heads:
            raise ValueError(f"width must be a multiple of heads where key_width is None, got {width} and {heads}")
        units = heads * check_size("value_width", value_width or key_width or width // heads)
        self.layer = self.cell(width, units, dtypes=dtypes, rngs=rngs)
        self.out = linear(units, width, (None, "embed"), dtypes=dtypes, rngs=rngs)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> dict[str, Any]:
        """The state before the first token; capacity and dtype, which size a cache, have no effect.

        Raises:
          ValueError: a batch or capacity that is not a positive integer.
        """
        check_size("capacity", capacity)
        return {"memory": self.layer.init_state(batch)}

    def state_letters(self, state: Any) -> Any:
        """The letters of the arrays of a state."""
        return state_letters(state)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Returns (y, state); the arguments are those of `MemoryLayer`."""
        h, memory = self.layer(x, segment_ids=segment_ids, state=None if state is None else state["memory"])
        y = self.out(h)
        return constrain(y, "activation_batch", "activation_time", "activation_embed"), {"memory": memory}


class RNNMemory(RecurrentMemory):
    """`RNN` as the memory of a block."""

    cell = RNN


class LSTMMemory(RecurrentMemory):
    """`LSTM` as the memory of a block."""

    cell = LSTM


class GRUMemory(RecurrentMemory):
    """`GRU` as the memory of a block."""

    cell = GRU
