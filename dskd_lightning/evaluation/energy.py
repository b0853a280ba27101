"""Energy of a piece of work, where the machine lets us read it."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

__all__ = ["EnergyMeter"]

_RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Context manager: ``joules`` of processors (RAPL) and NVIDIA GPUs (nvidia-smi) meanwhile.

    ``joules`` is None where nothing is readable. Other work on the machine is counted too.

    Args:
        gpu: sample the power of the GPUs.
        interval: seconds between samples of GPU power.
    """

    def __init__(self, *, gpu: bool = False, interval: float = 0.2, rapl: Path = _RAPL) -> None:
        self.joules: float | None = None
        self.sources: list[str] = []
        self._packages = [path for path in sorted(rapl.glob("*-rapl:*")) if path.name.count(":") == 1]
        self._command = shutil.which("nvidia-smi") if gpu else None
        self._interval = interval
        self._stop = threading.Event()
        self._gpu_joules: float | None = None

    def __enter__(self) -> EnergyMeter:
        self._before = [_read(path / "energy_uj") for path in self._packages]
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self._command is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._command is not None:
            self._thread.join()
        spent = [
            _difference(before, _read(path / "energy_uj"), _read(path / "max_energy_range_uj"))
            for path, before in zip(self._packages, self._before, strict=True)
        ]
        readable = [joules for joules in spent if joules is not None]
        if readable:
            self.sources.append("RAPL")
        if self._gpu_joules is not None:
            self.sources.append("nvidia-smi")
            readable.append(self._gpu_joules)
        self.joules = sum(readable) if readable else None

    def _sample(self) -> None:
        last = time.perf_counter()
        while True:
            ended = self._stop.wait(self._interval)
            watts = self._watts()
            now = time.perf_counter()
            if watts is not None:
                self._gpu_joules = (self._gpu_joules or 0.0) + watts * (now - last)
            last = now
            if ended:
                return

    def _watts(self) -> float | None:
        command = [str(self._command), "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
            return sum(float(line) for line in output.split())
        except (OSError, ValueError, subprocess.SubprocessError):
            return None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # since 2020 most kernels let only root read it
        return None


def _difference(before: int | None, after: int | None, wrap: int | None) -> float | None:
    if before is None or after is None:
        return None
    if after < before and wrap is None:
        return None
    return ((after - before) if after >= before else (after - before + (wrap or 0))) / 1e6
