"""The table of memories: a layer, its options, and the choices that define it (similarity, update rule, state).

To add a memory, add an op file, a row here and a row in the shared test suite.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memformer.layers.base import MemoryLayer
from memformer.layers.cached import DeltaFormer, SoftmaxAttention
from memformer.layers.erasing import HGRN2, RWKV7, Comba, GatedErase, GatedSlots
from memformer.layers.mamba3 import Mamba3
from memformer.layers.matrix import DeltaProduct, DeltaRule, LinearAttention, LogLinearAttention, Mesa
from memformer.layers.recurrent import GRUMemory, LSTMMemory, RecurrentMemory, RNNMemory

__all__ = ["MEMORIES", "MemorySpec", "memories_table"]


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """A row of `MEMORIES`: a choice of the arguments of one algebra of memories (docs/memories.md).

    Attributes:
      layer: the layer class.
      options: options of the layer that make it this memory; a caller may override them.
      similarity: how a key matches a query.
      write: what a token adds at its key.
      erase: what it removes first, and where.
      forget: the decay of the state.
      state: what is stored.
      equation: of the write and the read.
      call: of the op, in Python.
      source: reference.
    """

    layer: type[MemoryLayer] | type[RecurrentMemory]
    options: Mapping[str, Any]
    similarity: str
    write: str
    erase: str
    forget: str
    state: str
    equation: str
    call: str
    source: str


_CACHE, _MATRIX = "cache of (k, v)", "K x V matrix per head"
# Of Mamba-2, and of its form with a matrix per level.
_MAMBA: dict[str, Any] = {
    "decay": "step",
    "discretize": True,
    "skip": True,
    "key_heads": 1,
    "conv_width": 4,
    "output_norm": True,
    "output_gate": "silu",
}
_UNIT = {"unit_keys": True, "unit_queries": True, "output_norm": True}

MEMORIES: dict[str, MemorySpec] = {
    "softmax_attention": MemorySpec(
        SoftmaxAttention,
        {"rotary": True},
        "softmax",
        "alpha = 1",
        "none",
        "none",
        _CACHE,
        "o_t = sum_{i<=t} softmax(k_i . q_t) v_i",
        "softmax_attention(q, k, v)",
        "arXiv 1706.03762",
    ),
    "fox": MemorySpec(
        SoftmaxAttention,
        {"decay": "forget"},
        "softmax",
        "alpha = 1",
        "none",
        "per head",
        _CACHE,
        "o_t = sum_{i<=t} softmax(k_i . q_t + g_{i+1} + ... + g_t) v_i",
        "softmax_attention(q, k, v, decay=g)",
        "arXiv 2503.02130",
    ),
    "linear_attention": MemorySpec(
        LinearAttention,
        {"feature_map": "elu", "normalize": True},
        "linear on elu + 1",
        "alpha = 1",
        "none",
        "none",
        "K x (V + 1) matrix per head",
        "S_t = S_{t-1} + k_t v_t^T; z_t = z_{t-1} + k_t; o_t = S_t^T q_t / (z_t . q_t)",
        "linear_attention(q, k, v, normalize=True)",
        "arXiv 2006.16236",
    ),
    "based": MemorySpec(
        LinearAttention,
        {"feature_map": "taylor", "normalize": True},
        "1 + s + s^2 / 2",
        "alpha = 1",
        "none",
        "none",
        "(1 + K + K^2) x (V + 1) matrix per head",
        "o_t = sum_{i<=t} (1 + s_ti + s_ti^2 / 2) v_i / sum_{i<=t} (1 + s_ti + s_ti^2 / 2); s_ti = q_t . k_i / sqrt(K)",
        "linear_attention(phi(q), phi(k), v, normalize=True)",
        "arXiv 2402.18668",
    ),
    "retnet": MemorySpec(
        LinearAttention,
        {"decay": "fixed", "rotary": True, "output_norm": True, "output_gate": "silu"},
        "linear",
        "alpha = 1",
        "none",
        "constant per head",
        _MATRIX,
        "S_t = exp(g_h) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t",
        "linear_attention(q, k, v, decay=g)",
        "arXiv 2307.08621",
    ),
    "gla": MemorySpec(
        LinearAttention,
        {"decay": "log_sigmoid", "decay_rank": 16, "output_norm": True, "output_gate": "silu"},
        "linear",
        "alpha = 1",
        "none",
        "per channel",
        _MATRIX,
        "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t",
        "linear_attention(q, k, v, decay=g)",
        "arXiv 2312.06635",
    ),
    "hgrn2": MemorySpec(
        HGRN2,
        {"output_norm": True},
        "linear",
        "alpha = 1, k = 1 - exp(g)",
        "none",
        "per channel",
        _MATRIX,
        "S_t = diag(exp(g_t)) S_{t-1} + (1 - exp(g_t)) v_t^T; o_t = S_t^T q_t",
        "linear_attention(q, 1 - exp(g), v, decay=g)",
        "arXiv 2404.07904",
    ),
    "gsa": MemorySpec(
        GatedSlots,
        {"output_norm": True},
        "linear, then softmax over slots",
        "1 - f per slot",
        "none",
        "per slot",
        "two matrices M x K and M x V per head",
        "A_t = diag(f_t) A_{t-1} + (1 - f_t) k_t^T; B_t = diag(f_t) B_{t-1} + (1 - f_t) v_t^T; "
        "o_t = B_t^T softmax(A_t q_t)",
        "linear_attention(softmax(linear_attention(q, k, 1 - f, decay=log(f))), 1 - f, v, decay=log(f))",
        "arXiv 2409.07146",
    ),
    "ssd": MemorySpec(
        LinearAttention,
        {**_MAMBA},
        "linear",
        "alpha = d_t (in v)",
        "none",
        "per head",
        _MATRIX,
        "S_t = exp(-a d_t) S_{t-1} + k_t (d_t v_t)^T; o_t = S_t^T q_t + D v_t",
        "linear_attention(q, k, d * v, decay=-a * d)",
        "arXiv 2405.21060",
    ),
    "mamba3": MemorySpec(
        Mamba3,
        {"key_heads": 1, "qk_norm": "head", "norm_epsilon": 1e-5, "output_gate": "silu"},
        "linear on keys that turn",
        "alpha = c_t, and b_t for the token before",
        "none",
        "per head",
        "K x V matrix per head, last (k, v), angles",
        "S_t = exp(g_t) (S_{t-1} + b_t k_{t-1} v_{t-1}^T) + c_t k_t v_t^T; o_t = S_t^T q_t + D v_t; "
        "b_t = (1 - l_t) d_t; c_t = l_t d_t; q and k turn by angles that add up",
        "exp(g) * linear_attention(q, k', (b + c') * v', decay=g') + c * (q . k) * v, ' of the token before",
        "arXiv 2603.15569",
    ),
    "log_linear_attention": MemorySpec(
        LogLinearAttention,
        {**_MAMBA},
        "linear, weighted by level",
        "alpha = d_t (in v)",
        "none",
        "per head",
        "L matrices K x V per head",
        "o_t = sum_{i<=t} lambda_t[bits of t xor i] exp(G_t - G_i) (q_t . k_i) d_i v_i + D v_t",
        "log_linear_attention(q, k, d * v, level_weights, decay=-a * d)",
        "arXiv 2506.04761",
    ),
    "mesa": MemorySpec(
        Mesa,
        {"decay": "step", "unit_keys": True, "unit_queries": True, "conv_width": 4, "output_norm": True},
        "the inverse of all keys' sum",
        "alpha = beta",
        "none",
        "per head",
        "two matrices K x K and K x V per head",
        "G_t = exp(g_t) G_{t-1} + beta_t k_t k_t^T; S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T; "
        "o_t = S_t^T (G_t + diag(r))^-1 q_t",
        "mesa(q, k, v, beta, r, decay=g)",
        "arXiv 2506.05233",
    ),
    "delta_rule": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4},
        "linear on unit keys",
        "alpha = beta",
        "w = k",
        "none",
        _MATRIX,
        "S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T; o_t = S_t^T q_t",
        "delta_rule(q, k, v, beta)",
        "arXiv 2406.06484",
    ),
    "gated_delta_rule": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4, "decay": "step", "output_gate": "silu"},
        "linear on unit keys",
        "alpha = beta",
        "w = k",
        "per head",
        _MATRIX,
        "S' = exp(g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = S_t^T q_t",
        "delta_rule(q, k, v, beta, decay=g)",
        "arXiv 2412.06464",
    ),
    "comba": MemorySpec(
        Comba,
        {**_UNIT, "conv_width": 4, "decay": "step", "output_gate": "silu"},
        "linear on unit keys",
        "alpha = beta",
        "w = d k",
        "per head",
        _MATRIX,
        "S' = exp(g_t) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T w_t)^T; w_t = d k_t; o_t = S_t^T (q_t - c w_t)",
        "delta_rule(q - c * w, k, v, beta, w=w, decay=g)",
        "arXiv 2506.02475",
    ),
    "kda": MemorySpec(
        DeltaRule,
        {**_UNIT, "conv_width": 4, "decay": "step", "decay_rank": 16, "output_gate": "sigmoid"},
        "linear on unit keys",
        "alpha = beta",
        "w = k",
        "per channel",
        _MATRIX,
        "S' = diag(exp(g_t)) S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = S_t^T q_t",
        "delta_rule(q, k, v, beta, decay=g)",
        "arXiv 2510.26692",
    ),
    "gdn2": MemorySpec(
        GatedErase,
        {**_UNIT, "conv_width": 4, "output_gate": "sigmoid"},
        "linear on unit keys",
        "a_t * v_t",
        "w = b * k, beta = 1",
        "per channel",
        _MATRIX,
        "S' = diag(exp(g_t)) S_{t-1}; S_t = S' + k_t (a_t * v_t - S'^T (b_t * k_t))^T; o_t = S_t^T q_t",
        "delta_rule(q, k, a * v, ones, w=b * k, decay=g)",
        "Gated DeltaNet-2 (fla.ops.gdn2)",
    ),
    "rwkv7": MemorySpec(
        RWKV7,
        {"conv_width": 2, "output_norm": True, "output_gate": "sigmoid"},
        "linear",
        "alpha = 1",
        "w = n exp(-g), at key a * n",
        "per channel",
        _MATRIX,
        "S_t = (diag(exp(g_t)) - (a_t * n_t) n_t^T) S_{t-1} + k_t v_t^T; n_t = k_t / |k_t|; o_t = S_t^T q_t",
        "delta_product(q, [a * n, k], [0, v], ones, w=[n * exp(-g), 0], decay=g)",
        "arXiv 2503.14456",
    ),
    "delta_product": MemorySpec(
        DeltaProduct,
        {**_UNIT, "conv_width": 4, "steps": 2, "beta_limit": 2.0},
        "linear on unit keys",
        "alpha = beta, N per token",
        "w = k",
        "none",
        _MATRIX,
        "for j = 1..N: S <- S + beta_tj k_tj (v_tj - S^T k_tj)^T; o_t = S^T q_t",
        "delta_product(q, k, v, beta)",
        "arXiv 2502.10297",
    ),
    "deltaformer": MemorySpec(
        DeltaFormer,
        {"write_kernel": "linear", "read_kernel": "softmax", "unit_keys": True, "beta_limit": 2.0},
        "any, separate for writes (default linear) and reads (default softmax)",
        "alpha",
        "w, beta",
        "none",
        "cache of (k, u)",
        "u_t = alpha_t v_t - beta_t sum_{i<t} kappa1(k_i, w_t) u_i; o_t = sum_{i<=t} kappa2(k_i, q_t) u_i",
        "deltaformer(q, k, v, w=w, alpha=alpha, beta=beta, write_kernel=kappa1, read_kernel=kappa2)",
        "DeltaFormer, NeurIPS 2025; arXiv 2505.19488",
    ),
    "gated_deltaformer": MemorySpec(
        DeltaFormer,
        {
            "write_kernel": "linear",
            "read_kernel": "softmax",
            "unit_keys": True,
            "beta_limit": 2.0,
            "decay": "forget",
        },
        "as deltaformer",
        "alpha",
        "w, beta",
        "per key head",
        "cache of (k, u)",
        "u_t = alpha_t v_t - beta_t sum_{i<t} exp(G_t - G_i) k_i . w_t u_i; "
        "o_t = sum_{i<=t} softmax(k_i . q_t + G_t - G_i) u_i",
        'deltaformer(q, k, v, w=w, alpha=alpha, beta=beta, decay=g, write_kernel="linear")',
        "this library",
    ),
    "rnn": MemorySpec(
        RNNMemory,
        {},
        "none (reads the whole state)",
        "replaces",
        "everything",
        "state-dependent",
        "vector",
        "h_t = tanh(W x_t + U h_{t-1} + b); o_t = h_t",
        "rnn(x, w, u, b)",
        "Elman 1990",
    ),
    "lstm": MemorySpec(
        LSTMMemory,
        {},
        "none (reads the whole state through a gate)",
        "adds",
        "none",
        "per unit, state-dependent",
        "two vectors (h, c)",
        "c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(z_t); h_t = sigmoid(e_t) tanh(c_t); o_t = h_t",
        "lstm(x, w, u, b)",
        "Hochreiter and Schmidhuber 1997",
    ),
    "gru": MemorySpec(
        GRUMemory,
        {},
        "none (reads the whole state)",
        "alpha = beta per unit",
        "per unit, state-dependent",
        "none",
        "vector",
        "n_t = tanh(W x_t + r_t (U h_{t-1} + b)); h_t = h_{t-1} + (1 - z_t) (n_t - h_{t-1}); o_t = h_t",
        "gru(x, w, u, b)",
        "arXiv 1406.1078",
    ),
}

_HEADER = ("memory", "similarity", "write", "erase", "forget", "state", "call", "equation", "source")
_CODE = ("call", "equation")


def memories_table() -> str:
    """One row per entry of `MEMORIES`: its choices, the call of its op, equation and source.

    Example:
      >>> memories_table().splitlines()[0]
      '| memory | similarity | write | erase | forget | state | call | equation | source |'
    """
    rows = [_HEADER, ("---",) * len(_HEADER)]
    for name, row in MEMORIES.items():
        cells = ((column, getattr(row, column)) for column in _HEADER[1:])
        rows.append((f"`{name}`", *(f"`{cell}`" if column in _CODE else cell for column, cell in cells)))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"
