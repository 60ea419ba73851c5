"""RecurrentLM: a stack of RNN, LSTM or GRU layers between an embedding and a read-out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.basic import Embedding, constrain, dropout, linear
from memformer.layers.config import BaseConfig
from memformer.layers.recurrent import CELLS, RecurrentStack
from memformer.layers.sharding import auto_axes
from memformer.models.config import check_input
from memformer.models.language_model import ModelOutput, take_places

__all__ = ["RecurrentConfig", "RecurrentLM"]


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(BaseConfig):
    """Config of a RecurrentLM.

    Attributes:
      cell: "rnn", "lstm" or "gru".
      width: units per layer and direction, and width of the embedding.
      depth: layers.
      bidirectional: reads in both directions, for tagging whole sequences.
      dropout: rate on the inputs of the layers and of the read-out; active after `model.train()`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

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
    """A sequence model of recurrent layers only: ids or feature vectors in, logits at each position out.

    It has no norms, residual connections or feedforward layers, and features enter the first layer without a
    projection. `memory_lm` with memory "rnn", "lstm" or "gru" has all of these.

    Args:
      config: config of the model.
      vocab_size: number of input ids; 0 where inputs are feature vectors.
      num_classes: number of logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams: "params", and "dropout" if the config has dropout.

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
        self.stack = RecurrentStack(
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
        """The state before the first token; capacity and dtype, which size a cache, have no effect.

        Raises:
          ValueError: a batch or capacity that is not a positive integer, or a bidirectional model.
        """
        check_size("capacity", capacity)
        return self.stack.init_state(batch)

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: tuple | None = None,
        read_at: Int[Array, "B"] | None = None,
    ) -> ModelOutput:
        """Logits at each position; a call with the returned state continues the sequences.

        Args:
          inputs: ids, or float features.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: ignored: recurrence implies the order.
          state: from the previous call or from `init_state`; None starts a sequence.
          read_at: the place in each row whose logits are wanted; they are then [B, 1, classes].

        Raises:
          ValueError: an array of wrong shape or dtype, or a state for a bidirectional model.
        """
        dims: Dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        first, rest = self._keys()
        x = inputs.astype(self.config.dtypes.compute) if self.features else self.embedding(inputs)
        x, state = self.stack(x, segment_ids=segment_ids, state=state, key=first)
        x = constrain(dropout(x, self.config.dropout, rest), "activation_batch", "activation_time", None)
        logits = self.head(take_places(x, read_at))
        return ModelOutput(constrain(logits, "activation_batch", "activation_time", "activation_vocab"), state, {})

    def _keys(self) -> tuple[Array | None, Array | None]:
        """Dropout keys of the stack and of the read-out; None without dropout."""
        if self.deterministic or not self.config.dropout:
            return None, None
        first, rest = jax.random.split(self.dropout_stream(), 2)
        return first, rest
