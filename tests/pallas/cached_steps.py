"""Few tokens of attention over a cache of fixed capacity, against the recurrence in float64; for both chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from tests.numeric import assert_close
from tests.ops.test_ops import cast

# Three tokens: a start in a row, and padding.
IDS = np.array([[1, 1, 2], [1, 0, 1]], np.int32)

LINEAR = {"write_kernel": "linear"}
CASES = {
    "attention": ("softmax_attention", {}),
    "forgetting": ("softmax_attention", {"decay": True, "sinks": True, "window": 5}),
    "deltaformer": ("deltaformer", {}),
    "linear write": ("deltaformer", LINEAR | {"decay": True, "sinks": True, "alpha": True, "w": True}),
    "round": ("deltaformer", {"write_kernel": "round", "read_kernel": "linear", "window": 7}),
}


def _tokens(rng, name, length, heads, groups, width):
    op, options = CASES[name]
    arrays = {"q": heads, "k": groups, "v": groups}
    arrays = {x: rng.standard_normal((2, length, count, width)) for x, count in arrays.items()}
    if op == "deltaformer":
        # No inner product of unit keys is close to a half, where rounding would decide.
        arrays["k"] = rng.choice([-1.0, 1.0], arrays["k"].shape) / width**0.5
        arrays["beta"] = rng.uniform(0.0, 1.0, (2, length, groups))
    if "w" in options:
        arrays["w"] = rng.standard_normal(arrays["k"].shape) / width**0.5
    if "alpha" in options:
        arrays["alpha"] = rng.uniform(0.0, 1.0, (2, length, groups))
    if "decay" in options:
        arrays["decay"] = -rng.uniform(0.0, 2.0, (2, length, groups if op == "deltaformer" else heads))
        arrays["decay"][0, -1] = -np.inf
    if "sinks" in options:
        arrays["sinks"] = rng.standard_normal((heads,))
    return arrays


def check(name, dtype, tolerance, *, heads, groups, width, capacity, prompt=30, alone=True):
    """Runs one token (unless `alone` is false) and three packed ones after a prompt with padding in front.

    The recurrence makes the prompt's cache for both.
    """
    op, options = CASES[name]
    run_op = getattr(mf, op)
    fixed = {key: x for key, x in options.items() if x is not True}
    rng = np.random.default_rng(9)
    calls = [_tokens(rng, name, length, heads, groups, width) for length in (prompt, 1, 3)]
    float32 = ("beta", "alpha", "decay", "sinks")
    calls = [{key: cast(x, "float32" if key in float32 else dtype) for key, x in call.items()} for call in calls]
    decays = {"decay_heads": calls[0]["decay"].shape[2]} if "decay" in calls[0] else {}
    empty = functools.partial(mf.init_cache, op, batch=2, capacity=capacity, groups=groups, key_width=width)

    ids = np.ones((2, prompt), np.int32)
    ids[0, :4] = 0

    def run(calls, cache, implementation):
        found = []
        for arrays, packed in list(zip(calls, (None, IDS), strict=True))[0 if alone else 1 :]:
            output, cache = run_op(
                **arrays, **fixed, segment_ids=packed, initial_state=cache, implementation=implementation
            )
            found += [output, cache.values[:, prompt : prompt + 4]]
        return found

    def reference(calls, cache):
        _, cache = run_op(**calls[0], **fixed, segment_ids=ids, initial_state=cache, implementation="recurrent")
        return cache, run(calls[1:], cache, "recurrent")

    with jax.enable_x64(True):
        exact = cast(jax.tree.map(lambda x: np.asarray(x, np.float64), calls), "float64")
        start = empty(value_width=width, dtype="float64", **decays)
        cache, want = jax.device_get(jax.jit(reference)(exact, start))
    cache = jax.tree.map(
        lambda x, like: jnp.asarray(x, like.dtype), cache, empty(value_width=width, dtype=dtype, **decays)
    )
    got = jax.jit(functools.partial(run, implementation="pallas"))(calls[1:], cache)
    assert_close(got, want, tolerance, name)
