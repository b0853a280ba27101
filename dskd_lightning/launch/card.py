"""The README.md of an exported student: what it was made of, how, and how well it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dskd_lightning import __version__
from dskd_lightning.data.urls import is_url, masked
from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object
from dskd_lightning.launch.arguments import read_yaml, settings_of
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import visible

__all__ = ["model_card"]

_METRICS = (
    ("perplexity_per_token", "Perplexity on the test responses", "{:.2f}"),
    ("perplexity_per_byte", "Perplexity per byte", "{:.3f}"),
    ("kl", "KL divergence from the teacher, nats a token", "{:.3f}"),
    ("agreement", "Most likely token is the teacher's", "{:.1%}"),
    ("aligned_kl", "KL divergence from the teacher on aligned tokens, nats", "{:.3f}"),
    ("aligned_agreement", "Most likely token is the teacher's, aligned tokens", "{:.1%}"),
    ("rougeL", "ROUGE-L of generated responses", "{:.1f}"),
    ("exact_match", "Exact match of generated responses, percent", "{:.1f}"),
    ("distinct_2", "Distinct bigrams of generated responses", "{:.3f}"),
)
_TODO = "**to confirm**"


def model_card(run: str | Path, comparison: str | Path | None = None) -> str | None:
    """Markdown with the Hub's front matter; paths of this machine are cut to their last part.

    Args:
        run: the run folder.
        comparison: folder or ``comparison.json`` of a ``dskd compare`` that the run was in.

    Returns:
        None where the run has no ``config.yaml``: Python made it, and knows what it was made of.

    Raises:
        UserError: a file of the run is damaged, or the comparison hasn't the run.
    """
    folder = RunFolder.read(run)
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return None
    config = read_yaml(path)
    model, data = settings_of(config, "model"), settings_of(config, "data")
    student, teachers = _section(model, "student"), _teachers(model.get("teacher"))
    parts = [
        _front_matter(student, teachers),
        f"# {_name(student.get('source')) or 'A student'} distilled by dskd-lightning",
        _how(student, teachers, model, data, config, folder),
        "## Results\n\n" + _results(folder, data),
    ]
    if comparison is not None:
        parts.append("## Against other runs\n\n" + _compared(Path(comparison), folder))
    parts += [_LIMITS, _licences(student, teachers, data)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_LIMITS = f"""## Limits

- It imitates its teacher on the training data's kind of prompts; elsewhere nobody has measured it. It
  inherits the teacher's errors and biases, and a smaller model makes more of them.
- ROUGE-L measures overlap with reference responses, not truth, safety or helpfulness. Neither safety nor
  robustness has been evaluated.
- Intended use: {_TODO}."""


def _front_matter(student: Mapping[str, Any], teachers: list[dict[str, Any]]) -> str:
    hub = [s for s in [student.get("source"), *(t.get("source") for t in teachers)] if _is_hub_id(s)]
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(student.get("source")):
        values["base_model"] = student["source"]
    values["tags"] = ["knowledge-distillation", "dskd-lightning"]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    note = "# license: to confirm; the student's, the teacher's and the data's licences apply"
    note += f" ({', '.join(dict.fromkeys(map(str, hub)))})" if hub else ""
    return f"---\n{text}{note}\n---"


def _how(
    student: Mapping[str, Any],
    teachers: list[dict[str, Any]],
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: RunFolder,
) -> str:
    objective = _section(model, "objective")
    settings = {k: v for k, v in (objective.get("init_args") or {}).items() if v is not None}
    trainer = _section(config, "trainer")
    rows = {
        "Student": _model_text(student),
        "Teacher": "; ".join(map(_model_text, teachers)) or "none",
        "Objective": f"`{str(objective.get('class_path', '')).rpartition('.')[2]}`"
        + (f" with {_listed(settings)}" if settings else ""),
        "Training data": _sources(data.get("train")),
        "Budget": _listed({k: trainer.get(k) for k in ("max_epochs", "max_steps", "accumulate_grad_batches")})
        + f", batch size {data.get('batch_size')}",
        "Lengths": f"at most {data.get('max_length')} tokens",
        "Seed": str(config.get("seed_everything")),
        "Versions": f"dskd-lightning {__version__}"
        + "".join(
            f", {k} {v}" for k, v in (folder.environment.get("packages") or {}).items() if k == "torch"
        ),
    }
    if folder.training:
        rows["Cost"] = (
            f"{folder.training.get('seconds', 0) / 60:.1f} minutes, {folder.training.get('steps')} steps"
        )
    table = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]
    return "## How it was made\n\n" + "\n".join(table)


def _results(folder: RunFolder, data: Mapping[str, Any]) -> str:
    rows = [
        f"| {label} | {form.format(folder.metrics[key])} |"
        for key, label, form in _METRICS
        if key in folder.metrics
    ]
    if not rows:
        return "Not tested: `dskd test` writes the numbers that belong here."
    prompts = len(next(iter(folder.predictions.values()), []))
    seeds = ", ".join("greedy" if seed is None else str(seed) for seed in folder.predictions)
    what = _sources(data.get("test")) if data.get("test") else "held out of the training data"
    head = (
        f"Test data: {_cell(what)}"
        + (f"; {prompts} prompts answered, seeds: {seeds}" if prompts else "")
        + "."
    )
    return "\n".join([head, "", "| metric | value |", "|---|---:|", *rows])


def _compared(path: Path, folder: RunFolder) -> str:
    path = path / "comparison.json" if path.is_dir() else path
    found = read_object(path, "give the folder that `dskd compare` wrote")
    candidates = found.get("candidates")
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        raise UserError(f"{path}: holds no comparison; give the folder that `dskd compare` wrote.")
    if folder.name not in [found.get("baseline"), *(c.get("name") for c in candidates)]:
        raise UserError(f"{path}: does not compare the run {folder.name!r}; name a comparison that does.")
    lines = [
        f"{found.get('metric')}, paired bootstrap over the same prompts, p-values adjusted for their number; "
        f"the baseline is {_cell(found.get('baseline'))} ({found.get('baseline_mean', 0):.2f}).",
        "",
        "| run | mean | difference | p | |",
        "|---|---:|---:|---:|---|",
    ]
    for item in candidates:
        test, p_value = item.get("difference") or {}, item.get("adjusted_p_value", 1)
        lines.append(
            f"| {_cell(item.get('name'))} | {item.get('mean', 0):.2f} | {test.get('mean', 0):+.2f} "
            f"({test.get('low', 0):+.2f}, {test.get('high', 0):+.2f}) | {p_value:.2g} "
            f"| {item.get('outcome')} |"
        )
    return "\n".join(lines)


def _licences(student: Mapping[str, Any], teachers: list[dict[str, Any]], data: Mapping[str, Any]) -> str:
    lines = [f"- Student, {_cell(_name(student.get('source')))}: {_TODO}"]
    lines += [
        f"- Teacher, {_cell(_name(teacher.get('source')))}: {_TODO}, whether its licence lets its outputs "
        "train other models, too"
        for teacher in teachers
    ]
    lines.append(f"- Data, {_cell(_sources(data.get('train')))}: {_TODO}")
    return "## Licences\n\n" + "\n".join(lines)


def _teachers(found: object) -> list[dict[str, Any]]:
    items = found if isinstance(found, list) else [found]
    return [item for item in items if isinstance(item, dict)]


def _model_text(spec: Mapping[str, Any]) -> str:
    changes = {k: spec.get(k) for k in ("tokenizer", "adapter", "quantization") if spec.get(k)}
    changes |= {k: _listed(spec[k]) for k in ("prune", "lora") if isinstance(spec.get(k), dict)}
    return _name(spec.get("source")) + (f" ({_listed(changes)})" if changes else "")


def _sources(found: object) -> str:
    return ", ".join(_name(source) for source in (found if isinstance(found, list) else [found])) or "none"


def _name(source: object) -> str:
    """A Hub id as it is, a URL without what is secret; of a path on this machine its last part."""
    if source is None or _is_hub_id(source):
        return str(source)
    return masked(str(source)) if is_url(str(source)) else Path(str(source)).name


def _is_hub_id(source: object) -> bool:
    text = str(source)
    return source is not None and text.count("/") == 1 and text[0] not in "./~" and not Path(text).exists()


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(_pairs(values))


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{key}: {str(value.get('class_path', _listed(value))).rpartition('.')[2]}"
        elif value is not None and value != -1:
            yield f"{key}: {_name(value) if isinstance(value, str) else value}"


def _cell(text: object) -> str:
    """Nothing in a name ends a cell, a line or begins an element."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = visible(str(text)).replace(character, entity)
    return str(text)
