"""Tokenizers: the interface that data, training and generation share, bytes, and tokenizer.json files.

`load_tokenizer` makes one from "bytes" or a path. A tokenizer.json is read and trained by the library `tokenizers` of
the extra `text`.
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from memformer.core.checks import check_at_least

__all__ = [
    "ByteTokenizer",
    "FileTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
]

BYTES = 256
# Marks a folder that `save_tokenizer` wrote for a tokenizer of bytes.
BYTES_FILE = "bytes.json"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Names of the token that ends a text, where no tokenizer_config.json names one.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; all ids lie in [0, vocab_size)."""

    @property
    def end_of_text(self) -> int | None:
        """Id that ends a document and stands before the first token of one; None where there is none."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that ids depend on; token stores and runs record it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens; a cut character becomes U+FFFD."""


class ByteTokenizer:
    """The tokenizer of bytes: ids 0...255 are the bytes of UTF-8, 256 ends a text.

    Example:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("é!"), tokenizer.decode([195, 169, 256])
      ([195, 169, 33], 'é')
    """

    vocab_size: int = BYTES + 1
    end_of_text: int | None = BYTES
    fingerprint: str = "bytes"

    def encode(self, text: str) -> list[int]:
        """Bytes of a text in UTF-8."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of bytes; an invalid sequence becomes U+FFFD, and the end of text is left out.

        Raises:
          ValueError: an id outside [0, 257).
        """
        return bytes(i for i in _check_ids(ids, self.vocab_size) if i < BYTES).decode("utf-8", "replace")


class FileTokenizer:
    """The tokenizer of a tokenizer.json, with the chat template that stands beside it.

    Truncation and padding that the file asks for are turned off: a text keeps all of its tokens.

    Args:
      path: a tokenizer.json, or a folder that holds one.

    Attributes:
      path: the tokenizer.json.
      chat_template: Jinja template of chat_template.jinja or tokenizer_config.json; None where there is none.

    Raises:
      ValueError: no such file, or a file that is no tokenizer.
      ImportError: the library `tokenizers` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        given = pathlib.Path(path).expanduser()
        self.path = given / TOKENIZER_FILE if given.is_dir() else given
        if not self.path.is_file():
            raise ValueError(f"tokenizer must be a tokenizer.json or a folder that holds one, got {str(path)!r}")
        content = self.path.read_bytes()
        library = _import("tokenizers")
        with _ErrorsOfFile(self.path):
            self._tokenizer = library.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _read_settings(self.path.with_name(SETTINGS_FILE))
        template = self.path.with_name(TEMPLATE_FILE)
        found = template.read_text(encoding="utf-8") if template.is_file() else self._settings.get("chat_template")
        self.chat_template = found if isinstance(found, str) else None
        self._digest = hashlib.sha256(content).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One above the largest id, that of added tokens included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def end_of_text(self) -> int | None:
        """Id of the eos_token of tokenizer_config.json, else of the first known name in the vocabulary."""
        named = _token_text(self._settings.get("eos_token"))
        names = END_OF_TEXT if named is None else (named,)
        known = (self._tokenizer.token_to_id(name) for name in names)
        return next((found for found in known if found is not None), None)

    @property
    def fingerprint(self) -> str:
        """Hash of the file and of the end of text."""
        return f"sha256:{self._digest[:32]}:{self.end_of_text}"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it; names of special tokens inside it become their ids."""
        # the fast form leaves out the place of each token in the text
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens; a cut character becomes U+FFFD.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """
        return self._tokenizer.decode(_check_ids(ids, self.vocab_size), skip_special_tokens=True)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Renders messages as text, by the template that the tokenizer brings.

        Args:
          messages: each with "role" and "content".
          add_generation_prompt: end with the beginning of an answer.

        Raises:
          ValueError: the tokenizer has no chat template, or the template refuses the messages.
          ImportError: the library `jinja2` is not installed.
        """
        if self.chat_template is None:
            raise ValueError(
                f"tokenizer {self.path} has no chat template: neither {TEMPLATE_FILE} nor chat_template in "
                f"{SETTINGS_FILE} stands beside it"
            )
        jinja2, sandbox = _import("jinja2"), _import("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        names = {name: _token_text(self._settings.get(name)) or "" for name in ("bos_token", "eos_token", "pad_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **names)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of tokenizer {self.path} failed: {error}") from error


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer "bytes", or that of a tokenizer.json or of a folder that holds one.

    Raises:
      ValueError: no such file, or a file that is no tokenizer.
      ImportError: the library `tokenizers` is not installed.

    Example:
      >>> load_tokenizer("bytes").vocab_size
      257
    """
    if spec == "bytes" or os.path.isfile(os.path.join(os.path.expanduser(spec), BYTES_FILE)):
        return ByteTokenizer()
    if not spec or not os.path.exists(os.path.expanduser(spec)):
        raise ValueError(f"tokenizer must be 'bytes', a tokenizer.json or a folder that holds one, got {spec!r}")
    return FileTokenizer(spec)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer to a folder, from which `load_tokenizer` reads it.

    Raises:
      ValueError: a tokenizer that no file holds.
    """
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, ByteTokenizer):
        (target / BYTES_FILE).write_text(json.dumps({"tokenizer": "bytes"}) + "\n", encoding="utf-8")
    elif isinstance(tokenizer, FileTokenizer):
        shutil.copyfile(tokenizer.path, target / TOKENIZER_FILE)
        for name in (SETTINGS_FILE, TEMPLATE_FILE):
            if tokenizer.path.with_name(name).is_file():
                shutil.copyfile(tokenizer.path.with_name(name), target / name)
    else:
        raise ValueError(f"tokenizer must be a ByteTokenizer or a FileTokenizer to be saved, got {tokenizer!r}")


def train_tokenizer(
    texts: Iterable[str], folder: str | os.PathLike[str], *, vocab_size: int = 32000, min_frequency: int = 2
) -> FileTokenizer:
    """Trains a byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json to a folder.

    Every text has an encoding, and decoding restores it exactly. Id 0 is <|endoftext|>.

    Args:
      texts: the corpus.
      folder: created where it does not exist.
      vocab_size: largest number of ids; a small corpus gives fewer.
      min_frequency: least number of times that a pair occurs to be merged.

    Raises:
      ValueError: no text, or a vocabulary without room for the bytes and the end of text.
      ImportError: the library `tokenizers` is not installed.

    Source: arXiv 1508.07909; on bytes as in GPT-2 (Radford et al. 2019, section 2.2).
    """
    check_at_least("vocab_size", vocab_size, BYTES + 1)
    check_at_least("min_frequency", min_frequency, 1)
    library = _import("tokenizers")
    rest = iter(texts)
    first = next(rest, None)
    if first is None:
        raise ValueError("texts must hold at least one text to train a tokenizer on, got none")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], rest), trainer)
    target = pathlib.Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT[0]}
    (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(target / TOKENIZER_FILE))
    return FileTokenizer(target)


class _ErrorsOfFile:
    """Context manager that names the file in an error of the library, which raises Exception itself."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None and issubclass(kind, Exception):
            raise ValueError(f"tokenizer {self._path} cannot be read as a tokenizer.json: {error}") from error


def _import(name: str) -> Any:
    """A module of the extra `text`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"the Python package {package} is needed here and is not installed: pip install 'memformer-jax[text]', or "
            f"pip install {package}"
        ) from error


def _refuse(message: str) -> None:
    raise _import("jinja2").TemplateError(message)


def _check_ids(ids: Iterable[int], end: int) -> list[int]:
    numbers = [int(i) for i in ids]
    wrong = next((i for i in numbers if not 0 <= i < end), None)
    if wrong is not None:
        raise ValueError(f"ids must be in [0, {end}), got {wrong}")
    return numbers


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(settings).__name__}")
    return settings


def _token_text(token: Any) -> str | None:
    """The text of a token of tokenizer_config.json: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token if isinstance(token, str) else None
