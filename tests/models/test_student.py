from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from model_families import CONFIGS, family, from_config, separate_rows
from torch._dynamo.testing import CompileCounter
from transformers import Qwen2MoeConfig

from dskd_lightning.errors import UserError
from dskd_lightning.models import (
    LoraSpec,
    PruneSpec,
    StudentSpec,
    build_student,
    decoder_hidden,
    load_model,
    parameter_report,
    prune_layers,
)
from dskd_lightning.models.pruning import evenly_spaced, prune_feed_forward
from dskd_lightning.structures import TokenBatch

BATCH = separate_rows()


def test_even_spacing():
    assert evenly_spaced(4, 10) == [0, 3, 6, 9]
    assert evenly_spaced(1, 5) == [0]
    for total in range(2, 40):
        for count in range(2, total + 1):
            kept = evenly_spaced(count, total)
            assert len(set(kept)) == count
            assert (kept[0], kept[-1]) == (0, total - 1)
            assert kept == sorted(kept)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pruned_layers_run_generate_and_reload(name, tmp_path):
    model = family(name)
    before = copy.deepcopy(model.state_dict())
    pruned = prune_layers(model, [0, 3])
    assert pruned.config.num_hidden_layers == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in pruned.parameters()} & {p.data_ptr() for p in model.parameters()}
    pruned.save_pretrained(tmp_path)
    again = type(pruned).from_pretrained(tmp_path).eval()
    expected = pruned(BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    found = again(BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    torch.testing.assert_close(BATCH.select(found), BATCH.select(expected))
    ids = BATCH.input_ids[:1, :4]
    cached = pruned.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = pruned.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_pruned_model_equals_skipping_the_layers():
    model = family("llama")
    pruned = prune_layers(model, [1, 2])
    layers = model.model.layers
    for skipped in (0, 3):
        layers[skipped].forward = lambda hidden, **kwargs: hidden
    torch.testing.assert_close(decoder_hidden(pruned, BATCH), decoder_hidden(model, BATCH))


def test_per_layer_configuration_follows():
    model = family("gemma2")
    types = model.config.layer_types
    assert len(set(types)) == 2
    assert prune_layers(model, [1, 2, 3]).config.layer_types == types[1:]


@pytest.mark.parametrize("keep", [[], [0, 0], [2, 1], [-1], [4]])
def test_wrong_layers(keep):
    with pytest.raises(UserError, match=r"prune\.layers"):
        prune_layers(family("llama"), keep)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_dropping_units_that_do_nothing_changes_nothing(name, tmp_path):
    """Units whose weights are all 0 have the smallest norm and no effect."""
    model = family(name)
    dead = [3, 17, 39]
    for module_name, parameter in model.named_parameters():
        if (".layers." not in module_name and ".h." not in module_name) or "attn" in module_name:
            continue
        if "attention" in module_name or "norm" in module_name or "ln_" in module_name:
            continue
        for dim, size in enumerate(parameter.shape):
            if size in (40, 80):
                index = torch.tensor(dead + [d + 40 for d in dead] * (size == 80))
                parameter.index_fill_(dim, index, 0)
    narrow = prune_feed_forward(model, 37)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(
        BATCH.select(decoder_hidden(narrow, BATCH)), BATCH.select(decoder_hidden(model, BATCH))
    )
    narrow.save_pretrained(tmp_path)
    again = type(narrow).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(BATCH.input_ids[:1]).logits, narrow(BATCH.input_ids[:1]).logits)


def test_experts_and_wrong_widths_are_refused():
    config = Qwen2MoeConfig(
        vocab_size=97, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="mixtures of experts"):
        prune_feed_forward(from_config(config), 8)
    with pytest.raises(UserError, match="between 1 and the model's 40"):
        prune_feed_forward(family("llama"), 41)


def test_lora_student(model_folder):
    model, tokenizer = build_student(
        StudentSpec(model_folder(), dtype="bfloat16", lora=LoraSpec(rank=4, config={"use_rslora": True}))
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model.training
    report = parameter_report(model)
    assert report["adapter"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["total"].total == sum(p.numel() for p in model.parameters())
    assert report["embedding"].frozen == report["head"].frozen == len(tokenizer) * 16
    assert report["embedding"].bytes == 2 * len(tokenizer) * 16


def test_lora_on_gpt2_stays_quiet(model_folder, recwarn):
    build_student(StudentSpec(model_folder(kind="gpt2"), lora=LoraSpec(rank=2, targets=["c_attn"])))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSpec(targets=["q_proj", "query"]), r"\['query'\] match no module.*down_proj"),
        (LoraSpec(targets="nothing.*"), "match no module"),
        (LoraSpec(targets="(("), "no regular expression"),
        (LoraSpec(config={"rank": 3}), "peft refuses"),
        (LoraSpec(config={"r": 3}), r"repeats a field"),
        (LoraSpec(dropout=0.1, targets=["lm_head"]), "cannot apply to the head"),
        (LoraSpec(rank=0), "peft refuses"),
    ],
)
def test_wrong_lora(model_folder, lora, message):
    with pytest.raises(UserError, match=message):
        build_student(StudentSpec(model_folder(), lora=lora))


def test_full_training_with_frozen_embeddings(model_folder):
    model, _ = build_student(StudentSpec(model_folder(), freeze_embeddings=True))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}


def test_random_weights_from_a_configuration(model_folder):
    folder = model_folder()
    other = model_folder(vocab_size=350)
    model, tokenizer = build_student(StudentSpec(folder, random_init=True, tokenizer=other))
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.name_or_path == ""
    loaded = load_model(StudentSpec(folder))
    assert not torch.equal(
        loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )
    with pytest.raises(UserError, match="needs all weights trained"):
        build_student(StudentSpec(folder, random_init=True, lora=LoraSpec()))


def test_pruned_student_is_another_model_than_its_source(model_folder):
    spec = StudentSpec(model_folder(layers=4), prune=PruneSpec(layers=2, by="even", intermediate_size=20))
    model, _ = build_student(spec)
    assert model.config.num_hidden_layers == 2
    assert model.model.layers[1].mlp.down_proj.weight.shape == (16, 20)
    assert model.name_or_path == ""


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)])
def test_gradient_checkpointing_changes_no_gradient(model_folder, lora):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, _ = build_student(StudentSpec(model_folder(), lora=lora, gradient_checkpointing=checkpointing))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        decoder_hidden(model, BATCH).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) >= 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiling_keeps_names_and_results(model_folder):
    folder = model_folder()
    plain, _ = build_student(StudentSpec(folder))
    torch._dynamo.reset()
    compiled, _ = build_student(StudentSpec(folder, compile=True))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert compiled.get_decoder()._compiled_call_impl is not None
    ids = torch.arange(8)[None]
    torch.testing.assert_close(compiled(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    compiled(ids).logits.sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())


def test_compiling_serves_all_lengths(model_folder, monkeypatch):
    """Batches differ in both sizes; what is compiled for the first ones is compiled for all."""
    counter, compile_ = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *a, **k: compile_(self, *a, **{**k, "backend": counter})
    )
    torch._dynamo.reset()
    model, _ = build_student(StudentSpec(model_folder(), compile=True))
    counts = []
    for rows, length in itertools.product((2, 3, 5), (7, 16, 33, 64, 90)):
        ids = torch.arange(rows * length).view(rows, length) % 50
        positions = torch.arange(length).expand(rows, length)
        response = torch.arange(rows * length)
        batch = TokenBatch(ids, ids, torch.ones_like(ids), positions, response, response // length)
        decoder_hidden(model, batch).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] >= 1
    assert counts[-1] <= counts[0] + 1, counts
    torch._dynamo.reset()


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2)])
def test_another_tokenizer_swaps_the_vocabulary(model_folder, lora, caplog):
    other = model_folder(tokenizer="unigram", vocab_size=350)
    model, tokenizer = build_student(StudentSpec(model_folder(), tokenizer=other, lora=lora))
    base = model if lora is None else model.get_base_model()
    assert base.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert base.get_output_embeddings().weight.shape[0] == len(tokenizer)
    assert base.name_or_path == ""
    assert ("keeps its embeddings frozen" in caplog.text) == (lora is not None)
    assert model(torch.arange(5)[None]).logits.shape[-1] == len(tokenizer)
