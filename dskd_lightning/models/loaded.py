"""A model that is in memory already, where a spec says what to load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.models.output import base_model
from dskd_lightning.models.verification import verify_causal, verify_head

__all__ = ["Loaded"]


@dataclass(eq=False)
class Loaded:
    """A causal language model with its tokenizer, used as it is: what is frozen stays frozen.

    As a student its trainable parameters train, be it a ``PeftModel`` or not; as a teacher it is
    frozen and put into eval mode.

    Args:
        model: a transformers model with a head, or one with adapters.
        tokenizer: its fast tokenizer, with an end of sequence.
        prompt_template: a Python format string with ``{prompt}`` (and optionally ``{system}``)
            for models without a chat template; wins over the tokenizer's.
        template_options: further arguments of the chat template.
        weight: weight of this teacher's objective where there are several.
        name: of a teacher, by which a record's ``teacher`` chooses it, see `TeacherSpec`.
        system: of a teacher, its own system message in the place of the record's, see `TeacherSpec`.

    Raises:
        UserError: the tokenizer isn't fast or ends no sequence, or weights are on no device or several.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    name: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"Loaded('{self.source}'): {type(self.tokenizer).__name__} is no fast tokenizer, and byte "
                "alignment needs its offsets: give one from `AutoTokenizer.from_pretrained`."
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"Loaded('{self.source}'): the tokenizer has no end-of-sequence token, so no response could "
                "end: set `tokenizer.eos_token`."
            )
        if not isinstance(self.model, PreTrainedModel | PeftModel):
            raise UserError(
                f"Loaded needs a model of transformers or peft, not {type(self.model).__name__}: give what "
                "`AutoModelForCausalLM.from_pretrained` returns."
            )
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) > 1 or any(device.type == "meta" for device in devices):
            where = ", ".join(sorted(map(str, devices)))
            raise UserError(
                f"Loaded('{self.source}'): its weights are on {where}, and Lightning moves a model as a "
                "whole: load it without `device_map`."
            )

    @property
    def source(self) -> str:
        """What to call the model in messages."""
        base = base_model(self.model)
        return str(getattr(base, "name_or_path", "")) or type(base).__name__

    def build(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
        """The very model and tokenizer, once it is clear that the library can read them.

        Raises:
            UserError: the model sees the future, or its logits are no map of its last hidden states.
        """
        base = base_model(self.model)
        verify_causal(base, self.source)
        verify_head(base, self.source)
        return self.model, cast("PreTrainedTokenizerFast", self.tokenizer)

    def check_student(self, teachers: Iterable[object] = ()) -> None:
        """Check that the model can train beside ``teachers``.

        Raises:
            UserError: it has no trainable parameter, or shares its weights with a teacher.
        """
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not trainable:
            raise UserError(
                f"Loaded('{self.source}'): the student has no trainable parameter: call "
                "`model.requires_grad_(True)`, or load its adapter with `is_trainable=True`."
            )
        for teacher in teachers:
            if isinstance(teacher, Loaded) and trainable & {id(p) for p in teacher.model.parameters()}:
                raise UserError(
                    f"Loaded('{self.source}'): student and teacher share weights, and a teacher stays as it "
                    "is: give the teacher a copy of its own (copy.deepcopy)."
                )
