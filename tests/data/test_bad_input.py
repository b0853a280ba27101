"""Whatever is wrong with a record is one sentence with its file, line and key, or a count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import StudentSpec

GOOD = '{"messages": [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]}'
TURN = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", %s}]}'
BAD = {  # line -> what the sentence says, what it is counted under
    '{"messages": [': ("Malformed JSON", "malformed JSON"),
    '{"a": ' * 100_000: ("nested too deep", "malformed JSON"),
    '{"messages": 1' + "0" * 5000 + "}": ("can't be read", "malformed JSON"),
    "[1, 2]": ("list instead of a JSON object", "not an object"),
    '"text"': ("str instead of a JSON object", "not an object"),
    '{"messages": {"role": "user"}}': ("'messages' that isn't a list", "'messages' is no list"),
    '{"messages": [{"speaker": "user", "content": "a"}]}': ("its keys: speaker, content", "no role"),
    '{"messages": [{"role": "robot", "content": "a"}]}': ("unknown role 'robot'", "unknown role"),
    '{"messages": [{"role": "user", "content": 3}]}': ("content isn't text", "content is not text"),
    '{"messages": [{"role": "user", "content": "a"}]}': ("no response", "no response"),
    '{"messages": [{"role": "assistant", "content": "a"}]}': ("no prompt", "no prompt"),
    TURN % '"weight": 2': ("message weight 2", "message weight"),
    TURN % '"weight": 0': ("every weight is 0", "nothing to learn"),
    TURN % '"tool_calls": [3]': ("'tool_calls' that aren't", "'tool_calls' is no list"),
    TURN % '"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]': (
        "a tool call's 'arguments' that is no JSON",
        "malformed JSON in a field",
    ),
    GOOD[:-1] + ', "tools": "{"}': ("'tools' that is no JSON", "malformed JSON in a field"),
    GOOD[:-1] + ', "tools": [1]}': ("'tools' that aren't", "'tools' is no list"),
    GOOD[:-1] + ', "system": ["x"]}': ("a 'system' that is list", "'system' is not text"),
    GOOD.replace("Say a.", "REFUSE"): (
        r"refuses the conversation at .* \(no\)",
        "refused by the chat template",
    ),
    GOOD.replace("Say a.", "DIVIDE"): (r"refuses the conversation at ", "refused by the chat template"),
    GOOD.replace("Say a.", "LEAVE"): ("leaves out a user message", "left out by the chat template"),
}
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'REFUSE' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.content == 'DIVIDE' %}{{ 1 // 0 }}{% endif %}{% endfor %}"
) + CHAT_TEMPLATE.replace("{{ m['content'] }}", "{% if m.content != 'LEAVE' %}{{ m.content }}{% endif %}")


@pytest.fixture
def make(model_folder, tmp_path: Path):
    def build(path: Path, **arguments) -> InstructionDataModule:
        student = StudentSpec(model_folder(), chat_template=TEMPLATE)
        cache = str(tmp_path / "cache")
        return InstructionDataModule(str(path), student=student, cache_dir=cache, **arguments)

    return build


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_one_sentence_with_file_and_line(make, tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UserError, match=BAD[line][0]) as caught:
        make(path).examples("train")
    assert "data.jsonl:2" in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_invalid_records_are_left_out_and_counted(make, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{line}\n{GOOD}\n" for line in [GOOD, *BAD]))
    dm = make(path, skip_invalid=True)
    assert len(dm.examples("train")) == len(BAD) + 2
    report = dm.report["train"]
    expected: dict[str, int] = {}
    for _, reason in BAD.values():
        expected[f"skipped: {reason}"] = expected.get(f"skipped: {reason}", 0) + 1
    assert {
        name: number for name, number in report.items() if name.startswith("skipped") and number
    } == expected
    assert report["read"] == 2 * len(BAD) + 2
    assert [example.line for example in dm.examples("train")][-1] == 2 * len(BAD) + 2


def test_rows_of_a_table_with_other_columns(make, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\na,b\nc\nd,e,f\ng,h\n")
    with pytest.raises(UserError, match=r"data\.csv:3 has another number of columns"):
        make(path).examples("train")
    dm = make(path, skip_invalid=True)
    assert [example.response for example in dm.examples("train")] == ["b", "h"]
    assert dm.report["train"]["skipped: another number of columns"] == 2


def test_a_value_that_can_be_read_but_not_written_is_nested_too_deep(make, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    tools: list[object] = [{"name": "f"}]
    for _ in range(300):
        tools = [{"name": "f", "parameters": tools}]
    path.write_text(GOOD[:-1] + f', "tools": {json.dumps(tools)}}}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1 is nested too deep"):
        make(path).examples("train")
