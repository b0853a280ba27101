"""A study file, and the order in which its variants run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.launch.arguments import option, read_yaml
from dskd_lightning.launch.configs import config_path
from dskd_lightning.runs.lock import only_one
from dskd_lightning.runs.run_folder import TEACHER
from dskd_lightning.runs.validation_metrics import KNOWN
from dskd_lightning.study.failures import (
    VariantsFailed,
    WorkerFailed,
    forget_failure,
    has_failed,
    note_failure,
)
from dskd_lightning.study.process import run_process, variant_lock
from dskd_lightning.study.reading import mapping, read_values, texts
from dskd_lightning.study.summary import DIVERGED, FAILED, summarise
from dskd_lightning.study.variant import Variant, read_variant
from dskd_lightning.study.worker import read_result

__all__ = ["Study", "Variant"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """Variants that share base configs, and where their results go.

    Args:
        output: folder of the study; each variant has its run folder in it.
        base: YAML files for all variants.
        variants: in the order in which they run; the report compares with the first that trains.
        select: validation metric that chooses among the points of a grid; lower is better, but for those
            that are known to be better when higher (accuracy, agreement, ROUGE-L).
        report: also write the HTML report of `dskd compare`.
    """

    output: Path
    base: tuple[Path, ...]
    variants: tuple[Variant, ...]
    select: str = "val/nll_per_byte"
    report: bool = True

    @classmethod
    def read(cls, path: str | Path, output: str | None = None) -> Study:
        """Read a study file; paths in it are relative to it, ``output`` to the working folder.

        Shipped files go by ``dskd:NAME`` too.

        Raises:
            UserError: the file is missing, malformed, or has an unknown key.
        """
        path = config_path(str(path))
        values = read_values(path)
        base = tuple(
            (path.parent / config_path(name)).resolve() for name in texts(path, "base", values["base"])
        )
        grid = mapping(path, "grid", values.get("grid"), lists=True)
        found = mapping(path, "variants", values["variants"])
        if len(found) < len(values["variants"]):
            raise UserError(f"{path}: two variants have one name: rename one.")
        variants = tuple(read_variant(path, name, options, grid) for name, options in found.items())
        for file in [*base, *(Path(f) for v in variants for f in v.configs)]:
            if not file.is_file():
                raise UserError(f"{path}: there is no config {file}.")
        return cls(
            output=Path(output or values.get("output") or f"runs/{path.stem}"),
            base=base,
            variants=variants,
            select=values.get("select") or cls.select,
            report=values.get("report") is not False,
        )

    def over(self, name: str) -> Study:
        """This study with one more config, a file or ``dskd:NAME``, laid over all of its base."""
        return replace(self, base=(*self.base, config_path(name).resolve()))

    def run(self, overwrite: bool = False, only: Sequence[str] | None = None) -> None:
        """Run what is not finished yet, each variant in a process of its own, then summarise.

        A variant whose loss becomes no number has that for a result; one that fails otherwise keeps no
        other from running, and is tried again by the next call.

        Raises:
            VariantsFailed: some failed; the others are done and in the table.
            UserError: ``only`` names no variant, another process runs one, or a finished variant was trained
                with other settings.
        """
        known = {variant.name for variant in self.variants}
        if unknown := sorted(set(only or ()) - known):
            raise UserError(
                f"--only: there is no variant {unknown[0]!r}; there are {', '.join(sorted(known))}."
            )
        chosen = [variant for variant in self.variants if only is None or variant.name in only]
        failures = []
        with contextlib.ExitStack() as locks:
            for variant in chosen:
                locks.enter_context(variant_lock(self.output, variant.name))
            for number, variant in enumerate(chosen, 1):
                logger.info("--- variant %d of %d: %s", number, len(chosen), variant.name)
                forget_failure(self.output, variant.name)
                try:
                    self._run_variant(variant, overwrite)
                except WorkerFailed as failure:
                    logger.error("%s", failure)
                    note_failure(self.output, variant.name, self._points(variant))
                    failures.append(failure)
        with only_one(self.output / ".locks" / ".summary", "summarises the study"):
            # Looked at in here: whoever comes last tells of all.
            outcomes = {variant.name: self._outcome(variant) for variant in self.variants}
            rows = {name: self.output / name for name, outcome in outcomes.items() if outcome is not None}
            told = {name: outcome for name, outcome in outcomes.items() if outcome}
            tested = [v.name for v in self.variants if v.train and outcomes[v.name] == ""]
            baseline = tested[0] if tested else None
            summarise(self.output, rows, report=self.report, baseline=baseline, outcomes=told)
        if failures:
            raise VariantsFailed(failures, len(chosen))

    def _outcome(self, variant: Variant) -> str | None:
        """Of a variant with settings that the study still gives it: empty where its folder holds a tested
        run, what became of it otherwise, or None where it didn't end yet."""
        points = self._points(variant)
        result = read_result(self.output / variant.name) or {}
        if result.get("settings") in points and ("test" in result or "diverged" in result):
            return DIVERGED if "diverged" in result else ""
        return FAILED if has_failed(self.output, variant.name, points) else None

    def _run_variant(self, variant: Variant, overwrite: bool) -> None:
        folder = self.output / variant.name
        trials = self.output / "grid" / variant.name
        if overwrite:
            _remove(folder)
            _remove(trials)
        points = self._points(variant)
        if len(points) == 1:
            ((settings, point),) = points.items()
            self._finish(variant, folder, settings, point)
            return
        if folder.is_dir() and not folder.is_symlink():
            raise UserError(
                f"study: '{folder}' holds a run of {variant.name!r} without a grid; start over with "
                "`--overwrite true`, or rename the variant."
            )
        best = self._search(variant, points)
        self._finish(variant, trials / best, best, points[best])
        _remove(folder)
        folder.symlink_to((trials / best).relative_to(self.output), target_is_directory=True)

    def _points(self, variant: Variant) -> dict[str, dict[str, Any]]:
        """Points by the digests of their settings."""
        return {self._settings(variant, point): point for point in variant.points()}

    def _settings(self, variant: Variant, point: dict[str, Any]) -> str:
        """Digest of all that the study says of one run: what its folder belongs to."""
        files = [read_yaml(Path(file)) for file in (*map(str, self.base), *variant.configs)]
        of = [TEACHER] if variant.teacher else []
        values = json.dumps([files, variant.config, variant.train, point, *of], default=str)
        return hashlib.sha256(values.encode()).hexdigest()[:16]

    def _finish(self, variant: Variant, folder: Path, settings: str, point: dict[str, Any]) -> None:
        """Train and test one point, or what of it is left to do."""
        result = read_result(folder)
        if folder.is_symlink():  # left by a grid that the study file no longer has
            _remove(folder)
            result = None
        elif result is not None and result.get("settings") != settings:
            raise UserError(
                f"study: '{folder}' was trained with other settings than the study now gives "
                f"{variant.name!r}; start over with `--overwrite true`, name another --output, or rename the "
                "variant."
            )
        if result is not None and "diverged" in result:
            logger.info("%s: its training diverged, which is its result", variant.name)
            return
        if result is not None and "test" in result:
            logger.info("%s: finished earlier, kept", variant.name)
            return
        if result is not None and variant.train and not any(folder.glob("checkpoints/*.ckpt")):
            _remove(folder)  # it lost against a point that the grid no longer has: train it again
        self._process(variant, folder, settings, point, test=True)

    def _search(self, variant: Variant, points: Mapping[str, dict[str, Any]]) -> str:
        """Train every point of a grid; the best one's folder. The others lose their checkpoints.

        Raises:
            WorkerFailed: points failed, without which nobody knows which is the best; the others are trained.
        """
        trials = self.output / "grid" / variant.name
        scores: dict[str, float] = {}
        failures = []
        for settings, point in points.items():
            trial = trials / settings
            if read_result(trial) is None:
                try:
                    self._process(variant, trial, settings, point, test=False)
                except WorkerFailed as failure:
                    logger.error("%s", failure)
                    failures.append(failure.reason)
                    continue
            scores[settings] = self._score(trial)
            best = min(scores, key=lambda settings: self._loss(scores[settings]))
            for loser in scores.keys() - {best}:
                _remove(trials / loser / "checkpoints")
        if failures:
            raise WorkerFailed(variant.name, " and ".join(failures))
        chosen = {
            "points": list(points.values()),
            "folders": list(points),
            self.select: [score if math.isfinite(score := scores[settings]) else None for settings in points],
            "chosen": points[best],
        }
        write_atomic(trials / "grid.json", json.dumps(chosen, indent=2) + "\n")
        logger.info("%s: %s chosen among %s", variant.name, points[best], list(scores.values()))
        return best

    def _score(self, trial: Path) -> float:
        """What `select` is on validation; as bad as can be where it is no number, or training diverged."""
        result = read_result(trial) or {}
        if "diverged" in result:
            return self._loss(math.inf)
        validation = result.get("validation") or {}
        if self.select not in validation:
            known = ", ".join(sorted(validation)) or "nothing: give `data.val` or `data.val_split`"
            raise UserError(f"study: `select: {self.select}` isn't measured in validation; there is {known}.")
        score = float(validation[self.select])
        return score if math.isfinite(score) else self._loss(math.inf)

    def _loss(self, score: float) -> float:
        """A score whose lower values are better."""
        return -score if KNOWN.get(self.select) == "max" else score

    def _process(
        self, variant: Variant, folder: Path, settings: str, point: dict[str, Any], test: bool
    ) -> None:
        if point:
            logger.info("--- %s %s", variant.name, point)
        folder.mkdir(parents=True, exist_ok=True)
        overlay = folder / "variant.yaml"
        write_atomic(overlay, yaml.safe_dump(variant.config, sort_keys=False))
        arguments = [f"--config={file}" for file in (*self.base, *variant.configs, overlay)]
        arguments += [option(key, value) for key, value in point.items()]
        arguments.append(f"--output={folder}")
        if variant.teacher:
            arguments.append(f"--model={TEACHER}")
        run_process(variant.name, arguments, folder, settings, variant.train, test)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
