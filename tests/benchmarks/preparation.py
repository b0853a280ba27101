"""Preparing data by one process and by several, against tokenising the same texts in batches and no more.

Run: ``python tests/benchmarks/preparation.py [--data FILE] [--tokenizers A B] [--examples N]
[--processes 1 2]``; conversations for two tokenizers, by default SmolLM2's twice, in wall-clock seconds.
The bare way calls each tokenizer on 1,000 texts at a time, in one thread; it formats, marks, cuts, aligns
and writes nothing. The first process loads the tokenizers, reads and writes; what it takes for that tells
how many others it can keep busy. The bare way by several processes, each with its part of the texts and
nothing to hand over, tells how much faster the machine itself is with them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from _measure import environment, print_table  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.data.preparation import PreparationSettings  # noqa: E402
from dskd_lightning.data.reading import read_examples  # noqa: E402
from dskd_lightning.data.sources import resolve_sources  # noqa: E402
from dskd_lightning.models.loading import load_tokenizer  # noqa: E402

_BATCH = 1000


def repeated(data: str, examples: int, folder: Path) -> tuple[str, list[str]]:
    """A file of so many conversations, those of ``data`` again and again, and the texts in it."""
    found = list(read_examples(resolve_sources(data), PreparationSettings(), Counter()))
    rows = [found[i % len(found)] for i in range(examples)]
    path = folder / "many.jsonl"
    with path.open("w") as file:
        for row in rows:
            messages = [{"role": m.role, "content": m.content} for m in row.messages]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path), ["\n".join(m.content for m in row.messages) for row in rows]


def _name(way: str, processes: int) -> str:
    return f"{way} by {processes} process{'es' * (processes > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--tokenizers", nargs=2, default=["demo", "demo"], metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    specs = [dl.StudentSpec(a.tokenizers[0]), dl.TeacherSpec(a.tokenizers[1])]
    for spec in specs:
        if load_tokenizer(spec).chat_template is None:
            spec.prompt_template = "{prompt}\n\n"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, texts = repeated(a.data, a.examples, folder)

        def tokenize(tokenizers: list[Any], part: list[str]) -> None:
            for tokenizer in tokenizers:
                for at in range(0, len(part), _BATCH):
                    tokenizer(part[at : at + _BATCH])

        def bare(processes: int) -> Callable[[], None]:
            def run() -> None:
                tokenizers = [load_tokenizer(spec) for spec in specs]
                if processes == 1:
                    tokenize(tokenizers, texts)
                    return
                context = multiprocessing.get_context("fork")
                parts = [texts[at::processes] for at in range(processes)]
                others = [context.Process(target=tokenize, args=(tokenizers, part)) for part in parts]
                for other in others:
                    other.start()
                for other in others:
                    other.join()

            return run

        def prepared(processes: int) -> Callable[[], None]:
            def run() -> None:
                dl.InstructionDataModule(
                    data, student=specs[0], teacher=specs[1], num_proc=processes,
                    cache_dir=str(folder / f"cache {time.monotonic_ns()}"),
                ).prepare_data()  # fmt: skip

            return run

        ways = {_name("bare tokenization", n): bare(n) for n in a.processes}
        ways |= {_name("prepared", n): prepared(n) for n in a.processes}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        own: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(a.rounds):  # by turns, so that what else the machine does falls on all
            for way, run in ways.items():
                begin, worked = time.perf_counter(), time.process_time()
                run()
                seconds[way].append(time.perf_counter() - begin)
                own[way].append(time.process_time() - worked)
    taken = {way: median(values) for way, values in seconds.items()}
    alone = {way: taken[_name(way, a.processes[0])] for way in ("bare tokenization", "prepared")}
    print(environment())
    print_table(
        f"{a.examples:,} conversations for two tokenizers",
        ("way", "wall s", "conversations/s", "/ bare", "speed", "CPU s of the first process"),
        [
            (
                way,
                f"{value:.1f}",
                f"{a.examples / value:,.0f}",
                f"{value / alone['bare tokenization']:.2f}",
                f"{alone[way.split(' by ')[0]] / value:.2f}",
                f"{median(own[way]):.1f}",
            )
            for way, value in taken.items()
        ],
    )


if __name__ == "__main__":
    main()
