"""Conditions that fail a comparison, for continuous integration.

Grammar, case-insensitive::

    condition = METRIC change ">" NUMBER ["%"] ["significantly"]
              | METRIC comparison NUMBER
    change    = "drops" | "rises"
    comparison = "<" | "<=" | ">" | ">="

``rougeL drops > 1`` fails where the candidate's mean is more than 1 below the baseline's;
with ``%`` the change is relative to the baseline; with ``significantly`` it must also have an
adjusted p-value below 0.05. ``perplexity_per_byte > 2.5`` looks at the candidate alone.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from dskd_lightning.errors import UserError

__all__ = ["Condition", "Measured", "parse_condition"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_CHANGE = re.compile(
    rf"\s*(?P<metric>[\w./-]+)\s+(?P<change>drops|rises)\s*>\s*(?P<limit>{_NUMBER})\s*(?P<percent>%?)"
    r"(?:\s*(?P<significant>significantly))?\s*",
    re.IGNORECASE,
)
_ABSOLUTE = re.compile(
    rf"\s*(?!(?:drops|rises)\b)(?P<metric>[\w./-]+?)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>{_NUMBER})\s*",
    re.IGNORECASE,
)
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Measured:
    """A metric of a candidate beside the baseline's; ``p_value`` only where it was tested in pairs."""

    baseline: float | None
    candidate: float
    p_value: float | None = None


@dataclass(frozen=True)
class Condition:
    """A parsed ``--fail-if``.

    Args:
        text: as the user wrote it.
        metric: name of the metric.
        kind: ``drops``, ``rises`` or a comparison sign.
        limit: the number.
        percent: the limit is a percentage of the baseline.
        significant: an adjusted p-value below 0.05 is needed too.
    """

    text: str
    metric: str
    kind: str
    limit: float
    percent: bool = False
    significant: bool = False

    def holds(self, measured: Measured) -> bool:
        """Whether the comparison fails by this condition.

        Raises:
            UserError: the condition needs a baseline or a p-value that the metric has not.
        """
        if self.kind in _COMPARISONS:
            return bool(_COMPARISONS[self.kind](measured.candidate, self.limit))
        if measured.baseline is None:
            raise UserError(f"--fail-if {self.text!r}: the baseline has no {self.metric}.")
        if self.significant and measured.p_value is None:
            raise UserError(
                f"--fail-if {self.text!r}: {self.metric} is one number per run, which has no p-value."
            )
        change = measured.candidate - measured.baseline
        amount = -change if self.kind == "drops" else change
        limit = self.limit * abs(measured.baseline) / 100 if self.percent else self.limit
        return amount > limit and (not self.significant or (measured.p_value or 0.0) < 0.05)


def parse_condition(text: str) -> Condition:
    """Parse one condition.

    Raises:
        UserError: it does not follow the grammar.
    """
    if match := _CHANGE.fullmatch(text):
        limit, percent = float(match["limit"]), bool(match["percent"])
        if limit < 0:
            raise UserError(
                f"--fail-if {text!r}: a drop or rise must be positive; swap drops and rises instead."
            )
        return Condition(
            text, match["metric"], match["change"].lower(), limit, percent, bool(match["significant"])
        )
    if match := _ABSOLUTE.fullmatch(text):
        return Condition(text, match["metric"], match["sign"], float(match["limit"]))
    raise UserError(
        f"--fail-if {text!r}: cannot be read; write e.g. 'rougeL drops > 1', "
        "'rougeL drops > 5% significantly' or 'perplexity_per_byte > 2.5'."
    )
