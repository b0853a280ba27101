"""Rows of an ordinary ``DataLoader`` into aligned batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dskd_lightning.data.chat import ChatRenderer, Learn
from dskd_lightning.data.collate import collate
from dskd_lightning.data.examples import Example
from dskd_lightning.data.formats import Format, detect_format, parse_record
from dskd_lightning.data.prepared import rendered_example
from dskd_lightning.data.rendering import PreparationSettings, render_examples
from dskd_lightning.errors import UserError
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import ModelSpec, teacher_names
from dskd_lightning.models.tokenizer import load_tokenizer, pad_token_id
from dskd_lightning.structures import DistillationBatch

__all__ = ["DistillationCollator"]


class DistillationCollator:
    """Turns records into the batch that `DistillationModule` trains on: ``DataLoader(collate_fn=...)``.

    Args:
        student: the student: `Loaded` or its spec.
        teacher: the teacher, several, or None to fine-tune alone; the same ones as the module's.
        format: of the records, or ``auto``; a record is what a line of a data file holds, such as
            ``{"messages": [{"role": ..., "content": ...}, ...]}``.
        system: system message for examples without one.
        max_length: most tokens of prompt and response; a longer response is cut.
        max_prompt_length: most tokens of the prompt; a longer one loses its beginning.
        max_teacher_prompt_length: likewise for teachers, whose sequences may be longer by as much; None
            for ``max_prompt_length``.
        special_tokens_in_text: read special tokens' strings inside messages as those tokens.
        learn: which texts of a conversation are learnt, as `InstructionDataModule` takes it.
        pad_to_multiple_of: round row lengths up to a multiple of this.

    Attributes:
        report: how many rows were ``read``, ``used`` and cut so far, in this process.
    """

    def __init__(
        self,
        student: Loaded | ModelSpec,
        teacher: Loaded | ModelSpec | Sequence[Loaded | ModelSpec] | None = None,
        *,
        format: Format = "auto",
        system: str | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
        special_tokens_in_text: bool = False,
        learn: Learn = "assistant",
        pad_to_multiple_of: int = 1,
        max_teacher_prompt_length: int | None = None,
    ) -> None:
        teachers = (
            [] if teacher is None else [teacher] if isinstance(teacher, Loaded | ModelSpec) else teacher
        )
        self.renderers = [
            ChatRenderer.from_spec(load_tokenizer(model), model, special_tokens_in_text, learn)
            for model in (student, *teachers)
        ]
        self.teacher_names = teacher_names(teachers)
        self.settings = PreparationSettings(
            format, max_length, max_prompt_length, system,
            max_teacher_prompt_length=max_teacher_prompt_length,
            teachers=tuple(name for name in self.teacher_names if name),
        )  # fmt: skip
        self.pad_to_multiple_of = pad_to_multiple_of
        self.report: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Mapping[str, Any] | Example]) -> DistillationBatch:
        """The batch of ``rows``; `DistillationBatch.examples` counts them from 0, and names a document
        that fills several windows as many times.

        Raises:
            UserError: a row isn't a record with a response, or none of them leaves room for one.
        """
        models: list[list[list[Any]]] = [[] for _ in self.renderers]
        kept, examples = [], list[Example]()
        for number, row in enumerate(rows):
            self.report["read"] += 1
            examples.append(self._example(row, number))
        for number, _, found in render_examples(examples, self.renderers, self.settings, self.report):
            kept.append(number)
            for side, tokens in zip(models, found, strict=True):
                side.append([rendered_example(tokens)])
        self.report["used"] += len(set(kept))
        if not kept:
            raise UserError(
                f"None of the batch's {len(rows)} rows leaves room for its response: raise `max_length`."
            )
        student, *teachers = self.renderers
        named = {example.teacher for example in examples}
        if len(named) > 1:
            raise UserError(
                f"The batch's rows name different teachers ({', '.join(sorted(map(repr, named)))}): batch "
                "rows of one `teacher` together (InstructionDataModule does)."
            )
        name = named.pop()
        only = self.teacher_names.index(name) if name else None
        return collate(
            models,
            [pad_token_id(renderer.tokenizer) for renderer in self.renderers],
            [renderer.fingerprint == student.fingerprint for renderer in teachers],
            kept,
            pad_to_multiple_of=self.pad_to_multiple_of,
            teacher=only,
            tokenizers=tuple(renderer.tokenizer_fingerprint for renderer in self.renderers),
        )

    def _example(self, row: Mapping[str, Any] | Example, number: int) -> Example:
        if isinstance(row, Example):
            return row.with_system(self.settings.system)
        place = "batch"
        record = dict(row) if isinstance(row, Mapping) else row
        format = self.settings.format
        if format == "auto":
            format = detect_format(record, place) if isinstance(record, dict) else "messages"
        unused: Counter[str] = Counter()
        example = parse_record(record, format, place, number, unused=unused, teachers=self.settings.teachers)
        for field, count in unused.items():
            self.report[f"unused field '{field}'"] += count
        return example.with_system(self.settings.system)
