"""memformer: associative memories as sequence models, in JAX."""

from memformer.core.numerics import l2norm
from memformer.core.similarity import Kernel
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.softmax_attention import softmax_attention

__all__ = [
    "Kernel",
    "delta_product",
    "delta_rule",
    "deltaformer",
    "l2norm",
    "linear_attention",
    "softmax_attention",
]

__version__ = "0.1.0"
