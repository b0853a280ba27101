"""What `dskd data` shows is what training reads."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dskd_lightning.cli.main import main
from dskd_lightning.data import DataPreview, InstructionDataModule
from dskd_lightning.models.spec import StudentSpec, TeacherSpec

HOSTILE = "<script>alert(1)</script> [bold red]x[/] \x1b[31m & naïve 🙂"
RECORDS = [
    {"instruction": f"Say {HOSTILE}", "input": "", "output": HOSTILE, "category": "qa"},
    {"instruction": "Long", "input": "", "output": "apples and pears " * 60},
    {"instruction": "Third", "input": "", "output": "plums"},
]


@pytest.fixture
def make(model_folder, tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "p.jsonl").write_text('{"instruction": "Answer me"}\n')

    def build(**arguments) -> InstructionDataModule:
        defaults = {
            "train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            "predict": str(tmp_path / "p.jsonl"),
            "student": StudentSpec(model_folder()),
            "teacher": TeacherSpec(model_folder(tokenizer="sentencepiece", add_bos=True)),
            "max_length": 160,
            "max_prompt_length": 120,
            "cache_dir": str(tmp_path / "cache"),
        }
        return InstructionDataModule(**{**defaults, **arguments})

    return build


def shown(preview: DataPreview, width: int = 4000) -> str:
    console = Console(width=width, record=True, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(preview.rich())
    return capture.get()


def test_each_model_reads_prompt_and_response(make, tmp_path: Path) -> None:
    dm = make()
    preview = dm.preview(records=2)
    stage = preview.stages["train"]
    assert [(file.name, file.examples) for file in stage.files] == [
        (str(tmp_path / name), 3) for name in ("a.jsonl", "b.jsonl")
    ]
    assert [record.place for record in stage.files[0].records] == [
        f"{tmp_path / 'a.jsonl'}:{line}" for line in (1, 2)
    ]
    assert stage.counts["unused field 'category' of " + str(tmp_path / "a.jsonl")] == 1
    assert stage.counts["truncated responses"] == 2
    student, teacher = stage.files[0].records[0].readings
    for reading, start in ((student, "<|user|>\n"), (teacher, "<|user|> \n")):
        (turn,) = reading.turns
        assert turn.prompt.removeprefix("<|bos|>").startswith(f"{start}Say {HOSTILE}<|end|>")
        assert turn.tokens[-1] == "<|end|>"
        assert reading.tokens <= 160
    said = "".join(student.turns[0].tokens[:-1])
    said = said.replace("\\xf0\\x9f\\x99\\x82", "🙂")  # four tokens of a byte each
    assert said == HOSTILE.replace(" ", "␣").replace("\x1b", "\\x1b")


def test_marks_are_those_of_the_bytes(make) -> None:
    dm = make()
    record = dm.preview(1).stages["train"].files[0].records[0]
    spans = [dm.examples("train").dataset.rendered(0, model).spans[0] for model in (0, 1)]
    for own, other, reading in zip(spans, spans[::-1], record.readings, strict=True):
        (turn,) = reading.turns
        borders = set(zip(other.starts.tolist(), other.ends.tolist(), strict=True))
        for at, state in enumerate(turn.states[:-1]):
            known = not own.unknown[at] and own.ends[at] > own.starts[at]
            if state == "exact":
                assert (own.starts[at], own.ends[at]) in borders
            elif state == "none" and known:
                covered = [
                    i
                    for i in range(len(other))
                    if other.ends[i] > own.starts[at] and other.starts[i] < own.ends[at]
                ]
                assert any(other.unknown[i] for i in covered) or not covered
        assert turn.states[-1] == "exact"
        assert {"exact", "group"} <= set(turn.states)


def test_counts_lengths_and_shares(make) -> None:
    dm = make()
    stage = dm.preview().stages["train"]
    for model, found in enumerate(stage.lengths):
        rendered = [dm.examples("train").dataset.rendered(row, model) for row in range(6)]
        sizes = sorted(len(tokens) + 1 for tokens in rendered)
        assert (found.shortest, found.longest, found.total) == (sizes[0], sizes[-1], sum(sizes))
        learnt = sum(len(tokens.response) for tokens in rendered)
        assert found.response_share == pytest.approx(learnt / sum(sizes))


def test_nothing_of_the_data_steers_the_terminal_or_the_page(make) -> None:
    preview = make().preview()
    text = shown(preview)
    # Rich's own colours end in "m"; the record's escape sequence is shown as text.
    assert "\x1b[31m &" not in text
    assert "\\x1b" in text
    assert "[bold red]x[/]" in re.sub(r"\x1b\[[\d;]*m", "", text)
    page = preview._repr_html_()
    assert "<script" not in page
    assert "\x1b" not in page
    assert html.escape("Say <script>alert(1)</script>") in page
    assert html.unescape(page).count("alert(1)") >= 4


def test_a_narrow_terminal_without_colours_shows_the_borders(make) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(make().preview(1).rich())
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    assert all(mark in text for mark in "│┊")
    assert "to be answered" in text
    assert text.count("…") == 2  # of that; nothing is cut to fit


def test_several_turns_and_teachers_and_none(make, model_folder, tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "apples"), ("user", "b"), ("assistant", "plums"))
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    same = TeacherSpec(model_folder(seed=1))
    other = TeacherSpec(model_folder(tokenizer="unigram"))
    preview = make(train=str(tmp_path / "m.jsonl"), teacher=[same, other]).preview()
    (record,) = preview.stages["train"].files[0].records
    assert [len(reading.turns) for reading in record.readings] == [2, 2, 2]
    assert ["".join(turn.tokens) for turn in record.readings[0].turns] == ["apples<|end|>", "plums<|end|>"]
    assert {state for turn in record.readings[0].turns for state in turn.states} == {"exact"}
    assert "<|assistant|>" in record.readings[0].turns[1].prompt
    alone = make(train=str(tmp_path / "m.jsonl"), teacher=None).preview()
    (turn, _) = alone.stages["train"].files[0].records[0].readings[0].turns
    assert (turn.groups, turn.states) == ((), ())
    assert "apples" in re.sub(r"\x1b\[[\d;]*m|│", "", shown(alone))


def test_documents_and_everything(make, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "apples and pears " * 40}) + "\n")
    stage = make(train=str(tmp_path / "d.jsonl")).preview(2).stages["train"]
    first, second = stage.files[0].records
    assert stage.files[0].examples == stage.counts["used"] > 2
    assert stage.lengths[0].response_share > 0.9
    assert "".join(second.readings[0].turns[0].tokens).startswith(("␣", "a", "p"))
    assert first.place == second.place == f"{tmp_path / 'd.jsonl'}:1"
    preview = make(learn="everything").preview(1)
    (record,) = preview.stages["train"].files[0].records
    for reading in record.readings:
        assert len(reading.turns) == 2
        assert all(turn.tokens[-1] == "<|end|>" for turn in reading.turns)


def test_the_command_prints_and_writes(model_folder, tmp_path: Path, capsys) -> None:
    from tiny_runs import write_config

    config = write_config(tmp_path, model_folder(), model_folder(tokenizer="sentencepiece"))
    found, page = tmp_path / "data.json", tmp_path / "data.html"
    assert main(["data", str(config), "--records", "2", "--json", str(found), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "number" in printed
    assert "exact pairs" in printed
    values = json.loads(found.read_text())
    assert set(values["stages"]) == {"train", "val", "test"}
    assert len(values["stages"]["train"]["files"][0]["records"]) == 2
    assert page.read_text().startswith("<!doctype html>")
    assert main(["data", str(config), "--records", "-1"]) == 2
