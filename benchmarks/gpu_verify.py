"""The GPU kernels against float64, case by case: `python -m benchmarks.gpu --verify`, from a checkout.

What the ops' own suite holds (its rows, inputs and tolerances: tests/ops) and what kernels get wrong beside: wide
heads, odd sizes, keys that repeat, long calls, one head and many. Every case is run twice over memory full of NaN:
a result that moves is a race. Without an sm_90 GPU a few toy cases run by what serves there.
"""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from benchmarks import gpu_cases
from benchmarks.gpu_cases import Case
from benchmarks.gpu_worker import rounded

__all__ = ["names", "verify"]

# The checkout's tests are no package, and their types are not checked.
numeric: Any = importlib.import_module("tests.numeric")
suite: Any = importlib.import_module("tests.ops.test_ops")
hard_keys = importlib.import_module("tests.pallas.test_tpu").keys

# Relative RMS for calls of many tokens and for keys that repeat, gradients too; the suite has its own.
TOLERANCE = 2e-2

# Two runs may differ by the order of sums, no more.
MOVED = 1e-4

# Up to here the oracle is the recurrence; beyond, the chunked form in float64, which the tests hold to the recurrence.
RECURRENT = 1100

# No kernel has a decay per key channel: asked for by name they say so.
REFUSED = tuple(name for name in suite.ROWS if "channel" in name)


class Wide(NamedTuple):
    """A call; keys "random", "identical" or "close" (with beta 1.9 and 1), and whether a state is handed in."""

    case: Case
    keys: str = "random"
    start: bool = False

    @property
    def name(self) -> str:
        """As the table says it."""
        return f"{self.case.name}{f', {self.keys} keys' * (self.keys != 'random')}{', from a state' * self.start}"


def _wide() -> list[Wide]:
    cases = [
        Wide(Case(op, 1, 1000, 2, 1, width, width, decay, segments), start=bool(segments))
        for op in ("delta_rule", "linear_attention")
        for width in (64, 128)
        for decay in (False, True)
        for segments in (0, 3)
    ]
    writes = [("softmax", 64, 0), ("softmax", 64, 3), ("softmax", 128, 0), ("softmax", 128, 3)]
    writes += [(write, 128, 3) for write in ("linear", "relu", "round")]
    cases += [
        # Two parts of a write (pallas/gpu/tuning.py), of few heads.
        Wide(Case("deltaformer", 1, 1090, 2, 1, width, width, write=write, segments=segments))
        for write, width, segments in writes
    ]
    cases += [
        Wide(Case("softmax_attention", 1, 1000, 4, 2, width, width, segments=segments))
        for width in (64, 128)
        for segments in (0, 3)
    ]
    # Sizes that nothing divides.
    cases += [Wide(Case(op, 2, 77, 3, 3, 40, 24, segments=2)) for op in suite_ops()]
    cases += [
        Wide(Case(op, 1, 512, 2, 2, width, 128, write="linear"), keys)
        for op in ("delta_rule", "deltaformer")
        for keys in ("identical", "close")
        for width in (64, 128)
    ]
    # One head and many, of all batch rows: one part, and two.
    cases += [Wide(Case("deltaformer", *size, 64, 64)) for size in ((1, 320, 1, 1), (4, 320, 33, 33), (4, 320, 64, 64))]
    cases += [Wide(Case("deltaformer", *size, only_u=True)) for size in ((1, 1090, 1, 1), (1, 1090, 3, 3))]
    cases += [Wide(Case("deltaformer", 8, 600, 32, 32, 64, 64, only_u=True))]
    cases += [Wide(Case(op, 1, 8192, 2, 1, decay=op == "delta_rule")) for op in ("delta_rule", "linear_attention")]
    cases += [Wide(Case("deltaformer", 1, 4096, 1, 1)), Wide(Case("softmax_attention", 1, 4096, 1, 1, segments=2))]
    return cases


def suite_ops() -> list[str]:
    """Ops that have kernels, of those that gpu_cases knows."""
    return ["delta_rule", "linear_attention", "deltaformer", "softmax_attention"]


TOYS = [Wide(Case("delta_rule", 1, 40, 2, 1, 16, 16, segments=2), start=True)]
TOYS += [Wide(Case("deltaformer", 1, 40, 1, 1, 16, 16, write="linear"), "identical")]


class Result(NamedTuple):
    """What a call gives, beside what it should give, twice; and the tolerances."""

    got: Any
    again: Any
    want: Any
    output: float
    gradients: float
    text: str


def checks() -> dict[str, Callable[[str, str | None], Result]]:
    """What is done with every row of the suite."""
    return {"packed": packed, "lengths": lengths, "two calls": two_calls, "mapped": mapped}


def names(toy: bool) -> list[str]:
    """Every case, by name, the suite's first."""
    if toy:
        return ["delta_rule_grouped: packed", *(wide.name for wide in TOYS)]
    rows = [name for name in suite.ROWS if name not in REFUSED]
    found = [f"{name}: {check}" for check in checks() for name in rows]
    return found + [wide.name for wide in _wide()] + [f"{name}: refused" for name in REFUSED]


def verify(name: str, toy: bool) -> dict[str, Any]:
    """One case: errors of output and state, and of gradients, and whether all is well.

    Args:
      name: one of `names`.
      toy: whether there is no GPU, and the library chooses what runs.
    """
    implementation = None if toy else "pallas"
    row: dict[str, Any] = {"case": name, "met": False}
    row_name, _, check = name.partition(": ")
    if check == "refused":
        return row | refuses(row_name)
    if row_name in suite.ROWS:
        result = checks()[check](row_name, implementation)
    else:
        wide = next(wide for wide in (TOYS if toy else _wide()) if wide.name == name)
        result = wide_call(wide, implementation)
    outputs, gradients = errors(result.got, result.want)
    moved = max(errors(result.again, result.got))
    kernels = sorted(set(re.findall(r"memformer_[a-z_]+(?:forward|backward)", result.text)))
    row |= {"error": outputs, "gradient error": gradients, "moved": moved, "kernels": kernels}
    # A comparison with NaN is False.
    met = outputs <= result.output and gradients <= result.gradients and moved <= MOVED
    return row | {"met": bool(met) and (toy or "mosaic_gpu" in result.text)}


def refuses(name: str) -> dict[str, Any]:
    """Whether the op says why its kernel cannot serve."""
    arrays, state = suite.inputs(name)
    try:
        suite.evaluate(name, "pallas", suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"))
    except NotImplementedError as error:
        return {"met": "per key channel" in str(error), "says": str(error)}
    return {"says": "it served"}


def errors(got: Any, want: Any) -> tuple[float, float]:
    """The largest relative RMS of outputs and states, and of gradients; NaN where one is not a number."""

    def largest(part: Callable[[Any], Any]) -> float:
        pairs = zip(jax.tree.leaves(part(got)), jax.tree.leaves(part(want)), strict=True)
        return float(np.max([numeric.relative_rms(a, b) for a, b in pairs]))

    return largest(lambda x: (x["output"], x["state"])), largest(lambda x: x["gradients"])


def exact(call: Callable[[], Any]) -> Any:
    """What a call gives on the CPU in float64, as numpy arrays."""
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        return jax.tree.map(np.asarray, call())


def poison() -> None:
    """Fills free memory of the device with NaN: what a kernel does not write shows."""
    if jax.default_backend() == "gpu":
        jax.block_until_ready(jnp.full(2**28, jnp.nan, jnp.float32)).delete()


def twice(call: Callable[[], Any]) -> tuple[Any, Any]:
    """A call's result, two times."""
    results = []
    for _ in range(2):
        poison()
        results.append(jax.tree.map(np.asarray, call()))
    return results[0], results[1]


def _evaluate(name: str, implementation: str | None, arrays: Any, state: Any, ids: Any = None) -> Any:
    return suite.evaluate(name, implementation, suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), ids)[0]


def _text(name: str, implementation: str | None, arrays: Any, state: Any, ids: Any = None, **kind: Any) -> str:
    given = suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), ids
    weights = jnp.ones(suite.LENGTH, jnp.float32), jnp.ones((), jnp.float32)
    return suite.compiled(name, implementation, **kind).lower(*given, *weights).as_text()


def packed(name: str, implementation: str | None) -> Result:
    """Three segments, padding, a state to start from."""
    arrays, state = suite.inputs(name)
    ids = jnp.asarray(suite.packed_ids()[0])
    got, again = twice(lambda: _evaluate(name, implementation, arrays, state, ids))
    want = exact(lambda: suite.oracle(name, "bfloat16"))
    text = _text(name, implementation, arrays, state, ids)
    return Result(got, again, want, numeric.FORWARD["bfloat16"], numeric.GRADIENT["bfloat16"], text)


def lengths(name: str, implementation: str | None) -> Result:
    """One token, and one beside a chunk of 64."""
    arrays, state = suite.inputs(name)
    runs: list[tuple[Any, Any]] = []
    wants: list[Any] = []
    for length in (1, 63, 64, 65):
        cut = {key: x[:, :length] for key, x in arrays.items()}
        runs.append(twice(functools.partial(_evaluate, name, implementation, cut, state)))
        want = exact(functools.partial(suite.oracle, name, "bfloat16", used=length))
        wants.append(suite.first_tokens(want, length))
    text = _text(name, implementation, arrays, state)
    got, again = ([run[i] for run in runs] for i in range(2))
    return Result(
        _join(got), _join(again), _join(wants), numeric.FORWARD["bfloat16"], numeric.GRADIENT["bfloat16"], text
    )


def _join(results: list[Any]) -> dict[str, Any]:
    return {key: [result[key] for result in results] for key in ("output", "state", "gradients")}


def two_calls(name: str, implementation: str | None) -> Result:
    """A call of 40 tokens, and the rest from the state it leaves."""
    arrays, state = suite.inputs(name)
    given = suite.cast(arrays, "bfloat16")
    weights = jnp.ones((), jnp.float32)
    call = suite.compiled(name, implementation)

    def run():
        results, held = [], suite.cast(state, "float32")
        for tokens in (slice(0, 40), slice(40, suite.LENGTH)):
            cut = {key: x[:, tokens] for key, x in given.items()}
            length = next(iter(cut.values())).shape[1]
            result, held = call(cut, held, None, jnp.ones(length, jnp.float32), weights)
            results.append(result)
        output = jnp.concatenate([result["output"] for result in results], axis=1)
        # Gradients of the second call do not reach the first.
        return {"output": output, "state": results[1]["state"], "gradients": output}

    got, again = twice(run)
    want = exact(lambda: suite.oracle(name, "bfloat16", packed=False))
    want = {**want, "gradients": want["output"]}
    return Result(
        got,
        again,
        want,
        numeric.FORWARD["bfloat16"],
        numeric.GRADIENT["bfloat16"],
        _text(name, implementation, arrays, state),
    )


def mapped(name: str, implementation: str | None) -> Result:
    """Each row of the batch alone, under vmap."""
    arrays, state = suite.inputs(name)

    def alone(x):
        return x[:, None] if x.ndim else jnp.broadcast_to(x, (suite.BATCH,))

    given = (suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), jnp.asarray(suite.packed_ids()[0]))
    given = jax.tree.map(alone, given)
    call = suite.compiled(name, implementation, mapped=True)
    weights = jnp.ones(suite.LENGTH, jnp.float32), jnp.ones((), jnp.float32)

    def run():
        result, _ = call(*given, *weights)
        return {key: jax.tree.map(lambda x: x[:, 0], result[key]) for key in ("output", "state", "gradients")}

    got, again = twice(run)
    want = exact(lambda: suite.oracle(name, "bfloat16"))
    text = call.lower(*given, *weights).as_text()
    return Result(got, again, want, numeric.FORWARD["bfloat16"], numeric.GRADIENT["bfloat16"], text)


def wide_inputs(wide: Wide) -> dict[str, np.ndarray]:
    """Arguments of the op by name, a state among them where one is handed in."""
    case = wide.case
    random = np.random.default_rng(5)
    arrays = gpu_cases.inputs(case)
    if case.op == "deltaformer" and wide.keys == "random":
        arrays["w"] = random.standard_normal(arrays["k"].shape)
        arrays["alpha"] = random.uniform(0.5, 1.5, arrays["beta"].shape)
    if wide.keys != "random" or (case.op == "deltaformer" and case.write != "softmax"):
        # Writes that do not normalise want keys of length 1.
        for name in {"k", "w"} & set(arrays):
            arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    if wide.keys != "random":
        arrays["k"] = hard_keys(wide.keys, random, case.length, case.key)[None, :, None].repeat(case.groups, 2)
        arrays["beta"] = np.full(arrays["beta"].shape, {"identical": 1.9, "close": 1.0}[wide.keys])
    if wide.start:
        arrays["initial_state"] = random.standard_normal((case.batch, case.heads, case.key, case.value))
    return arrays


def wide_program(wide: Wide, implementation: str | None):
    """Output, state and gradients of every array, as one jitted function of the arrays."""
    case, ids = wide.case, gpu_cases.segment_ids(wide.case)
    options: dict[str, Any] = {"implementation": implementation}
    if case.op == "deltaformer":
        # A softmax over equal keys does not depend on q, and its gradient would be 0.
        options |= {"write_kernel": case.write, "read_kernel": "softmax" if wide.keys == "random" else "linear"}

    # The same for all: rounding the output would change it by as much as the tolerance allows.
    weight = rounded({"q": gpu_cases.cotangent(case)})["q"]

    def loss(arrays):
        segments = None if ids is None else jnp.asarray(ids)
        output, state = getattr(mf, case.op)(**arrays, segment_ids=segments, **options)
        kept = {"deltaformer": lambda: state.u, "softmax_attention": lambda: output}.get(case.op, lambda: state)()
        seen = kept if case.only_u else output
        size = jnp.sum((seen * weight.astype(seen.dtype)).astype(jnp.result_type(kept, jnp.float32)))
        return size + jnp.sum(kept.astype(size.dtype)), (seen, kept)

    def run(arrays):
        gradients, (output, state) = jax.grad(loss, has_aux=True)(arrays)
        return {"output": output, "state": state, "gradients": gradients}

    return jax.jit(run)


def wide_call(wide: Wide, implementation: str | None) -> Result:
    """A call, and the same in float64 on inputs rounded as the kernels take them."""
    arrays = rounded(wide_inputs(wide))
    program = wide_program(wide, implementation).lower(arrays)
    call = program.compile()
    got, again = twice(lambda: call(arrays))
    oracle = wide_program(wide, "recurrent" if wide.case.length <= RECURRENT else "chunked")
    wanted = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    want = exact(functools.partial(oracle, wanted))
    return Result(got, again, want, TOLERANCE, TOLERANCE, program.as_text())
