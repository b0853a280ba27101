"""What the teacher cache costs and saves: building, bytes a token, and epochs with and without it.

Run: ``python tests/benchmarks/teacher_cache.py`` (models made on the spot) or with ``--demo``
(SmolLM2-135M-Instruct into some of its layers, on the quickstart's data).
Epochs are the best of ``--repeat`` after a warm-up epoch, loading included, validation and
logging left out; SFT is the same student on the same batches.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from conftest import make_tokenizer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.models.spec import PruneSpec  # noqa: E402
from dskd_lightning.objectives import LogitKDObjective, Objective  # noqa: E402
from dskd_lightning.teacher_cache import TeacherCacheSettings, ensure_caches  # noqa: E402


class EpochTimer(L.Callback):
    """Seconds of each training epoch, and what it waited for its batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.waits: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        self._begin, self._waited = time.perf_counter(), trainer.train_dataloader.waited  # type: ignore[union-attr]

    def on_train_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        self.waits.append(trainer.train_dataloader.waited - self._waited)  # type: ignore[union-attr]


def made_up(folder: Path, vocab: int, examples: int) -> tuple[str, str, str]:
    """Teacher and student folders and a data file."""
    torch.manual_seed(0)
    places = []
    for name, hidden, layers in (("teacher", 256, 8), ("student", 128, 6)):
        make_tokenizer().save_pretrained(folder / name)
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, eos_token_id=0,
            tie_word_embeddings=True,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        places.append(str(folder / name))
    rng = random.Random(0)
    words = ["the", "fox", "jumps", "over", "apples", "pears", "plums", "and", "more", "lazy", "dogs"]
    rows = [
        {"prompt": "Write a text.", "response": " ".join(rng.choices(words, k=rng.randint(5, 60)))}
        for _ in range(examples)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return *places, str(folder / "data.jsonl")  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--vocab", type=int, default=4_000)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--limit", type=int, default=64, help="examples of the demo data")
    parser.add_argument("--layers", type=int, default=10, help="of the demo's student")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--precision", default="bf16-mixed", help="of training; else the teacher is float32")
    parser.add_argument("--cached-only", action="store_true", help="leave out the teacher that runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    dtype = "bfloat16" if arguments.precision.startswith("bf16") else "float32"
    if arguments.demo:
        teacher, student = dl.TeacherSpec("demo", dtype=dtype), dl.StudentSpec("demo", dtype="float32")
        student.prune, data = PruneSpec(layers=arguments.layers, by="even"), "demo"
    else:
        place, other, data = made_up(folder, arguments.vocab, arguments.examples)
        teacher, student = dl.TeacherSpec(place, dtype=dtype), dl.StudentSpec(other)

    def datamodule(cache: TeacherCacheSettings | None) -> dl.InstructionDataModule:
        return dl.InstructionDataModule(
            data, student=student, teacher=teacher, limit=arguments.limit if arguments.demo else None,
            max_length=256, max_prompt_length=128, batch_size=8, cache_dir=str(folder / "cache"),
            teacher_cache=cache,
        )  # fmt: skip

    def epoch(objective: Objective, cache: TeacherCacheSettings | None) -> tuple[float, float]:
        timer = EpochTimer()
        trainer = L.Trainer(
            accelerator="auto", devices=1, logger=False, enable_checkpointing=False, callbacks=[timer],
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            max_epochs=1 + arguments.repeat, precision=arguments.precision,
        )  # fmt: skip
        trainer.fit(dl.DistillationModule(student, objective, teacher), datamodule=datamodule(cache))
        return min(zip(timer.seconds[1:], timer.waits[1:], strict=True))

    sizes = datamodule(TeacherCacheSettings())
    dataset = sizes.examples("train").dataset
    table = Table(title="Stored states")
    for column in ("stored as", "bytes a token", "of bfloat16 logits", "build, tokens/s"):
        table.add_column(column, justify="right")
    for dtype in ("bfloat16", "int8", "int4"):
        begin = time.perf_counter()
        settings = TeacherCacheSettings(dtype=dtype)  # type: ignore[arg-type]
        (head,) = ensure_caches(sizes, [teacher], ("train",), settings) or []
        seconds = time.perf_counter() - begin
        states = sizes.teacher_hidden["train"][0]
        total = states.layout.total  # type: ignore[union-attr]
        held = sum(p.stat().st_size for p in states.folder.glob("shard-*"))  # type: ignore[union-attr]
        logits = 2 * head.head.weight.shape[0]
        share = f"1/{logits * total / held:.0f}"
        table.add_row(dtype, f"{held / total:,.0f}", share, f"{total / seconds:,.0f}")
    Console(width=100).print(table, "(building includes loading and hashing the teacher)")

    cache = TeacherCacheSettings()
    cases: dict[str, tuple[Objective, TeacherCacheSettings | None]] = {
        "SFT": (dl.SFTObjective(), None),
        "logit KD, warm cache": (LogitKDObjective(), cache),
        "logit KD, teacher runs": (LogitKDObjective(), None),
        "DSKD, warm cache": (dl.DSKDObjective(), cache),
        "DSKD, teacher runs": (dl.DSKDObjective(), None),
    }
    if arguments.cached_only:
        cases = {name: case for name, case in cases.items() if "runs" not in name}
    tokens = int(dataset.lengths[:, 0].sum())
    table = Table(title=f"An epoch of {len(dataset)} examples, {tokens:,} tokens, {total:,} of responses")
    for column in ("training", "seconds", "tokens/s", "times SFT", "waits for data"):
        table.add_column(column, justify="left" if column == "training" else "right")
    seconds_of = {name: epoch(*case) for name, case in cases.items()}
    for name, (seconds, waits) in seconds_of.items():
        ratio = seconds / seconds_of["SFT"][0]
        speed = f"{tokens / seconds:,.0f}"
        table.add_row(name, f"{seconds:.2f}", speed, f"{ratio:.2f}", f"{waits / seconds:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
