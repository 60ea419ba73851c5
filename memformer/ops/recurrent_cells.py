"""Recurrent networks over time: RNN (tanh), LSTM and GRU, the gates of a step in one product.

What enters a step from the input is one product for the whole sequence; the scan over time is left with one product
of the state and the gates. F is the width of the input and D the number of units; weights act from the left,
`x @ w_in`, so that a weight of PyTorch is the transpose of one here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.checks import check_array
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import Segments, find_segments
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Dims, Float, Int

__all__ = ["LSTMState", "gru", "lstm", "rnn"]

States: TypeAlias = tuple[Array, ...]
# What enters from the input, what enters from the state, and the state: the next state, the output first.
Cell: TypeAlias = Callable[[Array, Array, States], States]


class LSTMState(NamedTuple):
    """What an LSTM keeps between steps.

    Attributes:
      h: the output of the last step.
      c: the cells.
    """

    h: Float[Array, "B D"]
    c: Float[Array, "B D"]


def rnn(
    x: Float[Array, "B T F"],
    w_in: Float[Array, "F D"],
    w_state: Float[Array, "D D"],
    bias: Float[Array, "D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The plain recurrent network.

    h_t = tanh(x_t W_in + h_{t-1} W_state + b)

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh.
      segment_ids: for packed sequences, 0 = padding: the state resets where the id changes; padding leaves
        the state alone and reads zero.
      initial_state: state to start from, as an earlier call returned it; None is zeros.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.

    Returns:
      The output in x's dtype, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name; the message names it.

    Source: Elman 1990, "Finding structure in time".

    Example:
      >>> y, state = rnn(jnp.ones((1, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((4, 4)), jnp.ones(4))
      >>> y.shape, state.shape
      ((1, 3, 4), (1, 4))
    """
    y, (h,) = _run(_rnn, 1, x, w_in, w_state, bias, None, segment_ids, {"initial_state": initial_state}, precision)
    return y, h


def lstm(
    x: Float[Array, "B T F"],
    w_in: Float[Array, "F 4*D"],
    w_state: Float[Array, "D 4*D"],
    bias: Float[Array, "4*D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: tuple[Float[Array, "B D"], Float[Array, "B D"]] | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B T D"], LSTMState]:
    """Long short-term memory.

    i, f, g, o = x_t W_in + h_{t-1} W_state + b;  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);
    h_t = sigmoid(o) tanh(c_t)

    The gates lie side by side in this order, which is PyTorch's. The forget bias is part of `bias`
    (the layer begins it at 1).

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh.
      segment_ids: for packed sequences, 0 = padding: the state resets where the id changes; padding leaves
        the state alone and reads zero.
      initial_state: (h, c) to start from, as an earlier call returned it; None is zeros.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.

    Returns:
      The output in x's dtype, and the state (h, c) after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name; the message names it.

    Source: Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000.

    Example:
      >>> y, state = lstm(jnp.ones((1, 3, 2)), jnp.zeros((2, 16)), jnp.zeros((4, 16)), jnp.zeros(16))
      >>> y.shape, state.c.shape
      ((1, 3, 4), (1, 4))
    """
    if initial_state is not None and (not isinstance(initial_state, tuple) or len(initial_state) != 2):
        raise ValueError(f"initial_state must be a tuple (h, c), got {type(initial_state).__name__}")
    h, c = (None, None) if initial_state is None else initial_state
    initial = {"initial_state.h": h, "initial_state.c": c}
    y, states = _run(_lstm, 4, x, w_in, w_state, bias, None, segment_ids, initial, precision)
    return y, LSTMState(*states)


def gru(
    x: Float[Array, "B T F"],
    w_in: Float[Array, "F 3*D"],
    w_state: Float[Array, "D 3*D"],
    bias: Float[Array, "3*D"],
    bias_state: Float[Array, "D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D"] | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The gated recurrent unit, its reset gate after the product (one product a step).

    r, z, n = x_t W_in + b;  r', z', n' = h_{t-1} W_state;  r, z <- sigmoid(r + r'), sigmoid(z + z')
    h_t = (1 - z) tanh(n + r (n' + b_state)) + z h_{t-1}

    The gates lie side by side in this order, which is PyTorch's.

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh of r and z, bias_ih of n.
      bias_state: bias_hh of n.
      segment_ids: for packed sequences, 0 = padding: the state resets where the id changes; padding leaves
        the state alone and reads zero.
      initial_state: state to start from, as an earlier call returned it; None is zeros.
      precision: of matrix products: None (what the inputs carry), "default", "high", "highest" or a
        `jax.lax.Precision`.

    Returns:
      The output in x's dtype, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: an argument of the wrong shape, dtype or name; the message names it.

    Source: arXiv 1406.1078; reset after the product: arXiv 1412.3555's form in cuDNN and PyTorch.

    Example:
      >>> y, state = gru(jnp.ones((1, 3, 2)), jnp.zeros((2, 12)), jnp.zeros((4, 12)), jnp.zeros(12), jnp.zeros(4))
      >>> y.shape, state.shape
      ((1, 3, 4), (1, 4))
    """
    y, (h,) = _run(
        _gru, 3, x, w_in, w_state, bias, bias_state, segment_ids, {"initial_state": initial_state}, precision
    )
    return y, h


def _rnn(entering: Array, recurrent: Array, states: States) -> States:
    return (jnp.tanh(entering + recurrent),)


def _lstm(entering: Array, recurrent: Array, states: States) -> States:
    i, f, g, o = jnp.split(entering + recurrent, 4, axis=-1)
    c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(entering: Array, recurrent: Array, states: States) -> States:
    r, z, n = jnp.split(entering, 3, axis=-1)
    r_state, z_state, n_state = jnp.split(recurrent, 3, axis=-1)
    n = jnp.tanh(n + jax.nn.sigmoid(r + r_state) * n_state)
    z = jax.nn.sigmoid(z + z_state)
    return (n + z * (states[0] - n),)


def _run(cell: Cell, gates: int, x, w_in, w_state, bias, bias_state, segment_ids, initial, precision):
    """Checks the arguments, enters the input, and walks the cell over time: (output, states)."""
    dims: Dims = {}
    x = check_array("x", x, "B T F", dims)
    w_state = check_array("w_state", w_state, "D E", dims)
    if dims["E"] != gates * dims["D"]:
        raise ValueError(f"w_state must be [D, {gates} * D], got {w_state.shape}")
    w_in = check_array("w_in", w_in, "F E", dims)
    bias = check_array("bias", bias, "E", dims)
    dtype = accumulation_dtype(x, w_state)
    precision = matmul_precision(precision, x, w_state)
    segments = find_segments(segment_ids, dims)
    zeros = jnp.zeros((dims["B"], dims["D"]), dtype)
    states = tuple(
        zeros if part is None else check_array(name, part, "B D", dims).astype(dtype) for name, part in initial.items()
    )
    if segments is not None:
        # What stands at padding enters nothing, NaN included.
        x = jnp.where(segments.valid[..., None], x, jnp.zeros((), x.dtype))
    by_time = jnp.moveaxis(x, 1, 0)
    entering = _dot(by_time, w_in, dtype, x.dtype, precision) + bias.astype(dtype)[None, None]
    # The gates' biases from the state: only the GRU's last is multiplied before it is added.
    recurrent = jnp.zeros(dims["E"], dtype)
    if bias_state is not None:
        bias_state = check_array("bias_state", bias_state, "D", dims)
        recurrent = recurrent.at[-dims["D"] :].set(bias_state.astype(dtype))
    arrays = (entering, w_state, recurrent, *states)
    # Inside shard_map a gradient must vary as its argument does: weights that all devices share are told apart here.
    arrays = tuple(vary_like(array, *arrays) for array in arrays)
    outputs = _walk(cell, x.dtype, precision, *arrays[:3], arrays[3:], _marks(segments))
    y = jnp.moveaxis(outputs[0], 0, 1)
    if segments is not None:
        y = jnp.where(segments.valid[..., None], y, jnp.zeros((), dtype))
    return y.astype(x.dtype), tuple(part[-1] for part in outputs)


def _marks(segments: Segments | None) -> tuple[Array, Array] | None:
    """[T, B, 1] where the state starts anew, and where a token is not padding."""
    if segments is None:
        return None
    starts = jnp.diff(segments.index, axis=1, prepend=jnp.zeros_like(segments.index[:, :1])) != 0
    return starts.T[..., None], segments.valid.T[..., None]


def _dot(x: Array, w: Array, dtype: jnp.dtype, compute: jnp.dtype, precision) -> Array:
    return jnp.matmul(x.astype(compute), w.astype(compute), precision=precision, preferred_element_type=dtype)


def _before(states: States, marks: tuple[Array, Array] | None) -> States:
    """The states that a step starts from."""
    return states if marks is None else tuple(jnp.where(marks[0], jnp.zeros_like(s), s) for s in states)


def _advance(cell: Cell, marks, entering: Array, recurrent: Array, before: States) -> States:
    """The states after a step; padding leaves them alone."""
    after = cell(entering, recurrent, before)
    if marks is None:
        return after
    return tuple(jnp.where(marks[1], new, old) for new, old in zip(after, before, strict=True))


# The backward pass is written out so that the weights' gradient is one product over all of time: the transposed scan
# would add up one outer product a step.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _walk(cell, compute, precision, entering, w_state, bias, states, marks):
    """All states [T, B, D] of the walk from `states`."""

    def step(states, inputs):
        entering, marks = inputs
        before = _before(states, marks)
        recurrent = _dot(before[0], w_state, entering.dtype, compute, precision) + bias[None]
        after = _advance(cell, marks, entering, recurrent, before)
        return after, after

    return lax.scan(step, states, (entering, marks))[1]


def _walk_forward(cell, compute, precision, entering, w_state, bias, states, marks):
    outputs = _walk(cell, compute, precision, entering, w_state, bias, states, marks)
    return outputs, (entering, w_state, bias, states, marks, outputs)


def _walk_backward(cell, compute, precision, saved, cotangents):
    entering, w_state, bias, states, marks, outputs = saved
    dtype = entering.dtype
    before = tuple(jnp.concatenate([s[None], all_[:-1]]) for s, all_ in zip(states, outputs, strict=True))
    before = _before(before, marks)
    recurrent = _dot(before[0], w_state, dtype, compute, precision) + bias[None, None]

    def step(later, inputs):
        entering, recurrent, before, marks, cotangent = inputs
        total = tuple(a + b for a, b in zip(later, cotangent, strict=True))
        _, transpose = jax.vjp(functools.partial(_advance, cell, marks), entering, recurrent, before)
        d_entering, d_recurrent, earlier = transpose(total)
        first = earlier[0] + _dot(d_recurrent, w_state.T, dtype, compute, precision)
        return _before((first, *earlier[1:]), marks), (d_entering, d_recurrent)

    zeros = tuple(jnp.zeros_like(s) for s in states)
    inputs = (entering, recurrent, before, marks, cotangents)
    d_states, (d_entering, d_recurrent) = lax.scan(step, zeros, inputs, reverse=True)
    read, sent = (x.reshape(-1, x.shape[-1]) for x in (before[0], d_recurrent))
    d_weight = _dot(read.T, sent, dtype, compute, precision).astype(w_state.dtype)
    return d_entering, d_weight, jnp.sum(sent, axis=0), d_states, None


_walk.defvjp(_walk_forward, _walk_backward)
