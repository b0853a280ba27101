"""Checkpoints that are whole or absent, and that are compared with their digests before they are used."""

from dskd_lightning.checkpoints.checks import check_checkpoint, digest_of, read_checkpoint
from dskd_lightning.checkpoints.files import write_file
from dskd_lightning.checkpoints.folders import restored, write_folder
from dskd_lightning.checkpoints.trainer_io import WholeCheckpointIO

__all__ = [
    "WholeCheckpointIO", "check_checkpoint", "digest_of", "read_checkpoint", "restored", "write_file",
    "write_folder",
]  # fmt: skip
