"""Representation and alignment analysis after a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L

from dskd_lightning.alignment.exact import group_overlap
from dskd_lightning.callbacks.tested_model import tested_model
from dskd_lightning.data.loader import DistillationLoader
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.analysis import projector_spectra, representation_distances, token_maps
from dskd_lightning.files import write_object
from dskd_lightning.models.absent import AbsentTeacher
from dskd_lightning.models.spec import StudentSpec
from dskd_lightning.runs.identity import MODEL_KEY
from dskd_lightning.structures import DistillationBatch

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["RepresentationAnalysis"]


class RepresentationAnalysis(L.Callback):
    """Writes ``OUTPUT/representation.json`` and ``OUTPUT/alignments/*.json`` in `test`.

    Structure distances of student and teacher (Figure 4 of arXiv 2406.17328), CKA and singular
    values of the projectors; across tokenizers a few examples' alignment, with cross-model
    attention where the objective has it. Of several ranks each reads the same batches, those of one rank.

    Args:
        output: the run folder.
        batches: test batches to read; 0 turns the analysis off.
        before: measure the distances of the student before training as well, which builds it again.
        maps: examples whose alignment is written.
    """

    def __init__(self, output: str | Path, batches: int = 4, before: bool = False, maps: int = 2) -> None:
        self.output = Path(output)
        self.batches = batches
        self.before = before
        self.maps = maps

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast("DistillationModule", pl_module)
        if not self.batches or not len(module.teachers):
            return
        if isinstance(module.teachers[0], AbsentTeacher):  # without hidden states
            return
        values, maps = module.as_step(lambda: self._measure(trainer, module))
        for name, value in values["after"].items():
            pl_module.log(f"test/{name}", value, batch_size=1)
        model = tested_model(self.output, trainer, module)
        result = {**values, "projectors": projector_spectra(module), MODEL_KEY: model}
        if trainer.is_global_zero:
            self._write(result, maps)

    def _measure(
        self, trainer: L.Trainer, module: DistillationModule
    ) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
        values = {"after": representation_distances(module, self._read(trainer, module))}
        if self.before:
            values["before"] = self._untrained(trainer, module)
        return values, self._maps(trainer, module)

    def _write(self, result: dict[str, Any], maps: list[dict[str, Any]]) -> None:
        write_object(self.output / "representation.json", result)
        for stale in (self.output / "alignments").glob("*.json"):  # an earlier test may have drawn more
            stale.unlink()
        for number, value in enumerate(maps, 1):
            write_object(self.output / "alignments" / f"{number}.json", value, indent=None)

    def _read(self, trainer: L.Trainer, module: DistillationModule) -> Iterator[DistillationBatch]:
        loader = cast("Any", trainer).datamodule.test_dataloader()
        if isinstance(loader, DistillationLoader):
            loader.rank, loader.ranks = 0, 1
        for batch in itertools.islice(loader, self.batches):
            yield batch.to(module.device)

    def _untrained(self, trainer: L.Trainer, module: DistillationModule) -> dict[str, float]:
        if not isinstance(module.student_spec, StudentSpec):
            raise UserError(
                "analysis.before: a student in memory was trained in place and can't be read as it was; set "
                "it to false, or give a StudentSpec."
            )
        trained = module.student
        try:
            untrained: Any = module.student_spec.build()[0]
            module.student = untrained.to(module.device).eval()
            return representation_distances(module, self._read(trainer, module))
        finally:
            module.student = trained

    def _maps(self, trainer: L.Trainer, module: DistillationModule) -> list[dict[str, Any]]:
        tokenizer = cast("Any", trainer).datamodule.teacher_tokenizers[0]
        values = []
        batches = self._read(trainer, module)
        found = itertools.chain.from_iterable(token_maps(module, batch, tokenizer) for batch in batches)
        for number, example in enumerate(itertools.islice(found, self.maps), 1):
            kind = "byte-exact groups" if example.attention is None else "cross-model attention"
            weights = group_overlap(example.groups) if example.attention is None else example.attention
            values.append(
                {
                    "title": f"{kind}, test response {number}",
                    "student": example.student,
                    "teacher": example.teacher,
                    "weights": [[round(float(w), 4) for w in row] for row in weights],
                }
            )
        return values
