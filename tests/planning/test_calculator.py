"""The calculator beside real steps on one and more ranks, whose tensors and traffic are counted."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "objectives"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _tracked import SIZES, Case, Counted, count
from cross_tokenizer_cases import make_case
from tiny_runs import write_config, write_data

import dskd_lightning as dl
from dskd_lightning.cli.main import main
from dskd_lightning.data.batching import BatchSettings, plan_batches
from dskd_lightning.objectives import Objective
from dskd_lightning.planning import DataSize, Layout, Losses, ModelSize, estimate, model_size
from dskd_lightning.planning.calculator.disk import disk, host
from dskd_lightning.planning.run_sizes import data_size, optimizer_states

WITHIN = 0.1
STUDENT = ModelSize(1, 1, 1, 1, 1, 4, layered=1, attention=1, keys=1, wide=1)
LONG = Case(96, layers=5, vocabulary=512, batch=4, words=24)
"""Of which activations are most."""
WIDE = Case(256, layers=3, vocabulary=512, batch=1, words=4)
"""Of which the weights are most."""
LORA = (("lora", dl.LoraSpec(rank=8)),)
AGAIN = (("gradient_checkpointing", True),)


def check(found: Counted) -> None:
    """Everything within a tenth; what is kept of weights is exact but for counters."""
    memory = found.estimate.memory
    weights = memory["student's weights"] + memory.get("teacher's weights", 0) + memory.get("projectors", 0)
    assert weights == pytest.approx(found.weights, rel=0.02)
    assert memory["gradients"] == pytest.approx(found.gradients, rel=0.02)
    assert memory["optimizer"] == pytest.approx(found.optimizer, rel=0.02)
    assert found.expected_peak == pytest.approx(found.peak, rel=WITHIN)
    assert found.estimate.sent == pytest.approx(found.sent, rel=WITHIN)
    assert found.expected_operations == pytest.approx(found.operations, rel=WITHIN)
    # To scatter sums, gloo sums all of them on every rank, which sends them once more.
    twice = found.estimate.traffic.get("gradients scattered", 0)
    assert found.estimate.sent + twice == pytest.approx(found.wire, rel=WITHIN)


def test_one_rank(tmp_path: Path) -> None:
    check(count(LONG, tmp_path))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks(tmp_path: Path, strategy: str) -> None:
    check(count(replace(WIDE, ranks=2, strategy=strategy), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp2")])
@pytest.mark.parametrize("size", SIZES)
def test_three_sizes(tmp_path: Path, size: str, ranks: int, strategy: str) -> None:
    check(count(replace(SIZES[size], ranks=ranks, strategy=strategy), tmp_path))


OTHERS: dict[str, dict[str, Any]] = {
    "GPT-2": {"kind": "gpt2"},
    "SFT": {"objective": "sft"},
    "logit KD": {"objective": "logits"},
    "adapters": {"options": LORA},
    "checkpointing": {"options": AGAIN},
    "mixed": {"precision": "bf16-mixed", "batch": 2, "words": 12},
    "DDP, accumulated": {"ranks": 2, "strategy": "ddp", "accumulate": 2, "batch": 2},
    "FSDP2, accumulated": {"ranks": 2, "strategy": "fsdp2", "accumulate": 2, "batch": 2},
    "FSDP2, adapters": {"ranks": 2, "strategy": "fsdp2", "options": LORA},
    "FSDP2, checkpointing": {"ranks": 2, "strategy": "fsdp2", "options": AGAIN},
}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_what_else_a_run_may_be(tmp_path: Path, other: str) -> None:
    check(count(replace(SIZES["small"], **OTHERS[other]), tmp_path))


SHARDED: dict[str, dict[str, Any]] = {
    "two copies": {"ranks": 4, "replicas": 2},
    "SFT": {"objective": "sft"},
    "mixed": {"precision": "bf16-mixed"},
    "mixed, checkpointing": {"precision": "bf16-mixed", "options": AGAIN},
}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", SHARDED)
def test_shards_of_wide_layers(tmp_path: Path, sharded: str) -> None:
    check(count(replace(WIDE, **{"ranks": 2, "strategy": "fsdp2", **SHARDED[sharded]}), tmp_path))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_disk_of_a_run(model_folder: Any, tmp_path: Path) -> None:
    student, teacher = model_folder(hidden=64, layers=4, seed=1), model_folder(hidden=96, layers=2, seed=2)
    changes = {
        "data.train": str(write_data(tmp_path / "many.jsonl", 900)),
        "data.teacher_cache": {"folder": str(tmp_path / "states"), "dtype": "int8"},
        "data.test_split": 0,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
    }
    config = write_config(tmp_path, student, teacher, **changes)
    assert main(["fit", "--config", str(config)]) == 0
    specs = dl.StudentSpec(student), dl.TeacherSpec(teacher)
    data = dl.InstructionDataModule(
        str(tmp_path / "many.jsonl"), student=specs[0], teacher=specs[1], max_length=96, max_prompt_length=40,
        batch_size=4, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.setup("fit")
    sizes = model_size(specs[0]), model_size(specs[1])
    losses = Losses(projectors=dl.DSKDObjective().projector_parameters(64, 96))
    found = estimate(
        sizes[0], sizes[1:], data_size(data), losses, Layout(cached=True, codec="int8", cuda=False)
    ).disk
    folder = data.examples("train").dataset.folder
    assert found["prepared data"] == pytest.approx(_size(folder), rel=WITHIN)
    assert found["teacher cache"] == pytest.approx(_size(tmp_path / "states"), rel=WITHIN)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert found["checkpoints"] == pytest.approx(2 * last.stat().st_size, rel=WITHIN)


def test_raw_examples_of_which_only_tokens_are_known(model_folder: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}.", "response": "one two " * (1 + i % 9)} for i in range(500)]
    data = dl.InstructionDataModule(
        rows, student=dl.StudentSpec(model_folder()), cache_dir=str(tmp_path), val_split=100
    )
    data.setup("fit")
    size = data_size(data)
    told, guessed = (disk(STUDENT, [], s, Losses(), Layout()) for s in (size, replace(size, raw_bytes=None)))
    assert size.raw_bytes is not None
    raw = guessed["prepared data"] - told["prepared data"] + size.raw_bytes
    # A response is there twice, as a message and as a reference.
    text = 400 / 500 * sum(len(row["prompt"] + 2 * row["response"].strip()) for row in rows)
    assert raw - 4.5 * (size.tokens + size.responses) == pytest.approx(size.raw_bytes - text, rel=WITHIN)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_hosts_memory_for_a_plan() -> None:
    examples = 400_000
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, examples), 8, 2048).astype(np.int32)
    tracemalloc.start()
    plan_batches(lengths, BatchSettings(8, packing=True, max_length=2048), seed=1).of_rank(0, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = host([], DataSize(examples, 1, 1, 1, 1, 1), Layout())
    assert found["plan of an epoch"] == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("kind", [dl.DSKDObjective, dl.DSKDv2Objective, dl.LogitKDObjective, dl.SFTObjective])
def test_projectors_are_those_that_are_made(kind: type[Objective]) -> None:
    case = make_case((("bpe", 400), ("bpe", 400)), (16, 24))
    objective = kind()
    objective.configure(case.student_space, case.teacher_space)
    assert objective.projector_parameters(16, 24) == sum(p.numel() for p in objective.parameters())


@pytest.mark.parametrize(
    "kind", [dl.DSKDCrossAttentionObjective, dl.DSKDTokenAlignmentObjective, dl.ULDObjective]
)
def test_projectors_across_vocabularies(kind: type[Objective]) -> None:
    case = make_case((("bpe", 400), ("sentencepiece", 420)), (16, 24))
    objective = kind()
    objective.configure(case.student_space, case.teacher_space)
    assert objective.projector_parameters(16, 24) == sum(p.numel() for p in objective.parameters())


def test_states_of_optimizers() -> None:
    assert optimizer_states(lambda p: torch.optim.AdamW(p)) == 2
    assert optimizer_states(lambda p: torch.optim.SGD(p, lr=0.1)) == 0
    assert optimizer_states(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) == 1
    assert optimizer_states(lambda p: torch.optim.Adafactor(p)) == pytest.approx(1 / 4096, abs=1)

    def elsewhere(parameters: Any) -> torch.optim.Optimizer:
        raise RuntimeError("no CUDA")

    assert optimizer_states(elsewhere) == 2


class _Products(TorchDispatchMode):
    """Rows that products with a head of a shape have, forward and backward, its own gradient left out."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[frozenset[int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.rows[frozenset(right.shape)] += left.shape[0]
        return result


def _products(case: Any, objective: Objective, alignment: Any) -> Counter[frozenset[int]]:
    """Rows with each head of a step whose student's head is frozen."""
    frozen = replace(case.student.head, weight=case.student.head.weight.detach())
    objective.configure(case.student_space, case.teacher_space)
    objective.double()
    with _Products() as found:
        objective(replace(case.student, head=frozen), case.teacher, alignment).loss.backward()
    return found.rows


def test_products_of_alm_whose_backward_pass_makes_logits_again() -> None:
    case, objective = make_case((("bpe", 400), ("sentencepiece", 420)), (16, 24)), dl.ALMObjective()
    rows = _products(case, objective, case.alignment)
    student = 2 + objective.further_head_products()[0]
    assert rows[frozenset(case.student_space.head.weight.shape)] == student * len(case.student)


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        (dl.DSKDObjective, True),
        (dl.DSKDv2Objective, True),
        (dl.DSKDTokenAlignmentObjective, False),
        (lambda: dl.DSKDTokenAlignmentObjective(projector_learns="distribution"), False),
    ],
)
def test_products_with_the_heads_are_those_that_are_computed(kind: Any, same: bool) -> None:
    case = make_case((("bpe", 400), ("bpe", 400) if same else ("sentencepiece", 420)), (16, 24))
    objective = kind()
    rows = _products(case, objective, None if same else case.alignment)
    tokens = len(case.student)
    pairs = tokens if same else len(case.alignment.pairs)
    further = objective.further_head_products()
    # Of a position without a partner its own logits, an empty projection's, and their gradients.
    student = 4 * tokens + further[0] * pairs
    assert rows[frozenset(case.student_space.head.weight.shape)] == student
    assert rows[frozenset(case.teacher_space.head.weight.shape)] == (3 + further[1]) * pairs
