"""The plain recurrent model: a stack of RNN, LSTM or GRU layers between an embedding and a read-out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.basic import Embedding, constrain, dropout, linear
from memformer.layers.config import BaseConfig
from memformer.layers.recurrent import CELLS, recurrent_stack
from memformer.models.config import check_input
from memformer.models.language_model import ModelOutput

__all__ = ["RecurrentConfig", "RecurrentLM"]


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(BaseConfig):
    """The shape of a RecurrentLM.

    Attributes:
      cell: "rnn", "lstm" or "gru".
      width: units a layer and direction, and entries of a token's vector.
      depth: layers.
      bidirectional: both directions, for tagging whole sequences.
      dropout: rate on what each layer and the read-out read; active after `model.train()`.

    Raises:
      ValueError: names the key, what was expected and what came.

    Example:
      >>> RecurrentConfig(cell="gru", width=64).depth
      1
    """

    cell: str = "lstm"
    width: int = 256
    depth: int = 1
    bidirectional: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("cell", self.cell, tuple(CELLS))
        self.check_sizes("width", "depth")


class RecurrentLM(nnx.Module):
    """Ids or feature vectors in, a stack of recurrent layers, logits at each position out.

    Nothing else: no norm, no residual path, no feedforward layer; features enter the first layer as they are.
    `memory_lm` with memory "rnn", "lstm" or "gru" has all of these.

    Args:
      config: the shape.
      vocab_size: of the input ids; 0 where inputs are feature vectors.
      num_classes: of the logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams; "params", and "dropout" where there is dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Example:
      >>> model = RecurrentLM(RecurrentConfig(width=8), vocab_size=0, num_classes=4, features=3, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 5, 3))).logits.shape
      (2, 5, 4)
    """

    def __init__(
        self,
        config: RecurrentConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        check_input(vocab_size, features)
        check_size("num_classes", num_classes)
        self.config, self.vocab_size, self.num_classes, self.features = config, vocab_size, num_classes, features
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        self.embedding: Any = nnx.data(None) if features else Embedding(vocab_size, config.width, **same)
        self.stack = recurrent_stack(
            config.cell,
            features or config.width,
            config.width,
            config.depth,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
            **same,
        )
        self.head = linear(self.stack.out_features, num_classes, (None, "vocab"), bias=True, wide=True, **same)
        # Set by model.train() and model.eval().
        self.deterministic = True
        self.dropout_stream: Any = rngs.dropout.fork() if config.dropout else nnx.data(None)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> tuple:
        """The state before the first token; its size does not depend on capacity, nor its dtype on dtype.

        Raises:
          ValueError: a batch or capacity that is no positive integer, or a model of both directions.
        """
        check_size("capacity", capacity)
        return self.stack.init_state(batch)

    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: tuple | None = None,
    ) -> ModelOutput:
        """Logits at each position; a call with the returned state continues the sequences.

        Args:
          inputs: ids, or float features.
          segment_ids: 0 = padding; the rule of `memformer.core.segments`.
          positions: not read: a recurrent layer knows the order.
          state: of the last call, or of `init_state`; None is the beginning.

        Raises:
          ValueError: an array of another shape or dtype, or a state where both directions are read.
        """
        dims: Dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        first, rest = self._keys()
        x = inputs.astype(self.config.dtypes.compute) if self.features else self.embedding(inputs)
        x, state = self.stack(x, segment_ids=segment_ids, state=state, key=first)
        x = constrain(dropout(x, self.config.dropout, rest), "activation_batch", "activation_time", None)
        logits = self.head(x)
        return ModelOutput(constrain(logits, "activation_batch", "activation_time", "activation_vocab"), state, {})

    def _keys(self) -> tuple[Array | None, Array | None]:
        """Keys for the stack and for the read-out, or None where nothing is dropped."""
        if self.deterministic or not self.config.dropout:
            return None, None
        first, rest = jax.random.split(self.dropout_stream(), 2)
        return first, rest
