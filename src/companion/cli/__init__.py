"""The command line: the instruments on the user's own networks, and the two stores behind them.

Exit codes: 0 done; 3 done, but a gate failed and the barrier is INVALID (of `rebasin` that after
matching; of `instability` all those of some fork step): no number for a script to use; 2 the input
is wrong; 75 `record` or `work` stopped before its time limit; 1 anything else that we know can go
wrong (a run that diverged, a full disk, a check that found something); 130 interrupted, 143 after
SIGTERM. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from companion import __version__
from companion.cli import (
    barrier,
    data,
    features,
    instability,
    landscape,
    layers,
    merge,
    models,
    rebasin,
    record,
    report,
    runs,
    tickets,
    work,
)
from companion.cli.console import error, warning
from companion.core import signals
from companion.core.errors import (
    BadParameter,
    CompanionError,
    CorruptData,
    DeviceUnavailable,
    MissingData,
)

_BAD_INPUT = (BadParameter, MissingData, CorruptData, DeviceUnavailable)


DEBUG = "--debug"


class _Commands(TyperGroup):
    """One clear message for each error, and a traceback for none of them but with ``--debug``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``--debug`` may stand anywhere: behind a command that has just failed, above all."""
        if DEBUG in args:
            args = [DEBUG, *(word for word in args if word != DEBUG)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            with signals.interruptible():
                return super().invoke(ctx)
        except CompanionError as e:
            if debug:
                traceback.print_exc()
            error(str(e))
            raise typer.Exit(2 if isinstance(e, _BAD_INPUT) else 1) from None
        except Exception as e:
            home = type(e).__module__.partition(".")[0]
            if home in ("typer", "click") or isinstance(e, BrokenPipeError):
                raise  # their own messages, and a reader that has gone, such as `head`
            if debug:
                traceback.print_exc()
            error(_unforeseen(e, ctx.invoked_subcommand))
            raise typer.Exit(1) from None
        except KeyboardInterrupt as e:
            error("Interrupted. What is finished is stored; the same command continues from there.")
            raise typer.Exit(signals.exit_code(e)) from None


def _unforeseen(e: Exception, command: str | None) -> str:
    """What is said of an error that nobody has thought of: what failed, where, what to do."""
    what = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return f"{command}: there is not enough memory ({what}). Fewer examples need less of it."
    frames = traceback.extract_tb(e.__traceback__)
    here = str(Path(__file__).parent.parent)
    ours = next((f for f in reversed(frames) if f.filename.startswith(here)), None)
    last = frames[-1] if frames else None
    places = dict.fromkeys(
        f"{Path(f.filename).name}, line {f.lineno}, in {f.name}" for f in (last, ours) if f
    )
    return (
        f"{command} failed: {what} ({'; called from '.join(places)}). This was not foreseen. If it "
        "is not the network's or the data's own fault, please report it where you have companion "
        f"from, with the output of the same command and {DEBUG}, which shows the traceback."
    )


class _Warnings(logging.Handler):
    """The package's warnings, on the error stream as it is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        warning(record.getMessage())


app = typer.Typer(
    name="companion",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Linear mode connectivity: barriers and instability, of your own networks too.",
    epilog="Example: companion instability --net mlp --data digits --steps 500 --ks 0,50",
)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.command("barrier", epilog=barrier.EXAMPLE)(barrier.measure_barrier)
app.command("layers", epilog=layers.EXAMPLE)(layers.measure_layers)
app.command("features", epilog=features.EXAMPLE)(features.compare_features)
app.command("landscape", epilog=landscape.EXAMPLE)(landscape.survey_landscape)
app.command("instability", epilog=instability.EXAMPLE)(instability.measure_instability)
app.command("tickets", epilog=tickets.EXAMPLE)(tickets.prune_network)
app.command("rebasin", epilog=rebasin.EXAMPLE)(rebasin.align_networks)
app.command("merge", epilog=merge.EXAMPLE)(merge.merge_networks)
app.command("report", epilog=report.EXAMPLE)(report.report_networks)
app.command("record", epilog=record.EXAMPLE)(record.record_chapter)
app.command("work", epilog=work.EXAMPLE)(work.do_jobs)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"companion {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and stop.", callback=_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            DEBUG, help="Show the traceback of an error; may stand behind a command, too."
        ),
    ] = False,
) -> None:
    handler = _Warnings(logging.WARNING)
    logger = logging.getLogger("companion")
    logger.addHandler(handler)
    ctx.call_on_close(lambda: logger.removeHandler(handler))


def main() -> None:
    """The console script ``companion``."""
    app()
