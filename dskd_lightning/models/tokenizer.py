"""A model's tokenizer, as its spec wants it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.sources import load_errors, quiet, resolve_source

if TYPE_CHECKING:
    from dskd_lightning.models.spec import ModelSpec

__all__ = ["load_tokenizer", "pad_token_id"]

_log = logging.getLogger(__name__)

_END_OF_TEXT = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
"""Common end-of-sequence tokens, tried where a bare ``tokenizer.json`` names none."""


def load_tokenizer(spec: ModelSpec | Loaded) -> PreTrainedTokenizerFast:
    """The fast tokenizer of ``spec``: its own, or the one that ``spec.tokenizer`` names instead.

    A missing padding token becomes the end-of-sequence token (logged; labels tell padding apart,
    not token ids). ``spec.chat_template`` replaces the tokenizer's.

    Raises:
        UserError: no tokenizer there, none with a fast implementation, or no end of sequence.
    """
    if isinstance(spec, Loaded):
        return cast("PreTrainedTokenizerFast", spec.tokenizer)  # as `Loaded` has checked
    tokenizer = _load(spec, spec.source if spec.tokenizer is None else spec.tokenizer)
    _complete_special_tokens(tokenizer, spec)
    if spec.chat_template is not None:
        tokenizer.chat_template = _chat_template(spec.chat_template)
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The padding token, or the end of sequence where there is none: labels tell padding apart."""
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def _load(spec: ModelSpec, source: str) -> PreTrainedTokenizerFast:
    file = Path(source).expanduser()
    if file.name == "tokenizer.json" and file.with_name("tokenizer_config.json").is_file():
        source = str(file.parent)  # which token ends a sequence, and the template, are written there
        file = file.parent
    if file.is_file() and file.suffix == ".json":
        tokenizer = _from_json(file)
    else:
        place = resolve_source(source)
        needs = "a folder needs a tokenizer.json, or a vocab.json with a merges.txt"
        with load_errors("tokenizer", source, needs), quiet(place):
            tokenizer = AutoTokenizer.from_pretrained(
                place.location,
                revision=(spec.revision or "main") if source == spec.source else "main",
                trust_remote_code=spec.trust_remote_code,
            )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer '{source}' has no fast implementation ({type(tokenizer).__name__}), and byte "
            "alignment needs its offsets: set `tokenizer` to a folder or file with a tokenizer.json "
            "(transformers' `convert_slow_tokenizer` makes one)."
        )
    if len(tokenizer) == 0:
        raise UserError(
            f"'{source}' holds no tokenizer: add its tokenizer.json, or set `tokenizer` to a Hub id, "
            "a folder or a tokenizer.json."
        )
    return tokenizer


def _from_json(file: Path) -> PreTrainedTokenizerBase:
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # the Rust parser raises a bare Exception
        raise UserError(f"'{file}' is not a tokenizer.json of the tokenizers library: {error}.") from error


def _complete_special_tokens(tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> None:
    name = spec.tokenizer or spec.source
    if tokenizer.eos_token is None:
        vocabulary = tokenizer.get_vocab()
        found = next((token for token in _END_OF_TEXT if token in vocabulary), None)
        if found is None:
            raise UserError(
                f"The tokenizer '{name}' has no end-of-sequence token, so no response could end: set "
                '"eos_token" in its tokenizer_config.json.'
            )
        tokenizer.eos_token = found
        _log.warning(
            "The tokenizer '%s' names no end of sequence; using %s from its vocabulary.", name, found
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        _log.info("The tokenizer '%s' has no padding token; padding with %s.", name, tokenizer.eos_token)


def _chat_template(text: str) -> str:
    """``text`` itself where it is Jinja, else the content of the file that it names."""
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`chat_template` is neither a Jinja template nor a readable file: '{text}' ({error})."
        ) from error
    if "{{" not in template and "{%" not in template:
        raise UserError(f"The file '{text}' given as `chat_template` holds no Jinja template.")
    return template
