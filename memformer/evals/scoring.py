"""Likelihoods of text under a language model, and greedy or sampled continuations, in batches."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.checks import check_options, check_positive, check_size
from memformer.data.tokenizer import Tokenizer
from memformer.models.generate import bucket_length
from memformer.models.generate_text import generate_text, start_id

__all__ = ["TextScorer"]

# Keys of generation that `TextScorer.generate_until` knows.
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TextScorer:
    """Scores and continues text, as evaluation harnesses ask for it.

    Texts are scored in batches of similar length, padded to a bucket (`memformer.models.bucket_length`): one program
    per bucket. Log-likelihoods are natural logarithms, summed over tokens.

    Args:
      model: a language model in evaluation mode.
      tokenizer: of its ids.
      document_start: put the end of text before each text, as models trained by this library expect it; where False,
        only before a text without context.
      batch_size: rows per batch.
      max_length: most tokens that the model reads at once; None for all (its learned positions, where it has such).

    Raises:
      ValueError: a size that is not positive.

    Example:
      >>> from memformer.data import ByteTokenizer
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny", depth=1), vocab_size=257, rngs=nnx.Rngs(0))
      >>> scorer = TextScorer(model, ByteTokenizer())
      >>> (score, greedy), = scorer.loglikelihood([("The capital of Spain is", " Madrid")])
      >>> score < 0
      True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        document_start: bool = True,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        self.model, self.tokenizer, self.document_start = model, tokenizer, document_start
        self.batch_size = check_size("batch_size", batch_size)
        config: Any = getattr(model, "config", None)
        learned = config.max_length if getattr(config, "positions", None) == "learned" else None
        limits = [limit for limit in (check_positive("max_length", max_length), learned) if limit is not None]
        self.max_length = min(limits, default=None)
        self._graph, self._parameters = nnx.split(model)
        self._start = start_id(model, tokenizer)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether greedy decoding would give it.

        Context and continuation are tokenized together; spaces that end a context belong to the continuation. Tokens
        that the model cannot read are left out at the beginning of the context.

        Args:
          pairs: (context, continuation).

        Raises:
          ValueError: an empty continuation, one that is longer than max_length, or a text without context under a
            tokenizer without an end of text.
        """
        rows = []
        for context, continuation in pairs:
            before, after = self._encode_pair(context, continuation)
            if not after:
                raise ValueError(f"continuation must have a token, got {continuation!r} behind {context[-40:]!r}")
            if self.max_length is not None and len(after) > self.max_length:
                raise ValueError(
                    f"continuation must have at most max_length = {self.max_length} tokens, got {len(after)}"
                )
            ids = [*before, *after]
            rows.append((ids if self.max_length is None else ids[-self.max_length - 1 :], len(after)))
        return self._score(rows)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each whole text.

        Every token is scored once. A text of more than max_length tokens is cut into windows; the last window is a full
        one, in which only the new tokens are scored.

        Raises:
          ValueError: a tokenizer without an end of text, which stands before the first token.
        """
        rows, owners = [], []
        for i, text in enumerate(texts):
            ids = [self._need_start(), *self.tokenizer.encode(text)]
            size = self.max_length or len(ids)
            for begin in range(1, len(ids), size):
                end = min(begin + size, len(ids))
                # the window reads `size` ids, the last of which is not read but scored
                rows.append((ids[max(end - size - 1, 0) : end], end - begin))
                owners.append(i)
        totals = [0.0] * len(texts)
        for i, (score, _) in zip(owners, self._score(rows), strict=True):
            totals[i] += score
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continuations of contexts.

        Args:
          requests: (context, options): until (a string or several that end the text), max_gen_toks (default 256),
            do_sample (default False: greedy), temperature, top_k, top_p, min_p, repetition_penalty.

        Raises:
          ValueError: an unknown option.
        """
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            check_options("generation", options, GENERATION)
            groups.setdefault(repr(sorted(options.items())), []).append(i)
        for group in groups.values():
            options = _generation_options(requests[group[0]][1])
            for part in self._batches(group, lambda i: len(requests[i][0])):
                contexts = [requests[i][0] for i in part]
                # every batch has the same shape
                full = contexts + contexts[:1] * (self.batch_size - len(contexts))
                start = self.document_start or not all(full)
                result = generate_text(self.model, self.tokenizer, full, document_start=start, **options)
                for i, text in zip(part, result.texts, strict=False):
                    found[i] = text
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole, before = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        after = whole[len(before) :]
        # a token may reach over the border: the continuation then is what follows the context's tokens
        before = whole[: len(before)]
        if self.document_start or not before:
            before = [self._need_start(), *before]
        return before, after

    def _need_start(self) -> int:
        if self._start is None:
            raise ValueError("tokenizer must have an end of text, which stands before the first token of a text")
        return self._start

    def _score(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Scores of the last tokens of each row of ids, and whether all of them are the most probable."""
        found = [(0.0, True)] * len(rows)
        for part in self._batches(range(len(rows)), lambda i: len(rows[i][0])):
            longest = max(len(rows[i][0]) for i in part) - 1
            length = bucket_length(longest)
            length = length if self.max_length is None else max(longest, min(length, self.max_length))
            ids = np.zeros((self.batch_size, length + 1), np.int32)
            segments = np.zeros((self.batch_size, length), np.int32)
            for row, i in enumerate(part):
                size = len(rows[i][0])
                ids[row, :size], segments[row, : size - 1] = rows[i][0], 1
            scores, greedy = map(np.asarray, _score_tokens(self._graph, self._parameters, ids, segments))
            for row, i in enumerate(part):
                scored = slice(len(rows[i][0]) - 1 - rows[i][1], len(rows[i][0]) - 1)
                found[i] = (float(np.sum(scores[row, scored], dtype=np.float64)), bool(np.all(greedy[row, scored])))
        return found

    def _batches(self, items: Sequence[int], size: Callable[[int], int]) -> Iterator[list[int]]:
        """Batches of items of similar size, the largest first: what does not fit in memory fails at once."""
        order = sorted(items, key=size, reverse=True)
        for begin in range(0, len(order), self.batch_size):
            yield order[begin : begin + self.batch_size]


def _generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: given[key] for key in ("top_k", "top_p", "min_p", "repetition_penalty") if key in given}
    options["temperature"] = given.get("temperature", 1.0) if given.get("do_sample", False) else 0.0
    until = given.get("until") or ()
    options["stop"] = [until] if isinstance(until, str) else [each for each in until if each]
    options["max_new_tokens"] = given.get("max_gen_toks", 256)
    return options


@functools.partial(jax.jit, static_argnames=("graph",))
def _score_tokens(graph, parameters, ids, segment_ids):
    """Log-probability of each id behind those before it, and whether it is the most probable, [B, T]."""
    logits = nnx.merge(graph, parameters)(ids[:, :-1], segment_ids=segment_ids).logits
    targets = ids[:, 1:, None]
    # ids that are no class, as the start of a document is for some models, have no probability
    known = targets < logits.shape[-1]
    chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0), axis=-1)
    scores = jnp.where(known, chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), -jnp.inf)[..., 0]
    return scores, jnp.argmax(logits, axis=-1) == targets[..., 0]
