"""`dskd doctor`: everything that a run needs, looked at before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.launch.configs import config_path
from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.planning.estimate import Estimate, estimate
from dskd_lightning.planning.machine import Machine, free_disk
from dskd_lightning.planning.sizes import ModelSize, model_size
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.training.processor import FLOAT32_CONFIG
from dskd_lightning.vocab.analysis import analyze_vocabularies
from dskd_lightning.vocab.recommendation import recommend

__all__ = ["Finding", "examine"]

_TIGHT = 0.85
_SPARE_DISK = 2e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: ``failed`` keeps the run from starting, ``look`` may be meant.
        what: it is about.
        text: what was found, and the remedy.
    """

    state: Literal["ok", "look", "failed"]
    what: str
    text: str


def examine(config: Sequence[str]) -> Iterator[Finding]:
    """Findings one after the other, as they are made; nothing is trained and no weight is loaded.

    Args:
        config: YAML files or ``dskd:NAME``, later ones over earlier ones.
    """
    arguments = [f"--config={config_path(file)}" for file in config]
    try:
        run = DistillationCLI(run=False, args=[*arguments, "--trainer.logger=false"])
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
    yield from _budget(run, known)


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
    free = free_disk(output)
    checkpoints = os.path.join(output, "checkpoints")
    if os.path.isdir(checkpoints) and any(n.endswith(".ckpt") for n in os.listdir(checkpoints)):
        yield Finding("look", "output", f"{output} holds a run: `--ckpt_path last` resumes it.")
    state: Literal["ok", "look"] = "ok" if free > _SPARE_DISK else "look"
    yield Finding(state, "disk", f"{free / 1e9:,.1f} GB free for {output}")


def _budget(run: DistillationCLI, sizes: Sequence[ModelSize]) -> Iterator[Finding]:
    mixed = "16" in str(run.trainer.precision)
    short = mixed or sizes[0].weight_bytes == 2
    machine = Machine.measure("cpu" if run.trainer.strategy.root_device.type == "cpu" else "auto")
    found = estimate_run(run, sizes, machine, mixed)
    parts = ", ".join(f"{cause} {size / 2**30:.1f}" for cause, size in found.memory.items() if size > 2**27)
    text = f"about {found.bytes / 2**30:.1f} GiB of {machine.memory / 2**30:.1f} free ({parts})"
    if found.bytes > machine.memory:
        remedy = "lower `data.batch_size`, train `model.student.lora`, or quantise the teacher"
        yield Finding("failed", "memory", f"{text}: {remedy}.")
    else:
        yield Finding("ok" if found.bytes < _TIGHT * machine.memory else "look", "memory", text)
    text = f"about {duration(found.seconds)} for {found.steps:,} steps"
    yield Finding(
        "ok", "time", f"{text} on {machine.name} ({machine.speed(short) / 1e9:,.0f} GFLOP/s measured)"
    )
    if short and machine.prefers_32_bits:
        text = f"float32 is {machine.flops / machine.flops16:.1f} times as fast here"
        remedy = f"lay `--config {FLOAT32_CONFIG}` over yours"
        yield Finding("look", "precision", f"{text}: {remedy}.")


def estimate_run(run: DistillationCLI, sizes: Sequence[ModelSize], machine: Machine, mixed: bool) -> Estimate:
    """The estimate of a parsed run whose data are prepared."""
    data, view = run.datamodule, run.datamodule.examples("train")
    lengths = view.dataset.lengths[data.first_epoch(), 0]
    steps, epochs = run.trainer.max_steps, run.trainer.max_epochs or 1
    per_epoch = max(1, len(lengths) // (data.batch_size * run.trainer.accumulate_grad_batches))
    passes = steps / per_epoch if steps > 0 else float(max(epochs, 1))  # -1 goes on for ever
    budgets = [getattr(o, "memory_budget_mb", DEFAULT_BUDGET_MB) for o in run.model.objectives]
    return estimate(
        sizes[0],
        sizes[1:],
        machine,
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        batch=data.batch_size,
        longest=int(lengths.max()),
        accumulate=run.trainer.accumulate_grad_batches,
        epochs=passes,
        mixed=mixed,
        checkpointing=run.model.student_spec.gradient_checkpointing,
        cached=data.teacher_cache is not None,
        budget=max(budgets) * 2**20,
    )
