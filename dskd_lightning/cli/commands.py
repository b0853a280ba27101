"""Commands beside the trainer's own: each function is one, its arguments are the options."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Literal

from dskd_lightning.errors import UserError

__all__ = [
    "benchmark",
    "cache",
    "chat",
    "compare",
    "config",
    "data",
    "doctor",
    "export",
    "generate",
    "harness",
    "init",
    "judge",
    "prune",
    "quickstart",
    "study",
    "vocab",
]


def cache(
    config: list[str],
    output: str | None = None,
    dtype: str | None = None,
    estimate: bool = False,
    part: str | None = None,
    join: list[str] | None = None,
) -> None:
    """Store the teachers' hidden states at response positions, once for all epochs.

    Of a teacher behind an endpoint it stores the log-probabilities. Interrupted, it goes on where it stopped.

    Args:
        config: the YAML files of the run or dskd:NAME, as for ``dskd fit``.
        output: folder of the cache, instead of the config's ``data.teacher_cache.folder``.
        dtype: how states are stored, instead of the config's ``data.teacher_cache.dtype``.
        estimate: only say how many requests and tokens the teachers' endpoints would get.
        part: compute the third of sixteen parts alone (3/16), for jobs that know nothing of each other.
        join: folders of other jobs' caches to copy what is missing from, where they don't share one.
    """
    from dskd_lightning.cli.cache_command import build_cache

    build_cache(config, output, dtype, estimate, part, join)


def chat(
    models: list[str],
    prompt: list[str] | None = None,
    seed: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    ckpt_path: Literal["best", "last"] | None = None,
) -> int:
    """Talk to one or several models side by side, as they write.

    Each keeps its own conversation, with the template and system message that it was trained with. ``/reset``
    starts anew, ``/quit`` ends; from a pipe, each line is a question. A question that one of them has no room
    for is asked of none; without a keyboard the exit status is then 2.

    Args:
        models: run folders, models (a folder, a GGUF file, a Hub id or demo), or teacher for that of the
            first run.
        prompt: questions to ask instead of reading them.
        seed: sample with this seed instead of taking the most likely tokens.
        max_new_tokens: most tokens of an answer.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold.
        ckpt_path: which checkpoint of runs; the best, or the last where no validation chose one.
    """
    from rich.console import Console

    from dskd_lightning.cli import chat_command
    from dskd_lightning.generation.generator import GenerationSettings

    if not models:
        raise UserError("dskd chat: name a run folder or a model.")
    if len(set(models)) < len(models):
        raise UserError("dskd chat: a model is named twice.")
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    speakers = chat_command.open_speakers(models, settings, ckpt_path)
    console = Console()
    refused = chat_command.chat(speakers, prompt or chat_command.typed(console), seed, console)
    return 2 if refused and (prompt or not sys.stdin.isatty()) else 0


def compare(
    runs: list[str],
    metric: str = "rougeL",
    fail_if: list[str] | None = None,
    output: str = "comparison",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    max_examples: int = 200,
    judge: list[str] | None = None,
) -> int:
    """Compare run folders over the same prompts, write an HTML report, and check conditions.

    Args:
        runs: two or more run folders, the baseline first; NAME=FOLDER renames one; A,B,C are training
            runs of one method.
        metric: rougeL, exact_match, length or finished.
        fail_if: conditions that make the exit status 1, as "rougeL drops > 1".
        output: folder of the report.
        resamples: bootstrap resamples.
        confidence: coverage of the intervals.
        seed: of the resampling.
        max_examples: most prompts shown in the report.
        judge: CANDIDATE=FILE for verdicts of ``dskd judge`` against the baseline.
    """
    from dskd_lightning.comparison.compare_runs import compare_runs

    if len(runs) < 2:
        raise UserError("dskd compare: give at least two run folders, the baseline first.")
    return compare_runs(
        runs,
        metric=metric,
        fail_if=fail_if or (),
        output=output,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        max_examples=max_examples,
        judge=judge or (),
    )


def config(action: Literal["list", "show"], *names: str) -> None:
    """List the configs that come with the package, or show some; ``--config dskd:NAME`` takes one.

    Args:
        action: list or show.
        names: which ones to show, as the list calls them.
    """
    from dskd_lightning.launch.configs import config_names, config_path, config_summary

    if action == "list":
        known = config_names()
        width = max(map(len, known))
        for name in known:
            print(f"dskd:{name:<{width}}  {config_summary(name)}")
        return
    if not names:
        raise UserError("dskd config show: name a config; `dskd config list` shows all of them.")
    for name in names:
        print(config_path(f"dskd:{name.removeprefix('dskd:')}").read_text(encoding="utf-8"), end="")


def data(config: list[str], records: int = 3, json: str | None = None, html: str | None = None) -> None:
    """Show how each model reads a few records of each file: what is prompt, what is learnt, what aligns.

    Student and teacher stand side by side, with counts, lengths, what was cut, and fields that nothing
    reads. No weight is loaded; the data are prepared, as the run will need them.

    Args:
        config: the YAML files of the run or dskd:NAME, as for ``dskd fit``.
        records: so many of each file.
        json: also write all of it to this JSON file.
        html: also write a page to this file.
    """
    from dskd_lightning.cli.data_command import show_data

    show_data(config, records, json, html)


def doctor(
    config: list[str],
    ranks: int | None = None,
    memory: str | None = None,
    tflops: float | None = None,
    examples: int | None = None,
) -> int:
    """Check everything that a run needs without training, and calculate what it takes.

    Models' sizes, tokenizers, data, objective; memory, network, disk and time, here or on devices that aren't
    here. No weight is loaded. The data are prepared, as the run will need them. The exit status is 1 where
    something keeps the run from starting.

    Args:
        config: the YAML files of the run or dskd:NAME, as for ``dskd fit``.
        ranks: plan for so many devices instead of the config's.
        memory: of each of them, as 80GiB, instead of what is free here.
        tflops: that a large product reaches on each, instead of what is measured here.
        examples: plan for so many training examples as long as the config's.
    """
    from dskd_lightning.cli.planning_commands import run_doctor
    from dskd_lightning.planning.target import Target, parse_bytes

    size = None if memory is None else parse_bytes(memory)
    return run_doctor(config, Target(ranks, size, tflops, examples))


def export(
    run: str,
    target: str,
    ckpt_path: str | None = None,
    merge: bool = True,
    overwrite: bool = False,
    comparison: str | None = None,
    push: str | None = None,
    private: bool = True,
    gguf: str | None = None,
) -> None:
    """Write a trained student as a plain Hugging Face folder with a model card.

    The card names teacher, data, objective and results; what only you know, such as licences, is
    marked "to confirm".

    Args:
        run: the run folder.
        target: folder to write.
        ckpt_path: best, last, or a checkpoint's path; the best, or the last where no validation chose one.
        merge: add the adapter to the weights; false writes a peft adapter instead.
        overwrite: replace a folder that is not empty.
        comparison: folder of a ``dskd compare`` with the run, whose paired tests the card then has.
        push: also upload to this repository (owner/name) of the Hub, with the token in $HF_TOKEN.
        private: whether a repository that is made now is private.
        gguf: also write this GGUF file, in float16, for llama.cpp and what is built on it.
    """
    from dskd_lightning.files import write_atomic
    from dskd_lightning.launch.card import model_card
    from dskd_lightning.launch.push import hub_token, push_folder
    from dskd_lightning.launch.run_files import EXPORTED
    from dskd_lightning.launch.trained import load_identified
    from dskd_lightning.models.export import export_student

    if push is not None:
        hub_token()  # before anything is loaded
    model, tokenizer, identity = load_identified(run, ckpt_path)
    card = model_card(run, comparison)
    folder = export_student(model, tokenizer, target, merge=merge, overwrite=overwrite)
    write_atomic(folder / EXPORTED, dumps({"run": Path(run).resolve().name, **identity}, indent=1) + "\n")
    if card is None:
        print(f"no model card: {run} has no config.yaml")
    else:
        write_atomic(folder / "README.md", card)
    print(f"student written to {folder}; load it with AutoModelForCausalLM.from_pretrained")
    if gguf is not None:
        from dskd_lightning.models.gguf_writing import write_gguf

        print(f"GGUF file written to {write_gguf(model, tokenizer, gguf)}")
    if push is not None:
        print(f"uploaded to {push_folder(folder, push, private)}")


def generate(
    model: str,
    prompts: str,
    output: str,
    seed: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    limit: int | None = None,
    samples_per_prompt: int = 1,
    finished: bool = False,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    duplicates: bool = False,
    max_nll: float | None = None,
    likeliest: int | None = None,
    part: str | None = None,
    join: list[str] | None = None,
) -> None:
    """Let a model answer a file of prompts: data for sequence-level distillation.

    Writes what data.train takes, and where it comes from in a .meta.json beside it. Interrupted, it goes
    on where it stopped; under torchrun each process takes its share of the prompts. Jobs that know nothing of
    each other take a --part each; without one, their responses are put together.

    Args:
        model: a Hub id, a local folder, a GGUF file, or demo.
        prompts: an instruction file of any supported format; responses in it are ignored.
        output: JSONL file of {"messages": [...]} records to write.
        seed: sample with this seed and those that follow; without one decoding is greedy.
        max_new_tokens: most tokens of a response.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold.
        batch_size: prompts at once.
        dtype: type of the weights.
        limit: only so many prompts.
        samples_per_prompt: responses to each prompt.
        finished: drop responses that were cut off.
        min_tokens: drop shorter ones.
        max_tokens: drop longer ones.
        duplicates: keep repeated responses to the same prompt.
        max_nll: drop those that the model finds less likely, in nats per token.
        likeliest: of those left, keep so many of each prompt that the model finds most likely.
        part: 3/16 answers every sixteenth prompt, beginning with the third, into OUTPUT.samples.
        join: folders with such parts (OUTPUT.samples of other machines), which together must hold all.
    """
    from dskd_lightning.cli.generate_command import generate_responses
    from dskd_lightning.generation.filtering import ResponseFilter
    from dskd_lightning.generation.generator import GenerationSettings

    if samples_per_prompt < 1:
        raise UserError(f"--samples_per_prompt: {samples_per_prompt} must be at least 1.")
    if samples_per_prompt > 1 and seed is None:
        raise UserError(
            "--samples_per_prompt: greedy decoding gives the same response every time; sample with --seed."
        )
    seeds: list[int | None] = [None] if seed is None else list(range(seed, seed + samples_per_prompt))
    keep = ResponseFilter(finished, min_tokens, max_tokens, duplicates, max_nll, likeliest)
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size
    )
    generate_responses(model, prompts, output, settings, seeds, keep, dtype, limit, part, join)


def harness(
    folder: str,
    tasks: list[str],
    batch_size: str = "auto",
    output: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    device: str | None = None,
) -> None:
    """Evaluate an exported student on tasks of lm-evaluation-harness.

    Args:
        folder: written by ``dskd export``.
        tasks: task names of the harness.
        batch_size: as the harness takes it.
        output: also write the results to this JSON file.
        include_path: folder of task files of your own, beside the harness's.
        num_fewshot: examples in front of each question, instead of the task's own number.
        limit: score the first so many questions of each task only.
        apply_chat_template: ask the questions through the student's chat template.
        device: where it runs, such as cpu or cuda:0; left out, the GPU where there is one.
    """
    from dskd_lightning.evaluation.harness import run_harness
    from dskd_lightning.files import write_atomic

    found = run_harness(
        folder,
        tasks,
        batch_size=batch_size,
        include_path=include_path,
        device=device,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
    )
    results = dumps(found, indent=2)
    if output is not None:
        write_atomic(output, results + "\n")
    print(results)


def init(
    file: str = "dskd.yaml",
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
    output: str | None = None,
    yes: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a commented config for a teacher, a student and data; what isn't given is asked for.

    Tokenizers decide the objective, sizes and free memory what is trained and in which batches.

    Args:
        file: the config to write.
        teacher: a Hub id, a local folder, a GGUF file, or demo.
        student: likewise.
        data: an instruction file, a folder, a Hub dataset, or demo.
        output: the run folder that the config names; left out, runs/ and the file's name.
        yes: ask nothing: teacher, student and data must be given.
        overwrite: replace an existing file.
    """
    from dskd_lightning.cli.planning_commands import run_init

    run_init(file, teacher, student, data, output, yes, overwrite)


def judge(
    baseline: str,
    candidate: str,
    url: str,
    model: str,
    output: str = "judgements.jsonl",
    api_key_variable: str | None = None,
    max_requests: int | None = None,
    max_tokens: int | None = None,
) -> int:
    """Let a model behind an OpenAI-compatible endpoint choose between two runs' responses.

    Each prompt is asked in both orders; run again to go on where a failure or a limit stopped it.

    Args:
        baseline: a run folder with predictions.
        candidate: another one, for the same prompts.
        url: the endpoint up to and without /chat/completions.
        model: the model to ask.
        output: JSONL file of the verdicts.
        api_key_variable: environment variable that holds the key.
        max_requests: stop after so many requests.
        max_tokens: stop after so many tokens.
    """
    from dskd_lightning.cli.judge_command import judge_runs

    return judge_runs(baseline, candidate, url, model, output, api_key_variable, max_requests, max_tokens)


def prune(
    source: str,
    data: str,
    output: str | None = None,
    layers: int | None = None,
    sizes: list[int] | None = None,
    by: Literal["influence", "perplexity", "even"] = "influence",
    intermediate_size: int | None = None,
    examples: int = 64,
    max_length: int = 512,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
) -> None:
    """Show how large, fast and good a model is with fewer decoder layers, and write one of the sizes.

    Half of the examples choose the layers, the others measure. The folder is a student to train: cut like
    this, a model has lost much that distillation must give back.

    Args:
        source: a Hub id, a local folder, a GGUF file, or demo.
        data: of what the student will be trained for, as --data too: files, a Hub dataset, or demo.
        output: folder to write; without one the table is all.
        layers: how many decoder layers what is written there keeps; without a folder or sizes, the table is
            of this number and of all.
        sizes: numbers of layers in the table; six from all to a third without.
        by: keep those of largest influence, those without which perplexity would suffer most (slower), or
            evenly spaced ones.
        intermediate_size: also narrow the feed-forward layers to so many units; the table's first row is the
            whole model.
        examples: of the data, to choose and to measure.
        max_length: most tokens of an example.
        dtype: type of the weights.
        overwrite: replace a folder that is not empty.
    """
    from dskd_lightning.cli.prune_command import run_prune
    from dskd_lightning.planning.pruned_sizes import PruningStudy

    study = PruningStudy(source, data, by, intermediate_size, examples, max_length, dtype)
    run_prune(study, output, layers, sizes, overwrite)


def quickstart(output: str | None = None, overwrite: bool = False, cross: bool = False) -> None:
    """Train three small students of SmolLM2 on two CPU cores and compare them with a report.

    Takes eleven minutes where the processor computes in bfloat16 (AVX-512 or AMX); elsewhere it computes
    in float32 and takes several times as long. Needs the packages of ``dskd-lightning[demo]``. Interrupted,
    it goes on where it stopped.

    Args:
        output: folder of the runs, the table and the report; by default runs/quickstart, or
            runs/quickstart_cross.
        overwrite: start over; without it, finished variants are kept.
        cross: give the students a vocabulary of their own, trained on the demo's texts, and distil across the
            two vocabularies.
    """
    from dskd_lightning.cli.planning_commands import run_quickstart

    run_quickstart(output, overwrite, cross)


def benchmark(
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
    budget: str = "2h",
    output: str = "runs/benchmark",
    rates: list[float] = [1e-4, 3e-4],  # noqa: B006 (shown as the default)
    objectives: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Find the objective for a pair and data: several at one budget, compared, with a recommendation.

    Writes a config and a study into the folder, measures a short run, gives each objective the same steps and
    the same grid of learning rates, tests the best of each beside the teacher and the untrained student, and
    ends in the table, paired tests and one recommendation. Interrupted, it goes on where it stopped.

    Args:
        teacher: Hub id, folder, GGUF file, or demo.
        student: likewise.
        data: training data: file, folder, Hub dataset, or demo; a tenth is held out for the test.
        budget: time for everything, such as 45m or 2h; what a run's parts take here is measured first, within
            it, and the expected end is told.
        output: folder of the runs, the table and the report.
        rates: learning rates that each objective tries.
        objectives: any that ship and fit the pair, as the table calls them. Without it the usual ones and the
            one that `dskd vocab` names: SFT, logit KD, DSKD and DSKD v2 for one vocabulary; SFT, shared
            vocabulary, ALM, DSKD token alignment and DSKD cross-model attention for two. There are also top-k
            for one, and ULD, GOLD, MinEd, X-Token P-KL and X-Token H-KL.
        overwrite: start over.

    Raises:
        UserError: a model or data is missing or can't be read, or the budget leaves no time to train.
    """
    from dskd_lightning.cli.planning_commands import run_benchmark

    run_benchmark(teacher, student, data, budget, output, rates, objectives, overwrite)


def study(
    config: str, output: str | None = None, overwrite: bool = False, only: list[str] | None = None
) -> None:
    """Train and test several variants of one configuration, and compare them in one table.

    A variant that fails keeps no other from running; the next call tries it again.

    Args:
        config: a study file, or dskd:NAME. Its keys: ``base`` (configs for all), ``variants`` (name to
            config), ``output``.
        output: folder of the study, instead of the file's own.
        overwrite: start over; without it, finished variants are kept.
        only: run these variants only.
    """
    from dskd_lightning.study import Study

    Study.read(config, output).run(overwrite=overwrite, only=only)


def vocab(
    teacher: str,
    student: str,
    data: str | None = None,
    json: str | None = None,
    heatmap: str | None = None,
    run: str | None = None,
) -> None:
    """Explain a pair of tokenizers: overlap, alignment on your data, and a recommended objective.

    Args:
        teacher: a model or tokenizer: Hub id, folder, tokenizer.json, GGUF file, or demo.
        student: likewise.
        data: an instruction file to measure on.
        json: also write the numbers there.
        heatmap: also draw the byte alignment of the first responses to this PNG and others beside it.
        run: draw the cross-model attention of this run folder instead, byte-exact groups outlined.
    """
    from dskd_lightning.vocab import run_vocab

    run_vocab(teacher, student, data=data, json_path=json, heatmap=heatmap, run=run)
