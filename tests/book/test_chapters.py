"""All chapters: what a mistyped or impossible parameter ends in, before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import papermill
import pytest
from papermilled import ROOT, build, run, run_here

from companion.book.layout import Book
from companion.core.errors import CompanionError
from companion.core.runs import Store

CHAPTERS = Book(ROOT).chapters()
IMAGES = [
    name
    for name in CHAPTERS
    if all(
        part in Book(ROOT).source(name).read_text(encoding="utf-8")
        for part in ('dataset: str = "digits"', ".design(")
    )
]
MISTYPED: dict[str, Any] = {"datset": "mnist"}
ABSENT: dict[str, Any] = {"dataset": "cifar100"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A chapter's notebook, as `make notebooks` writes it."""
    return cache(lambda chapter: build(chapter, tmp_path_factory.mktemp("book")))


@pytest.mark.parametrize(
    ("chapter", "parameters", "words"),
    [
        *((name, MISTYPED, ["datset", "Did you mean 'dataset'"]) for name in CHAPTERS),
        *((name, ABSENT, ["cifar100", "companion data get cifar100"]) for name in IMAGES),
        ("04_layerwise", {"inits": 1.5}, ["inits", "1.5"]),
        ("04_layerwise", {"window": 50}, ["window", "50"]),
        ("04_layerwise", {"batch": 5000}, ["batch", "5000", "1437"]),
        ("05_gpt", {"dataset": "digits"}, ["digits", "needs a text"]),
        ("05_gpt", {"dataset": "wikitext2"}, ["wikitext2"]),
        ("05_gpt", {"inits": 1}, ["inits", "2 or more"]),
        ("05_gpt", {"ks": [0]}, ["ks", "above 0"]),
        ("05_gpt", {"steps": 10, "ks": [4], "looks": [11]}, ["looks", "11"]),
        (
            "05_gpt",
            {"net": "gpt:layers=2,width=16,heads=2", "neighbours": 9},
            ["neighbours", "9", "5"],
        ),
        ("05_gpt", {"net": "resnet20"}, ["resnet20", "image"]),
        ("05_gpt", {"batch": 100_000}, ["batch", "100000"]),
    ],
)
def test_bad_parameters_end_before_anything_trains(
    source: Callable[[str], Path],
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    chapter: str,
    parameters: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "no-data"))
    with pytest.raises(CompanionError) as caught:
        run_here(source(chapter), only_design=True, **parameters)
    for word in words:
        assert word in str(caught.value)
    assert [e for e in store.entries() if e.identity["kind"] != "windows"] == []


@pytest.mark.slow
def test_so_they_do_under_papermill(source: Callable[[str], Path], tmp_path: Path) -> None:
    """It injects a cell of its own, and goes on after a name that it does not know."""
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        run(source("07_errata"), tmp_path, **MISTYPED)
    assert caught.value.ename == "BadParameter"
    assert "Did you mean 'dataset'" in caught.value.evalue
