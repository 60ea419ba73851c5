"""BLEU by sacrebleu, where that is installed (the extras `lab` and `test` bring it)."""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BLEU", "measure_bleu"]


class BLEU(NamedTuple):
    """A corpus score.

    Attributes:
      score: from 0 to 100.
      signature: how sacrebleu computed it, for whoever compares.
    """

    score: float
    signature: str


def measure_bleu(said: Sequence[str], wanted: Sequence[str], *, tokenize: str = "13a") -> BLEU | None:
    """Corpus BLEU of sentences against one reference each, or None where sacrebleu is not installed.

    Args:
      said: what the model says.
      wanted: the references, in the same order.
      tokenize: sacrebleu's tokeniser; "none" for words that single spaces divide.

    Raises:
      ValueError: no sentence, or as many references as there are not sentences.

    Example:
      >>> found = measure_bleu(["a red ring above a blue cross"], ["a red ring above a blue cross"])
      >>> found is None or round(found.score) == 100
      True
    """
    if not said or len(said) != len(wanted):
        raise ValueError(
            f"said and wanted must be equally many sentences, at least one, got {len(said)}, {len(wanted)}"
        )
    try:
        import sacrebleu
    except ImportError:
        return None
    # forced: a warning that text is tokenised already would be told at each call
    metric = sacrebleu.BLEU(tokenize=tokenize, force=True)
    return BLEU(metric.corpus_score(list(said), [list(wanted)]).score, str(metric.get_signature()))
