"""Corpora: text, JSON lines, Parquet, compressed, folders, sources from Python; problems with file and line."""

import gzip
import itertools
import json

import pytest

from memformer.data.corpus import open_corpus, wrap_source
from memformer.data.text_files import Problem
from memformer.data.tokenizer import load_tokenizer, train_tokenizer

DOCUMENTS = ["one", "two\nlines\n", "drei: größe", "vier 東京 \U0001f600"]


def lines(*values) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def read(corpus, start=(0, 0)):
    """Texts and problems."""
    problems: list[Problem] = []
    records = [record for _, record in corpus.read(start, problems.append)]
    return [record.prompt + record.text for record in records], problems


def write(path, content: bytes):
    """Writes a file, compressed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json"])
def test_json_lines(tmp_path, kind, packed):
    content = lines(*({"id": i, "text": text} for i, text in enumerate(DOCUMENTS)))
    corpus = open_corpus([write(tmp_path / f"a.{kind}{packed}", content)])
    assert read(corpus) == (DOCUMENTS, []) and corpus.most is None


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_text_files(tmp_path, packed):
    paths = [write(tmp_path / f"{i}.txt{packed}", text.encode()) for i, text in enumerate(DOCUMENTS)]
    corpus = open_corpus(paths)
    assert read(corpus) == (DOCUMENTS, []) and corpus.most == 4


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path, packed):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [*DOCUMENTS, None], "n": [1, 2, 3, 4, 5]}), tmp_path / "a.parquet")
    path = write(tmp_path / f"b.parquet{packed}", (tmp_path / "a.parquet").read_bytes())
    texts, problems = read(open_corpus([path]))
    assert texts == DOCUMENTS
    assert problems == [Problem(f"{path}, row 5", "no text", "'text' must be a string, got NoneType")]
    texts, problems = read(open_corpus([path], field="body"))
    assert texts == [] and problems[0].message == "has no 'body', nor prompt and completion; it has text, n"
    texts, problems = read(open_corpus([path], field="n"))
    assert texts == [] and problems[0].message == "column 'n' must hold strings, got int64"


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_columns_of_text(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [text.encode() for text in DOCUMENTS] if kind == "binary" else DOCUMENTS
    values = [*values, b"\xff"] if kind == "binary" else values
    column = arrow.array(values)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(arrow, kind)())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    texts, problems = read(open_corpus([str(tmp_path / "a.parquet")]))
    assert texts == DOCUMENTS and [problem.kind for problem in problems] == ["broken UTF-8"] * (kind == "binary")


def test_parquet_with_prompts_and_with_broken_strings(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"prompt": ["1 + 1 =", "2 + 2 ="], "completion": [" 2", " 4"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(open_corpus([str(tmp_path / "a.parquet")]))[0] == ["1 + 1 = 2", "2 + 2 = 4"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table")
    assert read(open_corpus([str(tmp_path / "b.parquet")]))[1][0].kind == "unreadable file"


def test_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "q", "completion": "a"}, {"text": "t"}, {"prompt": "q"}))
    problems: list[Problem] = []
    records = [record for _, record in open_corpus([path]).read(report=problems.append)]
    assert [(record.prompt, record.text) for record in records] == [("q", "a"), ("", "t")]
    assert problems[0].place == f"{path}:3" and "it has prompt" in problems[0].message


def test_messages_are_rendered_by_the_template_of_the_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    template = (
        "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    train_tokenizer(["user assistant"], tmp_path / "tokenizer", vocab_size=260)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    chat = load_tokenizer(str(tmp_path / "tokenizer"))
    talk = [("user", "hi"), ("assistant", "yes?"), ("user", "go"), ("assistant", "gone")]
    messages = [{"role": role, "content": content} for role, content in talk]
    path = write(tmp_path / "a.jsonl", lines({"messages": messages}, {"messages": messages[:1]}, {"messages": 3}))
    problems: list[Problem] = []
    ((_, record),) = open_corpus([path], chat=chat).read(report=problems.append)
    end = "<|endoftext|>"
    assert record.prompt == f"<user>hi{end}<assistant>yes?{end}<user>go{end}<assistant>"
    assert record.text == f"gone{end}"
    assert [problem.place for problem in problems] == [f"{path}:2", f"{path}:3"]
    assert all("of which the last has the role 'assistant'" in problem.message for problem in problems)
    assert "need a tokenizer with a chat template" in read(open_corpus([path]))[1][0].message
    bad = write(tmp_path / "b.jsonl", lines({"messages": [{"role": "bad", "content": ""}, messages[-1]]}))
    assert "failed: no bad" in read(open_corpus([bad], chat=chat))[1][0].message
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages | length }}")
    odd = load_tokenizer(str(tmp_path / "tokenizer"))
    assert "another beginning than without their answer" in read(open_corpus([path], chat=odd))[1][0].message


def test_folders(tmp_path):
    inner = tmp_path / "b" / "c"
    inner.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    files = {"a.txt": "1", "b/x.md": "2", "b/c/y.jsonl": '{"text": "3"}', "b/setup.json": "{}", ".git/z.txt": "no"}
    for name, text in {**files, "q.py": "5", "b/.hidden.txt": "no"}.items():
        (tmp_path / name).write_text(text)
    with gzip.open(tmp_path / "z.txt.gz", "wb") as file:
        file.write(b"4")
    assert read(open_corpus([str(tmp_path)])) == (["1", "4", "2", "3"], [])
    assert read(open_corpus([str(tmp_path)], suffix=".py")) == (["5"], [])
    with pytest.raises(ValueError, match=r"has no file that ends in .doc; it has files that end in .*.py"):
        open_corpus([str(tmp_path)], suffix=".doc")
    for paths, problem in (
        ([str(tmp_path / "nowhere")], "files or folders that exist, got"),
        ([], "at least one file"),
    ):
        with pytest.raises(ValueError, match=problem):
            open_corpus(paths)


def test_separators(tmp_path):
    text = "\ufeffone\n<|e|>two\n\nmore\n<|e|><|e|>three"
    path = write(tmp_path / "a.txt", text.encode())
    assert read(open_corpus([path], separator="<|e|>")) == (["one\n", "two\n\nmore\n", "three"], [])
    places = [record.place for _, record in open_corpus([path], separator="<|e|>").read()]
    assert places == [f"{path}:{line}" for line in (1, 2, 5)]


@pytest.mark.parametrize("block", [1, 3, 7, 2**20])
def test_division_does_not_depend_on_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("memformer.data.text_files.BLOCK", block)
    text = "".join(f"größe {i} über\n" * (1 + i % 3) + "--\n" for i in range(40))
    path = write(tmp_path / "a.txt", text.encode())
    assert read(open_corpus([path], separator="--\n"))[0] == [part for part in text.split("--\n") if part]
    pieces, problems = read(open_corpus([path], piece_bytes=50))
    assert "".join(pieces) == text and problems == []
    assert all(len(piece.encode()) <= 50 and piece.endswith("\n") for piece in pieces)
    # lines longer than a piece are cut between characters
    long = write(tmp_path / "b.txt", "ü\U0001f600".encode() * 30)
    pieces, problems = read(open_corpus([long], piece_bytes=7))
    assert "".join(pieces) == "ü\U0001f600" * 30 and problems == []
    both = read(open_corpus([path], separator="--\n", piece_bytes=30))[0]
    assert "".join(both) == text.replace("--\n", "") and max(len(piece.encode()) for piece in both) <= 30
    # line ends of another system
    other = write(tmp_path / "c.txt", b"one\r\n\r\ntwo\r\nmore\r\n\r\nthree\n\nfour")
    for separator in ("\n\n", "\r\n\r\n"):
        assert read(open_corpus([other], separator=separator))[0] == ["one", "two\r\nmore", "three\n\nfour"]


PROBLEMS = {
    "broken text": ("a.txt", b"fine\nbr\xffoken\n", 2, "broken UTF-8", "byte 0xff is no UTF-8"),
    "latin 1": ("a.txt", "größe".encode("latin-1"), 1, "broken UTF-8", "save the text as UTF-8"),
    "empty text": ("a.txt", b"", None, "empty", "the file has no text"),
    "white text": ("a.txt", b" \n\n", None, "empty", "the file has no text"),
    "empty lines": ("a.jsonl", b"\n\n", None, "empty", "the file has no line"),
    "no json": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\n', 3, "not JSON", "the line is no JSON: Invalid control"),
    "deep json": ("a.jsonl", b"[" * 10**5, 1, "not JSON", "the line is no JSON"),
    "broken json": ("a.jsonl", b'{"text": "\xff"}\n', 1, "broken UTF-8", "byte 0xff"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', 1, "broken UTF-8", "half of a surrogate pair"),
    "number": ("a.jsonl", b"17\n", 1, "no text", "expected an object with 'text', got int"),
    "no field": ("a.jsonl", b'{"body": "a", "id": 1}\n', 1, "no text", "has no 'text', nor .*; it has body, id"),
    "null": ("a.jsonl", b'{"text": null}\n', 1, "no text", "'text' must be a string, got NoneType"),
    "empty string": ("a.jsonl", b'{"text": " "}\n', 1, "empty", "'text' is empty"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_have_a_file_and_a_line(tmp_path, case):
    name, content, line, kind, message = PROBLEMS[case]
    path = write(tmp_path / name, content)
    corpus = open_corpus([path])
    (problem,) = read(corpus)[1]
    assert problem.place == (path if line is None else f"{path}:{line}")
    assert problem.kind == kind
    with pytest.raises(ValueError, match=f"{name}.*: .*{message}"):
        list(corpus.texts())


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_damaged_compression(tmp_path, packed, kind):
    content = lines(*({"text": f"{i} {i * i}"} for i in range(4000)))
    path = tmp_path / f"a{kind}{packed}"
    write(path, content)
    path.write_bytes(path.read_bytes()[:-2000])
    texts, problems = read(open_corpus([str(path)]))
    assert [(problem.place, problem.kind) for problem in problems[-1:]] == [(str(path), "unreadable file")]
    path.write_bytes(b"no archive")
    assert read(open_corpus([str(path)]))[1][0].message.startswith("the file cannot be read: ")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archives_in_one_file_are_one(tmp_path, packed):
    archives = []
    for text in DOCUMENTS:
        write(tmp_path / f"part{packed}", text.encode())
        archives.append((tmp_path / f"part{packed}").read_bytes())
    (tmp_path / f"a.txt{packed}").write_bytes(b"".join(archives))
    assert read(open_corpus([str(tmp_path / f"a.txt{packed}")])) == (["".join(DOCUMENTS)], [])


def test_a_file_that_is_gone_is_a_problem(tmp_path):
    paths = [write(tmp_path / f"{i}.txt", text.encode()) for i, text in enumerate(DOCUMENTS)]
    corpus = open_corpus(paths)
    (tmp_path / "1.txt").unlink()
    texts, (problem,) = read(corpus)
    assert texts == [DOCUMENTS[0], *DOCUMENTS[2:]] and problem.place == paths[1]


def test_every_cursor_continues_where_it_was(tmp_path):
    write(tmp_path / "a.jsonl", lines({"text": "1"}, 2, {"text": "3"}, {"text": ""}))
    write(tmp_path / "b.txt", b"\xff")
    write(tmp_path / "c.jsonl", lines({"text": "4"}, {"text": "5"}, None))
    corpus = open_corpus([str(tmp_path)])
    whole = list(corpus.read(report=lambda problem: None))
    for place, (cursor, _) in enumerate(whole):
        problems: list[Problem] = []
        rest = list(corpus.read(cursor, problems.append))
        assert rest == whole[place + 1 :]
    assert [record.text for _, record in whole] == ["1", "3", "4", "5"]


SOURCES = {
    "list": list,
    "generator": lambda texts: (text for text in texts),
    "mappings": lambda texts: [{"text": text} for text in texts],
    "grain": lambda texts: pytest.importorskip("grain").MapDataset.source(texts).map(lambda text: {"text": text}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_from_python(kind):
    corpus = wrap_source(SOURCES[kind](DOCUMENTS))
    assert list(itertools.islice(corpus.texts(), 10)) == DOCUMENTS


def test_a_source_by_index_alone():
    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"body": f"{index}" * (index != 1)}

    texts, (problem,) = read(wrap_source(Source(), field="body", name="mine"))
    assert texts == ["0", "2"] and problem.place == "mine, item 1"


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name, library in (("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ImportError, match=f"{name} needs the Python package {library}.*pip install {library}"):
            list(open_corpus([str(tmp_path / name)]).texts())
