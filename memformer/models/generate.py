"""Sampling from a language model: a compiled prefill, then a compiled loop of single-token steps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from memformer.core.checks import check, check_at_least, check_key, check_number, check_positive, check_size
from memformer.core.types import Array, Float, Int
from memformer.layers.sharding import on_auto_mesh

__all__ = ["Sampling", "generate", "pad_prompts", "sample"]


class Sampling(NamedTuple):
    """Choice of the next token; fields are the arguments of `generate` of the same names."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def checked(self, vocab: int) -> "Sampling":
        """The same settings as Python numbers, so that they are hashable.

        Raises:
          ValueError: a setting out of range.
        """
        temperature = check_number("temperature", self.temperature, at_least=0)
        top_k, top_p = check_positive("top_k", self.top_k), self.top_p
        check(top_k is None or top_k <= vocab, "top_k", f"None or in [1, {vocab}] (the number of classes)", top_k)
        if top_p is not None:
            top_p = check_number("top_p", top_p, above=0)
            check(top_p <= 1, "top_p", "None or in (0, 1]", top_p)
        return Sampling(temperature, top_k, top_p)


def sample(logits: Float[Array, "B V"], key: Array | None, sampling: Sampling) -> Int[Array, "B"]:
    """Chooses one token per row.

    Logits are divided by the temperature and restricted to the top_k largest, then to the smallest set of most
    probable tokens whose probability reaches top_p (at least one token). A token is sampled from the softmax of what
    remains.

    Args:
      logits: float32.
      key: random key; with None or temperature 0 the most probable token is taken.
      sampling: the settings.

    Example:
      >>> sample(jnp.array([[0.0, 2.0, 1.0]]), None, Sampling())
      Array([1], dtype=int32)
    """
    # A temperature below the smallest normal number is 0 on devices that flush denormals.
    if key is None or sampling.temperature < jnp.finfo(logits.dtype).tiny:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit is 0 before the division, which then cannot overflow to infinity minus infinity.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.asarray(sampling.temperature, logits.dtype)
    low = jnp.asarray(-jnp.inf, logits.dtype)
    if sampling.top_k is not None:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, low, logits)
    if sampling.top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        chance = jax.nn.softmax(ranked, axis=-1)
        # A token is kept if those before it have not reached top_p, so the first always is.
        before = jnp.cumsum(chance, axis=-1) - chance
        ranked = jnp.where(before < sampling.top_p, ranked, low)
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.take_along_axis(ranked, rank, axis=-1)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def pad_prompts(prompts: np.ndarray | Array | Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths on the left to ids [B, T] and segment_ids [B, T].

    Raises:
      ValueError: no prompt, an empty one, or ids that are not integers.

    Example:
      >>> pad_prompts([[5, 6], [7]])[1]
      array([[1, 1],
             [0, 1]], dtype=int32)
    """
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or not row.size or row.dtype.kind not in "iu" for row in rows):
        raise ValueError("prompts must be one or more sequences of at least one integer id each")
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < -(2**31) or high >= 2**31:
        # as int32 they would wrap to other ids
        raise ValueError(f"prompts must have ids in [0, 2**31), got {low} to {high}")
    ids = np.zeros((len(rows), max(row.size for row in rows)), np.int32)
    segments = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.size :], segments[i, -row.size :] = row, 1
    return ids, segments


def generate(
    model: Any,
    prompts: np.ndarray | Array | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    key: Array | None = None,
) -> np.ndarray:
    """Continues prompts with new tokens.

    The prompts are read in one call. Tokens then follow one by one inside a compiled loop, which ends early once
    every row has stopped. A matrix memory needs the same space at any length; a cache is allocated once, for prompt and
    new tokens. Calls with equal shapes and settings compile once.

    Args:
      model: a language model (`MemoryLM`) whose inputs and outputs are the same ids, in evaluation mode.
      prompts: [B, T] ids, or a list of id sequences of different lengths. Where they are an array that is sharded over
        a mesh, rows are decoded on the devices that they lie on.
      max_new_tokens: number of new tokens per row.
      temperature: divides the logits before sampling; 0 takes the most probable token (greedy decoding).
      top_k: samples only from the k most probable tokens.
      top_p: samples only from the most probable tokens that together reach this probability.
      stop_token: ends a row, and fills it up to max_new_tokens.
      key: random key, required where temperature is not 0.

    Returns:
      [B, max_new_tokens] int32, without the prompts.

    Raises:
      ValueError: a setting out of range, a model without ids, or more tokens than learned positions.

    Source: top-p, arXiv 1904.09751.

    Example:
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny"), vocab_size=11, rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=4).shape
      (2, 4)
    """
    _check_model(model)
    count = check_size("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p).checked(model.num_classes)
    if key is not None:
        check_key("key", key)
    elif sampling.temperature > 0:
        raise ValueError("key must be given where temperature is not 0, such as jax.random.key(0)")
    if stop_token is not None:
        stop_token = check_at_least("stop_token", stop_token, 0)
        check(stop_token < model.vocab_size, "stop_token", f"None or in [0, {model.vocab_size})", stop_token)
    ids, segments = pad_prompts(prompts)
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ValueError(f"prompts must have ids in [0, {model.vocab_size}), got {ids.min()} to {ids.max()}")
    graph, parameters = nnx.split(model)
    # Rows lie on the devices that the prompts lie on.
    placed = _mesh_sharding(prompts)
    rows = PartitionSpec(*placed.spec[:1]) if placed else PartitionSpec()
    with on_auto_mesh((parameters, prompts)) as (parameters, prompts):
        if placed := _mesh_sharding(prompts):
            ids, segments = jax.device_put((ids, segments), NamedSharding(placed.mesh, rows))
        key = jax.random.key(0) if key is None else key
        # The last new token is never read by the model.
        logits, state = _prefill(graph, parameters, ids, segments, ids.shape[1] + count - 1)
        tokens = _decode(graph, parameters, logits, state, key, sampling, count, stop_token)
    return np.asarray(tokens)


def _mesh_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _check_model(model: Any) -> None:
    if not getattr(model, "vocab_size", 0) or model.vocab_size != model.num_classes:
        raise ValueError("model must take ids and give logits over the same ids (vocab_size = num_classes > 0)")
    if not getattr(model, "deterministic", True):
        raise ValueError("model must be in evaluation mode: call model.eval() before generate")


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _prefill(graph, parameters, ids, segment_ids, capacity):
    """Reads the prompts; returns the logits of the last position and the state."""
    model = nnx.merge(graph, parameters)
    # Made here, so that on a mesh the compiler shards it as the keys and values that are written to it.
    state = model.init_state(ids.shape[0], capacity)
    output = model(ids, segment_ids=segment_ids, state=state)
    return output.logits[:, -1], output.state


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "count", "stop_token"))
def _decode(graph, parameters, logits, state, key, sampling, count, stop_token):
    """Samples `count` tokens, each from the logits of the one before."""
    model = nnx.merge(graph, parameters)
    batch = logits.shape[0]
    stop = -1 if stop_token is None else stop_token

    def unfinished(carry):
        i, done = carry[0], carry[1]
        return (i < count) & ~jnp.all(done)

    def draw(i, done, logits, tokens):
        token = sample(logits, jax.random.fold_in(key, i), sampling)
        token = jnp.where(done, jnp.int32(stop), token)
        return token, done | (token == stop), lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), i))

    def step(carry):
        i, done, token, state, tokens = carry
        output = model(token[:, None], state=state)
        token, done, tokens = draw(i, done, output.logits[:, 0], tokens)
        return i + 1, done, token, output.state, tokens

    tokens = jnp.full((batch, count), stop, jnp.int32)
    token, done, tokens = draw(jnp.int32(0), jnp.zeros(batch, jnp.bool_), logits, tokens)
    return lax.while_loop(unfinished, step, (jnp.int32(1), done, token, state, tokens))[-1]
