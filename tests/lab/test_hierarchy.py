"""The study of languages with one answer, on recorded scores."""

import json
import pathlib
import types

from memformer.lab.hierarchy import HIERARCHY, LENGTHS
from memformer.tasks import make_task


def test_scores_are_scaled_by_chance_and_judged_by_the_best_seed():
    """Chance is 1/2 on parity, 1/5 on modular arithmetic."""
    # accuracy of seeds 0 and 1; those that are not given guess
    recorded = {
        "parity DeltaFormer": (0.5, 0.75),
        "parity DeltaFormer, linear read": (0.6, 1.0),
        "parity LSTM": (0.5, 1.0),
        "modular_arithmetic DeltaFormer, linear read": (0.2, 0.6),
        "modular_arithmetic LSTM": (1.0, 1.0),
    }
    assert set(recorded) < set(HIERARCHY.rows)
    runs = {}
    for label in HIERARCHY.rows:
        task = make_task({"name": label.split()[0]})
        for seed in (0, 1):
            value = recorded.get(label, (1 / task.num_classes,) * 2)[seed]
            lengths = {str(n): {"accuracy": value} for n in (10, *LENGTHS)}
            runs[f"{label} seed {seed}"] = types.SimpleNamespace(task=task, result={"lengths": lengths})
    result = HIERARCHY.measure(runs, {})
    rows = {f"{row['task']} {row['model']}": row for row in result.rows()}
    assert rows["parity LSTM"]["at 250"] == "50.0% (0.0% to 100.0%)"
    arithmetic = rows["modular_arithmetic DeltaFormer, linear read"]
    assert arithmetic["at 250"] == "25.0% (0.0% to 50.0%)" and arithmetic["paper"] == "100.0%"
    assert "at 10" not in arithmetic and rows["parity Transformer"]["paper"] == "4.0%"
    verdict = HIERARCHY.judge(result)
    assert verdict.kind == "partly confirmed"
    assert "DeltaFormer 25.0% (0.0% to 50.0%), DeltaFormer, linear read 60.0%" in verdict.finding
    (first, *_) = HIERARCHY.summary(result)
    assert first["DeltaFormer"] == "25.0% (0.0% to 50.0%)" and len(first) == 5


def test_the_page_of_the_paper_has_the_measured_numbers():
    """Rows of tables that name a task and a model, or an alphabet of S5."""
    docs = pathlib.Path(__file__).parents[2] / "docs"
    page = (docs / "negative_eigenvalues.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    main = {}
    for name in ("hierarchy", "reflections"):
        main[name] = json.loads((docs / "results" / f"{name}.json").read_text())["tables"][0]["rows"]
    scores = {(row["task"], row["model"]): [row[f"at {n}"] for n in (40, 100, 250)] for row in main["hierarchy"]}
    found = [cells for cells in lines if tuple(cells[:2]) in scores]
    assert len(found) == 16 and all(cells[3:] == scores[cells[0], cells[1]] for cells in found)
    swaps, *two = [cells for cells in lines if cells[-1] == "reflections"]
    words = {(row["group"], row["model"]): [row["128 letters"], row["500 letters"]] for row in main["reflections"]}
    assert swaps[3:5] == words["S5, swaps", swaps[2]] and len(two) == 2
    assert all(cells[3:5] == words["S5, two letters", cells[2]] for cells in two)
