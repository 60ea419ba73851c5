"""benchmarks.gpu without a GPU: end to end at toy sizes, and its verdicts. Times are not tested."""

import importlib.util
import json
import sys
import types

import jax
import pytest

from benchmarks import timing, workers
from benchmarks.cases import PASSES, Case
from benchmarks.floor import floor
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, goals, sass, static, verify, worker
from benchmarks.gpu.cases import FLA, SHIPPED, TIMED, TOY


class Here:
    """The worker of JAX programs without a process of its own; the peers have one, and test_workers tests them."""

    def __init__(self):
        self.actions, self.starts, self.process = worker.actions(), 1, types.SimpleNamespace(poll=lambda: None)

    def ask(self, limit, /, do, **request):
        try:
            return json.loads(json.dumps(self.actions[do](**json.loads(json.dumps(request)))))
        except Exception as error:
            raise workers.WorkerError(workers.shorten(error)) from error

    def close(self):
        pass


def start_worker(module, *given):
    return Here() if module == gpu.JAX else workers.Worker(module, *given)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "Worker", start_worker)
        # Programs of other tests stay.
        patch.setattr(jax, "clear_caches", lambda: None)
        # As in a process of its own; a context would not reach the threads that verify.
        jax.config.update("jax_numpy_dtype_promotion", "standard")
        try:
            assert gpu.main(["--verify", "--time", "--out", str(path)]) == 0
        finally:
            jax.config.update("jax_numpy_dtype_promotion", "strict")
    return json.loads(path.read_text())


def test_every_contestant_has_its_row(result):
    want = [
        (case.name, what, name)
        for case in TOY
        for what, gradient in PASSES
        for _, name in cases.contestants(case, gradient)
    ]
    assert [(row["case"], row["pass"], row["implementation"]) for row in result["rows"]] == want
    assert result["meaningful"] is False and result["peaks"]["flops"] > 0 and result["anchors"]


def test_rows_have_figures_or_an_error(result):
    for row in result["rows"]:
        if row["implementation"] in ("chunked", "recurrent"):
            assert 0 < row["low"] <= row["milliseconds"] <= row["high"] and row["floor"] > 0 and row["MiB"] >= 0
            assert row["differs"] < 1e-2, row
        if row["implementation"] == "pallas":
            assert "NotImplementedError" in row["error"] and "needs a" in row["error"]
        if row["implementation"] == FLA and importlib.util.find_spec("fla") is None:
            assert "not installed" in row["error"] and "fla-core" in row["error"]


def test_verified(result):
    assert len(result["verified"]) == 3 and all(row["met"] for row in result["verified"])
    assert all(0 < row["error"] <= 2e-2 and row["moved"] == 0 for row in result["verified"])


def test_floors():
    """1.4 ms of products for u at the paper's shape, 0.08 ms of bytes for the gated delta rule."""
    flops, _ = floor(TIMED[0], False)
    assert 1e3 * flops / 788e12 == pytest.approx(1.4, rel=0.02)
    flops, moved = floor(TIMED[1], False)
    assert 1e3 * moved / 4.3e12 == pytest.approx(0.08, rel=0.02) and flops / 788e12 < moved / 4.3e12


def test_goals_are_judged():
    """Every goal is about a timed case, and is met, missed, or unknown."""
    case = next(case for case in TIMED if case.op == "delta_rule").name

    def rows(forward, both, rival):
        times = {("forward", "pallas"): forward, ("forward+backward", "pallas"): both}
        times |= {("forward", FLA): rival, ("forward+backward", FLA): 3 * rival}
        return [{"case": case, "pass": w, "implementation": n, "milliseconds": ms} for (w, n), ms in times.items()]

    def verdicts(rows):
        return {goal["goal"]: goal["met"] for goal in goals.judge(rows)}

    assert set(verdicts([]).values()) == {None}
    assert all(any(case.name in goal for case in TIMED) for goal in verdicts([]))
    backward = f"{case} backward: faster than FLA in this run"
    assert verdicts(rows(0.3, 1.0, 0.5))[backward] is True
    assert verdicts(rows(0.3, 1.4, 0.5))[backward] is False


def test_relative_error_takes_the_worst_array():
    want = {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert timing.relative_error({"a": [1.0, 1.0], "b": [1.5, 1.5]}, want) == pytest.approx(0.5)
    # Different sets of gradients give NaN, which no tolerance accepts.
    assert not timing.relative_error({"a": [1.0, 1.0]}, want) <= 1


REPORT = """
(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'b_mosaic_gpu_kernel'
Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
Used 204 registers, used 2 barriers, 1 bytes smem
(C7517) warpgroup.wait is injected in around line 586 by compiler in function 'c_mosaic_gpu_kernel'
Compiling entry function 'c_mosaic_gpu_kernel' for 'sm_90a'
8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
Used 255 registers, used 2 barriers, 1 bytes smem
Compiling entry function 'b_mosaic_gpu_kernel' for 'sm_90a'
0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
Used 128 registers
Compiling entry function 'loop_fusion' for 'sm_90a'
Used 16 registers
"""


def test_report_of_ptxas():
    rows = {row["kernel"]: row for row in static.read_report("case", REPORT)}
    assert list(rows) == ["a", "c", "b"]
    assert [row["registers"] for row in rows.values()] == [204, 255, 128]
    assert [row["fault"] for row in rows.values()] == [None, "8 bytes spilled", "wgmma serialized"]
    assert rows["c"]["warnings"] == ["C7517"]


SASS = """
    .section .text.memformer_a_mosaic_gpu_kernel,"ax",@progbits
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, R184, gdesc[UR16], RZ, !UPT, gsb0 ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR24].tnspB, R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   FADD R1, R88, R88 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING R22, 0x80 ;
        /*0070*/              @P0  BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


def test_counts_of_machine_code():
    """The loop with all products, its counts, and the estimate of its cycles."""
    (code,) = sass.read_sass(SASS)["memformer_a"]
    loop = sass.main_loop(code)
    assert len(loop) == 7 and loop[0].startswith("SYNCS")
    found = sass.describe(loop)
    assert (found["products"], found["barriers"], found["waits"], found["all"]) == (2, 1, 1, 7)
    # The first product takes 32 cycles of the tensor cores from cycle 2 on, the second 24 of shared memory.
    first = 2 + 32 + sass.LATENCY
    assert found["cycles"] == [first + 3 + sass.BARRIER, 2 * (32 + 24)]


def test_static_marks_faults(monkeypatch, tmp_path):
    """A kernel that spills, a case without a kernel and a rejected one are faults, and set the exit status."""
    case, path = SHIPPED[0], tmp_path / "static.json"
    good = REPORT.split("(C7517)")[0]
    for text, error, status in ((REPORT, "", 1), ("", "", 1), (good, "RuntimeError: no", 1), (good, "", 0)):
        rows = static.make_rows(case, text, error)
        monkeypatch.setattr(static, "report", lambda todo, rows=rows: iter(rows))
        assert gpu.main(["--static", "--only", case.name, "--out", str(path)]) == status
        written = json.loads(path.read_text())["static"]
        assert [{key: x for key, x in row.items() if key not in ("date", "jax", "source")} for row in written] == rows
    # Rows of removed cases and of older kernels are dropped; good cases are not compiled again.
    stale = [{**written[0], "case": "old"}, {**written[0], "case": SHIPPED[2].name, "source": "old"}]
    path.write_text(json.dumps({"static": [*written, *stale]}))
    asked = []
    monkeypatch.setattr(static, "report", lambda todo: asked.extend(todo) or ())
    assert gpu.main(["--static", "--only", "delta_rule", "--out", str(path)]) == 0
    assert [row["case"] for row in json.loads(path.read_text())["static"]] == [case.name]
    assert asked == [other for other in SHIPPED if "delta_rule" in other.name and other != case]


def test_exit_status(monkeypatch, tmp_path):
    """A case that fails, and one that is not reached, set it."""

    def ask(self, limit, /, do, **request):
        if do == "verify" and request["case"] != "good":
            raise workers.WorkerError("no answer within 1 s: killed")
        return {"chip": True} if do == "about" else {"case": "good", "met": True}

    monkeypatch.setattr(workers.Worker, "ask", ask)
    for names, limit, status in ((["good"], "99", 0), (["good", "bad"], "99", 1), (["good"], "0", 1)):
        monkeypatch.setattr("benchmarks.gpu.verify.names", lambda toy, names=names: names)
        path = tmp_path / "verified.json"
        assert gpu.main(["--verify", "--limit", limit, "--out", str(path)]) == status
        assert len(json.loads(path.read_text())["verified"]) == len(names)


PROGRAM = """
import os, time
from benchmarks.workers import serve
print("a library talks")
count = []
def add(): count.append(1); return {"count": len(count)}
def fail(words): raise ValueError(words)
def die(): print("last words", flush=True); os._exit(3)
serve({"add": add, "fail": fail, "die": die, "hang": lambda: time.sleep(60)})
"""


def test_workers(tmp_path):
    """A process survives an error; after a crash, a hang or a broken device a new one answers."""
    (tmp_path / "answers.py").write_text(PROGRAM)
    worker = workers.Worker("answers", environment={"PYTHONPATH": str(tmp_path)})
    try:
        assert [worker.ask(30, do="add")["count"] for _ in range(2)] == [1, 2]
        for request, message, count in (
            ({"do": "fail", "words": "here:\n\n what"}, "ValueError: here: ... what", 3),
            ({"do": "hang"}, "no answer within 1 s", 1),
            ({"do": "die"}, "exited with status 3.*last words", 1),
            ({"do": "fail", "words": "CUDA_ERROR_ILLEGAL_ADDRESS"}, "CUDA_ERROR", 1),
        ):
            with pytest.raises(workers.WorkerError, match=message):
                worker.ask(1, **request)
            assert worker.ask(30, do="add")["count"] == count
        assert worker.starts == 4
    finally:
        worker.close()


def test_peers_are_compiled_ahead(capsys):
    """Each once, one process per op; failures are skipped."""
    gpu.Ahead([*TOY, *TOY], sys.executable, {"JAX_PLATFORMS": "cpu"}).finish(60)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"ahead: {FLA} ")]
    assert len(lines) == 2 * len(TOY) and all(any(case.name in line for line in lines) for case in TOY)


def test_names_are_unique():
    """Rows are identified by the name of their case."""
    for table in (TIMED, TOY, SHIPPED):
        assert len({case.name for case in table}) == len(table)
    verified = verify.names(False)
    assert len(set(verified)) == len(verified)
    # Every op with kernels, and every row of the ops' suite.
    for name in (*verify.suite.ROWS, "delta_rule", "linear_attention", "deltaformer", "softmax_attention"):
        assert any(case.startswith((f"{name}:", f"{name} ")) for case in verified), name
    assert Case("delta_rule", 1, 8192, 64, 16, decay="head").name == "delta_rule gated [1, 8192, 16/64, 128]"
