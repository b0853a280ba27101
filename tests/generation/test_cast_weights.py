"""A model that writes under autocast casts its weights once; what it writes is the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_lightning.generation import generator as generator_file
from dskd_lightning.generation.cast_weights import cast_weights
from dskd_lightning.generation.generator import GenerationSettings, Generator

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(params=["full", "lora"])
def model(request):
    model = make_model(len(make_tokenizer()))
    if request.param == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    return model.float()


def _autocast():
    return torch.autocast("cpu", torch.bfloat16)


class _Casts(TorchDispatchMode):
    """Counts casts of the head's size, which a model has once."""

    def __init__(self, model) -> None:
        super().__init__()
        self.shape, self.count = model.get_output_embeddings().weight.shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and result.shape == self.shape
        self.count += cast and result.dtype == torch.bfloat16
        return result


def _written(model) -> list[tuple[int, ...]]:
    generator = Generator(model, make_tokenizer(), GenerationSettings(max_new_tokens=12))
    generator.stop_ids = []
    return [generation.ids for generation in generator.answers(PROMPTS, seed=3)]


def test_what_is_written_is_the_same_and_cast_once(model, monkeypatch) -> None:
    model.requires_grad_(False)  # autocast keeps no casts of these
    with _autocast(), torch.no_grad():
        with _Casts(model) as casts:
            found = _written(model)
        monkeypatch.setattr(generator_file, "cast_weights", lambda _: torch.autocast("cpu", torch.bfloat16))
        with _Casts(model) as plain:
            assert _written(model) == found
    assert casts.count == 1
    assert plain.count >= 12


def test_logits_are_the_same_bit_for_bit(model) -> None:
    ids = torch.tensor([PROMPTS[2]])
    with _autocast(), torch.no_grad():
        expected = model(ids).logits
        with cast_weights(model):
            assert torch.equal(model(ids).logits, expected)


def test_the_models_own_weights_come_back(model) -> None:
    own = dict(model.named_parameters())
    values = {name: value.detach().clone() for name, value in own.items()}
    with contextlib.suppress(ZeroDivisionError), _autocast(), cast_weights(model):
        linear = [module for module in model.modules() if type(module) is nn.Linear]
        assert {module.weight.dtype for module in linear} == {torch.bfloat16}
        assert not any(module.weight.requires_grad for module in linear)
        raise ZeroDivisionError
    found = dict(model.named_parameters())
    assert list(found) == list(own)
    for name, value in found.items():
        assert value is own[name]
        assert torch.equal(value, values[name])
    assert model.get_output_embeddings().weight is own[_head_name(model)]


def _head_name(model) -> str:
    head = model.get_output_embeddings().weight
    return next(name for name, value in model.named_parameters() if value is head)


def test_nothing_changes_without_autocast(model) -> None:
    with cast_weights(model):
        assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_compiled_models_and_other_types_are_left_alone() -> None:
    model = make_model(len(make_tokenizer()))
    model.lm_head = model.lm_head.double()
    with _autocast(), cast_weights(model):
        assert model.lm_head.weight.dtype == torch.float64
    part = model.model.layers[0].mlp.up_proj
    part.weight = nn.Parameter(torch.zeros(3))  # as sharding leaves it
    with _autocast(), cast_weights(model):
        assert part.weight.dtype == torch.float32
        assert model.model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16
    model.model.compile()
    with _autocast(), cast_weights(model):
        assert {value.dtype for value in model.parameters()} == {torch.float32, torch.float64}
