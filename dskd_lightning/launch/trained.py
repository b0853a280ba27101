"""The student of a finished run, from its config and checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from dskd_lightning.checkpoints import read_checkpoint, read_identified
from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import option, read_yaml, settings_of
from dskd_lightning.launch.run_files import find_checkpoint
from dskd_lightning.models.spec import LoraSpec, ModelSpec, PruneSpec, StudentSpec, TeacherSpec
from dskd_lightning.models.student import build_student
from dskd_lightning.runs.identity import model_identity

if TYPE_CHECKING:
    from dskd_lightning.launch.lightning_cli import DistillationCLI

__all__ = [
    "load_identified",
    "load_student",
    "load_trained",
    "open_run",
    "specs_of",
    "student_spec_from_dict",
]

_S = TypeVar("_S", bound=ModelSpec)


def student_spec_from_dict(values: dict[str, Any]) -> StudentSpec:
    """A `StudentSpec` from the plain values that a checkpoint holds."""
    values = dict(values)
    prune, lora = values.pop("prune"), values.pop("lora")
    return StudentSpec(
        **values,
        prune=None if prune is None else PruneSpec(**prune),
        lora=None if lora is None else LoraSpec(**lora),
    )


def open_run(run: str | Path, ckpt_path: str | None = None, **options: Any) -> DistillationCLI:
    """Module and datamodule of a run folder as its config says, with the trained weights.

    Args:
        run: the run folder.
        ckpt_path: see `find_checkpoint`.
        options: dotted keys over the config's, underscored twice for the dot: ``data__test=FILE``.

    Raises:
        UserError: there is no config or checkpoint.
    """
    from dskd_lightning.launch.lightning_cli import DistillationCLI

    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a finished run.")
    checkpoint = find_checkpoint(run, ckpt_path)
    config = read_yaml(path)
    for key in ("ckpt_path", "weights_only"):  # options of `fit`, not of the objects it makes
        config.pop(key, None)
    settings = {"output": str(run), **options}
    arguments = [option(key.replace("__", "."), value) for key, value in settings.items()]
    cli = DistillationCLI(args=[f"--config={yaml.safe_dump(config)}", *arguments], run=False)
    state = read_checkpoint(checkpoint)
    cli.model.student_spec = student_spec_from_dict(state["student_spec"])  # its layers are counted out
    cli.model.configure_model()
    cli.model.load_state_dict(state["state_dict"], strict=False)
    cli.model.eval()
    return cli


def load_student(run: str | Path, ckpt_path: str | None = None) -> tuple[Any, Any]:
    """The trained student of a run folder, a model of transformers or peft in eval mode, and its tokenizer.

    Args:
        run: the run folder.
        ckpt_path: see `find_checkpoint`.

    Raises:
        UserError: there is no such checkpoint or it was not written by `DistillationModule`.
    """
    return load_trained(run, ckpt_path)


def specs_of(run: str | Path) -> tuple[ModelSpec, list[TeacherSpec]]:
    """What a run folder's config says of the student (weights and template alone) and of the teachers."""
    model = settings_of(read_yaml(Path(run) / "config.yaml"), "model")
    found = model.get("teacher") or []
    teachers = found if isinstance(found, list) else [found]
    return _spec(ModelSpec, model["student"]), [_spec(TeacherSpec, values) for values in teachers]


def _spec(kind: type[_S], values: dict[str, Any]) -> _S:
    known = {field.name for field in fields(kind)} - {"follow"}
    return kind(**{key: value for key, value in values.items() if key in known and value is not None})


def load_trained(run: str | Path, ckpt_path: str | None = None) -> tuple[Any, Any]:
    """Student and tokenizer with the trained weights of a checkpoint.

    Args:
        run: the run folder.
        ckpt_path: see `find_checkpoint`.

    Raises:
        UserError: there is no such checkpoint or it was not written by `DistillationModule`.
    """
    return load_identified(run, ckpt_path)[:2]


def load_identified(run: str | Path, ckpt_path: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """What `load_trained` gives, and which model that is (`model_identity`)."""
    path = find_checkpoint(run, ckpt_path)
    checkpoint, digest = read_identified(path)
    if "student_spec" not in checkpoint:
        raise UserError(
            f"{path} names no student: it isn't DistillationModule's, or the student was in memory "
            "(`Loaded`), which exports itself with `module.student.save_pretrained`."
        )
    model, tokenizer = build_student(student_spec_from_dict(checkpoint["student_spec"]))
    weights = {
        key.removeprefix("student."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("student.")
    }
    model.load_state_dict(weights, strict=False)
    return model.eval(), tokenizer, model_identity(run, checkpoint["global_step"], path, digest)
