"""The GPU kernels against float64, case by case: `python -m benchmarks.gpu --verify`, from a checkout.

Runs the ops' test suite (rows, inputs and tolerances of tests/ops) and cases that stress kernels: wide heads, odd
sizes, repeated keys, long calls, one and many heads. Every case runs twice on memory filled with NaN; two different
results reveal a race. Without an sm_90 GPU a few toy cases run on the implementations available there.
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
from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.gpu.contestants import round_inputs

__all__ = ["names", "verify"]

# The checkout's tests are not part of the package, and their types are not checked.
numeric: Any = importlib.import_module("tests.numeric")
suite: Any = importlib.import_module("tests.ops.test_ops")
hard_keys = importlib.import_module("tests.pallas.test_tpu").keys

# Relative RMS for long calls and repeated keys, gradients included; the suite has its own tolerances.
TOLERANCE = 2e-2

# Two runs may differ by the order of summation only.
MOVED = 1e-4

# Longest call whose oracle is the recurrence; beyond it is the chunked form in float64, which the tests compare with
# the recurrence.
RECURRENT = 1100

# Ops with GPU kernels.
KERNEL_OPS = ("delta_rule", "linear_attention", "deltaformer", "softmax_attention")


class Wide(NamedTuple):
    """One call, beyond those of the suite.

    Attributes:
      case: the call.
      keys: "random", "identical" (with beta 1.9) or "close" (with beta 1).
      start: whether it has an initial state.
    """

    case: Case
    keys: str = "random"
    start: bool = False

    @property
    def name(self) -> str:
        """The call as the table prints it."""
        return f"{self.case.name}{f', {self.keys} keys' * (self.keys != 'random')}{', from a state' * self.start}"


def _wide() -> list[Wide]:
    calls = [
        Wide(Case(op, 1, 1000, 2, 1, width, width, decay=decay, segments=segments), start=bool(segments))
        for op in ("delta_rule", "linear_attention")
        for width in (64, 128)
        for decay in ("", "head", "channel")
        for segments in (0, 3)
    ]
    writes = [("softmax", 64, 0), ("softmax", 64, 3), ("softmax", 128, 0), ("softmax", 128, 3)]
    writes += [(write, 128, 3) for write in ("linear", "relu", "round")]
    calls += [
        # Two spans of a write (pallas/gpu/tuning.py), with few heads.
        Wide(Case("deltaformer", 1, 1090, 2, 1, width, width, write=write, segments=segments))
        for write, width, segments in writes
    ]
    calls += [
        Wide(Case("softmax_attention", 1, 1000, 4, 2, width, width, segments=segments))
        for width in (64, 128)
        for segments in (0, 3)
    ]
    calls += [
        Wide(Case("deltaformer", 1, 1090, 2, 1, decay="head", write=write, read=read, segments=segments))
        for write, read, segments in (("softmax", "softmax", 3), ("linear", "softmax", 0), ("linear", "linear", 3))
    ]
    calls += [Wide(Case("softmax_attention", 1, 1000, 4, 2, decay="head", segments=segments)) for segments in (0, 3)]
    calls += [
        Wide(Case("softmax_attention", 1, 1000, 4, 2, causal=causal, window=window, segments=segments, decay=decay))
        for causal, window, decay in ((True, 200, ""), (True, 200, "head"), (False, 200, ""), (False, None, ""))
        for segments in (0, 3)
    ]
    # Odd sizes.
    calls += [Wide(Case(op, 2, 77, 3, 3, 40, 24, segments=2)) for op in KERNEL_OPS]
    calls += [
        Wide(Case(op, 1, 512, 2, 2, width, 128, write="linear"), keys)
        for op in ("delta_rule", "deltaformer")
        for keys in ("identical", "close")
        for width in (64, 128)
    ]
    # One and many heads over all batch rows: one part and two.
    calls += [Wide(Case("deltaformer", *size, 64, 64)) for size in ((1, 320, 1, 1), (4, 320, 33, 33), (4, 320, 64, 64))]
    calls += [Wide(Case("deltaformer", *size, only_u=True)) for size in ((1, 1090, 1, 1), (1, 1090, 3, 3))]
    calls += [Wide(Case("deltaformer", 8, 600, 32, 32, 64, 64, only_u=True))]
    calls += [Wide(Case("delta_rule", 1, 8192, 2, 1, decay="head")), Wide(Case("linear_attention", 1, 8192, 2, 1))]
    calls += [Wide(Case("deltaformer", 1, 4096, 1, 1)), Wide(Case("softmax_attention", 1, 4096, 1, 1, segments=2))]
    return calls


TOYS = [Wide(Case("delta_rule", 1, 40, 2, 1, 16, 16, segments=2), start=True)]
TOYS += [Wide(Case("deltaformer", 1, 40, 1, 1, 16, 16, write="linear"), "identical")]


class Result(NamedTuple):
    """Results of two runs of a call beside the expected one, the tolerances of both, and the program's text."""

    got: Any
    again: Any
    want: Any
    output: float
    gradients: float
    text: str


def checks() -> dict[str, Callable[[str, str | None], Result]]:
    """The checks of every row of the suite."""
    return {"packed": packed, "lengths": lengths, "two calls": two_calls, "mapped": mapped}


def names(toy: bool) -> list[str]:
    """Names of all cases, those of the suite first."""
    if toy:
        return ["delta_rule_grouped: packed", *(wide.name for wide in TOYS)]
    found = [f"{name}: {check}" for check in checks() for name in suite.ROWS]
    return found + [wide.name for wide in _wide()]


def verify(name: str, toy: bool) -> dict[str, Any]:
    """Verifies one case: errors of output and state, errors of gradients, and whether all are within tolerance.

    Args:
      name: one of `names`.
      toy: whether there is no GPU, so that the library chooses the implementation.
    """
    implementation = None if toy else "pallas"
    row: dict[str, Any] = {"case": name, "met": False}
    row_name, _, check = name.partition(": ")
    if row_name in suite.ROWS:
        result = checks()[check](row_name, implementation)
    else:
        wide = next(wide for wide in (TOYS if toy else _wide()) if wide.name == name)
        result = wide_call(wide, implementation)
    outputs, gradients = errors(result.got, result.want)
    moved = max(errors(result.again, result.got))
    kernels = sorted(
        set(re.findall(r"memformer_[a-z_]+(?:forward|backward|gradients|scores|inverse|chunk_scan)", result.text))
    )
    row |= {"error": outputs, "gradient error": gradients, "moved": moved, "kernels": kernels}
    # A comparison with NaN is False.
    met = outputs <= result.output and gradients <= result.gradients and moved <= MOVED
    return row | {"met": bool(met) and (toy or "mosaic_gpu" in result.text)}


def errors(got: Any, want: Any) -> tuple[float, float]:
    """Largest relative RMS error of outputs and states, and of gradients; NaN where a result is."""

    def largest(part: Callable[[Any], Any]) -> float:
        pairs = zip(jax.tree.leaves(part(got)), jax.tree.leaves(part(want)), strict=True)
        return float(np.max([numeric.relative_rms(a, b) for a, b in pairs]))

    return largest(lambda x: (x["output"], x["state"])), largest(lambda x: x["gradients"])


def exact(call: Callable[[], Any]) -> Any:
    """Runs a call on the CPU in float64; numpy arrays."""
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        return jax.tree.map(np.asarray, call())


def poison() -> None:
    """Fills free device memory with NaN, which reveals what a kernel does not write."""
    if jax.default_backend() == "gpu":
        jax.block_until_ready(jnp.full(2**28, jnp.nan, jnp.float32)).delete()


def twice(call: Callable[[], Any]) -> tuple[Any, Any]:
    """Results of two runs of a call."""
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
    """Three segments, padding and an initial state."""
    arrays, state = suite.inputs(name)
    ids = jnp.asarray(suite.packed_ids()[0])
    got, again = twice(lambda: _evaluate(name, implementation, arrays, state, ids))
    want = exact(lambda: suite.oracle(name, "bfloat16"))
    text = _text(name, implementation, arrays, state, ids)
    return Result(got, again, want, numeric.FORWARD["bfloat16"], numeric.GRADIENT["bfloat16"], text)


def lengths(name: str, implementation: str | None) -> Result:
    """One token, and lengths around a chunk of 64."""
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
    """A call of 40 tokens, and one of the rest from its state."""
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
        # The second call's gradients do not reach the first; outputs stand in for them.
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
    """Each batch row alone, under vmap."""
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
    """Array arguments of the op by name, the initial state included."""
    case = wide.case
    random = np.random.default_rng(5)
    arrays = cases.inputs(case)
    if case.op == "deltaformer" and wide.keys == "random":
        arrays["w"] = random.standard_normal(arrays["k"].shape)
        arrays["alpha"] = random.uniform(0.5, 1.5, arrays["beta"].shape)
    if wide.keys != "random" or (case.op == "deltaformer" and case.write != "softmax"):
        # Unnormalised writes need unit keys.
        for name in {"k", "w"} & set(arrays):
            arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    if wide.keys != "random":
        arrays["k"] = hard_keys(wide.keys, random, case.length, case.key)[None, :, None].repeat(case.groups, 2)
        arrays["beta"] = np.full(arrays["beta"].shape, {"identical": 1.9, "close": 1.0}[wide.keys])
    if wide.start:
        arrays["initial_state"] = random.standard_normal((case.batch, case.heads, case.key, case.value))
    return arrays


def wide_program(wide: Wide, implementation: str | None):
    """A jitted function of the arrays that returns output, state and all gradients."""
    case, ids = wide.case, cases.segment_ids(wide.case)
    options: dict[str, Any] = case.options | {"implementation": implementation}
    if case.op == "deltaformer" and wide.keys != "random":
        # A softmax over equal keys does not depend on q: its gradient would be zero.
        options["read_kernel"] = "linear"

    # The same weights for kernel and oracle: rounding them would cost as much as the tolerance allows.
    weight = round_inputs({"q": cases.cotangent(case)})["q"]

    def loss(arrays):
        segments = None if ids is None else jnp.asarray(ids)
        output, state = getattr(mf, case.op)(**arrays, segment_ids=segments, **options)
        kept = {"deltaformer": lambda: state.u, "softmax_attention": lambda: output}.get(case.op, lambda: state)()
        result = kept if case.only_u else output
        size = jnp.sum((result * weight.astype(result.dtype)).astype(jnp.result_type(kept, jnp.float32)))
        return size + jnp.sum(kept.astype(size.dtype)), (result, kept)

    def run(arrays):
        gradients, (output, state) = jax.grad(loss, has_aux=True)(arrays)
        return {"output": output, "state": state, "gradients": gradients}

    return jax.jit(run)


def wide_call(wide: Wide, implementation: str | None) -> Result:
    """A call, and its float64 oracle on equally rounded inputs."""
    arrays = round_inputs(wide_inputs(wide))
    program = wide_program(wide, implementation).lower(arrays)
    call = program.compile()
    got, again = twice(lambda: call(arrays))
    oracle = wide_program(wide, "recurrent" if wide.case.length <= RECURRENT else "chunked")
    wanted = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    want = exact(functools.partial(oracle, wanted))
    return Result(got, again, want, TOLERANCE, TOLERANCE, program.as_text())
