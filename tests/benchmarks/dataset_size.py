"""Time and memory per token as the dataset grows: preparing it, and reading batches of an epoch.

Run: ``python tests/benchmarks/dataset_size.py [--examples 1000 10000 100000]``, on texts drawn at random
from a list of words and a tokenizer trained on the spot; no model runs. Preparing formats, renders,
tokenises and writes every example; reading is a whole epoch by token budget, collated. Memory is the
process's peak above what it held before, file pages that are mapped included; ``private`` is what it
holds afterwards that no file backs.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import (  # noqa: E402
    MIB,
    Measured,
    Memory,
    clock,
    growing,
    report,
)
from _training import tiny_source  # noqa: E402
from conftest import CORPUS  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.memory import status_bytes  # noqa: E402

WORDS = " ".join(CORPUS[:2]).split()
COLUMNS = (
    "examples", "million tokens", "prepare, us/token", "prepare, peak MiB", "read, us/token",
    "read, peak MiB", "private MiB after",
)  # fmt: skip


def write(path: Path, examples: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(examples):
            prompt, response = (" ".join(draw.choices(WORDS, k=draw.randrange(8, 60))) for _ in range(2))
            file.write(json.dumps({"prompt": f"{i} {prompt}", "response": response}) + "\n")


def case(examples: int) -> None:
    """Measure one size in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, _ = tiny_source(folder)
        write(folder / "many.jsonl", examples)
        data = dl.InstructionDataModule(
            str(folder / "many.jsonl"), student=dl.StudentSpec(source), max_length=256, max_prompt_length=128,
            max_tokens_per_batch=4096, cache_dir=str(folder / "cache"),
        )  # fmt: skip
        memory, begin, before = Memory(), clock(), status_bytes("RssAnon")
        data.prepare_data()
        data.setup("fit")
        prepared, prepared_mb = clock() - begin, memory.extra
        memory, begin, tokens = Memory(), clock(), 0
        for batch in data.train_dataloader():
            assert batch.student.attention_mask is not None
            tokens += int(batch.student.attention_mask.sum())
        read = clock() - begin
        report(
            [prepared], memory, tokens=tokens, read=read, prepared_mb=prepared_mb,
            private=(status_bytes("RssAnon") - before) / MIB,
        )  # fmt: skip


def cells(m: Measured) -> list[str]:
    more, million = m.more, m.more["tokens"] / 1e6
    found = (m.median / million, more["prepared_mb"], more["read"] / million, m.extra_mb, more["private"])
    return [f"{million:.2f}", *(f"{cell:.1f}" for cell in found)]


def main() -> None:
    sizes = ("--examples", (1_000, 10_000, 100_000))
    growing(
        __file__,
        __doc__,
        sizes,
        case,
        "Per token of the student; memory of the process",
        COLUMNS,
        cells,
    )


if __name__ == "__main__":
    main()
