"""What runs beside training: tables, monitoring, generated responses."""

from dskd_lightning.callbacks.analysis import RepresentationAnalysis
from dskd_lightning.callbacks.best_checkpoint import BestCheckpoint
from dskd_lightning.callbacks.completions import CompletionsTable
from dskd_lightning.callbacks.csv_logger import ResumableCSVLogger
from dskd_lightning.callbacks.last_checkpoint import LastCheckpoint
from dskd_lightning.callbacks.progress_lines import ProgressLines
from dskd_lightning.callbacks.responses import ResponseEvaluation
from dskd_lightning.callbacks.sample_fidelity import SampleFidelity
from dskd_lightning.callbacks.signals import SignalStop
from dskd_lightning.callbacks.summary import DistillationSummary
from dskd_lightning.callbacks.training_cost import TrainingCost
from dskd_lightning.callbacks.validation_responses import ValidationResponses
from dskd_lightning.training.monitor import TrainingMonitor
from dskd_lightning.training.teacher_check import TeacherCheck

__all__ = [
    "BestCheckpoint",
    "CompletionsTable",
    "DistillationSummary",
    "LastCheckpoint",
    "ProgressLines",
    "RepresentationAnalysis",
    "ResponseEvaluation",
    "ResumableCSVLogger",
    "SampleFidelity",
    "SignalStop",
    "TeacherCheck",
    "TrainingCost",
    "TrainingMonitor",
    "ValidationResponses",
]
