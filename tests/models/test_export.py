from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tokenizer
from model_families import CONFIGS, from_config
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models import (
    LoraSpec,
    PruneSpec,
    StudentSpec,
    base_model,
    build_student,
    export_student,
    parameter_report,
    weights_fingerprint,
)

IDS = torch.arange(5, 13)[None]


def student(folder, **fields):
    """A student whose adapters, if any, do something."""
    model, tokenizer = build_student(StudentSpec(folder, **fields))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), tokenizer


@pytest.fixture
def tied_folder(tmp_path):
    tokenizer = make_tokenizer()
    config = LlamaConfig(**(CONFIGS["llama_tied"].to_dict() | {"vocab_size": len(tokenizer)}))
    from_config(config).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


@torch.no_grad()
def test_full_student_is_a_plain_folder(model_folder, tmp_path, capfd):
    model, tokenizer = student(model_folder())
    capfd.readouterr()
    folder = export_student(model, tokenizer, tmp_path / "deep" / "out")
    assert "it/s" not in capfd.readouterr().err
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not any(b"dskd" in path.read_bytes() for path in folder.glob("*.json"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, model(IDS).logits)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template
    assert again("a fox 😀").input_ids == tokenizer("a fox 😀").input_ids
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(rank=2),
        LoraSpec(rank=2, targets=["q_proj", "lm_head"]),
        LoraSpec(rank=2, targets=["embed_tokens"]),
        LoraSpec(rank=2, config={"modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
    ids=["all-linear", "head", "embeddings", "modules_to_save"],
)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_merged_export_has_the_logits_of_the_live_model(model_folder, tied_folder, tmp_path, lora, tied):
    source = tied_folder if tied else model_folder()
    model, tokenizer = student(source, lora=lora)
    before = copy.deepcopy(model.state_dict())
    logits = model(IDS).logits
    assert not torch.allclose(logits, AutoModelForCausalLM.from_pretrained(source)(IDS).logits, atol=1e-2)
    folder = export_student(model, tokenizer, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(exported(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in exported.state_dict())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prune", [None, PruneSpec(layers=1, by="even", intermediate_size=20)])
@torch.no_grad()
def test_kept_adapter_finds_its_base(model_folder, tmp_path, prune):
    model, tokenizer = student(model_folder(), lora=LoraSpec(rank=2), prune=prune)
    folder = export_student(model, tokenizer, tmp_path / "out", merge=False)
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "base").is_dir() == (prune is not None)
    again = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    assert [name for name, _ in model.named_parameters() if "lora_" in name]


def test_a_used_folder_is_not_overwritten_unasked(model_folder, tmp_path):
    model, tokenizer = student(model_folder())
    target = tmp_path / "out"
    target.mkdir()
    export_student(model, tokenizer, target)
    (target / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="isn't empty"):
        export_student(model, tokenizer, target)
    assert (target / "mine.txt").is_file()
    export_student(model, tokenizer, target, overwrite=True)
    assert not (target / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it is a file"):
        export_student(model, tokenizer, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_leaves_the_old_folder(model_folder, tmp_path, monkeypatch, error):
    model, tokenizer = student(model_folder())
    target = export_student(model, tokenizer, tmp_path / "out")
    old = (target / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=f"{target}.*No space left"):
        export_student(model, tokenizer, target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_place(model_folder, tmp_path):
    model, tokenizer = student(model_folder())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot export to"):
        export_student(model, tokenizer, tmp_path / "file" / "out")


def test_export_of_a_compiled_student_has_plain_names(model_folder, tmp_path):
    model, tokenizer = student(model_folder(), lora=LoraSpec(rank=2), compile=True)
    folder = export_student(model, tokenizer, tmp_path / "out")
    assert model.get_base_model().get_decoder()._compiled_call_impl is not None
    index = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert not any("_orig_mod" in name or "lora" in name for name in index)


def test_exported_student_loads_without_this_library(model_folder, tmp_path):
    model, tokenizer = student(
        model_folder(layers=4), lora=LoraSpec(rank=2), prune=PruneSpec(layers=2, by="even")
    )
    folder = export_student(model, tokenizer, tmp_path / "out")
    code = (
        "import sys; sys.modules['dskd_lightning'] = None\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"print(M.from_pretrained({str(folder)!r}).config.num_hidden_layers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@torch.no_grad()
def test_fingerprint_sees_every_weight_and_the_configuration_but_not_the_place(model_folder, tmp_path):
    model, tokenizer = student(model_folder())
    name = weights_fingerprint(model)
    assert len(name) == 64
    export_student(model, tokenizer, tmp_path / "copy")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert weights_fingerprint(copied) == name
    for parameter in copied.parameters():
        value = parameter.view(-1)[-1].clone()
        parameter.view(-1)[-1] = torch.nextafter(value, torch.tensor(9e9))
        assert weights_fingerprint(copied) != name
        parameter.view(-1)[-1] = value
    assert weights_fingerprint(copied) == name
    assert weights_fingerprint(copied.bfloat16()) != name
    model.config.rope_parameters["rope_theta"] = 5.0
    assert weights_fingerprint(model) != name


def test_tied_weights_count_once(tied_folder):
    model, _ = student(tied_folder)
    report = parameter_report(model)
    assert report["head"].total == 0
    assert report["total"].total == sum(parameter.numel() for parameter in model.parameters())
    assert report["total"].bytes == 4 * report["total"].total


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_that_rewrite_the_base_are_exported_as_trained(model_folder, tmp_path, kind, merge):
    """A checkpoint holds the adapter alone: the weights under it are made again, after other random draws."""
    spec = StudentSpec(model_folder(hidden=32), lora=LoraSpec(rank=2, config={"init_lora_weights": kind}))
    trained, _ = build_student(spec)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    kept = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again, tokenizer = build_student(spec)
    assert torch.equal(torch.get_rng_state(), before) or kind == "olora"
    again.load_state_dict(kept, strict=False)
    folder = export_student(again.eval(), tokenizer, tmp_path / "x", merge=merge)
    load = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    ids = torch.arange(8)[None]
    expected = trained.eval()(ids).logits
    torch.testing.assert_close(load.from_pretrained(folder)(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prune", [None, PruneSpec(layers=1, by="even")])
@pytest.mark.parametrize("merge", [True, False])
def test_the_exported_config_ends_at_the_templates_end_of_turn(model_folder, tmp_path, merge, prune):
    """A base model's config names the end of a document only, and chats would never stop."""
    lora = None if merge else LoraSpec(rank=2)
    model, tokenizer = student(model_folder(), lora=lora, prune=prune)
    end = tokenizer.convert_tokens_to_ids("<|system|>")  # any special token that isn't the eos
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|system|>'")
    live = copy.deepcopy(base_model(model).generation_config.to_dict())
    folder = export_student(model, tokenizer, tmp_path / "out", merge=merge)
    assert base_model(model).generation_config.to_dict() == live
    if merge or prune is not None:
        config = GenerationConfig.from_pretrained(folder if merge else folder / "base")
        assert config.eos_token_id == sorted({live["eos_token_id"], tokenizer.eos_token_id, end})
    else:
        assert not (folder / "generation_config.json").exists()
