"""docs/scaling.md is what its rows say, and a row can be made again."""

import json

import jax
import pytest

from benchmarks import scaling

ROWS = list(scaling.read(scaling.OUT).values())


def test_the_page_is_made_of_its_rows():
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.make_page(ROWS)
    assert len(ROWS) == len(json.loads(scaling.OUT.read_text())) > 0


def test_rows_agree_with_themselves():
    for row in ROWS:
        devices, rows = scaling.TARGETS[row["target"]]
        assert row["rows"] == rows and row["model"] in scaling.MODELS
        # float32 AdamW, all over fsdp: 12 bytes per parameter, but for what no axis divides
        share = 12 * row["parameters"] / devices / 2**30
        state = row["gib"]["weights"] + row["gib"]["optimizer"]
        assert share <= state + 0.002 and state <= 1.2 * share + 0.02, row
        if "step" in row:
            assert row["step"] == max(row["terms"].values()) and 0 < row["mfu"] <= 1.0, row


def test_a_row(monkeypatch):
    monkeypatch.setattr(scaling, "VOCABULARY", 64)
    monkeypatch.setitem(scaling.TARGETS, "h200:8", (8, 1))
    row = scaling.measure("tiny", "linear_attention", "h200:8", length=16)
    assert (
        row["fits"]
        and row["parameters"] > 4e5
        and 0 < row["mfu"] <= 1
        and set(row["terms"]) == {"compute", "memory", "network"}
    )
    assert "| tiny | 0.00 B | linear_attention | 1 |" in scaling.make_page([row])


def test_a_published_row_is_reproduced():
    """The row that compiles fastest, where the JAX that made it runs."""
    row = min((row for row in ROWS if row["target"].startswith("h200")), key=lambda row: row["seconds"])
    if row["jax"] != jax.__version__:
        pytest.skip(f"jax {row['jax']} made the row")
    found = scaling.measure(row["model"], row["memory"], row["target"])
    assert found["gib"] == row["gib"] and found["terms"] == pytest.approx(row["terms"], rel=1e-6)
