"""Responses of jobs that share the prompts are those of one job; what is missing or foreign is named."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from tiny_runs import dskd_fork, write_data

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.response_data import prompt_records, samples_folder, write_response_data
from dskd_lightning.evaluation.response_parts import answer_part
from dskd_lightning.generation.filtering import ResponseFilter
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.runs.lock import locked
from dskd_lightning.runs.parts import Part, missing_parts, number_ranges

SEEDS = [1, 2]


class Job:
    """Commands of one machine, which count what they generate."""

    def __init__(self, seed: int = 0, **settings: int) -> None:
        tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        model = make_model(len(tokenizer))
        self.generator = Counting(model, tokenizer, GenerationSettings(max_new_tokens=8, **settings))
        self.renderer = ChatRenderer(tokenizer)
        self.examples = [Example((Message("user", f"say {i}"),), source="data", line=i) for i in range(7)]

    def part(self, text: str, output: Path) -> int:
        records = prompt_records(self.renderer, self.examples)
        identity = weights_fingerprint(self.generator.model)
        return answer_part(
            self.generator, records, samples_folder(output), Part.parse(text), model_id=identity, seeds=SEEDS
        )

    def whole(self, output: Path, places: list[Path] | None = None) -> str:
        keep = ResponseFilter(likeliest=1)
        write_response_data(
            self.generator, self.renderer, self.examples, output, SEEDS, keep, {}, places=places
        )
        return output.read_text() + output.with_suffix(".meta.json").read_text()


class Counting(Generator):
    answered = 0

    def __call__(self, prompts, **options):
        for batch in super().__call__(prompts, **options):
            self.answered += len(batch)
            yield batch


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Job().whole(tmp_path_factory.mktemp("whole") / "out.jsonl")


def test_parts_of_one_folder_are_put_together(tmp_path: Path, expected: str) -> None:
    output = tmp_path / "out.jsonl"
    jobs = [Job() for _ in range(3)]
    assert [job.part(f"{at}/3", output) for at, job in enumerate(jobs, 1)] == [3, 2, 2]
    assert [job.generator.answered for job in jobs] == [6, 4, 4]
    assert not output.exists()
    last = Job()
    assert last.whole(output) == expected
    assert last.generator.answered == 0
    assert not samples_folder(output).exists()


def test_parts_of_several_machines_are_put_together(tmp_path: Path, expected: str) -> None:
    places = []
    for number in (1, 2, 3):
        (tmp_path / str(number)).mkdir()
        output = tmp_path / str(number) / "out.jsonl"
        Job().part(f"{number}/3", output)
        places.append(samples_folder(output))
    joined = tmp_path / "out.jsonl"
    job = Job()
    with pytest.raises(UserError, match=r"part 2 of 3 of the responses of seed 1 in none of the folders"):
        job.whole(joined, [places[0], places[2]])
    with pytest.raises(UserError, match=r"holds no parts of responses"):
        job.whole(joined, [*places, tmp_path])
    assert job.whole(joined, places) == expected
    assert job.generator.answered == 0
    assert all(place.is_dir() for place in places)


def test_a_part_in_two_folders_is_named_and_counted_once(
    tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    places = {}
    for name, part in (("a", "1/3"), ("b", "2/3"), ("c", "2/3"), ("d", "3/3")):
        (tmp_path / name).mkdir()
        Job().part(part, tmp_path / name / "out.jsonl")
        places[name] = samples_folder(tmp_path / name / "out.jsonl")
    caplog.set_level(logging.INFO, "dskd_lightning")
    assert Job().whole(tmp_path / "out.jsonl", [*places.values(), places["a"]]) == expected
    told = [record.getMessage() for record in caplog.records if "responses of 3 parts" in record.getMessage()]
    assert len(told) == len(SEEDS)
    for line in told:
        twice = f"; part 2 of 3 is in '{places['b']}' and '{places['c']}', of which the first is taken."
        assert line.endswith(f": 7 responses of 3 parts{twice}")


def test_without_join_the_rest_is_generated(tmp_path: Path, expected: str) -> None:
    output = tmp_path / "out.jsonl"
    Job().part("2/3", output)
    job = Job()
    assert job.whole(output) == expected
    assert job.generator.answered == 2 * 5


def test_a_part_goes_on_where_it_was_killed(tmp_path: Path, expected: str) -> None:
    output = tmp_path / "out.jsonl"
    job = Job(batch_size=1)

    class Killed(Counting):
        def __call__(self, prompts, **options):
            for batch in super().__call__(prompts, **options):
                yield batch
                if self.answered == 4:  # the first of the second seed
                    raise KeyboardInterrupt

    killed = Job()
    killed.generator = Killed(
        job.generator.model, job.generator.tokenizer, replace(job.generator.settings, batch_size=1)
    )
    with pytest.raises(KeyboardInterrupt):
        killed.part("1/3", output)
    for number in (2, 3):
        Job().part(f"{number}/3", output)
    with pytest.raises(UserError, match="part 1 of 3 of the responses of seed 2 in none"):
        Job().whole(output, [])
    assert job.part("1/3", output) == 3
    assert job.generator.answered == 2
    assert Job().whole(output, []) == expected


@pytest.mark.parametrize(
    ("other", "named"), [(Job(seed=1), "model changed"), (Job(max_length=64), "max_length changed")]
)
def test_a_part_of_another_model_or_other_settings_is_refused(tmp_path: Path, other: Job, named: str) -> None:
    output = tmp_path / "out.jsonl"
    Job().part("1/2", output)
    other.part("2/2", output)
    with pytest.raises(UserError, match=rf"part-00002-of-00002: .*{named}"):
        Job().whole(output)
    shutil.rmtree(samples_folder(output) / "part-00002-of-00002")
    Job().part("2/2", output)
    assert Job().whole(output)


def test_two_jobs_are_not_at_the_same_part(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Job().part("1/2", output)
    with locked(samples_folder(output) / ".part-00001-of-00002.lock", ""):
        with pytest.raises(UserError, match="another job is at part 1 of 2"):
            Job().part("1/2", output)
        with pytest.raises(UserError, match="another job is at part 1 of 2"):
            Job().whole(output)
        Job().part("2/2", output)


def test_more_parts_than_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="part 8 of 9 is empty, since there are 7 prompts"):
        Job().part("8/9", tmp_path / "out.jsonl")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Job().part("1/2", output)
    file = samples_folder(output) / "part-00001-of-00002" / "seed_1.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-00001-of-00002.seed_1.jsonl"):
        Job().whole(output)


def test_the_command_generates_parts_and_joins_them(tmp_path: Path, model_folder) -> None:
    data = write_data(tmp_path / "data.jsonl", 5)
    base = ["generate", model_folder(seed=1), str(data)]
    options = ["--max_new_tokens", "6", "--seed", "3"]
    told = dskd_fork(*base, str(tmp_path / "whole.jsonl"), *options).stderr
    assert "Responses to 5 prompts, 1 seed: 5 to generate; at most 30 tokens." in told
    assert told.index("to generate") < told.index("5 of 5 prompts")
    for number in (1, 2):
        said = dskd_fork(*base, str(tmp_path / f"{number}.jsonl"), *options, "--part", f"{number}/2").stdout
        assert f"part {number} of 2: responses to {4 - number} prompts in" in said
    places = [str(tmp_path / f"{number}.jsonl.samples") for number in (1, 2)]
    dskd_fork(*base, str(tmp_path / "joined.jsonl"), *options, "--join", *places)
    assert (tmp_path / "joined.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    refused = dskd_fork(*base, "x", *options, "--part", "1/2", "--join", *places, check=False)
    assert refused.returncode == 2
    assert "give one of them" in refused.stderr


def test_missing_parts_and_numbers_in_words() -> None:
    parts = [Part(number, 6) for number in (1, 3)]
    assert missing_parts(parts) == "parts 2, 4-6 of 6"
    assert missing_parts([Part(1, 2)]) == "part 2 of 2"
    assert missing_parts([Part(1, 2), Part(1, 3)]) is None
    assert missing_parts([Part(1, 1)]) is None
    assert missing_parts([]) is None
    assert number_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert Part.from_name(Part(3, 16).name) == Part(3, 16)
    assert Part.from_name("part-3") is None
