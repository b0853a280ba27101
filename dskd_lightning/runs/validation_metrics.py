"""What validations measure, and which is better: a lower or a higher value."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal, cast

from dskd_lightning.errors import UserError

__all__ = [
    "ALIGNED",
    "CLOSENESS",
    "KNOWN",
    "LIKELIHOOD",
    "ON_SAMPLES",
    "RESPONSES",
    "Mode",
    "direction",
]

Mode = Literal["min", "max"]

LIKELIHOOD: dict[str, Mode] = {
    "nll_per_token": "min",
    "nll_per_byte": "min",
    "perplexity_per_token": "min",
    "perplexity_per_byte": "min",
    "accuracy": "max",
}
"""Of the gold responses, in every validation."""
CLOSENESS: dict[str, Mode] = {"kl": "min", "reverse_kl": "min", "agreement": "max"}
"""To a teacher with the student's tokenizer, on the gold responses."""
ALIGNED: dict[str, Mode] = {f"aligned_{name}": mode for name, mode in CLOSENESS.items()}
"""To a teacher with another tokenizer, on shared tokens."""
RESPONSES: dict[str, Mode] = {
    "rougeL": "max",
    "exact_match": "max",
    "empty_share": "min",
    "unfinished_share": "min",
}
"""Of generated responses."""
ON_SAMPLES: dict[str, Mode] = {
    f"samples_{name}": mode
    for name, mode in {**CLOSENESS, **ALIGNED, "teacher_nll_per_byte": cast("Mode", "min")}.items()
}
"""Of the student's own samples to its teacher."""
KNOWN: dict[str, Mode] = {
    f"val/{name}": mode
    for group in (LIKELIHOOD, CLOSENESS, ALIGNED, RESPONSES, ON_SAMPLES)
    for name, mode in group.items()
}


def direction(metric: str, mode: Mode | None = None, key: str = "best") -> Mode:
    """Whether a lower (``min``) or a higher value of ``metric`` is better.

    Args:
        metric: with its ``val/``.
        mode: says it of a metric that others' code logs.
        key: the setting that names both, for messages.

    Raises:
        UserError: the library logs no such metric and no mode is given, or another one than the metric's.
    """
    known = KNOWN.get(metric)
    if known is None and mode is None:
        close = get_close_matches(metric, KNOWN, n=1, cutoff=0.5)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"{key}.monitor: {metric} is unknown{meant}; name one of {', '.join(KNOWN)}, or of one that your "
            f"own code logs say {key}.mode: min or max."
        )
    if known is not None and mode not in (None, known):
        raise UserError(
            f"{key}.mode: {mode} is wrong for {metric}, of which the best is the {known}; leave it out."
        )
    return cast("Mode", known or mode)
