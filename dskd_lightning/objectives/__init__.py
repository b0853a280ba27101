"""What is minimised: one class per method, each a `class_path` in a config."""

from dskd_lightning.objectives.alm import ALMObjective
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.objectives.dskd import DSKDObjective
from dskd_lightning.objectives.dskd_cma import DSKDCrossAttentionObjective
from dskd_lightning.objectives.dskd_eta import DSKDTokenAlignmentObjective
from dskd_lightning.objectives.dskd_v2 import DSKDv2Objective
from dskd_lightning.objectives.gold import GOLDObjective
from dskd_lightning.objectives.logit_kd import LogitKDObjective
from dskd_lightning.objectives.min_edit import MinEditObjective
from dskd_lightning.objectives.paired import PairedObjective
from dskd_lightning.objectives.sft import SFTObjective
from dskd_lightning.objectives.shared_vocabulary import SharedVocabularyObjective
from dskd_lightning.objectives.top_k import TopKObjective
from dskd_lightning.objectives.uld import ULDObjective
from dskd_lightning.objectives.xtoken import XTokenHybridObjective, XTokenProjectionObjective

__all__ = [
    "ALMObjective",
    "CrossTokenizerObjective",
    "DSKDCrossAttentionObjective",
    "DSKDObjective",
    "DSKDTokenAlignmentObjective",
    "DSKDv2Objective",
    "GOLDObjective",
    "LogitKDObjective",
    "MinEditObjective",
    "Objective",
    "ObjectiveOutput",
    "PairedObjective",
    "SFTObjective",
    "SharedVocabularyObjective",
    "TopKObjective",
    "ULDObjective",
    "XTokenHybridObjective",
    "XTokenProjectionObjective",
]
