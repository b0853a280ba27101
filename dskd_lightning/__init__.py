"""Distil one language model into another with Dual-Space Knowledge Distillation.

Everything is imported on first use, so that ``import dskd_lightning`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ALMObjective": "objectives",
    "AdaptiveKL": "functional",
    "Alignment": "structures",
    "DSKDCrossAttentionObjective": "objectives",
    "DSKDObjective": "objectives",
    "DSKDTokenAlignmentObjective": "objectives",
    "DSKDv2Objective": "objectives",
    "DistillationBatch": "structures",
    "DistillationCollator": "data",
    "DistillationModule": "module",
    "ForwardKL": "functional",
    "GOLDObjective": "objectives",
    "Head": "structures",
    "InstructionDataModule": "data",
    "JensenShannon": "functional",
    "Loaded": "models.loaded",
    "LogitKDObjective": "objectives",
    "LoraSpec": "models.spec",
    "MinEditObjective": "objectives",
    "ModelSpace": "structures",
    "Objective": "objectives",
    "ObjectiveOutput": "objectives",
    "PruneSpec": "models.spec",
    "Ratio": "structures",
    "ReverseKL": "functional",
    "SFTObjective": "objectives",
    "SharedVocabularyObjective": "objectives",
    "Side": "structures",
    "SkewedForwardKL": "functional",
    "SkewedReverseKL": "functional",
    "StudentSpec": "models.spec",
    "TeacherSpec": "models.spec",
    "TotalVariation": "functional",
    "ULDObjective": "objectives",
    "UserError": "errors",
    "XTokenHybridObjective": "objectives",
    "XTokenProjectionObjective": "objectives",
    "export_student": "models",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
