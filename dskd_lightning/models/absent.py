"""What stands for a teacher of which only log-probabilities are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dskd_lightning.structures import Head, LogProbabilities, ModelSpace, Side, TokenBatch

__all__ = ["AbsentTeacher"]


class AbsentTeacher(nn.Module):
    """A teacher without weights.

    Args:
        vocab_size: of its tokenizer.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def space(self, tokenizer: Any, device: torch.device | str = "cpu") -> ModelSpace:
        """Its vocabulary, with a head and embeddings ``[vocab, 0]``."""
        nothing = torch.zeros(self.vocab_size, 0, device=device)
        return ModelSpace(Head(nothing), nothing, tokenizer)

    def side(self, told: LogProbabilities, tokens: TokenBatch) -> Side:
        """What is known of it at the response positions of ``tokens``."""
        space = self.space(None, told.values.device)
        return Side(
            hidden=told.values.new_zeros(len(told), 0),
            head=space.head,
            embeddings=space.embeddings,
            ids=tokens.select(tokens.input_ids),
            labels=tokens.select(tokens.labels),
            sequence=tokens.sequence,
            log_probs=told,
        )
