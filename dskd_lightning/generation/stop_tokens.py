"""Which tokens end a response."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["stop_token_ids"]

logger = logging.getLogger(__name__)

_PROBE = "dskdprobe"


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End tokens of the generation config, of the tokenizer, and of the chat template's turns.

    The end-of-turn token is the special token that the chat template writes after an assistant's
    message; a model tuned on that template ends with it even where its config does not say so.
    """
    ids = (
        _as_ids(model.generation_config.eos_token_id)
        + _as_ids(tokenizer.eos_token_id)
        + _end_of_turn(tokenizer)
    )
    if not ids:
        logger.warning("the model has no end token: every response runs to max_new_tokens")
    return sorted(set(ids))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return []  # templates raise anything; one that refuses plain messages says nothing of their ends
    tail = str(text).rpartition(_PROBE)[2].strip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [ids[0]] if ids and ids[0] in special else []


def _as_ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
