"""Give a pretrained model another tokenizer: the body stays, embeddings and head are carried over."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dskd_lightning.alignment.token_bytes import is_byte_token
from dskd_lightning.alignment.vocabulary import exact_token_map, token_projection, vocabulary_bytes
from dskd_lightning.errors import UserError
from dskd_lightning.models.token_tables import replace_table, token_tables
from dskd_lightning.tokenizers import fast_backend, sanitize_text

__all__ = ["SwapReport", "swap_tokenizer", "train_bpe"]

_log = logging.getLogger(__name__)

_ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class SwapReport:
    """Where the rows of the new embeddings came from; the four counts add up to ``new_size``.

    Args:
        old_size: rows of the embeddings before.
        new_size: rows after.
        copied: tokens that both vocabularies hold, by their bytes.
        composed: tokens set to the mean of the old tokens that spell them.
        special: special tokens taken from the old token of the same text or role.
        averaged: tokens without any counterpart, set to the mean of all old tokens.
    """

    old_size: int
    new_size: int
    copied: int
    composed: int
    special: int
    averaged: int

    def __str__(self) -> str:
        return (
            f"{self.old_size} -> {self.new_size} tokens: {self.copied} copied, {self.composed} composed of "
            f"old tokens, {self.special} special tokens carried over, {self.averaged} set to the mean"
        )


def swap_tokenizer(
    model: PreTrainedModel, old_tokenizer: PreTrainedTokenizerFast, new_tokenizer: PreTrainedTokenizerFast
) -> SwapReport:
    """Change ``model`` in place so that it reads and predicts the tokens of ``new_tokenizer``.

    A token that the old vocabulary holds keeps its rows of the embeddings and of the head; any
    other becomes the mean of the old tokens that spell its bytes. Other embeddings that are looked up by
    token id, such as Gemma's per-layer ones, go the same way. Token ids in the model's and the
    generation config become those of the new tokenizer.

    Raises:
        UserError: one tokenizer is slow, or the model has no row for some of its old tokens.
    """
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    old_size, known = inputs.weight.shape[0], len(vocabulary_bytes(old_tokenizer))
    sources = _Sources(old_tokenizer, new_tokenizer)
    if sources.highest >= old_size:
        raise UserError(
            f"The model's embeddings have {old_size} rows but its tokenizer uses id {sources.highest}: "
            "give the tokenizer that belongs to the model."
        )
    tables = token_tables(model)
    for name, table in tables.items():
        if sources.highest >= table.num_embeddings:
            raise UserError(
                f"The model's '{name}' is looked up by token id but has {table.num_embeddings} rows, and its "
                f"tokenizer uses id {sources.highest}: keep the model's own tokenizer."
            )
    tied = outputs is None or outputs.weight is inputs.weight
    bias = getattr(outputs, "bias", None)

    def carried(weight: Tensor) -> tuple[Tensor, bool]:
        return sources.carry(weight.detach(), min(known, old_size)), weight.requires_grad

    rows = carried(inputs.weight)
    head_rows = None if tied else carried(outputs.weight)
    new_bias = None if bias is None else carried(bias[:, None])
    table_rows = {name: (table.num_embeddings, carried(table.weight)) for name, table in tables.items()}
    model.resize_token_embeddings(sources.size, mean_resizing=False)
    _write(model.get_input_embeddings().weight, rows)
    if head_rows is not None:
        _write(model.get_output_embeddings().weight, head_rows)
    if new_bias is not None:
        _write(model.get_output_embeddings().bias, (new_bias[0][:, 0], new_bias[1]))
    for name, (size, values) in table_rows.items():
        replace_table(model, name, size, values)
    _update_ids(model, new_tokenizer)
    report = SwapReport(old_size, sources.size, *sources.counts())
    _log.info("Tokenizer swapped: %s.", report)
    return report


def train_bpe(
    texts: Iterable[str], vocab_size: int, like: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` tokens, or as many as ``texts`` give, trained on them.

    Special tokens, their roles and the chat template are those of ``like``, so that a student of
    the same family can take the result through `swap_tokenizer`.

    Raises:
        UserError: ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    added = fast_backend(like).get_added_tokens_decoder()
    special = [token.content for _, token in sorted(added.items()) if token.special]
    special = [token for token in special if not is_byte_token(token)]
    special += [token for token in like.all_special_tokens if token not in special]
    needed = 256 + len(special)
    if vocab_size < needed:
        raise UserError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {len(special)} special tokens: "
            f"set it to {needed} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(sanitize_text, texts), trainer)
    _keep_template(backend, like)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=like.model_max_length,
        **copy.deepcopy(like.special_tokens_map),
    )
    fast.chat_template = like.chat_template
    return fast


def _keep_template(backend: Any, like: PreTrainedTokenizerFast) -> None:
    """Add bos and eos where ``like`` does."""
    from tokenizers import processors

    plain = like("a", add_special_tokens=False)["input_ids"]
    whole = like("a", add_special_tokens=True)["input_ids"]
    extra = len(whole) - len(plain)
    for lead in range(extra + 1):
        if extra and whole[lead : lead + len(plain)] == plain:
            around = [like.convert_ids_to_tokens(ids) for ids in (whole[:lead], whole[lead + len(plain) :])]
            names = sorted({*around[0], *around[1]})
            backend.post_processor = processors.TemplateProcessing(
                single=" ".join([*around[0], "$A", *around[1]]),
                special_tokens=[(name, backend.token_to_id(name)) for name in names],
            )
            return


class _Sources:
    """How each row of the new vocabulary is made of rows of the old one."""

    def __init__(self, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
        pieces = vocabulary_bytes(new)
        self.size = max(len(pieces), len(new))
        special = _special_map(old, new)
        exact = exact_token_map(new, old)
        projection = token_projection(new, old, decay=1.0)
        self.special = np.fromiter(special, np.int64, len(special))
        self.copied = np.setdiff1d(np.flatnonzero(exact >= 0), self.special)
        spelled = np.setdiff1d(np.unique(projection.rows), self.special)
        rows, columns, weights = _by_bytes(pieces, vocabulary_bytes(old), {*spelled.tolist(), *special})
        self.composed = np.concatenate((np.setdiff1d(spelled, self.copied), np.unique(rows)))
        ordinary = ~np.isin(projection.rows, self.special)
        self.rows = np.concatenate((projection.rows[ordinary], rows, self.special))
        self.columns = np.concatenate(
            (projection.columns[ordinary], columns, np.fromiter(special.values(), np.int64, len(special)))
        )
        ones = np.ones(len(special), np.float32)
        self.weights = np.concatenate((projection.weights[ordinary], weights, ones))
        self.highest = int(self.columns.max(initial=-1))

    def counts(self) -> tuple[int, int, int, int]:
        made = len(self.copied), len(self.composed), len(self.special)
        return *made, self.size - sum(made)

    def carry(self, old: Tensor, known: int) -> Tensor:
        """Rows ``[new size, width]`` from ``old`` ``[old size, width]``, in its dtype.

        Rows of ``old`` from ``known`` on are padding and stay out of the mean.
        """
        precise = old.float() if old.dtype.itemsize < 4 else old
        values = precise[:known].mean(dim=0, keepdim=True).repeat(self.size, 1)
        rows, columns = (torch.from_numpy(index).to(old.device) for index in (self.rows, self.columns))
        weights = torch.from_numpy(self.weights).to(precise)
        values[rows] = 0
        values.index_add_(0, rows, precise[columns] * weights[:, None])
        return values.to(old.dtype)


def _by_bytes(
    pieces: list[bytes | None], old: list[bytes | None], done: set[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Tokens that are no text by themselves, from the old tokens of their single bytes."""
    single = {piece: index for index, piece in enumerate(old) if piece is not None and len(piece) == 1}
    rows: list[int] = []
    columns: list[int] = []
    weights: list[float] = []
    for index, piece in enumerate(pieces):
        if piece is None or index in done:
            continue
        found = [single.get(piece[i : i + 1], -1) for i in range(len(piece))]
        if min(found) >= 0:
            rows += [index] * len(found)
            columns += found
            weights += [1 / len(found)] * len(found)
    return np.array(rows, np.int64), np.array(columns, np.int64), np.array(weights, np.float32)


def _special_map(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> dict[int, int]:
    """New id -> old id of special tokens: of the same text first, else of the same role."""
    before, after = (fast_backend(tokenizer).get_added_tokens_decoder() for tokenizer in (old, new))
    ids = {token.content: index for index, token in before.items()}
    found = {
        index: ids[token.content] for index, token in after.items() if token.special and token.content in ids
    }
    for role in _ROLES:
        first, second = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (old, new))
        if first is not None and second is not None:
            found.setdefault(second, first)
    return found


def _write(parameter: Any, values: tuple[Tensor, bool]) -> None:
    with torch.no_grad():
        parameter.copy_(values[0])
    parameter.requires_grad_(values[1])


def _update_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    for config in configs:
        for role in ("bos", "eos", "pad"):
            if config is not None:
                setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
