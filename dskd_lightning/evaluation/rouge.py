"""ROUGE-L as the distillation papers report it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from dskd_lightning.errors import UserError

__all__ = ["RecentTexts", "rouge_l"]


class _RememberingStemmer:
    """Stems each word once: Porter's rules in Python are most of what ROUGE costs, and words repeat."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=1 << 18)(DefaultTokenizer(use_stemmer=True)._stemmer.stem)


@lru_cache(maxsize=1)
def _stemmer() -> _RememberingStemmer:
    return _RememberingStemmer()


class RecentTexts(Tokenizer):
    """The default tokens, remembered of the last ``most`` texts: for references that come again soon."""

    def __init__(self, most: int = 2048) -> None:
        self._tokens = lru_cache(maxsize=most)(lambda text: tokenize(text, _stemmer()))

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text."""
        return self._tokens(text)


@lru_cache(maxsize=1 << 17)
def _reference(text: str) -> list[str]:
    """Tokens of a reference, which several seeds and runs are scored against."""
    return tokenize(text, _stemmer())


def rouge_l(prediction: str, references: Sequence[str], tokenizer: Tokenizer | None = None) -> float:
    """ROUGE-L F-measure in [0, 1], the best over the references.

    The values are those of ``rouge_score.RougeScorer(["rougeL"], use_stemmer=True)``; the longest
    common subsequence itself is computed in C++. The default tokenizer drops all but ASCII letters
    and digits: give another one for other scripts.

    Args:
        prediction: the generated text.
        references: at least one accepted text.
        tokenizer: a ``rouge_score`` tokenizer; None is the default one with Porter stemming.

    Raises:
        UserError: there are no references.
    """
    if not references:
        raise UserError(
            "ROUGE-L needs at least one reference per prediction; the dataset has a record without."
        )
    if tokenizer is None:
        predicted = tokenize(prediction, _stemmer())
        return max(_f_measure(_reference(reference), predicted) for reference in references)
    predicted = tokenizer.tokenize(prediction)
    return max(_f_measure(tokenizer.tokenize(reference), predicted) for reference in references)


def _f_measure(reference: list[str], predicted: list[str]) -> float:
    if not reference or not predicted:
        return 0.0
    common = LCSseq.similarity(reference, predicted)
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0
