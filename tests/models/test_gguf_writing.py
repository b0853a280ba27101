"""GGUF files of students, read back by transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dskd_lightning.errors import UserError
from dskd_lightning.models.gguf_writing import write_gguf

pytest.importorskip("gguf")
TEXT = "The quick brown fox, naïve café 12345 🙂\n  def add(a, b): <|end|>"


def student(kind: str, vocabulary: int, tied: bool) -> PreTrainedModel:
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
    }  # fmt: skip
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    extra = {"head_dim": 128} if kind == "qwen3" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[kind](**sizes, **extra)).eval()
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_file_read_back_has_the_logits_and_tokens_of_the_student(tmp_path, kind, tied) -> None:
    tokenizer = make_tokenizer("bpe", 400)
    model = student(kind, len(tokenizer), tied)
    path = write_gguf(model, tokenizer, tmp_path / "student.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    expected, got = model(ids).logits, again(ids).logits
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)  # float16 weights
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    vocabulary = read.get_vocab()
    assert {token: vocabulary[token] for token in tokenizer.get_vocab()} == tokenizer.get_vocab()
    assert read.chat_template == tokenizer.chat_template
    assert again.config.tie_word_embeddings == tied or not tied


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([Regex(_LETTERS + r"\p{N}" + _REST)], "qwen2"),
        ([Regex(_LETTERS + r"\p{N}{1,3}" + _REST)], "llama-bpe"),
        ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()], None),
    ],
)
def test_the_way_of_cutting_text_has_llama_cpps_name(tmp_path, cut, name) -> None:
    from gguf import GGUFReader

    tokenizer = make_tokenizer("bpe", 400)
    if isinstance(cut[0], Regex):
        cut = [pre_tokenizers.Split(cut[0], "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = cut[0] if len(cut) == 1 else pre_tokenizers.Sequence(cut)
    model, path = student("llama", len(tokenizer), True), tmp_path / "x.gguf"
    if name is None:
        with pytest.raises(UserError, match="isn't known"):
            write_gguf(model, tokenizer, path)
        return
    write_gguf(model, tokenizer, path)
    assert GGUFReader(path).get_field("tokenizer.ggml.pre").contents() == name


def test_kinds_that_cannot_be_written_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="a gpt2 model can't be written"):
        write_gguf(make_model(400, 16, 1, "gpt2"), make_tokenizer("bpe", 400), tmp_path / "x.gguf")
    with pytest.raises(UserError, match="only tokenizers of byte-level BPE"):
        write_gguf(student("llama", 400, True), make_tokenizer("sentencepiece", 400), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
