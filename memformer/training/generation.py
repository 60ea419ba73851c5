"""Text from the folder of a run or of a pretrained model, written to the terminal as it is generated."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from memformer.data.tokenizer import Tokenizer, load_tokenizer
from memformer.models.generate_text import GeneratedText, TextPiece, TextStream
from memformer.pretrained import load_pretrained
from memformer.training.config import RunError, run_errors
from memformer.training.evaluation import load_run
from memformer.training.files import check_out, replace_file
from memformer.training.metrics import log

__all__ = ["TextModel", "load_text_model", "show_text", "text_errors"]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A language model with its tokenizer.

    Attributes:
      model: in evaluation mode.
      tokenizer: of its ids.
      document_start: whether the model expects an end of text before the first token of a document.
    """

    model: Any
    tokenizer: Tokenizer
    document_start: bool


def load_text_model(
    workdir: str = "", *, pretrained: str = "", step: int | None = None, settings: Sequence[str] = ()
) -> TextModel:
    """Loads a language model from the folder of a run, or a pretrained one.

    Parameters of a run are averaged if the run averages them. Several devices share each matrix (mesh axis "tensor").

    Args:
      workdir: folder of a run on text (tasks "lm" and "text"), with its checkpoints.
      pretrained: folder in the Hugging Face format, instead of `workdir`.
      step: step of the checkpoint; None for the newest that restores.
      settings: changes to the run's config, such as "mesh.data=1".

    Raises:
      RunError: both folders or none, a missing or damaged checkpoint, or a model without a tokenizer.
    """
    if bool(workdir) == bool(pretrained):
        raise RunError("give the folder of a run (--workdir), or that of a pretrained model (--pretrained).")
    if pretrained:
        return _load_pretrained(pretrained)
    loaded = load_run(workdir, step=step, settings=["mesh.fsdp=1", "mesh.tensor=-1", *settings])
    with text_errors(f"the tokenizer of the run in {workdir}"):
        folder = os.path.join(workdir, "tokenizer")
        if not os.path.isdir(folder):
            raise RunError(
                f"{workdir} holds a run on task {loaded.task.name!r} without a tokenizer, so that its ids are no text: "
                f"there is no folder {folder}. generate.py needs a run on the task lm or text."
            )
        return TextModel(loaded.module(), load_tokenizer(folder), document_start=True)


def _load_pretrained(folder: str) -> TextModel:
    with text_errors(f"--pretrained={folder}"):
        model, tokenizer, _ = load_pretrained(folder)
    if tokenizer is None:
        raise RunError(f"--pretrained={folder}: there is no tokenizer.json in this folder, so that ids are no text.")
    model.eval()
    return TextModel(model, tokenizer, document_start=False)


def show_text(
    prompts: Sequence[str],
    *,
    workdir: str = "",
    pretrained: str = "",
    prompt_file: str = "",
    step: int | None = None,
    settings: Sequence[str] = (),
    chat: bool = False,
    out: str = "",
    **options: Any,
) -> GeneratedText:
    """Writes prompts and their continuations to the terminal while they are generated, then a line on the speed.

    Prompts are generated together, and shown in their order.

    Args:
      prompts: texts to continue.
      workdir, pretrained, step, settings: as `load_text_model`.
      prompt_file: text file with one further prompt per line, or a .jsonl file with a field "prompt".
      chat: prompts are messages of a user, put into the chat template of the tokenizer.
      out: JSON-lines file to write: prompt, text and reason of each.
      **options: of `memformer.models.TextStream`, but for document_start.

    Raises:
      RunError: no prompt, or a folder, file or option that cannot be used.
    """
    texts = [*prompts, *(_read_prompts(prompt_file) if prompt_file else ())]
    if not texts:
        raise RunError("give a prompt (--prompt=TEXT, which may be repeated), or a file of them (--prompt_file=FILE).")
    check_out(out)
    loaded = load_text_model(workdir, pretrained=pretrained, step=step, settings=settings)
    with text_errors("generation"):
        inputs = [_chat_prompt(loaded.tokenizer, text) for text in texts] if chat else texts
        start = loaded.document_start and not chat
        stream = TextStream(loaded.model, loaded.tokenizer, inputs, document_start=start, **options)
    terminal = _Terminal(texts, separate=chat)
    for piece in stream:
        terminal.write(piece)
    found = stream.result
    log(found.describe())
    if out:
        with replace_file(out) as file:
            for text, new, reason in zip(texts, found.texts, found.reasons, strict=True):
                file.write(json.dumps({"prompt": text, "text": new, "reason": reason}, ensure_ascii=False) + "\n")
    return found


class _Terminal:
    """Shows rows in order: one as it is generated, and what the later ones have so far when it is their turn."""

    def __init__(self, prompts: Sequence[str], *, separate: bool):
        self._prompts, self._separate = prompts, separate
        self._texts = [""] * len(prompts)
        self._ended = [False] * len(prompts)
        self._row, self._shown = -1, 0
        self._next()

    def write(self, piece: TextPiece) -> None:
        """Takes the next piece."""
        self._texts[piece.row] += piece.text
        self._ended[piece.row] = piece.reason is not None
        while self._row < len(self._texts):
            log(self._texts[self._row][self._shown :], end="")
            self._shown = len(self._texts[self._row])
            if not self._ended[self._row]:
                return
            log("\n")
            self._next()

    def _next(self) -> None:
        self._row, self._shown = self._row + 1, 0
        if self._row < len(self._prompts):
            log(self._prompts[self._row], end="\n\n" if self._separate else "")


def _chat_prompt(tokenizer: Tokenizer, text: str) -> str:
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None:
        raise ValueError("chat needs a tokenizer with a chat template, and a tokenizer of bytes has none")
    return apply([{"role": "user", "content": text}], add_generation_prompt=True)


def _read_prompts(path: str) -> list[str]:
    with run_errors(f"--prompt_file={path}"):
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
        if not path.endswith(".jsonl"):
            return lines
        return [_prompt_field(path, i, line) for i, line in enumerate(lines, 1)]


def _prompt_field(path: str, number: int, line: str) -> str:
    with run_errors(f"--prompt_file={path}, line {number}"):
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'expected an object with a string "prompt", got {line[:80]}')
        return record["prompt"]


@contextlib.contextmanager
def text_errors(what: str) -> Iterator[None]:
    """Turns a ValueError, OSError or missing package of the enclosed block into a `RunError`; as `run_errors`."""
    try:
        with run_errors(what):
            yield
    except ImportError as error:
        raise RunError(f"{what}: {error}") from error
