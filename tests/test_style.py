"""Lint, types, and the house's own rules: sizes, error handling, vocabulary, prose.

Each check is a test that runs alone: `pytest tests/test_style.py::test_lint`, `::test_types`, `::test_sizes`.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_tool(*command: str) -> str:
    """Runs a tool of the test environment on the checkout; returns its output where it fails."""
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return run.stdout + run.stderr if run.returncode else ""


def test_lint():
    assert run_tool("ruff", "check", "--no-cache", ".") == ""


def test_format():
    assert run_tool("ruff", "format", "--no-cache", "--check", ".") == ""


def test_types():
    # a run after the first checks what has changed (.mypy_cache)
    assert run_tool("mypy") == ""


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a file, which several checks read."""
    return tuple(ast.walk(ast.parse(source)))


def size_faults(source: str, kernel: bool) -> list[str]:
    """Files and functions that are too long, one line each."""
    lines, longest = (700, 120) if kernel else (400, 70)
    found = [f"{source.count(chr(10))} lines, at most {lines}"] if source.count("\n") > lines else []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.body[0].end_lineno if ast.get_docstring(node) else 0
            length = length or node.end_lineno - node.lineno + 1
            if length > longest:
                found.append(f"{node.lineno}: {node.name} has {length} lines, at most {longest}")
    return found


def error_faults(source: str) -> list[str]:
    """Asserts, prints, silenced NaNs and handlers that catch everything, one line each."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert; a caller's mistake is a ValueError")
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            found.append(f"{node.lineno}: catches everything")
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in ("print", "nan_to_num") and not (isinstance(node, ast.Attribute) and name == "print"):
                found.append(f"{node.lineno}: {name}")
    return found


# DESIGN's vocabulary: names that the tree no longer has, and what to write. A name counts where Python binds or reads
# it (variable, argument, function, class, attribute, keyword or module), never in prose.
RENAMED = {
    "Cut": "ScanConfig or AttentionConfig",
    "cut_call": "plan_call",
    "Sight": "Mask",
    "Timeline": "Mask",
    "Marks": "Mask",
    "Told": "Predictions",
    "StepSize": "SigmoidGate",
    "_recall": "_apply_op",
    "norm_of": "logsumexp",
    "token_rows": "token_scalars",
    "unlay": "unchunk_queries",
}
# In ops and pallas only: elsewhere the word may have its everyday sense (`ast.walk`, a dropout's keep).
RENAMED_IN_KERNELS = {
    "walk": "chunk_scan",
    "_walk": "chunk_scan",
    "enter": "decay_in",
    "leave": "decay_out",
    "keep": "chunk_decay",
    "lay": "chunk_queries",
    "lag": "prefetch",
    "abreast": "interleave",
    "lockstep": "interleave",
    "turned": "transposed",
    "spread": "broadcast_rows",
    "halves": "split_bf16",
    "widen": "rescale or pad_channels",
    "weights_of": "attention_weights or parameters_of",
    "hide": "mask_scores",
    "visible": "tile_mask",
    "said": "log",
    "settled": "resolved",
}
RENAMED_MODULES = {
    "memformer/pallas/": ("columns", "tile_gradients", "rows", "walk", "sight", "prepare", "partition"),
    "memformer/tasks/": ("bits", "segments", "recall", "reference"),
}


def identifiers(source: str):
    """Yields (line, name) of every name that the code binds or reads."""
    for node in nodes(source):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, (node.asname or node.name).split(".")[-1]


def vocabulary_faults(source: str, kernel: bool) -> list[str]:
    """Names that were renamed, one line each."""
    names = RENAMED | RENAMED_IN_KERNELS if kernel else RENAMED
    # a plain search first: most files have none of them
    if not any(name in source for name in names):
        return []
    return [f"{line}: {name}; write {names[name]}" for line, name in identifiers(source) if name in names]


def doubled_classes(sources: dict[str, str]) -> list[str]:
    """Class names that two modules define: two things under one word. The same module of both chips may share one."""
    places: dict[str, set[str]] = {}
    for file, source in sources.items():
        for node in nodes(source):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, set()).add(file.replace("/gpu/", "/tpu/"))
    return [f"{name}: {', '.join(sorted(files))}" for name, files in places.items() if len(files) > 1]


_UNITS = "head|token|chunk|channel|step|row|layer|batch|program|device|query|key|slot|segment|sequence|second"
_COUNTED = (
    "bits|bytes|numbers|tokens|steps|pairs|heads|channels|writes|weights|rows|columns|texts|hypotheses|FLOPs|seconds|"
    "milliseconds|microseconds|ms|cost|perplexity|factor|decay|matrix|once|one"
)
DISTRIBUTIVE = re.compile(rf" an? (?:{_UNITS})\b")
COUNTED = re.compile(rf"\b(?:{_COUNTED.lower()})$")
# Phrases that no text has, and how to write them.
PHRASES = {
    ("as ever",): "a reference",
    ("goes on", "going on"): "continues, resumes",
    ("one who runs",): "user",
    ("what comes out",): "result, output",
    ("is to be", "are to be"): "must be, is",
    ("is told", "are told", "told by", "told rightly"): "is reported, is defined by",
    ("line that led here",): "baselines",
    ("who sees whom",): "mask",
}


def prose_faults(text: str) -> list[str]:
    """Phrases of the list, one line each."""
    text = text.lower()
    found = [
        (place.start(), place.group(), "'per head', not 'a head'")
        for place in DISTRIBUTIVE.finditer(text)
        if COUNTED.search(text[max(0, place.start() - 20) : place.start()])
    ]
    for phrases, instead in PHRASES.items():
        # a plain search first: a pattern takes twenty times as long
        for phrase in (phrase for phrase in phrases if phrase in text):
            found += [(place.start(), phrase, instead) for place in re.finditer(rf"\b{phrase}\b", text)]
    return [f"{text.count(chr(10), 0, start) + 1}: {phrase!r}; write {instead}" for start, phrase, instead in found]


CLAUSES = "What|Where|How|Who|Whom|That|Which"
OPENING = re.compile(rf"[\"']\s*(?:{CLAUSES})\b")


def docstring_faults(source: str) -> list[str]:
    """Docstrings that open with a clause instead of a verb or noun phrase, one line each."""
    found: list[str] = []
    # a plain search first: most files have none
    if not OPENING.search(source):
        return found
    for node in nodes(source):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "-").split()[0].strip(",;:")
            if re.fullmatch(CLAUSES, first):
                found.append(f"{getattr(node, 'lineno', 1)}: docstring opens with '{first}'")
    return found


def is_kernel(file: str) -> bool:
    return file.startswith("memformer/pallas/")


def is_op(file: str) -> bool:
    return file.startswith(("memformer/pallas/", "memformer/ops/"))


def files(*patterns: str) -> dict[str, str]:
    """Contents of the checkout's files by path; this file, which holds the lists, is left out."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)} - {pathlib.Path(__file__).resolve()}
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


LIBRARY = files("memformer/**/*.py")
PYTHON = files("memformer/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "configs/*.py", "*.py")
TEXTS = PYTHON | files("*.md", "docs/*.md")


def collect(check, sources: dict[str, str]) -> list[str]:
    """The faults of all files, each with its place."""
    return [f"{file}:{fault}" for file, source in sources.items() for fault in check(file, source)]


def test_sizes():
    assert collect(lambda file, source: size_faults(source, is_kernel(file)), LIBRARY) == []


def test_errors():
    assert collect(lambda file, source: error_faults(source), LIBRARY) == []


def test_vocabulary():
    assert collect(lambda file, source: vocabulary_faults(source, is_op(file)), PYTHON) == []
    for folder, names in RENAMED_MODULES.items():
        assert [file for file in LIBRARY if file.startswith(folder) and pathlib.Path(file).stem in names] == []


def test_one_class_under_one_name():
    assert doubled_classes(LIBRARY) == []


def test_prose():
    assert collect(lambda file, text: prose_faults(text), TEXTS) == []
    assert collect(lambda file, source: docstring_faults(source), PYTHON) == []


# check, a source, the number of faults that it has
SYNTHETIC = {
    "clean size": (lambda source: size_faults(source, False), "def f(x):\n    return x\n", 0),
    "long function": (lambda source: size_faults(source, False), "def f():\n" + "    x = 1\n" * 71, 1),
    "long file": (lambda source: size_faults(source, False), "x = 1\n" * 401, 1),
    "long kernel": (lambda source: size_faults(source, True), "x = 1\n" * 401, 0),
    "clean errors": (error_faults, "def f(x):\n    return jax.debug.print('x')\n", 0),
    "assert": (error_faults, "assert True\n", 1),
    "print": (error_faults, "print(1)\n", 1),
    "nan_to_num": (error_faults, "import jax.numpy as jnp\njnp.nan_to_num(1)\n", 1),
    "bare except": (error_faults, "try:\n    pass\nexcept:\n    pass\n", 1),
    "except Exception": (error_faults, "try:\n    pass\nexcept Exception:\n    pass\n", 1),
    "old class": (lambda source: vocabulary_faults(source, False), "class Cut:\n    pass\n", 1),
    "old import": (lambda source: vocabulary_faults(source, False), "from a import Sight\n", 1),
    "old argument": (lambda source: vocabulary_faults(source, True), "def f(lag):\n    return x.enter\n", 2),
    "everyday word": (lambda source: vocabulary_faults(source, False), "ast.walk(tree)\n# keep\n", 0),
    "two classes": (lambda source: doubled_classes({"a": source, "b": source}), "class Plan:\n    pass\n", 1),
    "two chips": (lambda source: doubled_classes({"a/gpu/b": source, "a/tpu/b": source}), "class Plan:\n    pass\n", 0),
    "distributive": (prose_faults, "two chunks a step, decay a head", 1),
    "no distributive": (prose_faults, "one of a head's channels; a head", 0),
    "as ever": (prose_faults, "plan: as\never, as ever", 1),
    "docstring": (docstring_faults, '"""What it is."""\ndef f():\n    """Returns it."""\n', 1),
}


@pytest.mark.parametrize("case", SYNTHETIC)
def test_the_check_sees(case):
    check, source, count = SYNTHETIC[case]
    assert len(check(source)) == count
