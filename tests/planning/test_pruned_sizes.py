"""The table by which a user chooses how much to cut, and the folder that is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dskd_lightning import UserError
from dskd_lightning.cli.main import main
from dskd_lightning.models.layer_choice import rank_layers
from dskd_lightning.models.pruning import prune_layers
from dskd_lightning.planning import pruned_sizes
from dskd_lightning.planning.pruned_sizes import PruningStudy


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Say {n} twice.", "response": f"{n} and {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("by", ["influence", "perplexity", "even"])
def test_sizes_are_measured_on_text_that_chose_nothing(model_folder, data, by) -> None:
    study = PruningStudy(model_folder(layers=4), data, by, examples=32)
    chosen, measured = ({tuple(row.tolist()) for b in part for row in b.input_ids}
                        for part in (study._choosing, study._measuring))  # fmt: skip
    assert len(chosen) == len(measured) == 16
    assert not chosen & measured
    found = dict(zip((4, 3, 2), study.sizes([4, 3, 2]), strict=True))
    for count, (size, model) in found.items():
        if by == "even":
            kept = {4: [0, 1, 2, 3], 3: [0, 2, 3], 2: [0, 3]}[count]
        else:
            kept = rank_layers(study.model, by, study._choosing).kept(count)
        assert list(size.layers) == kept
        expected = prune_layers(study.model, kept)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in study._measuring:
                logits = expected(batch.input_ids, attention_mask=batch.attention_mask).logits.double()
                total += float(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"))
                tokens += int((batch.labels != -100).sum())
        assert size.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert size.parameters == model.num_parameters()
        assert size.bytes == 4 * size.parameters
        assert size.tokens_per_second > 0


def test_the_command_shows_sizes_and_writes_one(model_folder, data, tmp_path, capsys) -> None:
    source, folder = model_folder(layers=4), tmp_path / "student"
    table = ["prune", source, data, "--sizes", "[3]", "--examples", "32"]
    assert main(table) == 0
    assert "perplexity" in (shown := capsys.readouterr().out)
    assert [line.split()[0] for line in shown.splitlines() if "layers:" in line] == ["4", "3"]
    assert main([*table, "--output", str(folder), "--layers", "2", "--intermediate_size", "8"]) == 0
    said = json.loads((folder / "pruning.json").read_text())
    rows = [(len(size["layers"]), size["intermediate_size"]) for size in said["sizes"]]
    assert rows == [(4, None), (4, 8), (3, 8), (2, 8)]
    assert f"2 layers written to {folder}: {said['layers']}" in capsys.readouterr().out
    written = AutoModelForCausalLM.from_pretrained(folder)
    assert (written.config.num_hidden_layers, written.config.intermediate_size) == (2, 8)
    whole = AutoModelForCausalLM.from_pretrained(source)
    for position, index in enumerate(said["layers"]):
        for name in ("self_attn.q_proj.weight", "input_layernorm.weight"):
            kept = written.get_parameter(f"model.layers.{position}.{name}")
            assert torch.equal(kept, whole.get_parameter(f"model.layers.{index}.{name}"))
    assert main([*table, "--output", str(folder), "--layers", "2"]) == 2
    assert "isn't empty" in capsys.readouterr().err


def test_a_size_is_shown_without_a_folder_and_data_have_a_name(model_folder, data, capsys) -> None:
    prune = ["prune", model_folder(layers=4), "--examples", "32"]
    assert main([*prune, "--layers", "2", "--data", data]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "layers:" in line] == ["4", "2"]
    assert "--output FOLDER --layers 2" in shown
    assert main([*prune, f"--data={data}", "--sizes", "[4]", "--intermediate_size", "8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["4"]]
    whole, _, narrow = rows[1], rows[0], rows[2]
    assert (whole[1], narrow[1]) == ("all", "8")
    study = PruningStudy(model_folder(layers=4), data, examples=32)
    assert float(whole[-1]) == pytest.approx(study.whole().perplexity, abs=0.01)
    with pytest.raises(SystemExit):
        main([*prune, data, "--data", data])
    assert f"unrecognized arguments: {data}" in capsys.readouterr().err


def test_scores_are_json(model_folder, data, tmp_path, capsys) -> None:
    command = ["prune", model_folder(layers=4), data, "--examples", "32", "--by", "perplexity"]
    folder = tmp_path / "student"
    assert main([*command, "--sizes", "[2]", "--layers", "2", "--output", str(folder)]) == 0
    said = json.loads((folder / "pruning.json").read_text(), parse_constant=pytest.fail)
    assert [score is None for score in said["scores"]] == [index in said["layers"] for index in range(4)]


def test_an_impossible_width_is_found_before_layers_are_ranked(model_folder, data, monkeypatch) -> None:
    monkeypatch.setattr(pruned_sizes, "rank_layers", lambda *_: pytest.fail("ranked"))
    with pytest.raises(UserError, match="between 1 and the model's 32"):
        list(PruningStudy(model_folder(layers=4), data, examples=32, intermediate_size=33).sizes([2]))


def test_what_cannot_be_cut_is_one_sentence(model_folder, data, tmp_path, capsys) -> None:
    source = model_folder(layers=4)
    for options, sentence in (
        (["--output", str(tmp_path / "out")], "say with --layers how many are written"),
        (["--output", str(tmp_path / "out"), "--layers", "0"], "must lie between 1 and the model's 4 layers"),
        (["--sizes", "[5]"], "must lie between 1 and the model's 4 layers"),
        (["--examples", "8"], "none is left to measure on"),
        (["--examples", "-5"], "none is left to measure on"),
        (["--examples", "0"], "none is left to measure on"),
    ):
        assert main(["prune", source, data, *options]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_usual_sizes_go_down_to_a_third(model_folder, data) -> None:
    study = PruningStudy(model_folder(layers=4), data, examples=32)
    assert study.usual_sizes() == [4, 3, 2, 1]
    with pytest.raises(UserError, match="between 1 and"):
        list(study.sizes([0]))
