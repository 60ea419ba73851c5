"""Ops with a cache: fixed capacity, memory of the compiled program, shards with rematerialisation, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memformer as mf
from memformer.ops.attention.cache import append
from tests.numeric import assert_close

OPS = {"softmax_attention": mf.softmax_attention, "deltaformer": mf.deltaformer}
each_op = pytest.mark.parametrize("name", OPS)


def empty(name, batch, capacity, groups=1, width=16):
    return mf.init_cache(name, batch=batch, capacity=capacity, groups=groups, key_width=width, value_width=16)


def arrays(batch, length, groups=1, seed=0):
    """q, k, v with two query heads per key head."""
    rng = np.random.default_rng(seed)
    shapes = ((2 * groups, 16), (groups, 16), (groups, 16))
    return [rng.standard_normal((batch, length, *s)).astype("float32") for s in shapes]


def test_fixed_cache_decodes_with_one_compilation():
    """Softmax attention decodes from a fixed cache in test_softmax_attention."""
    name = "deltaformer"
    op = OPS[name]
    given = arrays(2, 20)
    want, exact = jax.jit(op)(*given)
    traces = []

    @jax.jit
    def call(q, k, v, state):
        traces.append(q.shape[1])
        return op(q, k, v, initial_state=state)

    state = empty(name, 2, 24)
    outputs = []
    for first, last in ((0, 9), *((t, t + 1) for t in range(9, 20))):
        output, state = call(*(x[:, first:last] for x in given), state)
        outputs.append(output)
    assert traces == [9, 1]
    assert_close(np.concatenate(outputs, axis=1), want, 2e-6, name)
    state, exact = jax.device_get((state, exact))
    assert state.fixed and int(state.length) == 20 and state.k.shape[1] == 24
    assert np.array_equal(state.valid, np.broadcast_to(np.arange(24) < 20, (2, 24)))
    assert_close([state.k[:, :20], state.values[:, :20]], [exact.k, exact.values], 2e-6, name)
    assert not exact.fixed and int(exact.length) == 20


@each_op
def test_full_cache_is_an_error_and_stays_unchanged(name):
    op = OPS[name]
    given = arrays(1, 5)
    _, state = jax.jit(op)(*given, initial_state=empty(name, 1, 8))
    message = "capacity of 8 slots, 5 of them in use: no room for 5 more tokens"
    with pytest.raises(ValueError, match=message):
        op(*given, initial_state=state)
    with pytest.raises(ValueError, match="capacity of 4 slots"):
        jax.jit(op)(*given, initial_state=empty(name, 1, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(op)(*given, initial_state=state))
    after = jax.jit(append, static_argnums=(0, 2))(type(state), state, None, *given[1:])
    jax.tree.map(np.testing.assert_array_equal, after, state)


@functools.cache
def cache_of_two_segments(name):
    return jax.jit(OPS[name])(*arrays(1, 5), segment_ids=np.array([[1, 1, 0, 2, 2]], np.int32))[1]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("softmax_attention", "recurrent"), ("deltaformer", "recurrent"), ("deltaformer", "chunked")],
)
def test_invalid_slots_may_hold_anything(name, implementation):
    """NaN in slots that no query sees reaches neither outputs nor gradients.

    DeltaFormer reads with the tiles of softmax attention.
    """
    op, given = OPS[name], arrays(1, 5)
    cache = jax.device_get(cache_of_two_segments(name))
    spoiled = jax.tree.map(
        lambda x: np.where(np.arange(5)[:, None, None] < 3, np.nan, x).astype(x.dtype) if x.ndim == 4 else x, cache
    )

    @jax.jit
    def run(arrays, cache):
        def loss(arrays):
            output = op(*arrays, initial_state=cache, implementation=implementation)[0]
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, has_aux=True)(arrays)

    jax.tree.map(np.testing.assert_array_equal, run(given, spoiled), run(given, cache))


def test_fixed_cache_drops_an_earlier_segment_of_nan():
    """A segment that holds NaN does not reach later calls: its slots are cleared when it ends."""
    op, given = mf.softmax_attention, arrays(2, 6)
    step = jax.jit(lambda arrays, cache, ids: op(*arrays, initial_state=cache, segment_ids=ids))
    first, second, third = ([x[:, i : i + 2] for x in given] for i in (0, 2, 4))
    nan = [np.concatenate([np.full_like(x[:1], np.nan), x[1:]]) for x in first]
    one, two = np.ones((2, 2), np.int32), np.array([[1, 2], [2, 2]], np.int32)
    results = []
    for start in (first, nan):
        _, cache = step(start, empty("softmax_attention", 2, 8), one)
        # In the first row a new segment starts with the second token.
        _, cache = step(second, cache, two)
        results.append((step(third, cache, 2 * one)[0], cache))
    jax.tree.map(np.testing.assert_array_equal, *results)


@each_op
def test_memory_is_linear_in_time(name):
    """Forward + backward at T = 8192 and four times that; no T x T array in the program."""
    op = OPS[name]

    def loss(*given):
        output, state = op(*given, implementation="chunked")
        return jnp.sum(output) + jnp.sum(state.values)

    sizes, function = [], jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    for length in (8192, 32768):
        given = [jax.ShapeDtypeStruct((1, length, h, 16), jnp.float32) for h in (2, 1, 1)]
        program = function.lower(*given).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
        found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
        largest = max(int(np.prod([int(d) for d in shape.split(",")])) for shape in found)
        assert largest <= 64 * length, f"{largest} elements in one array"
    assert sizes[1] <= 4.6 * sizes[0], f"temporaries grow from {sizes[0]} to {sizes[1]} bytes"


@each_op
def test_shards_without_gathering(name):
    """Sharded inputs under jit agree with shard_map, whose devices compute alone; heads of keys are sharded too.

    Under jit the op is in a checkpoint.
    """
    op = OPS[name]
    given = arrays(2, 20, groups=2)

    def gradients(*given, op=lambda *x: op(*x, chunk_size=8)):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(op(*x)[0])), argnums=(0, 1, 2))(*given)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor")
    sharded = jax.device_put(given, NamedSharding(mesh, spec))
    checkpointed = jax.checkpoint(lambda *x: op(*x, chunk_size=8))
    program = jax.jit(functools.partial(gradients, op=checkpointed)).lower(*sharded).compile()
    text = program.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)
    got = program(*sharded)
    assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim) for x in got)
    mapped = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec))
    assert_close(got, mapped(*given), 2e-6, name)


@each_op
def test_errors_name_the_argument(name):
    op = OPS[name]
    q, k, v = arrays(2, 5)

    def refuses(message, *given, **options):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: op(*(given or (q, k, v)), **options))

    refuses("query heads must be a multiple of key/value heads: got H = 3, G = 2", *_three())
    refuses(r"initial_state must be a .*Cache, as .* or .*init_cache\(.*\) makes it, got tuple", initial_state=())
    state = empty(name, 2, 8, width=8)
    refuses(r"initial_state.k must be \[B, S, G, K\] .*got \(2, 8, 1, 8\)", initial_state=state)
    refuses("precision must be None, 'default'", precision="best")
    refuses("chunk_size must be a positive integer or None, got 1.5", chunk_size=1.5)
    with pytest.raises(ValueError, match="capacity must be a positive integer"):
        empty(name, 2, 0, width=8)


def _three():
    x = jnp.zeros((1, 5, 3, 4))
    return x, x[:, :, :2], x[:, :, :2]
