r"""Distributions of which the largest entries alone are known: a bucket each, and one for all the rest.

Any divergence in `dskd_lightning.functional.divergences` takes such buckets for a small vocabulary. Since
joining entries never makes two distributions easier to tell apart, what it says of buckets is a lower bound
of what it says of the whole distributions. For the forward KL the bound is tight where the teacher's tail is
light, as its terms are weighted by the teacher; for the reverse KL and Jensen-Shannon it needn't be: a
student may spread much probability over the tail in another way than the teacher and isn't told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.functional.precision import wide

__all__ = ["student_buckets", "teacher_buckets", "top_log_probs"]

NOTHING = -1
"""Id of an entry that stands for no token."""


def top_log_probs(logits: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The observed token and the ``k`` most likely ones.

    Args:
        logits: ``[tokens, vocab]``.
        labels: ``[tokens]``.
        k: at most ``vocab``.

    Returns:
        Ids and log-probabilities ``[tokens, 1 + k]``: first those of ``labels``, then the largest; where a
        label is among these, `NOTHING` and ``-inf`` in its place.
    """
    log_p = wide(logits).log_softmax(-1)
    values, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    again = ids == labels.unsqueeze(-1)
    observed = log_p.gather(-1, labels.unsqueeze(-1))
    return (
        torch.cat([labels.unsqueeze(-1), ids.masked_fill(again, NOTHING)], dim=-1),
        torch.cat([observed, values.masked_fill(again, -torch.inf)], dim=-1),
    )


def teacher_buckets(ids: Tensor, log_probs: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities ``[tokens, entries + 1]`` of the entries and of all other tokens together.

    Args:
        ids: ``[tokens, entries]``, no token twice, `NOTHING` for none.
        log_probs: ``[tokens, entries]``, ``-inf`` where there is none.
        vocab_size: where the entries are as many, nothing is left for the tail.
    """
    known = ids != NOTHING
    log_probs = wide(log_probs).masked_fill(~known, -torch.inf)
    # Rounded log-probabilities may add up to more than 1; the tail is then as good as nothing.
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=torch.finfo(log_probs.dtype).eps).log()
    rest = rest.masked_fill(known.sum(-1) >= vocab_size, -torch.inf)
    return torch.cat([log_probs, rest.unsqueeze(-1)], dim=-1)


def student_buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """The same buckets of a whole distribution, differentiable: ``[tokens, entries + 1]``.

    Args:
        logits: ``[tokens, vocab]``.
        ids: ``[tokens, entries]``, `NOTHING` for none; the first is always a token.
    """
    logits = wide(logits)
    known = ids != NOTHING
    places = torch.where(known, ids, ids[:, :1].clamp(min=0))  # some token that is out of the tail anyway
    # Not through one minus the others' sum, which would lose a light tail.
    rest = logits.scatter(-1, places, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)
    entries = logits.gather(-1, places).masked_fill(~known, -torch.inf)
    return torch.cat([entries, rest], dim=-1) - logits.logsumexp(-1, keepdim=True)
