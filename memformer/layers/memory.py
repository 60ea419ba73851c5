"""The table of memories: a layer, its options, and the three choices that define it (similarity, update rule, state).

To add a memory, add an op file, a row here and a row in the shared test suite.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from memformer.core.checks import check_choice, check_options
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import Dtypes
from memformer.layers.cached import DeltaFormer, SoftmaxAttention
from memformer.layers.matrix import DeltaProduct, DeltaRule, LinearAttention
from memformer.layers.recurrent import GRUMemory, LSTMMemory, RecurrentMemory, RNNMemory

__all__ = ["MEMORIES", "MemorySpec", "build_memory", "check_memory", "known_options"]


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """A row of `MEMORIES`.

    Attributes:
      layer: the layer class.
      options: options of the layer that make it this memory; a caller may override them.
      similarity: how a key matches a query.
      update: how a write changes the state: add, decay, delta.
      state: what is stored.
      equation: of the write and the read.
      source: reference.
    """

    layer: type[MemoryLayer] | type[RecurrentMemory]
    options: Mapping[str, Any]
    similarity: str
    update: str
    state: str
    equation: str
    source: str


_MATRIX = "K x V matrix per head"
_UNIT = {"unit_keys": True, "unit_queries": True, "output_norm": True}

MEMORIES: dict[str, MemorySpec] = {
    "softmax_attention": MemorySpec(
        SoftmaxAttention,
        {"rotary": True},
        "softmax",
        "add",
        "cache of (k, v)",
        "o_t = sum_{i<=t} softmax(k_i . q_t) v_i",
        "arXiv 1706.03762",
    ),
    "linear_attention": MemorySpec(
        LinearAttention,
        {"feature_map": "elu", "normalize": True},
        "linear on elu + 1",
        "add",
        "K x (V + 1) matrix per head",
        "S_t = S_{t-1} + k_t v_t^T; z_t = z_{t-1} + k_t; o_t = S_t^T q_t / (z_t . q_t)",
        "arXiv 2006.16236",
    ),
    "retnet": MemorySpec(
        LinearAttention,
        {"decay": "fixed", "rotary": True, "output_norm": True, "output_gate": "silu"},
        "linear",
        "constant per-head decay, add",
        _MATRIX,
        "S_t = exp(g_h) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t",
        "arXiv 2307.08621",
    ),
    "gla": MemorySpec(
        LinearAttention,
        {"decay": "log_sigmoid", "decay_rank": 16, "output_norm": True, "output_gate": "silu"},
        "linear",
        "per-channel decay, add",
        _MATRIX,
        "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t",
        "arXiv 2312.06635",
    ),
    "ssd": MemorySpec(
        LinearAttention,
        {
            "decay": "step",
            "discretize": True,
            "skip": True,
            "key_heads": 1,
            "conv_width": 4,
            "output_norm": True,
            "output_gate": "silu",
        },
        "linear",
        "per-head decay, add",
        _MATRIX,
        "S_t = exp(-a d_t) S_{t-1} + k_t (d_t v_t)^T; o_t = S_t^T q_t + D v_t",
        "arXiv 2405.21060",
    ),
    "delta_rule": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4},
        "linear on unit keys",
        "delta",
        _MATRIX,
        "S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T; o_t = S_t^T q_t",
        "arXiv 2406.06484",
    ),
    "gated_delta_rule": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4, "decay": "step", "output_gate": "silu"},
        "linear on unit keys",
        "per-head decay, delta",
        _MATRIX,
        "S' = exp(g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = S_t^T q_t",
        "arXiv 2412.06464",
    ),
    "kda": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4, "decay": "step", "decay_rank": 16, "output_gate": "sigmoid"},
        "linear on unit keys",
        "per-channel decay, delta",
        _MATRIX,
        "S' = diag(exp(g_t)) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = S_t^T q_t",
        "arXiv 2510.26692",
    ),
    "delta_product": MemorySpec(
        DeltaProduct,
        {**_UNIT, "conv_width": 4, "steps": 2, "beta_limit": 2.0},
        "linear on unit keys",
        "delta, N steps per token",
        _MATRIX,
        "for j = 1..N: S <- S + beta_tj k_tj (v_tj - S^T k_tj)^T; o_t = S^T q_t",
        "arXiv 2502.10297",
    ),
    "deltaformer": MemorySpec(
        DeltaFormer,
        {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "any, separate for writes (default linear) and reads (default softmax)",
        "delta",
        "cache of (k, u)",
        "u_t = alpha_t v_t - beta_t sum_{i<t} kappa1(k_i, w_t) u_i; o_t = sum_{i<=t} kappa2(k_i, q_t) u_i",
        "DeltaFormer, NeurIPS 2025; arXiv 2505.19488",
    ),
    "rnn": MemorySpec(
        RNNMemory,
        {},
        "none (reads the whole state)",
        "replace",
        "vector",
        "h_t = tanh(W x_t + U h_{t-1} + b); o_t = h_t",
        "Elman 1990",
    ),
    "lstm": MemorySpec(
        LSTMMemory,
        {},
        "none (reads the whole state through a gate)",
        "per-unit decay that depends on the state, add",
        "two vectors (h, c)",
        "c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(z_t); h_t = sigmoid(e_t) tanh(c_t); o_t = h_t",
        "Hochreiter and Schmidhuber 1997",
    ),
    "gru": MemorySpec(
        GRUMemory,
        {},
        "none (reads the whole state)",
        "per-unit delta that depends on the state",
        "vector",
        "n_t = tanh(W x_t + r_t (U h_{t-1} + b)); h_t = h_{t-1} + (1 - z_t) (n_t - h_{t-1}); o_t = h_t",
        "arXiv 1406.1078",
    ),
}

_FIXED = ("self", "width", "dtypes", "rngs", "head_counts", "writes", "options")


def known_options(name: str) -> tuple[str, ...]:
    """The options of a memory, by name of the memory.

    Raises:
      ValueError: an unknown memory.

    Example:
      >>> "window" in known_options("softmax_attention")
      True
    """
    check_memory(name)
    layer = MEMORIES[name].layer
    names = [*inspect.signature(layer.__init__).parameters]
    if issubclass(layer, MemoryLayer):
        names += inspect.signature(MemoryLayer.__init__).parameters
    return tuple(dict.fromkeys(n for n in names if n not in _FIXED))


def check_memory(name: str) -> None:
    """Raises ValueError unless `name` is a key of `MEMORIES`."""
    check_choice("memory", name, tuple(MEMORIES))


def build_memory(
    name: str,
    width: int,
    *,
    heads: int,
    key_width: int | None = None,
    value_width: int | None = None,
    options: Mapping[str, Any] | None = None,
    dtypes: Dtypes | None = None,
    rngs: nnx.Rngs,
) -> MemoryLayer | RecurrentMemory:
    """Builds the layer of a memory.

    Args:
      name: a key of `MEMORIES`.
      width: D.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      options: override those of the table, and heads, key_width and value_width (so that the memories of a pattern may
        have sizes of their own); `known_options(name)` lists them.
      dtypes: the dtype policy.
      rngs: random streams.

    Raises:
      ValueError: an unknown memory or option, or a size that does not fit.

    Example:
      >>> layer = build_memory("delta_rule", 16, heads=2, rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((1, 5, 16)))
      >>> y.shape, state["memory"].shape
      ((1, 5, 16), (1, 2, 8, 8))
    """
    options = {} if options is None else options
    check_options(f"memory_options of {name!r}", options, known_options(name))
    row = MEMORIES[name]
    sizes: dict[str, Any] = {"heads": heads, "key_width": key_width, "value_width": value_width}
    return row.layer(width, dtypes=dtypes, rngs=rngs, **{**sizes, **row.options, **options})
