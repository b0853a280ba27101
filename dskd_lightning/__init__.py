"""Distil one language model into another with Dual-Space Knowledge Distillation.

Everything is imported on first use, so that ``import dskd_lightning`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see
    from dskd_lightning.data import DistillationCollator as DistillationCollator
    from dskd_lightning.data import InstructionDataModule as InstructionDataModule
    from dskd_lightning.errors import UserError as UserError
    from dskd_lightning.functional import AdaptiveKL as AdaptiveKL
    from dskd_lightning.functional import Divergence as Divergence
    from dskd_lightning.functional import ForwardKL as ForwardKL
    from dskd_lightning.functional import JensenShannon as JensenShannon
    from dskd_lightning.functional import ReverseKL as ReverseKL
    from dskd_lightning.functional import SkewedForwardKL as SkewedForwardKL
    from dskd_lightning.functional import SkewedReverseKL as SkewedReverseKL
    from dskd_lightning.functional import TotalVariation as TotalVariation
    from dskd_lightning.generation import Generation as Generation
    from dskd_lightning.generation import GenerationSettings as GenerationSettings
    from dskd_lightning.generation import Generator as Generator
    from dskd_lightning.generation.samples import ResponseSampler as ResponseSampler
    from dskd_lightning.generation.samples import Sample as Sample
    from dskd_lightning.launch.trained import load_student as load_student
    from dskd_lightning.models import export_student as export_student
    from dskd_lightning.models.loaded import Loaded as Loaded
    from dskd_lightning.models.spec import EndpointSpec as EndpointSpec
    from dskd_lightning.models.spec import FollowSpec as FollowSpec
    from dskd_lightning.models.spec import LoraSpec as LoraSpec
    from dskd_lightning.models.spec import PruneSpec as PruneSpec
    from dskd_lightning.models.spec import StudentSpec as StudentSpec
    from dskd_lightning.models.spec import TeacherSpec as TeacherSpec
    from dskd_lightning.models.teacher_cache_settings import TeacherCacheSettings as TeacherCacheSettings
    from dskd_lightning.module import DistillationModule as DistillationModule
    from dskd_lightning.objectives import ALMObjective as ALMObjective
    from dskd_lightning.objectives import DSKDCrossAttentionObjective as DSKDCrossAttentionObjective
    from dskd_lightning.objectives import DSKDObjective as DSKDObjective
    from dskd_lightning.objectives import DSKDTokenAlignmentObjective as DSKDTokenAlignmentObjective
    from dskd_lightning.objectives import DSKDv2Objective as DSKDv2Objective
    from dskd_lightning.objectives import GOLDObjective as GOLDObjective
    from dskd_lightning.objectives import LogitKDObjective as LogitKDObjective
    from dskd_lightning.objectives import MinEditObjective as MinEditObjective
    from dskd_lightning.objectives import Objective as Objective
    from dskd_lightning.objectives import ObjectiveOutput as ObjectiveOutput
    from dskd_lightning.objectives import SFTObjective as SFTObjective
    from dskd_lightning.objectives import SharedVocabularyObjective as SharedVocabularyObjective
    from dskd_lightning.objectives import TopKObjective as TopKObjective
    from dskd_lightning.objectives import ULDObjective as ULDObjective
    from dskd_lightning.objectives import XTokenHybridObjective as XTokenHybridObjective
    from dskd_lightning.objectives import XTokenProjectionObjective as XTokenProjectionObjective
    from dskd_lightning.objectives._same_vocabulary import SameVocabularyObjective as SameVocabularyObjective
    from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective as CrossTokenizerObjective
    from dskd_lightning.objectives.paired import PairedObjective as PairedObjective
    from dskd_lightning.structures import Alignment as Alignment
    from dskd_lightning.structures import DistillationBatch as DistillationBatch
    from dskd_lightning.structures import Head as Head
    from dskd_lightning.structures import LogProbabilities as LogProbabilities
    from dskd_lightning.structures import ModelSpace as ModelSpace
    from dskd_lightning.structures import Ratio as Ratio
    from dskd_lightning.structures import Side as Side
    from dskd_lightning.structures import TokenBatch as TokenBatch
    from dskd_lightning.training.on_policy import OnPolicySettings as OnPolicySettings
    from dskd_lightning.training.whole_steps import WholeSteps as WholeSteps
    from dskd_lightning.training.whole_steps import mean_over_step as mean_over_step
    from dskd_lightning.training.windows import windows as windows

_HOMES = {
    "ALMObjective": "objectives",
    "AdaptiveKL": "functional",
    "Alignment": "structures",
    "CrossTokenizerObjective": "objectives.cross_tokenizer",
    "DSKDCrossAttentionObjective": "objectives",
    "DSKDObjective": "objectives",
    "DSKDTokenAlignmentObjective": "objectives",
    "DSKDv2Objective": "objectives",
    "DistillationBatch": "structures",
    "DistillationCollator": "data",
    "DistillationModule": "module",
    "Divergence": "functional",
    "EndpointSpec": "models.spec",
    "FollowSpec": "models.spec",
    "ForwardKL": "functional",
    "GOLDObjective": "objectives",
    "Generation": "generation",
    "GenerationSettings": "generation",
    "Generator": "generation",
    "Head": "structures",
    "InstructionDataModule": "data",
    "JensenShannon": "functional",
    "Loaded": "models.loaded",
    "LogitKDObjective": "objectives",
    "LogProbabilities": "structures",
    "LoraSpec": "models.spec",
    "MinEditObjective": "objectives",
    "ModelSpace": "structures",
    "Objective": "objectives",
    "ObjectiveOutput": "objectives",
    "OnPolicySettings": "training.on_policy",
    "PairedObjective": "objectives.paired",
    "PruneSpec": "models.spec",
    "Ratio": "structures",
    "ResponseSampler": "generation.samples",
    "ReverseKL": "functional",
    "SFTObjective": "objectives",
    "SameVocabularyObjective": "objectives._same_vocabulary",
    "Sample": "generation.samples",
    "SharedVocabularyObjective": "objectives",
    "Side": "structures",
    "SkewedForwardKL": "functional",
    "SkewedReverseKL": "functional",
    "StudentSpec": "models.spec",
    "TeacherCacheSettings": "models.teacher_cache_settings",
    "TeacherSpec": "models.spec",
    "TokenBatch": "structures",
    "TopKObjective": "objectives",
    "TotalVariation": "functional",
    "ULDObjective": "objectives",
    "UserError": "errors",
    "WholeSteps": "training.whole_steps",
    "XTokenHybridObjective": "objectives",
    "XTokenProjectionObjective": "objectives",
    "export_student": "models",
    "load_student": "launch.trained",
    "mean_over_step": "training.whole_steps",
    "windows": "training.windows",
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
