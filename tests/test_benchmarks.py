"""benchmarks.cpu at toy sizes: the structure of its output, and its verdicts. Times are not tested."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import cases as shared
from benchmarks import timing
from benchmarks.cpu import __main__ as run
from benchmarks.cpu import cases, first_step, goals
from memformer.training import step
from tests.executables import kept_executables, state_by_operation

ROW_KEYS = {
    "op", "variant", "T", "shape", "pass", "implementation", "ran", "milliseconds", "low", "high", "rounds", "ratio",
    "error", "flops", "bytes",
}  # fmt: skip


# One matrix memory and one memory with a cache; all calls of an op are of one shape, and equal ones share programs.
QUICK = tuple(
    dataclasses.replace(case, length=32) for case in cases.QUICK if case.op in ("linear_attention", "deltaformer")
)
LINEAR = dataclasses.replace(QUICK[0], implementations=("default",))
LENGTHS = tuple(dataclasses.replace(LINEAR, length=length) for length in (32, 64))
DECAYS = tuple(dataclasses.replace(LINEAR, decay=decay) for decay in ("head", "channel"))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        # In this process, which has loaded the trainer's libraries already, and for one config.
        patch.setattr(run, "first_step", lambda config, quick: {"config": config, **first_step.measure(config, quick)})
        patch.setattr(run, "CONFIGS", first_step.CONFIGS[:1])
        patch.setattr(step, "init_state", state_by_operation)
        for name, table in {"QUICK": QUICK, "QUICK_SCALING": (LENGTHS,), "QUICK_PER_CHANNEL": (DECAYS,)}.items():
            patch.setattr(cases, name, table)
        with kept_executables():
            run.main(["--quick", "--out", str(path)])
    return json.loads(path.read_text())


def test_every_case_has_its_rows(result):
    want = [
        (case.op, direction, name) for case in QUICK for direction, _ in shared.PASSES for name in case.implementations
    ]
    assert [(row["op"], row["pass"], row["implementation"]) for row in result["rows"]] == want
    assert all(set(row) == ROW_KEYS for row in result["rows"])


def test_figures_are_figures(result):
    for row in result["rows"]:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"]
        assert row["rounds"] >= 5 and row["flops"] > 0 and row["bytes"] > 0
        assert row["ratio"] == 1.0 or row["implementation"] != "default"


def test_contestants_compute_the_same(result):
    for row in result["rows"]:
        assert row["error"] < 1e-4, row


def test_the_default_names_its_implementation(result):
    assert all(row["ran"] for row in result["rows"] if row["implementation"] == "default")
    recurrent = [row["ran"] for row in result["rows"] if row["implementation"] == "recurrent"]
    assert recurrent and set(recurrent) == {"recurrent"}


def test_seconds_to_the_first_step(result):
    (row,) = result["first_step"]
    assert row["config"] == "configs/swap.py" and 0 < row["step"] < 1e3 * row["first"] and row["cpu"] > 0
    assert all(0 <= row[phase] < row["first"] for phase in ("import", "build", "trace", "compile"))


def test_scaling_and_goals(result):
    assert [row["T"] for row in result["scaling"]] == [[32, 64], [32, 64]]
    assert [row["T"] for row in result["per_channel"]] == [32, 32]
    assert len(result["goals"]) == len(goals.GOALS) + 4
    # no goal is about toy sizes
    assert all(verdict["met"] is None for verdict in result["goals"][: len(goals.GOALS)])


def test_environment(result):
    assert {"date", "commit", "uncommitted", "device", "processor", "cores", "versions"} <= set(result)
    assert {"python", "jax", "jaxlib", "memformer"} <= set(result["versions"])


def test_goals_are_judged():
    op, shape, direction, rival, want = goals.GOALS[2]
    row = {"op": op, "shape": shape, "pass": direction, "implementation": rival, "T": 2048}
    for ratio, met in ((want, True), (want - 0.01, False)):
        assert goals.judge([{**row, "ratio": ratio}], [])[2]["met"] is met
    assert goals.judge([{**row, "T": 1024, "ratio": 99.0}], [])[2]["met"] is None
    line = {"op": "delta_rule", "variant": "gated", "pass": "forward"}
    assert [goals.judge([], [{**line, "exponent": p}])[-1]["met"] for p in (1.1, 1.11)] == [True, False]


def test_goals_name_cases_that_are_run():
    rows = {
        (case.op, run._shape(case), name) for case in cases.CASES if case.length == 2048
        for name in (*case.implementations, *case.peers)
    }  # fmt: skip
    assert {(op, shape, rival) for op, shape, _, rival, _ in goals.GOALS} <= rows


def test_exponent():
    lengths = [8, 16, 32, 64]
    assert timing.exponent(lengths, [3.0 * t**1.5 for t in lengths]) == pytest.approx(1.5)


def test_relative_error_takes_the_worst_array():
    want = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    got = {"a": np.ones(4, np.float32), "b": np.full(4, 1.5, np.float32)}
    assert timing.relative_error(got, want) == pytest.approx(0.5)


class _Runner:
    def __init__(self, name, takes, log):
        self.name, self.takes, self.log = name, takes, log

    def seconds(self, calls):
        self.log.append(self.name)
        return self.takes


def test_rounds_are_interleaved():
    calls = []
    samples = timing.interleave([_Runner("a", 0.5, calls), _Runner("b", 0.5, calls)], budget=0.0)
    assert [len(sample) for sample in samples] == [5, 5]
    # one call each to estimate its time; then rounds, an untimed call before each timed one
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb" + "bbaa" + "aabb"


def test_slow_contestants_run_fewer_rounds():
    samples = timing.interleave([_Runner("a", 0.5, []), _Runner("b", 2.0, log := [])], budget=0.0)
    assert [len(sample) for sample in samples] == [5, 3]
    assert len(log) == 4
