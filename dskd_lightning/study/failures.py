"""Variants that ended without a result: what is said of them, and what others that share the folder read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_if_there, write_object

__all__ = ["VariantsFailed", "WorkerFailed", "forget_failure", "has_failed", "note_failure"]


class WorkerFailed(UserError):
    """A variant's process ended with something else than a result.

    Args:
        name: of the variant.
        reason: how it ended, and where its log is.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"study: variant {name!r} failed with {reason}.")
        self.name, self.reason = name, reason


class VariantsFailed(UserError):
    """What a study ends in where some of its variants failed, the others done and summarised.

    Args:
        failures: one for each of these variants.
        total: how many there were to run.
    """

    def __init__(self, failures: Sequence[WorkerFailed], total: int) -> None:
        told = "; ".join(f"{failure.name!r} with {failure.reason}" for failure in failures)
        super().__init__(
            f"study: {len(failures)} of {total} variants failed, and are tried again when the study is run "
            f"again: {told}."
        )


def note_failure(output: Path, name: str, settings: Iterable[str]) -> None:
    """Write down that a variant failed.

    Args:
        output: folder of the study.
        name: of the variant.
        settings: digests of all its points.
    """
    write_object(_file(output, name), {"settings": sorted(settings)})


def forget_failure(output: Path, name: str) -> None:
    """It is tried again."""
    _file(output, name).unlink(missing_ok=True)


def has_failed(output: Path, name: str, settings: Iterable[str]) -> bool:
    """Whether the variant failed with these settings, and wasn't tried since.

    Raises:
        UserError: what was written down is damaged.
    """
    path = _file(output, name)
    return (read_if_there(path, f"delete {path}") or {}).get("settings") == sorted(settings)


def _file(output: Path, name: str) -> Path:
    return output / ".failed" / f"{name}.json"
