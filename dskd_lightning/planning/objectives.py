"""The objectives that a benchmark compares, by the names that its table gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import read_yaml
from dskd_lightning.launch.configs import config_path
from dskd_lightning.runs.run_folder import TEACHER

__all__ = ["BASELINE", "CROSS", "OBJECTIVES", "SAME", "UNTRAINED", "compared", "objective_names"]

BASELINE = "SFT"
UNTRAINED = "before training"
OBJECTIVES = {
    BASELINE: "sft",
    "logit KD": "logit_kd",
    "top-k": "top_k",
    "shared vocabulary": "shared_vocabulary",
    "ULD": "uld",
    "GOLD": "gold",
    "MinEd": "min_edit",
    "ALM": "alm",
    "X-Token P-KL": "xtoken_p",
    "X-Token H-KL": "xtoken_h",
    "DSKD": "dskd",
    "DSKD v2": "dskd_v2",
    "DSKD token alignment": "dskd_eta",
    "DSKD cross-model attention": "dskd_cma",
}
"""All that ship: name -> config, the costliest last."""
SAME = (BASELINE, "logit KD", "DSKD", "DSKD v2")
"""What is compared where both models read the same ids and nobody chooses."""
CROSS = (BASELINE, "shared vocabulary", "ALM", "DSKD token alignment", "DSKD cross-model attention")
"""And where they don't."""
_SAME_ALONE = ("logit KD", "top-k", "DSKD", "DSKD v2")


def objective_names(given: Sequence[str] | None, identical: bool, recommended: str) -> tuple[str, ...]:
    """The objectives to compare, `BASELINE` first where it is among them: the others are tested against it.

    Args:
        given: what the user chose; None takes `SAME` or `CROSS`, and what is recommended.
        identical: whether both models read the same ids.
        recommended: the class that `recommend` names for the pair.

    Raises:
        UserError: there is no such objective, it needs one vocabulary, or is named twice.
    """
    if given is None:
        usual = SAME if identical else CROSS
        chosen = [name for name in OBJECTIVES if name in usual or _class_of(name) == recommended]
    else:
        chosen = list(given)
    if unknown := [name for name in chosen if name not in OBJECTIVES]:
        known = ", ".join(name for name in OBJECTIVES if identical or name not in _SAME_ALONE)
        raise UserError(f"--objectives: there is no {unknown[0]!r}; for this pair there are {known}.")
    if unfit := [name for name in chosen if name in _SAME_ALONE and not identical]:
        fit = ", ".join(name for name in OBJECTIVES if name not in _SAME_ALONE)
        raise UserError(
            f"--objectives: {unfit[0]!r} needs models of one vocabulary, and these two have different ones; "
            f"take some of {fit}."
        )
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise UserError(f"--objectives: {twice[0]!r} is there twice; name it once.")
    return tuple(sorted(chosen, key=lambda name: name != BASELINE))


def compared(names: Sequence[str]) -> dict[str, Any]:
    """Variants of a study: the teacher, the student before training, and an objective each."""
    return {
        TEACHER: {"model": TEACHER},
        UNTRAINED: {"train": False},
        **{name: {"configs": [f"dskd:objective/{OBJECTIVES[name]}"]} for name in names},
    }


def _class_of(name: str) -> object:
    config = read_yaml(config_path(f"dskd:objective/{OBJECTIVES[name]}"))
    return config["model"]["objective"]["class_path"]
