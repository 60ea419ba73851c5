"""BLEU by sacrebleu, where that is installed (the extras `lab` and `test` bring it)."""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BLEU", "measure_bleu"]


class BLEU(NamedTuple):
    """A corpus score.

    Attributes:
      score: from 0 to 100.
      signature: of sacrebleu's settings, for comparisons.
    """

    score: float
    signature: str


def measure_bleu(texts: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> BLEU | None:
    """Corpus BLEU of sentences against one reference each, or None where sacrebleu is not installed.

    Args:
      texts: the model's sentences.
      references: one for each, in the same order.
      tokenize: sacrebleu's tokeniser; "none" for words separated by single spaces.

    Raises:
      ValueError: no sentence, or another number of references.

    Example:
      >>> found = measure_bleu(["a red ring above a blue cross"], ["a red ring above a blue cross"])
      >>> found is None or round(found.score) == 100
      True
    """
    if not texts or len(texts) != len(references):
        raise ValueError(
            f"texts and references must be equally many sentences, at least one, got {len(texts)}, {len(references)}"
        )
    try:
        import sacrebleu
    except ImportError:
        return None
    # force=True silences a warning, at each call, that the text is tokenised already
    metric = sacrebleu.BLEU(tokenize=tokenize, force=True)
    return BLEU(metric.corpus_score(list(texts), [list(references)]).score, str(metric.get_signature()))
