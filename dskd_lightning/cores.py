"""The processor's cores that a process may use, also in a container that is given less than it sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["affine_cores", "cpu_quota", "usable_cores"]

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: of its affinity, and not more than its container's quota."""
    quota = cpu_quota()
    return affine_cores() if quota is None else max(1, min(affine_cores(), int(quota)))


def affine_cores() -> int:
    """The cores that this process may run on, whether or not it is given the time of all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # a Mac


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN) -> float | None:
    """Cores' worth of time that control groups leave this process, as ``docker run --cpus`` sets.

    None stands for no limit. More threads than that stop, all of them, for the rest of a period in which
    they have used it up.

    Args:
        cgroups: where the kernel shows the groups, of version 1 or 2.
        own: file that says which of them this process is in.
    """
    found = [quota for folder in _folders(cgroups, own) if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def _folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups and of those above; a container sees its own group as the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    roots = [cgroups, cgroups / "cpu", cgroups / "cpu,cpuacct"]
    yield from roots
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in roots[:1] if not controllers else roots[1:]:
            for above in (PurePosixPath(group), *PurePosixPath(group).parents):
                yield root / str(above).lstrip("/")


def _quota(folder: Path) -> float | None:
    """Of one group: ``cpu.max`` (version 2) holds quota and period, version 1 has a file for each."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None
