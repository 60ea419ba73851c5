"""Counts and an estimate of cycles for the main loop of a kernel, from its machine code (SASS).

The estimate follows one warpgroup through the loop in order. An instruction takes one cycle to issue. A product (HGMMA,
64 rows, N columns, 16 deep) takes as long as the tensor cores need for it (N / 2 cycles), or as shared memory needs to
deliver its operands at 128 bytes per cycle, if that is longer; products run one after the other, beside what is issued
meanwhile. A wait for products ends `LATENCY` cycles after the last product that it waits for. A barrier of a warpgroup
takes `BARRIER` cycles, a copy that the warpgroup issues `COPY`; those two and the latency are guesses. Waits for copies
are taken to be over. What is left out makes a kernel slower: the estimate compares kernels, and is no time.
"""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Loop", "describe", "loop_cycles", "main_loop", "read_sass"]

LATENCY, BARRIER, COPY = 40, 25, 20

KINDS = {
    "products": r"HGMMA",
    "barriers": r"BAR\.SYNC",
    "waits": r"WARPGROUP\.DEPBAR",
    "loads": r"UTMALDG",
    "stores": r"UTMASTG",
    "shared": r"LDS|STS|LDSM|STSM",
}

Loop = dict[str, Any]


def read_sass(text: str) -> dict[str, list[list[str]]]:
    """The instructions of each kernel of a disassembly, by the kernel's name, once per compiled version."""
    kernels: dict[str, list[list[str]]] = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.match(r"(\w+?)_mosaic_gpu_kernel", part)
        if name is not None:
            kernels.setdefault(name[1], []).append(part.splitlines())
    return kernels


def main_loop(lines: Sequence[str]) -> list[str]:
    """The instructions of the innermost loop that has all products of the kernel; all of them where none has."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L\w+):", line))}
    total, best = sum("HGMMA" in line for line in lines), (0, len(lines))
    for end, line in enumerate(lines if total else ()):
        jump = re.search(r"\bBRA\b[^`]*`\((\.L\w+)\)", line)
        start = labels.get(jump[1], end) if jump else end
        whole = sum("HGMMA" in x for x in lines[start:end]) == total
        if (
            start < end < start + best[1] - best[0]
            and whole
            and any(re.search("SYNCS.PHASECHK", x) for x in lines[start:end])
        ):
            best = (start, end)
    inside = (re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line) for line in lines[best[0] : best[1] + 1])
    return [line[1] for line in inside if line]


def loop_cycles(instructions: Sequence[str], warpgroups: int = 1) -> int:
    """The estimate for one pass of the loop, with `warpgroups` of them on a multiprocessor."""
    now = tensor = 0.0
    busy, groups = 0.0, []
    for line in instructions:
        now += 1
        product = re.search(r"HGMMA\.64x(\d+)x16\S* R\d+, (gdesc|R)", line)
        if product:
            columns = int(product[1])
            delivered = (columns + 64 * (product[2] == "gdesc")) * 16 * 2 / 128
            cost = max(columns / 2, delivered)
            tensor, busy = max(tensor, now) + cost, busy + cost
            if "gsb0" in line:
                groups.append(tensor)
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", line):
            left = int(wait[1], 16)
            done = groups[: len(groups) - left]
            if done:
                now = max(now, done[-1] + LATENCY)
                groups = groups[len(done) :]
        elif "BAR.SYNC" in line:
            now += BARRIER
        elif "UTMALDG" in line or "UTMASTG" in line:
            now += COPY
    return round(max(now, tensor, warpgroups * busy))


def describe(instructions: Sequence[str]) -> Loop:
    """The number of instructions of each kind and of all, and the cycles with one and with two warpgroups."""
    text = "\n".join(instructions)
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in KINDS.items()} | {"all": len(instructions)}
    return counts | {"cycles": [loop_cycles(instructions, warpgroups) for warpgroups in (1, 2)]}
