"""Generation of tokens by a language model: a compiled prefill, then single-token steps.

`generate` runs all steps in one compiled loop; `TokenStream` runs them one by one and gives each token as it comes.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from memformer.core.checks import check, check_array, check_at_least, check_key, check_size
from memformer.core.types import Array, Int
from memformer.layers.sharding import on_auto_mesh
from memformer.models.sampling import Sampling, sample

__all__ = ["TokenStream", "bucket_length", "generate", "pad_prompts"]

# Shorter prompts share one compiled prefill.
SMALLEST_BUCKET = 16


def pad_prompts(
    prompts: np.ndarray | Array | Sequence[Sequence[int]], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths on the left to ids [B, T] and segment_ids [B, T].

    Args:
      prompts: id sequences.
      length: T; None is the longest prompt.

    Raises:
      ValueError: no prompt, an empty one, one that is longer than `length`, or ids that are not integers.

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
    longest = max(row.size for row in rows)
    length = longest if length is None else check_size("length", length)
    check(longest <= length, "prompts", f"of at most length = {length} ids", longest)
    ids = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.size :], segments[i, -row.size :] = row, 1
    return ids, segments


def bucket_length(length: int) -> int:
    """The length to which a prompt is padded so that few programs are compiled: a power of two, at least 16.

    Example:
      >>> bucket_length(5), bucket_length(16), bucket_length(17)
      (16, 16, 32)
    """
    return max(SMALLEST_BUCKET, 1 << (check_size("length", length) - 1).bit_length())


def generate(
    model: Any,
    prompts: np.ndarray | Array | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    segment_ids: Int[Array, "B T"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
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
      segment_ids: of prompts that are an array padded on the left or on the right, such as the attention mask of
        another library's tokenizer: 0 = padding, 1 elsewhere.
      temperature: divides the logits before sampling; 0 takes the most probable token (greedy decoding).
      top_k: samples only from the k most probable tokens.
      top_p: samples only from the most probable tokens that together reach this probability.
      min_p: samples only from the tokens that are at least so many times as probable as the most probable one.
      repetition_penalty: above 1 makes the tokens of the prompt, and those generated before, less probable.
      stop_token: ends a row, and fills it up to max_new_tokens.
      key: random key, required where temperature is not 0.

    Returns:
      [B, max_new_tokens] int32, without the prompts.

    Raises:
      ValueError: a setting out of range, a model without ids, or more tokens than learned positions.

    Source: see `sample`.

    Example:
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny", depth=1), vocab_size=257, rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=4).shape
      (2, 4)
    """
    check_model(model)
    if model.vocab_size != model.num_classes:
        raise ValueError("model must take ids and give logits over the same ids (vocab_size = num_classes > 0)")
    count = check_size("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty).checked(model.num_classes)
    _check_key(key, sampling)
    if stop_token is not None:
        stop_token = check_at_least("stop_token", stop_token, 0)
        check(stop_token < model.vocab_size, "stop_token", f"None or in [0, {model.vocab_size})", stop_token)
    ids, segments = pad_prompts(prompts)
    if segment_ids is not None:
        segments = _check_segments(segment_ids, ids)
    _check_ids(ids, segments, model.vocab_size)
    graph, parameters = nnx.split(model)
    # Rows lie on the devices that the prompts lie on.
    placed = _mesh_sharding(prompts)
    rows = PartitionSpec(*placed.spec[:1]) if placed else PartitionSpec()
    with on_auto_mesh((parameters, prompts, key)) as (parameters, prompts, key):
        if placed := _mesh_sharding(prompts):
            ids, segments = jax.device_put((ids, segments), NamedSharding(placed.mesh, rows))
        key = jax.random.key(0) if key is None else key
        # The last new token is never read by the model.
        logits, state = _prefill(graph, parameters, ids, segments, _find_capacity(model, ids.shape[1] + count - 1))
        seen = _find_seen(ids, segments, logits.shape[1]) if sampling.penalizes else None
        tokens = _decode(graph, parameters, logits, state, key, seen, sampling, count, stop_token)
    return np.asarray(tokens)


# Slots of caches are allocated in multiples of this.
TILE = 64


class TokenStream:
    """New tokens of a batch of prompts, one [B] array per step, each as soon as it is there.

    Prompts are padded on the left to a bucket (`bucket_length`), so that prompts of all lengths of a bucket share one
    compiled prefill. All steps share one compiled program; that of a model with caches depends on their capacity too.
    The stream runs once.

    Args:
      model: a language model (`MemoryLM`) in evaluation mode, whose classes are the first of its input ids.
      prompts: id sequences of different lengths.
      max_new_tokens: number of new tokens per row.
      sampling: choice of the next token.
      key: random key, required where the temperature is not 0.
      classes: only the first so many classes are generated; None for all.
      capacity: slots of caches; None for the bucket and the new tokens, rounded up to a power of two. The same capacity
        for all prompts lets them share one compiled step. Matrix memories have no slots.

    Attributes:
      batch: B.
      capacity: slots of caches.
      state_bytes: size of the state per sequence, at this capacity.
      slot_bytes: what one more slot per sequence adds to it; 0 for a matrix memory.

    Raises:
      ValueError: a setting out of range, a model without ids, or more tokens than learned positions or slots.

    Example:
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny", depth=1), vocab_size=257, rngs=nnx.Rngs(0))
      >>> [token.shape for token in TokenStream(model, [[1, 2, 3]], max_new_tokens=3)]
      [(1,), (1,), (1,)]
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        key: Array | None = None,
        classes: int | None = None,
        capacity: int | None = None,
    ):
        check_model(model)
        self._classes = model.num_classes if classes is None else check_size("classes", classes)
        check(self._classes <= model.num_classes, "classes", f"at most {model.num_classes}", classes)
        self._count = check_size("max_new_tokens", max_new_tokens)
        self._sampling = (Sampling() if sampling is None else sampling).checked(self._classes)
        _check_key(key, self._sampling)
        self._key = jax.random.key(0) if key is None else key
        longest = pad_prompts(prompts)[0].shape[1]
        length, self.capacity = _plan_length(model, longest, self._count, capacity)
        self._ids, self._segments = pad_prompts(prompts, length)
        self.batch = len(self._ids)
        _check_ids(self._ids, self._segments, model.vocab_size)
        graph, parameters = nnx.split(model)
        self._graph = _intern(graph)
        with on_auto_mesh((parameters, self._key)) as placed:
            self._parameters, self._key = placed
            self._mesh = jax.sharding.get_mesh()
        self.state_bytes = _state_bytes(model, self.capacity)
        half = -(-self.capacity // 2)
        growth = self.state_bytes - _state_bytes(model, half)
        self.slot_bytes = growth // max(self.capacity - half, 1)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields [B] int32 per step."""
        fixed = (self._graph, self._parameters)
        settings = {"sampling": self._sampling, "classes": self._classes}
        with self._on_mesh():
            token, state, seen = _start(
                *fixed, self._ids, self._segments, self._key, capacity=self.capacity, **settings
            )
        for i in range(1, self._count):
            last = token
            # The next step is dispatched before this token is read, so that the device does not wait for the host.
            with self._on_mesh():
                token, state, seen = _step(*fixed, token, state, seen, self._key, np.int32(i), **settings)
            yield np.asarray(last)
        yield np.asarray(token)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The scope of the mesh that parameters and key lie on; the caller's own returns between two tokens."""
        return contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh)


class _Graph:
    """The structure of a model, compared and hashed as an object: hashing a structure takes longer than a step."""

    def __init__(self, graph: Any):
        self.graph = graph


@functools.lru_cache(maxsize=64)
def _intern(graph: Any) -> _Graph:
    """The same object for equal structures, so that models of one structure share compiled programs."""
    return _Graph(graph)


def _plan_length(model: Any, longest: int, count: int, capacity: int | None) -> tuple[int, int]:
    """Length to which prompts are padded, and the capacity of caches."""
    limit = _find_limit(model)
    # The last new token is never read by the model.
    need = longest + count - 1
    if limit is not None and need > limit:
        raise ValueError(
            f"max_new_tokens must be at most {max(limit - longest + 1, 0)} for a prompt of {longest} tokens, because "
            f"the model has {limit} learned positions, got {count}"
        )
    if capacity is not None:
        limit = check_size("capacity", capacity)
        check(need <= limit, "capacity", f"at least {need} (prompt of {longest} tokens, {count} new ones)", capacity)
    length = bucket_length(longest)
    if limit is None:
        return length, bucket_length(length + count - 1)
    length = min(length, limit - count + 1)
    return length, limit if capacity is not None else min(bucket_length(length + count - 1), limit)


def _find_limit(model: Any) -> int | None:
    """The learned positions of a model, or None."""
    config: Any = getattr(model, "config", None)
    return config.max_length if getattr(config, "positions", None) == "learned" else None


def _find_capacity(model: Any, tokens: int) -> int:
    """Slots of caches for so many tokens, in whole tiles of the kernels that read them."""
    limit, rounded = _find_limit(model), -(-tokens // TILE) * TILE
    return rounded if limit is None else max(min(rounded, limit), tokens)


def _state_bytes(model: Any, capacity: int) -> int:
    shapes = jax.eval_shape(lambda: model.init_state(1, capacity))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _mesh_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def check_model(model: Any) -> None:
    """Raises ValueError unless a model takes ids, gives logits over them, and is in evaluation mode."""
    if not getattr(model, "vocab_size", 0) or model.num_classes > model.vocab_size:
        raise ValueError("model must take ids and give logits over the same ids (vocab_size = num_classes > 0)")
    if not getattr(model, "deterministic", True):
        raise ValueError("model must be in evaluation mode: call model.eval() before generate")


def _check_key(key: Array | None, sampling: Sampling) -> None:
    if key is not None:
        check_key("key", key)
    elif sampling.temperature > 0:
        raise ValueError("key must be given where temperature is not 0, such as jax.random.key(0)")


def _check_segments(segment_ids: Any, ids: np.ndarray) -> np.ndarray:
    dims = dict(zip("BT", ids.shape, strict=True))
    segments = np.asarray(check_array("segment_ids", segment_ids, "B T", dims, kind=jnp.integer), np.int32)
    empty = np.flatnonzero(~np.any(segments != 0, axis=1))
    if empty.size:
        raise ValueError(f"segment_ids must have a token that is no padding in every row, got none in row {empty[0]}")
    return segments


def _check_ids(ids: np.ndarray, segments: np.ndarray, vocab: int) -> None:
    valid = ids[segments != 0]
    if valid.min() < 0 or valid.max() >= vocab:
        raise ValueError(f"prompts must have ids in [0, {vocab}), got {valid.min()} to {valid.max()}")


def read_prompts(model: Any, ids: Array, segment_ids: Array, state: Any) -> tuple[Array, Any]:
    """Logits of the last token of each prompt, [B, classes], and the state; `state` is that before the prompts."""
    places = jnp.where(segment_ids != 0, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], jnp.int32(-1))
    # Padding may hold any id. The logits of all places would take more room than the model where many ids are known.
    output = model(
        jnp.where(segment_ids != 0, ids, 0), segment_ids=segment_ids, state=state, read_at=jnp.max(places, axis=1)
    )
    return output.logits[:, 0], output.state


def _find_seen(ids, segment_ids, classes):
    """Marks the classes that occur in each prompt, [B, classes]."""
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    places = jnp.where(segment_ids != 0, ids, jnp.int32(classes))
    return jnp.zeros((ids.shape[0], classes), jnp.bool_).at[rows, places].set(True, mode="drop")


def _mark_seen(seen, token):
    return seen if seen is None else seen.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].set(True)


@functools.partial(jax.jit, static_argnames=("graph", "capacity"))
def _prefill(graph, parameters, ids, segment_ids, capacity):
    """Reads the prompts; returns the logits of the last token of each and the state."""
    model = nnx.merge(graph, parameters)
    # Made here, so that on a mesh the compiler shards it as the keys and values that are written to it.
    return read_prompts(model, ids, segment_ids, model.init_state(ids.shape[0], capacity))


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "sampling", "classes"))
def _start(graph, parameters, ids, segment_ids, key, *, capacity, sampling, classes):
    """Reads the prompts; returns the first token, the state, and the classes seen."""
    model = nnx.merge(graph.graph, parameters)
    logits, state = read_prompts(model, ids, segment_ids, model.init_state(ids.shape[0], capacity))
    seen = _find_seen(ids, segment_ids, classes) if sampling.penalizes else None
    token = sample(logits[:, :classes], jax.random.fold_in(key, 0), sampling, seen)
    return token, state, _mark_seen(seen, token)


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "classes"), donate_argnames=("state", "seen"))
def _step(graph, parameters, token, state, seen, key, i, *, sampling, classes):
    """Reads one token per row; returns the next one, the state, and the classes seen."""
    output = nnx.merge(graph.graph, parameters)(token[:, None], state=state)
    token = sample(output.logits[:, 0, :classes], jax.random.fold_in(key, i), sampling, seen)
    return token, output.state, _mark_seen(seen, token)


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "count", "stop_token"))
def _decode(graph, parameters, logits, state, key, seen, sampling, count, stop_token):
    """Samples `count` tokens, each from the logits of the one before."""
    model = nnx.merge(graph, parameters)
    batch = logits.shape[0]
    stop = -1 if stop_token is None else stop_token

    def unfinished(carry):
        i, done = carry[0], carry[1]
        return (i < count) & ~jnp.all(done)

    def draw(i, done, logits, seen, tokens):
        token = sample(logits, jax.random.fold_in(key, i), sampling, seen)
        token = jnp.where(done, jnp.int32(stop), token)
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), i))
        return token, done | (token == stop), _mark_seen(seen, token), tokens

    def step(carry):
        i, done, token, state, seen, tokens = carry
        output = model(token[:, None], state=state)
        token, done, seen, tokens = draw(i, done, output.logits[:, 0], seen, tokens)
        return i + 1, done, token, output.state, seen, tokens

    tokens = jnp.full((batch, count), stop, jnp.int32)
    token, done, seen, tokens = draw(jnp.int32(0), jnp.zeros(batch, jnp.bool_), logits, seen, tokens)
    return lax.while_loop(unfinished, step, (jnp.int32(1), done, token, state, seen, tokens))[-1]
