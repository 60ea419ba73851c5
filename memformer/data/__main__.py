"""python -m memformer.data train_tokenizer|tokenize|summary: from one's own text to a token store.

python -m memformer.data train_tokenizer books/ --out=books.tokenizer --vocab_size=8000
python -m memformer.data tokenize books/ --out=books.tokens --tokenizer=books.tokenizer --processes=4
python -m memformer.data summary books.tokens
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from memformer.data.corpus import Corpus, open_corpus
from memformer.data.token_store import TokenStore
from memformer.data.tokenization import describe_problem, tokenize_corpus, training_texts
from memformer.data.tokenizer import FileTokenizer, Tokenizer, load_tokenizer, train_tokenizer

# the commands are the interface
__all__ = []


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memformer.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train_tokenizer", help="train a byte-level BPE tokenizer on a corpus")
    _add_corpus(train)
    train.add_argument("--out", required=True, metavar="FOLDER", help="folder of the new tokenizer.json")
    train.add_argument("--vocab_size", type=int, default=32000, help="largest number of ids (default: 32000)")
    train.add_argument("--max_bytes", type=int, default=2**30, help="bytes of text to train on (default: 1 GiB)")
    train.set_defaults(run=_train_tokenizer)
    tokenize = commands.add_parser("tokenize", help="write a token store; the same command resumes")
    _add_corpus(tokenize)
    tokenize.add_argument("--out", required=True, metavar="STORE", help="folder of the store")
    tokenize.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json or its folder")
    tokenize.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    tokenize.add_argument("--on_error", default="skip", choices=("skip", "fail"), help="for what cannot be read")
    tokenize.add_argument("--shard_bytes", type=int, default=2**24, help="text per shard (default: 16 MiB)")
    tokenize.set_defaults(run=_tokenize)
    summary = commands.add_parser("summary", help="print what a token store holds")
    summary.add_argument("store")
    summary.set_defaults(run=lambda options: _say(TokenStore(options.store).summary()))
    return parser


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="text, JSON lines or Parquet; files or folders")
    parser.add_argument("--field", default="text", help="name of the text in JSON and Parquet (default: text)")
    parser.add_argument("--suffix", default="", help="ending of the file names in folders, such as .py")
    parser.add_argument("--separator", default="", help="text between two documents of a file; \\n is a line feed")
    parser.add_argument("--piece_bytes", type=int, default=0, help="cut longer documents of text files at line ends")
    parser.add_argument("--validation", type=int, default=5, metavar="PERCENT", help="of the documents (default: 5)")
    parser.add_argument("--test", type=int, default=5, metavar="PERCENT", help="of the documents (default: 5)")


def _corpus(options: argparse.Namespace, tokenizer: Tokenizer | None = None) -> Corpus:
    separator = options.separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    return open_corpus(
        options.paths,
        field=options.field,
        suffix=options.suffix,
        separator=separator,
        piece_bytes=options.piece_bytes,
        chat=tokenizer if isinstance(tokenizer, FileTokenizer) else None,
    )


def _train_tokenizer(options: argparse.Namespace) -> None:
    texts = training_texts(
        _corpus(options),
        validation=options.validation,
        test=options.test,
        report=lambda problem: _say(describe_problem(problem)),
    )
    counted = _Counted(texts, options.max_bytes)
    tokenizer = train_tokenizer(counted, options.out, vocab_size=options.vocab_size)
    _say(f"{options.out}: {tokenizer.vocab_size:,} ids from {counted.documents:,} documents, {counted.size:,} bytes")
    if tokenizer.vocab_size < options.vocab_size:
        _say(f"fewer than {options.vocab_size:,}: no further pair occurs twice")


class _Counted:
    """Texts up to a number of bytes, counted."""

    def __init__(self, texts: Iterator[str], most: int):
        self._texts, self._most = texts, most
        self.documents = self.size = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.documents += 1
            self.size += len(text.encode())
            yield text
            if self.size >= self._most:
                return


def _tokenize(options: argparse.Namespace) -> None:
    store = tokenize_corpus(
        _corpus(options, load_tokenizer(options.tokenizer)),
        options.out,
        tokenizer=options.tokenizer,
        validation=options.validation,
        test=options.test,
        processes=options.processes,
        on_error=options.on_error,
        shard_bytes=options.shard_bytes,
        log=_say,
    )
    _say(store.summary())


def _say(line: str) -> None:
    # a closed pipe must not end the work
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
