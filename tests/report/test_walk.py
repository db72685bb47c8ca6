"""The figures to play with: what is drawn is what was measured."""

from __future__ import annotations

import base64
import html as escapes
import io
import json
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imread

from companion.report import walk

PLANE = {
    "x": [-1.0, 0.0, 1.0, 2.0],
    "y": [-1.0, 0.0, 1.0],
    "points": [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]],
    "values": {"test": {"error": [[90.0, 80, 70, 60], [50, 40, 30, 20], [10, 5, 2, 1]]}},
}


def drawn(cases: list[walk.Case]) -> tuple[str, list[dict]]:
    text = walk.html(cases, name="toy", switch="parted at step", names=("<W>", "A", "B"))
    (data,) = re.findall(r'data-walk="(.*?)"', text)
    return text, json.loads(escapes.unescape(data))


def test_ends_and_line_stand_where_they_were_measured():
    text, (case, other) = drawn(
        [walk.Case("0", PLANE, 1, 2, [1.0, 50.0, 2.0]), walk.Case("7", PLANE, 0, 2, [0, 0, 0])]
    )
    # x from -1 to 2 over 260 units, y upwards over 220.
    assert case["points"] == [[86.7, 110.0], [173.3, 110.0], [173.3, 0.0]]
    assert case["ends"] == [[173.3, 110.0], [173.3, 0.0]]
    assert other["ends"] == [[86.7, 110.0], [173.3, 0.0]]
    assert case["path"] == "M50.0 227.8 L180.0 120.0 L310.0 225.6"  # 1 %, 50 %, 2 % of 220 units
    assert "half-way the test error is 50.0 %, at the ends 1.0 % and 2.0 %." in text
    assert "&lt;W&gt;" in text and "<W>" not in text


def test_the_map_has_a_pixel_for_each_network_and_the_books_colours():
    text, _ = drawn([walk.Case("0", PLANE, 1, 2, [1.0, 50.0, 2.0])])
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pixels = imread(io.BytesIO(base64.b64decode(picture)), format="png")
    errors = np.array(PLANE["values"]["test"]["error"]) / 100
    assert np.allclose(pixels, colormaps["cividis_r"](errors)[::-1], atol=1 / 255)


def test_only_the_first_map_is_shown_without_scripts():
    text, cases = drawn([walk.Case(str(k), PLANE, 1, 2, [k, k, k]) for k in range(3)])
    shown = [("display:none" not in tag) for tag in re.findall(r"<image[^>]*>", text)]
    assert shown == [True, False, False] and [c["label"] for c in cases] == ["0", "1", "2"]
