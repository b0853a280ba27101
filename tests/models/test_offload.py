"""Layers in the host's memory visit the device one after another, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gpu_checks.setup import Setup, finite
from pretended_gpu import PretendedGpu
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.models import TeacherSpec, load_teacher
from dskd_lightning.models.output import decoder_hidden, decoder_layers
from dskd_lightning.models.spec import FollowSpec
from dskd_lightning.structures import TokenBatch


def batch() -> TokenBatch:
    ids = torch.randint(4, 300, (3, 7))
    return TokenBatch(
        ids, ids, torch.ones_like(ids), torch.arange(7).expand(3, 7), torch.arange(21), torch.arange(21) // 7
    )


def places(model: torch.nn.Module) -> list[set[str]]:
    """Per layer, the devices of its weights and buffers."""
    return [
        {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())}
        for layer in decoder_layers(model)  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_those_of_the_whole_model_and_one_layer_at_a_time_is_there(model_folder, kind) -> None:
    folder, tokens = model_folder(kind=kind, layers=4), batch()
    whole = load_teacher(TeacherSpec(folder))
    on_cpu = decoder_hidden(whole, tokens)
    model = load_teacher(TeacherSpec(folder, offload=True))
    at_rest = [p for layer in decoder_layers(model) for p in layer.parameters()]
    seen: list[list[set[str]]] = []
    for layer in decoder_layers(model):
        next(iter(layer.children())).register_forward_hook(lambda *_: seen.append(places(model)))
    with PretendedGpu() as gpu:
        model.to("cuda")  # type: ignore[arg-type]
        moved = tokens.to("cuda")
        assert model.get_output_embeddings().weight.device.type == "cuda"
        assert model.get_input_embeddings().weight.device.type == "cuda"
        found = decoder_hidden(model, moved)
        gpu.stalls.clear()
        again = decoder_hidden(model, moved)
        assert not [stall for stall in gpu.stalls if "offload" in stall[1]], gpu.stalls
        wanted = decoder_hidden(whole.to("cuda"), moved).cpu()  # type: ignore[arg-type]
        found, again = found.cpu(), again.cpu()
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)
    torch.testing.assert_close(found, on_cpu)
    assert torch.equal(decoder_hidden(load_teacher(TeacherSpec(folder, offload=True)), tokens), on_cpu)
    assert places(model) == [{"cpu"}] * 4
    back = [p for layer in decoder_layers(model) for p in layer.parameters()]
    assert all(a is b for a, b in zip(at_rest, back, strict=True))
    assert seen[:4] == [[{"cuda"} if other == layer else {"cpu"} for other in range(4)] for layer in range(4)]


def test_types_follow_a_move_and_places_do_not(model_folder) -> None:
    tokens = batch()
    model = load_teacher(TeacherSpec(model_folder(), offload=True))
    names = [type(layer).__name__ for layer in decoder_layers(model)]
    assert names == ["LlamaDecoderLayer"] * 2
    model.to(torch.float64)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    wanted = load_teacher(TeacherSpec(model_folder())).to(torch.float64)  # type: ignore[arg-type]
    assert torch.equal(decoder_hidden(model, tokens), decoder_hidden(wanted, tokens))
    with PretendedGpu():
        model.to("cuda", torch.float32)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert places(model) == [{"cpu"}] * 2


def test_a_layer_that_fails_goes_home_and_a_copy_has_its_own_layers(model_folder) -> None:
    model, tokens = load_teacher(TeacherSpec(model_folder(), offload=True)), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in decoder_layers(twin).parameters():
            parameter.zero_()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = next(iter(decoder_layers(model)[1].children())).register_forward_hook(fail)
    with PretendedGpu():
        model.to("cuda")  # type: ignore[arg-type]
        twin.to("cuda")  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder_hidden(model, tokens.to("cuda"))
        assert places(model) == [{"cpu"}] * 2
        handle.remove()
        whole, zeros = (decoder_hidden(m, tokens.to("cuda")).cpu() for m in (model, twin))
    torch.testing.assert_close(whole, decoder_hidden(load_teacher(TeacherSpec(model_folder())), tokens))
    assert not torch.allclose(whole, zeros)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_with_an_offloaded_teacher_is_the_run_with_a_whole_one(cached: bool) -> None:
    setup, found = Setup("pretended"), []
    for offload in (False, True):
        with PretendedGpu():
            module, data = setup.run("ETA", cached=cached, teacher={"offload": offload})
            trainer = setup.trainer()
            trainer.fit(module, datamodule=data)
            trainer.validate(module, datamodule=data, verbose=False)
            weights: dict[str, Tensor] = {k: v.cpu() for k, v in module.state_dict().items()}
            found.append((weights, finite(trainer.callback_metrics)))
            if offload and not cached:
                assert places(module.teachers[0]) == [{"cpu"}]
    (weights, values), (others, more) = found
    assert values == more
    assert all(torch.equal(others[name], value) for name, value in weights.items())


def test_what_does_not_go_together_is_refused(model_folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave offload or quantization out"):
        load_teacher(TeacherSpec(model_folder(), offload=True, quantization="8bit"))
    setup = Setup("cpu")
    student = setup.source("bpe", 24, 2)
    follow = {"offload": True, "follow": FollowSpec()}
    module, data = setup.run("DSKD", teacher=follow)
    module.student_spec.source = student
    with pytest.raises(UserError, match="can't follow the student's: leave offload"):
        setup.trainer().fit(module, datamodule=data)
