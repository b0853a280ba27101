"""Whether projectors learn, by what objectives log of the projected teacher in each step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ProjectedTrend"]

_FIRST, _LAST = 5, 10
"""Steps whose mean is where a figure began, and where it is lately: one batch is no trend."""

_FIGURE = re.compile(r"train/(t2s_ce|t2s_agreement|partner_attention)(?:_(\d+))?")


class ProjectedTrend:
    """Compares the figures of late with the first ones.

    Args:
        max_rise: share by which the projected teacher's cross-entropy may rise above where it began.
        min_partner: share of the attention that the byte-exact partner must have.
    """

    def __init__(self, max_rise: float, min_partner: float) -> None:
        self.max_rise, self.min_partner = max_rise, min_partner
        self.state: dict[str, dict[str, list[float]]] = {}
        """Figure -> its ``first`` values and its ``last``, and of a rise its first step and its highest
        mean (``rise``): what a checkpoint keeps."""

    def look(
        self, metrics: Mapping[str, Any], step: int, patience: float, objectives: Sequence[Any]
    ) -> dict[str, str]:
        """Take in a step's figures.

        Args:
            metrics: name -> value, the projected teacher's among others.
            step: optimiser steps so far.
            patience: steps that attention, and choosing as the teacher does, have to be learnt, and that a
                rise may last: twice as many where it comes down again.
            objectives: one per teacher, whose settings decide on the remedy.

        Returns:
            A sentence for each figure that says that something is wrong.
        """
        found = {}
        for name, value in metrics.items():
            if not (figure := _FIGURE.fullmatch(name)):
                continue
            values = self.state.setdefault(name, {"first": [], "last": []})
            if len(values["first"]) < _FIRST:
                values["first"].append(float(value))
                continue
            values["last"] = [*values["last"], float(value)][-_LAST:]
            if len(values["last"]) < _FIRST:
                continue
            began, lately = (sum(part) / len(part) for part in (values["first"], values["last"]))
            index = int(figure[2] or 0)
            objective = objectives[index] if index < len(objectives) else None
            if figure[1] == "t2s_ce":
                message = self._risen(name, values, began, lately, step, patience, objective)
            elif step < patience:
                message = None
            elif figure[1] == "t2s_agreement":
                message = _stalled(began, lately, step, objective)
            else:
                message = self._elsewhere(lately, step, objective)
            if message is not None:
                found[name] = message
        return found

    def _risen(
        self,
        name: str,
        values: dict[str, list[float]],
        began: float,
        lately: float,
        step: int,
        patience: float,
        objective: Any,
    ) -> str | None:
        if lately <= began * (1 + self.max_rise):
            values["rise"] = []
            return None
        since, highest = values.get("rise") or (step, lately)
        values["rise"] = [since, max(highest, lately)]
        falls = lately < highest - (highest - began) / 4
        if step - since < (2 * patience if falls else patience):
            return None
        unscaled = getattr(objective, "scale_inputs", None) is False
        other = ", or let it read scaled inputs (`scale_inputs: true` of the objective)" if unscaled else ""
        return (
            f"The projected teacher's cross-entropy ({name}) has risen from {began:.2f} to {lately:.2f} nats "
            f"and not come back in {step - since:.0f} steps: its projector diverges; lower "
            f"model.projector_lr{other}."
        )

    def _elsewhere(self, lately: float, step: int, objective: Any) -> str | None:
        if lately >= self.min_partner:
            return None
        attention = getattr(objective, "attention", None)
        prior, falls = (getattr(attention, name, None) for name in ("byte_prior", "byte_prior_steps"))
        if not prior:
            remedy = "set `attention: {byte_prior: 1.0}` of the objective"
        elif falls:
            remedy = "let its prior stay (leave byte_prior_steps out), or fall more slowly"
        else:
            remedy = f"raise its byte_prior above {prior:g}, or take DSKDTokenAlignmentObjective"
        return (
            f"The attention gives the byte-exact partner {lately:.1%} of its weight after {step} steps: the "
            f"teacher's states come from elsewhere; {remedy}."
        )


def _stalled(began: float, lately: float, step: int, objective: Any) -> str | None:
    if lately >= min(0.5, began + 0.02):
        return None
    heads = "" if getattr(objective, "initialization", None) != "random" else "`initialization: heads`, or "
    return (
        f"The projected teacher chooses as the teacher does at {lately:.0%} of the positions after {step} "
        f"steps, {began:.0%} at first: its projector doesn't learn; take {heads}another model.projector_lr."
    )
