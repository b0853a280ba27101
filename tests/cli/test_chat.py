"""Talking to runs, their teacher and other models: what each reads and says, in terminals and pipes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time

import pytest
import yaml
from rich.console import Console
from tiny_runs import environment, write_config

from dskd_lightning.cli import chat_command, main
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Message
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.chat import Speaker
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.launch.trained import load_trained, specs_of
from dskd_lightning.models.loading import load_model
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.models.tokenizer import load_tokenizer

SETTINGS = GenerationSettings(max_new_tokens=6)
SHORT = {
    "model.objective": {"class_path": "dskd_lightning.objectives.SFTObjective"},
    "trainer.max_steps": 2, "trainer.max_epochs": -1, "data.val_split": 0,
}  # fmt: skip


def speaker(folder: str, name: str = "tiny", settings: GenerationSettings = SETTINGS, **options) -> Speaker:
    spec = ModelSpec(folder)
    tokenizer = load_tokenizer(spec)
    return Speaker(name, Generator(load_model(spec), tokenizer, settings), ChatRenderer(tokenizer), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("chat")
    config = write_config(
        folder, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"trainer.max_epochs": 1, "data.system": "Be brief."},
    )  # fmt: skip
    assert main(["fit", "--config", str(config)]) == 0
    return folder / "run"


@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_streamed_grows_into_what_generation_gives(model_folder, seed) -> None:
    one = speaker(model_folder(seed=1), system="Be kind.")
    told: list[str] = []
    first = one.answer("hello", told.append, seed)
    asked = [Message("system", "Be kind."), Message("user", "hello")]
    expected = one.generator.answers([one.renderer.generation_prompt(asked)], seed=seed, indices=[1])[0]
    assert first == told[-1] == expected.text
    assert len(told) >= len(set(told)) > 1
    second = one.answer("and then?", told.append, seed)
    asked += [Message("assistant", first), Message("user", "and then?")]
    assert one.renderer.generation_prompt(asked) == one.renderer.generation_prompt(
        [Message("system", "Be kind."), *one.messages[:-1]]
    )
    assert one.messages[-1].content == second


def test_old_turns_are_forgotten_where_there_is_no_room(model_folder, caplog) -> None:
    one = speaker(model_folder(seed=1))
    one.generator.model.config.max_position_embeddings = 70
    for number in range(6):
        one.answer(f"question number {number}", lambda _: None)
        assert len(one.renderer.generation_prompt(one.messages[:-1])) <= 70 - SETTINGS.max_new_tokens
    assert "forgets the oldest turns" in caplog.text
    assert one.messages[0].role == "user"
    before = list(one.messages)
    with pytest.raises(UserError, match=r"has room for 64 tokens beside an answer of 6, .*--max_new_tokens"):
        one.answer("long " * 80, lambda _: None)
    assert one.messages == before


def test_an_interrupted_answer_was_never_asked_for(model_folder) -> None:
    one = speaker(model_folder(seed=1))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.answer("hello", interrupt)
    assert one.messages == []


def test_where_one_is_interrupted_none_remembers(model_folder) -> None:
    speakers = [speaker(model_folder(seed=seed), f"model {seed}") for seed in (1, 2)]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    chat_command.chat(speakers, ["hi"], None, console)
    before = [list(one.messages) for one in speakers]
    speakers[1].generator.stream = interrupt  # type: ignore[method-assign]
    chat_command.chat(speakers, ["and then?"], None, console)
    assert [one.messages for one in speakers] == before
    assert "none of them remembers" in console.file.getvalue()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_question_without_room_is_asked_of_nobody_and_the_chat_goes_on(
    model_folder, capsys, caplog
) -> None:
    speakers = [speaker(model_folder(seed=seed), f"model {seed}") for seed in (1, 2)]
    speakers[1].generator.model.config.max_position_embeddings = 70
    console = Console(file=io.StringIO(), width=100)
    assert chat_command.chat(speakers, ["hi", "long " * 80, "again"], None, console) == 1
    for one in speakers:
        assert [m.content for m in one.messages if m.role == "user"] == ["hi", "again"]
    assert "model 2 has room for 64 tokens" in caplog.text
    speakers[1].generator.model.config.max_position_embeddings = 6
    with pytest.raises(UserError, match=r"answers of 6 leave no room .*lower --max_new_tokens"):
        speakers[1].room()
    with pytest.raises(UserError, match=r"reads 512 tokens in all.*leave no room"):
        chat_command.open_speakers([model_folder(seed=1)], GenerationSettings(max_new_tokens=600))


class Talkative:
    """A model that writes 150 words."""

    def __init__(self, name: str) -> None:
        self.name, self.messages = name, []

    def answer(self, question, told, seed):
        for count in range(1, 151):
            told(" ".join(f"{self.name}{i}" for i in range(count)))
            time.sleep(0.01)
        return " ".join(f"{self.name}{i}" for i in range(150))


def screen(written: str, height: int) -> list[str]:
    """The lines that a terminal holds, those above its screen included, which nothing can change."""
    lines, at, top = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
            top = max(top, len(lines) - height)
        elif part.endswith("A") and part.startswith("\x1b"):
            at = max(top, at - int(part[2:-1]))
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[at] = ""
        elif part[0] not in "\x1b\r":
            lines[at] += part
    return lines


def test_answers_longer_than_the_screen_are_shown_once_and_whole() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=12, color_system=None, legacy_windows=False
    )
    chat_command.chat([Talkative("one"), Talkative("two")], ["hi"], None, console)
    written = console.file.getvalue()
    lines = screen(written, 12)
    assert sum("┏" in line for line in lines) == 1
    words = re.findall(r"(?:one|two)\d+", " ".join(lines))
    assert sorted(words) == sorted(f"{name}{i}" for name in ("one", "two") for i in range(150))
    assert "…" in written  # what didn't fit while it was written


def test_a_terminal_shows_all_side_by_side_and_commands_work(model_folder) -> None:
    speakers = [speaker(model_folder(seed=seed), f"model {seed}\x1b[31m") for seed in (1, 2)]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    chat_command.chat(speakers, ["hi", "/what", "/reset", "hello", "/quit", "never"], None, console)
    shown = console.file.getvalue()
    assert "model 1" in shown
    assert "model 2" in shown
    assert "\x1b[31m" not in shown  # names and answers are models' and users' text
    assert "no command '/what'" in shown
    assert [message.content for message in speakers[0].messages if message.role == "user"] == ["hello"]


def test_a_run_speaks_as_it_was_trained_and_so_does_its_teacher(run, model_folder, capsys) -> None:
    speakers = chat_command.open_speakers([str(run), "teacher", model_folder(seed=3)], SETTINGS)
    assert [one.system for one in speakers] == ["Be brief.", "Be brief.", None]
    student, _ = load_trained(run)
    ours = dict(speakers[0].generator.model.state_dict())
    assert all((value == ours[name]).all() for name, value in student.state_dict().items())
    assert speakers[1].generator.model.config.hidden_size == 24
    assert specs_of(run)[1][0].source == model_folder(hidden=24, seed=2)
    assert main(["chat", str(run), "teacher", "--prompt", '["hello"]', "--max_new_tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"{run}: ")
    assert lines[-1].startswith("teacher: ")


def test_a_run_without_a_best_checkpoint_speaks_with_its_last(tmp_path, model_folder, capsys) -> None:
    config = write_config(tmp_path, model_folder(seed=1), None, **SHORT)
    assert main(["fit", "--config", str(config)]) == 0
    run = tmp_path / "run"
    capsys.readouterr()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert main(["chat", str(run), "--prompt", "hello", "--max_new_tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{run}: ")
    assert "last.ckpt, since no validation has chosen a best one" in " ".join(said.err.split())
    assert main(["export", str(run), str(tmp_path / "student")]) == 0
    assert json.loads((tmp_path / "student/distillation.json").read_text())["checkpoint"] == "last.ckpt"
    capsys.readouterr()
    assert main(["chat", str(run), "--prompt", "hello", "--ckpt_path", "best"]) == 2
    assert "best.ckpt does not exist; `--ckpt_path last` is there." in capsys.readouterr().err
    (run / "checkpoints/last.ckpt").unlink()
    assert main(["export", str(run), str(tmp_path / "other")]) == 2
    assert "neither best.ckpt nor last.ckpt" in capsys.readouterr().err


def test_a_pipe_asks_line_by_line(model_folder) -> None:
    command = [sys.executable, "-m", "dskd_lightning", "chat", model_folder(seed=1), "--max_new_tokens=3"]
    asked = b"hello\n\n\xff\xfe\n" + b"long " * 400 + b"\nagain\n"
    done = subprocess.run(command, input=asked, capture_output=True, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stdout.decode().count(f"{model_folder(seed=1)}: ") == 3
    assert "Traceback" not in (said := done.stderr.decode())
    assert said.count("has room for 509 tokens") == 1


def test_mistakes_are_one_sentence(run, model_folder, capsys, tmp_path) -> None:
    assert main(["chat", "teacher", model_folder(seed=1)]) == 2
    assert "name a run folder too" in capsys.readouterr().err
    assert main(["chat", str(run), str(run)]) == 2
    assert "named twice" in capsys.readouterr().err
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["teacher"]["log_probabilities"] = "scores"
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only log-probabilities are known"):
        chat_command.open_speakers(["teacher", str(tmp_path)], SETTINGS)
