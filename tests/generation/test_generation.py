from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model, make_tokenizer

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.predict import PromptRecord, predict, told_by_seed
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.generation.sampling import InverseTransformSampling, prompt_uniforms
from dskd_lightning.generation.stop_tokens import stop_token_ids
from dskd_lightning.runs.heartbeat import Progress

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(len(tokenizer))


def run(generator: Generator, seed: int | None, prompts=PROMPTS, indices=None) -> dict[int, tuple]:
    found = [g for batch in generator(prompts, seed=seed, indices=indices) for g in batch]
    return {g.index: (g.text, g.tokens, g.finished) for g in found}


@pytest.mark.parametrize("seed", [None, 10])
def test_a_prompt_does_not_depend_on_its_batch(model, tokenizer, seed) -> None:
    together = Generator(model, tokenizer, GenerationSettings(max_new_tokens=12))
    alone = Generator(model, tokenizer, GenerationSettings(max_new_tokens=12, batch_size=1))
    assert run(together, seed) == run(alone, seed) == run(together, seed)
    assert run(together, seed, PROMPTS[2:4], [2, 3]) == {i: run(together, seed)[i] for i in (2, 3)}


def test_greedy_is_the_argmax_of_the_model(model, tokenizer) -> None:
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=6))
    generator.stop_ids = []
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert run(generator, None)[0][0] == tokenizer.decode(ids[3:], skip_special_tokens=True)


def test_seeds_and_prompts_differ(model, tokenizer) -> None:
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=12))
    assert run(generator, 10) != run(generator, 20)
    same = run(generator, 10, [[5, 6]] * 4)
    assert len({text for text, _, _ in same.values()}) > 1


def test_the_models_own_penalties_are_off(model, tokenizer) -> None:
    plain = run(Generator(model, tokenizer, GenerationSettings(max_new_tokens=12)), None)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    assert run(Generator(model, tokenizer, GenerationSettings(max_new_tokens=12)), None) == plain


def test_stops_at_an_end_token(model, tokenizer) -> None:
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        first = run(Generator(model, tokenizer, GenerationSettings(max_new_tokens=8)), None)[0]
        hidden = model.model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.eos_token_id] = 100 * hidden
    assert first[1] == 8
    assert first[2] is False
    assert run(Generator(model, tokenizer), None, PROMPTS[:1])[0] == ("", 0, True)


def test_total_length_limits_each_row(model, tokenizer) -> None:
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=50, max_length=10))
    generator.stop_ids = []
    lengths = {index: row[1] for index, row in run(generator, 3).items()}
    assert lengths == {i: 10 - len(prompt) for i, prompt in enumerate(PROMPTS)}


def test_training_mode_is_restored_module_by_module(model, tokenizer) -> None:
    model.train()
    model.model.norm.eval()
    run(Generator(model, tokenizer, GenerationSettings(max_new_tokens=2)), None)
    assert model.training
    assert not model.model.norm.training


def test_halves_a_batch_that_is_too_large(model, tokenizer, monkeypatch, caplog) -> None:
    settings = GenerationSettings(max_new_tokens=4)
    wanted = run(Generator(model, tokenizer, settings), 1)
    plain = model.generate

    def generate(*args, input_ids, **kwargs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return plain(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    assert run(Generator(model, tokenizer, settings), 1) == wanted
    assert "out of memory with 5 prompts" in caplog.text


def test_batches_hold_to_the_token_budget(model, tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=10, batch_tokens=32)
    sizes = [len(batch) for batch in Generator(model, tokenizer, settings)(PROMPTS)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({}, [[1], []], "prompt 1 has no tokens"),
        ({"max_length": 3}, [[1], [1, 2, 3]], "no room for a response"),
        ({"top_p": 0.0}, [[1]], "top_p must be"),
        ({"temperature": 0.0}, [[1]], "temperature must be positive"),
    ],
)
def test_bad_input(model, tokenizer, settings, prompts, message) -> None:
    with pytest.raises(UserError, match=message):
        list(Generator(model, tokenizer, GenerationSettings(**settings))(prompts))


def test_stop_tokens_include_the_end_of_a_turn(model, tokenizer) -> None:
    tokenizer = make_tokenizer()
    assert stop_token_ids(model, tokenizer) == [0]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|user|>\n{% endfor %}"
    assert stop_token_ids(model, tokenizer) == sorted([0, tokenizer.convert_tokens_to_ids("<|user|>")])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_token_ids(model, tokenizer) == [0]


def test_inverse_transform_sampling_draws_the_distribution() -> None:
    logits = torch.tensor([0.3, -torch.inf, 1.2, -0.5, 2.0])
    rows = 40_000
    uniforms = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(rows, 4, dtype=torch.long)
    picked = InverseTransformSampling(uniforms, 4)(ids, logits.repeat(rows, 1)).argmax(-1)
    share = torch.bincount(picked, minlength=5) / rows
    torch.testing.assert_close(share, logits.softmax(-1), atol=0.01, rtol=0)
    nucleus = InverseTransformSampling(uniforms, 4, top_p=0.8)(ids, logits.repeat(rows, 1)).argmax(-1)
    assert set(nucleus.tolist()) == {4, 2}


def test_random_numbers_of_a_prompt() -> None:
    assert torch.equal(prompt_uniforms(10, 3, 5), prompt_uniforms(10, 3, 9)[:5])
    assert not torch.equal(prompt_uniforms(10, 3, 5), prompt_uniforms(3, 10, 5))


def records() -> list[PromptRecord]:
    fields = {"category": "qa", "id": [1, None]}
    return [
        PromptRecord(i, f"prompt {i}", ids, ("a", "b"), fields if i % 2 else {})
        for i, ids in enumerate(PROMPTS)
    ]


def test_predict_resumes_after_a_kill_with_the_same_result(model, tokenizer, tmp_path) -> None:
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=6, batch_size=2))
    whole = predict(generator, records(), tmp_path / "whole", model_id="m", seeds=(10, None))

    def stop(seed, done, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(generator, records(), tmp_path / "cut", model_id="m", seeds=(10, None), progress=stop)
    partial = tmp_path / "cut" / "seed_10.jsonl.partial-0"
    with partial.open("a") as stream:
        stream.write('{"index": 4, "pro')  # the line that a kill cut off
    asked = []
    again = predict(
        generator, records(), tmp_path / "cut", model_id="m", seeds=(10, None),
        progress=lambda seed, done, total: asked.append((seed, done, total)),
    )  # fmt: skip
    assert again == whole
    assert asked[0] == (10, 0, 3)
    seen = []
    progress = Progress("Responses", 99, "prompts")
    report = told_by_seed(progress)
    for told in ((10, 0, 3), (10, 2, 3), (10, 3, 3), (None, 0, 5)):
        report(*told)
        seen.append((progress.what, progress.done, progress.total))
    name = "Responses of seed 10"
    assert seen == [(name, 0, 3), (name, 2, 3), (name, 3, 3), ("Greedy responses", 0, 5)]
    assert not partial.exists()
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["greedy.jsonl", "seed_10.jsonl", "settings.json"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "seed_10.jsonl").read_text().splitlines()]
    assert lines[0]["references"] == ["a", "b"]
    assert "fields" not in lines[0]
    assert lines[1]["fields"] == dict(whole[10][1].fields) == {"category": "qa", "id": [1, None]}


def test_predict_refuses_another_models_predictions(model, tokenizer, tmp_path) -> None:
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=2))
    predict(generator, records(), tmp_path, model_id="m", seeds=(1,))
    with pytest.raises(UserError, match=r"other settings \(model changed\)"):
        predict(generator, records(), tmp_path, model_id="other", seeds=(1,))
    with pytest.raises(UserError, match="prompts changed"):
        predict(generator, records()[1:], tmp_path, model_id="m", seeds=(1,))


@pytest.mark.parametrize("content", [b'{"mod', b"[1]", b"\xff", b"", b"[" * 100_000])
def test_predict_names_damaged_settings(model, tokenizer, tmp_path, content) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=2))
    with pytest.raises(UserError, match=r"settings\.json: .*; delete the folder"):
        predict(generator, records(), tmp_path, model_id="m", seeds=(1,))


def test_predict_names_a_damaged_partial_file(model, tokenizer, tmp_path) -> None:
    (tmp_path / "seed_1.jsonl.partial-0").write_bytes(b"\xff\n")
    generator = Generator(model, tokenizer, GenerationSettings(max_new_tokens=2))
    with pytest.raises(UserError, match=r"partial-0.*delete"):
        predict(generator, records(), tmp_path, model_id="m", seeds=(1,))
