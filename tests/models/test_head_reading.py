from __future__ import annotations

import copy

import pytest
import torch
from model_families import _COMMON, _IDS, CONFIGS, VOCAB, family, from_config, separate_rows
from torch import nn
from transformers import (
    BertGenerationConfig,
    BertGenerationDecoder,
    HyperCLOVAXConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    XLNetConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from dskd_lightning.errors import UserError
from dskd_lightning.models import decoder_hidden, language_head, verify_causal, verify_head
from dskd_lightning.models.head_reading import stored_reading

BATCH = separate_rows()
SMALL = {**_COMMON, "num_hidden_layers": 3}


def check(model: PreTrainedModel, scale: float, softcap: float | None) -> None:
    """Measured numbers, and logits of states a hundred times as large as the probe's."""
    verify_head(model, "some model")
    reading = stored_reading(model)
    assert reading is not None
    assert (reading.scale, reading.softcap) == (scale, softcap)
    hidden = decoder_hidden(model, BATCH)
    raw = nn.functional.linear(100 * hidden, model.get_output_embeddings().weight)
    expected = scale * raw if softcap is None else softcap * torch.tanh(scale * raw / softcap)
    torch.testing.assert_close(language_head(model).logits(100 * hidden), expected)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_is_measured_as_its_config_says(name):
    scale = {"cohere": 0.25, "granite": 0.25}.get(name, 1.0)
    model = family(name)
    verify_head(model, name)
    reading = stored_reading(model)
    assert reading is not None
    assert reading.scale == scale
    assert reading.softcap == (2.0 if name == "gemma2" else None)
    assert model.get_submodule(reading.decoder) is model.get_decoder()


@torch.no_grad()
def test_a_factor_that_others_divide_by():
    check(from_config(HyperCLOVAXConfig(**SMALL, logits_scaling=0.125)), 0.125, None)


@torch.no_grad()
def test_a_cap_of_another_name():
    config = RecurrentGemmaConfig(**SMALL, head_dim=8, lru_width=16, attention_window_size=8)
    config.logits_soft_cap = 2.5
    check(from_config(config), 1.0, 2.5)


class _Capped(LlamaForCausalLM):
    """Factors on both sides of the head and a cap, none of them in the config."""

    def forward(self, input_ids, **options):  # type: ignore[override]
        hidden = self.model(input_ids, **options).last_hidden_state
        logits = self.lm_head(hidden * 0.25) * 0.375
        return CausalLMOutput(logits=28 * torch.tanh(logits / 28))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_cap_that_small_logits_never_feel_and_factors_on_both_sides_of_the_head(dtype):
    model = _Capped(CONFIGS["llama"]).eval().to(dtype)
    model.lm_head.weight.mul_(1e-2)
    verify_head(model, "odd")
    reading = stored_reading(model)
    assert reading is not None
    assert reading.softcap == pytest.approx(28, rel=1e-5 if dtype == torch.float32 else 5e-3)
    assert reading.scale == pytest.approx(0.25 * 0.375, rel=1e-4 if dtype == torch.float32 else 1e-2)


def test_a_copy_keeps_what_was_measured():
    model = from_config(HyperCLOVAXConfig(**SMALL, logits_scaling=0.125))
    verify_head(model, "clova")
    assert language_head(copy.deepcopy(model)).scale == 0.125


class _Own(LlamaForCausalLM):
    def get_decoder(self):
        return self


@torch.no_grad()
def test_a_decoder_that_get_decoder_does_not_give():
    model = _Own(CONFIGS["llama"]).eval()
    verify_head(model, "own")
    found = language_head(model).logits(BATCH.select(decoder_hidden(model, BATCH)))
    own = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    torch.testing.assert_close(found, BATCH.select(own))


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_pass(name):
    verify_causal(family(name), name)


def test_models_that_see_the_future_are_refused():
    bert = BertGenerationConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=64, **_IDS,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(UserError, match="no causal language model"):
        verify_causal(BertGenerationDecoder(bert).eval(), "bert")
    xlnet = from_config(XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=40))
    with pytest.raises(UserError, match=r"'net' .XLNetLMHeadModel. is no causal language model"):
        verify_causal(xlnet, "net")
