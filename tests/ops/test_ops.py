"""One suite for all ops, run for each row of specs.py and each of its implementations.

The oracle is the recurrence in float64. One call returns output, state and the gradients of every array, so that a
row costs few compilations: lengths, segments and weights of the loss are arguments of the same compiled function, and
inputs and results are cut with NumPy, which compiles nothing.

Each row has two programs on which its properties are shown: the oracle's own, and the chunked form in float32 with the
larger chunk size of the row. What only the op decides, not the row, is shown in one row of each op, several things in
one program: on a mesh the recurrence runs in float32 and the chunked form in float64 with the smaller chunk size; under
vmap both run in bfloat16, with the default chunk size (the recurrence for one op of each family); calls without
segments have odd lengths.
"""

import dataclasses
import functools
import inspect
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
# delta_rule_erase has the groups and the decay of the one, linear_attention_normalized the decay of the other; the
# suites of the kernels run both.
SUITE = [name for name in ROWS if name not in ("delta_rule_grouped", "linear_attention_head_decay")]
EACH = [(name, implementation) for name in SUITE for implementation in ROWS[name].implementations]
CHUNKED = [name for name in SUITE if "chunked" in ROWS[name].implementations]
# The dtype of the program on which an implementation's properties are shown.
MAIN = {"recurrent": "float64", "chunked": "float32"}
# The place of a row among those of its op, and their number.
PLACES = {
    name: (rows.index(name), len(rows))
    for rows in ([name for name in SUITE if ROWS[name].scope == scope] for scope in {s.scope for s in SPECS})
    for name in rows
}

FIRST = [name for name in SUITE if PLACES[name][0] == 0]
LAST = [name for name in SUITE if PLACES[name][0] == PLACES[name][1] - 1]
# Both implementations on both kinds of mesh, and a call of one whole chunk, for one op of each family.
WHOLE = {"delta_rule", "softmax_attention"}


def meshes(name):
    """(kind of axes, implementation) of the sharded calls of a row: an op has two, on two kinds of mesh, or four."""
    implementations = ("recurrent", "chunked")
    first = [(AxisType.Auto, i) for i in (implementations if ROWS[name].scope in WHOLE else implementations[:1])]
    last = [(AxisType.Explicit, i) for i in (implementations if ROWS[name].scope in WHOLE else implementations[1:])]
    return first * (name in FIRST) + last * (name in LAST)


SHARDED = [(name, *pair) for name in SUITE for pair in meshes(name)]
LENGTHS = [(name, length) for name in FIRST for length in ("1", "C - 1", "C")[: 2 + (ROWS[name].scope in WHOLE)]]

each = pytest.mark.parametrize(("name", "implementation"), EACH, ids=["-".join(pair) for pair in EACH])


def cast(tree, dtype):
    """Floating leaves in another dtype. NumPy converts them: jnp.asarray compiles a program per shape and dtype."""

    def leaf(x):
        x = np.asarray(x)
        return jax.device_put(x.astype(jnp.dtype(dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x)

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
    """Runs `compiled` in the dtype of the arrays; the result is in NumPy, the last state is not."""
    length = next(iter(arrays.values())).shape[1]
    output_weight = np.ones(length) if output_weight is None else output_weight
    call = compiled(name, implementation, **kind)
    weights = np.asarray(output_weight, "float32"), np.asarray(state_weight, "float32")
    result, last = call(arrays, state, ids, *weights)
    return jax.tree.map(np.asarray, result), last


def large_chunks(name, implementation):
    """The larger chunk size of a row where the form has chunks."""
    sizes = ROWS[name].chunk_sizes if implementation == "chunked" else ()
    return {"chunk_size": max(sizes)} if sizes else {}


def small_chunks(name):
    """The smaller chunk size of a row: T = 4 C + 7."""
    sizes = ROWS[name].chunk_sizes
    assert not sizes or divmod(LENGTH, min(sizes)) == (4, 7)
    return {"chunk_size": min(sizes)} if sizes else {}


@functools.cache
def forward(name, implementation):
    """A compiled call without gradients: output, state, and what is observed of the state."""
    spec = ROWS[name]

    def run(arrays, state):
        output, last = spec.op(**arrays, initial_state=state, implementation=implementation, **spec.options)
        return output, last, spec.observe(last)

    return jax.jit(run)


def holds_tokens(state):
    """Whether a state is a cache, which grows."""
    return hasattr(state, "valid")


def nothing_stored(state):
    """The state of a sequence that starts, of the same structure: zeros, or a cache with no valid slot."""
    if holds_tokens(state):
        return dataclasses.replace(state, valid=np.zeros_like(state.valid))
    return jax.tree.map(np.zeros_like, state)


@functools.cache
def oracle(name, dtype="float64", packed=None, used=LENGTH, started=True):
    """The recurrence in float64 on inputs rounded to `dtype`.

    Only the first `used` tokens are not padding, and by default one segment where these are not all; where not
    `started`, the state holds nothing.
    """
    arrays, state = inputs(name)
    state = state if started else nothing_stored(state)
    arrays = cast(cast(arrays, dtype), "float32") if dtype != "float64" else arrays
    state = cast(state, "float32") if dtype != "float64" else state
    packed = used == LENGTH if packed is None else packed
    ids = packed_ids()[0] if packed else np.ones((BATCH, LENGTH), np.int32)
    ids = np.where(np.arange(LENGTH)[None] < used, ids, 0)
    with jax.enable_x64(True):
        return evaluate(name, "recurrent", cast(arrays, "float64"), cast(state, "float64"), ids)[0]


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


def evaluate_main(name, implementation, arrays, state, ids, **weights):
    """`evaluate` in the program on which an implementation's properties are shown."""
    dtype = MAIN[implementation]
    with jax.enable_x64(dtype == "float64"):
        arrays, state = cast((arrays, state), dtype)
        return evaluate(name, implementation, arrays, state, ids, **weights, **large_chunks(name, implementation))


@pytest.mark.parametrize("name", CHUNKED)
def test_packed_against_oracle(name):
    """T = 2 C + 7 where the form has chunks."""
    (arrays, state), kind = inputs(name), large_chunks(name, "chunked")
    assert not kind or divmod(LENGTH, kind["chunk_size"]) == (2, 7)
    got, _ = evaluate_main(name, "chunked", arrays, state, packed_ids()[0])
    assert all(x.dtype == jnp.float32 for x in (got["output"], *jax.tree.leaves(got["state"])))
    check(got, oracle(name, "float32"), "float32", name)


@each
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_never_reaches_a_valid_token(name, implementation, value):
    """Every array holds NaN or infinity at padding."""
    (arrays, state), ids, dtype = inputs(name), packed_ids()[0], MAIN[implementation]
    arrays = {
        key: np.where((ids == 0).reshape(*ids.shape, *(1,) * (x.ndim - 2)), value, x) for key, x in arrays.items()
    }
    got, last = evaluate_main(name, implementation, arrays, state, ids)
    check(got, oracle(name, dtype), dtype, name)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(last))
    assert all(np.all(np.asarray(x)[ids == 0] == 0) for x in got["gradients"][0].values())


def lay_on_mesh(mesh, name, arrays, state):
    """Arrays and state with batch over "data" and heads over "tensor", ids with batch over "data"."""
    heads = {"q": -2, "k": -2, "v": -2, "w": -2, "beta": -1, "alpha": -1, "level_weights": -2, "ridge": -2}

    def put(key, x, axis):
        spec = ["data", *[None] * (x.ndim - 1)]
        if axis is not None and x.shape[axis] % mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    arrays = {key: put(key, x, 2 if key == "decay" else x.ndim + heads[key]) for key, x in arrays.items()}
    of_state = {5: 1, 4: 2 if holds_tokens(state) else 1, 3: 2}
    scalar = NamedSharding(mesh, P())
    place = lambda x: put("state", x, of_state.get(x.ndim)) if x.ndim else jax.device_put(x, scalar)  # noqa: E731
    return arrays, jax.tree.map(place, state)


@pytest.mark.parametrize(
    ("name", "kind", "implementation"), SHARDED, ids=[f"{name}-{kind.name}-{i}" for name, kind, i in SHARDED]
)
def test_sharded(name, kind, implementation):
    """Batch and heads over a mesh of eight devices, nothing is gathered; see `meshes` for what a row runs.

    The chunked form has T = 4 C + 7.
    """
    arrays, state = inputs(name)
    ids, weights = packed_ids()[0], (np.ones(LENGTH, np.float32), np.ones((), np.float32))
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "spare"), axis_types=(kind,) * 3)
    dtype = "float64" if implementation == "chunked" else "float32"
    sizes = small_chunks(name) if dtype == "float64" else {}
    with jax.enable_x64(dtype == "float64"), jax.set_mesh(mesh):
        arrays, state = lay_on_mesh(mesh, name, cast(arrays, dtype), cast(state, dtype))
        ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
        program = compiled(name, implementation, **sizes).lower(arrays, state, ids, *weights).compile()
        got, last = program(arrays, state, ids, *weights)
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    check(got, oracle(name, dtype), dtype, f"{name} {implementation}")
    assert got["output"].dtype == jnp.dtype(dtype)
    assert got["output"].sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor", None)), 4)
    pairs = [*zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True)]
    pairs += [(got["gradients"][0][key], x) for key, x in arrays.items()]
    for x, like in pairs:
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim), f"{name} {implementation}: {x.sharding}"


@pytest.mark.parametrize("name", ["delta_rule", "softmax_attention"])
def test_explicit_mesh_without_jit_and_inside_vmap(name):
    """Arrays on an Explicit mesh, no mesh set: eager, and mapped over a new axis (one op eagerly, one under jit)."""
    arrays, state = inputs(name)
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "spare"), axis_types=(AxisType.Explicit,) * 3)
    arrays, state = lay_on_mesh(mesh, name, cast(arrays, "float32"), cast(state, "float32"))

    def call(arrays, state):
        return ROWS[name].op(**arrays, initial_state=state, **ROWS[name].options)[0]

    mapped = jax.vmap(call, in_axes=(0, None))
    mapped = mapped if name == "delta_rule" else jax.jit(mapped)
    want = oracle(name, "float32", packed=False)["output"]
    heads = P("data", None, "tensor", None)
    for got in (call(arrays, state), mapped(jax.tree.map(lambda x: x[None], arrays), state)[0]):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, heads), 4)
        assert_close(got, want, FORWARD["float32"], name)


@pytest.mark.parametrize(("name", "tokens"), LENGTHS, ids=[f"{name}-{tokens}" for name, tokens in LENGTHS])
def test_odd_lengths(name, tokens):
    """One token, a token less than a chunk and a whole chunk, without segments, against the oracle with padding."""
    arrays, state = inputs(name)
    size = min(ROWS[name].chunk_sizes, default=16)
    kind = {"chunk_size": size} if ROWS[name].chunk_sizes else {}
    length = {"1": 1, "C": size, "C - 1": size - 1}[tokens]
    cut = {key: value[:, :length] for key, value in arrays.items()}
    got, _ = evaluate(name, "chunked", cast(cut, "float32"), cast(state, "float32"), **kind)
    check(got, first_tokens(oracle(name, "float32", used=length), length), "float32", f"{name} length {length}")


def evaluate_alone(name, implementation, arrays, state, **weights):
    """`evaluate_main` on one segment of a few tokens, followed by padding."""
    length = arrays["v"].shape[1]
    ids = np.broadcast_to(np.arange(LENGTH) < length, (BATCH, LENGTH)).astype(np.int32)
    longer = {key: np.pad(x, [(0, 0), (0, LENGTH - length)] + [(0, 0)] * (x.ndim - 2)) for key, x in arrays.items()}
    result, last = evaluate_main(name, implementation, longer, state, ids, **weights)
    return first_tokens(result, length), last


@each
def test_packed_equals_unpacked(name, implementation):
    """Each segment alone agrees with the packed call; the state starts the first and is that of the last."""
    (arrays, state), (ids, places), dtype = inputs(name), packed_ids(), MAIN[implementation]
    whole, _ = evaluate_main(name, implementation, arrays, state, ids)
    rows = np.arange(BATCH)[:, None]
    for part, start in enumerate((state, nothing_stored(state), nothing_stored(state))):
        tokens = places[:, part]
        cut = {key: value[rows, tokens] for key, value in arrays.items()}
        got = evaluate_alone(name, implementation, cut, start, state_weight=float(part == 2))[0]
        want, (gradients, of_start) = whole["output"][rows, tokens], whole["gradients"]
        assert_close(got["output"], want, FORWARD[dtype], f"{name} segment {part}")
        gradients = {key: value[rows, tokens] for key, value in gradients.items()}
        assert_close(got["gradients"][0], gradients, GRADIENT[dtype], f"{name} segment {part}")
        if part == 0:
            assert_close(got["gradients"][1], of_start, GRADIENT[dtype], f"{name} start")
        if part == 2:
            assert_close(got["state"], whole["state"], FORWARD[dtype], f"{name} state")
    assert np.all(whole["output"][ids == 0] == 0)


# A cache that has grown needs a program of its own, so that each row of such an op has one of the implementations.
CONTINUED = [
    (name, implementation)
    for name, implementation in EACH
    if ROWS[name].scope not in ("softmax_attention", "deltaformer") or (implementation == "chunked") == (name in LAST)
]


@pytest.mark.parametrize(("name", "implementation"), CONTINUED, ids=["-".join(pair) for pair in CONTINUED])
def test_two_calls_equal_one(name, implementation):
    (arrays, state), dtype = inputs(name), MAIN[implementation]
    ids = np.where(np.arange(LENGTH)[None] < 2 * PIECE, 1, np.zeros((BATCH, 1), np.int32))
    whole, _ = evaluate_main(name, implementation, arrays, state, ids)
    for part in range(2):
        tokens = slice(part * PIECE, (part + 1) * PIECE)
        cut = {key: x[:, tokens] for key, x in arrays.items()}
        if part and holds_tokens(state):
            with jax.enable_x64(dtype == "float64"):
                output, state, seen = forward(name, implementation)(cast(cut, dtype), state)
        else:
            got, state = evaluate_alone(name, implementation, cut, state)
            output, seen = got["output"], got["state"]
        assert_close(output, whole["output"][:, tokens], FORWARD[dtype], f"{name} call {part}")
    assert_close(seen, whole["state"], FORWARD[dtype], f"{name} state")


@pytest.mark.parametrize("name", SUITE)
def test_decoding_equals_the_whole(name):
    """Two tokens where a cache grows, each with a program of its own; else four."""
    arrays, state = inputs(name)
    state = cast(state, "float32")
    steps = 2 if holds_tokens(state) else 4
    want = oracle(name, "float32", used=steps)
    for t in range(steps):
        token = cast({key: x[:, t : t + 1] for key, x in arrays.items()}, "float32")
        output, state, seen = forward(name, None)(token, state)
        assert_close(output, want["output"][:, t : t + 1], FORWARD["float32"], f"{name} token {t}")
    assert_close(seen, want["state"], FORWARD["float32"], f"{name} state")


# The chunked form of each op, and the recurrence of one op per family; attention with a decay.
VMAPPED = [
    (name, i) for name in FIRST for i in ROWS[name].implementations if i == "chunked" or ROWS[name].scope in WHOLE
]
VMAPPED[VMAPPED.index(("softmax_attention", "chunked"))] = ("softmax_attention_decay", "chunked")


@pytest.mark.parametrize(("name", "implementation"), VMAPPED, ids=["-".join(pair) for pair in VMAPPED])
def test_vmap_in_bfloat16(name, implementation):
    """Mapping over batch rows agrees with the batch; the recurrence continues a state, the chunked form has none."""
    (arrays, state), started = inputs(name), implementation == "recurrent"

    def alone(x):
        x = np.asarray(x)
        return jnp.asarray(x[:, None] if x.ndim else np.broadcast_to(x, (BATCH,)))

    state = cast(state, "float32") if started else None
    mapped = jax.tree.map(alone, (cast(arrays, "bfloat16"), state, packed_ids()[0]))
    got, _ = compiled(name, implementation, mapped=True)(*mapped, np.ones(LENGTH, np.float32), np.ones((), np.float32))
    want = oracle(name, "bfloat16", started=started)
    got = jax.tree.map(lambda x: np.asarray(x)[:, 0], {key: got[key] for key in want})
    assert got["output"].dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got["state"])) or not started
    if not started:
        # the gradient of an empty state is not asked for
        want = {**want, "gradients": (want["gradients"][0], [])}
    check(got, want, "bfloat16", name)


@each
def test_output_does_not_depend_on_later_tokens(name, implementation):
    (arrays, state), seen = inputs(name), 37
    weight, ids = (np.arange(LENGTH) < seen).astype(np.float32), np.ones((BATCH, LENGTH), np.int32)
    got, _ = evaluate_main(name, implementation, arrays, state, ids, output_weight=weight, state_weight=0.0)
    for key, gradient in got["gradients"][0].items():
        assert np.all(gradient[:, seen:] == 0), f"{name}: a later {key} moves an earlier output"
        assert np.any(gradient[:, :seen] != 0), f"{name}: {key} moves nothing"


@pytest.mark.parametrize("name", SUITE)
def test_gradients_of_the_oracle_against_finite_differences(name):
    """Five tokens and padding, in the oracle's program."""
    ids = np.zeros((BATCH, LENGTH), np.int32)
    ids[:, :5] = [[3, 3, 0, 3, 4], [1, 1, 1, 1, 1]]
    rng, step = np.random.default_rng(3), 1e-6
    floats, join = split_floats(inputs(name))

    def value(floats):
        with jax.enable_x64(True):
            arrays, state = cast(join(floats), "float64")
            result, _ = evaluate(name, "recurrent", arrays, state, ids)
        total = sum(np.sum(np.sin(x)) for x in jax.tree.leaves((result["output"], result["state"])))
        return total, jax.tree.leaves(result["gradients"])

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


def scopes(jaxpr):
    """Names of all scopes of a program."""
    names = {str(equation.source_info.name_stack) for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                names |= scopes(getattr(inner, "jaxpr", inner))
    return names


@pytest.mark.parametrize("name", FIRST)
def test_which_implementation_ran(name):
    """The program names it, and that of None names one."""
    spec, arrays = ROWS[name], cast(inputs(name)[0], "float32")

    def ran(implementation):
        call = lambda arrays: spec.op(**arrays, implementation=implementation, **spec.options)  # noqa: E731
        seen = scopes(jax.make_jaxpr(call)(arrays))
        return [i for i in spec.implementations if any(f"memformer.{spec.scope}.{i}" in stack for stack in seen)]

    for implementation in spec.implementations:
        assert ran(implementation) == [implementation]
    assert len(ran(None)) == 1


def new_arguments(name):
    """Arguments and options of a row that no earlier row of its op has."""
    earlier = [row for row in SUITE[: SUITE.index(name)] if ROWS[row].scope == ROWS[name].scope]
    return set(inputs(name, 5)[0]).union(ROWS[name].options) - {
        key for row in earlier for key in (*inputs(row, 5)[0], *ROWS[row].options)
    }


@pytest.mark.parametrize("name", [name for name in SUITE if new_arguments(name)])
def test_bad_input(name):
    """A ValueError names the argument, what was expected and what was given: each argument in one row of an op."""
    spec, wide, new = ROWS[name], inputs(name, 5)[0], new_arguments(name)
    arrays = cast(wide, "float32")

    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            # traced: what runs before the check would be compiled operation by operation
            jax.eval_shape(lambda: spec.op(**{**arrays, **spec.options, **changes}))

    for key, x in ((key, x.astype("float32")) for key, x in wide.items() if key in new):
        refuses(rf"{key} must be .*got", **{key: jnp.asarray(x[0])})
        refuses(rf"{key} must have a floating dtype, got int32", **{key: jnp.asarray(x.astype("int32"))})
        refuses(rf"{key} must be an array, got list", **{key: x.tolist()})
        if key != "q":
            refuses(rf"{key} must be .*got", **{key: jnp.asarray(x[:, :-1])})
    accepted = inspect.signature(spec.op).parameters
    for option, value in (("scale", "big"), ("scale", np.nan), ("causal", None), ("normalize", "yes"), ("beta", None)):
        if option in accepted and (option, spec.scope) != ("beta", "deltaformer") and ("q" in new or option in new):
            refuses(f"{option} must be .*got", **{option: value})
    if "q" not in new:
        return
    refuses(r"segment_ids must be \[B, T\] = \(2, 5\), got \(2, 4\)", segment_ids=jnp.asarray(np.ones((2, 4), "int32")))
    refuses("segment_ids must have a", segment_ids=jnp.asarray(np.ones((2, 5), "float32")))
    refuses("implementation must be None or one of", implementation="fast")
    if spec.chunk_sizes:
        refuses("chunk_size must be a positive integer or None, got 0", chunk_size=0)
    with pytest.raises(NotImplementedError, match="'chunked'"):
        jax.eval_shape(lambda: spec.op(**arrays, **spec.options, implementation="pallas"))
