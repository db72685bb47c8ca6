"""``companion work``: a process that takes jobs from a queue, one of many on many machines."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from companion.cli.console import error, say
from companion.core.errors import BadParameter, OutOfTime
from companion.core.plans import REQUEUES

EXAMPLE = (
    "Example: companion work runs/.work/queue --time-limit 3400. Start as many as you like, on any "
    "machines that see the run store; exit code 75: stopped before the limit, start it again."
)

_STARTED = time.monotonic()  # a time limit counts from about here, not from after torch's import


def do_jobs(
    queue: Annotated[
        Path, typer.Argument(help="A queue of the run store, or one plan of it (its folder).")
    ],
    time_limit: Annotated[
        float | None,
        typer.Option(help="Seconds after which to store where it is, and to stop with code 75."),
    ] = None,
    idle: Annotated[
        float, typer.Option(help="Seconds to wait for more work before leaving.", min=0)
    ] = 60.0,
    stale: Annotated[
        float,
        typer.Option(
            help="Seconds without a sign of life after which another worker counts as dead; the "
            "same for all workers, and on NFS two minutes or more.",
            min=1,
        ),
    ] = 180.0,
    requeues: Annotated[
        int,
        typer.Option(
            help="How often a job may be stopped and go on; once more, and it has failed.", min=0
        ),
    ] = REQUEUES,
) -> None:
    """Take jobs from a queue, train and measure them into the run store, until nothing is left.

    Jobs get into a queue by a command with --engine slurm or --engine queue. Workers share out the
    jobs by themselves; what one that died had in hand another takes over, from its last checkpoint.

    Exit codes: 0 nothing is left; 75 stopped before the time limit or by SIGUSR1 or SIGUSR2, start
    it again; 143 after SIGTERM; 1 the run store cannot be written. Jobs that fail are noted in the
    plan, and the command that asked for them says so.
    """
    from companion.core import deadline, slurm
    from companion.core.plans import Plan, Queue, Worker
    from companion.core.pool import keep_memory, one_thread

    if not queue.is_dir():
        raise BadParameter(f"work: there is no folder {queue}; a command with --engine names it.")
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), _stop)
    who, log = _name()
    worker = Worker(who, stale=stale, requeues=requeues, log=log, say=_say)
    end = None if time_limit is None else _STARTED + time_limit
    keep_memory()
    try:
        with slurm.using("local"), one_thread(), deadline.until(end):
            one = (queue / "plan.jsonl").is_file()
            done = worker.work_through(Plan(queue)) if one else worker.serve(Queue(queue), idle)
    except OutOfTime:
        code = 128 + signal.SIGTERM if signal.SIGTERM in _asked else slurm.STOPPED
        say(f"worker {who} stopped; what it had in hand goes on from there")
        raise typer.Exit(code) from None
    except Exception as e:
        error(f"worker {who}: {e}")
        raise
    say(f"worker {who}: {done} jobs done, nothing is left")


_asked: list[int] = []


def _stop(number: int, _: FrameType | None) -> None:
    """Store what is at work, give back its claim, and end."""
    from companion.core import deadline

    _asked.append(number)
    deadline.stop_soon()


def _say(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {text}")


def _name() -> tuple[str, str]:
    """This worker's name, and the file of its output as far as that is known."""
    given = os.environ.get
    if job := given("SLURM_ARRAY_JOB_ID") or given("SLURM_JOB_ID"):
        task = f"_{t}" if (t := given("SLURM_ARRAY_TASK_ID")) else ""
        name = f"{job}{task}_{given('SLURM_PROCID', '0')}"
    else:
        name = f"{socket.gethostname()}-{os.getpid()}"
    try:
        log = str(Path(f"/proc/self/fd/{sys.stdout.fileno()}").readlink())
    except (OSError, ValueError):
        log = ""
    return name, log if log.startswith("/") and not log.startswith("/dev") else ""
