"""Recurrent networks over time: RNN (tanh), LSTM and GRU.

The input's part of all gates is one product for the whole sequence, so that the scan over time has one product per
step, of the state. F is the width of the input and D the number of units. Weights are applied as `x @ w_in`: a
PyTorch weight is the transpose of a weight here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.autodiff import in_forward_mode, reverse_only
from memformer.core.checks import check_array
from memformer.core.context import refuse_sharded_time
from memformer.core.numerics import accumulation_dtype, matmul_precision
from memformer.core.segments import Segments, find_segments
from memformer.core.sharding import keep_shardings, vary_like
from memformer.core.types import Array, Dims, Float, Int

__all__ = ["LSTMState", "gru", "lstm", "rnn"]

# Of the hand-written backward pass.
FORWARD_MODE = (
    "recurrent cells have no forward mode inside jit, jax.checkpoint, a scan or jax.linearize; jit outside jax.jvp"
)

States: TypeAlias = tuple[Array, ...]
# (input's part of the gates, state's part, state) to the next state, the output first.
Cell: TypeAlias = Callable[[Array, Array, States], States]


class LSTMState(NamedTuple):
    """The state of an LSTM.

    Attributes:
      h: output of the last step.
      c: cells.

    Example:
      >>> LSTMState(h=jnp.zeros((1, 4)), c=jnp.zeros((1, 4))).c.shape
      (1, 4)
    """

    h: Float[Array, "B D"]
    c: Float[Array, "B D"]


@keep_shardings
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
    """Runs the plain recurrent network.

        h_t = tanh(x_t W_in + h_{t-1} W_state + b)

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh.
      segment_ids, initial_state, precision: see `memformer.ops`.

    Returns:
      The output in x's dtype, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: see `memformer.ops`.

    Source: Elman 1990, "Finding structure in time".

    Example:
      >>> y, state = rnn(jnp.ones((1, 3, 2)), jnp.zeros((2, 4)), jnp.zeros((4, 4)), jnp.ones(4))
      >>> y.shape, state.shape
      ((1, 3, 4), (1, 4))
    """
    y, (h,) = _run(_rnn, 1, x, w_in, w_state, bias, None, segment_ids, {"initial_state": initial_state}, precision)
    return y, h


@keep_shardings
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
    """Runs a long short-term memory (LSTM).

        i, f, g, o = x_t W_in + h_{t-1} W_state + b
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);  h_t = sigmoid(o) tanh(c_t)

    The gates are concatenated in this order, which is PyTorch's. The forget bias is part of `bias` (the layer
    initialises it to 1).

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh.
      segment_ids, precision: see `memformer.ops`.
      initial_state: (h, c) of an earlier call; None is zeros.

    Returns:
      The output in x's dtype, and the state (h, c) after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: see `memformer.ops`.

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


@keep_shardings
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
    """Runs a gated recurrent unit (GRU) with the reset gate after the product.

        r, z, n = x_t W_in + b;  r', z', n' = h_{t-1} W_state;  r, z <- sigmoid(r + r'), sigmoid(z + z')
        h_t = (1 - z) tanh(n + r (n' + b_state)) + z h_{t-1}

    The gates are concatenated in this order, which is PyTorch's.

    Args:
      x: inputs.
      w_in: PyTorch's weight_ih, transposed.
      w_state: weight_hh, transposed.
      bias: bias_ih + bias_hh of r and z, bias_ih of n.
      bias_state: bias_hh of n.
      segment_ids, initial_state, precision: see `memformer.ops`.

    Returns:
      The output in x's dtype, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
      ValueError: see `memformer.ops`.

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


def _rnn(from_input: Array, from_state: Array, states: States) -> States:
    return (jnp.tanh(from_input + from_state),)


def _lstm(from_input: Array, from_state: Array, states: States) -> States:
    i, f, g, o = jnp.split(from_input + from_state, 4, axis=-1)
    c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(from_input: Array, from_state: Array, states: States) -> States:
    r, z, n = jnp.split(from_input, 3, axis=-1)
    r_state, z_state, n_state = jnp.split(from_state, 3, axis=-1)
    n = jnp.tanh(n + jax.nn.sigmoid(r + r_state) * n_state)
    z = jax.nn.sigmoid(z + z_state)
    return (n + z * (states[0] - n),)


def _run(cell: Cell, gates: int, x, w_in, w_state, bias, bias_state, segment_ids, initial, precision):
    """Checks the arguments, projects the input, and scans the cell over time: (output, states)."""
    dims: Dims = {}
    x = check_array("x", x, "B T F", dims)
    refuse_sharded_time(cell.__name__.strip("_"), dims["T"])
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
        # Values at padding, NaN included, must not reach the products.
        x = jnp.where(segments.valid[..., None], x, jnp.zeros((), x.dtype))
    by_time = jnp.moveaxis(x, 1, 0)
    from_input = _dot(by_time, w_in, dtype, x.dtype, precision) + bias.astype(dtype)[None, None]
    # Biases of the state's part: only the GRU's last is multiplied before it is added.
    state_bias = jnp.zeros(dims["E"], dtype)
    if bias_state is not None:
        bias_state = check_array("bias_state", bias_state, "D", dims)
        state_bias = state_bias.at[-dims["D"] :].set(bias_state.astype(dtype))
    arrays = (from_input, w_state, state_bias, *states)
    # Inside shard_map a gradient must vary over the same axes as its argument: mark weights that all devices share.
    arrays = tuple(vary_like(array, *arrays) for array in arrays)
    scan: Callable[..., States] = _scan_plain
    if not in_forward_mode(arrays):
        scan, arrays = _scan_time, reverse_only(FORWARD_MODE, arrays)
    outputs = scan(cell, x.dtype, precision, *arrays[:3], arrays[3:], _time_masks(segments))
    y = jnp.moveaxis(outputs[0], 0, 1)
    if segments is not None:
        y = jnp.where(segments.valid[..., None], y, jnp.zeros((), dtype))
    return y.astype(x.dtype), tuple(part[-1] for part in outputs)


def _time_masks(segments: Segments | None) -> tuple[Array, Array] | None:
    """[T, B, 1] where a segment starts, and where a token is not padding."""
    if segments is None:
        return None
    starts = jnp.diff(segments.index, axis=1, prepend=jnp.zeros_like(segments.index[:, :1])) != 0
    return starts.T[..., None], segments.valid.T[..., None]


def _dot(x: Array, w: Array, dtype: jnp.dtype, compute: jnp.dtype, precision) -> Array:
    return jnp.matmul(x.astype(compute), w.astype(compute), precision=precision, preferred_element_type=dtype)


def _reset(states: States, masks: tuple[Array, Array] | None) -> States:
    """The states before a step, zero where a segment starts."""
    return states if masks is None else tuple(jnp.where(masks[0], jnp.zeros_like(s), s) for s in states)


def _advance(cell: Cell, masks, from_input: Array, from_state: Array, before: States) -> States:
    """The states after a step; padding leaves them unchanged."""
    after = cell(from_input, from_state, before)
    if masks is None:
        return after
    return tuple(jnp.where(masks[1], new, old) for new, old in zip(after, before, strict=True))


def _scan_plain(cell, compute, precision, from_input, w_state, bias, states, masks):
    """The states after every step, [T, B, D]."""

    def step(states, inputs):
        from_input, masks = inputs
        before = _reset(states, masks)
        from_state = _dot(before[0], w_state, from_input.dtype, compute, precision) + bias[None]
        after = _advance(cell, masks, from_input, from_state, before)
        return after, after

    return lax.scan(step, states, (from_input, masks))[1]


# The backward pass is written out so that the gradient of the weights is one product over all of time: the transposed
# scan would accumulate an outer product per step.
_scan_time = jax.custom_vjp(_scan_plain, nondiff_argnums=(0, 1, 2))


def _scan_time_forward(cell, compute, precision, from_input, w_state, bias, states, masks):
    outputs = _scan_plain(cell, compute, precision, from_input, w_state, bias, states, masks)
    return outputs, (from_input, w_state, bias, states, masks, outputs)


def _scan_time_backward(cell, compute, precision, saved, cotangents):
    from_input, w_state, bias, states, masks, outputs = saved
    dtype = from_input.dtype
    before = tuple(jnp.concatenate([s[None], after[:-1]]) for s, after in zip(states, outputs, strict=True))
    before = _reset(before, masks)
    from_state = _dot(before[0], w_state, dtype, compute, precision) + bias[None, None]

    def step(d_after, inputs):
        from_input, from_state, before, masks, cotangent = inputs
        total = tuple(a + b for a, b in zip(d_after, cotangent, strict=True))
        _, transpose = jax.vjp(functools.partial(_advance, cell, masks), from_input, from_state, before)
        d_input, d_state, d_before = transpose(total)
        first = d_before[0] + _dot(d_state, w_state.T, dtype, compute, precision)
        return _reset((first, *d_before[1:]), masks), (d_input, d_state)

    zeros = tuple(jnp.zeros_like(s) for s in states)
    inputs = (from_input, from_state, before, masks, cotangents)
    d_states, (d_input, d_state) = lax.scan(step, zeros, inputs, reverse=True)
    # Time and batch are contracted as two axes: a reshape to one would gather a sharded batch.
    operands = (before[0].astype(compute), d_state.astype(compute))
    axes = (((0, 1), (0, 1)), ((), ()))
    d_weight = lax.dot_general(*operands, axes, precision=precision, preferred_element_type=dtype)
    return d_input, d_weight.astype(w_state.dtype), jnp.sum(d_state, axis=(0, 1)), d_states, None


_scan_time.defvjp(_scan_time_forward, _scan_time_backward)
