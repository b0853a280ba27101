"""`dskd judge`: a model chooses between the responses of two runs."""

from __future__ import annotations

import logging

from dskd_lightning.comparison.endpoint import ChatEndpoint
from dskd_lightning.comparison.judge import CostLimit, judge_pairs
from dskd_lightning.errors import UserError
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import visible

__all__ = ["judge_runs"]

logger = logging.getLogger(__name__)


def judge_runs(
    baseline: str,
    candidate: str,
    url: str,
    model: str,
    output: str,
    api_key_variable: str | None,
    max_requests: int | None,
    max_tokens: int | None,
) -> int:
    """Judge the first seed that both runs have; 0, or 1 where it ended early.

    Raises:
        UserError: the runs have no seed in common.
    """
    runs = [RunFolder.read(path) for path in (baseline, candidate)]
    common = [seed for seed in runs[0].predictions if seed in runs[1].predictions]
    if not common:
        raise UserError(
            f"{baseline} and {candidate} have no predictions of one seed: run `dskd predict` for both."
        )
    summary = judge_pairs(
        ChatEndpoint(url, model, api_key_variable),
        runs[0].predictions[common[0]],
        runs[1].predictions[common[0]],
        output,
        limit=CostLimit(max_requests, max_tokens),
        progress=lambda done, total: logger.info("%d of %d prompts judged", done, total),
    )
    print(f"{summary.counts} in {output}")
    if summary.stopped is not None:
        print(f"ended early: {visible(summary.stopped)}; run the command again to go on")
    return int(summary.stopped is not None)
