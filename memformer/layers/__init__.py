"""Flax NNX layers: memories with their projections and gates, feedforward layers, norms and positions."""

from memformer.layers.additive import AdditiveAttention
from memformer.layers.base import GATES, MemoryLayer, State
from memformer.layers.basic import (
    NORMS,
    Dtypes,
    Embedding,
    GroupRMSNorm,
    LayerNorm,
    RMSNorm,
    check_rate,
    constrain,
    dropout,
    linear,
    named,
    stochastic_keys,
)
from memformer.layers.cached import DeltaFormer, SoftmaxAttention
from memformer.layers.config import BaseConfig
from memformer.layers.convolution import ShortConvolution
from memformer.layers.feedforward import FEEDFORWARDS, MLP, MixtureOfExperts, SwiGLU, feedforward_keys
from memformer.layers.gates import DECAYS, FixedDecay, LogSigmoidDecay, SigmoidGate, StepDecay
from memformer.layers.matrix import DeltaProduct, DeltaRule, LinearAttention
from memformer.layers.memory import MEMORIES, MemorySpec, build_memory, check_memory, known_options
from memformer.layers.positions import (
    LearnedPositions,
    SinusoidalPositions,
    check_rotary,
    count_positions,
    next_position,
    rotate,
    sinusoid,
)
from memformer.layers.recurrent import (
    CELLS,
    GRU,
    LSTM,
    RNN,
    GRUMemory,
    LSTMMemory,
    RecurrentLayer,
    RecurrentMemory,
    RecurrentStack,
    RNNMemory,
)
from memformer.layers.sharding import RULES, auto_axes, on_auto_mesh, partition_spec, state_letters
from memformer.layers.stack import TransformerShape, build_stack, layer_of, run_stack
from memformer.layers.table import memories_table
from memformer.layers.transformer import CrossAttention, DecoderBlock, EncoderBlock, SelfAttention, visible_memory

__all__ = [
    "AdditiveAttention",
    "BaseConfig",
    "CELLS",
    "CrossAttention",
    "DECAYS",
    "DecoderBlock",
    "DeltaFormer",
    "DeltaProduct",
    "DeltaRule",
    "Dtypes",
    "Embedding",
    "EncoderBlock",
    "FEEDFORWARDS",
    "FixedDecay",
    "GATES",
    "GRU",
    "GRUMemory",
    "GroupRMSNorm",
    "LSTM",
    "LSTMMemory",
    "LayerNorm",
    "LearnedPositions",
    "LinearAttention",
    "LogSigmoidDecay",
    "MEMORIES",
    "MLP",
    "MemoryLayer",
    "MemorySpec",
    "MixtureOfExperts",
    "NORMS",
    "RMSNorm",
    "RNN",
    "RNNMemory",
    "RULES",
    "RecurrentLayer",
    "RecurrentMemory",
    "RecurrentStack",
    "SelfAttention",
    "ShortConvolution",
    "SigmoidGate",
    "SinusoidalPositions",
    "SoftmaxAttention",
    "State",
    "StepDecay",
    "SwiGLU",
    "TransformerShape",
    "auto_axes",
    "build_memory",
    "build_stack",
    "check_memory",
    "check_rate",
    "check_rotary",
    "constrain",
    "count_positions",
    "dropout",
    "feedforward_keys",
    "known_options",
    "layer_of",
    "linear",
    "memories_table",
    "named",
    "next_position",
    "on_auto_mesh",
    "partition_spec",
    "rotate",
    "run_stack",
    "sinusoid",
    "state_letters",
    "stochastic_keys",
    "visible_memory",
]
