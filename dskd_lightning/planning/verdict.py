"""Which objective to take, from the table and the paired tests of a study that compares them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object
from dskd_lightning.planning.objectives import UNTRAINED
from dskd_lightning.runs.run_folder import TEACHER

__all__ = ["Verdict", "recommended"]

_ALIKE = 0.01
"""Share by which nats of held-out text may differ between methods that count as alike, a rule of thumb."""
_AS_FAST = 1.1


@dataclass(frozen=True)
class Verdict:
    """What a benchmark ends in.

    Args:
        objective: name of the variant to take.
        reason: one sentence.
        significant: whether its ROUGE-L differs from SFT's (the first objective's, where SFT isn't among
            them), adjusted for the number of methods.
    """

    objective: str
    reason: str
    significant: bool

    def __str__(self) -> str:
        return f"take {self.objective}: {self.reason}."


def recommended(output: Path) -> Verdict:
    """The objective to take.

    The best ROUGE-L among those significantly above SFT's; else, as responses don't tell them apart, the
    best likelihood; and of those whose likelihoods are all but the same, the cheapest to train.

    Args:
        output: folder of the study, whose report was written.

    Raises:
        UserError: no trained objective was tested, or results are damaged.
    """
    summary = read_object(output / "report" / "comparison.json", "run the benchmark again")
    table = read_object(output / "table.json", "run the benchmark again")
    trained = [item for item in summary["candidates"] if item["name"] not in (TEACHER, UNTRAINED)]
    better = [item for item in trained if item["outcome"] == "better"]
    baseline = summary["baseline"]
    if baseline in (TEACHER, UNTRAINED):
        raise UserError(
            f"{output}: no objective's training ended with a finite loss: start over with lower --rates and "
            "`--overwrite true`."
        )
    if better:
        best = max(better, key=lambda item: item["mean"])
        gain, p = best["difference"]["mean"], best["adjusted_p_value"]
        compared = len(summary["candidates"])
        reason = f"its ROUGE-L is {gain:+.1f} from {baseline}'s (p = {p:.2g}, Holm, {compared} comparisons)"
        return Verdict(best["name"], reason, True)
    name, reason = _by_likelihood([baseline, *(item["name"] for item in trained)], table)
    none = f"no method's ROUGE-L is significantly above {baseline}'s here"
    return Verdict(name, f"{none}; {reason}. More prompts or longer training tell more", False)


def _by_likelihood(names: Sequence[str], table: Mapping[str, Any]) -> tuple[str, str]:
    """Whose held-out responses are likeliest, the cheapest to train of those that are alike; and why."""
    perplexity = {name: float(table[name]["perplexity_per_byte"]) for name in names}
    best = min(names, key=perplexity.__getitem__)
    most = math.log(perplexity[best]) * (1 + _ALIKE)
    alike = [name for name in names if math.log(perplexity[name]) <= most]
    if len(alike) == 1:
        return best, (
            f"of all it predicts the held-out responses best (perplexity {perplexity[best]:.3f} per byte), "
            "of which there is no test"
        )
    seconds = {name: float(table[name].get("training_seconds", math.inf)) for name in alike}
    fastest = min(seconds.values())
    cheapest = next(name for name in alike if seconds[name] <= _AS_FAST * fastest)  # the plainest come first
    took = f" ({seconds[cheapest]:.0f} s)" if math.isfinite(fastest) else ""
    return cheapest, (
        f"by the likelihood of held-out responses {_listed(alike)} cannot be told apart (nats within "
        f"{_ALIKE:.0%}), and of these it is the cheapest to train{took}"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
