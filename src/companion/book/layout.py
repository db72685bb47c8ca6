"""Where the book's files are, relative to its root."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from companion.core import locks, plainyaml
from companion.core.errors import BadParameter, CompanionError, one_of


class BookError(CompanionError):
    """A step of the build failed. The message says which file, and what to do."""


@dataclass(frozen=True)
class Book:
    """A book's source tree, with ``_toc.yml`` and ``chapters/`` at ``root``."""

    root: Path

    def chapters(self) -> list[str]:
        """Names of the chapters, ``01_instability`` and so on, in order."""
        return sorted(path.stem for path in (self.root / "chapters").glob("*.md"))

    def source(self, chapter: str) -> Path:
        """The text of a chapter. An unknown name raises BadParameter and lists the chapters."""
        one_of("chapter", chapter, self.chapters())
        return self.root / "chapters" / f"{chapter}.md"

    def profiles(self) -> list[str]:
        """Names of the profiles; ``quick``, the chapters' own values, is always there."""
        folder = self.root / "chapters" / "profiles"
        return sorted({"quick", *(path.name for path in folder.glob("*/"))})

    def profile_folder(self, profile: str) -> Path:
        """The folder of a profile. An unknown name raises BadParameter and lists the profiles."""
        one_of("profile", profile, self.profiles())
        return self.root / "chapters" / "profiles" / profile

    def notebook(self, chapter: str) -> Path:
        return self.root / "build" / "notebooks" / f"{chapter}.ipynb"

    def executed(self, profile: str, chapter: str) -> Path:
        return self.root / "build" / profile / "executed" / f"{chapter}.ipynb"

    def building(self, profile: str, what: str) -> AbstractContextManager[None]:
        """Held by one process that makes ``what`` of a profile: a chapter's run, or the site.

        Raises:
            Busy: another process makes the same; the message says which.
        """
        path = self.root / "build" / profile / f".{what}.lock"
        return locks.held(path, f"{what} ({profile})", wait=False)

    def staged(self, profile: str) -> Path:
        return self.root / "build" / profile / "book"

    def html(self, profile: str) -> Path:
        return self.staged(profile) / "_build" / "html"

    def pages(self) -> list[str]:
        """The pages of ``_toc.yml`` in order, without suffix, the front page first."""
        path = self.root / "_toc.yml"
        try:
            toc = plainyaml.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BookError(
                "_toc.yml: there is no such file; is this the root of the book?"
            ) from error
        except yaml.YAMLError as error:
            raise BadParameter(f"_toc.yml is not valid YAML: {error}") from error
        if not isinstance(toc, dict) or "root" not in toc:
            raise BadParameter("_toc.yml: the key `root` is missing; it names the front page.")
        found = [str(toc["root"]), *_files(toc)]
        return [page.removesuffix(".md").removesuffix(".ipynb") for page in found]


def _files(entry: Any) -> list[str]:
    """Every ``file:`` below an entry of the table of contents, in order."""
    if isinstance(entry, list):
        return [page for item in entry for page in _files(item)]
    if not isinstance(entry, dict):
        return []
    own = [str(entry["file"])] if "file" in entry else []
    return own + [page for value in entry.values() for page in _files(value)]
