"""Kernels for a few tokens of a matrix memory on GPU in Pallas' interpreter, against the recurrence in float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import memformer as mf
from memformer.models import MemoryLM, from_preset
from memformer.pallas.gpu.attention import decoding as attention_decoding
from memformer.pallas.gpu.matrix_memory import decoding
from tests.numeric import assert_close
from tests.pallas import cached_steps
from tests.pallas.test_gpu import H200, interpreter, interprets
from tests.pallas.test_gpu_edges import shard_maps
from tests.pallas.test_tpu_decoding import IDS, arguments, cast, compare, step_program

__all__ = ["interpreter"]

# The package has a function of this name.
generate = importlib.import_module("memformer.models.generate")

CASES = {
    "product": (mf.delta_product, {"groups": 3, "writes": 2, "decay": "head", "value": 64}, "float32", True),
    "erase": (mf.delta_rule, {"decay": "channel", "erase": True, "value": 32}, "bfloat16", True),
    "linear": (mf.linear_attention, {"beta": False, "decay": "channel", "tokens": 1, "value": 32}, "bfloat16", False),
    "equal keys": (mf.delta_rule, {"tokens": 8, "value": 32, "equal": True}, "bfloat16", False),
}


@interprets
@pytest.mark.parametrize("name", CASES)
def test_against_recurrence(name, interpreter):  # noqa: F811
    """Shared heads, several writes, packed sequences, decays of -inf, equal keys."""
    op, kind, dtype, packed = CASES[name]
    compare(op, arguments(np.random.default_rng(3), **kind), dtype, 2e-6, IDS if packed else None)


@interprets
def test_mapped(interpreter):  # noqa: F811
    """vmap folds its axis into the batch."""
    arrays = cast(arguments(np.random.default_rng(6), tokens=1, value=32, heads=1), "float32")
    mapped = jax.vmap(lambda v: mf.delta_rule(**arrays | {"v": v}, implementation="pallas")[0])
    got = mapped(jnp.stack([arrays["v"], 2 * arrays["v"]]))[1]
    assert_close(got, mf.delta_rule(**arrays | {"v": 2 * arrays["v"]}, implementation="recurrent")[0], 1e-6)


def test_blocks_of_columns():
    """As wide as the registers allow, narrower where few heads would leave SMs without work."""
    assert decoding._block_columns(2048, 128, 128) == 128
    assert decoding._block_columns(2048, 256, 256) == 64
    assert decoding._block_columns(2048, 64, 96) == 96
    assert decoding._block_columns(16, 128, 128) == 32
    assert decoding._block_columns(40, 128, 128) == 32
    assert decoding._block_columns(80, 128, 128) == 64


@pytest.mark.parametrize("memory", ["gated_delta_rule", "gla"])
def test_generation_takes_them(memory):
    """By default: a step of a model calls one kernel per layer, and no loop."""
    config = from_preset("tiny", memory=memory, width=128, heads=2)
    text = step_program(config, H200)
    op = "linear_attention" if memory == "gla" else "delta_rule"
    assert text.count(f"name=memformer_{op}_decode") == config.depth and "while" not in text


@pytest.mark.parametrize("memory", ["softmax_attention", "gated_deltaformer"])
def test_generation_reads_the_cache(memory):
    """By default a step of a model with a cache calls one kernel per layer."""
    config = from_preset("tiny", memory=memory, width=128, heads=2, dtype="bfloat16")
    text = step_program(config, H200, capacity=128)
    assert text.count("name=memformer_attention_decode") == config.depth


def test_capacities_of_generation():
    """Whole tiles of slots, so that any prompt is served; no more than there are learned positions."""
    models = [
        nnx.eval_shape(lambda kind=kind: MemoryLM(kind, vocab_size=11, rngs=nnx.Rngs(0)))
        for kind in (from_preset("tiny", depth=1), from_preset("tiny", depth=1, positions="learned", max_length=100))
    ]
    found = [[generate._find_capacity(model, tokens) for tokens in (1, 64, 65, 101)] for model in models]
    assert found == [[64, 64, 128, 128], [64, 64, 100, 101]]


def on_explicit_mesh(**shapes):
    """A mesh of four GPUs, and arrays of these shapes with rows and heads over it."""
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    mesh = AbstractMesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device)
    place = NamedSharding(mesh, PartitionSpec("x", None, "y"))
    return mesh, {name: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=place) for name, shape in shapes.items()}


def test_explicit_mesh():
    """Every device decodes its own rows and heads."""
    mesh, arrays = on_explicit_mesh(q=(4, 1, 2, 64), k=(4, 1, 2, 64), v=(4, 1, 4, 64), beta=(4, 1, 4))
    start = jax.ShapeDtypeStruct((4, 4, 64, 64), "float32", sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(lambda arrays, start: mf.delta_rule(**arrays, initial_state=start))(arrays, start)
    (found,) = shard_maps(program.jaxpr)
    assert [aval.sharding.spec[:3] for aval in program.out_avals] == [("x", None, "y"), ("x", "y", None)]
    assert str(found.params["in_specs"][-1]).count("x") == 1 and "memformer_delta_rule_decode" in str(program)


REFUSED = {
    "widths": ((1, 1, 2, 8), "float32", "value channels in multiples of 32"),
    "float64": ((1, 1, 2, 32), "float64", "has no float64"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_say_why(why):
    shape, dtype, message = REFUSED[why]
    with jax.enable_x64(dtype == "float64"), jax.sharding.use_abstract_mesh(H200):
        x = jax.ShapeDtypeStruct(shape, dtype)
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda x: mf.linear_attention(x, x, x, implementation="pallas"), x)
        assert "mpmd_map" not in str(jax.make_jaxpr(lambda x: mf.linear_attention(x, x, x))(x))


def test_cache_on_an_explicit_mesh():
    """Every device reads its own rows and key heads of the cache."""
    mesh, arrays = on_explicit_mesh(q=(4, 1, 4, 64), k=(4, 1, 2, 64), v=(4, 1, 2, 64), beta=(4, 1, 2))
    empty = functools.partial(mf.init_cache, "deltaformer", batch=4, capacity=64, groups=2, key_width=64)
    cache = jax.eval_shape(lambda: empty(value_width=64, dtype="bfloat16"))
    specs = {3: PartitionSpec("x", None, "y"), 4: PartitionSpec("x", None, "y"), 2: PartitionSpec("x")}
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, specs.get(x.ndim, PartitionSpec()))
        ),
        cache,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        call = lambda arrays, cache: mf.deltaformer(**arrays, initial_state=cache)  # noqa: E731
        program = jax.make_jaxpr(call)(arrays, cache)
    (found,) = shard_maps(program.jaxpr)
    assert str(found.params["in_specs"][2]) == str(PartitionSpec(("x",), None, ("y",)))
    assert "memformer_attention_decode" in str(program)
    assert program.out_avals[0].sharding.spec[:3] == ("x", None, "y")


CACHE_REFUSED = {
    "capacity": (100, 64, "bfloat16", {}, "a capacity in multiples of 8 from 64"),
    "channels": (64, 96, "bfloat16", {}, "channels in multiples of 64 up to 256, got 96 and 96"),
    "float32": (64, 64, "float32", {}, "takes bfloat16 or float16"),
    "precision": (64, 64, "bfloat16", {"precision": "highest"}, "default precision only"),
}


@pytest.mark.parametrize("why", CACHE_REFUSED)
def test_caches_that_no_kernel_reads(why):
    """Refused by name; the default is the recurrence."""
    slots, width, dtype, options, message = CACHE_REFUSED[why]
    x = jax.ShapeDtypeStruct((1, 1, 2, width), dtype)
    sizes = {"batch": 1, "capacity": slots, "groups": 2, "key_width": width, "value_width": width}
    cache = mf.init_cache("softmax_attention", **sizes, dtype=dtype)
    call = functools.partial(mf.softmax_attention, initial_state=cache, **options)
    with jax.sharding.use_abstract_mesh(H200):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda x: call(x, x, x, implementation="pallas"), x)
        assert "mpmd_map" not in str(jax.make_jaxpr(lambda x: call(x, x, x))(x))


# Programs that share the slots, from the default of one program where there are so few: 4 tiles in one or in two.
CACHED = dict.fromkeys(cached_steps.CASES, ("bfloat16", 1)) | {"attention": ("float16", 2)}


@interprets
@pytest.mark.parametrize("name", CACHED)
def test_attention_over_a_cache(name, interpreter, monkeypatch):  # noqa: F811
    """Shared heads, a padded prompt, then one token and three packed ones, in one case on more than 64 rows.

    But for that case the last tile of slots overlaps the one before.
    """
    dtype, programs = CACHED[name]
    monkeypatch.setattr(attention_decoding, "LEAST_TILES", 4 // programs)
    heads, capacity = (24, 256) if dtype == "float16" else (2, 248)
    cached_steps.check(name, dtype, 1e-2, heads=heads, groups=1, width=64, capacity=capacity, prompt=200)
