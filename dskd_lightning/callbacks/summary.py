"""A table of what is trained and what is frozen, and how much memory the weights take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from dskd_lightning.models.absent import AbsentTeacher
from dskd_lightning.models.parameters import ParameterCount, parameter_report

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["DistillationSummary"]


class DistillationSummary(L.Callback):
    """Prints parameters and memory of teachers, student, adapter and projectors before training."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Console().print(self.table(pl_module))  # type: ignore[arg-type]

    @staticmethod
    def table(module: DistillationModule) -> Table:
        """One row per part: parameters, trainable ones, MiB of weights."""
        table = Table(title="Models", title_justify="left")
        table.add_column("part")
        for column in ("parameters", "trainable", "MiB"):
            table.add_column(column, justify="right")
        parts: list[tuple[str, nn.Module]] = []
        parts += [(f"teacher {i}" if i else "teacher", t) for i, t in enumerate(module.teachers)]
        parts.append(("student", module.student))
        for name, part in parts:
            _add_rows(table, name, part)
        if any(True for _ in module.objectives.parameters()):
            parameters = list(module.objectives.parameters())
            table.add_row(
                "projectors",
                f"{sum(p.numel() for p in parameters):,}",
                f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
                f"{sum(p.numel() * p.element_size() for p in parameters) / 2**20:,.1f}",
            )
        return table


def _add_rows(table: Table, name: str, model: nn.Module) -> None:
    if isinstance(model, AbsentTeacher):
        table.add_row(f"{name} (log-probabilities)", "0", "0", "0.0", style="bold")
        return
    report = parameter_report(model)  # type: ignore[arg-type]
    table.add_row(name, *_cells(report["total"]), style="bold")
    for part, count in report.items():
        if count.total and part != "total":
            table.add_row(f"  {part}", *_cells(count))


def _cells(count: ParameterCount) -> tuple[str, str, str]:
    return f"{count.total:,}", f"{count.trainable:,}", f"{count.bytes / 2**20:,.1f}"
