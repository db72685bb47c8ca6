"""Where data and runs live.

| what | environment variable | else, in a checkout | else |
|---|---|---|---|
| data root | ``COMPANION_DATA`` | ``data/`` | the user's cache folder ``companion/data`` |
| run store | ``COMPANION_RUNS`` | ``runs/`` | the user's cache folder ``companion/runs`` |

``COMPANION_ENGINE`` says where the jobs are done (:mod:`companion.core.slurm`); unset: here. The
package reads no other environment variable, and never writes inside itself.
"""

from __future__ import annotations

import os
from pathlib import Path


def checkout() -> Path | None:
    """The root of the git checkout this package is installed from, or None (a normal install)."""
    root = Path(__file__).resolve().parents[3]
    return root if _is_book(root) else None


def book_root() -> Path | None:
    """The root of the book at hand: this folder if it is one, else the checkout, else None."""
    here = Path.cwd()
    return here if _is_book(here) else checkout()


def shipped() -> Path | None:
    """The folder with ``claims.yaml`` and ``recorded/``: the checkout's, else the package's own."""
    if root := checkout():
        return root / "data"
    inside = Path(__file__).parents[1] / "shipped"  # where setup.py puts them in a wheel
    return inside if inside.is_dir() else None


def _is_book(folder: Path) -> bool:
    return (folder / "_toc.yml").is_file() and (folder / "chapters").is_dir()


def _resolve(variable: str, folder: str) -> Path:
    if value := os.environ.get(variable):
        return Path(value).expanduser().absolute()
    if root := checkout():
        return root / folder
    # Imported here: a machine that only trains (no platformdirs) sets the variables instead.
    from platformdirs import user_cache_path

    return user_cache_path("companion") / folder


def engine() -> str:
    """Where jobs are done, as :func:`companion.core.slurm.parse` reads it."""
    return os.environ.get("COMPANION_ENGINE") or "local"


def data_root() -> Path:
    """The folder that holds the datasets, in torchvision's own layout. It need not exist."""
    return _resolve("COMPANION_DATA", "data")


def runs_root() -> Path:
    """The folder of the run store. It need not exist; the store makes it on first write."""
    return _resolve("COMPANION_RUNS", "runs")
