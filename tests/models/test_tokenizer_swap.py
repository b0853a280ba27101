"""A swapped vocabulary keeps what the model knew of shared tokens and composes the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, make_model, make_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dskd_lightning.alignment.vocabulary import exact_token_map, vocabulary_bytes
from dskd_lightning.errors import UserError
from dskd_lightning.models.tokenizer_swap import swap_tokenizer, train_bpe


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shared_tokens_keep_their_rows_and_others_are_means(kind: str) -> None:
    old, new = make_tokenizer("bpe", 300), make_tokenizer("bpe", 400)
    model = make_model(len(old), kind=kind)
    inputs = model.get_input_embeddings().weight.detach().clone()
    outputs = model.get_output_embeddings().weight.detach().clone()
    report = swap_tokenizer(model, old, new)
    assert report.new_size == len(new) == model.config.vocab_size
    assert report.copied + report.composed + report.special + report.averaged == report.new_size
    assert report.copied > 200
    assert report.composed > 50
    exact = exact_token_map(new, old)
    after = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    pieces, composed = vocabulary_bytes(new), 0
    for index, other in enumerate(exact.tolist()):
        if other >= 0:
            torch.testing.assert_close(after[index], inputs[other], rtol=0, atol=0)
            torch.testing.assert_close(head[index], outputs[other], rtol=0, atol=0)
        elif pieces[index] is not None and pieces[index].isascii():
            ids = old(pieces[index].decode(), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(after[index], inputs[ids].mean(0))
            torch.testing.assert_close(head[index], outputs[ids].mean(0))
            composed += 1
    assert composed > 20
    assert (head is after) == (kind == "gpt2")


def test_special_tokens_follow_their_role_and_ids_are_updated() -> None:
    old, new = make_tokenizer("bpe", 300), make_tokenizer("wordpiece", 200)
    new.add_special_tokens({"eos_token": "<stop>"})
    model = make_model(len(old))
    inputs = model.get_input_embeddings().weight.detach().clone()
    swap_tokenizer(model, old, new)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == new.eos_token_id
    after = model.get_input_embeddings().weight
    torch.testing.assert_close(after[new.eos_token_id], inputs[old.eos_token_id])
    torch.testing.assert_close(after[new.pad_token_id], inputs[old.pad_token_id])
    ids = torch.tensor([new("naïve café")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()
    assert model(ids).logits.shape[-1] == len(new)


def test_a_swap_back_restores_every_shared_row() -> None:
    first, second = make_tokenizer("bpe", 300), make_tokenizer("bpe", 400)
    model = make_model(len(first))
    before = model.get_input_embeddings().weight.detach().clone()
    swap_tokenizer(model, first, second)
    swap_tokenizer(model, second, first)
    torch.testing.assert_close(model.get_input_embeddings().weight, before)


def test_frozen_rows_stay_frozen_and_the_dtype_is_kept() -> None:
    old, new = make_tokenizer("bpe", 300), make_tokenizer("unigram", 200)
    model = make_model(len(old)).to(torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    swap_tokenizer(model, old, new)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad


def test_a_tokenizer_of_another_model_is_named() -> None:
    with pytest.raises(UserError, match="give the tokenizer that belongs to the model"):
        swap_tokenizer(make_model(100), make_tokenizer("bpe", 400), make_tokenizer("bpe", 300))


def test_a_trained_bpe_keeps_special_tokens_and_template() -> None:
    like = make_tokenizer("sentencepiece", 400, add_bos=True)
    small = train_bpe(iter([*CORPUS, "a\ud800b"]), 320, like)
    assert len(small) <= 320
    assert small.special_tokens_map == like.special_tokens_map
    messages = [{"role": "user", "content": "hello"}]
    assert small.apply_chat_template(messages, tokenize=False) == like.apply_chat_template(
        messages, tokenize=False
    )
    ids = small("日本 naïve 🙂")["input_ids"]
    assert ids[0] == small.bos_token_id
    assert small.decode(ids[1:]) == "日本 naïve 🙂"
    assert small("<|end|>", add_special_tokens=False)["input_ids"] == [small.eos_token_id]


def test_too_small_a_bpe_says_how_large_it_must_be() -> None:
    with pytest.raises(UserError, match=r"set it to 26\d or more"):
        train_bpe(["text"], 100, make_tokenizer("bpe"))


def gemma4(vocab: int) -> PreTrainedModel:
    config = Gemma4TextConfig(
        vocab_size=vocab, vocab_size_per_layer_input=vocab, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, global_head_dim=8,
        sliding_window=8, hidden_size_per_layer_input=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma4ForCausalLM(config).eval()


def renumbered(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens under other ids, the special ones kept."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = len(tokenizer.all_special_ids)
    size = len(tokenizer)
    ids = {i: i if i < kept else kept + size - 1 - i for i in range(size)}
    state["model"]["vocab"] = {token: ids[i] for token, i in state["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


@torch.no_grad()
def test_per_layer_embeddings_follow_the_new_ids(tmp_path: Path) -> None:
    old = make_tokenizer("bpe", 300)
    new = renumbered(old)
    text = "three fruits, apples"
    before, after = (torch.tensor([each(text)["input_ids"]]) for each in (old, new))
    assert before.tolist() != after.tolist()
    model = gemma4(len(old))
    expected = model(before).logits
    swap_tokenizer(model, old, new)
    order = [new.convert_tokens_to_ids(token) for token in old.convert_ids_to_tokens(range(len(old)))]
    torch.testing.assert_close(model(after).logits[..., order], expected)


def test_per_layer_embeddings_take_the_new_size_and_load_again(tmp_path: Path) -> None:
    old, new = make_tokenizer("bpe", 300), make_tokenizer("bpe", 400)
    model = gemma4(len(old))
    swap_tokenizer(model, old, new)
    assert model.config.vocab_size_per_layer_input == len(new)
    ids = torch.tensor([[len(new) - 1, 3]])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_per_layer_embeddings_without_a_row_for_every_token_are_refused() -> None:
    old = make_tokenizer("bpe", 300)
    model = gemma4(len(old))
    table = model.model.embed_tokens_per_layer
    table.weight = torch.nn.Parameter(table.weight[:200].detach())
    table.num_embeddings = 200
    with pytest.raises(UserError, match=r"embed_tokens_per_layer' is looked up by token id but has 200 rows"):
        swap_tokenizer(model, old, make_tokenizer("bpe", 400))
