"""Commands that README, documentation and configs show are parsed as by `dskd`, and links exist."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import typing
from pathlib import Path

import pytest
from test_configs import ParsedCLI

from dskd_lightning.cli import commands
from dskd_lightning.cli.main import main
from dskd_lightning.launch.arguments import run_function
from dskd_lightning.launch.configs import with_shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_BLOCK = re.compile(r"```(?:bash|text|console|shell)\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`(dskd [^`\n]+)`")
_PLACEHOLDER = re.compile(r"\bCOMMAND\b|\bFILE\b|\bBASE\.yaml\b")


def shown_commands() -> list[tuple[str, str]]:
    """``(file, command)`` of every complete command, comments behind it removed."""
    shown = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        shown += [(page.name, line) for line in [*lines, *_INLINE.findall(text)]]
    for config in CONFIGS:
        for line in config.read_text(encoding="utf-8").splitlines():
            if line.startswith("#") and (found := re.search(r"dskd (?:\w+) .*$", line)):
                shown.append((config.name, found[0].rstrip("`")))
    unique = {}
    for page, line in shown:
        words = shlex.split(line, comments=True)
        if words[:1] == ["dskd"] and len(words) > 2 and not _PLACEHOLDER.search(line):
            unique.setdefault(shlex.join(words), page)
    return [(page, command) for command, page in unique.items()]


SHOWN = shown_commands()


def test_every_command_is_shown_and_known() -> None:
    shown = {shlex.split(command)[1] for _, command in SHOWN}
    assert shown == {*TRAINER_COMMANDS, *commands.__all__}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[command for _, command in SHOWN])
def test_command_parses(page, command, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(command)
    if name in TRAINER_COMMANDS:
        if page.endswith(".yaml"):  # that these files combine is test_configs'
            assert all((ROOT / word).is_file() for word in arguments if word.endswith(".yaml"))
        else:
            _parse_trainer_command(arguments)
        return
    called = []
    function = getattr(commands, name)

    @functools.wraps(function)
    def record(*args: object, **kwargs: object) -> None:
        called.append(inspect.signature(function).bind(*args, **kwargs))

    run_function(record, arguments, prog=f"dskd {name}")
    assert len(called) == 1


def _parse_trainer_command(arguments: list[str]) -> None:
    """Read the configs that ship; a reader's own stands in as the quickstart."""
    words, own = [], False
    for word in arguments:
        if word.endswith(".yaml") and not (ROOT / word).is_file():
            assert not word.startswith("configs/"), f"{word} does not exist"
            word, own = "configs/quickstart.yaml", True
        words.append(word)
    resume = words.index("--ckpt_path") if "--ckpt_path" in words else None
    if resume is not None:
        words = words[:resume] + words[resume + 2 :]  # only the subcommands have it
    cli = ParsedCLI(args=with_shipped_configs(words), run=False)
    assert own or cli.config.output


@pytest.mark.parametrize("name", commands.__all__)
def test_help_lists_every_option(name, capsys) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([name, "--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    for option, kind in typing.get_type_hints(getattr(commands, name)).items():
        choices = ",".join(map(str, typing.get_args(kind)))
        assert option in text or f"{{{choices}}}" in text or option == "return"


def test_vocab_runs(model_folder, tmp_path, capsys) -> None:
    teacher, student = model_folder(tokenizer="sentencepiece"), model_folder()
    assert main(["vocab", teacher, student, "--json", str(tmp_path / "vocab.json")]) == 0
    assert (tmp_path / "vocab.json").is_file()


def test_print_config_is_complete(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/quickstart.yaml", "--print_config"])
    printed = capsys.readouterr().out
    for key in ("objective:", "teacher_cache:", "projector_lr:", "completions:", "save_every_n_steps:"):
        assert key in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_methods_page_names_every_objective() -> None:
    from dskd_lightning import objectives

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    abstract = {"Objective", "ObjectiveOutput", "CrossTokenizerObjective", "PairedObjective"}
    assert not [name for name in objectives.__all__ if name not in abstract and f"`{name}`" not in text]


def test_positional_lists_follow_the_other_arguments() -> None:
    def harness(folder: str, tasks: list[str], limit: int | None = None) -> tuple[str, list[str], int | None]:
        """Score."""
        return folder, tasks, limit

    assert run_function(harness, ["student", "arc_easy", "piqa", "--limit", "3"], "dskd") == (
        "student",
        ["arc_easy", "piqa"],
        3,
    )


def test_what_has_a_place_may_be_given_by_name() -> None:
    def command(action: str, count: int, *names: str) -> tuple[object, ...]:
        """Do."""
        return action, count, names

    for words in (
        ["show", "3", "a", "b"],
        ["--action", "show", "3", "a", "b"],
        ["--count=3", "--action", "show", "a", "b"],
    ):
        assert run_function(command, words, "dskd") == ("show", 3, ("a", "b"))

    def lists(config: list[str], records: int = 3) -> tuple[list[str], int]:
        """Do."""
        return config, records

    assert run_function(lists, ["--config", "a", "b", "--records", "2"], "dskd") == (["a", "b"], 2)


def test_booleans_need_no_value() -> None:
    def command(name: str, yes: bool = False, merge: bool = True) -> tuple[str, bool, bool]:
        """Do."""
        return name, yes, merge

    assert run_function(command, ["a", "--yes"], "dskd") == ("a", True, True)
    assert run_function(command, ["--yes", "--merge", "false", "a"], "dskd") == ("a", True, False)
    assert run_function(command, ["a", "--yes", "true", "--merge"], "dskd") == ("a", True, True)

    def bare(yes: bool = False) -> bool:
        """Do."""
        return yes

    assert run_function(bare, [], "dskd") is False
