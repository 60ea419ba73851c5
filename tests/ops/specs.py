"""The ops under test, one row each; test_ops.py runs the whole suite on every row.

To add an op, or another setting of one, append a row to SPECS; no test has to be written.
  name             unique; selected by `pytest -k`.
  op               the public function `op(**arrays, segment_ids=, initial_state=, implementation=, **options)`.
  arrays           `arrays(rng, batch, length) -> {argument name: float64 numpy array}`: every differentiable
                   argument, time on axis 1, in ranges where the op is well conditioned.
  initial_state    `initial_state(rng, batch)`: a float64 state to start from. Where the state is a cache, build it
                   with numpy or by a plain call on a few random tokens; only its float leaves get gradients.
  observe          `observe(state) -> pytree of float arrays`: the part of a state that is compared and
                   differentiated. For a cache it must not depend on the order of slots or on invalid slots, for
                   example the sums over valid slots of k, v and k v^T.
  options          further keyword arguments of every call, all static.
  implementations  which of them exist; "recurrent" (the oracle) is always among them.
  chunk_sizes      values of `chunk_size` to compare; () where the op takes none.
  scope            name of the op in the scope memformer.<scope>.<implementation>.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import memformer as mf
from memformer.ops.attention.cache import DeltaCache, KVCache

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
    """Random unit vectors."""
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_decay(rng, *shape):
    """Log decays between almost 0 and about -3."""
    return -np.exp(rng.uniform(-4.0, 1.1, shape))


def recurrent_arrays(decay=None, beta=True, groups=HEADS, positive=False, steps=None, erase=False, width=WIDTH):
    """Arguments of the ops with a matrix state; decay is None, "head" or "channel"."""

    def build(rng, batch, length):
        many = () if steps is None else (steps,)
        arrays = {
            "q": unit(rng, batch, length, groups, width),
            "k": unit(rng, batch, length, *many, groups, width),
            "v": rng.standard_normal((batch, length, *many, HEADS, VALUE)),
        }
        if positive:
            arrays["q"], arrays["k"] = abs(arrays["q"]) + 0.1, abs(arrays["k"]) + 0.1
        if beta:
            arrays["beta"] = rng.uniform(0.0, 2.0, (batch, length, *many, HEADS))
        if erase:
            arrays["w"] = unit(rng, batch, length, *many, groups, width)
            arrays["alpha"] = rng.uniform(0.0, 2.0, (batch, length, *many, HEADS))
        if decay == "head":
            arrays["decay"] = log_decay(rng, batch, length, HEADS)
        if decay == "channel":
            arrays["decay"] = log_decay(rng, batch, length, HEADS, width)
        return arrays

    return build


def matrix_state(columns=VALUE, positive=False):
    """A random matrix state."""

    def build(rng, batch):
        state = rng.standard_normal((batch, HEADS, WIDTH, columns))
        return abs(state) if positive else state

    return build


def attention_arrays(rng, batch, length, write=False, decay=False):
    """Arguments of the ops with a cache: two query heads share one key head."""
    arrays = {
        "q": 2 * rng.standard_normal((batch, length, HEADS, WIDTH)),
        "k": unit(rng, batch, length, 1, WIDTH),
        "v": rng.standard_normal((batch, length, 1, VALUE)),
    }
    if write:
        arrays["w"] = unit(rng, batch, length, 1, WIDTH)
        arrays["alpha"] = rng.uniform(0.5, 1.5, (batch, length, 1))
        arrays["beta"] = rng.uniform(0.0, 1.0, (batch, length, 1))
    if decay:
        arrays["decay"] = log_decay(rng, batch, length, 1 if write else HEADS)
    return arrays


def cache_state(kind, held=3, decay_heads=None):
    """A cache of a few tokens; one slot of the first row is not valid."""

    def build(rng, batch):
        k, values = unit(rng, batch, held, 1, WIDTH), rng.standard_normal((batch, held, 1, VALUE))
        valid = np.ones((batch, held), bool)
        valid[0, 1] = False
        decays = ()
        if decay_heads is not None:
            shape = (batch, held, decay_heads)
            whole = -np.arange(held, dtype=np.int32)[None, :, None]
            decays = (np.broadcast_to(whole, shape), rng.uniform(-0.5, 0.0, shape))
        return kind(k, values, valid, np.int32(held), False, *decays)

    return build


def observe_cache(cache):
    """Sums over the valid slots, which do not depend on the order of slots."""
    values = cache.v if isinstance(cache, KVCache) else cache.u
    seen = cache.valid[:, :, None, None]
    k, values = (jnp.where(seen, x, jnp.zeros((), x.dtype)) for x in (cache.k, values))
    k, values = (
        k.astype("float32" if k.dtype == jnp.bfloat16 else k.dtype),
        values.astype("float32" if values.dtype == jnp.bfloat16 else values.dtype),
    )
    return {
        "k": jnp.sum(k, axis=1),
        "values": jnp.sum(values, axis=1),
        "pairs": jnp.einsum("bsgk,bsgv->bgkv", k.astype(values.dtype), values),
    }


def _attention(name, decay=False, **options):
    arrays = functools.partial(attention_arrays, decay=decay)
    state = cache_state(KVCache, decay_heads=HEADS if decay else None)
    return Spec(name, mf.softmax_attention, arrays, state, "softmax_attention", options, observe_cache)


def _deltaformer(name, decay=False, **options):
    arrays = functools.partial(attention_arrays, write=True, decay=decay)
    state = cache_state(DeltaCache, decay_heads=1 if decay else None)
    return Spec(name, mf.deltaformer, arrays, state, "deltaformer", options, observe_cache)


def _delta_rule(name, **kind):
    return Spec(name, mf.delta_rule, recurrent_arrays(**kind), matrix_state(), "delta_rule")


def _linear(name, **kind):
    return Spec(name, mf.linear_attention, recurrent_arrays(beta=False, **kind), matrix_state(), "linear_attention")


def _product(name, **kind):
    return Spec(name, mf.delta_product, recurrent_arrays(steps=2, **kind), matrix_state(), "delta_product")


def _log_linear(name, levels, groups):
    """Fewer levels than the length needs, or more; the state may hold anything on any level."""

    def arrays(rng, batch, length):
        arrays = recurrent_arrays(decay="head", beta=False, groups=groups)(rng, batch, length)
        return arrays | {"level_weights": rng.uniform(0.0, 2.0, (batch, length, HEADS, levels))}

    def state(rng, batch):
        held = rng.standard_normal((batch, HEADS, levels, WIDTH, VALUE))
        return mf.LogLinearState(held, np.arange(5, 5 + batch, dtype=np.int32))

    observe = lambda state: state.levels  # noqa: E731
    return Spec(name, mf.log_linear_attention, arrays, state, "log_linear_attention", observe=observe)


def _mesa(name, groups):
    def arrays(rng, batch, length):
        arrays = recurrent_arrays(decay="head", groups=groups)(rng, batch, length)
        return arrays | {"ridge": rng.uniform(0.5, 1.5, (batch, length, HEADS, WIDTH))}

    def state(rng, batch):
        rows = rng.standard_normal((batch, HEADS, WIDTH, WIDTH))
        return mf.MesaState(rows @ rows.swapaxes(-1, -2) / WIDTH, matrix_state()(rng, batch))

    return Spec(name, mf.mesa, arrays, state, "mesa", observe=lambda state: state._asdict())


SPECS = (
    _delta_rule("delta_rule"),
    _delta_rule("delta_rule_head_decay", decay="head"),
    _delta_rule("delta_rule_channel_decay", decay="channel"),
    _delta_rule("delta_rule_grouped", decay="head", groups=1),
    _delta_rule("delta_rule_erase", decay="head", groups=1, erase=True),
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
    _product("delta_product_channel_decay_erase", decay="channel", erase=True),
    _log_linear("log_linear_attention", levels=5, groups=1),
    _mesa("mesa", groups=1),
    _attention("softmax_attention"),
    _attention("softmax_attention_decay", decay=True, window=25),
    _deltaformer("deltaformer_linear_softmax", write_kernel="linear"),
    _deltaformer("deltaformer_decay", decay=True, write_kernel="linear", window=25),
)
