"""Build the student that a config describes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.models.layer_choice import Calibration, decide_layers
from dskd_lightning.models.loading import load_config, load_model
from dskd_lightning.models.lora import add_lora
from dskd_lightning.models.output import base_model, decoder_of, input_embeddings
from dskd_lightning.models.pruning import prune
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.models.verification import verify_causal, verify_head
from dskd_lightning.structures import TokenBatch

if TYPE_CHECKING:
    from dskd_lightning.models.spec import StudentSpec

__all__ = ["build_student"]

_log = logging.getLogger(__name__)


def build_student(
    spec: StudentSpec, calibration: Calibration | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """The student of ``spec`` and its tokenizer, in train mode.

    In this order: load or draw the weights, prune, swap the vocabulary, freeze or adapt,
    checkpoint activations, compile. A model that isn't its source any more has an empty
    ``name_or_path``, by which `export_student` knows to keep the base beside an adapter.

    Args:
        spec: the student.
        calibration: text to prune by, where the spec doesn't say ``even`` or list its layers.

    Raises:
        UserError: the spec contradicts itself or the model can't be built from it.
    """
    if spec.random_init and spec.lora is not None:
        raise UserError("`student.random_init` needs all weights trained: set `student.lora` to null.")
    tokenizer = load_tokenizer(spec)
    model = _random(spec, tokenizer) if spec.random_init else load_model(spec)
    if spec.prune is not None:
        model = _pruned(model, spec, calibration)
    if spec.tokenizer is not None and not spec.random_init:
        _swap(model, spec, tokenizer)
    if spec.random_init or spec.prune is not None:
        _forget_source(model)
    if len(tokenizer) > input_embeddings(model).shape[0]:
        raise UserError(
            f"The student's tokenizer has {len(tokenizer)} tokens but '{spec.source}' has embeddings for "
            f"{input_embeddings(model).shape[0]}: set `student.tokenizer` to the tokenizer of its weights, "
            "or to another source, which swaps the vocabulary."
        )
    verify_causal(model, spec.source)
    verify_head(model, spec.source)
    student = _trainable(model, spec)
    decoder = decoder_of(student)
    if spec.gradient_checkpointing:
        # Not the re-entrant kind: that one needs inputs with gradients, which frozen embeddings lack.
        base_model(student).activation_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        decoder.compile(dynamic=True)  # in place: names of parameters stay as they are
    return student.train(), tokenizer


def _pruned(model: PreTrainedModel, spec: StudentSpec, calibration: Calibration | None) -> PreTrainedModel:
    decided = decide_layers(spec, calibration).prune
    assert decided is not None
    batches: Sequence[TokenBatch] = ()
    # The checkpoint of an adapter lacks the base: what it lies on must be found again without the data.
    if calibration is not None and decided.intermediate_size and decided.by != "even" and spec.lora is None:
        batches = [batch.to(model.device) for batch in calibration(spec, decided.calibration)]
    return prune(model.eval(), decided, batches)


def _random(spec: StudentSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = load_config(spec)
    text = config.get_text_config()
    if spec.tokenizer is not None:
        text.vocab_size = len(tokenizer)
        for name in ("bos", "eos", "pad"):
            setattr(text, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    dtype = getattr(torch, spec.dtype) if spec.dtype != "auto" else torch.float32
    arguments = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=spec.trust_remote_code, **arguments
    )


def _swap(model: PreTrainedModel, spec: StudentSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    from dskd_lightning.models.tokenizer_swap import swap_tokenizer

    own = load_tokenizer(dataclasses.replace(spec, tokenizer=None, chat_template=None))
    if own.get_vocab() == tokenizer.get_vocab():
        return
    swap_tokenizer(model, own, tokenizer)
    _forget_source(model)
    if spec.lora is not None and not spec.lora.config.get("modules_to_save"):
        names = [
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if module in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        _log.warning(
            "The student has a new vocabulary but LoRA keeps its embeddings frozen: consider "
            "`student.lora.config.modules_to_save: %s`.",
            names,
        )


def _forget_source(model: PreTrainedModel) -> None:
    model.name_or_path = model.config.name_or_path = ""


def _trainable(model: PreTrainedModel, spec: StudentSpec) -> PreTrainedModel | PeftModel:
    if spec.lora is not None:
        return add_lora(model, spec.lora)
    model.requires_grad_(True)
    if spec.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return model
