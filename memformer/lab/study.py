"""A study as data: the claim under test, what is trained or simulated, and how the result is judged and drawn."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memformer.core.checks import check_size
from memformer.training.evaluation import LoadedRun

__all__ = ["Quick", "Result", "Row", "Runs", "Settings", "Study", "Table", "Verdict"]
__all__ += ["grade", "merge_seeds", "numbers_in", "percent", "pivot", "spread", "spread_numbers"]

Row = dict[str, Any]
Runs = Mapping[str, LoadedRun]
Settings = Mapping[str, Any]


class Table(NamedTuple):
    """A titled table.

    Attributes:
      title: above the table.
      rows: column name to text or number; all rows have the columns of the first.
    """

    title: str
    rows: Sequence[Row]


class Verdict(NamedTuple):
    """The judgement of a claim by a result.

    Attributes:
      kind: "confirmed", "partly confirmed", "refuted" or "not reproduced".
      finding: one sentence with the numbers that decide.
    """

    kind: str
    finding: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one study, as its JSON stores them.

    Attributes:
      tables: the first is the main one.
      values: numbers for programs, by name.

    Raises:
      ValueError: no table, a table without rows, or rows of different columns.
    """

    tables: Sequence[Table]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("a result must have at least one table, got none")
        for title, rows in self.tables:
            if not rows or any(list(row) != list(rows[0]) for row in rows):
                raise ValueError(
                    f"rows of {title!r} must be at least one, all with the same columns, got {list(rows)[:3]}"
                )

    def rows(self, table: int = 0, **wanted: Any) -> list[Row]:
        """Rows of a table, those that have the wanted values in the columns named.

        Example:
          >>> Result([Table("Scores", [{"model": "a", "x": 1}, {"model": "b", "x": 2}])]).rows(model="b")
          [{'model': 'b', 'x': 2}]
        """
        rows = self.tables[table].rows
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@dataclasses.dataclass(frozen=True)
class Quick:
    """The small version of a study, under a minute.

    Attributes:
      rows: the runs to train instead of the study's.
      changes: by dotted key, applied after each row.
      settings: replace the study's settings of the same names.
    """

    rows: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    changes: Row = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """One study. It either trains the runs of `rows`, reads finished runs of train.py (`reads`), or simulates.

    Attributes:
      name: of the command, the JSON and the figure.
      title: of its section.
      claim: what the literature claims, one or two sentences.
      source: of the claim.
      measure: (runs by label, settings) -> result.
      judge: result of a full run -> verdict.
      draw: result -> Matplotlib figure.
      caption: of the figure.
      reads: which finished runs it needs; empty where it needs none.
      base: config that all runs share, by dotted key.
      prepare: (folder, settings) -> changes of the config of all runs, after it wrote the data that they read there;
        called again, it leaves what it finds.
      rows: label of a run to the changes of its config, by dotted key.
      seeds: runs of each row; above 1 they are labelled as `memformer.lab.runs.repeat_rows` says. Quick runs have one.
      settings: sizes of a simulation, by name.
      quick: the small version; None where the runs are given.
      summary: result -> the rows shown in full on the page; None shows the main table if it has at most ten rows.
      examples: runs -> figures of single examples by label, which need the models: saved beside the first run.

    Raises:
      ValueError: a study without a claim, a source or a caption, or with no seed.
    """

    name: str
    title: str
    claim: str
    source: str
    measure: Callable[[Runs, Settings], Result]
    judge: Callable[[Result], Verdict]
    draw: Callable[[Result], Any]
    caption: str
    reads: str = ""
    base: Row = dataclasses.field(default_factory=dict)
    prepare: Callable[[str, Settings], Row] | None = None
    rows: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    settings: Settings = dataclasses.field(default_factory=dict)
    quick: Quick | None = None
    summary: Callable[[Result], list[Row]] | None = None
    examples: Callable[[Runs], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("claim", "source", "caption"):
            if not getattr(self, name):
                raise ValueError(f"study {self.name!r} must state its {name}, got none")
        check_size("seeds", self.seeds)


def grade(*checks: bool) -> str:
    """The kind of verdict when parts of a claim hold or fail.

    Example:
      >>> grade(True, True), grade(True, False), grade(False)
      ('confirmed', 'partly confirmed', 'refuted')
    """
    return "confirmed" if all(checks) else "partly confirmed" if any(checks) else "refuted"


def pivot(rows: Sequence[Row], index: str, column: str, value: str, *, corner: str) -> list[Row]:
    """A table of one value: a row for each `index`, a column for each `column`.

    Example:
      >>> rows = [{"x": 1, "y": "a", "z": 5}, {"x": 1, "y": "b", "z": 6}, {"x": 2, "y": "a", "z": 7}]
      >>> pivot(rows, "x", "y", "z", corner="z by x")
      [{'z by x': 1, 'a': 5, 'b': 6}, {'z by x': 2, 'a': 7}]
    """
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row[index], {corner: row[index]})[row[column]] = row[value]
    return list(found.values())


def percent(value: float, digits: int = 1) -> str:
    """A share as text.

    Example:
      >>> percent(0.875), percent(0.875, 0)
      ('87.5%', '88%')
    """
    return f"{100 * value:.{digits}f}%"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Shares of several seeds as text: the mean, then the least and the greatest where they differ.

    Example:
      >>> spread([0.875, 0.5, 1.0]), spread([1.0, 0.9999])
      ('79.2% (50.0% to 100.0%)', '100.0%')
    """
    middle, least, most = (percent(value, digits) for value in (sum(values) / len(values), min(values), max(values)))
    return _banded(middle, least, most)


def spread_numbers(values: Sequence[float]) -> str:
    """Numbers of several seeds as text, as `spread` has shares.

    Example:
      >>> spread_numbers([0.25, 0.5]), spread_numbers([1200, 1300]), spread_numbers([3, 3])
      ('0.375 (0.25 to 0.5)', '1250 (1200 to 1300)', '3')
    """

    def text(value: float) -> str:
        return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"

    return _banded(*map(text, (sum(values) / len(values), min(values), max(values))))


def _banded(middle: str, least: str, most: str) -> str:
    return middle if least == most else f"{middle} ({least} to {most})"


def merge_seeds(results: Sequence[Result]) -> Result:
    """The result of several seeds from that of each: numbers of tables that differ become `spread` and values lists.

    Args:
      results: of measurements that differ in the seed alone, so that their tables have the same rows.

    Raises:
      ValueError: tables or values that differ in more than numbers.

    Example:
      >>> one, two = (Result([Table("Scores", [{"model": "a", "x": x}])], {"x": x}) for x in (1, 2))
      >>> merge_seeds([one, two]).rows(), merge_seeds([one, two]).values
      ([{'model': 'a', 'x': '1.5 (1 to 2)'}], {'x': [1, 2]})
    """
    shapes = [[(table.title, len(table.rows)) for table in result.tables] for result in results]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"results of several seeds must have the same tables and rows, got {shapes}")
    told = f": mean of {len(results)} seeds (least to most)" if len(results) > 1 else ""
    tables = []
    for same in zip(*(result.tables for result in results), strict=True):
        rows = zip(*(table.rows for table in same), strict=True)
        merged = [{name: _merge_cells([row[name] for row in seeds]) for name in seeds[0]} for seeds in rows]
        tables.append(Table(f"{same[0].title}{told}", merged))
    return Result(tables, _merge_values([result.values for result in results]))


def _merge_cells(cells: Sequence[Any]) -> Any:
    if all(cell == cells[0] for cell in cells):
        return cells[0]
    numbers = [number for number in map(_number, cells) if number is not None]
    if len(numbers) < len(cells):
        return ", ".join(map(str, cells))
    return (spread if str(cells[0]).endswith("%") else spread_numbers)(numbers)


def _number(cell: Any) -> float | None:
    """The number that a cell is, a share where it is a percentage; None for other text."""
    if isinstance(cell, int | float):
        return float(cell)
    try:
        return float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)
    except ValueError:
        return None


def _merge_values(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], Mapping):
        return list(values)
    if any(list(one) != list(values[0]) for one in values):
        raise ValueError(f"values of several seeds must have the same names, got {[list(one) for one in values]}")
    return {name: _merge_values([one[name] for one in values]) for name in values[0]}


def numbers_in(cell: Any) -> list[float]:
    """The numbers in a table's cell; shares where they are per cent.

    Example:
      >>> numbers_in("138 (130-150)"), numbers_in("97.5%"), numbers_in("-0.9 to 1e-3"), numbers_in("never")
      ([138.0, 130.0, 150.0], [0.975], [-0.9, 0.001], [])
    """
    if isinstance(cell, int | float):
        return [float(cell)]
    found = re.findall(r"(?<![\w.])(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(%?)", cell)
    return [float(number) / (100 if sign else 1) for number, sign in found]
