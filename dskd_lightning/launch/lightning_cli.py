"""`dskd fit|validate|test|predict`: Lightning's command line with a run folder and our defaults."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

from dskd_lightning.callbacks import (
    BestCheckpoint,
    CompletionsTable,
    DistillationSummary,
    LastCheckpoint,
    ProgressLines,
    RepresentationAnalysis,
    ResponseEvaluation,
    ResumableCSVLogger,
    SampleFidelity,
    SignalStop,
    TeacherCheck,
    TrainingCost,
    TrainingMonitor,
    ValidationResponses,
)
from dskd_lightning.callbacks.best_checkpoint import DEFAULT_MONITOR
from dskd_lightning.checkpoints import restored
from dskd_lightning.checkpoints.trainer_io import use_whole_checkpoints
from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.launch.arguments import settings_of
from dskd_lightning.launch.evaluated_teacher import evaluate_teacher, without_model_choice
from dskd_lightning.launch.own_classes import OwnClasses, OwnClassesParser
from dskd_lightning.launch.run_files import clear_run, find_checkpoint, is_exported, trained_checkpoint
from dskd_lightning.models.spec import StudentSpec
from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.console import configure_output
from dskd_lightning.runs.lock import lock_run
from dskd_lightning.runs.run_folder import TEACHER
from dskd_lightning.runs.validation_metrics import Mode
from dskd_lightning.strategies import check_strategy, check_strategy_name

__all__ = ["DistillationCLI"]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class _ProgressBar(RichProgressBar):
    """Without the version of the first logger, which a run folder doesn't have."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class _SaveConfig(SaveConfigCallback):
    """Keeps ``config.yaml`` of the run folder, which a resumed run writes again, and tells the loggers.

    How that command began is left out: later ones that read the file choose for themselves.
    """

    def __init__(self, parser: Any, config: Any, **options: Any) -> None:
        config = config.clone()
        config["overwrite"] = False
        if "ckpt_path" in config:
            config["ckpt_path"] = None
        super().__init__(parser, config, **options)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Which layers a pruned student keeps was measured: later commands take the list."""
        student = cast("DistillationModule", pl_module).student_spec
        prune = student.prune if isinstance(student, StudentSpec) else None
        written = self.config.model.get("student.prune") if prune is not None else None
        if prune is not None and written is not None and written.layers != prune.layers:
            written.layers = prune.layers
            if trainer.is_global_zero:
                path = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
                parameters = inspect.signature(self.parser.dump).parameters
                whole = "skip_unset" if "skip_unset" in parameters else "skip_none"  # before 4.50
                write_atomic(path, self.parser.dump(self.config, **{whole: False}))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        values = yaml.safe_load(self.parser.dump(self.config))
        for log in trainer.loggers:
            if not isinstance(log, ResumableCSVLogger):  # it lies beside config.yaml
                log.log_hyperparams(values)


class DistillationCLI(LightningCLI):
    """Reads composable YAML files and runs a `DistillationModule` on an `InstructionDataModule`.

    Subclasses of one's own take their places by ``class_path`` and ``init_args``, see `OwnClasses`.

    Beside Lightning's own keys a config has ``output`` (the run folder), ``overwrite``,
    ``save_every_n_steps``, ``best`` (what the best checkpoint is chosen by), ``completions``
    (`CompletionsTable`), ``responses`` (`ResponseEvaluation`), ``validation`` (`ValidationResponses`),
    ``samples`` (`SampleFidelity`), ``analysis`` (`RepresentationAnalysis`), ``monitor``
    (`TrainingMonitor`) and ``teacher_check`` (`TeacherCheck`).
    """

    def __init__(self, args: Any = None, run: bool = True, **kwargs: Any) -> None:
        configure_output()  # again: importing Lightning has added its own handlers
        given = sys.argv[1:] if args is None else args
        self._called = given[0] if isinstance(given, list) and given else None
        given, self._of_teacher = without_model_choice(given) if isinstance(given, list) else (given, False)
        self.own_classes = OwnClasses(given)
        self._mistake: UserError | None = None
        super().__init__(
            self.own_classes.chosen["model"],
            self.own_classes.chosen["data"],
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            auto_configure_optimizers=False,
            args=self.own_classes.arguments,
            run=run,
            parser_class=OwnClassesParser,
            parser_kwargs={
                "prog": "dskd",
                "description": "Distil one language model into another.",
                "allow_abbrev": False,
                **{name: {"allow_abbrev": False} for name in self.subcommands()},
            },
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is called, where that is known: parsers of the others take half a second."""
        known = LightningCLI.subcommands()
        return {self._called: known[self._called]} if self._called in known else known

    def _parse_ckpt_path(self) -> None:
        """Nothing: a run is what its config and options say, whatever a checkpoint that is named says."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = cast("OwnClassesParser", super().init_parser(**kwargs))
        parser.own_classes = self.own_classes if self.own_classes.paths else None
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output",
            type=str,
            default="runs/default",
            help="Folder of this run: checkpoints, logs, results.",
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Start over in a used run folder.")
        parser.add_argument(
            "--untrained",
            type=bool,
            default=False,
            help="Evaluate the student as it is before training, whatever checkpoints there are.",
        )
        parser.add_argument(
            "--save_every_n_steps",
            type=int,
            default=100,
            help="Optimiser steps between checkpoints to resume from.",
        )
        parser.add_argument(
            "--best.monitor",
            type=str,
            default=DEFAULT_MONITOR,
            help="Metric of the validation that checkpoints/best.ckpt is chosen by: val/nll_per_token, "
            "val/kl, val/rougeL (with validation.prompts), ...",
        )
        parser.add_argument(
            "--best.mode",
            type=Mode | None,
            default=None,
            help="Which is better; needed for metrics of your own code alone.",
        )
        parser.add_lightning_class_args(DistillationSummary, "summary")
        parser.add_lightning_class_args(CompletionsTable, "completions")
        parser.add_lightning_class_args(ResponseEvaluation, "responses")
        parser.add_lightning_class_args(ValidationResponses, "validation")
        parser.add_lightning_class_args(SampleFidelity, "samples")
        parser.add_lightning_class_args(RepresentationAnalysis, "analysis")
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(TeacherCheck, "teacher_check")
        parser.link_arguments("output", "responses.output")
        parser.link_arguments("output", "samples.output")
        parser.link_arguments("output", "analysis.output")
        for attribute, target in (("student_spec", "data.student"), ("teacher_specs", "data.teacher")):
            if cast("OwnClassesParser", parser).accepts(target):
                parser.link_arguments(f"model.{attribute}", target, apply_on="instantiate")
        parser.set_defaults({"trainer.enable_model_summary": False, "trainer.log_every_n_steps": 1})

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self._of_teacher:
            self._choose_teacher(config)
        output = Path(config.output)
        checkpoints = output / "checkpoints"
        if self.subcommand == "fit" and config.get("ckpt_path") is None and _is_requeued(checkpoints):
            config.ckpt_path, config.overwrite = "last", False
        self._resolve_checkpoint(config, checkpoints)
        strategy = config.trainer.strategy
        check_strategy_name(strategy if isinstance(strategy, str) else strategy.get("class_path", ""))
        if self.subcommand == "fit":
            self._check_unused(config)
            start = config.model.get("weights_from")
            if start and config.overwrite and Path(start).resolve().is_relative_to(output.resolve()):
                raise UserError(
                    f"--model.weights_from: {start} lies in {output}, where the new run starts over; "
                    "name another --output."
                )
        config.trainer.default_root_dir = str(output)  # for what is written without a logger, too

    def _check_unused(self, config: Any) -> None:
        checkpoints = Path(config.output) / "checkpoints"
        used = any(checkpoints.glob("*.ckpt")) or any(checkpoints.glob(".*.ckpt.old"))
        if used and config.get("ckpt_path") is None and not config.overwrite:
            raise UserError(
                f"--output: {config.output} already holds a run; resume it with `--ckpt_path last`, "
                "start over with `--overwrite true`, or name another folder."
            )

    def _choose_teacher(self, config: Any) -> None:
        if self.subcommand == "fit":
            raise UserError("--model teacher: a teacher is evaluated, with validate, test or predict.")
        if config.get("ckpt_path") is not None:
            raise UserError("--model teacher: a teacher is what its source says; leave --ckpt_path out.")
        config.untrained = True
        if self.subcommand is not None:  # a study names the folder itself
            config.output = str(Path(config.output) / TEACHER)
            for part in ("responses", "samples", "analysis"):
                config[part].output = config.output
        logger.info("evaluating the teacher; results go to %s", config.output)

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self._make, object)

    def _make(self, class_type: type[_T], *args: Any, **options: Any) -> _T:
        """An object of a config; what its class says of the user's mistake is kept."""
        try:
            return class_type(*args, **options)
        except UserError as error:
            self._mistake = error
            raise

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error, UserError) or self._mistake is None:
                raise
            raise self._mistake from None  # the parser's words are of all types that an argument might have
        if self._of_teacher:
            evaluate_teacher(self.model, self.datamodule)
        self.model._log_hyperparams = False  # loggers get the whole config, see _SaveConfig

    def before_fit(self) -> None:
        self._lock()
        if self.trainer.is_global_zero:
            self._check_unused(self.config[self.subcommand])  # another run may have come and gone meanwhile
        if self.config[self.subcommand].get("ckpt_path") is not None:
            self.model.weights_from = None  # the checkpoint holds what came of them
        elif self.config[self.subcommand].overwrite and self.trainer.is_global_zero:
            clear_run(self.config[self.subcommand].output)

    def before_validate(self) -> None:
        self._lock()

    def before_test(self) -> None:
        self._lock()

    def before_predict(self) -> None:
        self._lock()

    def _lock(self) -> None:
        if self.trainer.is_global_zero:
            lock_run(self.config[self.subcommand].output)

    def _resolve_checkpoint(self, config: Any, folder: Path) -> None:
        name = config.get("ckpt_path")
        evaluates = self.subcommand in ("validate", "test", "predict")
        if evaluates and config.untrained:
            if name is not None:
                raise UserError(f"--untrained true: --ckpt_path {name} is trained; give one of them.")
            if not self._of_teacher:
                logger.info("evaluating the student as it is before training")
        elif name is not None:
            config.ckpt_path = str(find_checkpoint(folder.parent, name))
        elif evaluates:
            self._choose_checkpoint(config, folder)

    def _choose_checkpoint(self, config: Any, folder: Path) -> None:
        """What is evaluated where nobody says it."""
        found = trained_checkpoint(folder)
        if found is not None:
            config.ckpt_path = str(found)
            why = "" if found.stem == "best" else ", since no validation has chosen a best one"
            logger.info("evaluating %s%s", found, why)
            return
        source = settings_of(settings_of(config.as_dict(), "model"), "student").get("source")
        if (folder.parent / "config.yaml").exists() or not is_exported(source):
            raise UserError(
                f"There is no checkpoint in {folder}: train first, give --ckpt_path, or evaluate the "
                "student as it is before training with `--untrained true`."
            )
        logger.warning(
            "evaluating the exported student '%s' itself: there is no run in %s", source, folder.parent
        )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        outer = self.config[self.subcommand] if self.subcommand else self.config
        folder = Path(outer.output) / "checkpoints"
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        saving = config.get("enable_checkpointing") is not False
        if saving and not any(isinstance(callback, ModelCheckpoint) for callback in given):
            best = BestCheckpoint(folder, outer.best.monitor, outer.best.mode)
            callbacks = [*callbacks, best, LastCheckpoint(folder, outer.save_every_n_steps)]
        elif outer.best.monitor != DEFAULT_MONITOR:
            raise UserError(
                f"best.monitor: {outer.best.monitor} would choose nothing: trainer.enable_checkpointing is "
                "false, or a ModelCheckpoint of your own is among trainer.callbacks."
            )
        stop = SignalStop(folder / "last.ckpt" if saving else None)
        callbacks = [*callbacks, TrainingCost(outer.output), stop]
        shown = any(isinstance(callback, ProgressBar) for callback in given)
        if config.get("enable_progress_bar") is not False and not shown:
            callbacks = [*callbacks, _ProgressBar() if Console().is_terminal else ProgressLines()]
        if config.get("logger") is not False:
            config = {**config, "logger": self._loggers(config.get("logger"), Path(outer.output))}
            callbacks = [*callbacks, LearningRateMonitor("step")]
        trainer = super()._instantiate_trainer(config, callbacks)
        cached = getattr(self.datamodule, "teacher_cache", None) is not None
        check_strategy(trainer, self.model.teacher_specs, cached=cached)  # before processes are started
        use_whole_checkpoints(trainer)
        return trainer

    def _loggers(self, given: Any, output: Path) -> list[Logger]:
        """The run folder's CSV log, which reports read, and beside it the given loggers or TensorBoard."""
        outer = self.config[self.subcommand] if self.subcommand else self.config
        resuming = self.subcommand == "fit" and bool(outer.get("ckpt_path"))
        log = ResumableCSVLogger(output, resume=resuming or self.subcommand != "fit", retrain=resuming)
        if given is None or given is True:
            return [log, TensorBoardLogger(output, name="", version="tensorboard", default_hp_metric=False)]
        return [log, *(given if isinstance(given, list) else [given])]


def _is_requeued(checkpoints: Path) -> bool:
    """Whether SLURM has started this job again, and it had come far enough to resume."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and restored(checkpoints / "last.ckpt").exists()
