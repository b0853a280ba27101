"""Checkpoints that are whole or absent, and that are compared with their digests before they are used."""

from dskd_lightning.checkpoints.checks import (
    READ_DIGEST_KEY,
    check_checkpoint,
    digest_of,
    read_checkpoint,
    read_identified,
)
from dskd_lightning.checkpoints.files import write_file
from dskd_lightning.checkpoints.folders import restored, write_folder
from dskd_lightning.checkpoints.trainer_io import WholeCheckpointIO

__all__ = [
    "READ_DIGEST_KEY", "WholeCheckpointIO", "check_checkpoint", "digest_of", "read_checkpoint",
    "read_identified", "restored", "write_file", "write_folder",
]  # fmt: skip
