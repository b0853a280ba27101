"""`DistillationModule`: wires teachers, student and objectives into Lightning. No mathematics."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dskd_lightning.assembly.arguments import check_arguments, plain_arguments
from dskd_lightning.assembly.figures import forget_other_figures, gradient_norms, on_host
from dskd_lightning.assembly.teachers import (
    ask_absent_teachers,
    build_teacher,
    cached_heads,
    make_followers,
)
from dskd_lightning.assembly.trained_state import (
    alike_on_all_ranks,
    drop_untrained,
    miss_trained_alone,
    trained_names,
)
from dskd_lightning.checkpoints.checks import READ_DIGEST_KEY, read_checkpoint
from dskd_lightning.checkpoints.trainer_io import use_whole_checkpoints
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.samples import BatchOfSamples, prompts_of
from dskd_lightning.described import described, restored
from dskd_lightning.errors import Diverged, UserError
from dskd_lightning.functional.precision import cast_once
from dskd_lightning.generation.generator import Generation, GenerationSettings, Generator
from dskd_lightning.generation.samples import Sample
from dskd_lightning.models.absent import AbsentTeacher
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.output import decoder_hidden, language_head, model_space, side
from dskd_lightning.models.spec import PruneSpec, Student, StudentSpec, Teacher, TeacherSpec
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.models.verification import verify_devices, verify_packing, verify_tokenizers
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.ranks import gathered, rank_and_world, sum_over_ranks
from dskd_lightning.strategies import check_strategy, shard
from dskd_lightning.structures import (
    DistillationBatch,
    LogProbabilities,
    ModelSpace,
    PaddedStatistics,
    Ratio,
    Side,
    TokenBatch,
)
from dskd_lightning.teacher_cache import TeacherHead
from dskd_lightning.training import RatioMeter, cosine_with_warmup, follow_schedule, parameter_groups
from dskd_lightning.training.fidelity import fidelity, shared_tokens
from dskd_lightning.training.following import Follower
from dskd_lightning.training.length import follow_accumulation, total_steps
from dskd_lightning.training.monitor import TrainingMonitor
from dskd_lightning.training.on_policy import OnPolicySettings, SampleBuffer, on_samples, sample_metrics
from dskd_lightning.training.on_processor import suit_processor
from dskd_lightning.training.optimization import check_clipping, check_rates, made_optimizer
from dskd_lightning.training.origin import (
    StartingWeights,
    check_origin,
    check_tensors,
    optimization_origin,
    parts_of,
    weight_sample,
)
from dskd_lightning.training.projector_warmup import check_warmup, forget_gradients, touched
from dskd_lightning.training.rank_loads import RankLoads
from dskd_lightning.training.resuming import settle_progress
from dskd_lightning.training.teacher_check import TeacherCheck
from dskd_lightning.training.tuning import check_tuning
from dskd_lightning.training.whole_steps import (
    mean_over_step,
    measure_whole_steps,
    settle,
    settle_before_steps,
)
from dskd_lightning.training.windows import look_ahead

if TYPE_CHECKING:
    from dskd_lightning.models.layer_choice import Calibration

__all__ = ["DistillationModule"]

_T = TypeVar("_T")


class DistillationModule(L.LightningModule):
    """A frozen teacher (or several) beside a student that trains on an objective.

    The loss of an optimiser step is the sum over all its response tokens, on all ranks and in
    all micro-batches, divided by their number (METHODS, "Notation"), so that accumulation and
    data parallelism do not change the result.

    Args:
        student: the model to train, by its spec or `Loaded`.
        objective: what to minimise; one per teacher where there are several teachers.
        teacher: the model to learn from, likewise; None for plain supervised fine-tuning.
        optimizer: makes the optimiser from parameter groups.
        lr_scheduler: makes a per-step scheduler from the optimiser; None takes linear warm-up
            and a cosine.
        projector_lr: learning rate of projectors and other parts of the objective; None takes
            the optimiser's.
        warmup_ratio: share of the steps that warm up, with the default schedule.
        min_lr_ratio: last learning rate over the peak, with the default schedule.
        joint_clipping: clip the student's and the projectors' gradients by their common norm, as
            published. By default ``gradient_clip_val`` holds for each of the two by itself, or projectors,
            whose gradients are many times larger at first, would leave the student hardly any.
        on_policy: learn from responses that the student samples, in every step or in some; None learns from
            the dataset's alone.
        projector_warmup_steps: optimiser steps at the beginning in which projectors alone learn. The student
            runs without a gradient, or not at all where their objective needs none of its states (DSKD v2,
            token alignment: fast with a teacher cache); its schedule begins behind them.
        weights_from: an earlier run's folder or checkpoint whose trained weights a fit starts from; its
            student must fit, projectors that don't start anew, as do optimiser, schedule and data.
    """

    def __init__(
        self,
        student: Student,
        objective: Objective | list[Objective],
        teacher: Teacher | list[Teacher] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        projector_lr: float | None = 1e-3,
        warmup_ratio: float = 0.1,
        min_lr_ratio: float = 0.0,
        joint_clipping: bool = False,
        on_policy: OnPolicySettings | None = None,
        weights_from: str | None = None,
        projector_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.student_spec: StudentSpec | Loaded = student
        teachers = teacher if isinstance(teacher, list) else [teacher]
        self.teacher_specs: list[TeacherSpec | Loaded] = [t for t in teachers if t is not None]
        self.objectives = nn.ModuleList(objective if isinstance(objective, list) else [objective])
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.projector_lr = projector_lr
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio
        self.joint_clipping = joint_clipping
        check_rates(projector_lr, warmup_ratio, min_lr_ratio)
        if projector_warmup_steps < 0:
            raise UserError(f"model.projector_warmup_steps: {projector_warmup_steps} must be at least 0.")
        self.projector_warmup_steps = projector_warmup_steps
        self.on_policy = on_policy
        self._buffer: SampleBuffer | None = None
        self._saved_samples: list[dict[str, Any]] | None = None
        self._followers: list[Follower] = []
        self.weights_from = weights_from
        self._origin: dict[str, Any] = {}
        self._resumed: tuple[dict[str, Any], object] | None = None
        self.lr: float | None = None
        """Learning rate of the student in the place of the optimiser's; a Tuner's ``lr_find`` sets it."""
        self.generation = GenerationSettings(max_length=512)
        """How `predict_step` generates: greedily, or with `generation_seed`."""
        self.generation_seed: int | None = None
        self.trained_steps = 0
        """Optimiser steps of the checkpoint that was read last."""
        self.read_digest: str | None = None
        """What its content is called by (`digest_of`); None where another program's strategy read it."""
        self.student: Any = None
        self.teachers = nn.ModuleList()
        self.checkpoint_names: frozenset[str] = frozenset()
        self.strict_loading = False  # a checkpoint lacks frozen weights; see on_load_checkpoint
        self._shared_tokens: tuple[Tensor, Tensor] | None = None
        self._checked_tokenizers: tuple[str, ...] = ()
        self._meter, self._loads = RatioMeter(), RankLoads()
        self._losses: list[tuple[Tensor, Tensor, int]] = []  # since the last look: loss, examples, batch
        self._evaluation_meter = RatioMeter()
        check_arguments(self.teacher_specs, self._objectives(), on_policy)
        self.save_hyperparameters(self._described())
        self.register_state_dict_post_hook(drop_untrained)
        self.register_load_state_dict_post_hook(miss_trained_alone)

    def _objectives(self) -> list[Objective]:
        return cast("list[Objective]", list(self.objectives))

    # --- models -------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build student, teachers and the objectives' projectors; called by every strategy."""
        if self.student is not None:
            self._load_teachers(self.device)  # another stage may need whole teachers, or find a cache
            return
        if self._trainer is not None:
            settings = getattr(getattr(self.trainer, "datamodule", None), "teacher_cache", None)
            check_strategy(self.trainer, self.teacher_specs, cached=settings is not None)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.on_policy is not None:
            datamodule: Any = cast("Any", self._trainer).datamodule
            if hasattr(datamodule, "check_prompts"):  # one of ours
                datamodule.check_prompts()
        model, tokenizer = self._build_student()
        student_space = model_space(model, tokenizer)
        student = self.student_spec
        whole = isinstance(student, Loaded) or student.random_init  # its checkpoints lack nothing of it
        drawn = whole and not isinstance(model, PeftModel)
        self._origin = {"student": "" if drawn else weight_sample(student_space.head.weight)}
        start = StartingWeights(self.weights_from) if self.weights_from is not None and fitting else None
        if start is not None:
            start.load(model, "student")
        needed = [o.needs_teacher for o in self._objectives()]
        self._load_teachers(student_space.head.weight.device)
        spaces: list[ModelSpace] = []
        for spec, teacher in zip(self.teacher_specs, self.teachers, strict=True):
            own = load_tokenizer(spec)
            if isinstance(teacher, AbsentTeacher):
                spaces.append(teacher.space(own, student_space.head.weight.device))
            else:
                spaces.append(model_space(cast("Any", teacher), own))
        if any(isinstance(spec, Loaded) for spec in (student, *self.teacher_specs)):
            named = {spec.source: space for spec, space in zip(self.teacher_specs, spaces, strict=True)}
            verify_devices(student.source, student_space.head.weight.device, named)
        for index, objective in enumerate(self._objectives()):
            objective.configure(student_space, spaces[index] if needed[index] else None)
        if start is not None:
            start.load(self.objectives, "objectives")
        self._origin["teacher"] = [weight_sample(space.head.weight) for space in spaces]
        self._origin["objective or projector"] = parts_of(self.objectives)
        self.student, self.tokenizer = model, tokenizer
        self._shared_tokens = shared_tokens(student_space, spaces[0]) if spaces else None
        self.checkpoint_names = trained_names(self)
        self._followers = make_followers(model, self.teacher_specs, list(self.teachers), self._objectives())
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    def _build_student(self) -> tuple[Any, Any]:
        if not isinstance(self.student_spec, StudentSpec):
            self.student_spec.check_student(self.teacher_specs)
            model, tokenizer = self.student_spec.build()
            return model.train(), tokenizer
        calibration = self._calibration()
        mixed = self._trainer is not None and isinstance(self.trainer.precision_plugin, MixedPrecision)
        with self.trainer.precision_plugin.forward_context() if mixed else nullcontext():
            self.student_spec = self._agreed(self.student_spec.decided(calibration))
        return self.student_spec.build(calibration)

    def _calibration(self) -> Calibration | None:
        """Training text to prune the student by, where there is any."""
        datamodule: Any = None if self._trainer is None else cast("Any", self._trainer).datamodule
        return getattr(datamodule, "calibration", None) if getattr(datamodule, "trains", False) else None

    def _agreed(self, spec: StudentSpec) -> StudentSpec:
        """The first rank's student, since two devices may round scores differently."""
        if self._trainer is None or self.trainer.world_size == 1 or spec == self.student_spec:
            return spec
        return cast("StudentSpec", self.trainer.strategy.broadcast(spec))

    def _load_teachers(self, device: torch.device) -> None:
        """Whole teachers or, where the datamodule keeps their hidden states, their heads on ``device``."""
        if self.complete_teachers or not self.teacher_specs:
            return
        heads = cached_heads(self._trainer, self.teacher_specs, self._objectives(), self.on_policy)
        if heads is not None:
            if not self.teachers:
                pairs = zip(heads, self.teacher_specs, strict=True)
                self.teachers = nn.ModuleList(head or build_teacher(spec) for head, spec in pairs).to(device)
        elif not self.teachers or any(isinstance(teacher, TeacherHead) for teacher in self.teachers):
            if self._trainer is not None:
                check_strategy(self.trainer, self.teacher_specs)
            self.teachers = nn.ModuleList(build_teacher(spec) for spec in self.teacher_specs)
        ask_absent_teachers(self._trainer, self.teacher_specs, self._objectives())

    def follow_student(self, step: int) -> None:
        """Let teachers with ``follow`` take up the student's weights in front of an optimiser step.

        A Trainer needs no call.
        """
        for follower in self._followers:
            follower.update(step)

    @property
    def complete_teachers(self) -> bool:
        """Whether whole teachers are loaded, as generation needs, not their heads alone."""
        partly = (TeacherHead, AbsentTeacher)
        return len(self.teachers) > 0 and not any(isinstance(t, partly) for t in self.teachers)

    @property
    def has_teacher_states(self) -> bool:
        """Whether the first teacher's hidden states can be read, by running it or from a cache."""
        return len(self.teachers) > 0 and not isinstance(self.teachers[0], AbsentTeacher)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel needn't send, neither at first nor in every forward pass."""
        return alike_on_all_ranks(self, self.teacher_specs)

    def train(self, mode: bool = True) -> DistillationModule:
        """As `nn.Module.train`, but teachers always stay in eval mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    def configure_callbacks(self) -> list[L.Callback]:
        """What a run needs whoever started it: early warnings, where the Trainer has none."""
        given = cast("Any", self.trainer).callbacks
        kinds = (TrainingMonitor, TeacherCheck)
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]

    def setup(self, stage: str) -> None:
        """Let a Trainer that has no way of its own write checkpoints that are whole or absent."""
        check_tuning(self.trainer)
        suit_processor(self.trainer, (self.student_spec, *self.teacher_specs))
        use_whole_checkpoints(self.trainer)

    # --- steps --------------------------------------------------------------------------------

    def as_step(self, function: Callable[[], _T]) -> _T:
        """What ``function`` gives, called as a step is, where it may read and run models and objectives.

        In the Trainer's precision; outside of steps the weights of a sharded module aren't there: all ranks
        call this then.
        """
        for objective in self.objectives:
            if isinstance(objective, FSDPModule):
                objective.unshard()
        with nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context():
            return function()

    def student_side(
        self, tokens: TokenBatch, padded_statistics: bool = False, sampled: bool = False
    ) -> Side:
        """The student's hidden states at the response positions, with a gradient."""
        hidden = decoder_hidden(self.student, tokens, padding_too=padded_statistics)
        return side(self.student, hidden, tokens, padded_statistics=padded_statistics, sampled=sampled)

    def teacher_side(
        self,
        index: int,
        tokens: TokenBatch,
        hidden: Tensor | LogProbabilities | None = None,
        padded_statistics: bool = False,
        sampled: bool = False,
    ) -> Side:
        """A teacher's hidden states at the response positions, from its decoder or the cache.

        Args:
            index: which teacher.
            tokens: its own token ids.
            hidden: ``[m, hidden]`` from a cache, or log-probabilities; None runs the decoder.
            padded_statistics: also compute `Side.padded` (not from a cache).
            sampled: the student sampled the responses.
        """
        teacher: Any = self.teachers[index]
        if isinstance(hidden, LogProbabilities):
            side_of: Side = teacher.side(hidden, tokens)
            return side_of
        with torch.no_grad():
            values = hidden
            if values is None:
                values = decoder_hidden(teacher, tokens, padding_too=padded_statistics)
            return side(teacher, values, tokens, padded_statistics=padded_statistics, sampled=sampled)

    def forward(self, batch: DistillationBatch) -> Tensor:
        """``[n, vocabulary]``: the student's logits at the batch's ``n`` response positions.

        Row ``i`` predicts ``batch.student.labels.flatten()[batch.student.response[i]]``. Losses go
        another way: they read hidden states and never hold all logits at once.
        """
        student = self.student_side(batch.student)
        return student.head.logits(student.hidden)

    @cast_once()
    def distil(self, batch: DistillationBatch) -> ObjectiveOutput:
        """The objective on one batch: teachers' outputs are averaged by their weights."""
        self._check_batch(batch)
        objectives = list(self._objectives())
        padded = any(o.needs_padded_statistics for o in objectives)
        if self._warming_up:
            student = self._bystander(batch, padded)
        else:
            student = self.student_side(batch.student, padded, batch.sampled)
        if not any(o.needs_teacher for o in objectives):
            return objectives[0](student)
        outputs = []
        for index, objective in enumerate(objectives):
            teacher = self.answer_of(index, batch, objective.needs_padded_statistics)
            # All ranks run the same objectives: one whose teacher doesn't answer runs on no token.
            answers = batch.answers(index)
            learner = student if answers else student.nothing()
            output: ObjectiveOutput = objective(learner, teacher, batch.alignments[index])
            read = batch.response_bytes if answers else batch.response_bytes[:0]
            outputs.append(on_samples(output, teacher, read) if batch.sampled else output)
        return outputs[0] if len(outputs) == 1 else self._average(outputs, batch.teacher)

    @property
    def _warming_up(self) -> bool:
        """Whether projectors alone learn in the present step."""
        if self._trainer is None or not self.projector_warmup_steps or not self.trainer.training:
            return False
        return self.global_step < self.projector_warmup_steps

    def _bystander(self, batch: DistillationBatch, padded: bool) -> Side:
        """The student as it stands; it runs only where its states are needed, or its weights are sharded."""
        alone = all(o.warms_up_alone for o in self._objectives()) and self.device_mesh is None
        with torch.no_grad():
            if not alone:
                return self.student_side(batch.student, padded, batch.sampled).detach()
            tokens = batch.student
            nothing = language_head(self.student).weight.new_empty(len(tokens.response), 0)
            return side(self.student, nothing, tokens, sampled=batch.sampled).detach()

    def answer_of(self, index: int, batch: DistillationBatch, padded_statistics: bool = False) -> Side:
        """A teacher's side of ``batch``; of no token, without running, where it doesn't answer for it."""
        hidden = batch.teacher_hidden[index] if batch.teacher_hidden else None
        tokens = batch.teachers[index]
        if hidden is not None or batch.answers(index):
            return self.teacher_side(index, tokens, hidden, padded_statistics, batch.sampled)
        weight = language_head(cast("Any", self.teachers[index])).weight
        silent = self.teacher_side(index, tokens, weight.new_zeros(0, weight.shape[1]), sampled=batch.sampled)
        if not padded_statistics:
            return silent
        return replace(silent, padded=PaddedStatistics(tokens.input_ids.numel(), weight.new_ones(())))

    def _average(self, outputs: list[ObjectiveOutput], only: int | None) -> ObjectiveOutput:
        weights = [spec.weight for spec in self.teacher_specs]
        tokens = outputs[only or 0].tokens
        if only is not None:
            weights = [float(index == only) for index in range(len(outputs))]
        loss = sum(w * o.loss for w, o in zip(weights, outputs, strict=True)) / sum(weights)
        terms = {f"{k}_{i}": r for i, o in enumerate(outputs) for k, r in o.terms.items()}
        metrics = {f"{k}_{i}": r for i, o in enumerate(outputs) for k, r in o.metrics.items()}
        return ObjectiveOutput(cast("Tensor", loss), tokens, terms, metrics)

    def on_train_start(self) -> None:
        """Take up what Lightning restores too early or too late."""
        # Loaders that were built to count the steps, before the checkpoint's progress was read.
        self.trainer.fit_loop._load_combined_loader_states()
        follow_accumulation(self.trainer)
        if self._lr_scheduler is None:
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, LambdaLR):
                    follow_schedule(config.scheduler)
        measure_whole_steps(self.objectives)  # and settle before the step, see configure_gradient_clipping
        self._look_ahead()

    def _look_ahead(self) -> None:
        if self.on_policy is None:
            look_ahead(self.trainer)
            return
        steps = total_steps(self.trainer) if self.on_policy.changes else float("inf")
        if self.on_policy.changes and not 0 <= steps < float("inf"):
            raise UserError(
                "model.on_policy.fraction: several numbers are spread over training, which must have an end: "
                "set trainer.max_epochs or trainer.max_steps."
            )
        if not look_ahead(self.trainer, lambda windows: self.with_samples(windows, steps)):
            raise UserError(
                "model.on_policy: samples take the place of one training loader's batches, not several's."
            )

    def with_samples(
        self, windows: Iterator[list[DistillationBatch]], steps: float, step: int | None = None
    ) -> Iterator[list[DistillationBatch]]:
        """Lists of batches, one per optimiser step, with samples where `on_policy` says so.

        A Trainer needs no call. In a loop of one's own it goes around `training.windows`, and each list must
        have been trained on before the next is asked for.

        Args:
            windows: the dataset's batches.
            steps: of the whole training.
            step: of the first window; None asks the Trainer.
        """
        if self._buffer is None:
            self._buffer = self._sample_buffer()
        if self._saved_samples is not None:
            ranks = rank_and_world()[1]
            if len(self._saved_samples) != ranks:
                raise UserError(
                    f"The checkpoint holds samples of {len(self._saved_samples)} processes, not of {ranks}: "
                    "resume with as many, or start from its weights alone with `--model.weights_from`."
                )
            self._buffer.load_state_dict(self._saved_samples[rank_and_world()[0]])
            self._saved_samples = None
        return self._buffer.replaced(windows, self.global_step if step is None else step, steps)

    @property
    def sampling_seconds(self) -> float:
        """Time that drawing samples has taken so far."""
        return 0.0 if self._buffer is None else self._buffer.seconds

    def _sample_buffer(self) -> SampleBuffer:
        assert self.on_policy is not None
        sampler, seed = self.on_policy.make_sampler(), int(os.environ.get("PL_GLOBAL_SEED", "0"))
        teachers = [ChatRenderer.from_spec(load_tokenizer(spec), spec) for spec in self.teacher_specs]

        def draw(prompts: list[list[int]], keys: list[int]) -> list[Sample]:
            return self.as_step(lambda: sampler(self.student, self.tokenizer, prompts, keys, seed))

        substitute = BatchOfSamples(self.tokenizer, teachers)
        return SampleBuffer(self.on_policy, lambda batch: prompts_of(batch.student), substitute, draw, seed)

    def on_train_batch_start(self, batch: DistillationBatch, batch_idx: int) -> None:
        """Seed dropout from the position in training: a resumed run draws what it would have."""
        self.follow_student(self.global_step)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        position = (self.current_epoch << 32) + (batch_idx << 10) + self.global_rank
        torch.manual_seed(hash((seed, position)) & 0x7FFF_FFFF_FFFF_FFFF)

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        """This batch's part of the step's mean loss; what subclasses add is a mean over them."""
        output = self.distil(batch)
        self._losses.append((output.loss.detach(), batch.examples, batch_idx))
        self._loads.add(batch.student.input_ids.numel())
        if self._trainer is None:
            self._check_finite(sum_over_ranks(output.loss.detach().clone()))
        loss = Ratio(output.loss.detach(), output.tokens)
        padding = Ratio(loss.total.new_full((), batch.padding_share), loss.count.new_ones(()))
        parts = {**output.terms, **output.metrics}
        if batch.sampled and self._buffer is not None:
            parts |= sample_metrics(batch, self._buffer, self.global_step)
            parts = {f"samples_{name}": ratio for name, ratio in parts.items()}
        self._meter.update({"loss": loss, **parts, "padding_share": padding})
        loss_of_all = output.loss
        if self._warming_up and isinstance(self.trainer.strategy, DDPStrategy):
            loss_of_all = touched(loss_of_all, self.student)
        return self.mean_over_step(loss_of_all, batch)

    def _check_finite(self, total: Tensor) -> None:
        """All ranks end with the sentence of the first of whose losses one isn't a number.

        Args:
            total: of the losses since the last call, on all ranks.
        """
        losses, self._losses = self._losses, []
        if torch.isfinite(total):
            return
        found = (
            f"The loss is {loss.item()} at epoch {self.current_epoch}, batch {number} "
            f"(examples {examples.tolist()}); lower the learning rate, clip gradients with "
            "trainer.gradient_clip_val, or train in bf16 instead of fp16."
            for loss, examples, number in losses
            if not torch.isfinite(loss)
        )
        raise Diverged(next(s for s in gathered(next(found, None)) if s is not None))

    def mean_over_step(self, total: Tensor, batch: DistillationBatch) -> Tensor:
        """Make a sum over this batch's response tokens its part of the mean over the optimiser step.

        Lightning divides by the accumulated batches and data parallelism by the ranks; both are
        made up for. Without a Trainer or Fabric the parts of a step simply add up.

        Args:
            total: scalar with a gradient.
            batch: with ``step_tokens`` where the step has more batches.
        """
        return mean_over_step(total, batch, self)

    def on_train_epoch_start(self) -> None:
        self._look_ahead()  # loaders may be made anew for every epoch

    def _log_step(self) -> None:
        """Means over all the step's response tokens; gradients are whole and not clipped yet.

        The backward pass is under way while the host waits here, once for all figures.
        """
        ranks = self.trainer.world_size
        ratios = self._meter.reduce(self._loads.beside(self._all_reduce, self.global_rank, ranks))
        if not ratios:
            return
        values = {f"train/{name}": ratio.value for name, ratio in ratios.items()} | self._loads.figures()
        values |= gradient_norms(self.student, self.objectives)
        values["train/tokens"] = ratios["loss"].count
        values = on_host(values)
        self._check_finite(values["train/loss"])
        if self.on_policy is not None:
            forget_other_figures(self.trainer, values)
        self.log_dict(values, batch_size=1)
        self.log("loss", values["train/loss"], prog_bar=True, logger=False, batch_size=1)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        return sums if self.trainer.world_size == 1 else sum_over_ranks(sums.to(self.device))

    def _check_batch(self, batch: DistillationBatch) -> None:
        if not isinstance(batch, DistillationBatch):
            raise UserError(
                f"The loader's batches are of type {type(batch).__name__}: give it "
                "collate_fn=DistillationCollator(student, teacher), or the Trainer an InstructionDataModule."
            )
        if not batch.tokenizers or batch.tokenizers == self._checked_tokenizers:
            return
        learns = any(objective.needs_teacher for objective in self._objectives())
        teachers = [load_tokenizer(spec) for spec in self.teacher_specs] if learns else []
        verify_tokenizers(batch, self.tokenizer, teachers)
        self._checked_tokenizers = batch.tokenizers

    @cast_once()
    def _evaluation_step(self, batch: DistillationBatch) -> None:
        self._check_batch(batch)
        student = self.student_side(batch.student)
        teacher, alignment = None, None
        if self.has_teacher_states and batch.teachers:
            teacher, alignment = self.answer_of(0, batch), batch.alignments[0]
        if self._shared_tokens is not None:  # once, rather than for every batch
            first, second = self._shared_tokens
            self._shared_tokens = first.to(student.labels.device), second.to(student.labels.device)
        checked = self._trainer is not None and self.trainer.state.fn == "fit"  # by `TeacherCheck`
        ratios = fidelity(
            student, teacher, alignment, batch.response_bytes, self._shared_tokens, batch.answers(0),
            of_teacher=not checked,
        )  # fmt: skip
        self._evaluation_meter.update(ratios)

    def _log_evaluation(self, stage: str) -> None:
        ratios = self._evaluation_meter.reduce(self._all_reduce)
        values = on_host({f"{stage}/{name}": ratio.value for name, ratio in ratios.items()})
        for kind in ("token", "byte"):
            if (key := f"{stage}/nll_per_{kind}") in values:
                values[f"{stage}/perplexity_per_{kind}"] = values[key].exp()
        self.log_dict(values, batch_size=1)

    def on_fit_start(self) -> None:
        """Refuse packed rows for a model that would mix their examples."""
        if getattr(getattr(self.trainer, "datamodule", None), "packing", False):
            self.as_step(self._verify_packing)

    def _verify_packing(self) -> None:
        run = zip(self.teacher_specs, self.teachers, strict=True) if self.complete_teachers else ()
        with torch.autocast(self.device.type, enabled=False):  # what is compared needs all of its digits
            verify_packing(self.student, self.student_spec.source)
            for spec, teacher in run:
                verify_packing(cast("Any", teacher), spec.source)

    def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def predict_step(self, batch: DistillationBatch, batch_idx: int) -> list[Generation]:
        """The student's responses to the batch's prompts, in their order; see `generation`.

        A prompt is what stands in front of an example's last response. Nothing where a callback answers all
        prompts at once, sorted by length, as `ResponseEvaluation` does.
        """
        callbacks = () if self._trainer is None else cast("Any", self.trainer).callbacks
        if any(getattr(callback, "answers_prompts", False) for callback in callbacks):
            return []
        generator = Generator(self.student, self.tokenizer, self.generation)
        prompts, indices = prompts_of(batch.student.to("cpu")), batch.examples.tolist()
        return generator.answers(prompts, seed=self.generation_seed, indices=indices)

    def test_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        self._evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    # --- optimiser and checkpoints ------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.student, self.objectives, self.projector_lr, self.lr)
        check_clipping(self._trainer)
        optimizer = made_optimizer(self._optimizer, groups)
        check_warmup(self.projector_warmup_steps, self._trainer, optimizer)
        if self._lr_scheduler is not None:
            scheduler: Any = self._lr_scheduler(optimizer)
        elif self._trainer is None:
            raise UserError(
                "lr_scheduler: without a Trainer nobody knows where training ends: give DistillationModule "
                "an lr_scheduler."
            )
        else:
            steps = total_steps(self.trainer)
            if not 0 <= steps < float("inf"):
                raise UserError(
                    "trainer.max_epochs: the default schedule ends with training, so it must know where: set "
                    "trainer.max_epochs or trainer.max_steps, or a model.lr_scheduler that needs no end."
                )
            scheduler = cosine_with_warmup(
                optimizer, int(steps), self.warmup_ratio, self.min_lr_ratio, self.projector_warmup_steps
            )
        if self._trainer is None:
            settle_before_steps(optimizer, self.objectives)
        self._origin |= optimization_origin(optimizer, scheduler)
        if self._resumed is not None:
            check_origin(self._resumed[0], self._origin, self._resumed[1])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip norms of the student's and of the objectives' gradients apart; values as Lightning does."""
        if self._warming_up:
            forget_gradients(self.student)
        self._log_step()
        settle(self.objectives)
        if self.joint_clipping or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in (self.student, self.objectives):
            parameters = [p for p in part.parameters() if p.grad is not None]
            if parameters:
                clip_grad_norm_(parameters, gradient_clip_val)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **changes: Any
    ) -> Self:
        """The module that wrote a checkpoint, with its trained weights, in eval mode.

        Args:
            checkpoint_path: the file.
            map_location: the device of the weights.
            changes: arguments of the class instead of those it was made with; what no checkpoint holds, an
                optimiser or a model that was in memory, must be among them.

        Raises:
            UserError: no module wrote it, or it doesn't say all that is needed.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        if "trained_with" not in checkpoint:
            raise UserError(f"{checkpoint_path} names no module: it isn't DistillationModule's.")
        arguments: dict[str, Any] = {**checkpoint["hyper_parameters"], **changes}
        accepted = inspect.signature(cls.__init__).parameters
        takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values())
        if not takes_all:
            arguments = {k: value for k, value in arguments.items() if k in accepted or k in changes}
        for name in ("student", "teacher", "objective", "on_policy"):
            if (takes_all or name in accepted) and name not in arguments:
                raise UserError(
                    f"{checkpoint_path} doesn't hold the {name} of the module, which was made in a program: "
                    f"give it as load_from_checkpoint(path, {name}=...)."
                )
        if "student_spec" in checkpoint and "student" in arguments and "student" not in changes:
            arguments["student"]["init_args"]["prune"] = described(
                None if (cut := checkpoint["student_spec"]["prune"]) is None else PruneSpec(**cut)
            )
        module = cls(**{k: v if k in changes else restored(v) for k, v in arguments.items()})
        module.configure_model()
        check_tensors(checkpoint["state_dict"], module, module.checkpoint_names, checkpoint_path)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module.to(map_location).eval()

    def _described(self) -> dict[str, Any]:
        """The arguments from which `load_from_checkpoint` makes the module again, where they are plain."""
        several = len(self.objectives) > 1
        names = (
            "projector_lr", "warmup_ratio", "min_lr_ratio", "joint_clipping", "on_policy",
            "projector_warmup_steps",
        )  # fmt: skip
        return plain_arguments(
            {
                "student": self.student_spec,
                "objective": list(self.objectives) if several else self.objectives[0],
                "teacher": self.teacher_specs if several else next(iter(self.teacher_specs), None),
                **{name: getattr(self, name) for name in names},
            }
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.student_spec, StudentSpec):
            checkpoint["student_spec"] = asdict(self.student_spec)
        # A subclass may have added whatever it was given; these the command line gives in its own form.
        others = self.hparams.keys() - {"optimizer", "lr_scheduler", "_instantiator", "_class_path"}
        own = plain_arguments({name: self.hparams[name] for name in others})
        checkpoint["hyper_parameters"] = {**own, **self._described()}
        trained = sorted(name for name, p in self.named_parameters() if p.requires_grad)
        if self._followers:
            step = checkpoint.get("global_step", 0)
            checkpoint["teachers"] = [follower.state_dict(step) for follower in self._followers]
        if self._buffer is not None:
            checkpoint["on_policy"] = gathered(self._buffer.state_dict())
        checkpoint["trained_with"] = {**self._origin, "set of trained parts": trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_steps = int(checkpoint.get("global_step", 0))
        self.read_digest = checkpoint.get(READ_DIGEST_KEY)
        path = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path or "the checkpoint"
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            trained = sorted(name for name, p in self.named_parameters() if p.requires_grad)
            self._resumed = checkpoint.get("trained_with", {}), path
            check_origin(self._resumed[0], {**self._origin, "set of trained parts": trained}, path)
            self._saved_samples = checkpoint.get("on_policy") if self.on_policy is not None else None
            settle_progress(
                checkpoint["loops"]["fit_loop"],
                steps=checkpoint["global_step"],
                accumulate=self.trainer.accumulate_grad_batches,
                by_steps=self.trainer.max_steps != -1,
            )
        for follower, state in zip(self._followers, checkpoint.get("teachers", ()), strict=False):
            follower.load_state_dict(state)
        check_tensors(checkpoint["state_dict"], self, self.checkpoint_names, path)
