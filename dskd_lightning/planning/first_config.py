"""`dskd init`: a config to begin with, from a teacher, a student and data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example
from dskd_lightning.data.preparation import PreparationSettings
from dskd_lightning.data.reading import read_examples
from dskd_lightning.data.sources import resolve_sources
from dskd_lightning.data.urls import masked
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import LoraSpec, StudentSpec, TeacherSpec
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.planning.calculator import DataSize, Estimate, Layout, Losses, ModelSize, estimate
from dskd_lightning.planning.machine import Machine
from dskd_lightning.planning.sizes import model_size
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.vocab.analysis import analyze_vocabularies
from dskd_lightning.vocab.recommendation import recommend

__all__ = ["Plan", "plan"]

_READ = 2000  # examples that are looked at
_COMPARED = 200
_ROOM = 0.8  # of the free memory
_TOGETHER = 16  # sequences of an optimiser step
_EPOCHS = 3
_SPLIT = 0.05
_FEWEST_HELD_OUT = 8


@dataclass(frozen=True)
class Plan:
    """A config and what it is expected to take.

    Args:
        text: of the YAML file, with comments that say why.
        estimate: of what it takes.
        machine: that was looked at.
        fits: False where even the smallest settings need more memory than there is.
        identical: whether both models read the same ids.
        objective: the class that `recommend` names.
        examples: how many were looked at, which may not be all.
        ratio: the teacher's parameters over the student's.
    """

    text: str
    estimate: Estimate
    machine: Machine
    fits: bool
    identical: bool
    objective: str
    examples: int
    ratio: float

    @property
    def seconds(self) -> float:
        """That training takes on the machine."""
        return _seconds(self.estimate, self.machine)


@dataclass(frozen=True)
class _Choice:
    student: StudentSpec
    teacher: TeacherSpec
    batch: int
    found: Estimate


def plan(teacher: str, student: str, data: str, output: str, machine: Machine | None = None) -> Plan:
    """Look at tokenizers, sizes, data and machine, and choose objective, precision and batch sizes.

    Args:
        teacher: as `ModelSpec.source`.
        student: likewise.
        data: files or Hub datasets for training.
        output: the run folder that the config names.
        machine: to plan for; None measures this one.

    Raises:
        UserError: a model or the data can't be read.
    """
    machine = machine or Machine.measure()
    student_spec = StudentSpec(source=student, dtype="float32")
    teacher_spec = TeacherSpec(source=teacher, dtype="float32" if machine.prefers_32_bits else "bfloat16")
    examples = list(read_examples(resolve_sources(data), PreparationSettings(limit=_READ), Counter()))
    if not examples:
        raise UserError(f"{masked(data)}: has no example to train on; give a file with some.")
    tokenizers = [load_tokenizer(spec) for spec in (student_spec, teacher_spec)]
    for spec, tokenizer in ((student_spec, tokenizers[0]), (teacher_spec, tokenizers[1])):
        if tokenizer.chat_template is None:
            spec.prompt_template = "{prompt}\n\n"
    renderers = [
        ChatRenderer.from_spec(tokenizer, spec)
        for tokenizer, spec in zip(tokenizers, (student_spec, teacher_spec), strict=True)
    ]
    read = [[_lengths(renderer, example) for renderer in renderers] for example in examples]
    lengths = sorted(max(whole for whole, _ in pair) for pair in read)
    longest = _rounded(lengths[int(0.98 * (len(lengths) - 1))])
    texts = [example.response or "" for example in examples[:_COMPARED]]
    report = analyze_vocabularies(tokenizers[1], tokenizers[0], texts)
    advice = recommend(report)
    sizes = {
        "sequences": len(examples),
        "tokens": sum(min(n, longest) for n in lengths),
        "responses": sum(min(pair[0][1], longest) for pair in read),
        "longest": longest,
    }
    chosen, fits = _choose(student_spec, teacher_spec, machine, sizes)
    text = _written(chosen, advice, data, output, sizes, len(lengths) < _READ, machine, fits)
    parameters = [model_size(spec).parameters for spec in (chosen.teacher, chosen.student)]
    ratio = parameters[0] / parameters[1]
    return Plan(text, chosen.found, machine, fits, report.identical, advice.class_path, len(examples), ratio)


def _lengths(renderer: ChatRenderer, example: Example) -> tuple[int, int]:
    """Tokens of the whole, and of the responses."""
    turns = renderer.render(example).turns
    responses = sum(len(turn.response_ids) for turn in turns)
    return responses + sum(len(turn.prompt_ids) for turn in turns), responses


def _seconds(found: Estimate, machine: Machine) -> float:
    return found.seconds(machine.speed(not machine.prefers_32_bits))


def _rounded(length: int) -> int:
    return max(64, -(-length // 64) * 64)


def _choose(
    student: StudentSpec, teacher: TeacherSpec, machine: Machine, data: dict[str, int]
) -> tuple[_Choice, bool]:
    """The first of ever thriftier settings that fits; the last where none does."""
    lora = LoraSpec(rank=32, alpha=64)
    ways = [
        (student, teacher),
        (replace(student, lora=lora), teacher),
        (replace(student, lora=lora, gradient_checkpointing=True), teacher),
    ]
    if machine.cuda:
        thrifty = replace(student, lora=lora, gradient_checkpointing=True, dtype="bfloat16")
        ways.append((thrifty, replace(teacher, quantization="4bit")))
    choice: _Choice | None = None
    for student_spec, teacher_spec in ways:
        models = model_size(student_spec), model_size(teacher_spec)
        for batch in (8, 4, 2, 1):
            found = _estimated(models, machine, batch, student_spec, data)
            choice = _Choice(student_spec, teacher_spec, batch, found)
            if found.bytes + models[1].parameters * models[1].weight_bytes < _ROOM * machine.memory:
                return choice, True
    assert choice is not None
    return choice, False


def _estimated(
    models: tuple[ModelSize, ModelSize], machine: Machine, batch: int, spec: StudentSpec, data: dict[str, int]
) -> Estimate:
    count, longest = data["sequences"], data["longest"]
    read = DataSize(
        examples=count,
        tokens=data["tokens"],
        responses=data["responses"],
        padded=data["tokens"],
        batches=-(-count // batch),
        largest=batch * longest,
        epochs=_EPOCHS,
    )
    layout = Layout(
        mixed=not machine.prefers_32_bits,
        checkpointing=spec.gradient_checkpointing,
        cached=True,
        accumulate=_TOGETHER // batch,
        cuda=machine.cuda,
    )
    projectors = 2 * models[0].hidden * models[1].hidden
    return estimate(models[0], models[1:], read, Losses(projectors=projectors), layout)


def _written(
    choice: _Choice,
    advice: Any,
    data: str,
    output: str,
    sizes: dict[str, int],
    whole: bool,
    machine: Machine,
    fits: bool,
) -> str:
    student, found = choice.student, choice.found
    count = sizes["sequences"]
    held_out = (
        f"{_SPLIT}" if count * _SPLIT >= _FEWEST_HELD_OUT else str(min(_FEWEST_HELD_OUT, max(1, count // 5)))
    )
    rate = "2.0e-4" if student.lora else "5.0e-5" if model_size(student).parameters > 3e8 else "2.0e-4"
    lines = [
        "# Written by `dskd init`. Check it: dskd doctor FILE. Run it: dskd fit --config FILE",
        f"# About {found.bytes / 2**30:.1f} GiB of {machine.memory / 2**30:.1f} free"
        f" and {duration(_seconds(found, machine))} on {machine.name}, by rules of thumb"
        + (":" if not fits else "."),
        *(["# MORE THAN THERE IS. Take a smaller pair or another machine."] if not fits else []),
        *([] if whole else [f"# Time and steps are of the first {_READ} examples alone; there are more."]),
        "seed_everything: 42",
        f"output: {_scalar(output)}",
        "model:",
        "  teacher:",
        f"    source: {_scalar(choice.teacher.source)}",
        f"    dtype: {choice.teacher.dtype}",
    ]
    if choice.teacher.quantization:
        lines.append(f"    quantization: {choice.teacher.quantization}          # it would not fit otherwise")
    lines += _template(choice.teacher.prompt_template)
    lines += ["  student:", f"    source: {_scalar(student.source)}", f"    dtype: {student.dtype}"]
    lines += _template(student.prompt_template)
    if student.lora is not None:
        lines += [
            "    lora:                       # training all weights would not fit",
            f"      rank: {student.lora.rank}",
            f"      alpha: {student.lora.alpha}",
        ]
    if student.gradient_checkpointing:
        lines.append("    gradient_checkpointing: true  # less memory, a third more time")
    lines += [
        "  objective:                    # " + advice.reason,
        f"    class_path: {advice.class_path}",
        "  optimizer:",
        "    class_path: torch.optim.AdamW",
        "    init_args:",
        f"      lr: {rate}                # the setting most worth a grid: see `dskd study`",
        "data:",
        f"  train: {_scalar(data)}",
        f"  val_split: {held_out}",
        f"  test_split: {held_out}",
        f"  max_length: {sizes['longest']}               # 98 % of the examples are shorter",
        f"  max_prompt_length: {sizes['longest'] // 2}",
        f"  batch_size: {choice.batch}",
        "  teacher_cache: {}             # the teacher reads each example once, not once per epoch",
        "trainer:",
        f"  max_epochs: {_EPOCHS}",
        f"  accumulate_grad_batches: {_TOGETHER // choice.batch}    # {_TOGETHER} sequences a step",
        "  precision: 32-true             # bfloat16 is slower on this processor"
        if machine.prefers_32_bits
        else "  precision: bf16-mixed",
        "  gradient_clip_val: 1.0",
    ]
    return "\n".join(lines) + "\n"


def _template(template: str | None) -> list[str]:
    if template is None:
        return []
    return [f"    prompt_template: {json.dumps(template)}  # the tokenizer has no chat template"]


def _scalar(text: str) -> str:
    """``text`` as YAML reads it back, on one line."""
    dumped = yaml.safe_dump(text, default_flow_style=True, width=10**6, allow_unicode=True)
    return dumped.partition("\n")[0].removesuffix("...").strip()
