"""Tiny models and tokenizers made on the spot, and the reference folder where it is present."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # when torch is: forks of a process with threads hang
if "DSKD_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit the first process's folder
    os.environ["DSKD_CACHE_DIR"] = tempfile.mkdtemp(prefix="dskd-tests-")
    atexit.register(shutil.rmtree, os.environ["DSKD_CACHE_DIR"], ignore_errors=True)

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# The same examples every time, whatever else the machine does; `--hypothesis-profile search` tries new ones.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("tests")

SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE_DIR = Path(os.environ.get("DSKD_REFERENCE_DIR", SHARED / "reference"))
DATA_DIR = Path(os.environ.get("DSKD_DATA_DIR", SHARED / "data"))

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then 12345 more times.",
    "Instruction: name three fruits. Response: apples, pears and plums!",
    "def add(a, b):\n    return a + b  # naïve café résumé",
    "日本語のテキスト 🙂🙃 مرحبا بالعالم Привет, мир",
    "Below is an instruction that describes a task. Write a response.",
] * 4

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(kind: str, vocab_size: int, special: list[str]) -> Tokenizer:
    """A small tokenizer of one of the kinds bpe, sentencepiece, unigram, wordpiece."""
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", *special, *byte_tokens],
            limit_alphabet=60,
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=["<unk>", *special],
            unk_token="<unk>",
            show_progress=False,
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=["[UNK]", *special], show_progress=False
        )
    else:
        raise ValueError(kind)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_tokenizer(
    kind: str = "bpe", vocab_size: int = 400, add_bos: bool = False, chat: bool = True
) -> PreTrainedTokenizerFast:
    """A fast transformers tokenizer with eos, pad and (where wanted) bos and a chat template."""
    special = ["<|end|>", "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = train_tokenizer(kind, vocab_size, special)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocab_size: int, hidden: int = 16, layers: int = 2, kind: str = "llama") -> PreTrainedModel:
    """A two-layer Llama or GPT-2 with random weights."""
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    else:
        config = GPT2Config(
            vocab_size=vocab_size, n_embd=hidden, n_layer=layers, n_head=2, n_positions=512,
            bos_token_id=None, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A command line run in this process leaves its seed to later tests, whose forked ranks would take it.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


# As imports leave them: pytest's own handlers come to those that don't propagate before each test.
_LOGGERS = [logging.getLogger(n) for n in ("dskd_lightning", "lightning.pytorch", "lightning.fabric")]
_UNCONFIGURED = [(logger.level, logger.propagate, list(logger.handlers)) for logger in _LOGGERS]


def _unconfigure_loggers() -> None:
    for logger, (level, propagate, handlers) in zip(_LOGGERS, _UNCONFIGURED, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, list(handlers)


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    # A command line run in this process takes the loggers over, in a test or in a fixture of many tests:
    # later tests' ``caplog`` would see nothing, or everything twice.
    _unconfigure_loggers()
    yield
    _unconfigure_loggers()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``model_folder(kind=..., tokenizer=..., hidden=..., ...)`` -> a saved tiny model's folder."""
    made: dict[tuple, str] = {}

    def make(
        kind: str = "llama",
        tokenizer: str = "bpe",
        vocab_size: int = 400,
        hidden: int = 16,
        layers: int = 2,
        add_bos: bool = False,
        chat: bool = True,
        seed: int = 0,
    ) -> str:
        key = (kind, tokenizer, vocab_size, hidden, layers, add_bos, chat, seed)
        if key not in made:
            torch.manual_seed(seed)
            folder = tmp_path_factory.mktemp("model")
            fast = make_tokenizer(tokenizer, vocab_size, add_bos, chat)
            fast.save_pretrained(folder)
            make_model(len(fast), hidden, layers, kind).save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture
def poor_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` as on a Mac's GPU, which is how a device is asked."""
    empty = torch.empty

    def deny(*size, dtype=None, layout=torch.strided, **options):  # type: ignore[no-untyped-def]
        if dtype == torch.float64:
            raise TypeError("no float64")
        if layout != torch.strided:
            raise NotImplementedError("no sparse tensors")
        return empty(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", deny)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Values computed with the authors' own code; tests that read them skip where it is absent."""
    if not REFERENCE_DIR.is_dir():
        pytest.skip(f"no reference values at {REFERENCE_DIR} (set DSKD_REFERENCE_DIR)")
    return REFERENCE_DIR


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real instruction sets and tokenizers; tests that read them skip where it is absent."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"no data at {DATA_DIR} (set DSKD_DATA_DIR)")
    return DATA_DIR
