"""The head isn't copied for each prompt of a batch."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_lightning.generation import generator as generator_file
from dskd_lightning.generation.contiguous_head import contiguous_head
from dskd_lightning.generation.generator import GenerationSettings, Generator

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


class _BatchedHeads(TorchDispatchMode):
    """Counts products of which the second factor is a head for every row."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.bmm.default and args[1].shape[-1] == self.vocab
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_read_once_for_all_prompts(dtype, monkeypatch) -> None:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).to(dtype).requires_grad_(False)
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=4))
    with _BatchedHeads(model.get_output_embeddings().weight.shape[0]) as found:
        generator.answers(PROMPTS)
    assert found.count == 0
    assert not model.get_output_embeddings()._forward_pre_hooks
    monkeypatch.setattr(generator_file, "contiguous_head", lambda _: torch.no_grad())
    with _BatchedHeads(model.get_output_embeddings().weight.shape[0]) as plain:
        generator.answers(PROMPTS)
    assert plain.count > 0


def test_heads_of_other_kinds_are_left_alone() -> None:
    model = make_model(len(make_tokenizer()))
    states = torch.randn(3, 5, model.config.hidden_size)
    with torch.no_grad(), contiguous_head(model):
        assert model.lm_head(input=states).shape[:2] == (3, 5)
    model.get_output_embeddings = lambda: None
    with contiguous_head(model):
        assert not model.lm_head._forward_pre_hooks


def test_the_same_logits_of_a_slice() -> None:
    model = make_model(len(make_tokenizer())).double()
    states = torch.randn(3, 5, model.config.hidden_size, dtype=torch.float64)[:, -1:]
    head = model.get_output_embeddings()
    with torch.no_grad(), contiguous_head(model):
        assert torch.allclose(head(states), states @ head.weight.T)
