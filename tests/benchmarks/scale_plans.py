"""Plans for machines that aren't here, by the calculator alone, and a trillion tokens on 1,024 GPUs on paper.

Run: ``python tests/benchmarks/scale_plans.py``. Models are the shapes of public configurations, written down
here; nothing is downloaded, measured or trained.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import print_table  # noqa: E402
from transformers import LlamaConfig, Qwen2Config  # noqa: E402

from dskd_lightning import StudentSpec, TeacherSpec  # noqa: E402
from dskd_lightning.models.teacher_cache_settings import CacheDtype  # noqa: E402
from dskd_lightning.planning import DataSize, Estimate, Layout, Losses, ModelSize, estimate, model_size  # noqa: E402
from dskd_lightning.runs.heartbeat import duration  # noqa: E402
from dskd_lightning.runs.text import byte_count  # noqa: E402

PREPARING = 1.3e-6
"""Seconds of one process for a token, see "As the dataset grows" in ``docs/benchmarks.md``."""
SHARD_BYTES = 128 * 2**20


def _qwen(hidden: int, layers: int, wide: int, heads: int, keys: int, vocabulary: int, tied: bool) -> Any:
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=tied,
    )  # fmt: skip


def _smol(hidden: int, layers: int, wide: int, heads: int, keys: int) -> Any:
    return LlamaConfig(
        vocab_size=49_152, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {
    "SmolLM2-135M": lambda: _smol(576, 30, 1536, 9, 3),
    "SmolLM2-1.7B": lambda: _smol(2048, 24, 8192, 32, 32),
    "Qwen2.5-1.5B": lambda: _qwen(1536, 28, 8960, 12, 2, 151_936, True),
    "Qwen2.5-7B": lambda: _qwen(3584, 28, 18_944, 28, 4, 152_064, False),
    "Qwen2.5-32B": lambda: _qwen(5120, 64, 27_648, 40, 8, 152_064, False),
    "Qwen2.5-72B": lambda: _qwen(8192, 80, 29_568, 64, 8, 152_064, False),
}


@dataclass(frozen=True)
class Setting:
    """One plan.

    Args:
        teacher: a name in `SHAPES`; its weights are bfloat16, or float32 on a CPU.
        student: likewise; all of its weights train, in float32.
        examples: of an epoch.
        length: mean tokens of one, of which ``share`` are responses.
        share: of responses.
        epochs: passes.
        tokens: of a rank's micro-batch, filled to nine tenths.
        layout: devices.
        memory: bytes that each has.
        tflops: that a large product reaches on each.
    """

    teacher: str
    student: str
    examples: int
    length: int
    epochs: float
    tokens: int
    layout: Layout
    memory: float
    tflops: float
    share: float = 0.6

    @property
    def data(self) -> DataSize:
        """What an epoch reads."""
        tokens = self.examples * self.length
        padded = round(tokens / 0.9)
        return DataSize(
            self.examples, tokens, round(self.share * tokens), padded, -(-padded // self.tokens), self.tokens,
            self.epochs,
        )  # fmt: skip


GPU, AGAIN = 80 * 2**30, {"mixed": True, "checkpointing": True}
PLANS = {
    "laptop": Setting(
        "SmolLM2-1.7B", "SmolLM2-135M", 5_000, 400, 3, 2_048,
        Layout(cached=True, codec="int8", accumulate=4, cuda=False), 14 * 2**30, 0.3,
    ),
    "one 80 GB GPU": Setting(
        "Qwen2.5-7B", "Qwen2.5-1.5B", 100_000, 600, 3, 8_192,
        Layout(mixed=True, cached=True, accumulate=4), GPU, 400,
    ),
    "8 GPUs": Setting(
        "Qwen2.5-32B", "Qwen2.5-7B", 1_000_000, 800, 1, 8_192, Layout(8, True, **AGAIN), GPU, 400,
    ),
    "64 nodes of 8": Setting(
        "Qwen2.5-72B", "Qwen2.5-7B", 20_000_000, 1_000, 1, 8_192, Layout(512, True, 64, **AGAIN), GPU, 400,
    ),
}  # fmt: skip
TRILLION = Setting(
    "Qwen2.5-72B", "Qwen2.5-7B", 1_000_000_000, 1_000, 1, 16_384, Layout(1_024, True, 128, **AGAIN), GPU, 400,
    share=1.0,
)  # fmt: skip


@functools.cache
def size(name: str, trained: bool) -> ModelSize:
    """A model's size, as a student where ``trained``, read off its configuration as `dskd doctor` does."""
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[name]().save_pretrained(folder)
        kind = StudentSpec if trained else TeacherSpec
        return model_size(kind(folder, dtype="float32" if trained else "bfloat16"))


def planned(setting: Setting, layout: Layout | None = None) -> Estimate:
    """The calculator's numbers, for DSKD."""
    teacher, student = size(setting.teacher, False), size(setting.student, True)
    if not setting.layout.cuda:
        teacher = replace(teacher, weight_bytes=4)
    losses = Losses(projectors=2 * student.hidden * teacher.hidden)
    return estimate(student, [teacher], setting.data, losses, layout or setting.layout)


def plans() -> None:
    """Print a table with a column for each of `PLANS`."""
    found = {name: planned(setting) for name, setting in PLANS.items()}
    rows = [
        ["teacher", *(s.teacher for s in PLANS.values())],
        ["student", *(s.student for s in PLANS.values())],
        ["tokens of an epoch", *(f"{s.data.tokens / 1e6:,.0f} million" for s in PLANS.values())],
        ["layout", *(_layout(s.layout) for s in PLANS.values())],
        ["tokens of a micro-batch", *(f"{s.tokens:,}" for s in PLANS.values())],
    ]
    causes = dict.fromkeys(cause for e in found.values() for cause, n in e.memory.items() if n > 2**27)
    rows += [[f"{cause}, GiB", *(_gib(e.memory.get(cause, 0)) for e in found.values())] for cause in causes]
    rows += [
        ["**memory, GiB**", *(_gib(e.bytes) for e in found.values())],
        ["of, GiB", *(_gib(s.memory) for s in PLANS.values())],
        ["**sent a step and rank**", *(byte_count(e.sent) if e.sent else "" for e in found.values())],
        ["network as slow as products at", *(_bandwidth(e, PLANS[name].tflops) for name, e in found.items())],
        ["steps", *(f"{e.steps:,}" for e in found.values())],
        ["TFLOP/s of a large product", *(f"{s.tflops:g}" for s in PLANS.values())],
        ["**time**", *(duration(e.seconds(PLANS[n].tflops * 1e12)) for n, e in found.items())],
    ]
    for cause in dict.fromkeys(cause for e in found.values() for cause in e.disk):
        rows.append([cause, *(byte_count(n) if (n := e.disk.get(cause)) else "" for e in found.values())])
    rows.append(["host's memory a rank", *(byte_count(sum(e.host.values())) for e in found.values())])
    print_table("Calculated for one rank, not measured", ("", *PLANS), rows)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f}" if count else ""


def _bandwidth(found: Estimate, tflops: float) -> str:
    return f"{byte_count(found.bandwidth(tflops * 1e12))}/s" if found.sent else ""


def _layout(layout: Layout) -> str:
    parts = []
    if layout.ranks > 1:
        copies = f", {layout.replicas} copies" if layout.replicas > 1 else ""
        parts.append(f"FSDP2{copies}")
    parts.append("teacher cached" if layout.cached else "teacher runs")
    return "; ".join(parts + ["checkpointing"] * layout.checkpointing)


def trillion() -> None:
    """Print what a trillion tokens on 1,024 GPUs take, part by part."""
    setting, node = TRILLION, 8
    found, data = planned(setting), setting.data
    speed = setting.tflops * 1e12
    seconds = found.seconds(speed)
    flat = planned(setting, replace(setting.layout, replicas=1))
    cached = planned(setting, replace(setting.layout, cached=True))
    codecs: tuple[CacheDtype, ...] = ("bfloat16", "int8", "int4")
    caches = {
        codec: planned(setting, replace(setting.layout, cached=True, codec=codec)).disk["teacher cache"]
        for codec in codecs
    }
    blocks = planned(replace(setting, examples=setting.examples // 100))
    held = sum(found.host.values())
    saved = found.disk["checkpoints"] / 2
    step = seconds / found.steps
    rows = [
        ["training", duration(seconds), f"{found.steps:,} steps of {step:.1f} s"],
        ["memory of a GPU", f"{_gib(found.bytes)} GiB", f"of {_gib(setting.memory)} GiB"],
        ["sent a step and GPU, sharded within nodes", byte_count(found.sent),
         f"of it between nodes {byte_count(found.traffic['gradients between copies'])}"],
        ["sent a step and GPU, sharded over all", byte_count(flat.sent),
         f"as long as the products at {_bandwidth(flat, setting.tflops)}"],
        ["a checkpoint", byte_count(saved),
         f"{byte_count(saved / setting.layout.shards)} of it on each GPU of a copy"],
        ["prepared data", byte_count(found.disk["prepared data"]),
         f"{byte_count(found.disk['prepared data'] / data.tokens)} a token"],
        ["preparing by one process", duration(2 * PREPARING * data.tokens),
         f"two renderings, {PREPARING * 1e6:.1f} us a token each"],
        ["order and lengths, in the host's memory", f"{byte_count(held)} a rank",
         f"{byte_count(node * held)} a node; in 100 parts {byte_count(node * sum(blocks.host.values()))}"],
        *([f"teacher cache, {codec}", byte_count(size), f"{size / SHARD_BYTES / 1e6:,.0f} million files"]
          for codec, size in caches.items()),
        ["training without the teacher", duration(_trained(cached).seconds(speed)), "as from a cache"],
    ]  # fmt: skip
    print_table("A trillion tokens on 1,024 GPUs, calculated", ("part", "takes", ""), rows)


def _trained(found: Estimate) -> Estimate:
    """The same without the one run of the teacher that makes its cache."""
    return replace(found, work={cause: n for cause, n in found.work.items() if cause != "teacher"})


def main() -> None:
    plans()
    trillion()


if __name__ == "__main__":
    main()
