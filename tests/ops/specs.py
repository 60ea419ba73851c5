"""The ops under test: one row each; test_ops.py runs the whole suite on every row.

To add an op, or another setting of one, append a row to SPECS; write no test.
  name             unique; what `pytest -k` selects by.
  op               the public function `op(**arrays, segment_ids=, initial_state=, implementation=, **options)`.
  arrays           `arrays(rng, batch, length) -> {argument name: float64 numpy array}`: every differentiable
                   argument, time on axis 1, in ranges where the op is well conditioned.
  initial_state    `initial_state(rng, batch)`: a float64 state to start from. Where the state is a cache, build it
                   with numpy or by a plain call on a few random tokens; only its float leaves get gradients.
  observe          `observe(state) -> pytree of float arrays`: what is compared (and differentiated) of a state.
                   A cache must be observed so that the place of a slot does not matter and dead slots do not
                   count, for example as the sums over valid slots of k, v and k v^T.
  options          further keyword arguments of every call, all static.
  implementations  which of them exist; "recurrent" (the oracle) is always among them.
  chunk_sizes      what `chunk_size` may be held against; () where the op takes none.
  scope            name of the op in the scope memformer.<scope>.<implementation>.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import memformer as mf

HEADS, WIDTH, VALUE = 2, 8, 4


class Spec(NamedTuple):
    """One row of the table; the fields are described at the top of the file."""

    name: str
    op: Callable[..., Any]
    arrays: Callable[..., dict[str, np.ndarray]]
    initial_state: Callable[..., Any]
    scope: str
    options: dict[str, Any] = {}
    observe: Callable[[Any], Any] = lambda state: state
    implementations: tuple[str, ...] = ("recurrent", "chunked")
    chunk_sizes: tuple[int, ...] = (16, 32)


def unit(rng, *shape):
    """Random vectors of length 1."""
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_decay(rng, *shape):
    """Log decays between almost 0 and about -3."""
    return -np.exp(rng.uniform(-4.0, 1.1, shape))


def recurrent_arrays(decay=None, beta=True, groups=HEADS, positive=False, steps=None):
    """Arguments of the ops with a matrix state; decay is None, "head" or "channel"."""

    def build(rng, batch, length):
        many = () if steps is None else (steps,)
        arrays = {
            "q": unit(rng, batch, length, groups, WIDTH),
            "k": unit(rng, batch, length, *many, groups, WIDTH),
            "v": rng.standard_normal((batch, length, *many, HEADS, VALUE)),
        }
        if positive:
            arrays["q"], arrays["k"] = abs(arrays["q"]) + 0.1, abs(arrays["k"]) + 0.1
        if beta:
            arrays["beta"] = rng.uniform(0.0, 2.0, (batch, length, *many, HEADS))
        if decay == "head":
            arrays["decay"] = log_decay(rng, batch, length, HEADS)
        if decay == "channel":
            arrays["decay"] = log_decay(rng, batch, length, HEADS, WIDTH)
        return arrays

    return build


def matrix_state(columns=VALUE, positive=False):
    """A random matrix state."""

    def build(rng, batch):
        state = rng.standard_normal((batch, HEADS, WIDTH, columns))
        return abs(state) if positive else state

    return build


def _delta_rule(name, **kind):
    return Spec(name, mf.delta_rule, recurrent_arrays(**kind), matrix_state(), "delta_rule")


def _linear(name, **kind):
    return Spec(name, mf.linear_attention, recurrent_arrays(beta=False, **kind), matrix_state(), "linear_attention")


def _product(name, **kind):
    return Spec(name, mf.delta_product, recurrent_arrays(steps=2, **kind), matrix_state(), "delta_product")


SPECS = (
    _delta_rule("delta_rule"),
    _delta_rule("delta_rule_head_decay", decay="head"),
    _delta_rule("delta_rule_channel_decay", decay="channel"),
    _delta_rule("delta_rule_grouped", decay="head", groups=1),
    _linear("linear_attention"),
    _linear("linear_attention_head_decay", decay="head"),
    _linear("linear_attention_channel_decay", decay="channel", groups=1),
    Spec(
        "linear_attention_normalized",
        mf.linear_attention,
        recurrent_arrays(decay="head", beta=False, positive=True),
        matrix_state(VALUE + 1, positive=True),
        "linear_attention",
        options={"normalize": True},
    ),
    _product("delta_product", decay=None),
    _product("delta_product_head_decay", decay="head"),
    _product("delta_product_channel_decay", decay="channel"),
)
