"""The teacher in the student's place: the same test, on the same prompts, of the model that was distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import ModelSpec, StudentSpec, TeacherSpec
from dskd_lightning.module import DistillationModule
from dskd_lightning.objectives import SFTObjective
from dskd_lightning.runs.run_folder import TEACHER

if TYPE_CHECKING:
    from dskd_lightning.models.layer_choice import Calibration

__all__ = ["EvaluatedTeacher", "evaluate_teacher", "without_model_choice"]


@dataclass
class EvaluatedTeacher(StudentSpec):
    """A teacher that is tested as a student would be, with its adapter and quantisation. It never trains.

    Args:
        teacher: what it is.
    """

    teacher: TeacherSpec | None = None

    @property
    def system(self) -> str | None:
        """The teacher's own system message."""
        return self.teacher.system if self.teacher is not None else None

    def build(self, calibration: Calibration | None = None) -> tuple[Any, Any]:
        """The teacher and its tokenizer."""
        assert self.teacher is not None
        return self.teacher.build()


def without_model_choice(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The command line without ``--model teacher``, and whether that was there."""
    rest: list[str] = []
    asked = False
    words = iter(arguments)
    for word in words:
        if word == "--model":
            value = next(words, None)
            if value == TEACHER:
                asked = True
            else:
                rest += [word] if value is None else [word, value]
        elif word == f"--model={TEACHER}":
            asked = True
        else:
            rest.append(word)
    return rest, asked


def evaluate_teacher(module: DistillationModule, datamodule: Any) -> None:
    """Put the only teacher into the student's place, before models are loaded and data prepared.

    Raises:
        UserError: there is none, or several, or its weights aren't here.
    """
    specs = module.teacher_specs
    if len(specs) != 1:
        raise UserError(
            f"--model teacher: the config names {len(specs) or 'no'} teachers; name one as "
            "`model.teacher` to evaluate it."
        )
    (spec,) = specs
    if not isinstance(spec, TeacherSpec) or spec.absent:
        raise UserError(
            f"--model teacher: of '{spec.source}' only log-probabilities are known: it can't answer prompts."
        )
    if not isinstance(datamodule, InstructionDataModule):
        raise UserError("--model teacher: works with `InstructionDataModule` and its subclasses alone.")
    common = {field.name: getattr(spec, field.name) for field in fields(ModelSpec)}
    stand_in = EvaluatedTeacher(**common, teacher=spec)
    module.student_spec, module.teacher_specs = stand_in, []
    module.objectives = nn.ModuleList([SFTObjective()])
    module.on_policy, module.weights_from = None, None
    datamodule.student, datamodule.teachers, datamodule.teacher_names = stand_in, [], []
