"""Searches the tables of sizes of the kernels by what the compiler reports; no chip is needed.

    python -m benchmarks.tune tpu [ENTRY ...] [--list] [--out FILE.json]
    python -m benchmarks.tune gpu [ENTRY ...] [--list] [--out FILE.json]

ENTRY is the beginning of the name of an entry (default: all). Each entry has candidates: the sizes of the chip's table,
memformer/pallas/{tpu,gpu}/tuning.py, and others (tpu/tune.py, gpu/tune.py). A candidate is compiled and becomes a row
of the file at once. Rerun the command to resume: candidates whose row has the same compiler and the same kernel sources
are not compiled again. Another chip is another module with the attributes of `Chip`.

Printed: for each entry its candidates, the chosen first, with their figures and the ratio of their cost to that of the
chosen ones. A candidate with a fault (it does not compile, spills where no spill is allowed, needs too much memory) is
never chosen. Of the others those within the chip's tolerance of the least cost are equal, and a second criterion of the
chip decides. The exit status is 1 where a table has other sizes than the chosen ones: put those into the table.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Row", "chosen", "latest", "read", "verdicts"]

# One candidate: "entry", "sizes", "cost", "seconds", "fault" (None or a sentence), the figures of the chip, and what
# compiled it: "source", "compiler", "date".
Row = dict[str, Any]


class Chip(Protocol):
    """The module of a chip.

    Attributes:
      OUT: the file of the rows.
      TOLERANCE: share of the least cost within which costs are equal.
      ENTRIES: candidates by entry; those of the table come first.
    """

    OUT: pathlib.Path
    TOLERANCE: float
    ENTRIES: dict[str, list[dict[str, Any]]]

    def measure(self, entry: str, sizes: dict[str, Any]) -> Row:
        """Compiles one candidate: cost, seconds, fault and figures."""

    def rank(self, row: Row) -> float:
        """Order of candidates of equal cost, least first."""

    def versions(self) -> dict[str, str]:
        """The compiler, and a hash of the sources of the kernels."""


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file, [] where there is none."""
    return json.loads(path.read_text()) if path.exists() else []


def latest(rows: Sequence[Row], entry: str) -> list[Row]:
    """The rows of an entry that the newest one of them may be compared with: same compiler and sources."""
    found = [row for row in rows if row["entry"] == entry]
    last = max(found, key=lambda row: row["date"], default=None)
    return [row for row in found if last and all(row[key] == last[key] for key in ("compiler", "source"))]


def chosen(chip: Chip, rows: Sequence[Row]) -> Row | None:
    """The candidate to take; None where all have faults."""
    good = [row for row in rows if row["fault"] is None]
    least = min((row["cost"] for row in good), default=0.0)
    equal = (row for row in good if row["cost"] <= (1 + chip.TOLERANCE) * least)
    return min(equal, key=chip.rank, default=None)


def verdicts(chip: Chip, rows: Sequence[Row]) -> dict[str, str | None]:
    """By entry that has rows: None where the table has the chosen sizes, else what is wrong."""
    found: dict[str, str | None] = {}
    for entry, (table, *_) in chip.ENTRIES.items():
        of = latest(rows, entry)
        best = chosen(chip, of)
        if not of:
            continue
        if table not in [row["sizes"] for row in of]:
            found[entry] = f"the sizes of the table, {table}, are not among the rows"
        elif best is None:
            found[entry] = "every candidate has a fault"
        else:
            found[entry] = None if best["sizes"] == table else f"the table has {table}, the rows choose {best['sizes']}"
    return found


def search(chip: Chip, names: Sequence[str], path: pathlib.Path) -> list[Row]:
    """Compiles the candidates that have no row yet; returns all rows."""
    for entry, candidates in chip.ENTRIES.items():
        if names and not entry.startswith(tuple(names)):
            continue
        for sizes in candidates:
            here = {"entry": entry, "sizes": sizes, **chip.versions()}
            rows = read(path)
            if any(here.items() <= row.items() for row in rows):
                continue
            row = here | chip.measure(entry, sizes)
            row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            # Other processes may have added rows meanwhile.
            rows = [old for old in read(path) if (old["entry"], old["sizes"]) != (entry, sizes)] + [row]
            path.write_text("[\n" + ",\n".join(json.dumps(x) for x in rows) + "\n]\n")
            print(f"compiled: {entry} {_sizes(sizes)}, {row['seconds']:.0f} s", flush=True)
    return read(path)


def table(chip: Chip, rows: Sequence[Row], entry: str) -> list[str]:
    """Lines of one entry: each candidate with its figures, and its cost over that of the chosen."""
    of = latest(rows, entry)
    best = chosen(chip, of)
    hidden = ("entry", "sizes", "cost", "fault", "source", "compiler", "date")
    lines = [f"{entry} ({of[0]['compiler']}, {of[0]['source']})"] if of else [f"{entry}: not compiled"]
    for row in sorted(of, key=lambda row: (row is not best, row["fault"] is not None, row["cost"] or 0.0)):
        ratio = f"{row['cost'] / best['cost']:.2f}" if best and row["cost"] else "-"
        what = row["fault"] or "  ".join(f"{key} {value}" for key, value in row.items() if key not in hidden)
        mark = "*" if row["sizes"] == chip.ENTRIES[entry][0] else " "
        lines.append(f"  {mark} {ratio:>5}  {_sizes(row['sizes'])}  {what}")
    return lines


def _sizes(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def main(arguments: Sequence[str]) -> int:
    """Runs the search; returns 1 where a table and its rows differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", choices=("tpu", "gpu"))
    parser.add_argument("entries", nargs="*", help="beginnings of the names of entries (default: all)")
    parser.add_argument("--list", action="store_true", help="print what the file has, and compile nothing")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/CHIP-tune.json")
    options = parser.parse_args(arguments)
    chip: Any = importlib.import_module(f"benchmarks.{options.chip}.tune")
    path = options.out or chip.OUT
    rows = read(path) if options.list else search(chip, options.entries, path)
    for entry in chip.ENTRIES:
        if not options.entries or entry.startswith(tuple(options.entries)):
            print("\n".join(table(chip, rows, entry)))
    wrong = {entry: what for entry, what in verdicts(chip, rows).items() if what}
    for entry, what in wrong.items():
        print(f"{entry}: {what}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
