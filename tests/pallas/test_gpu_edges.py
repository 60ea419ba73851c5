"""GPU kernels at the edge: forgetting, padding, Explicit meshes, large batches, second derivatives; see test_gpu.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import memformer as mf
from memformer.pallas.gpu import checks
from memformer.pallas.gpu.checks import launch_grid
from tests.numeric import assert_close
from tests.ops import test_ops as suite
from tests.pallas.test_gpu import H200, interpreter, interprets

__all__ = ["interpreter"]


@interprets
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_forgetting(op, interpreter):
    """Tokens that forget everything, 90 of them in a row, do not blur the decays of their neighbours."""
    rng = np.random.default_rng(5)
    length, width = 192, 16
    decay = np.full((1, length, 1), -0.3)
    decay[:, 20] = -np.inf
    decay[:, 30:120] = rng.choice([-np.inf, -1e7, -1e4, -800.0], (1, 90, 1))
    arrays = {name: suite.cast(rng.standard_normal((1, length, 1, width)), "bfloat16") for name in "qkv"}
    arrays["decay"] = jnp.asarray(decay, "float32")
    if op == "delta_rule":
        arrays["k"] = suite.cast(mf.l2norm(arrays["k"]), "bfloat16")
        arrays["beta"] = jnp.asarray(rng.uniform(0.0, 2.0, (1, length, 1)), "float32")

    def run(arrays, implementation):
        def loss(arrays):
            output, state = getattr(mf, op)(**arrays, implementation=implementation)
            return jnp.sum(state), (output, state)

        (_, (output, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return output, state, gradients

    output, state, gradients = run(arrays, "pallas")
    with jax.enable_x64(True):
        wide = suite.cast(jax.tree.map(np.asarray, arrays), "float64")
        want, want_state, want_gradients = jax.tree.map(np.asarray, run(wide, "recurrent"))
    assert_close(state, want_state, 1e-4, "state")
    assert_close(output, want, 1e-2, "output")
    assert_close(gradients, want_gradients, 2e-2, "gradient")


def fill_cache(cache, value):
    """The cache with `value` in the slots that no query sees."""
    return jax.tree.map(lambda x: jnp.where(cache.valid[..., None, None], x, value) if x.ndim == 4 else x, cache)


@interprets
@pytest.mark.parametrize("op", ["delta_rule", "softmax_attention", "deltaformer"])
def test_padding_does_not_matter(op, interpreter):
    """NaN and infinity at padding, and in slots of a cache that no query sees, reach no output and no gradient."""
    rng = np.random.default_rng(6)
    valid = np.array([False] * 3 + [True] * 30 + [False] * 3 + [True] * 12 + [False] * 2)
    ids = jnp.asarray(np.where(valid, 1 + (np.arange(50) > 33), 0)[None], jnp.int32)
    arrays = {name: rng.standard_normal((1, 50, 1, 16)) for name in "qkv"}
    if op == "deltaformer":
        arrays |= {"w": rng.standard_normal((1, 50, 1, 16)), "alpha": rng.uniform(0, 1, (1, 50, 1))}
    if op != "softmax_attention":
        arrays["beta"] = rng.uniform(0, 1, (1, 50, 1))
    if op == "delta_rule":
        arrays["decay"] = -rng.uniform(0, 1, (1, 50, 1))
    start = None
    if op != "delta_rule":
        slots = jnp.asarray(rng.standard_normal((1, 20, 1, 16)), "bfloat16")
        seen = jnp.asarray(np.arange(20) > 4)[None]
        kind, values = (mf.KVCache, slots) if op == "softmax_attention" else (mf.DeltaCache, slots.astype("float32"))
        start = kind(slots, values, seen, jnp.int32(20))

    @jax.jit
    def run(arrays, start):
        def loss(arrays):
            output, _ = getattr(mf, op)(**arrays, segment_ids=ids, initial_state=start, implementation="pallas")
            return jnp.sum(output.astype("float32") ** 2), output

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    def filled(value):
        changed = {name: np.where(valid.reshape(1, -1, *(1,) * (x.ndim - 2)), x, value) for name, x in arrays.items()}
        return {name: jnp.asarray(x, "bfloat16" if x.ndim == 4 else "float32") for name, x in changed.items()}

    (_, want), gradients = run(filled(0.0), start)
    for value in (np.nan, np.inf):
        (_, got), got_gradients = run(filled(value), fill_cache(start, value))
        np.testing.assert_array_equal(got[:, valid], want[:, valid])
        for name, x in gradients.items():
            np.testing.assert_array_equal(got_gradients[name][:, valid], x[:, valid], err_msg=name)
            assert np.isfinite(np.asarray(got_gradients[name], np.float32)).all(), name


def test_more_batch_rows_than_65535():
    """They take the grid axis that has no such bound, also where vmap adds to them; two such axes are refused."""
    names = ("batch_row", "head", "block")
    assert launch_grid((2, 3, 70_000), names) == {"grid": (2, 3, 70_000), "grid_names": names}
    for wide, order in (((70_000, 3, 5), (1, 2, 0)), ((2, 70_000, 5), (0, 2, 1))):
        turned = {"grid": tuple(wide[axis] for axis in order), "grid_names": tuple(names[axis] for axis in order)}
        assert launch_grid(wide, names) == turned
    with pytest.raises(NotImplementedError, match="got 70000 batch rows, 3 heads, 70000 blocks"):
        launch_grid((70_000, 3, 70_000), names)
    x = jax.ShapeDtypeStruct((70_000, 16, 1, 4), jnp.bfloat16)
    part = jax.ShapeDtypeStruct((700, 100, 16, 1, 4), jnp.bfloat16)
    for op in (mf.linear_attention, mf.softmax_attention):
        with jax.sharding.use_abstract_mesh(H200):
            for x_, axes in ((x, 0), (part, 1)):
                run = functools.partial(lambda op, x: op(x, x, x, implementation="pallas")[0], op)
                program = str(jax.make_jaxpr(jax.vmap(run) if axes else run)(x_))
                assert "grid=(1, 1, 70000)" in program, program


@interprets
def test_batch_rows_on_the_last_axis(interpreter, monkeypatch):
    """The order of the axes does not change the result."""
    monkeypatch.setattr(checks, "MOST_PROGRAMS", 1)
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 50, 1, 16)), "bfloat16") for _ in "qkv")
    got, state = mf.linear_attention(q, k, v, implementation="pallas")
    want, want_state = mf.linear_attention(q, k, v, implementation="recurrent")
    assert_close(got, want, 2e-2, "output")
    assert_close(state, want_state, 1e-2, "state")


def shard_maps(jaxpr):
    """All shard_map equations of a program, nested ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "shard_map":
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shard_maps(inner)


OPS = ["delta_rule", "linear_attention", "softmax_attention", "deltaformer"]


CASES = [*((op, 2, False) for op in OPS), ("delta_rule", 1, False), ("softmax_attention", 1, False)]


@pytest.mark.parametrize(("op", "groups", "channel"), [*CASES, ("delta_rule", 2, True)])
def test_explicit_mesh(op, groups, channel):
    """On Explicit axes of any name each device runs the kernels on its own batch rows and heads, both ways.

    One key head that all devices share is repeated.
    """
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    mesh = AbstractMesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device)
    place = NamedSharding(mesh, PartitionSpec("x", None, "y"))
    names = {"q": groups, "k": groups, "v": groups} | {"v" if op in ("delta_rule", "linear_attention") else "q": 4}
    arrays = {}
    for name, heads in names.items():
        spec = PartitionSpec("x", None, None if heads == 1 else "y")
        arrays[name] = jax.ShapeDtypeStruct((4, 70, heads, 16), "bfloat16", sharding=NamedSharding(mesh, spec))
    if op == "delta_rule":
        arrays["beta"] = jax.ShapeDtypeStruct((4, 70, 4), "float32", sharding=place)
    if channel:
        arrays |= {"w": arrays["k"], "alpha": arrays["beta"], "decay": arrays["v"]}

    def loss(arrays):
        return jnp.sum(getattr(mf, op)(**arrays, implementation="pallas")[0].astype("float32"))

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(loss))(arrays)
    wanted = [("x", None, None if x.shape[2] == 1 else "y") for x in jax.tree.leaves(arrays)]
    assert [aval.sharding.spec[:3] for aval in program.out_avals] == wanted
    found = list(shard_maps(program.jaxpr))
    assert len(found) >= 2
    for spec in (spec for eqn in found for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"])):
        assert tuple(spec) in ((("x",), ("y",)), ("x", "y"), ("x", None, "y"), (("x",), None, ("y",)))


@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention", "deltaformer"])
def test_other_derivatives_name_what_has_them(op):
    x = jax.ShapeDtypeStruct((1, 70, 1, 16), jnp.bfloat16)

    def loss(x):
        return jnp.sum(getattr(mf, op)(x, x, x, implementation="pallas")[0].astype("float32"))

    with jax.sharding.use_abstract_mesh(H200), pytest.raises(NotImplementedError, match="implementation='recurrent'"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x).astype("float32"))), x)
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(NotImplementedError, match="has no forward mode"):
        jax.eval_shape(lambda x: jax.jvp(loss, (x,), (x,)), x)
