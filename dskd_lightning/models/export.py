"""Write a student as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.generation.stop_tokens import stop_token_ids
from dskd_lightning.models.effective_weight import effective_weight
from dskd_lightning.models.output import base_model
from dskd_lightning.models.progress import no_progress_bars

__all__ = ["check_export", "export_student"]


def export_student(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    merge: bool = True,
    overwrite: bool = False,
) -> Path:
    """Save weights, configuration, tokenizer and chat template, all of it or nothing.

    The folder loads with ``AutoModelForCausalLM.from_pretrained`` and needs nothing of this
    library. Its generation config ends a response at every token that the student learnt to end
    with, the chat template's end of turn too. The live model isn't touched.

    With ``merge=False`` a LoRA student is saved as a peft adapter. Where its base can't be
    found again (pruned, new vocabulary, from GGUF), the base is saved in the sub-folder
    ``base``, which the adapter names by its absolute path: change ``base_model_name_or_path``
    in ``adapter_config.json`` when you move the folder.

    Args:
        model: the trained student.
        tokenizer: its tokenizer.
        folder: where to write.
        merge: add adapters to the weights; without adapters it makes no difference.
        overwrite: replace a folder that holds something.

    Returns:
        The folder.

    Raises:
        UserError: the folder is in use, or can't be written.
    """
    target = check_export(folder, overwrite)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        with no_progress_bars():
            if isinstance(model, PeftModel) and not merge:
                _save_adapter(model, staging, target)
            else:
                (merged(model) if isinstance(model, PeftModel) else model).save_pretrained(staging)
        _write_end_tokens(model, tokenizer, staging)
        tokenizer.save_pretrained(staging)
        check_export(target, overwrite)  # it took a while, and somebody may have been faster
        _publish(staging, target)
    except (OSError, SafetensorError) as error:
        if not _is_storage_failure(error):
            raise
        raise UserError(f"Cannot export to '{target}': {error}; nothing was written.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_export(folder: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of ``folder``, where a model can be written.

    Raises:
        UserError: it is a file, or holds something that ``overwrite`` doesn't give up.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"Cannot export to '{target}': it is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"Cannot export to '{target}': the folder isn't empty; name another or overwrite it.")
    return target


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy with the adapters added to the weights, rounded to the weights' own type.

    A head tied to the embeddings is untied where only one of the two was adapted.
    """
    plain = copy.deepcopy(model)
    base = plain.get_base_model()
    embedding: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module = base.get_output_embeddings()  # type: ignore[operator]
    adapted = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in (embedding, head))
    separate = adapted and not effective_weight(embedding).equal(effective_weight(head))
    if separate:
        own = _original(head)
        own.weight = nn.Parameter(effective_weight(own).detach().clone())
    result: PreTrainedModel = plain.merge_and_unload()  # type: ignore[operator]
    if separate:
        result.config.get_text_config().tie_word_embeddings = False
        result.config.tie_word_embeddings = False
    return result


def _original(module: nn.Module) -> nn.Module:
    """The layer under any adapters."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _original(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _save_adapter(model: PeftModel, staging: Path, target: Path) -> None:
    config = model.peft_config[model.active_adapter]
    source = config.base_model_name_or_path
    if not source:
        copy.deepcopy(model).unload().save_pretrained(staging / "base")  # type: ignore[operator]
        config.base_model_name_or_path = str(target / "base")
    try:
        model.save_pretrained(str(staging))
    finally:
        config.base_model_name_or_path = source


def _write_end_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, staging: Path
) -> None:
    """A base model's config knows the end of a document only, and the student would go on for ever."""
    base: Any = base_model(model)
    folder = staging if (staging / "generation_config.json").is_file() else staging / "base"
    if not (folder / "generation_config.json").is_file():
        return  # an adapter beside somebody else's base
    config = copy.deepcopy(base.generation_config)
    ends = stop_token_ids(base, tokenizer)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.save_pretrained(folder)


def _publish(staging: Path, target: Path) -> None:
    """Put the finished folder in its place; an old one survives until the new one is there."""
    old = staging.with_name(f"{staging.name}.old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_storage_failure(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None
    return re.search(r"i/?o ?error|os error|no space", str(error), re.IGNORECASE) is not None
