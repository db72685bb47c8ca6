"""Where a number comes from: the code, the versions, the machine, and the command that reruns it.

Nothing here names a user, a host, a folder or a time of day, so two runs of one commit on one
machine print the same record. Every chapter ends with it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from companion.core import closing, codec, plainyaml
from companion.core.errors import BadParameter
from companion.core.locations import checkout
from companion.report import page

_PACKAGES = ("companion", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "transformers")


def hardware(device: str) -> str:
    """What trains there, in a word: ``CPU``, or the GPU's name."""
    return "CPU" if device == "cpu" else str(record()["gpu"]["name"])


def record(**extra: Any) -> dict[str, Any]:
    """What a reader needs to judge or repeat a run.

    Arguments:
        extra: Anything else that JSON can hold, such as ``dataset={"name": "digits", ...}``.

    Returns:
        ``code`` (commit and whether files were changed since; None outside a checkout), ``python``,
        ``packages``, ``os``, ``cpu`` (name, cores this process may use, torch's threads), ``gpu``
        (name and CUDA version, or None) and ``extra``'s entries.
    """
    import torch

    gpu = None
    if torch.cuda.is_available():
        gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    elif torch.backends.mps.is_available():
        gpu = {"name": "Apple GPU (MPS)", "cuda": None}
    entry: dict[str, Any] = {
        "code": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"name": _cpu(), "cores": _cores(), "threads": torch.get_num_threads()},
        "gpu": gpu,
    }
    if clash := sorted(set(entry) & set(extra)):
        raise BadParameter(f"provenance.record: {', '.join(clash)} is filled in already.")
    # While a recording is closed: of where its numbers come from.
    entry |= closing.measured_on()
    return entry | {k: codec.to_json(v, k, null=True) for k, v in extra.items()}


def show(entry: Mapping[str, Any]) -> None:
    """Display a record as a block that unfolds, and hand it to the book."""
    rows = "".join(
        f'<tr><th scope="row">{page.as_html(name)}</th><td>{page.as_html(value)}</td></tr>'
        for name, value in _rows(entry)
    )
    html = (
        '<details class="companion-provenance">'
        "<summary>Provenance of the numbers on this page</summary>"
        f'<div class="companion-scroll"><table><tbody>{rows}</tbody></table></div></details>'
    )
    text = "\n".join(f"{name}: {value}" for name, value in _rows(entry))
    page.emit(
        {"text/html": html, "text/plain": text},
        {"provenance": codec.to_json(entry, "provenance", null=True)},
    )


def rerun(chapter: str, parameters: Mapping[str, Any], separator: str = " ") -> str:
    """The papermill command that runs a chapter's notebook again with these parameters.

    papermill reads the values back with the same type and content.

    Arguments:
        separator: between the options.
    """
    options = [_option(name, codec.to_json(v, name, null=True)) for name, v in parameters.items()]
    command = ["papermill", f"build/notebooks/{chapter}.ipynb", "out.ipynb"]
    return separator.join(shlex.join(words) for words in (command, *options))


def show_rerun(chapter: str, parameters: Mapping[str, Any]) -> None:
    """Display :func:`rerun`'s command, one option a line, after what makes the notebook."""
    command = rerun(chapter, parameters, " \\\n    ")
    text = f"make notebooks\nsource .venv/bin/activate\n{command}"
    html = f'<pre class="companion-rerun"><code>{escape(text)}</code></pre>'
    page.emit({"text/html": html, "text/plain": text}, {"rerun": text})


def _option(name: str, value: Any) -> list[str]:
    """papermill's option for one parameter: -p guesses a type, -r keeps text, -y reads YAML."""
    if isinstance(value, str):
        # What -p would turn into a number or a constant has to be passed as raw text.
        return ["-r" if _guessed(value) else "-p", name, value]
    if value is None or isinstance(value, (bool, int, float)):
        return ["-p", name, repr(value)]
    return ["-y", f"{name}: {_flow(value)}"]


def _guessed(text: str) -> bool:
    if text in ("True", "False", "None"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _flow(value: Any) -> str:
    """JSON that YAML 1.1 reads alike: it takes 1e-05 for text, and needs 1.0e-05."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    text = json.dumps(value)
    return plainyaml.number(text) if isinstance(value, float) and "e" in text else text


def _rows(entry: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The record as flat lines, nested names joined by a space."""
    rows: list[tuple[str, str]] = []
    for name, value in entry.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows += _rows(value, f"{label} ")
        else:
            words = {None: "none", True: "yes", False: "no"}
            known = value is None or isinstance(value, bool)
            rows.append((label, words[value] if known else str(value)))
    return rows


def _commit() -> dict[str, Any] | None:
    """Commit and state of the working tree; None without a checkout, a commit, or git."""
    root = checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu() -> str:
    """The processor's name as the system reports it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
