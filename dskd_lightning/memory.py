"""Peak memory of a piece of work, on a GPU or of this process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory_bytes", "status_bytes"]


def peak_memory_bytes() -> int:
    """Peak CUDA memory of this process, or its peak resident memory without CUDA."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class PeakMemory:
    """Peak bytes above what was held when this was made, on a CUDA device or of this process.

    A process's high-water mark can be restarted on Linux only: elsewhere ``extra`` is None. Memory
    that the allocator kept from earlier work is given back first, where glibc can, so that it
    doesn't hide what is used now.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from VmRSS
            self._before = status_bytes("VmRSS")
        except (OSError, KeyError):
            self._before = None

    @property
    def extra(self) -> int | None:
        """Bytes, or None where they can't be read."""
        if self._before is None:
            return None
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else status_bytes("VmHWM")
        return max(0, peak - self._before)


def status_bytes(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``, such as ``VmRSS``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
