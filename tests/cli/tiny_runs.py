"""Tiny runs of the command line, in this process or in another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from forks import become


def write_data(path: Path, count: int = 24) -> Path:
    """An instruction file whose responses have very different lengths."""
    lines = [
        {
            "prompt": f"Say the number {i}.",
            "response": " ".join(f"number {i}" for _ in range(1 + 3 * (i % 7))),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_config(folder: Path, student: str, teacher: str | None, **changes: Any) -> Path:
    """A config for a run of seconds; ``changes`` are dotted keys."""
    config: dict[str, Any] = {
        "seed_everything": 7,
        "output": str(folder / "run"),
        "save_every_n_steps": 1,
        "model": {
            "student": {"source": student},
            "objective": {"class_path": "dskd_lightning.objectives.DSKDObjective"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": str(write_data(folder / "data.jsonl")),
            "val_split": 4,
            "test_split": 4,
            "max_length": 96,
            "max_prompt_length": 40,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False},
        "responses": {"seeds": [], "max_new_tokens": 4, "max_length": None},
        "completions": {"prompts": 1, "max_new_tokens": 4},
    }
    if teacher is not None:
        config["model"]["teacher"] = {"source": teacher}
    for key, value in changes.items():
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def dskd(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``dskd`` as a user would, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "dskd_lightning", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def dskd_fork(*arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Likewise in a fork of this process, which spares it a start of many seconds."""
    from dskd_lightning.cli.main import main

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        process = os.fork()
        if not process:
            os.environ.update(environment())
            become(lambda: main(arguments), *paths)
        end = time.monotonic() + timeout
        while (done := os.waitpid(process, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise AssertionError(
                    f"dskd {arguments} hangs: {paths[1].read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.01)
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in paths)
    status = os.waitstatus_to_exitcode(done[1])
    assert not check or status == 0, err[-3000:]
    return subprocess.CompletedProcess(arguments, status, out, err)
