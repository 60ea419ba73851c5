"""Reads the TPU compiler's final schedules: the bundles of a kernel's loops, and the slots they use."""

import dataclasses
import pathlib
import re

import numpy as np

__all__ = ["Loop", "loops", "scoped_memory"]

# Units of matrix products; their names differ between chips.
MATRIX = ("MXU", "MATMUL", "MATPUSH")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The branch-free run of bundles with the most products, among the runs of one kernel at one loop depth.

    Attributes:
      kernel: name of the kernel.
      depth: number of enclosing loops, the grid included; 0 is the start and end of the kernel.
      bundles: number of bundles.
      slots: slots per bundle, by unit.
      used: slots used in all bundles, by unit.
    """

    kernel: str
    depth: int
    bundles: int
    slots: dict[str, int]
    used: dict[str, int]

    @property
    def mxu(self) -> float:
        """Share of the MXU's issue slots in use."""
        return max(self.used[unit] / self.slots[unit] for unit in MATRIX if unit in self.slots) / self.bundles


def loops(dumps: pathlib.Path, before: set[pathlib.Path], names: str) -> list[list[Loop]]:
    """Reads the loops of the newly compiled kernels, one per depth, the loop with the most products first.

    Args:
      dumps: folder of the compiler's schedules.
      before: files to ignore.
      names: regular expression for the names of kernels.
    """
    found = []
    for path in sorted(set(dumps.glob("*final_hlo-static-per-bundle-utilization.txt")) - before):
        kernel = re.sub(r"^\d+-|\.?\d*-\d+-final.*", "", path.name)
        if not re.search(names, kernel):
            continue
        lines = path.read_text().splitlines()
        units = [unit.strip() for unit in lines[1].split(",")]
        used = np.array([list(map(int, line.split())) for line in lines[4:] if line.strip()])
        slots = dict(zip(units, map(int, lines[2].split()), strict=True))
        stem = path.name.split("-final_hlo")[0].rsplit("-", 1)[0]
        bundles = next(p for p in dumps.glob(f"{stem}-*final_bundles.txt") if "schedule" not in p.name)
        each = []
        products = used[:, [place for place, unit in enumerate(units) if unit in MATRIX]].sum(1)
        for depth, (first, last) in _busiest(bundles.read_text().splitlines(), products).items():
            total = dict(zip(units, used[first:last].sum(0).tolist(), strict=True))
            each.append(Loop(kernel, depth, last - first, slots, total))
        found.append(sorted(each, key=lambda loop: -loop.mxu * loop.bundles))
    return found


def _busiest(lines: list[str], products: np.ndarray) -> dict[int, tuple[int, int]]:
    """First bundle and end, by depth, of the branch-free run with the most products (the longest if none has any)."""
    bundles = [line for line in lines if re.match(r"\s*(0x[0-9a-f]+|0)\s*(LB|PB|PF)?\s*:", line)]
    count = len(products)
    if len(bundles) != count:
        raise ValueError(f"{len(bundles)} bundles in the schedule, {count} in its table of use")
    depths = [re.sub(r"^[^:]*:([\s>]*).*", r"\1", line).count(">") for line in bundles]
    ends = {0, count}
    ends |= {i for i, line in enumerate(bundles) if re.match(r"\s*\S+\s+(LB|PB|PF)", line)}
    ends |= {i + 1 for i, line in enumerate(bundles) if "sbr.rel" in line}
    ends |= {i for i in range(1, count) if depths[i] != depths[i - 1]}
    runs: dict[int, list[tuple[int, int]]] = {}
    places = sorted(ends)
    for first, last in zip(places, places[1:], strict=False):
        runs.setdefault(depths[first], []).append((first, last))
    return {
        depth: max(each, key=lambda run: (products[run[0] : run[1]].sum(), run[1] - run[0]))
        for depth, each in runs.items()
    }


def scoped_memory(text: str, kernel: str) -> int:
    """Bytes of VMEM that a kernel of a compiled program uses.

    Raises:
      ValueError: the program does not call it.
    """
    calls = [line for line in text.splitlines() if f"%{kernel}" in line and "custom-call(" in line]
    if not calls:
        raise ValueError(f"the program does not call {kernel}")
    found = [
        re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', call)
        for call in calls
    ]
    return max(int(match.group(1)) if match else 0 for match in found)
