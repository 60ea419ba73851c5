"""Encoder: a bidirectional Transformer for tagging and for sentence embeddings."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_at_least, check_size
from memformer.core.numerics import accumulation_dtype, l2norm
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.basic import Embedding, constrain, linear, named
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape
from memformer.models.config import check_input
from memformer.models.language_model import ModelOutput
from memformer.models.stacks import TransformerEncoder

__all__ = ["Encoder", "EncoderConfig", "mean_pool"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerShape):
    """Config of an Encoder: `TransformerShape` with the defaults of BERT, and two fields.

    With norm_place "post" a layer norm follows the embedding, as in BERT; with "pre" one follows the last block.

    Attributes:
      depth: number of blocks.
      token_types: number of token type embeddings (BERT's first and second sentence); 0 for none.

    Example:
      >>> EncoderConfig(width=32, heads=2).norm_place
      'post'
    """

    activation: str = "gelu_exact"
    norm_place: str = "post"
    positions: str | None = "learned"
    depth: int = 2
    token_types: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_sizes("depth")
        check_at_least("token_types", self.token_types, 0)


def mean_pool(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
    """The mean over the valid tokens of each row, normalised to unit length, in float32.

        e = m / |m|;  m = sum_t [id_t != 0] x_t / sum_t [id_t != 0]

    Args:
      x: vectors, one sequence per row.
      segment_ids: 0 = padding; None for no padding. A row of padding alone gives 0.

    Raises:
      ValueError: an array of wrong shape or dtype.

    Source: Sentence-BERT, arXiv 1908.10084 section 3.

    Example:
      >>> x = jnp.array([[[3.0, 4.0], [9.0, 9.0]]])
      >>> mean_pool(x, jnp.array([[1, 0]]))
      Array([[0.6, 0.8]], dtype=float32)
    """
    dims: Dims = {}
    x = check_array("x", x, "B T D", dims)
    x = x.astype(accumulation_dtype(x))
    if segment_ids is None:
        return l2norm(jnp.mean(x, axis=1))
    segment_ids = check_array("segment_ids", segment_ids, "B T", dims, kind=jnp.integer)
    valid = (segment_ids != 0)[:, :, None]
    # Values at padding are unspecified and may be NaN, so they are replaced instead of multiplied by zero.
    total = jnp.sum(jnp.where(valid, x, jnp.zeros_like(x)), axis=1)
    return l2norm(total / jnp.maximum(jnp.sum(valid, axis=1), 1).astype(x.dtype))


class Encoder(nnx.Module):
    """A bidirectional Transformer: logits at each position, or one unit-length vector per sequence.

        x = norm(E ids + positions + types);  h = blocks(x);  logits = W h

    Args:
      config: config of the model.
      vocab_size: number of input ids; 0 where inputs are feature vectors.
      num_classes: number of logits; None is vocab_size, 0 omits the read-out.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Source: BERT, arXiv 1810.04805.

    Example:
      >>> model = Encoder(EncoderConfig(width=8, heads=2), vocab_size=7, num_classes=3, rngs=nnx.Rngs(0))
      >>> ids, segments = jnp.array([[4, 5, 6, 0]]), jnp.array([[1, 1, 1, 0]])
      >>> model(ids, segment_ids=segments).logits.shape
      (1, 4, 3)
      >>> model.embed(ids, segment_ids=segments).shape
      (1, 8)
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        check_input(vocab_size, features)
        self.config, self.vocab_size, self.num_classes, self.features = config, vocab_size, num_classes, features
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        self.embedding: Any
        if features:
            self.embedding = linear(features, config.width, (None, "embed"), bias=True, **same)
        else:
            self.embedding = Embedding(vocab_size, config.width, **same)
        self.types: Any = nnx.data(None)
        if config.token_types:
            init = named(nnx.initializers.normal(0.02), None, "embed")
            self.types = nnx.Param(init(rngs.params(), (config.token_types, config.width), config.dtypes.param))
        self.encoder = TransformerEncoder(config, config.depth, embedding_norm=config.norm_place == "post", rngs=rngs)
        self.head: Any = nnx.data(None)
        if num_classes:
            check_size("num_classes", num_classes)
            self.head = linear(config.width, num_classes, ("embed", "vocab"), bias=True, wide=True, **same)
        # Set by model.train() and model.eval().
        self.deterministic = True

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> ModelOutput:
        """Logits at each position; the returned state is None.

        Args:
          inputs: ids, or float features.
          segment_ids: packed sequences, 0 = padding.
          positions: None counts within each segment.
          state: must be None.
          token_types: type of each token; None is type 0 for all.

        Raises:
          ValueError: a state, an encoder without a read-out, an array of wrong shape or dtype, or more tokens than
            learned positions.
        """
        if state is not None:
            raise ValueError(
                "state must be None: an encoder reads whole sequences, in both directions, and cannot continue one"
            )
        if self.head is None:
            raise ValueError("this encoder has no read-out (num_classes = 0): call encode or embed")
        x = self.encode(inputs, segment_ids=segment_ids, positions=positions, token_types=token_types)
        logits = constrain(self.head(x), "activation_batch", "activation_time", "activation_vocab")
        return ModelOutput(logits, None, {})

    @auto_axes
    def encode(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The output of the last block, with the arguments of a call. Values at padding are unspecified."""
        x = self._embed(inputs, token_types)
        return self.encoder(x, segment_ids=segment_ids, positions=positions)

    @auto_axes
    def embed(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B D"]:
        """One unit-length vector per row by `mean_pool`; a row is one sequence, padded with segment id 0."""
        return mean_pool(self.encode(inputs, segment_ids=segment_ids, token_types=token_types), segment_ids)

    @auto_axes
    def attention_weights(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B L H T T"]:
        """Attention weights, [layer, head, query, key] in float32: T x T numbers per head and layer, for plots."""
        x = self._embed(inputs, token_types)
        return self.encoder.weights(x, segment_ids=segment_ids, positions=positions)

    def _embed(self, inputs: Array, token_types: Array | None) -> Array:
        dims: Dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        x = self.embedding(inputs.astype(self.config.dtypes.compute) if self.features else inputs)
        if self.types is None:
            if token_types is not None:
                raise ValueError("token_types must be None: this encoder was built with config.token_types = 0")
            return x
        if token_types is None:
            token_types = jnp.zeros((dims["B"], dims["T"]), jnp.int32)
        token_types = check_array("token_types", token_types, "B T", dims, kind=jnp.integer)
        return x + jnp.take(self.types[...].astype(x.dtype), token_types, axis=0)
