"""A teacher's last hidden states, computed once and read in every epoch.

The head makes the logits again from them, exactly where they are stored in the teacher's own
type, so that a token costs the hidden size on the disk instead of the vocabulary size.
"""

from dskd_lightning.models.teacher_cache_settings import CacheDtype, TeacherCacheSettings
from dskd_lightning.teacher_cache.attach import cache_root, ensure_caches
from dskd_lightning.teacher_cache.build import StateBuilder
from dskd_lightning.teacher_cache.head import TeacherHead, head_fingerprint, load_teacher_head
from dskd_lightning.teacher_cache.log_probabilities import TeacherLogProbabilities, ensure_log_probabilities
from dskd_lightning.teacher_cache.loss import StorageError
from dskd_lightning.teacher_cache.manifest import Layout, Manifest
from dskd_lightning.teacher_cache.store import TeacherStates, is_complete

__all__ = [
    "CacheDtype",
    "Layout",
    "Manifest",
    "StateBuilder",
    "StorageError",
    "TeacherCacheSettings",
    "TeacherHead",
    "TeacherLogProbabilities",
    "TeacherStates",
    "cache_root",
    "ensure_caches",
    "ensure_log_probabilities",
    "head_fingerprint",
    "is_complete",
    "load_teacher_head",
]
