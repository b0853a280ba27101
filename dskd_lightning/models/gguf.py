"""GGUF files, converted once into a plain folder that loads in a second."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dskd_lightning.cache_dir import cache_dir
from dskd_lightning.errors import UserError
from dskd_lightning.files import put_in_place
from dskd_lightning.models.progress import no_progress_bars

__all__ = ["converted_gguf"]

_log = logging.getLogger(__name__)
_VERSION = 1  # of the conversion


def converted_gguf(path: Path) -> Path:
    """The folder of ``path``'s weights in float32, its config and tokenizer; made now if it isn't there.

    Parsing and dequantising a GGUF file takes many times longer than reading the result. Folders
    are keyed by the file's content and lie in `cache_dir`; they can be deleted at any time.

    Raises:
        UserError: the folder can't be written. What a damaged file raises is for the caller.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
    folder = cache_dir("gguf") / f"{path.stem}-{digest}-v{_VERSION}"
    if folder.is_dir():
        return folder
    model, tokenizer = _load(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=".converting-", ignore_cleanup_errors=True
        ) as new:
            with no_progress_bars():
                model.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            target = Path(new) / "done"
            target.mkdir()
            for entry in [entry for entry in Path(new).iterdir() if entry != target]:
                os.replace(entry, target / entry.name)
            put_in_place(target, folder)
    except OSError as error:
        raise UserError(
            f"Cannot keep the converted '{path.name}' in '{folder.parent}' ({error.strerror}): free space "
            "or set DSKD_CACHE_DIR to another folder."
        ) from error
    _log.info("converted %s into %s", path.name, folder)
    return folder


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"gguf_file": path.name}
    extra: dict[str, Any] = {}
    try:
        from transformers import GgufConfig

        extra["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # before packed loading existed, dequantising was all there was
        pass
    with no_progress_bars():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **arguments)
        except ValueError:  # a file may hold weights alone
            tokenizer = None
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=torch.float32, **arguments, **extra
        )
    # What's stored as a name is a free-form title, no address.
    model.name_or_path = model.config.name_or_path = ""
    return model, tokenizer
