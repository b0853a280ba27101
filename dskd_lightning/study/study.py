"""A study file, and the order in which its variants run."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.launch.arguments import option
from dskd_lightning.study.summary import summarise
from dskd_lightning.study.worker import DONE, run_variant

__all__ = ["Study", "Variant"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One configuration of a study.

    Args:
        name: its folder and its name in tables.
        config: keys laid over the base configs, as in a YAML file.
        configs: more YAML files, relative to the study file.
        train: False evaluates the student as it is before training.
        grid: ``key -> values``; every combination is trained in ``grid/NAME``, the best on
            validation is tested and linked as ``NAME``.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    train: bool = True
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid; one empty point without a grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Study:
    """Variants that share base configs, and where their results go.

    Args:
        output: folder of the study; each variant has its run folder in it.
        base: YAML files for all variants.
        variants: in the order in which they run; the report compares with the first that trains.
        select: validation metric (lower is better) that chooses among the points of a grid.
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

        Raises:
            UserError: the file is missing, malformed, or has an unknown key.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path}: is not YAML ({error}).") from error
        if not isinstance(values, dict) or not {"base", "variants"} <= values.keys():
            raise UserError(f"{path}: a study needs the keys `base` and `variants`.")
        unknown = sorted(values.keys() - {"output", "base", "variants", "select", "report", "grid"})
        if unknown:
            raise UserError(f"{path}: unknown key {unknown[0]!r} in the study.")
        base = tuple((path.parent / name).resolve() for name in values["base"])
        grid = values.get("grid") or {}
        variants = tuple(
            _variant(path, name, options or {}, grid) for name, options in values["variants"].items()
        )
        for file in [*base, *(Path(f) for v in variants for f in v.configs)]:
            if not file.is_file():
                raise UserError(f"{path}: there is no config {file}.")
        return cls(
            output=Path(output or values.get("output") or f"runs/{path.stem}"),
            base=base,
            variants=variants,
            select=values.get("select", cls.select),
            report=values.get("report", True),
        )

    def run(self, overwrite: bool = False, only: Sequence[str] | None = None) -> None:
        """Run what is not finished yet, each variant in a process of its own, then summarise.

        Raises:
            UserError: ``only`` names no variant, or a variant failed.
        """
        known = {variant.name for variant in self.variants}
        if unknown := sorted(set(only or ()) - known):
            raise UserError(
                f"--only: there is no variant {unknown[0]!r}; there are {', '.join(sorted(known))}."
            )
        for variant in self.variants:
            if only is None or variant.name in only:
                self._run_variant(variant, overwrite)
        finished = {
            v.name: self.output / v.name for v in self.variants if (self.output / v.name / DONE).is_file()
        }
        baseline = next((v.name for v in self.variants if v.train and v.name in finished), None)
        summarise(self.output, finished, report=self.report, baseline=baseline)

    def _run_variant(self, variant: Variant, overwrite: bool) -> None:
        folder = self.output / variant.name
        if overwrite:
            _remove(folder)
            _remove(self.output / "grid" / variant.name)
        if (folder / DONE).is_file():
            logger.info("%s: finished earlier, kept", variant.name)
            return
        points = variant.points()
        if len(points) == 1:
            self._process(variant, folder, points[0], test=True)
            return
        best = self._search(variant, points)
        trial = self.output / "grid" / variant.name / str(best)
        self._process(variant, trial, points[best], test=True)
        _remove(folder)
        folder.symlink_to(trial.relative_to(self.output), target_is_directory=True)

    def _search(self, variant: Variant, points: Sequence[dict[str, Any]]) -> int:
        """Train every point of a grid; the best one's index. The others lose their checkpoints."""
        scores: list[float] = []
        best = 0
        for index, point in enumerate(points):
            trial = self.output / "grid" / variant.name / str(index)
            if not (trial / DONE).is_file():
                _remove(trial)
                self._process(variant, trial, point, test=False)
            scores.append(json.loads((trial / DONE).read_text(encoding="utf-8"))["validation"][self.select])
            previous, best = best, min(range(len(scores)), key=scores.__getitem__)
            for loser in {previous, index} - {best}:
                _remove(self.output / "grid" / variant.name / str(loser) / "checkpoints")
        chosen = {"points": points, self.select: scores, "chosen": points[best]}
        write_atomic(self.output / "grid" / variant.name / "grid.json", json.dumps(chosen, indent=2) + "\n")
        logger.info("%s: %s chosen among %s", variant.name, points[best], scores)
        return best

    def _process(self, variant: Variant, folder: Path, point: dict[str, Any], test: bool) -> None:
        logger.info("--- %s %s", variant.name, point or "")
        folder.mkdir(parents=True, exist_ok=True)
        overlay = folder / "variant.yaml"
        write_atomic(overlay, yaml.safe_dump(variant.config, sort_keys=False))
        arguments = [f"--config={file}" for file in (*self.base, *variant.configs, overlay)]
        arguments += [option(key, value) for key, value in point.items()]
        arguments.append(f"--output={folder}")
        # A process each, so that peak memory is the variant's own and nothing leaks between them.
        process = multiprocessing.get_context("spawn").Process(
            target=run_variant, args=(arguments, str(folder), variant.train, test)
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError(
                f"study: variant {variant.name!r} failed with exit status {process.exitcode}; "
                "its messages are above."
            )


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _variant(path: Path, name: str, options: dict[str, Any], grid: dict[str, list[Any]]) -> Variant:
    unknown = sorted(options.keys() - {"config", "configs", "train", "grid"})
    if unknown:
        raise UserError(f"{path}: variants.{name} has an unknown key {unknown[0]!r}.")
    train = options.get("train", True)
    return Variant(
        name=str(name),
        config=options.get("config") or {},
        configs=tuple(str((path.parent / file).resolve()) for file in options.get("configs") or ()),
        train=train,
        grid=options.get("grid", grid) if train else {},
    )
