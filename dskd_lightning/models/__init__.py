"""Teachers and students: load, cut down, adapt, read and export them."""

from dskd_lightning.models.loading import load_tokenizer
from dskd_lightning.models.spec import LoraSpec, ModelSpec, PruneSpec, StudentSpec, TeacherSpec

__all__ = [
    "LoraSpec",
    "ModelSpec",
    "PruneSpec",
    "StudentSpec",
    "TeacherSpec",
    "load_tokenizer",
]
