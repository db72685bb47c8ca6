"""What is wanted of a run: its state dict, or its full state, at chosen steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from companion.core.errors import BadParameter
from companion.training.recipe import Run


@dataclass(frozen=True)
class Job:
    """States wanted of a run.

    Arguments:
        run: which run.
        weights: steps whose state dict is wanted; ``T`` is ``run.last_step``.
        states: steps whose full state is wanted (optimiser included), to fork from.
    """

    run: Run
    weights: tuple[int, ...] = ()
    states: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for step in (*self.weights, *self.states):
            if not self.run.first_step <= step <= self.run.last_step:
                raise BadParameter(
                    f"checkpoint at step {step}: the run has steps "
                    f"{self.run.first_step} to {self.run.last_step}."
                )

    def parents(self) -> Job | None:
        """The job that must be done before this one."""
        fork = self.run.fork
        return Job(fork.parent, states=(fork.step,)) if fork else None


def merge(jobs: Iterable[Job]) -> list[Job]:
    """One job a run, with the union of the wanted states, in first-seen order."""
    merged: dict[Run, Job] = {}
    for job in jobs:
        old = merged.get(job.run, Job(job.run))
        merged[job.run] = Job(
            job.run,
            tuple(sorted({*old.weights, *job.weights})),
            tuple(sorted({*old.states, *job.states})),
        )
    return list(merged.values())
