"""Teachers and students: load, cut down, adapt, read and export them."""

from dskd_lightning.models.export import export_student
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.loading import load_model, load_teacher
from dskd_lightning.models.output import (
    base_model,
    decoder_hidden,
    input_embeddings,
    language_head,
    model_space,
    side,
)
from dskd_lightning.models.parameters import ParameterCount, parameter_report
from dskd_lightning.models.pruning import prune_layers
from dskd_lightning.models.spec import LoraSpec, ModelSpec, PruneSpec, StudentSpec, TeacherSpec
from dskd_lightning.models.student import build_student
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.models.verification import verify_causal, verify_head, verify_packing

__all__ = [
    "Loaded",
    "LoraSpec",
    "ModelSpec",
    "ParameterCount",
    "PruneSpec",
    "StudentSpec",
    "TeacherSpec",
    "base_model",
    "build_student",
    "decoder_hidden",
    "export_student",
    "input_embeddings",
    "language_head",
    "load_model",
    "load_teacher",
    "load_tokenizer",
    "model_space",
    "parameter_report",
    "prune_layers",
    "side",
    "verify_causal",
    "verify_head",
    "verify_packing",
    "weights_fingerprint",
]
