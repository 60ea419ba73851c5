"""docs/results.md, written from the JSONs of finished studies."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from memformer.lab import STUDIES
from memformer.lab.runner import read_result, save_figure
from memformer.lab.study import Result, Row, Study
from memformer.training.config import RunError
from memformer.training.metrics import replace_file

__all__ = ["render_page", "write_page"]

HEAD = """# Results

Claims of the literature about associative memories, tested with the models of this repository. Each section states the
claim, the verdict and a figure; all numbers and the commands that produced them unfold below it. Seconds are those of
training steps on two CPU cores that other work shared. Written by `python -m memformer.lab --write` from the JSONs in
[results/](results).
"""
SHOWN_ROWS = 10


def write_page(folder: str, studies: Mapping[str, Study] = STUDIES) -> str:
    """Draws the figures of all results in `folder`, writes <folder>.md and returns its path.

    Raises:
      RunError: a folder without results, or with those of an unknown study.
    """
    text = render_page(folder, studies)
    for name, content in _contents(folder).items():
        save_figure(studies[name], read_result(content), folder)
    path = f"{os.path.normpath(folder)}.md"
    with replace_file(path) as file:
        file.write(text)
    return path


def render_page(folder: str, studies: Mapping[str, Study] = STUDIES) -> str:
    """The page as text.

    Raises:
      RunError: a folder without results, or with those of an unknown study.
    """
    here, contents = pathlib.Path(folder), _contents(folder)
    unknown = [name for name in contents if name not in studies]
    if not contents or unknown:
        why = f"holds results of no study: {', '.join(unknown)}" if unknown else "holds no JSON of a study"
        raise RunError(f"cannot write the page of results: {folder} {why}.")
    commands = _training_commands(here.resolve().parents[1] / "configs")
    known = {name: study for name, study in studies.items() if name in contents}
    listed = [
        f"- [{study.title}](#{_anchor(study.title)}): {_verdict(contents[name])[0]}" for name, study in known.items()
    ]
    sections = [_section(study, contents[name], here.name, commands) for name, study in known.items()]
    return "\n".join([HEAD, *listed, "", *sections])


def _contents(folder: str) -> dict[str, dict[str, Any]]:
    paths = sorted(pathlib.Path(folder).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _training_commands(configs: pathlib.Path) -> dict[str, str]:
    """Run folder to the command that trains it, from the docstrings of configs/."""
    commands = {}
    for path in sorted(configs.glob("*.py")):
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        for command in re.findall(r"python train\.py [^\n`]*--workdir=\S+[^\n`]*", text):
            commands[re.findall(r"--workdir=(\S+)", command)[0]] = command.strip()
    return commands


def _command(folder: str, folders: Sequence[str], commands: Mapping[str, str]) -> str:
    """The command that trains a run; runs of other seeds, also those that it starts from, are runs/NAME_seed1, ..."""
    base, _, seed = folder.partition("_seed")
    if folder in commands or base not in commands:
        return commands.get(folder, folder)
    seeded = {name: f"{name}_seed{seed}" for name in folders}
    words = commands[base].replace(f"--workdir={base}", f"--config.seed={seed} --workdir={folder}").split("=")
    # what stands after an equals sign may be the folder of another run
    for place, (name, *rest) in enumerate(word.partition(" ") for word in words):
        if seeded.get(name) in folders:
            words[place] = "".join([seeded[name], *rest])
    return "=".join(words)


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _verdict(content: Mapping[str, Any]) -> tuple[str, str]:
    verdict = content["verdict"] or {"kind": "not judged", "finding": "A quick run."}
    return verdict["kind"], verdict["finding"]


def _section(study: Study, content: Mapping[str, Any], folder: str, commands: Mapping[str, str]) -> str:
    result, (kind, finding) = read_result(content), _verdict(content)
    lines = [
        f"## {study.title}",
        "",
        f"Claim: {study.claim} ({study.source})",
        "",
        f"**{kind.capitalize()}.** {finding}",
        "",
        f"![{study.title}]({folder}/{study.name}.png)",
        "",
        f"*{study.caption}*",
        "",
    ]
    summary = _summary(study, result)
    if summary:
        lines += [*_table(summary), ""]
    lines += ["<details><summary>All numbers and commands</summary>", ""]
    for title, rows in result.tables:
        if rows != summary:
            lines += [f"{title}:", "", *_table(rows), ""]
    folders = [run["folder"] for run in content["runs"]]
    for run in content["runs"]:
        command = _command(run["folder"], folders, commands)
        size = f"{run['parameters']:,} parameters, {run['step']} steps in {run['seconds']:.0f} s"
        lines.append(f"- `{command}`: {size}, seed {run['seed']}")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    command = " ".join([f"python -m memformer.lab {study.name}", *folders])
    lines += [f"- `{command}`: {content['seconds']:.0f} s; {content['date']}, {versions}", "", "</details>"]
    return "\n".join(lines) + "\n"


def _summary(study: Study, result: Result) -> Sequence[Row] | None:
    """The rows of the one table in full view, at most ten."""
    rows = result.tables[0].rows if study.summary is None else study.summary(result)
    return rows if len(rows) <= SHOWN_ROWS else None


def _table(rows: Sequence[Row]) -> list[str]:
    header = list(rows[0])
    return [_row(header), _row(["---"] * len(header)), *(_row(row.values()) for row in rows)]


def _row(cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
