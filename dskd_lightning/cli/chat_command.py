"""`dskd chat`: talk to runs, models and their teacher side by side."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dskd_lightning.cli.chat_table import answers_table, room_for_answers
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.chat import Speaker, together
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.launch.arguments import read_yaml, settings_of
from dskd_lightning.launch.trained import load_trained, specs_of
from dskd_lightning.models.loading import load_model, load_teacher
from dskd_lightning.models.spec import ModelSpec, TeacherSpec
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.processor import in_a_computed_type, working_device
from dskd_lightning.runs.text import visible
from dskd_lightning.tokenizers import sanitize_text

__all__ = ["chat", "open_speakers", "typed"]

logger = logging.getLogger(__name__)

_HELP = "/reset starts anew, /quit (or the end of input) ends."


def open_speakers(
    models: Sequence[str], settings: GenerationSettings, ckpt_path: str | None = None
) -> list[Speaker]:
    """The models, each with the system message that it was trained with.

    Args:
        models: run folders, models as `ModelSpec.source` takes them, ``teacher`` for that of the first run.
        settings: how they answer.
        ckpt_path: ``best`` or ``last`` of runs; see `find_checkpoint`.

    Raises:
        UserError: a model can't be found or has no room for questions, or there is no run whose teacher could
            be meant.
    """
    device = working_device()
    runs = [model for model in models if (Path(model) / "config.yaml").is_file()]
    speakers = []
    for name in models:
        model: Any
        if name == "teacher":
            if not runs:
                raise UserError("dskd chat: `teacher` is that of a run: name a run folder too.")
            spec = _teacher(runs[0])
            model, tokenizer = load_teacher(spec), load_tokenizer(spec)
            renderer, system = ChatRenderer.from_spec(tokenizer, spec), spec.system or _system(runs[0])
        elif name in runs:
            model, tokenizer = load_trained(name, ckpt_path)
            renderer, system = ChatRenderer.from_spec(tokenizer, specs_of(name)[0]), _system(name)
        else:
            plain = ModelSpec(source=name)
            model, tokenizer = load_model(plain), load_tokenizer(plain)
            renderer, system = ChatRenderer.from_spec(tokenizer, plain), None
        if not getattr(model, "is_quantized", False):
            in_a_computed_type(model, device).to(device)
        speakers.append(Speaker(name, Generator(model.eval(), tokenizer, settings), renderer, system))
        speakers[-1].room()  # where there is none, that is told before anything is asked
    return speakers


def _teacher(run: str) -> TeacherSpec:
    teachers = specs_of(run)[1]
    if not teachers:
        raise UserError(f"dskd chat: {run} was trained without a teacher.")
    if teachers[0].absent:
        raise UserError(
            f"dskd chat: of {run}'s teacher only log-probabilities are known, which can't be talked to."
        )
    return teachers[0]


def _system(run: str) -> str | None:
    return cast("str | None", settings_of(read_yaml(Path(run) / "config.yaml"), "data").get("system"))


def chat(speakers: Sequence[Speaker], questions: Iterable[str], seed: int | None, console: Console) -> int:
    """Ask every speaker each question; answers appear as they are written.

    A question that one of them has no room for, or whose answers are interrupted, was never asked of any.

    Args:
        speakers: who answers, in this order.
        questions: one line each; ``/reset`` and ``/quit`` are commands.
        seed: samples with this seed; None decodes greedily.
        console: where the answers go: side by side in a terminal, else one below the other.

    Returns:
        How many questions had no room.
    """
    refused = 0
    for question in questions:
        line = sanitize_text(question).strip()
        if line == "/quit":
            break
        if line == "/reset":
            for speaker in speakers:
                speaker.forget()
        elif line.startswith("/"):
            console.print(f"There is no command {line!r}: {_HELP}", markup=False)
        elif line:
            try:
                with together(speakers):
                    _ask(speakers, line, seed, console)
            except KeyboardInterrupt:
                console.print("(interrupted: none of them remembers the question)")
            except UserError as error:
                refused += 1
                logger.error("%s", error)
    return refused


def _ask(speakers: Sequence[Speaker], question: str, seed: int | None, console: Console) -> None:
    answers = dict.fromkeys((speaker.name for speaker in speakers), "")
    if not console.is_terminal:
        for speaker in speakers:
            text = speaker.answer(question, lambda _: None, seed)
            console.print(Text(f"{visible(speaker.name)}: {visible(text)}"), soft_wrap=True)
        return
    # What has left the screen can't be drawn over: until all is written, answers show as much as fits.
    lines = room_for_answers(answers, console)
    with Live(console=console, refresh_per_second=12, vertical_overflow="crop") as live:
        try:
            for speaker in speakers:

                def told(text: str, name: str = speaker.name) -> None:
                    answers[name] = text
                    live.update(answers_table(answers, lines))

                told(speaker.answer(question, told, seed))
        finally:
            live.update(answers_table(answers))


def typed(console: Console) -> Iterator[str]:
    """The lines that somebody types, or that come through a pipe, until the input ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        console.print(_HELP)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
            return
