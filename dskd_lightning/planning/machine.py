"""What the machine has: memory, disk, and the speed that it reaches now."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

from dskd_lightning.processor import SLOW

__all__ = ["Machine", "free_disk"]

_WIDTH = {"cuda": 4096, "cpu": 768}
_TOKENS = {"cuda": 8192, "cpu": 512}
_SECONDS = 0.3


@dataclass(frozen=True)
class Machine:
    """One training device.

    Args:
        name: of the device.
        memory: bytes that are free on it.
        flops: floating-point operations a second of a linear layer in float32, measured.
        flops16: likewise in bfloat16, which some processors only emulate.
        cuda: whether it is a GPU.
    """

    name: str
    memory: int
    flops: float
    flops16: float
    cuda: bool

    @classmethod
    def measure(cls, accelerator: str = "auto") -> Machine:
        """Look at the device that a trainer with this ``accelerator`` takes, and time a layer on it."""
        cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        memory = torch.cuda.mem_get_info()[0] if cuda else _available_bytes()
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        return cls(name, memory, _speed(device, torch.float32), _speed(device, torch.bfloat16), cuda)

    def speed(self, mixed: bool) -> float:
        """Operations a second in 16 bits where ``mixed``."""
        return self.flops16 if mixed else self.flops

    @property
    def prefers_32_bits(self) -> bool:
        """Whether 16 bits would cost time instead of saving it."""
        return self.flops > SLOW * self.flops16


@torch.inference_mode()
def _speed(device: torch.device, dtype: torch.dtype) -> float:
    tokens, width = _TOKENS[device.type], _WIDTH[device.type]
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(2 * width, width, device=device).to(dtype)
    linear(hidden, weight)  # warm
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _SECONDS:
        linear(hidden, weight)
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done * 4 * tokens * width**2 / (time.perf_counter() - begin)


def _available_bytes() -> int:
    """Free memory, not more than a container may use."""
    found = [_meminfo()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # "max", or no such system
            continue
    return max(0, min(found))


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(path: str | Path) -> int:
    """Free bytes of the disk that ``path`` is or will be on."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
