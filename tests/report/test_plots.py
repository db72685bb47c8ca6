"""What is drawn, and what is returned of it. Warnings are errors, those of an empty legend too."""

from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from traitlets.config import Config

from companion.connectivity import Curve, Plane
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.stats import Interval
from companion.landscape import Projected
from companion.report import figures, plots, recorded
from companion.report.figures import ON_DARK, ON_LIGHT

mpl.use("Agg")


@pytest.fixture
def ax():
    with mpl.rc_context():
        figures.use_style()
        yield Figure().subplots()


def test_cells_display_four_digits():
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    try:
        with mpl.rc_context():
            figures.use_style()
        shown, _ = shell.display_formatter.format({0: (0.1234567, 22.9166666), 1: 1437})
        assert shown["text/plain"] == "{0: (0.1235, 22.92), 1: 1437}"
    finally:
        InteractiveShell.clear_instance()


def drawn_without_a_window(fig):
    fig.canvas.draw()


def texts(ax):
    return [t.get_text() for t in ax.texts]


def entries(ax):
    found = ax.get_legend()
    return [] if found is None else [t.get_text() for t in found.get_texts()]


def curve(*errors):
    values = {"error": errors, "loss": tuple(e / 10 for e in errors)}
    return Curve(
        (0.0, 0.5, 1.0), {"test": values, "train": values}, "none", {"test": 9, "train": 8}
    )


def interval(value, low=None, high=None, n=3):
    return Interval(value, value if low is None else low, value if high is None else high, n, n)


def test_lines_are_the_mean_and_a_band_over_pairs(ax):
    groups = {"k = 0": [curve(2, 40, 4), curve(4, 60, 4)], "none": [], "k = 9": [curve(3, 3, 3)]}
    drawn = plots.lines(ax, groups, xlabel="from A to π(B)")
    assert [list(line.get_ydata()) for line in ax.lines] == [[3, 50, 4], [3, 3, 3]]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-."]
    middle = ax.collections[0].get_paths()[0].vertices
    assert {40.0, 60.0} <= set(middle[middle[:, 0] == 0.5][:, 1])
    assert entries(ax) == ["k = 0", "k = 9"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("from A to π(B)", "test error (%)")
    assert drawn["alpha"] == [0.0, 0.5, 1.0]
    assert list(drawn["k = 0"]["low"]) == [2, 40, 4]
    assert drawn["k = 0"]["pairs"] == 2
    assert plots.lines(ax, groups, "train", "loss")["unit"] == "cross-entropy (nats)"


def test_what_is_empty_draws_no_legend_and_does_not_warn(ax):
    plots.lines(ax, {})
    plots.against_k(ax, {}, steps=9)
    plots.against_k(ax, {"nothing": {}}, steps=9, threshold=None)
    plots.by_layer(ax, {"A": []})
    plots.conditions(ax, {}, threshold=None)
    plots.legend(ax.figure)
    drawn_without_a_window(ax.figure)
    fig, drawn = plots.panels({"nothing": (9, {})})
    assert list(drawn) == ["nothing"]
    drawn_without_a_window(fig)


def test_a_trajectory_says_what_the_plane_leaves_out(ax):
    found = Projected(((0.0, 0.0), (1.0, 2.0)), (0.0, 0.25), 0.25)
    assert plots.trajectory(ax, found, "copy 1") == codec.to_json(found)
    assert entries(ax) == ["copy 1 (25 % of it outside the plane)"]
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [1, 2]]


def test_band_has_a_colour_and_a_marker_of_its_own(ax):
    drawn = plots.band(ax, range(1, 3), [[1, 2], [3, 6]], "the last n", 1)
    (line,) = ax.lines
    assert list(line.get_ydata()) == [2, 4]
    assert (line.get_marker(), line.get_linestyle(), line.get_label()) == ("s", "--", "the last n")
    assert drawn["x"] == [1, 2]
    assert list(drawn["high"]) == [3, 6]


def test_by_layer_leaves_out_what_a_logarithm_cannot_show(ax):
    series = {
        "A and B": [{"one": 1.0, "two": 0.5}],
        "spawned": [{"one": 0.1, "two": 0.0}, {"one": 0.3, "two": 0.0}],
    }
    drawn = plots.by_layer(ax, series, plain=("A and B",), ylabel="E[1 − cos]")
    plain, coloured = ax.lines
    assert (plain.get_color(), plain.get_marker()) == ("black", "None")
    assert list(coloured.get_ydata()) == [pytest.approx(0.2)]
    assert (coloured.get_color(), coloured.get_marker()) == ("C0", "o")
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "E[1 − cos]"
    assert drawn["layers"] == ["one", "two"]
    assert drawn["spawned"]["pairs"] == 2


def test_a_layer_that_a_label_lacks_is_a_gap(ax):
    plots.by_layer(ax, {"all": [{"a": 1.0, "b": 2.0}], "some": [{"b": 5.0}]}, log=False)
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1], [1]]


def test_redraw_takes_a_record_and_names_few_of_many_layers(ax):
    layers = [f"layer{i}" for i in range(30)]
    values = [None, *range(1, 30)]
    plots.redraw(ax, {"layers": layers, "A": {"mean": values, "low": values, "high": values}})
    assert list(ax.lines[0].get_xdata()) == list(range(1, 30))
    named = [t.get_text() for t in ax.get_xticklabels()]
    assert named == layers[::3]
    empty = Figure().subplots()
    plots.redraw(empty, {})
    assert texts(empty) == ["no valid pair"]


def test_sweep_is_evenly_spaced_and_says_the_share(ax):
    series = {"test": {0: interval(20, 18, 23), 400: interval(1)}, "train": {50: interval(7)}}
    drawn = plots.sweep(ax, series, xlabel="k", ylabel="barrier", total=800)
    (line, _, (bars,)), _ = ax.containers
    assert list(line.get_xdata()) == pytest.approx([-0.03, 1.97])
    assert [list(bar[:, 1]) for bar in bars.get_segments()] == [[18, 23], [1, 1]]
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert ticks == ["0\n0 %", "50\n6.25 %", "400\n50 %"]
    assert drawn["T"] == 800
    assert drawn["test"]["k"] == [0, 400]
    assert list(drawn["test"]["low"]) == [18, 1]
    assert drawn["train"]["pairs"] == [3]
    plots.sweep(ax, series, xlabel="width", ylabel="barrier")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "50", "400"]
    plots.sweep(ax, series, xlabel="width", ylabel="barrier", ticks={50: "fifty"})
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "fifty", "400"]


def test_against_k_draws_the_line_it_is_held_to(ax):
    plots.against_k(ax, {"test": {0: interval(20)}}, steps=9)
    assert texts(ax) == ["2 points: the paper's line"]
    assert list(ax.lines[-1].get_ydata()) == [2, 2]
    assert entries(ax) == ["test"]
    other = Figure().subplots()
    plots.against_k(other, {"test": {0: interval(20)}}, steps=9, threshold=None)
    assert texts(other) == []


def test_an_axis_of_steps_is_not_spaced_as_the_grid_happens_to_be(ax):
    """0, 10, 20, 80 as four even places is neither linear nor logarithmic."""
    points = {k: interval(1) for k in (0, 10, 20, 80)}
    plots.against_k(ax, {"test": points}, steps=100)
    assert list(ax.get_xticks()) == [-1, 0, 1, 3] and "log" in ax.get_xlabel()
    assert ax.get_ylim()[0] <= 0, "a barrier is read from 0"
    assert [t.get_text().split()[0] for t in ax.get_xticklabels()] == ["0", "10", "20", "80"]
    other = Figure().subplots()
    plots.against_k(other, {"test": points}, steps=100, axis="linear")
    assert list(other.get_xticks()) == pytest.approx([0, 0.375, 0.75, 3])
    plots.against_k(Figure().subplots(), {"test": {0: interval(1)}}, steps=100)


def test_panels_share_a_scale_and_hide_the_place_left_over():
    runs = {
        f"run {i}:\n  digits": (10, {"mlp, test": {0: interval(20 * i), 5: interval(1)}})
        for i in (1, 2, 3)
    }
    fig, drawn = plots.panels(runs)
    assert list(drawn) == ["run 1: digits", "run 2: digits", "run 3: digits"]
    assert drawn["run 2: digits"]["mlp, test"]["mean"][0] == 40
    assert [ax.get_visible() for ax in fig.axes] == [True, True, True, False]
    assert len({ax.get_ylim() for ax in fig.axes[:3]}) == 1
    assert entries(fig.axes[0]) == ["mlp, test"]


def test_conditions_are_dots_from_top_to_bottom(ax):
    rows = {"null": interval(-0.04), "k = 0": interval(20, 18, 25), "… ÷ 10": interval(-3.2, -4, 0)}
    drawn = plots.conditions(ax, rows)
    assert texts(ax) == ["0.0", "20.0", "−3.2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(rows)
    left, right = ax.get_xlim()
    assert left < -4
    assert right > 25
    assert drawn["k = 0"] == {"mean": 20, "low": 18, "high": 25, "pairs": 3}


def test_conditions_may_have_colours_and_an_axis_of_their_own():
    ax = Figure().subplots()
    rows = {"a": interval(95.1), "b": interval(96.2)}
    look = {"threshold": None, "form": "{:.2f}", "colours": ["C3", "C0"]}
    plots.conditions(ax, rows, from_zero=False, **look)
    assert texts(ax) == ["95.10", "96.20"]
    assert [c.lines[0].get_color() for c in ax.containers] == ["C3", "C0"]
    assert ax.get_xlim()[0] > 90


@pytest.mark.parametrize("metric", ["error", "loss"])
def test_planes_are_on_one_scale_with_its_bar(metric):
    z = ((1.0, 50.0), (3.0, 80.0))
    low = ((1.0, 2.0), (3.0, float("inf")))
    points = ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0))
    found = {
        k: Plane((0.0, 1.0), (0.0, 1.0), {"test": {metric: v}}, points, "none")
        for k, v in ((0, z), (9, low))
    }
    fig = Figure()
    axes = fig.subplots(1, 2)
    drawn = plots.planes(axes, found, metric=metric)
    first, second = (ax.collections[0] for ax in axes)
    assert first.get_clim() == second.get_clim()
    assert list(first.levels) == list(second.levels)
    assert first.levels[-1] == (100 if metric == "error" else 80)
    assert fig.axes[-1].get_ylabel() == f"test {plots.UNITS[metric]}"
    assert texts(axes[1]) == ["W₀", "A", "B"]
    segment, *marks = axes[0].lines
    assert list(segment.get_xdata()) == [1.0, 0.5]
    assert [m.get_marker() for m in marks] == ["s", "o", "o"]
    assert drawn == codec.to_json({"0": found[0], "9": found[9]})
    assert codec.from_json(Plane, drawn["0"]) == found[0]


def test_a_plane_may_name_other_networks_and_join_others():
    found = Plane(
        (0.0, 1.0), (0.0, 1.0), {"test": {"error": ((1.0, 2.0), (3.0, 4.0))}},
        ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)), "none",
    )  # fmt: skip
    ax = Figure().subplots()
    plots.planes([ax], {"": found}, names=("A", "B", "π(B)"), segments=((0, 1), (0, 2)))
    assert [line.get_linestyle() for line in ax.lines[:2]] == ["--", "-"]
    assert {m.get_marker() for m in ax.lines[2:]} == {"o"}
    assert texts(ax) == ["A", "B", "π(B)"]


MAPS = {
    "train": {"whole network": [0.0, 1.0], "block 1": [0.4, 1.25], "block 2": [-0.05, None]},
    "test": {"whole network": [0.1, 0.9], "block 1": [0.0, 0.2], "block 2": [0.3, 0.3]},
}


def test_heat_clips_nothing_and_dark_is_high():
    fig = Figure()
    axes = fig.subplots(1, 2)
    drawn = plots.heat(axes, MAPS, [0, 400], label="loss barrier (nats)")
    assert drawn == MAPS
    for ax in axes:
        assert ax.images[0].get_clim() == (-0.05, 1.25)
    assert fig.axes[-1].get_ylabel() == "loss barrier (nats)"
    bottom, top = fig.axes[-1].get_ylim()
    assert (bottom, top) == (-0.05, 1.25)
    assert texts(axes[0]) == ["0.00", "1.00", "0.40", "1.25", "−0.05", "—"]
    low, high = axes[0].images[0].to_rgba(np.asarray([0.0, 1.25]))[:, :3].mean(1)
    assert low > high
    colour = {t.get_text(): to_hex(t.get_color()) for t in axes[0].texts}
    # On a colour of its own: these stay where ink turns to white in the dark.
    assert colour["1.25"] == ON_DARK
    assert colour["0.00"] == colour["—"] == ON_LIGHT
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list(MAPS["train"])
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["0", "400"]
    drawn_without_a_window(fig)
    named = [any(t.get_visible() for t in ax.get_yticklabels()) for ax in axes]
    assert named == [True, False]


def test_heat_of_other_rows_and_columns_names_them():
    fig = Figure()
    axes = fig.subplots(1, 2)
    maps = {"a": {"x": [1.0]}, "b": {"y": [float("nan"), 2.0]}}
    columns = {"a": ["s"], "b": ["t", "u"]}
    plots.heat(axes, maps, columns, label="", form="{:.1f}", missing="INVALID", apart=False)
    assert texts(axes[1]) == ["INVALID", "2.0"]
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["t", "u"]
    assert all(t.get_visible() for t in axes[1].get_yticklabels())
    assert axes[0].lines[:] == []
    plots.heat([Figure().subplots()], {"a": {"x": [None]}}, ["s"], label="")  # nothing is valid


def test_dots_are_one_a_layer_and_pair(ax):
    drawn = plots.dots(ax, [{"a": 0.1, "b": 0.2}, {"a": 0.3, "b": 0.0}], [0.9, 0.8], xlabel="nats")
    dots = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert [list(d.get_xdata()) for d in dots] == [[0.1, 0.2], [0.3, 0.0]]
    assert [d.get_label() for d in dots] == ["pair 1", "pair 2"]
    assert [line.get_xdata()[0] for line in ax.lines[1::2]] == [0.9, 0.8]
    assert ax.get_xlabel() == "nats"
    assert drawn == {"layers": ["a", "b"], "pairs": [[0.1, 0.2], [0.3, 0.0]], "full": [0.9, 0.8]}


def test_spectrum_is_over_the_share_of_all(ax):
    drawn = plots.spectrum(ax, {"width 4": [1.0, 0.5, 0.2, 0.1], "width 2": [1.0, 0.1]})
    assert list(ax.lines[0].get_xdata()) == [0.25, 0.5, 0.75, 1.0]
    assert drawn["width 2"]["count"] == 2


def test_levels_and_dashed_lines(ax):
    assert plots.levels(ax, {"ensemble": 0.2}) == {"ensemble": 0.2}
    plots.dashed(ax, 2.0, text="here")
    plots.dashed(ax, x=0.5)
    assert ax.lines[0].get_label() == "ensemble"
    assert list(ax.lines[1].get_ydata()) == [2.0, 2.0]
    assert list(ax.lines[2].get_xdata()) == [0.5, 0.5]
    assert texts(ax) == ["here"]


def test_one_legend_stands_for_those_of_all_panels():
    fig, axes = plots.grid(3, height=2.0)
    assert tuple(fig.get_size_inches()) == (plots.WIDEST, 4.0)
    plots.lines(axes[0], {"a": [curve(1, 2, 3)]})
    plots.lines(axes[2], {"a": [curve(1, 2, 3)], "b": [curve(1, 2, 3)]})
    plots.legend(fig)
    assert all(ax.get_legend() is None for ax in axes)
    (found,) = fig.legends
    assert [t.get_text() for t in found.get_texts()] == ["a", "b"]
    one, (only,) = plots.grid(1)
    assert one.axes == [only]


def barrier(words, *errors):
    class Fake(SimpleNamespace):
        __str__ = lambda _: words  # noqa: E731 - a method of one word

    return Fake(curve=curve(*errors))


def test_barriers_of_one_pair_before_and_after(tmp_path):
    path = tmp_path / "x.svg"
    with figures.file(path, "A title", figsize=(8, 4)) as fig:
        before, after = barrier("barrier 60", 2, 60, 2), barrier("barrier 1", 2, 3, 2)
        drawn = plots.barriers(fig, {"before": before, "after": after})
        error, _ = fig.axes
        assert [list(line.get_ydata())[1] for line in error.lines] == [60, 60, 3, 3]
        assert [line.get_color() for line in error.lines] == ["C1", "C1", "C0", "C0"]
        assert error.lines[0].get_label() == "before, test (n = 9)"
        assert fig.get_suptitle() == "before: barrier 60\nafter: barrier 1"
    assert "A title" in path.read_text()
    assert drawn["after, train"]["loss"] == (0.2, 0.3, 0.2)
    alone = Figure()
    assert list(plots.barriers(alone, {"": before})) == ["test", "train"]
    assert [line.get_color() for line in alone.axes[0].lines] == ["C0", "C1"]
    assert alone.get_suptitle() == "barrier 60"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with (
        pytest.raises(BadParameter, match="--plot"),
        figures.file(tmp_path / "no" / "x.svg", "") as fig,
    ):
        fig.subplots()


class Layers(SimpleNamespace):
    """Made-up barriers of two layers; the last ones together were not measured."""

    def select(self, kind):
        return self.kinds.get(kind, ())

    def worst(self, kind, split):
        return self.kinds[kind][split]

    def full_height(self, split):
        return {"train": 0.9, "test": 0.8}[split]


def test_layers_are_bars_and_curves():
    found = Layers(
        groups={"first": (), "second": ()},
        splits=("train", "test"),
        bn="reestimate",
        valid=True,
        full=SimpleNamespace(curve=curve(1, 2, 3)),
        kinds={
            "single": {s: {"first": 0.1, "second": 0.4} for s in ("train", "test")},
            "shallow": {"test": {"1": 0.1, "2": 0.8}},
        },
    )
    fig = Figure()
    drawn = plots.layers(fig, found)
    bars, together = fig.axes
    assert [b.get_width() for b in bars.patches] == [0.9, 0.1, 0.4, 0.8, 0.1, 0.4]
    named = ["whole network", "first", "second"]
    assert [t.get_text() for t in bars.get_yticklabels()] == named
    assert list(together.lines[0].get_ydata()) == [0.1, 0.8]
    assert entries(together) == ["first layers"]
    assert fig.get_suptitle() == "layer by layer, BatchNorm reestimate"
    assert drawn["test"] == dict(zip(named, (0.8, 0.1, 0.4), strict=True))


def test_records_against_the_width_say_the_steps_of_their_networks():
    series = {"k": [8, 16], "mean": [9.0, None], "low": [8.0, None], "high": [9.5, None]}
    width = {"T": 0, "matched, test": {**series, "pairs": [3, 0]}}
    kept = {"by-width": {"data": width}, "line": {"data": None}, "by-time": {"data": {"T": 3000}}}
    data = {"figures": kept, "dataset": {"name": "MNIST"}, "hardware": "CPU", "date": "2026-01-01"}
    record = recorded.Record("02_git_rebasin", "paper", "cpu-mnist", {}, data)
    (found,) = recorded.curves([record], "by-width").items()
    assert found[0] == "cpu-mnist: MNIST, T = 3000\nCPU, 2026-01-01"
    assert found[1] == (0, {"matched, test": {8: Interval(9.0, 8.0, 9.5, 3, 0)}})
    del kept["by-time"]
    assert list(recorded.curves([record], "by-width")) == ["cpu-mnist: MNIST\nCPU, 2026-01-01"]


def test_panels_show_the_highest_of_their_curves_whole():
    """The scale is shared, and was that of the first panel."""
    runs = {
        "low": (
            100,
            {"a, test": {0: Interval(10.0, 9.0, 11.0, 3, 3), 5: Interval(1, -2, 4, 3, 3)}},
        ),
        "high": (
            100,
            {"a, test": {0: Interval(60.0, 50.0, 70.0, 3, 3), 5: Interval(1, 0, 2, 3, 3)}},
        ),
        "middle": (
            100,
            {"a, test": {0: Interval(30.0, 29.0, 31.0, 3, 3), 5: Interval(1, 0, 2, 3, 3)}},
        ),
    }
    fig, _ = plots.panels(runs)
    fig.canvas.draw()
    for ax in fig.axes[:3]:
        low, high = ax.get_ylim()
        assert low <= -2 and high >= 70
