"""What storing a teacher's states in fewer bytes costs: distance of its probabilities, and time to read.

Run: ``python tests/benchmarks/state_codecs.py [--states FOLDER --teacher SOURCE]``, the folder of a teacher
cache in bfloat16 or float32 (``teacher-states/<key>``) and the teacher that it was computed with. Without,
the demo teacher reads some of its own data first. Rows of the first shard are stored and read back; KL is
from the probabilities of the states as they were, in nats. The lower rows are what was tried and not kept:
one scale a row without each dimension's mean and deviation, and the shard's principal components.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from _measure import environment, print_table  # noqa: E402
from torch import Tensor  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.models.output import language_head  # noqa: E402
from dskd_lightning.structures import Head  # noqa: E402
from dskd_lightning.teacher_cache import TeacherCacheSettings, ensure_caches, load_teacher_head  # noqa: E402
from dskd_lightning.teacher_cache.codecs import bytes_per_token, decode, encode  # noqa: E402
from dskd_lightning.teacher_cache.loss import StorageError  # noqa: E402
from dskd_lightning.teacher_cache.manifest import Manifest  # noqa: E402
from dskd_lightning.teacher_cache.shards import open_shard, shard_name  # noqa: E402

COLUMNS = ("bytes a token", "relative error", "KL", "largest KL", "same choice", "read, tokens/s")
KEPT = ("bfloat16", "int8", "int4")
READS = 20


def row_scaled(hidden: Tensor, levels: int) -> Tensor:
    """One scale a row for the states as they are."""
    scale = hidden.abs().amax(dim=1, keepdim=True) / levels
    return (hidden / scale).round() * scale


def components(hidden: Tensor, rank: int) -> Tensor:
    """The shard's ``rank`` largest principal components, in bfloat16."""
    mean = hidden.mean(dim=0)
    basis = torch.linalg.eigh((hidden - mean).T @ (hidden - mean)).eigenvectors[:, -rank:]
    return ((hidden - mean) @ basis).bfloat16().float() @ basis.T + mean


def candidates(width: int) -> Iterator[tuple[str, float, Callable[[Tensor], Tensor]]]:
    """Label, bytes a token, and states after storing."""
    for kind in KEPT:
        yield kind, bytes_per_token(width, kind), partial(_stored, kind=kind)  # type: ignore[arg-type]
    yield "8 bits, a scale a row alone", width + 4, partial(row_scaled, levels=127)
    yield "4 bits, a scale a row alone", width / 2 + 4, partial(row_scaled, levels=7)
    for share in (2, 4):
        rank = width // share
        yield f"{rank} components, bfloat16", 2 * rank, partial(components, rank=rank)


def _stored(hidden: Tensor, kind: dl.CacheDtype) -> Tensor:
    return decode(encode(hidden, kind), slice(0, len(hidden)), hidden.dtype)


def read_speed(hidden: Tensor, kind: dl.CacheDtype, dtype: torch.dtype) -> float:
    """Tokens a second that `decode` gives in ``dtype``, 200 at a time."""
    stored, rows = encode(hidden, kind), slice(0, min(200, len(hidden)))
    seconds = []
    for _ in range(READS):
        begin = time.perf_counter()
        decode(stored, rows, dtype)
        seconds.append(time.perf_counter() - begin)
    return rows.stop / statistics.median(seconds)


def rows_of(hidden: Tensor, head: Head, sampled: int, dtype: torch.dtype) -> list[list[str]]:
    """The table: ``hidden`` ``[n, hidden]`` in float32, of which ``sampled`` rows are measured."""
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:sampled]
    true = hidden[chosen]
    rows = []
    for name, size, store in candidates(hidden.shape[1]):
        found = store(hidden)[chosen].to(dtype).float()
        error = StorageError()
        error.update(true, found, head)
        worst, same = distances(true, found, head)
        speed = f"{read_speed(hidden, name, dtype):,.0f}" if name in KEPT else ""  # type: ignore[arg-type]
        measured = (f"{error.relative:.1e}", f"{error.kl:.1e}", f"{worst:.1e}", f"{same:.1%}")
        rows.append([name, f"{size:,.0f}", *measured, speed])
    return rows


def distances(true: Tensor, found: Tensor, head: Head) -> tuple[float, float]:
    """The largest KL of a position, and the share of positions with the same likeliest token."""
    largest, same = 0.0, 0
    for one, other in zip(true.split(100), found.split(100), strict=True):
        p, q = (head.logits(h).log_softmax(-1) for h in (one, other))
        largest = max(largest, float((p.exp() * (p - q)).sum(-1).max()))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return largest, same / len(true)


def wide_head(spec: dl.TeacherSpec) -> Head:
    """The teacher's head in float32."""
    head = language_head(load_teacher_head(spec))  # type: ignore[arg-type]
    return replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())


def states_of_demo(folder: Path, limit: int) -> Path:
    """A cache of the demo teacher's states."""
    teacher = dl.TeacherSpec("demo", dtype="bfloat16")
    datamodule = dl.InstructionDataModule(
        "demo", student=dl.StudentSpec("demo"), teacher=teacher, limit=limit, max_length=256,
        max_prompt_length=128, cache_dir=str(folder),
    )  # fmt: skip
    ensure_caches(datamodule, [teacher], ("train",), TeacherCacheSettings())
    return datamodule.teacher_hidden["train"][0].folder  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=Path)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--limit", type=int, default=100, help="examples of the demo's data")
    parser.add_argument("--rows", type=int, default=500, help="positions to measure")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = a.states or states_of_demo(Path(name), a.limit)
        manifest = Manifest.read(folder)
        if manifest is None or manifest.dtype not in ("bfloat16", "float32"):
            parser.error(f"--states: '{folder}' holds no cache in bfloat16 or float32")
        head = wide_head(dl.TeacherSpec(a.teacher, dtype=manifest.teacher_dtype))  # type: ignore[arg-type]
        hidden = open_shard(folder / shard_name(0))["hidden"].float()
        title = f"{len(hidden):,} states of {hidden.shape[1]}, vocabulary of {head.weight.shape[0]:,}"
        print(f"{title}\n{environment()}")
        rows = rows_of(hidden, head, a.rows, getattr(torch, manifest.teacher_dtype))
        print_table("Stored states", ("stored as", *COLUMNS), rows)


if __name__ == "__main__":
    main()
