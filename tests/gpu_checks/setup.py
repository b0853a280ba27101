"""Tiny models, data and trainers that the checks share."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conftest import make_model, make_tokenizer

import dskd_lightning as dl
from dskd_lightning.models.teacher_cache_settings import TeacherCacheSettings


class FromDistribution(dl.DSKDTokenAlignmentObjective):
    """Token alignment whose projector learns the teacher's distribution."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(projector_learns="distribution", **settings)


OBJECTIVES: dict[str, tuple[type[dl.Objective], bool]] = {
    "DSKD": (dl.DSKDObjective, True),
    "DSKD v2": (dl.DSKDv2Objective, True),
    "ETA": (dl.DSKDTokenAlignmentObjective, False),
    "ETA distribution": (FromDistribution, False),
    "CMA": (dl.DSKDCrossAttentionObjective, False),
    "GOLD": (dl.GOLDObjective, False),
    "ALM": (dl.ALMObjective, False),
    "ULD": (dl.ULDObjective, False),
    "MinEdit": (dl.MinEditObjective, False),
    "X-Token P": (dl.XTokenProjectionObjective, False),
    "X-Token H": (dl.XTokenHybridObjective, False),
    "shared vocabulary": (dl.SharedVocabularyObjective, False),
    "logits": (dl.LogitKDObjective, True),
    "top k": (dl.TopKObjective, True),
    "SFT": (dl.SFTObjective, True),
}
"""Each objective, and whether it needs both models to read the same tokens."""


class Setup:
    """What a check runs on.

    Args:
        device: ``cuda``, ``cpu`` or ``pretended``, a GPU that isn't there; sizes are small on the last two.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device("cpu" if device == "cpu" else "cuda")
        self.small = device != "cuda"
        self.pretended = device == "pretended"
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.source = cache(self._source)

    def _source(self, tokenizer: str, hidden: int, seed: int) -> str:
        torch.manual_seed(seed)
        folder = self.folder / f"{tokenizer}-{hidden}-{seed}"
        fast = make_tokenizer(tokenizer, 400 if tokenizer == "bpe" else 420)
        fast.save_pretrained(folder)
        make_model(len(fast), hidden, 1 if self.small else 2).save_pretrained(folder)
        return str(folder)

    @cached_property
    def data(self) -> str:
        """An instruction file whose responses have different lengths."""
        rows = [
            {"prompt": f"Say the number {i}, café 🙂", "response": f"number {i} " * (1 + i % 5)}
            for i in range(20)
        ]
        path = self.folder / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    def run(
        self,
        objective: str = "DSKD",
        *,
        cached: bool = False,
        cache: str | None = None,
        lora: bool = False,
        student: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        optimizer: Any = None,
        **data: Any,
    ) -> tuple[dl.DistillationModule, dl.InstructionDataModule]:
        """A seeded module and its data; nothing of them is built yet.

        Args:
            objective: one of `OBJECTIVES`.
            cached: read the teacher's states from a cache.
            cache: its folder; None builds one for this run alone.
            lora: train adapters.
            student: more of its spec.
            teacher: more of its spec.
            optimizer: made of the parameters; plain gradient descent unless told.
            data: more of the data module's arguments.
        """
        kind, same = OBJECTIVES[objective]
        L.seed_everything(0, verbose=False)
        adapters = {"lora": dl.LoraSpec(rank=2) if lora else None}
        ours = dl.StudentSpec(self.source("bpe", 16, 1), **{**adapters, **(student or {})})
        theirs = None
        if kind.needs_teacher:
            tokenizer = "bpe" if same else "sentencepiece"
            theirs = dl.TeacherSpec(self.source(tokenizer, 24, 2), **(teacher or {}))
        settings = TeacherCacheSettings(folder=cache or tempfile.mkdtemp(dir=self.folder), dtype="float32")
        module = dl.DistillationModule(
            ours, kind(), theirs, optimizer or (lambda p: torch.optim.SGD(p, lr=0.05))
        )
        datamodule = dl.InstructionDataModule(
            self.data, predict=self.data, student=ours, teacher=theirs, val_split=4, test_split=4,
            teacher_cache=settings if cached and theirs else None, cache_dir=str(self.folder / "cache"),
            **{"batch_size": 4, "max_length": 96, "max_prompt_length": 48, **data},
        )  # fmt: skip
        return module, datamodule

    def trainer(self, **options: Any) -> L.Trainer:
        """A silent trainer on the device."""
        return L.Trainer(
            **{
                "accelerator": "cpu" if self.device.type == "cpu" else "gpu", "devices": 1, "logger": False,
                "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
                "max_steps": 2 if self.small else 3, "num_sanity_val_steps": 0, **options,
            }
        )  # fmt: skip


def finite(values: dict[str, Any]) -> dict[str, float]:
    """The metrics as numbers.

    Raises:
        AssertionError: one isn't finite.
    """
    found = {name: float(value) for name, value in values.items()}
    bad = [name for name, value in found.items() if not torch.isfinite(torch.tensor(value))]
    assert found, "no metrics"
    assert not bad, f"not finite: {bad}"
    return found
