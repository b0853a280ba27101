"""`dskd doctor`: everything that a run needs, looked at before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.launch.configs import config_path
from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.planning.budget import budget, calculate
from dskd_lightning.planning.calculator import ModelSize
from dskd_lightning.planning.finding import Finding
from dskd_lightning.planning.sizes import model_size
from dskd_lightning.planning.target import Target
from dskd_lightning.vocab.analysis import analyze_vocabularies
from dskd_lightning.vocab.recommendation import recommend

__all__ = ["Finding", "examine"]


def examine(config: Sequence[str], target: Target | None = None) -> Iterator[Finding]:
    """Findings one after the other, as they are made; nothing is trained and no weight is loaded.

    Args:
        config: YAML files or ``dskd:NAME``, later ones over earlier ones.
        target: devices and data to plan for instead of those that are here.
    """
    target = target or Target()
    arguments = [f"--config={config_path(file)}" for file in config]
    try:
        run = DistillationCLI(run=False, args=[*arguments, "--trainer.logger=false", *target.trainer])
    except UserError as error:
        yield Finding("failed", "config", str(error))
        return
    yield Finding("ok", "config", ", ".join(config))
    sizes: list[ModelSize | None] = []
    for name, spec in [
        ("student", run.model.student_spec),
        *(("teacher", s) for s in run.model.teacher_specs),
    ]:
        finding, size = _caught(name, lambda spec=spec: model_size(spec))  # type: ignore[misc]
        text = "" if size is None else f"{spec.source}: {size.parameters / 1e6:,.1f} M parameters"
        if size is not None and name == "student":
            text += f", {size.trained / 1e6:,.1f} M of them trained"
        yield finding or Finding("ok", name, text)
        sizes.append(size)
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return  # what follows reads their tokenizers
    finding, _ = _caught("data", lambda: run.datamodule.setup("fit"))
    if finding is not None:
        yield finding
        return
    yield from _data(run.datamodule)
    yield from _objectives(run)
    yield from _place(run)
    finding, calculated = _caught("memory", lambda: calculate(run, known, target))
    if finding is not None:
        yield finding
        return
    yield from budget(run, *calculated)


def _caught(what: str, action: Callable[[], Any]) -> tuple[Finding | None, Any]:
    try:
        return None, action()
    except UserError as error:
        return Finding("failed", what, str(error)), None


def _data(data: InstructionDataModule) -> Iterator[Finding]:
    for stage, report in data.report.items():
        lost = ", ".join(
            f"{k}: {v}" for k, v in report.items() if v and k not in ("read", "used", "examples")
        )
        text = f"{report['examples']:,} examples"
        if stage == "train" and data.rolling is not None:
            text += f" in the first of {len(data.rolling.job.sources):,} files"
        yield Finding("look" if lost else "ok", f"data.{stage}", f"{text}; {lost}" if lost else text)
    if "val" not in data.report:
        yield Finding("look", "data.val", "no validation: best.ckpt is chosen by it; set `data.val_split`.")


def _objectives(run: DistillationCLI) -> Iterator[Finding]:
    student = load_tokenizer(run.model.student_spec)
    view = run.datamodule.examples("train")
    texts = [view[index].response or "" for index in range(min(200, len(view)))]
    for spec, objective in zip(run.model.teacher_specs, run.model.objectives, strict=False):
        name = type(objective).__name__
        report = analyze_vocabularies(load_tokenizer(spec), student, texts)
        chosen = recommend(report)
        advice = chosen.class_path.rpartition(".")[2]
        if not objective.needs_teacher:
            yield Finding("look", "objective", f"{name} asks no teacher; drop `model.teacher`.")
        elif not report.identical and not isinstance(objective, CrossTokenizerObjective):
            text = (
                f"{name} compares models of one vocabulary, and these differ; take {advice}: {chosen.reason}."
            )
            yield Finding("failed", "objective", text)
        else:
            same = "the same token ids" if report.identical else chosen.reason
            yield Finding("ok", "objective", f"{name}; {same}" + ("" if report.identical else f" ({advice})"))


def _place(run: DistillationCLI) -> Iterator[Finding]:
    output = run.config.output
    checkpoints = os.path.join(output, "checkpoints")
    if os.path.isdir(checkpoints) and any(n.endswith(".ckpt") for n in os.listdir(checkpoints)):
        yield Finding("look", "output", f"{output} holds a run: `--ckpt_path last` resumes it.")
