"""From instruction files to batches in which student and teachers read the same responses."""

from dskd_lightning.data.batching import Batch, BatchPlan, BatchSettings, plan_batches
from dskd_lightning.data.chat import ChatRenderer, RenderedConversation, RenderedTurn
from dskd_lightning.data.collate import Collator, TeacherHidden
from dskd_lightning.data.datamodule import InstructionDataModule, Stage
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.formats import Format, InvalidRecord, detect_format, parse_record
from dskd_lightning.data.in_memory import DistillationCollator
from dskd_lightning.data.loader import DistillationLoader
from dskd_lightning.data.preparation import PreparationSettings, prepare
from dskd_lightning.data.prepared import PreparedDataset, RenderedExample
from dskd_lightning.data.preview import DataPreview
from dskd_lightning.data.sources import Record, Source, resolve_sources
from dskd_lightning.data.truncation import truncate
from dskd_lightning.data.views import ExampleView

__all__ = [
    "Batch",
    "BatchPlan",
    "BatchSettings",
    "ChatRenderer",
    "Collator",
    "DataPreview",
    "DistillationCollator",
    "DistillationLoader",
    "Example",
    "ExampleView",
    "Format",
    "InstructionDataModule",
    "InvalidRecord",
    "Message",
    "PreparationSettings",
    "PreparedDataset",
    "Record",
    "RenderedConversation",
    "RenderedExample",
    "RenderedTurn",
    "Source",
    "Stage",
    "TeacherHidden",
    "detect_format",
    "parse_record",
    "plan_batches",
    "prepare",
    "resolve_sources",
    "truncate",
]
