"""docs/results.md, written from the JSONs of finished studies."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from memformer.lab import LABS, SIMULATIONS
from memformer.training.config import RunError
from memformer.training.metrics import replace_file

__all__ = ["render_page", "write_page"]

HEAD = """# Results

What trained models of this repository do, beside what is claimed of them. Written by
`python -m memformer.lab --write` from the JSONs in [results/](results): every number was measured by the commands
beside it. Seconds are those of training steps, on two CPU cores with much other work beside.
"""


def write_page(folder: str) -> str:
    """Writes <folder>.md from the JSONs in `folder` and returns its path.

    Raises:
      RunError: a folder without results.
    """
    path = f"{os.path.normpath(folder)}.md"
    text = render_page(folder)
    with replace_file(path) as file:
        file.write(text)
    return path


def render_page(folder: str) -> str:
    """The page as text.

    Raises:
      RunError: a folder without results.
    """
    here = pathlib.Path(folder)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(here.glob("*.json"))}
    if not found:
        raise RunError(f"no results to write a page from: {folder} holds no JSON of a study.")
    known = (*SIMULATIONS, *LABS)
    order = [*(name for name in known if name in found), *(name for name in found if name not in known)]
    commands = _training_commands(here.resolve().parents[1] / "configs")
    return "\n".join([HEAD, *(_section(found[name], here.name, commands) for name in order)])


def _training_commands(configs: pathlib.Path) -> dict[str, str]:
    """Run folder to the command that makes it, from the docstrings of configs/."""
    commands = {}
    for path in sorted(configs.glob("*.py")):
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        for command in re.findall(r"python train\.py [^\n`]*--workdir=\S+[^\n`]*", text):
            commands[re.findall(r"--workdir=(\S+)", command)[0]] = command.strip()
    return commands


def _section(study: Mapping[str, Any], folder: str, commands: Mapping[str, str]) -> str:
    lines = [f"## {study['name']}", "", f"Claim: {study['claim']}", "", f"Outcome: {study['outcome']}", ""]
    for table in study["tables"]:
        header = list(table["rows"][0])
        lines += [f"{table['title']}:", "", _row(header), _row(["---"] * len(header))]
        lines += [_row(row.values()) for row in table["rows"]]
        lines.append("")
    for figure in study["figures"]:
        lines += [f"![{figure['caption']}]({folder}/{figure['file']})", "", f"*{figure['caption']}*", ""]
    for run in study["runs"]:
        command = commands.get(run["folder"], run["folder"])
        size = f"{run['parameters']:,} parameters, {run['step']} steps in {run['seconds']:.0f} s"
        lines.append(f"- `{command}`: {size}, seed {run['seed']}")
    folders = "".join(f" {run['folder']}" for run in study["runs"])
    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    lines += [
        f"- `python -m memformer.lab {study['name']}{folders}`: {study['seconds']:.0f} s; {study['date']}, {versions}"
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
