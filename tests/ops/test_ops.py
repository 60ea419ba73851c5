"""One suite for all ops, run for each row of specs.py and each of its implementations.

The oracle is the recurrence in float64. One call returns output, state and the gradients of every array, so that a
row costs few compilations: lengths, segments and weights of the loss are arguments of the same compiled function.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.numeric import FORWARD, GRADIENT, assert_close
from tests.ops.specs import SPECS

BATCH, PIECE = 2, 20
LENGTH = 71
ROWS = {spec.name: spec for spec in SPECS}
EACH = [(name, implementation) for name, spec in ROWS.items() for implementation in spec.implementations]
CHUNKED = [name for name, spec in ROWS.items() if "chunked" in spec.implementations]

each = pytest.mark.parametrize(("name", "implementation"), EACH, ids=["-".join(pair) for pair in EACH])


def cast(tree, dtype):
    """Floating leaves in another dtype."""

    def leaf(x):
        x = np.asarray(x)
        return jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)

    return jax.tree.map(leaf, tree)


def split_floats(tree):
    """The floating leaves, and a function that replaces them."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

    def join(floats):
        full = list(leaves)
        for place, x in zip(places, floats, strict=True):
            full[place] = x
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in places], join


@functools.cache
def inputs(name, length=LENGTH):
    """Random arguments and a state to start from, in float64."""
    spec, rng = ROWS[name], np.random.default_rng(7)
    with jax.enable_x64(True):
        return spec.arrays(rng, BATCH, length), jax.tree.map(np.asarray, spec.initial_state(rng, BATCH))


def packed_ids():
    """[2, 71] ids of three segments of 20 tokens with padding, and the positions of each; boundaries inside chunks."""
    ids, places = np.zeros((BATCH, LENGTH), np.int32), []
    for row, shift in enumerate((0, 4)):
        first = shift + np.arange(PIECE)
        second = first + PIECE
        third = np.concatenate([second[-1] + 5 + np.arange(PIECE // 2), second[-1] + 8 + PIECE // 2 + np.arange(10)])
        for segment, tokens in zip((5, 2, 5), (first, second, third), strict=True):
            ids[row, tokens] = segment
        places.append((first, second, third))
    return ids, np.asarray(places)


@functools.cache
def compiled(name, implementation, chunk_size=None, mapped=False):
    """One function: output, observed state, and gradients of a weighted sum of sines of both."""
    spec = ROWS[name]
    options = dict(spec.options) if chunk_size is None else {**spec.options, "chunk_size": chunk_size}

    def run(arrays, state, ids, output_weight, state_weight):
        floats, join = split_floats(state)

        def loss(arrays, floats):
            start = join(floats) if floats else None
            output, last = spec.op(
                **arrays, segment_ids=ids, initial_state=start, implementation=implementation, **options
            )
            seen = spec.observe(last)
            wide = jnp.dtype("float64" if output.dtype == jnp.float64 else "float32")
            weight = output_weight.astype(wide).reshape((1, -1) + (1,) * (output.ndim - 2))
            total = jnp.sum(weight * jnp.sin(output.astype(wide)))
            total = total + sum(
                state_weight.astype(wide) * jnp.sum(jnp.sin(x.astype(wide))) for x in jax.tree.leaves(seen)
            )
            return total, (output, seen, last)

        (_, (output, seen, last)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays, floats)
        return {"output": output, "state": seen, "gradients": gradients}, last

    if mapped:
        run = jax.vmap(run, in_axes=(0, 0, 0, None, None))
    return jax.jit(run)


def evaluate(name, implementation, arrays, state, ids=None, *, output_weight=None, state_weight=1.0, **kind):
    """Runs `compiled` in the dtype of the arrays."""
    length = next(iter(arrays.values())).shape[1]
    output_weight = np.ones(length) if output_weight is None else output_weight
    call = compiled(name, implementation, **kind)
    ids = None if ids is None else jnp.asarray(ids)
    return call(arrays, state, ids, jnp.asarray(output_weight, "float32"), jnp.asarray(state_weight, "float32"))


@functools.cache
def forward(name, implementation):
    """A compiled call without gradients: output and state."""
    spec = ROWS[name]

    def run(arrays, state):
        return spec.op(**arrays, initial_state=state, implementation=implementation, **spec.options)

    return jax.jit(run)


def nothing_stored(state):
    """The state of a sequence that starts: of matrices zeros, which share programs with other states; else None."""
    return jnp.zeros_like(state) if isinstance(state, jax.Array) else None


@functools.cache
def oracle(name, dtype="float64", packed=True, used=LENGTH, started=True):
    """The recurrence in float64 on inputs rounded to `dtype`.

    Only the first `used` tokens are not padding; where not `started`, the state holds nothing.
    """
    arrays, state = inputs(name)
    if not started:
        matrix = isinstance(state, np.ndarray)
        state = np.zeros_like(state) if matrix else dataclasses.replace(state, valid=np.zeros_like(state.valid))
    arrays = cast(cast(arrays, dtype), "float32") if dtype != "float64" else arrays
    state = cast(state, "float32") if dtype != "float64" else state
    ids = packed_ids()[0] if packed and used == LENGTH else np.ones((BATCH, LENGTH), np.int32)
    ids = np.where(np.arange(LENGTH)[None] < used, ids, 0)
    with jax.enable_x64(True):
        result, _ = evaluate(name, "recurrent", cast(arrays, "float64"), cast(state, "float64"), ids)
        return jax.tree.map(np.asarray, result)


def check(got, want, dtype, what):
    """Output, state and gradients against the oracle at the tolerances of the table."""
    assert_close(got["output"], want["output"], FORWARD[dtype], f"{what} output")
    assert_close(got["state"], want["state"], FORWARD[dtype], f"{what} state")
    assert_close(got["gradients"], want["gradients"], GRADIENT[dtype], f"{what} gradient")


def first_tokens(result, count):
    """The part of a result that belongs to the first tokens."""
    arrays, start = result["gradients"]
    cut = {key: value[:, :count] for key, value in arrays.items()}
    return {"output": result["output"][:, :count], "state": result["state"], "gradients": (cut, start)}


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_against_oracle(name, implementation, dtype):
    arrays, state = inputs(name)
    got, _ = evaluate(name, implementation, cast(arrays, dtype), cast(state, "float32"), packed_ids()[0])
    assert got["output"].dtype == jnp.dtype(dtype)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got["state"]))
    check(got, oracle(name, dtype), dtype, name)


@each
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_never_reaches_a_valid_token(name, implementation, value):
    """Every array holds NaN or infinity at padding; the program is that of `test_packed_against_oracle`."""
    (arrays, state), ids = inputs(name), packed_ids()[0]
    arrays = {
        key: np.where((ids == 0).reshape(*ids.shape, *(1,) * (x.ndim - 2)), value, x) for key, x in arrays.items()
    }
    got, last = evaluate(name, implementation, cast(arrays, "float32"), cast(state, "float32"), ids)
    check(got, oracle(name, "float32"), "float32", name)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(last))
    assert all(np.all(np.asarray(x)[ids == 0] == 0) for x in got["gradients"][0].values())


def lay_on_mesh(mesh, name, arrays, state):
    """Arrays and state with batch over "data" and heads over "tensor", ids with batch over "data"."""
    heads = {"q": -2, "k": -2, "v": -2, "w": -2, "beta": -1, "alpha": -1}

    def put(key, x, axis):
        spec = ["data", *[None] * (x.ndim - 1)]
        if axis is not None and x.shape[axis] % mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    arrays = {key: put(key, x, 2 if key == "decay" else x.ndim + heads[key]) for key, x in arrays.items()}
    of_state = {4: 1 if isinstance(state, jax.Array) else 2, 3: 2}
    return arrays, jax.tree.map(lambda x: put("state", x, of_state.get(x.ndim)) if x.ndim else x, state)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", ROWS)
def test_sharded(name, kind):
    """Batch and heads over a mesh of eight devices: one program of all implementations; nothing is gathered."""
    arrays, state = inputs(name)
    ids, weights = jnp.asarray(packed_ids()[0]), (jnp.ones(LENGTH), jnp.ones(()))
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "spare"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        arrays, state = lay_on_mesh(mesh, name, cast(arrays, "float32"), cast(state, "float32"))
        ids = jax.device_put(ids, NamedSharding(mesh, P("data")))

        def run(*args):
            return {i: compiled(name, i)(*args) for i in ROWS[name].implementations}

        program = jax.jit(run).lower(arrays, state, ids, *weights).compile()
        results = program(arrays, state, ids, *weights)
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    for implementation, (got, last) in results.items():
        check(got, oracle(name, "float32"), "float32", f"{name} {implementation}")
        heads = P("data", None, "tensor", None)
        assert got["output"].sharding.is_equivalent_to(NamedSharding(mesh, heads), 4)
        pairs = [*zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True)]
        pairs += [(got["gradients"][0][key], x) for key, x in arrays.items()]
        for x, like in pairs:
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim), f"{name} {implementation}: {x.sharding}"


@pytest.mark.parametrize("name", ["delta_rule_head_decay", "deltaformer_linear_softmax"])
def test_explicit_mesh_without_jit_and_inside_vmap(name):
    """Arrays on an Explicit mesh, no mesh set: eager, and mapped over a new axis."""
    arrays, state = inputs(name)
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "spare"), axis_types=(AxisType.Explicit,) * 3)
    arrays, state = lay_on_mesh(mesh, name, cast(arrays, "float32"), cast(state, "float32"))

    def call(arrays):
        return ROWS[name].op(**arrays, initial_state=state, **ROWS[name].options)[0]

    want = oracle(name, "float32", packed=False)["output"]
    heads = P("data", None, "tensor", None)
    for got in (call(arrays), jax.vmap(call)(jax.tree.map(lambda x: x[None], arrays))[0]):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, heads), 4)
        assert_close(got, want, FORWARD["float32"], name)


@pytest.mark.parametrize("name", CHUNKED)
def test_float64_chunked_against_oracle(name):
    arrays, state = inputs(name)
    with jax.enable_x64(True):
        got, _ = evaluate(name, "chunked", cast(arrays, "float64"), cast(state, "float64"))
        assert got["output"].dtype == jnp.float64
        check(got, oracle(name, packed=False), "float64", name)


@pytest.mark.parametrize("name", [name for name in CHUNKED if ROWS[name].chunk_sizes])
def test_chunk_sizes_agree(name):
    """T = 4 C + 7 and 2 C + 7."""
    arrays, state = inputs(name)
    assert [divmod(LENGTH, size) for size in ROWS[name].chunk_sizes] == [(4, 7), (2, 7)]
    for size in ROWS[name].chunk_sizes:
        got, _ = evaluate(
            name, "chunked", cast(arrays, "float32"), cast(state, "float32"), packed_ids()[0], chunk_size=size
        )
        check(got, oracle(name, "float32"), "float32", f"{name} chunk {size}")


@pytest.mark.parametrize("name", CHUNKED)
def test_odd_lengths(name):
    """T = 1, C - 1, C, C + 1, against the oracle with the rest as padding; `test_chunk_sizes_agree` has 2 C + 7."""
    arrays, state = inputs(name)
    size = min(ROWS[name].chunk_sizes, default=16)
    kind = {"chunk_size": size} if ROWS[name].chunk_sizes else {}
    for length in (1, size - 1, size, size + 1):
        cut = {key: value[:, :length] for key, value in arrays.items()}
        got, _ = evaluate(name, "chunked", cast(cut, "float32"), cast(state, "float32"), **kind)
        want = first_tokens(oracle(name, "float32", used=length), length)
        check(got, want, "float32", f"{name} length {length}")


@each
def test_packed_equals_unpacked(name, implementation):
    """Each segment alone agrees with the packed call; the state starts the first and is that of the last."""
    arrays, state = inputs(name)
    ids, places = packed_ids()
    arrays, state = cast(arrays, "float32"), cast(state, "float32")
    whole, _ = evaluate(name, implementation, arrays, state, ids)
    rows = np.arange(BATCH)[:, None]
    for part, start in enumerate((state, nothing_stored(state), nothing_stored(state))):
        tokens = places[:, part]
        cut = {key: value[rows, tokens] for key, value in arrays.items()}
        got, _ = evaluate(name, implementation, cut, start, state_weight=float(part == 2))
        want, (gradients, of_start) = whole["output"][rows, tokens], whole["gradients"]
        assert_close(got["output"], want, FORWARD["float32"], f"{name} segment {part}")
        gradients = {key: value[rows, tokens] for key, value in gradients.items()}
        assert_close(got["gradients"][0], gradients, GRADIENT["float32"], f"{name} segment {part}")
        if part == 0:
            assert_close(got["gradients"][1], of_start, GRADIENT["float32"], f"{name} start")
        if part == 2:
            assert_close(got["state"], whole["state"], FORWARD["float32"], f"{name} state")
    assert np.all(np.asarray(whole["output"])[ids == 0] == 0)


@each
def test_two_calls_equal_one(name, implementation):
    arrays, state = inputs(name)
    arrays, state = cast(arrays, "float32"), cast(state, "float32")
    ids = np.where(np.arange(LENGTH)[None] < 2 * PIECE, 1, np.zeros((BATCH, 1), np.int32))
    whole, _ = evaluate(name, implementation, arrays, state, ids)
    for part in range(2):
        tokens = slice(part * PIECE, (part + 1) * PIECE)
        cut = {key: x[:, tokens] for key, x in arrays.items()}
        if part and not isinstance(state, jax.Array):
            # the cache has grown, and so has the program
            output, state = forward(name, implementation)(cut, state)
        else:
            got, state = evaluate(name, implementation, cut, state)
            output = got["output"]
        assert_close(output, whole["output"][:, tokens], FORWARD["float32"], f"{name} call {part}")
    assert_close(ROWS[name].observe(state), whole["state"], FORWARD["float32"], f"{name} state")


@pytest.mark.parametrize("name", ROWS)
def test_decoding_equals_the_whole(name):
    arrays, state = inputs(name)
    arrays, state = cast(arrays, "float32"), cast(state, "float32")
    want = oracle(name, "float32", used=4)
    for t in range(4):
        output, state = forward(name, None)({key: x[:, t : t + 1] for key, x in arrays.items()}, state)
        assert_close(output, want["output"][:, t : t + 1], FORWARD["float32"], f"{name} token {t}")
    assert_close(ROWS[name].observe(state), want["state"], FORWARD["float32"], f"{name} state")


@each
def test_vmap(name, implementation):
    """Mapping over batch rows agrees with the batch."""
    arrays, state = inputs(name)
    ids = packed_ids()[0]

    def alone(x):
        return x[:, None] if x.ndim else jnp.broadcast_to(x, (BATCH,))

    mapped = jax.tree.map(alone, (cast(arrays, "float32"), cast(state, "float32"), jnp.asarray(ids)))
    call = compiled(name, implementation, mapped=True)
    got, _ = call(*mapped, jnp.ones(LENGTH), jnp.ones(()))
    got = {key: jax.tree.map(lambda x: x[:, 0], got[key]) for key in ("output", "state", "gradients")}
    check(got, oracle(name, "float32"), "float32", name)


@each
def test_output_does_not_depend_on_later_tokens(name, implementation):
    arrays, state = inputs(name)
    seen = 37
    weight = (np.arange(LENGTH) < seen).astype(np.float32)
    ids = np.ones((BATCH, LENGTH), np.int32)
    got, _ = evaluate(
        name,
        implementation,
        cast(arrays, "float32"),
        cast(state, "float32"),
        ids,
        output_weight=weight,
        state_weight=0.0,
    )
    for key, gradient in got["gradients"][0].items():
        assert np.all(np.asarray(gradient)[:, seen:] == 0), f"{name}: a later {key} moves an earlier output"
        assert np.any(np.asarray(gradient)[:, :seen] != 0), f"{name}: {key} moves nothing"


@pytest.mark.parametrize("name", ROWS)
def test_gradients_of_the_oracle_against_finite_differences(name):
    arrays, state = inputs(name, 5)
    ids = np.array([[3, 3, 0, 3, 4], [1, 1, 1, 1, 1]], np.int32)
    rng, step = np.random.default_rng(3), 1e-6
    with jax.enable_x64(True):
        arrays, state = cast(arrays, "float64"), cast(state, "float64")
        floats, join = split_floats((arrays, state))

        def value(floats):
            arrays, state = join(floats)
            result, _ = evaluate(name, "recurrent", arrays, state, ids)
            total = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((result["output"], result["state"])))
            return float(total), jax.tree.leaves(result["gradients"])

        _, gradients = value(floats)
        for place, gradient in enumerate(gradients):
            along = rng.standard_normal(gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = list(floats)
                moved[place] = floats[place] + sign * step * along
                ends.append(value(moved)[0])
            slope, want = (ends[0] - ends[1]) / (2 * step), float(np.sum(gradient * along))
            assert slope == pytest.approx(want, rel=1e-6, abs=1e-7), f"{name}: argument {place}"


@functools.cache
def lowered(name, implementation):
    """A call without state, and the text of its program."""
    spec, arrays = ROWS[name], cast(inputs(name)[0], "float32")
    call = jax.jit(lambda arrays: spec.op(**arrays, implementation=implementation, **spec.options)).lower(arrays)
    return call, call.as_text(debug_info=True)


@each
def test_which_implementation_ran(name, implementation):
    """The program names it; without a state it does what it does with an empty one."""
    spec = ROWS[name]
    call, text = lowered(name, implementation)
    assert f"memformer.{spec.scope}.{implementation}" in text
    ran = [i for i in spec.implementations if f"memformer.{spec.scope}.{i}" in lowered(name, None)[1]]
    assert len(ran) == 1
    output, state = call.compile()(cast(inputs(name)[0], "float32"))
    want = oracle(name, "float32", packed=False, started=False)
    assert_close(output, want["output"], FORWARD["float32"], f"{name} output")
    assert_close(spec.observe(state), want["state"], FORWARD["float32"], f"{name} state")


@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name):
    """A ValueError names the argument, what was expected and what was given."""
    spec = ROWS[name]
    arrays = cast(inputs(name, 5)[0], "float32")

    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            spec.op(**{**arrays, **spec.options, **changes})

    for key, x in arrays.items():
        refuses(rf"{key} must be .*got", **{key: x[0]})
        refuses(rf"{key} must have a floating dtype, got int32", **{key: x.astype("int32")})
        refuses(rf"{key} must be an array, got list", **{key: x.tolist()})
        if key != "q":
            refuses(rf"{key} must be .*got", **{key: x[:, :-1]})
    refuses(r"segment_ids must be \[B, T\] = \(2, 5\), got \(2, 4\)", segment_ids=jnp.ones((2, 4), "int32"))
    refuses("segment_ids must have a", segment_ids=jnp.ones((2, 5)))
    refuses("implementation must be None or one of", implementation="fast")
    if spec.chunk_sizes:
        refuses("chunk_size must be a positive integer or None, got 0", chunk_size=0)
    with pytest.raises(NotImplementedError, match="'chunked'"):
        spec.op(**arrays, **spec.options, implementation="pallas")
