"""Strict settings for every test: eight virtual CPU devices, no silent promotion."""

import gc
import os
import pathlib

# tests decide by name where they run; a GPU or TPU is asked for with JAX_PLATFORMS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compilation is most of the suite's cost, so tests compile with few optimizations and without XLA's MLIR fusion
# emitters, which take four times the compile time of the older ones. A JAX without these options ignores them.
# Benchmarks and user programs are optimized in full, and so are tests under JAX_DISABLE_MOST_OPTIMIZATIONS=0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
COMPILE_FAST = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = COMPILE_FAST

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.executables import KEPT, kept_executables, lift_arrays, steps_kept  # noqa: E402
from tests.tiers import LONGEST, is_fast  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
lift_arrays()


TESTS = pathlib.Path(__file__).parent


def _file(item: pytest.Item) -> str:
    """The file of a test, relative to tests/."""
    return item.path.relative_to(TESTS).as_posix()


def _row(item: pytest.Item) -> str:
    """The row of a shared suite's table that a test runs, or ""."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return str(next((params[key] for key in ("name", "spec") if key in params), ""))


def _group(item: pytest.Item) -> str:
    """Tests that share compiled functions: those of one file, or of one row of a shared suite's table."""
    return f"{_file(item)} {_row(item)}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the fast tier; the longest files come first, and each group runs in one piece."""
    for item in items:
        if is_fast(_file(item), item.originalname, _row(item)):
            item.add_marker(pytest.mark.fast)
    order = {group: place for place, group in enumerate(dict.fromkeys(map(_group, items)))}
    longest = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: (longest.get(_file(item), len(LONGEST)), order[_group(item)]))


def pytest_collection_finish():
    """Takes what is imported out of garbage collection: searching it again and again took a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


# A process may hold vm.max_map_count (65530) memory maps, and every compiled program takes several.
MOST_MAPS = 25_000
_groups: list[str] = []


def _memory_maps() -> int:
    """Number of memory maps of this process; 0 where /proc is missing."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Drops compiled programs between groups when the process holds many memory maps.

    Before every eighth group: to count 20,000 maps takes 33 ms, and a run has hundreds of groups.
    """
    group = _group(item)
    if _groups[-1:] == [group]:
        return
    _groups.append(group)
    if len(_groups) % 8 == 0 and _memory_maps() > MOST_MAPS:
        jax.clear_caches()
        KEPT.clear()
        gc.collect()


@pytest.fixture(scope="module")
def programs_kept():
    """Programs of a module's runs are compiled once, and equal runs share their steps and first states."""
    with kept_executables(), steps_kept():
        yield


@pytest.fixture(scope="module")
def no_curves():
    """Learning curves are not drawn: each takes half a second, a third of a short run."""
    # imported on use: the tests of the core need no more than the core
    from memformer.training import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_learning_curve", lambda *_, **__: None)
        yield
