"""What there is to generate, told before it begins."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence, Sized
from pathlib import Path

from dskd_lightning.evaluation.writer import count_answered
from dskd_lightning.generation.generator import GenerationSettings
from dskd_lightning.runs.predictions import prediction_file

__all__ = ["announce"]

_log = logging.getLogger(__name__)


def announce(
    prompts: Sequence[Sized], folder: Path, seeds: Sequence[int | None], settings: GenerationSettings
) -> None:
    """Log how many responses there are to generate, how many are in ``folder``, and the most tokens left.

    How long that takes isn't known before the first batch, see `told_by_seed`.

    Args:
        prompts: token ids of each.
        folder: where the responses go.
        seeds: of the samples; None among them decodes greedily.
        settings: lengths.
    """
    answered = [min(count_answered(folder / prediction_file(seed)), len(prompts)) for seed in seeds]
    total, known = len(prompts) * len(seeds), sum(answered)
    named = f"{len(seeds):,} {'seed' if len(seeds) == 1 else 'seeds'}"
    told = f"Responses to {len(prompts):,} prompts, {'greedy' if [*seeds] == [None] else named}: "
    if known == total:
        _log.info("%sall %s are in '%s'.", told, f"{total:,}", folder)
        return
    most = sum(_most_tokens(prompts, len(prompts) - count, settings) for count in answered)
    there = f", {known:,} of {total:,} are in '{folder}'" if known else ""
    _log.info("%s%s to generate%s; at most %s tokens.", told, f"{total - known:,}", there, f"{most:,}")


def _most_tokens(prompts: Sequence[Sized], left: int, settings: GenerationSettings) -> int:
    """Most tokens of ``left`` responses, whichever of the prompts they answer."""
    rooms = (
        settings.max_new_tokens
        if settings.max_length is None
        else max(0, min(settings.max_new_tokens, settings.max_length - len(prompt)))
        for prompt in prompts
    )
    return sum(itertools.islice(sorted(rooms, reverse=True), left))
