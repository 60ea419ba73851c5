"""Strict settings for every test: eight virtual CPU devices, no silent promotion."""

import os

# tests decide by name where they run; a GPU or TPU is asked for with JAX_PLATFORMS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# compiling is most of what the suite costs; benchmarks and the programs users run are optimised in full
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _group(item: pytest.Item) -> str:
    """Tests that share compiled functions: those of one file, or of one row of a shared suite's table."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    row = next((params[key] for key in ("name", "spec") if key in params), "")
    return f"{item.path.name} {row}"


def pytest_collection_modifyitems(items):
    """One worker takes a whole group (--dist=loadgroup), so that nothing is compiled twice; groups run in one piece."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    order = {group: place for place, group in enumerate(dict.fromkeys(map(_group, items)))}
    items.sort(key=lambda item: order[_group(item)])


_last_group: list[str] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Drops compiled programs between groups: a process with thousands of them runs out of memory maps."""
    group = _group(item)
    if _last_group and _last_group[-1] != group:
        jax.clear_caches()
    _last_group[:] = [group]
