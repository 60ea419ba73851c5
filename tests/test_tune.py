"""benchmarks.tune: its choices, its resuming, and that the shipped table is what its stored report chooses."""

import types

import pytest

from benchmarks import tune
from benchmarks.gpu import tune as gpu
from benchmarks.tpu import tune as tpu


def row(sizes, cost, seconds, fault=None, source="a", date="2026-01-01"):
    """A row of a report, as `search` makes them."""
    made_by = {"compiler": "c", "source": source, "date": date}
    return {"entry": "e", "sizes": sizes, "cost": cost, "seconds": seconds, "fault": fault, **made_by}


def toy(measure=None, table=1):
    """A chip with one entry of two candidates."""
    sizes = [{"heads": table}, {"heads": 3 - table}]
    return types.SimpleNamespace(
        TOLERANCE=0.03,
        ENTRIES={"e": sizes},
        measure=measure,
        rank=lambda row: row["seconds"],
        versions=lambda: {"compiler": "c", "source": "a"},
    )


def test_the_choice():
    """The least cost; among equal costs the fastest to compile; never a candidate with a fault."""
    rows = [row({"heads": 8}, 10.0, 60), row({"heads": 4}, 10.2, 30), row({"heads": 2}, 12.0, 10)]
    assert tune.chosen(toy(), rows)["sizes"] == {"heads": 4}
    assert tune.chosen(toy(), [*rows, row({"heads": 1}, 1.0, 1, "spills")])["sizes"] == {"heads": 4}
    assert tune.chosen(toy(), [row({"heads": 1}, None, 1, "VMEM")]) is None


def test_verdicts():
    """A table is wrong where another candidate is chosen, or where its own sizes were never compiled."""
    rows = [row({"heads": 1}, 10.0, 60), row({"heads": 2}, 20.0, 30)]
    assert tune.verdicts(toy(), rows) == {"e": None} and tune.verdicts(toy(), []) == {}
    assert "choose {'heads': 1}" in tune.verdicts(toy(table=2), rows)["e"]
    assert "not among the rows" in tune.verdicts(toy(), rows[1:])["e"]
    # Rows of other sources are not compared.
    newer = [row({"heads": 2}, 5.0, 1, source="b", date="2026-01-02")]
    assert "not among the rows" in tune.verdicts(toy(), rows + newer)["e"]


def test_a_search_resumes(tmp_path, capsys):
    """Every candidate is written when it is compiled, and is not compiled again."""
    calls = []

    def measure(entry, sizes):
        calls.append(sizes["heads"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"cost": 10.0 * sizes["heads"], "fault": None, "seconds": 1.0, "spills": 3}

    chip, path = toy(measure), tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        tune.search(chip, [], path)
    rows = tune.search(chip, [], path)
    assert calls == [1, 2, 2] and tune.search(chip, [], path) == rows == tune.read(path)
    assert [line.split()[:2] for line in tune.table(chip, rows, "e")[1:]] == [["*", "1.00"], ["2.00", "heads"]]


@pytest.mark.parametrize("chip", [tpu, gpu], ids=["tpu", "gpu"])
def test_the_table_is_that_of_the_report(chip):
    """Entries that were compiled have the sizes that their rows choose."""
    found = tune.verdicts(chip, tune.read(chip.OUT))
    assert found and not any(found.values()), found
