"""The encoder-decoder Transformer."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array
from memformer.core.types import Array, Float, Int
from memformer.layers.base import State
from memformer.layers.basic import Embedding
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape
from memformer.models.language_model import ModelOutput
from memformer.models.stacks import TransformerDecoder, TransformerEncoder

__all__ = ["Transformer", "TransformerConfig"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig(TransformerShape):
    """Config of an encoder-decoder Transformer: `TransformerShape` and three fields.

    Attributes:
      encoder_depth: number of encoder blocks.
      decoder_depth: number of decoder blocks.
      tie_embeddings: source, target and read-out share one table (a joint vocabulary); False gives three tables.

    Example:
      >>> TransformerConfig(width=64, encoder_depth=3).decoder_depth
      2
    """

    encoder_depth: int = 2
    decoder_depth: int = 2
    tie_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("encoder_depth", "decoder_depth")


class Transformer(nnx.Module):
    """An encoder-decoder Transformer.

        memory = encoder(E source + positions)
        logits_t = E decoder(E inputs_{<= t} + positions, memory)

    Args:
      config: config of the model.
      vocab_size: number of source and input ids.
      num_classes: number of logits; None is vocab_size.
      features: must be 0: source and inputs are ids.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Source: arXiv 1706.03762. As in later versions of tensor2tensor, the norm may precede a sublayer, and dropout
    applies to the embedding and to the output of each sublayer, not to attention weights.

    Example:
      >>> model = Transformer(TransformerConfig(width=8, heads=2), vocab_size=7, rngs=nnx.Rngs(0))
      >>> source, inputs = jnp.array([[4, 5, 6, 0]]), jnp.array([[1, 2, 3]])
      >>> model(inputs, source=source, source_segment_ids=jnp.array([[1, 1, 1, 0]])).logits.shape
      (1, 3, 7)
      >>> state = model.start(source, jnp.array([[1, 1, 1, 0]]), capacity=3)
      >>> output = model(inputs[:, :1], state=state)
      >>> model(inputs[:, 1:2], state=output.state).logits.shape
      (1, 1, 7)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        if features:
            raise ValueError(f"features must be 0 (source and inputs of a transformer are ids), got {features}")
        self.config, self.features = config, 0
        self.decoder = TransformerDecoder(
            config,
            config.decoder_depth,
            vocab_size=vocab_size,
            num_classes=num_classes,
            tie_embeddings=config.tie_embeddings,
            rngs=rngs,
        )
        self.vocab_size, self.num_classes = vocab_size, self.decoder.num_classes
        self.encoder = TransformerEncoder(config, config.encoder_depth, rngs=rngs)
        self.source_embedding: Any = nnx.data(None)
        if not config.tie_embeddings:
            self.source_embedding = Embedding(vocab_size, config.width, dtypes=config.dtypes, rngs=rngs)
        # Set by model.train() and model.eval().
        self.deterministic = True

    @auto_axes
    def encode(
        self, source: Int[Array, "B S"], source_segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """The output of the encoder, which is the memory of the decoder.

        Raises:
          ValueError: an array of wrong shape or dtype, or more tokens than learned positions.
        """
        source = check_array("source", source, "B S", {}, kind=jnp.integer)
        embedding = self.decoder.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(embedding(source), segment_ids=source_segment_ids)

    @auto_axes
    def start(
        self,
        source: Int[Array, "B S"],
        source_segment_ids: Int[Array, "B S"] | None = None,
        capacity: int | None = None,
    ) -> State:
        """The state before the first token of the target, with keys and values of the encoded source.

        Args:
          source: ids.
          source_segment_ids: 0 = padding; None for no padding.
          capacity: number of target tokens that the caches have room for; with None they grow with each call.

        Raises:
          ValueError: an array of wrong shape or dtype, or a capacity above the learned positions.
        """
        return self.decoder.start(self.encode(source, source_segment_ids), source_segment_ids, capacity=capacity)

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> ModelOutput:
        """Logits of the id after each input; a call with the returned state continues the targets.

        Args:
          inputs: the target so far, beginning with its start token.
          source: for the first call (state None); later calls have it in their state.
          source_segment_ids: 0 = padding. Packed pairs have the same id in source and target.
          segment_ids: of the inputs, 0 = padding.
          positions: of the inputs; None counts within each segment, continuing from the state.
          state: from the previous call or from `start`.

        Raises:
          ValueError: both or neither of source and state, an array of wrong shape or dtype, or more tokens than
            learned positions.
        """
        memory = None if source is None else self.encode(source, source_segment_ids)
        return self.decoder(
            inputs,
            memory=memory,
            memory_segment_ids=source_segment_ids,
            segment_ids=segment_ids,
            positions=positions,
            state=state,
        )

    @auto_axes
    def alignments(
        self,
        inputs: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"],
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B L H T S"]:
        """Cross-attention weights over the source, [layer, head, position, source] in float32.

        Row t belongs to the prediction of the id after inputs[t].
        """
        return self.decoder.alignments(
            inputs,
            memory=self.encode(source, source_segment_ids),
            memory_segment_ids=source_segment_ids,
            segment_ids=segment_ids,
        )
