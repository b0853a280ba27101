"""Checks on a few tokens that a model is one that the library can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models.head_reading import measure_head
from dskd_lightning.models.output import base_model, decoder_hidden, language_head
from dskd_lightning.modes import evaluating
from dskd_lightning.structures import DistillationBatch, ModelSpace, TokenBatch
from dskd_lightning.tokenizers import tokenizer_fingerprint

__all__ = ["verify_causal", "verify_devices", "verify_head", "verify_packing", "verify_tokenizers"]


def verify_tokenizers(batch: DistillationBatch, student: Any, teachers: Sequence[Any]) -> None:
    """Check that a batch was cut by the tokenizers of the models that read it.

    Args:
        batch: with `DistillationBatch.tokenizers`.
        student: the student's tokenizer.
        teachers: of those teachers that are read.

    Raises:
        UserError: others did.
    """
    names = ["student", *("teacher" if len(teachers) == 1 else f"teacher {i}" for i in range(len(teachers)))]
    if len(batch.tokenizers) <= len(teachers):
        raise UserError(
            f"The batch was made for {len(batch.tokenizers) - 1} teachers, and the module learns from "
            f"{len(teachers)}: give the collator or the InstructionDataModule the module's own models."
        )
    for name, found, tokenizer in zip(names, batch.tokenizers, (student, *teachers), strict=False):
        if found != tokenizer_fingerprint(tokenizer):
            raise UserError(
                f"The batch was cut by another tokenizer than the {name}'s ('{tokenizer.name_or_path}'): "
                "give the collator or the InstructionDataModule the module's own models."
            )


def verify_devices(student: str, device: torch.device, teachers: Mapping[str, ModelSpace]) -> None:
    """Check that objectives find student and teachers on one device.

    Args:
        student: what it is called.
        device: of its weights.
        teachers: by what they are called.

    Raises:
        UserError: they aren't.
    """
    for name, space in teachers.items():
        if space.head.weight.device != device:
            raise UserError(
                f"The student '{student}' is on {device} and the teacher '{name}' on "
                f"{space.head.weight.device}: load both on one device; a Trainer moves them together."
            )


@torch.no_grad()
def verify_head(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that head and decoder reproduce the model's own logits.

    What the model does between the two is measured first, and kept for `language_head`.

    Raises:
        UserError: the model does something to its logits that `Head` can't express.
    """
    if model.device.type == "meta":
        return
    batch = _probe(model, [4])
    if model.get_output_embeddings() is None:
        language_head(model)  # says what is missing
    with evaluating(model):
        measure_head(model, batch.input_ids)
        expected = model(input_ids=batch.input_ids, use_cache=False).logits
        found = language_head(model).logits(decoder_hidden(model, batch))
    if not _close(found, expected):
        raise UserError(
            f"The logits of '{name}' ({type(model).__name__}) are not a linear map of its last hidden states "
            "with an optional scale and soft cap, so its head cannot be distilled: use another architecture."
        )


@torch.no_grad()
def verify_causal(model: PreTrainedModel, name: str) -> None:
    """Check on a few tokens that no logits change with a later token.

    Raises:
        UserError: the model sees the future, and with it the token that it should predict.
    """
    if model.device.type == "meta":
        return
    ids = _probe(model, [6]).input_ids
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    with evaluating(model):
        first, second = (model(input_ids=row, use_cache=False).logits[0, :-1] for row in (ids, changed))
    if not _close(first, second):
        raise UserError(
            f"'{name}' ({type(model).__name__}) is no causal language model: its logits change with later "
            "tokens, so that it would see what it should predict: choose a decoder (some architectures are "
            'one with "is_decoder": true in their config.json).'
        )


@torch.no_grad()
def verify_packing(model: PreTrainedModel | PeftModel, name: str) -> None:
    """Check on a few tokens that examples packed into one row don't see each other.

    Raises:
        UserError: the model ignores restarting position ids (OPT and Bloom do).
    """
    if base_model(model).device.type == "meta":
        return
    packed, alone = _probe(model, [3, 4]), _probe(model, [3])
    twice = replace(packed, **{n: getattr(packed, n).repeat(2, 1) for n in ("input_ids", "position_ids")})
    with evaluating(base_model(model)):
        first = decoder_hidden(model, alone)[0]
        second = decoder_hidden(model, _cut(packed, 3))[0]
        both = decoder_hidden(model, twice)  # of two rows, which some attention treats unlike one
    if not all(_close(row, torch.cat([first, second])) for row in both):
        raise UserError(
            f"'{name}' ({type(base_model(model)).__name__}) would mix examples that are packed into one row: "
            "turn packing off, or choose another `attn_implementation`."
        )


def _probe(model: PreTrainedModel | PeftModel, lengths: list[int]) -> TokenBatch:
    """One packed row of examples of these lengths, token ids counting up."""
    base = base_model(model)
    total = torch.arange(sum(lengths), device=base.device)
    ids = total.remainder(base.get_input_embeddings().weight.shape[0])[None]
    positions = torch.cat([torch.arange(length, device=base.device) for length in lengths])[None]
    mask = torch.ones_like(ids) if len(lengths) == 1 else None
    return TokenBatch(ids, ids, mask, positions, total, torch.zeros_like(total))


def _cut(batch: TokenBatch, start: int) -> TokenBatch:
    ids, positions = batch.input_ids[:, start:], batch.position_ids[:, start:]
    rest = torch.arange(ids.numel(), device=ids.device)
    return TokenBatch(ids, ids, torch.ones_like(ids), positions, rest, torch.zeros_like(rest))


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal within the rounding of the tensors' dtype, relative to the spread of their values."""
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 5e-2
    found, expected = found.float(), expected.float()
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.std()))
