"""The prompts of a stage, as generation takes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.predict import PromptRecord

if TYPE_CHECKING:
    from dskd_lightning.data.datamodule import InstructionDataModule, Stage

__all__ = ["prompt_records"]


def prompt_records(
    datamodule: InstructionDataModule,
    stage: Stage,
    limit: int | None = None,
    teacher: int | None = None,
    max_length: int | None = None,
) -> list[PromptRecord]:
    """Prompt text, token ids and references of the examples of ``stage``.

    Args:
        datamodule: holds the examples and the tokenizers.
        stage: whose examples.
        limit: only the first so many.
        teacher: render for this teacher instead of the student.
        max_length: most tokens of prompt and response, where generation allows fewer than training.

    Raises:
        UserError: it is another kind of data module, or none.
    """
    if not hasattr(datamodule, "examples"):
        raise UserError(
            "Prompts to generate for are read from an InstructionDataModule or a subclass of it: give the "
            "Trainer one, or set validation.prompts to 0, and responses.enabled to false."
        )
    model = 0 if teacher is None else teacher + 1
    view = datamodule.all_examples(stage)
    records = []
    for index in range(len(view) if limit is None else min(limit, len(view))):
        example = view[index]
        records.append(
            PromptRecord(
                index=index,
                prompt=example.prompt[-1].content if example.prompt else "",
                ids=datamodule.generation_prompt(example, model, max_length),
                references=example.references,
                fields=json.loads(example.fields) if example.fields else {},
            )
        )
    return records
