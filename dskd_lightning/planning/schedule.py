"""How many steps each run of a benchmark gets, so that everything fits its budget of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dskd_lightning.errors import UserError
from dskd_lightning.planning.pace import TOGETHER, Pace, batches_of
from dskd_lightning.runs.heartbeat import duration

__all__ = ["Schedule", "Work", "schedule"]

VALIDATIONS = 3
"""Of a run, the last one at its end."""
_EPOCHS = 3  # more would overfit on what is small enough to be read so often
_REPORT = 15.0


@dataclass(frozen=True)
class Work:
    """What a benchmark has to do.

    Args:
        objectives: how many are compared.
        rates: learning rates that each of them tries.
        prompts: to which each tested model writes responses.
        seeds: how often.
        teacher: how many times a student's time the teacher takes to write.
        accumulated: batches of an optimiser step.
    """

    objectives: int
    rates: int
    prompts: int
    seeds: int
    teacher: float
    accumulated: int

    @property
    def runs(self) -> int:
        """How many are trained."""
        return self.objectives * self.rates

    def seconds(self, pace: Pace) -> float:
        """All but the optimiser's steps: processes, validations, tests and the report."""
        processes = self.runs + (self.objectives if self.rates > 1 else 0) + 2
        responses = math.ceil(self.prompts / TOGETHER) * self.seeds * pace.responses
        tested = self.objectives + 1 + self.teacher
        validations = VALIDATIONS * self.runs * pace.validation
        return processes * pace.start + validations + tested * (pace.test + responses) + _REPORT


@dataclass(frozen=True)
class Schedule:
    """What each run gets.

    Args:
        steps: of the optimiser.
        interval: batches between two validations, of which the last is at the end.
        epochs: how often the data are read.
        seconds: that everything takes from now on.
    """

    steps: int
    interval: int
    epochs: float
    seconds: float


def schedule(work: Work, pace: Pace, budget: float, spent: float) -> Schedule:
    """As many steps as the budget leaves time for, of three epochs at most.

    Args:
        work: to do.
        pace: of this machine.
        budget: seconds for everything.
        spent: seconds that have gone by.

    Raises:
        UserError: nothing is left for a step.
    """
    rest, one = work.seconds(pace), work.runs * pace.step
    steps = math.floor((budget - spent - rest) / one)
    if steps < 1:
        least = spent + rest + one
        raise UserError(
            f"--budget {duration(budget)}: {duration(spent)} have gone by, starting, validating and testing "
            f"{work.runs} runs takes {duration(rest)} here, and one step of each {one:.1f} s; give at least "
            f"{duration(1.2 * least)}, fewer --rates or fewer --objectives."
        )
    epoch = math.ceil(pace.batches / work.accumulated)
    steps = min(steps, _EPOCHS * epoch)
    while steps >= VALIDATIONS and batches_of(steps, pace.batches, work.accumulated) % VALIDATIONS:
        steps -= 1
    batches = batches_of(steps, pace.batches, work.accumulated)
    interval = batches // VALIDATIONS if batches % VALIDATIONS == 0 else batches
    return Schedule(steps, interval, steps / epoch, rest + steps * one)
