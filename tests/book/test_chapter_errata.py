"""The page of errata: each cell still triggers the mistake that its text tells of."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
from papermilled import ROOT, build, entries, run_here

PAGE = "07_errata"
Shown = Callable[[str], Any]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("errata")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_RUNS", str(folder / "runs"))
        return run_here(build(PAGE, folder))


@pytest.fixture
def shown(notebook: Any) -> Shown:
    """What the one cell with these words shows: a value, or what it printed."""

    def last(words: str) -> Any:
        (cell,) = (c for c in notebook.cells if c.cell_type == "code" and words in c.source)
        output = cell.outputs[-1]
        if output.output_type == "stream":
            return output.text
        return ast.literal_eval(output.data["text/plain"])

    return last


@pytest.mark.slow
def test_linear_mode_connectivity(shown: Shown) -> None:
    refused = shown("grid(30)")
    assert "nearest to the middle: 0.483" in refused and "must be odd" in refused
    assert shown("gates.distinct").startswith("G0b distinct FAIL")
    assert shown("gates.quality").startswith("G0 quality FAIL")
    assert "run 0, epoch 1 = run 1, epoch 0" in shown("noise_independence")


@pytest.mark.slow
def test_git_rebasin(shown: Shown) -> None:
    counts = shown("convs =")
    assert counts == {"every layer on its own, as in the paper": 55109, "tied": 25638}
    assert "25.02, 67% less" in shown("top-1 accuracy") and "78% less" in shown("top-1 accuracy")
    top = {name: float(share.rstrip("%")) for name, share in shown("right, member").items()}
    assert top["top-5"] == pytest.approx(5, abs=2) and top["as published"] > 99
    batches = {size: float(share.rstrip("%")) for size, share in shown("published =").items()}
    assert batches[1] < 10 < batches[10] < batches[100] and batches[1000] > 99
    loss = shown("straight_through(")
    assert loss["best"] < min(loss["last"], loss["weight matching"]) - 0.1
    assert shown("zero =") == "B"
    right = shown("LeakyReLU")
    assert right["ReLU"] == 100 and max(right["A"], right["B"]) < 99.95
    assert shown("PYTHONHASHSEED").strip() == "different seeds: 2"


@pytest.mark.slow
def test_llfc(shown: Shown) -> None:
    assert shown("w_a =") == {"1 - cos": 2, "1 - |cos|": 0}
    found = shown("coefficient")
    assert found["product"] == pytest.approx(found["cos²"], abs=2e-3) and found["product"] < 0.9
    seen = shown("class Functional")
    assert seen["ReLU modules"] == 0 and seen["found here"] == ["relu#1", "output"]
    assert shown("vgg =") == {"numbers an image": 569_354, "gigabytes": 68}


@pytest.mark.slow
def test_layerwise(shown: Shown) -> None:
    spans = shown("views, copies")
    assert spans["views"] <= 2 and spans["copies"] == 5
    assert shown("600 // 2") == [300, 102]
    assert shown("class Tied") == ["embed", "middle"]
    assert abs(shown("of_batches")) > 1e-3


@pytest.mark.slow
def test_gpt(shown: Shown) -> None:
    barrier = shown("rise(half(*a))")
    assert barrier > 0.1
    assert abs(shown("half(*a)) - nats(a)") - barrier) > 0.05
    assert shown("nats(a, dropout=0.2)") < barrier - 0.03
    by_dropout = shown("ends = {p")
    assert by_dropout[0] == barrier and by_dropout[0.8] < 0 < by_dropout[0.2] < barrier
    assert shown("def drawn") > 0.01
    names = shown('"embedding alone"')
    assert names["embedding alone"] == names["A itself"] < 0.3 < names["output alone"]
    assert names["output alone"] == names["both, as one layer"]
    assert shown("for name in layerwise.layer_groups(gpt)") == ["transformer.wte"]


@pytest.mark.slow
def test_the_page_ends_as_every_page_does(notebook: Any) -> None:
    (record,) = entries(notebook, "provenance")
    assert record["images"]["name"] and len(record["networks"]) == 2
    assert entries(notebook, "rerun") and not entries(notebook, "claims")


def test_every_chapter_leads_to_it() -> None:
    for path in (ROOT / "chapters").glob("*.md"):
        if path.stem != PAGE and path.stem[2] == "_":  # 02b and its like belong to a chapter
            assert "[errata](07_errata)" in path.read_text(encoding="utf-8"), path.stem
