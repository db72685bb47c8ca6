"""Text to notebook to executed notebook."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from joblib import cpu_count

from companion.book import parameters
from companion.book.layout import Book, BookError
from companion.core import files

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_QUIET = "ignore:resource_tracker"  # as PYTHONWARNINGS has it


def build(book: Book, chapter: str) -> Path:
    """Write ``build/notebooks/<chapter>.ipynb``, which plain papermill can run; return its path.

    Raises:
        BadParameter: The chapter does not have exactly one cell tagged ``parameters``, or that cell
            holds more than assignments.
    """
    import jupytext

    parameters.declared(parameters.cell_of(book, chapter), f"chapters/{chapter}.md")
    notebook = jupytext.read(book.source(chapter), fmt="md:myst")
    notebook.metadata["kernelspec"] = KERNEL
    notebook.metadata["language_info"] = {"name": "python"}
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # jupytext draws them at random
    path = book.notebook(chapter)
    _write(notebook, path)
    return path


def format_cells(book: Book, chapter: str) -> bool:
    """Format the code cells of a chapter with ruff; return whether anything changed.

    Text and cell options stay byte for byte. (``jupytext --pipe`` would write its version into
    every chapter's header.)

    Raises:
        BookError: ruff cannot read the code; its message says where.
    """
    import jupytext

    source = book.source(chapter)
    notebook = jupytext.read(source, fmt="md:myst")
    before = [cell.source for cell in notebook.cells]
    with TemporaryDirectory() as folder:
        copy = Path(folder) / f"{chapter}.ipynb"
        _write(notebook, copy)
        command = [sys.executable, "-m", "ruff", "format", "--quiet", str(copy)]
        config = book.root / "pyproject.toml"
        if config.is_file():
            command += ["--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BookError(f"chapters/{chapter}.md: {done.stderr.strip()}")
        after = [cell.source for cell in read(copy).cells]
    text, position = source.read_text(encoding="utf-8"), 0
    for old, new in zip(before, after, strict=True):
        position = text.index(old, position)
        text = text[:position] + new + text[position + len(old) :]
        position += len(new)
    if before != after:
        files.write(source, text.encode())
    return before != after


def threads() -> int:
    """Threads of a kernel: its share of the cores, where make runs ``JOBS`` chapters at once.

    Threads that share a core wait in a loop for each other, and take it from whoever has work.
    """
    jobs = os.environ.get("JOBS", "")
    return max(1, int(cpu_count()) // max(1, int(jobs if jobs.isdecimal() else 1)))


def execute(book: Book, profile: str, chapter: str) -> Path:
    """Run a chapter's notebook, which :func:`build` made, with a profile's parameters.

    Returns:
        The executed notebook's path. It appears only if every cell ran.

    Raises:
        BadParameter: See :func:`companion.book.parameters.profile_values`.
        BookError: A cell failed. An older executed notebook is removed; the failed one is kept
            beside it, in ``failed/``.
    """
    import matplotlib.font_manager  # noqa: F401 - fills its cache, which else warns inside a page
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, target = book.notebook(chapter), book.executed(profile, chapter)
    if not source.is_file():
        raise BookError(f"{source.relative_to(book.root)} is missing: run `make notebooks` first.")
    values = parameters.profile_values(book, profile, chapter, parameters.cell_of(book, chapter))
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.parent.parent / "failed" / target.name
    working = target.with_suffix(".part.ipynb")
    # The kernel of this environment, even if the user has another one called python3.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # Of a kernel that is stopped, what clears up behind its workers would say that it does so.
    others = [w for w in os.environ.get("PYTHONWARNINGS", "").split(",") if w and w != _QUIET]
    os.environ["PYTHONWARNINGS"] = ",".join([*others, _QUIET])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads()))
    for name in ("papermill", "traitlets", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    started = time.monotonic()
    _say(f"{chapter} ({profile}): running " + (f"with {values}" if values else "with its defaults"))
    target.unlink(missing_ok=True)  # from here on, an old result would be a wrong one
    failed.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            source,
            working,
            parameters=values,
            kernel_name=KERNEL["name"],
            cwd=str(book.root),
            # make runs two chapters at once, whose bars would write over each other
            progress_bar=sys.stderr.isatty() and "MAKELEVEL" not in os.environ,
            kernel_manager_class=_quiet_kernels(),
        )
        working.replace(target)
    except PapermillExecutionError as error:
        failed.parent.mkdir(parents=True, exist_ok=True)
        working.replace(failed)
        raise BookError(
            f"{chapter} ({profile}): a cell failed.\n\n{_end(error.traceback)}\n\n"
            f"The notebook up to there: {failed.relative_to(book.root)}"
        ) from error
    except (KeyboardInterrupt, SystemExit):  # what the kernel's client left undone is no news
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
        raise
    except DeadKernelError as error:
        raise BookError(
            f"{chapter} ({profile}): the kernel died; most often the machine ran out of memory."
        ) from error
    finally:
        working.unlink(missing_ok=True)  # of a chapter that was stopped
    _say(f"{chapter} ({profile}): done in {time.monotonic() - started:.0f} s")
    return target


def read(path: Path) -> Any:
    """A notebook of format 4 as nbformat reads it."""
    import nbformat

    return nbformat.read(path, as_version=4)


def _write(notebook: Any, path: Path) -> None:
    """Write under another name first, so that an interrupted run leaves nothing half done."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as working:
        nbformat.write(notebook, working)


def _quiet_kernels() -> type:
    """Kernels whose own last words on being stopped (a hundred lines of them) are not passed on.

    What the workers of a chapter say, such as for whom they wait, goes the same way, and is.
    """
    from jupyter_client.manager import AsyncKernelManager

    class Quiet(AsyncKernelManager):
        # The base class wraps its method, and says less of it than it is.
        async def start_kernel(self, **options: Any) -> Any:  # type: ignore[override]  # see above
            read, write = os.pipe()
            Thread(target=_pass_on, args=(read,), daemon=True).start()
            try:
                return await super().start_kernel(**{**options, "stderr": write})
            finally:
                os.close(write)

    return Quiet


def _pass_on(source: int) -> None:
    """Copy lines to stderr, to the end or to where a kernel that is stopped begins to complain."""
    quiet = False
    with open(source, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            quiet |= line.startswith("Task was destroyed but it is pending")
            if not quiet and "KeyboardInterrupt caught in kernel" not in line:
                sys.stderr.write(line)
                sys.stderr.flush()


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a kernel died: who stopped it knows, and else it is an error with words of ours."""
    return "Kernel died" not in record.getMessage()


def _end(traceback: list[str], lines: int = 20) -> str:
    """The end of a kernel's coloured traceback, as plain text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
