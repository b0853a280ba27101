from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_families import BLOOM, CONFIGS, NOT_PACKABLE, family, from_config, packed_row, separate_rows
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from dskd_lightning.errors import UserError
from dskd_lightning.models import (
    decoder_hidden,
    input_embeddings,
    language_head,
    model_space,
    side,
    verify_head,
    verify_packing,
)

BATCH = separate_rows()
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def model_logits(model, batch=BATCH):
    return batch.select(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)


def our_logits(model, batch=BATCH):
    return language_head(model).logits(batch.select(decoder_hidden(model, batch)))


def head_name(model) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_head_of_hidden_states_is_the_models_own_logits(name):
    model = family(name)
    verify_head(model, name)
    torch.testing.assert_close(our_logits(model), model_logits(model), **TIGHT)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_with_lora_on_attention_and_on_the_head(name):
    model = family(name)
    plain = model_logits(model)
    attention = next(
        n for n, m in model.named_modules() if "attn" in n and isinstance(m, nn.Linear | Conv1D)
    ) if name != "gpt_neox" else "gpt_neox.layers.0.attention.dense"  # fmt: skip
    targets = [attention, head_name(model)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert not torch.allclose(model_logits(adapted), plain, atol=1e-2)
    torch.testing.assert_close(our_logits(adapted), model_logits(adapted), **TIGHT)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_PACKABLE])
@torch.no_grad()
def test_packed_rows_equal_separate_rows(name):
    model = family(name)
    verify_packing(model, name)
    torch.testing.assert_close(our_logits(model, packed_row()), our_logits(model), rtol=1e-4, atol=1e-4)


def flash_like(module, query, key, value, attention_mask, scaling, **kwargs):
    """As transformers calls flash attention: packed examples are looked for in batches of one row alone."""
    assert attention_mask is None
    positions, length = kwargs["position_ids"], query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if query.shape[0] == 1:
        example = (positions[0] == 0).cumsum(0)
        visible &= example[:, None] == example[None]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@torch.no_grad()
def test_packed_rows_of_a_batch_stay_apart_in_flash_attention(monkeypatch):
    name = "flash_attention_pretended"
    AttentionInterface.register(name, flash_like)
    model, packed, alone = family("llama"), packed_row(), separate_rows()
    rows = replace(
        packed, input_ids=packed.input_ids.repeat(3, 1), position_ids=packed.position_ids.repeat(3, 1)
    )
    expected = decoder_hidden(model, rows)
    plain = decoder_hidden(model, alone)
    model.config._attn_implementation = name
    torch.testing.assert_close(decoder_hidden(model, rows), expected, rtol=1e-4, atol=1e-4)
    real = alone.attention_mask.bool()
    torch.testing.assert_close(decoder_hidden(model, alone)[real], plain[real], rtol=1e-4, atol=1e-4)
    verify_packing(model, "llama")
    monkeypatch.setattr("dskd_lightning.models.output.is_flash_attention_requested", lambda config: False)
    with pytest.raises(UserError, match="would mix examples"):
        verify_packing(model, "llama")


@pytest.mark.parametrize("config", [CONFIGS["opt"], BLOOM], ids=["opt", "bloom"])
def test_models_that_would_mix_packed_examples_are_refused(config):
    with pytest.raises(UserError, match="would mix examples"):
        verify_packing(from_config(config), "some model")


def test_a_head_that_is_no_scaled_linear_map_is_refused():
    model = family("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output**3)
    with pytest.raises(UserError, match="not a linear map"):
        verify_head(model, "odd")


def test_verification_restores_the_modes():
    model = family("llama").train()
    model.model.layers[1].eval()
    verify_head(model, "llama")
    verify_packing(model, "llama")
    assert model.training
    assert not model.model.layers[1].training


def test_gradient_reaches_the_heads_adapter_and_only_that():
    model = get_peft_model(
        family("llama_tied"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    language_head(model).logits(torch.ones(1, 16)).sum().backward()
    with_grad = {
        name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert with_grad == {name for name, p in model.named_parameters() if "lora_" in name}
    assert with_grad


@torch.no_grad()
def test_modules_to_save_and_trainable_tokens():
    saved = get_peft_model(
        family("llama"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    ).eval()
    saved.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    torch.testing.assert_close(our_logits(saved), model_logits(saved), **TIGHT)
    tokens = get_peft_model(
        family("llama_tied"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    ).eval()
    for name, parameter in tokens.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.add_(1)
    torch.testing.assert_close(our_logits(tokens), model_logits(tokens), **TIGHT)
    assert (input_embeddings(tokens)[5] - family("llama_tied").get_input_embeddings().weight[5]).min() > 0.9


def test_dora_on_the_head_is_refused():
    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UserError, match="no plain LoRA"):
        language_head(model)


@torch.no_grad()
def test_side_selects_response_positions_and_takes_cached_states():
    model, batch = family("llama"), separate_rows()
    hidden = decoder_hidden(model, batch)
    live = side(model, hidden, batch, padded_statistics=True)
    cached = side(model, batch.select(hidden), batch)
    assert len(live) == 14
    assert torch.equal(live.hidden, cached.hidden)
    assert torch.equal(live.ids, batch.input_ids.flatten()[batch.response])
    assert torch.equal(live.labels, batch.labels.flatten()[batch.response])
    assert live.padded is not None
    assert live.padded.positions == 18
    torch.testing.assert_close(live.padded.hidden_std, hidden.flatten().std(unbiased=True))
    with pytest.raises(UserError, match="cache"):
        side(model, batch.select(hidden), batch, padded_statistics=True)


@torch.no_grad()
def test_padding_is_read_as_published_where_its_states_count():
    model, batch = family("llama"), separate_rows()
    kept = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    published = model.model(**kept, position_ids=batch.position_ids).last_hidden_state
    torch.testing.assert_close(decoder_hidden(model, batch, padding_too=True), published, **TIGHT)
    quick, real = decoder_hidden(model, batch), batch.attention_mask.bool()
    torch.testing.assert_close(quick[real], published[real], **TIGHT)
    assert (quick - published)[~real].abs().max() > 1e-3


def test_space_refuses_a_tokenizer_with_more_tokens_than_the_model():
    from conftest import make_tokenizer

    with pytest.raises(UserError, match="embeddings for 97"):
        model_space(family("llama"), make_tokenizer("bpe", 400))
    assert model_space(family("llama")).hidden_size == 16
