"""Every benchmark with its default sizes, one after another: ``python -m tests.benchmarks``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = (
    ("fused_loss.py", "--tokens", "512", "1024", "--rounds", "1"),
    ("training_step.py", "--rounds", "1"),
    ("peers.py", "--rounds", "1"),
    ("gold.py", "--rounds", "1"),
    ("teacher_cache.py",),
    ("state_codecs.py",),
    ("pruned_parts.py",),
    ("alignment_speed.py",),
    ("dataset_size.py",),
    ("preparation.py",),
    ("planning.py",),
    ("comparing.py",),
    ("responses.py",),
    ("on_policy.py", "--rounds", "1"),
    ("scale.py",),
    ("scale_plans.py",),
)


def main() -> int:
    failed = []
    for name, *arguments in RUNS:
        print(f"\n## {' '.join((name, *arguments))}\n", flush=True)
        if subprocess.run([sys.executable, str(HERE / name), *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
