"""What a run leaves on disk, and how it is shown: folder, predictions, environment, tables, text, console."""

from dskd_lightning.runs.environment import collect_environment
from dskd_lightning.runs.predictions import Prediction, describe_problems, read_predictions
from dskd_lightning.runs.run_folder import AlignmentMap, RunFolder
from dskd_lightning.runs.tables import CompletionTable

__all__ = [
    "AlignmentMap",
    "CompletionTable",
    "Prediction",
    "RunFolder",
    "collect_environment",
    "describe_problems",
    "read_predictions",
]
