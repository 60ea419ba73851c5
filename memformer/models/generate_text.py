"""Generation of text: prompts in, text out as it is generated, with stop strings and whole characters."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from memformer.core.checks import check, check_at_least
from memformer.data.tokenizer import Tokenizer
from memformer.models.generate import TokenStream
from memformer.models.sampling import Sampling

__all__ = ["GeneratedText", "TextPiece", "TextStream", "generate_text", "start_id"]

# Written by decoders for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"


class TextPiece(NamedTuple):
    """Text that was generated for one prompt since the piece before; it ends at a whole character.

    Attributes:
      row: number of the prompt, from 0.
      text: the new text; may be empty in the last piece.
      reason: why the row ended, in its last piece: "length", "end_of_text" or "stop"; else None.
    """

    row: int
    text: str
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """The result of `generate_text`.

    Attributes:
      texts: new text of each prompt, without the prompt and without the stop string.
      reasons: why each ended: "length" (max_new_tokens), "end_of_text" or "stop" (a stop string).
      prompt_tokens: tokens of all prompts.
      new_tokens: tokens generated in all rows.
      first_seconds: time to the first token, compilation included.
      tokens_per_second: of all rows together, measured after the first two tokens, whose programs may be compiled
        first; None for fewer tokens.
      state_bytes: size of the state per sequence.
      slot_bytes: what one more token of capacity adds to it; 0 for matrix memories and recurrent cells.
      capacity: tokens for which the caches have room.
    """

    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    tokens_per_second: float | None
    state_bytes: int
    slot_bytes: int
    capacity: int

    def describe(self) -> str:
        """The numbers as one line."""
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens per second"
        grows = (
            f"with room for {self.capacity:,} tokens, {self.slot_bytes:,} bytes per token"
            if self.slot_bytes
            else "the same at any length"
        )
        return (
            f"{self.prompt_tokens:,} prompt tokens, {self.new_tokens:,} new tokens; first token after "
            f"{self.first_seconds:.2f} s{speed}; state {self.state_bytes:,} bytes per sequence, {grows}"
        )


class TextStream:
    """Text that a model writes behind prompts, piece by piece.

    Iterate over it for the pieces (`TextPiece`), once; `result` has the whole afterwards. Prompts may have different
    lengths: a row is what it would be alone. Text is given as soon as no later token can change it: characters whose
    bytes span several tokens come whole, and what may be the beginning of a stop string is held back.

    Args:
      model: a language model in evaluation mode.
      tokenizer: of its ids.
      prompts: one text, or several.
      max_new_tokens: largest number of new tokens per prompt.
      temperature: divides the logits before sampling; 0 takes the most probable token (greedy decoding).
      top_k: samples only from the k most probable tokens.
      top_p: samples only from the most probable tokens that together reach this probability.
      min_p: samples only from the tokens that are at least so many times as probable as the most probable one.
      repetition_penalty: above 1 makes the tokens of the prompt, and those generated before, less probable.
      stop: strings that end a text, and are left out.
      seed: of sampling; the same seed and prompts give the same text.
      document_start: put the tokenizer's end of text before each prompt (where it has none, the id behind its
        vocabulary, if the model has it). Models trained by this library expect it before the first token of a document.
      capacity: tokens for which caches have room; see `TokenStream`.

    Raises:
      ValueError: a setting out of range, a prompt without tokens, ids that the model does not have, or more tokens
        than the model has learned positions.

    Example:
      >>> from flax import nnx
      >>> from memformer.data import ByteTokenizer
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny", depth=1), vocab_size=257, rngs=nnx.Rngs(0))
      >>> stream = TextStream(model, ByteTokenizer(), "Once", max_new_tokens=3)
      >>> text = "".join(piece.text for piece in stream)
      >>> stream.result.new_tokens
      3
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        document_start: bool = True,
        capacity: int | None = None,
    ):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        start = start_id(model, tokenizer) if document_start else None
        ids = [_encode(tokenizer, prompt, i, start) for i, prompt in enumerate(prompts)]
        self._tokens = TokenStream(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            key=jax.random.key(check_at_least("seed", seed, 0)),
            # a vocabulary may be padded: no text belongs to the ids beyond the tokenizer's
            classes=min(model.num_classes, tokenizer.vocab_size),
            capacity=capacity,
        )
        self._rows = [_Row(tokenizer, row, _check_stop(stop)) for row in ids]
        self._count, self._end = max_new_tokens, tokenizer.end_of_text
        self._prompt_tokens = sum(map(len, ids))
        self._texts = [""] * len(ids)
        self._reasons = ["length"] * len(ids)
        self._times: list[tuple[float, int]] = []
        self._begin = 0.0

    def __iter__(self) -> Iterator[TextPiece]:
        """Yields the pieces as they are generated."""
        self._begin = time.perf_counter()
        running = dict(enumerate(self._rows))
        for step, tokens in enumerate(self._tokens, 1):
            self._times.append((time.perf_counter(), len(running)))
            for i, row in list(running.items()):
                text, reason = row.push(int(tokens[i]), self._end)
                if reason is None and step == self._count:
                    text, reason = text + row.flush(), "length"
                if reason is not None:
                    del running[i]
                    self._reasons[i] = reason
                if text or reason:
                    self._texts[i] += text
                    yield TextPiece(i, text, reason)
            if not running:
                return

    @property
    def result(self) -> GeneratedText:
        """The text so far, and how it was generated."""
        counts, times = [n for _, n in self._times], [t for t, _ in self._times]
        seconds = times[-1] - times[1] if len(times) > 2 else 0.0
        return GeneratedText(
            texts=tuple(self._texts),
            reasons=tuple(self._reasons),
            prompt_tokens=self._prompt_tokens,
            new_tokens=sum(counts),
            first_seconds=times[0] - self._begin if times else 0.0,
            tokens_per_second=sum(counts[2:]) / seconds if seconds else None,
            state_bytes=self._tokens.state_bytes,
            slot_bytes=self._tokens.slot_bytes,
            capacity=self._tokens.capacity,
        )


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    on_text: Callable[[TextPiece], Any] | None = None,
    **options: Any,
) -> GeneratedText:
    """Continues prompts, and returns the text with the speed and the size of the state.

    Args:
      model: a language model in evaluation mode.
      tokenizer: of its ids.
      prompts: one text, or several.
      on_text: called with each `TextPiece` as it is generated.
      **options: of `TextStream`: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed,
        document_start, capacity.

    Raises:
      ValueError: as `TextStream`.

    Example:
      >>> from flax import nnx
      >>> from memformer.data import ByteTokenizer
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny", depth=1), vocab_size=257, rngs=nnx.Rngs(0))
      >>> found = generate_text(model, ByteTokenizer(), ["Once", "In"], max_new_tokens=3, temperature=0.8, seed=1)
      >>> len(found.texts), found.reasons
      (2, ('length', 'length'))
    """
    stream = TextStream(model, tokenizer, prompts, **options)
    for piece in stream:
        if on_text is not None:
            on_text(piece)
    return stream.result


class _Row:
    """The text of one row: decodes its ids piece by piece and looks for stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, stops
        # The ids before the new ones, as many as make whole characters: some decoders drop the space before the first
        # of their ids, and some turn all bytes that stand together into replacements if they end in half a character.
        # The start of a document may be an id that the tokenizer does not have.
        self._context, self._fresh = [i for i in prompt[-1:] if i < tokenizer.vocab_size], list[int]()
        # Characters of context and fresh that are already in `_held` or were given.
        self._given = len(tokenizer.decode(self._context))
        # The end of the text that may begin a stop string.
        self._held = ""

    def push(self, token: int, end: int | None) -> tuple[str, str | None]:
        """The text that a token makes final, and why the row ends, if it does."""
        if token == end:
            return self.flush(), "end_of_text"
        self._fresh.append(token)
        text = self._tokenizer.decode(self._context + self._fresh)
        whole = not text.endswith(REPLACEMENT)
        # At most the last three bytes wait for the rest of their character; each may be a replacement.
        final = text[: max(len(text.rstrip(REPLACEMENT)), len(text) - 3)]
        self._held += final[self._given :]
        self._given = max(self._given, len(final))
        if whole:
            self._context, self._fresh = self._fresh, []
            self._given = len(self._tokenizer.decode(self._context))
        found = self._find_stop(self._held)
        if found is not None:
            return found, "stop"
        size = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
        return text, None

    def flush(self) -> str:
        """The rest of the text, where nothing follows."""
        rest = self._held + self._tokenizer.decode(self._context + self._fresh)[self._given :]
        found = self._find_stop(rest)
        return rest if found is None else found

    def _find_stop(self, text: str) -> str | None:
        """The text before the first stop string; None where there is none."""
        places = [at for at in map(text.find, self._stops) if at >= 0]
        return text[: min(places)] if places else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def start_id(model: Any, tokenizer: Tokenizer) -> int | None:
    """The id before the first token of a document, as token stores choose it; None where the model has none.

    It is the tokenizer's end of text or, without one, the id behind its vocabulary.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    return tokenizer.vocab_size if model.vocab_size > tokenizer.vocab_size else None


def _encode(tokenizer: Tokenizer, prompt: Any, row: int, start: int | None) -> list[int]:
    check(isinstance(prompt, str), f"prompts[{row}]", "a string", prompt)
    ids = list(tokenizer.encode(prompt))
    if start is not None and ids[:1] != [start]:
        ids = [start, *ids]
    if not ids:
        raise ValueError(f"prompts[{row}] must have a token, got {prompt!r}; document_start=True puts one before it")
    return ids


def _check_stop(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stops:
        check(isinstance(each, str) and each != "", "stop", "strings that are not empty", each)
    return stops
