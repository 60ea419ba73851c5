"""memformer: associative memories as sequence models, in JAX.

The ops are pure functions that return `(output, state)`; `memformer.ops` documents the contract they share. Layers
are in `memformer.layers`, models in `memformer.models`.
"""

import importlib
from typing import Any

from memformer.core.numerics import l2norm
from memformer.core.similarity import Kernel
from memformer.ops.attention.cache import DeltaCache, KVCache, init_cache
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.log_linear_attention import LogLinearState, log_linear_attention
from memformer.ops.mesa import MesaState, mesa
from memformer.ops.recurrent_cells import LSTMState, gru, lstm, rnn
from memformer.ops.softmax_attention import softmax_attention

__all__ = [
    "DeltaCache",
    "KVCache",
    "Kernel",
    "LSTMState",
    "LogLinearState",
    "MesaState",
    "delta_product",
    "delta_rule",
    "deltaformer",
    "generate_text",
    "gru",
    "init_cache",
    "l2norm",
    "linear_attention",
    "log_linear_attention",
    "lstm",
    "mesa",
    "rnn",
    "softmax_attention",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded at its first use, because it needs models, and they Flax: the ops need neither.
    if name == "generate_text":
        return importlib.import_module("memformer.models.generate_text").generate_text
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
