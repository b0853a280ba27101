"""A model that writes under autocast casts its weights once; what it writes is the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_lightning.generation import cast_weights as cast_file
from dskd_lightning.generation import generator as generator_file
from dskd_lightning.generation.cast_weights import cast_weights
from dskd_lightning.generation.generator import GenerationSettings, Generator

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(params=["full", "lora", "dora"])  # which reads the weights of its layers itself
def model(request):
    model = make_model(len(make_tokenizer()))
    if request.param != "full":
        torch.manual_seed(0)
        settings = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(use_dora=request.param == "dora", **settings))
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


def test_the_models_weights_are_its_own_all_the_time(model) -> None:
    own = dict(model.named_parameters())
    values = {name: value.detach().clone() for name, value in own.items()}
    with contextlib.suppress(ZeroDivisionError), _autocast(), cast_weights(model):
        with torch.no_grad():
            model(torch.tensor(PROMPTS[:1]))
        assert all(value is own[name] for name, value in model.named_parameters())
        raise ZeroDivisionError
    for name, value in own.items():
        assert torch.equal(value, values[name])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_that_compute_without_autocast_do(model) -> None:
    class Apart(nn.Module):
        def __init__(self, layer) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, states):
            with torch.autocast("cpu", enabled=False):
                return self.layer(states.float())

    layer = nn.Linear(model.config.hidden_size, 5)
    model.apart = Apart(layer)
    states = torch.randn(2, model.config.hidden_size)
    expected = layer(states)
    with _autocast(), torch.no_grad(), cast_weights(model):
        assert torch.equal(model.apart(states), expected)
        assert layer(states).dtype == torch.bfloat16


def test_without_room_a_layer_casts_for_every_token(model, monkeypatch) -> None:
    with _autocast(), torch.no_grad():
        expected = _written(model)
        monkeypatch.setattr(cast_file, "_cast", _no_room)
        assert _written(model) == expected


def _no_room(*_):
    raise torch.OutOfMemoryError


def test_nothing_changes_without_autocast(model) -> None:
    with cast_weights(model):
        assert not any(map(_replaced, model.modules()))


def test_compiled_models_and_other_types_are_left_alone() -> None:
    model = make_model(len(make_tokenizer()))
    model.lm_head = model.lm_head.double()
    with _autocast(), cast_weights(model):
        assert not _replaced(model.lm_head)
    part = model.model.layers[0].mlp.up_proj
    part.weight = nn.Parameter(torch.zeros(3))  # as sharding leaves it
    with _autocast(), cast_weights(model):
        assert not _replaced(part)
        assert _replaced(model.model.layers[0].mlp.gate_proj)
    model.model.compile()
    with _autocast(), cast_weights(model):
        assert not any(map(_replaced, model.modules()))


def _replaced(module) -> bool:
    return "forward" in module.__dict__
