"""Sequence-level data: several samples per prompt, filtered, the same when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from tiny_runs import dskd_fork, environment, write_data

import dskd_lightning as dl
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation import response_data
from dskd_lightning.evaluation.response_data import response_likelihoods, write_response_data
from dskd_lightning.generation.filtering import Candidate, ResponseFilter
from dskd_lightning.generation.generator import GenerationSettings, Generator


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = make_model(len(tokenizer))
    examples = [Example((Message("user", f"say {i}"),), source="data", line=i) for i in range(5)]
    return (
        Generator(model, tokenizer, GenerationSettings(max_new_tokens=8)),
        ChatRenderer(tokenizer),
        examples,
    )


def candidates(*texts, prompt=0, **changes):
    return [
        Candidate(**{"prompt": prompt, "text": text, "tokens": len(text), "finished": True, **changes})
        for text in texts
    ]


def test_what_is_dropped_is_counted_by_its_reason():
    found = [
        *candidates("abc", "abc ", "", " "), *candidates("abc", prompt=1),
        *candidates("cut off", finished=False), *candidates("a"), *candidates("far too long a text"),
        *candidates("odd", nll=3.0), *candidates("fine", nll=0.5),
    ]  # fmt: skip
    kept, dropped = ResponseFilter(finished=True, min_tokens=2, max_tokens=10, max_nll=1.0)(found)
    assert [(c.prompt, c.text) for c in kept] == [(0, "abc"), (1, "abc"), (0, "fine")]
    assert dropped == {
        "duplicate": 1, "empty": 2, "unfinished": 1, "too short": 1, "too long": 1, "unlikely": 1,
    }  # fmt: skip
    assert len(kept) + sum(dropped.values()) == len(found)


def test_the_likeliest_of_each_prompt_in_their_order():
    found = [
        Candidate(prompt, text, 3, True, nll)
        for prompt, text, nll in [(0, "a", 2.0), (0, "b", 1.0), (0, "c", 1.5), (1, "d", 9.0)]
    ]
    kept, dropped = ResponseFilter(likeliest=2)(found)
    assert [c.text for c in kept] == ["b", "c", "d"]
    assert dropped == {"less likely than others": 1}


@pytest.mark.parametrize("settings", [{"likeliest": 0}, {"min_tokens": 5, "max_tokens": 3}])
def test_filters_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError):
        ResponseFilter(**settings)


def test_likelihood_is_the_mean_over_the_responses_tokens(parts):
    generator, renderer, examples = parts
    texts = ["apples", "pears and plums", ""]
    turns = [
        (renderer.generation_prompt(e.prompt), renderer.response_turn(text, ended=text != "apples"))
        for e, text in zip(examples, texts, strict=False)
    ]
    found = response_likelihoods(generator.model, generator.pad_id, turns)
    for (prompt, (ids, _)), value in zip(turns, found, strict=True):
        with torch.no_grad():
            logits = generator.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        picked = logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])
        assert value == pytest.approx(-float(picked.mean()), rel=1e-5)


def test_records_are_what_training_takes(parts, tmp_path, model_folder):
    generator, renderer, examples = parts
    output = tmp_path / "out.jsonl"
    meta = write_response_data(
        generator, renderer, examples, output, [1, 2, 3], ResponseFilter(likeliest=2), {"model": "tiny"}
    )
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == meta["kept"]
    assert meta["responses"] == 15
    assert meta["kept"] + sum(meta["dropped"].values()) == 15
    assert json.loads((tmp_path / "out.meta.json").read_text()) == meta
    assert meta["model"] == "tiny"
    assert not (tmp_path / "out.jsonl.samples").exists()
    data = dl.InstructionDataModule(
        str(output), student=dl.StudentSpec(model_folder(seed=1)), cache_dir=str(tmp_path / "cache")
    )
    data.setup("fit")
    assert len(data.examples("train")) == meta["kept"]
    asked = [record["messages"][0]["content"] for record in records]
    assert asked == sorted(asked)


def test_an_interrupted_call_goes_on(parts, tmp_path, monkeypatch):
    generator, renderer, examples = parts

    def write(name):
        keep = ResponseFilter(likeliest=2)
        write_response_data(generator, renderer, examples, tmp_path / name, [1, 2, 3], keep, {})
        return (tmp_path / name).read_text()

    whole = write("whole.jsonl")
    original = response_data.response_likelihoods
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(response_data, "response_likelihoods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()
    (kept,) = (tmp_path / "again.jsonl.samples").glob("likelihoods_1.*")
    good = kept.read_bytes()
    changed = [good.replace(b".", b"1.", 1), good.replace(b"[", b'["x", ', 1)]
    for damaged in (b"", good[:-9], b"[1]", b"{}", b'{"nll": [1.0]}', *changed):
        kept.write_bytes(damaged)
        with pytest.raises(UserError, match=r"likelihoods_1.*delete it"):
            write("again.jsonl")
    kept.write_bytes(good)
    assert write("again.jsonl") == whole
    assert len(calls) == 4  # the first seed's likelihoods were kept


def test_nothing_left_is_one_sentence(parts, tmp_path):
    generator, renderer, examples = parts
    with pytest.raises(UserError, match=r"none of 5 responses is left \(5 too short\)"):
        write_response_data(
            generator, renderer, examples, tmp_path / "out.jsonl", [1], ResponseFilter(min_tokens=99), {}
        )


@pytest.mark.slow
def test_command_is_the_same_after_a_kill_and_over_ranks(tmp_path, model_folder):
    data = write_data(tmp_path / "data.jsonl", 16)
    options = ["--max_new_tokens", "40", "--samples_per_prompt", "3", "--seed", "5", "--likeliest", "2",
               "--batch_size", "2"]  # fmt: skip

    def command(name):
        return ["generate", model_folder(seed=1), str(data), str(tmp_path / name), *options]

    said = dskd_fork(*command("whole.jsonl")).stdout
    assert "of 48 responses to 16 prompts" in said
    assert "less likely than others" in said
    whole = (tmp_path / "whole.jsonl").read_text()
    process = subprocess.Popen(
        [sys.executable, "-m", "dskd_lightning", *command("killed.jsonl")], env=environment()
    )
    samples = tmp_path / "killed.jsonl.samples"
    deadline = time.monotonic() + 120
    while not any(samples.glob("*.partial-0")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists()
    dskd_fork(*command("killed.jsonl"))
    assert (tmp_path / "killed.jsonl").read_text() == whole
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "dskd_lightning", *command("ranks.jsonl")],
        env=environment(), timeout=300, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "ranks.jsonl").read_text() == whole


def test_greedy_decoding_has_one_sample(tmp_path, model_folder):
    result = dskd_fork(
        "generate", model_folder(seed=1), "x", str(tmp_path / "o"), "--samples_per_prompt", "2", check=False
    )
    assert result.returncode == 2
    assert "sample with --seed" in result.stderr


def test_a_record_keeps_all_that_training_reads_of_it(parts, tmp_path):
    generator, renderer, _ = parts
    own = (Message("system", "you know it"), Message("user", "say 7 as 3 + 4"))
    turns = (Message("user", "hi"), Message("assistant", "hello", learnt=False), Message("user", "say 7"))
    example = Example(turns, source="data", line=1, fields='{"teacher": "maths"}', teacher_messages=own)
    asked = []
    spy = ChatRenderer.generation_prompt

    class Spying(ChatRenderer):
        def generation_prompt(self, messages, *args, **options):
            asked.append(tuple(messages))
            return spy(self, messages, *args, **options)

    output = tmp_path / "out.jsonl"
    write_response_data(
        generator, Spying(renderer.tokenizer), [example], output, [None], ResponseFilter(), {}
    )
    assert asked == [own]
    record = json.loads(output.read_text())
    assert record["teacher"] == "maths"
    assert record["teacher_messages"] == [{"role": m.role, "content": m.content} for m in own]
    assert record["messages"][1] == {"role": "assistant", "content": "hello", "weight": 0}
    assert [m["content"] for m in record["messages"][:3]] == ["hi", "hello", "say 7"]
