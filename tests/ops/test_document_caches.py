"""Caches per document: packed calls that start each document from its own cache, against each document alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from tests.numeric import FORWARD, GRADIENT, assert_close

OPS = {"softmax_attention": mf.softmax_attention, "deltaformer": mf.deltaformer}
ROWS, PLACES, CAPACITY, HEADS, WIDTH = 2, 3, 11, 2, 4
# Two packed calls with padding before, between and inside documents, and places without one; then one token of each
# document. A fixed cache has 4, 9 and 10 slots in use after them.
FIRST = np.array([[0, 5, 5, 0, 5, 2, 2], [3, 3, 3, 3, 1, 7, 7]], np.int32)
SECOND = np.array([[1, 1, 0, 2, 2, 3, 0], [9, 9, 9, 9, 9, 0, 0]], np.int32)
TOTAL = FIRST.size + SECOND.size + ROWS * PLACES


def tokens(name):
    """Arguments of all tokens: those of the first call, of the second, and of the third."""
    rng = np.random.default_rng(3)
    groups = HEADS if name == "softmax_attention" else 1
    shapes = {"q": (HEADS, WIDTH), "k": (1, WIDTH), "v": (1, WIDTH), "decay": (groups,)}
    given = {key: rng.standard_normal((TOTAL, *shape)).astype("float32") for key, shape in shapes.items()}
    given["decay"] = -0.3 * np.abs(given["decay"])
    # Decays that leave nothing behind them.
    given["decay"][[3, 19]] = -np.inf
    return given


def places():
    """[6, L] the tokens of each document in order, TOTAL where there are no more."""
    rows, start = [[] for _ in range(ROWS * PLACES)], 0
    for ids in (FIRST, SECOND):
        for row, segments in enumerate(ids):
            at = np.flatnonzero(segments)
            index = np.cumsum(np.diff(segments[at], prepend=segments[at[0]]) != 0)
            for token, part in zip(at, index, strict=True):
                rows[row * PLACES + part].append(start + row * ids.shape[1] + token)
        start += ids.size
    for document, row in enumerate(rows):
        row.append(start + document)
    longest = max(map(len, rows))
    return np.array([row + [TOTAL] * (longest - len(row)) for row in rows])


def op(name, implementation):
    extra = {"chunk_size": 4} if implementation == "chunked" else {}
    return functools.partial(OPS[name], window=3, implementation=implementation, **extra)


def graded(run, given):
    """Gradients and output; those of decays of -inf are not compared."""
    weights = np.random.default_rng(1).standard_normal((TOTAL, HEADS, WIDTH)).astype("float32")

    def loss(given):
        output = run(given)
        return jnp.sum(weights * output), output

    gradients, output = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(given))
    gradients["decay"] = np.where(np.isinf(given["decay"]), 0, gradients["decay"])
    return gradients, output


@functools.cache
def apart(name):
    """Each document as a row of one call of the recurrence."""
    rows = places()

    def run(given):
        alone = {key: jnp.concatenate([x, jnp.zeros_like(x[:1])])[rows] for key, x in given.items()}
        output, _ = op(name, "recurrent")(**alone, segment_ids=(rows < TOTAL).astype("int32"))
        return jnp.zeros((TOTAL + 1, HEADS, WIDTH)).at[rows].set(output)[:TOTAL]

    return graded(run, tokens(name))


def empty(name, **sizes):
    heads = HEADS if name == "softmax_attention" else 1
    sizes = {"batch": ROWS, "capacity": CAPACITY, "groups": 1, "key_width": WIDTH, "value_width": WIDTH} | sizes
    return mf.init_cache(name, documents=PLACES, decay_heads=heads, **sizes)


def cut(cache, slots):
    """A growing cache of the first slots of a fixed one."""
    arrays = {key: x[:, :, :slots] for key, x in vars(cache).items() if getattr(x, "ndim", 0) > 2}
    return dataclasses.replace(cache, **arrays, length=jnp.int32(slots), fixed=False)


CASES = [("softmax_attention", "recurrent", False), ("deltaformer", "chunked", True)]


@pytest.mark.parametrize(("name", "implementation", "fixed"), CASES)
def test_documents_have_caches_of_their_own(name, implementation, fixed):
    """Two packed calls, then the caches as those of six rows: outputs and gradients of all tokens.

    A fixed cache is carried by a scan of both calls.
    """
    call, packed = op(name, implementation), np.stack([FIRST, SECOND])

    def step(cache, part):
        ids, given = part
        output, after = call(**given, segment_ids=ids, initial_state=cache)
        assert after.fixed == cache.fixed and after.k.shape[:2] == (ROWS, PLACES)
        return after, output

    def run(given):
        start, cache = packed.size, empty(name)
        parts = {key: x[:start].reshape(*packed.shape, *x.shape[1:]) for key, x in given.items()}
        if fixed:
            cache, output = jax.lax.scan(step, cache, (jnp.asarray(packed), parts))
        else:
            cache, first = step(cache, (FIRST, {key: x[0] for key, x in parts.items()}))
            cache, second = step(cut(cache, 4), (SECOND, {key: x[1] for key, x in parts.items()}))
            output = jnp.stack([first, second])
        cache = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, cache)
        last, _ = op(name, "recurrent")(**{key: x[start:, None] for key, x in given.items()}, initial_state=cache)
        return jnp.concatenate([output.reshape(-1, *output.shape[3:]), last[:, 0]])

    got, want = graded(run, tokens(name)), apart(name)
    assert_close(got[1], want[1], FORWARD["float32"])
    assert_close(got[0], want[0], GRADIENT["float32"])


def test_errors_name_the_argument():
    """Both ops check their cache in one place."""
    name = "softmax_attention"
    given = {key: x[: SECOND.size].reshape(*SECOND.shape, *x.shape[1:]) for key, x in tokens(name).items()}
    call = functools.partial(OPS[name], **given)
    message = "initial_state has states of 3 documents per row, got 4 segments in a row"
    with pytest.raises(ValueError, match=message):
        call(segment_ids=np.array([[1, 2, 3, 4, 4, 4, 4]] * 2, np.int32), initial_state=empty(name))
    message = "capacity of 4 slots, 0 of them in use: no room for 5 more tokens"
    with pytest.raises(ValueError, match=message):
        call(segment_ids=SECOND, initial_state=empty(name, capacity=4))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(call)(segment_ids=SECOND, initial_state=empty(name, capacity=4)))
    with pytest.raises(ValueError, match=r"initial_state.k must be \[B, P, S, G, K\] .*got \(2, 3, 11, 1, 5\)"):
        call(initial_state=empty(name, key_width=5))
    with pytest.raises(ValueError, match="documents must be a positive integer, got 0"):
        mf.init_cache(name, batch=1, capacity=1, groups=1, key_width=1, value_width=1, documents=0)
