"""A teacher may read another prompt than the student; response, bytes and alignment stay the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import CHAT_TEMPLATE
from test_in_memory import tensors
from transformers import AutoTokenizer

import dskd_lightning as dl
from dskd_lightning.data.samples import BatchOfSamples, prompts_of
from dskd_lightning.generation.samples import Sample
from dskd_lightning.teacher_cache import TeacherCacheSettings, ensure_caches

ROWS = [
    {
        "prompt": f"count to {n}",
        "response": "1 2 3 " * n,
        "teacher_messages": [
            {"role": "system", "content": "You know the solution."},
            {"role": "user", "content": f"The answer ends with {n}. Count."},
            {"role": "assistant", "content": "To what?"},
            {"role": "user", "content": f"to {n}"},
        ],
    }
    for n in range(1, 9)
]
PLAIN = [{key: value for key, value in row.items() if key != "teacher_messages"} for row in ROWS]


@pytest.fixture(params=["bpe", "sentencepiece"])
def pair(request, model_folder):
    student = model_folder(seed=1)
    return dl.StudentSpec(student), dl.TeacherSpec(model_folder(tokenizer=request.param, hidden=24, seed=2))


def prompt(spec, messages) -> list[int]:
    """The template's own text, tokenised whole."""
    tokenizer = AutoTokenizer.from_pretrained(spec.source)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(spec, ids) -> str:
    """The text, without the spaces that a tokenizer puts in front of every piece."""
    text = AutoTokenizer.from_pretrained(spec.source).decode(ids, skip_special_tokens=False)
    return "".join(text.split())


def test_only_the_teachers_prompt_differs(pair) -> None:
    student, teacher = pair
    collator = dl.DistillationCollator(student, teacher)
    own, plain = collator(ROWS), collator(PLAIN)
    for name, value in tensors(plain).items():
        if name.startswith((".student", ".alignments", ".response_bytes")):
            assert torch.equal(tensors(own)[name], value), name
    mine, theirs = own.teachers[0], plain.teachers[0]
    assert torch.equal(mine.select(mine.labels), theirs.select(theirs.labels))
    for row, found in zip(ROWS, prompts_of(mine), strict=True):
        assert decoded(teacher, found) == decoded(teacher, prompt(teacher, row["teacher_messages"]))
    assert [decoded(student, ids) for ids in prompts_of(own.student)] == [
        decoded(student, prompt(student, [{"role": "user", "content": row["prompt"]}])) for row in ROWS
    ]


@pytest.mark.parametrize("given", ["none", "record"])
def test_a_teachers_own_system_message(pair, given) -> None:
    student, teacher = pair
    rows = [{**row, "system": "of the record"} if given == "record" else row for row in PLAIN]
    for system in ("Be brief.", ""):
        batch = dl.DistillationCollator(student, replace(teacher, system=system))(rows)
        expected = [{"role": "user", "content": rows[3]["prompt"]}]
        if system:
            expected.insert(0, {"role": "system", "content": system})
        assert prompts_of(batch.teachers[0])[3] == prompt(teacher, expected)
    own = {"role": "system", "content": "of the record"}
    read = [*([own] if given == "record" else []), {"role": "user", "content": rows[3]["prompt"]}]
    assert prompts_of(batch.student)[3] == prompt(student, read)
    mine = dl.DistillationCollator(student, replace(teacher, system="Be brief."))(ROWS)
    read = prompt(teacher, ROWS[0]["teacher_messages"])
    assert decoded(teacher, prompts_of(mine.teachers[0])[0]) == decoded(teacher, read)


def test_a_teachers_template_options(pair) -> None:
    student, teacher = pair
    template = "{% if greeting %}{{ greeting }}{% endif %}" + CHAT_TEMPLATE
    teacher = replace(teacher, chat_template=template, template_options={"greeting": "Hello!"})
    batch = dl.DistillationCollator(student, teacher)(ROWS)
    assert decoded(teacher, prompts_of(batch.teachers[0])[0]).lstrip().startswith("Hello!")
    assert "Hello!" not in decoded(student, prompts_of(batch.student)[0])


def test_the_teachers_prompt_has_a_limit_of_its_own(pair) -> None:
    student, teacher = pair
    whole = prompts_of(dl.DistillationCollator(student, teacher)(ROWS).teachers[0])
    limits = {"max_length": 40, "max_prompt_length": 16}
    short = dl.DistillationCollator(student, teacher, **limits)
    long = dl.DistillationCollator(student, teacher, **limits, max_teacher_prompt_length=256)
    assert all(len(ids) <= 16 for ids in prompts_of(short(ROWS).teachers[0]))
    assert prompts_of(long(ROWS).teachers[0]) == whole
    alone = dl.DistillationCollator(student, **limits)(PLAIN)  # teachers take no room of the response
    assert torch.equal(long(ROWS).student.input_ids, alone.student.input_ids)
    assert torch.equal(long(ROWS).student.labels, alone.student.labels)


def datamodule(pair, folder, rows, **options):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"max_length": 40, "max_prompt_length": 16, "max_teacher_prompt_length": 120}
    return dl.InstructionDataModule(
        str(file), student=pair[0], teacher=pair[1], cache_dir=str(folder / "cache"), batch_size=8,
        **{**defaults, **options},
    )  # fmt: skip


def test_files_give_what_records_in_memory_give(pair, tmp_path) -> None:
    data = datamodule(pair, tmp_path, ROWS)
    batch = data.train_dataloader().collator([[i] for i in range(8)])
    collator = dl.DistillationCollator(
        *pair, max_length=40, max_prompt_length=16, max_teacher_prompt_length=120
    )
    for name, value in tensors(collator(ROWS)).items():
        assert torch.equal(tensors(batch)[name], value), name
    example = data.examples("train")[0]
    assert [m.content for m in example.teacher_messages] == [
        m["content"] for m in ROWS[0]["teacher_messages"]
    ]
    assert data.generation_prompt(example, 1) == prompts_of(batch.teachers[0])[0]
    assert data.generation_prompt(example) == prompts_of(batch.student)[0]


def test_packed_rows_have_room_for_it(pair, tmp_path) -> None:
    data = datamodule(pair, tmp_path, ROWS, packing=True)
    batches = list(data.train_dataloader())
    assert sum(len(batch) for batch in batches) == 8
    assert max(batch.teachers[0].input_ids.shape[1] for batch in batches) <= 40 + 104


def test_cached_states_are_those_of_its_own_prompt(pair, tmp_path) -> None:
    settings = TeacherCacheSettings(dtype="float32")
    module = dl.DistillationModule(pair[0], dl.ULDObjective(), pair[1])
    module.configure_model()
    found = {}
    for name, rows, teacher in (
        ("own", ROWS, pair[1]),
        ("plain", PLAIN, pair[1]),
        ("system", PLAIN, replace(pair[1], system="Be brief.")),
    ):
        data = datamodule((pair[0], teacher), tmp_path, rows)
        ensure_caches(data, [teacher], ["train"], settings)
        batch = data.train_dataloader().collator([[i] for i in range(8)])
        live = module.teacher_side(0, batch.teachers[0]).hidden
        torch.testing.assert_close(batch.teacher_hidden[0], live, rtol=1e-4, atol=1e-5)
        found[name] = data.teacher_hidden["train"][0].folder
    assert len(set(found.values())) == 3


def test_samples_stand_behind_the_teachers_own_prompt(pair) -> None:
    collator = dl.DistillationCollator(*pair)
    student, teacher = collator.renderers
    batch = collator(ROWS)
    ids = student.response_turn("4 5 6", ended=False)[0]
    made = BatchOfSamples(student.tokenizer, [teacher])(
        batch, [[Sample(tuple(ids), student.end_id)] for _ in ROWS]
    )
    assert prompts_of(made.teachers[0]) == prompts_of(batch.teachers[0])
    assert prompts_of(made.student) == prompts_of(batch.student)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "end with an assistant"),
        ([{"role": "system", "content": "a"}], "no user message"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "isn't the first"),
        ([{"role": "wizard", "content": "a"}], "unknown role 'wizard'"),
        ("what?", "isn't a list of messages"),
    ],
)
def test_bad_messages_are_one_sentence_before_training(pair, tmp_path, messages, message) -> None:
    rows = [*ROWS[:2], {**ROWS[2], "teacher_messages": messages}]
    with pytest.raises(dl.UserError, match=message) as found:
        datamodule(pair, tmp_path, rows).prepare_data()
    assert "rows.jsonl:3" in str(found.value)
    data = datamodule(pair, tmp_path, rows, skip_invalid=True)
    assert len(data.examples("train")) == 2


def test_what_the_student_could_not_learn_is_refused(pair, tmp_path) -> None:
    with pytest.raises(dl.UserError, match=r"rows.jsonl:1 .*learn: everything"):
        datamodule(pair, tmp_path, ROWS, learn="everything").prepare_data()
    with pytest.raises(dl.UserError, match="can't be learnt"):
        datamodule(
            (pair[0], replace(pair[1], system="?")), tmp_path, PLAIN, learn="everything"
        ).prepare_data()
    with pytest.raises(dl.UserError, match="max_teacher_prompt_length"):
        datamodule(pair, tmp_path, ROWS, max_teacher_prompt_length=8)


def test_earlier_answers_are_read_and_not_learnt(pair) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e f")]
    messages = [{"role": role, "content": text} for role, text in turns]
    batch = dl.DistillationCollator(*pair)(
        [{"messages": messages, "teacher_messages": ROWS[0]["teacher_messages"]}]
    )
    assert batch.response_bytes.tolist() == [5]
    assert decoded(pair[0], prompts_of(batch.student)[0]) == decoded(pair[0], prompt(pair[0], messages[:-1]))
