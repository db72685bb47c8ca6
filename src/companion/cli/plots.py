"""The pictures the command line draws. No window, no pyplot: figures that go to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from companion.core.errors import BadParameter
from companion.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from companion.connectivity import Barrier
    from companion.experiments.instability import Instability
    from companion.layerwise import LayerBarriers

_COLOURS = {"test": figures.OKABE_ITO["blue"], "train": figures.OKABE_ITO["vermillion"]}
_WORDS = {"shallow": "first layers", "deep": "last layers", "window": "window"}
_STYLES = {"test": "-", "train": "--"}


def _save(fig: Figure, path: Path, title: str) -> None:
    fixed = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    kind = path.suffix.lower().removeprefix(".")
    try:
        fig.savefig(path, format=kind, dpi=160, metadata={"Title": title, **fixed[kind]})
    except OSError as e:
        raise BadParameter(f"--plot: {path} cannot be written ({e.strerror}).") from e


def curve(found: Barrier, path: Path) -> None:
    """Loss and error along the path, train and test, under the headline BatchNorm mode."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        figures.use_style()
        fig = Figure(figsize=(8.6, 3.4))
        axes = fig.subplots(1, 2)
        for ax, metric, label in zip(
            axes, ("error", "loss"), ("error (%)", "loss (nats)"), strict=True
        ):
            for split, values in found.curve.values.items():
                n = found.curve.sizes[split]
                ax.plot(
                    found.curve.alphas,
                    values[metric],
                    _STYLES.get(split, ":"),
                    color=_COLOURS.get(split),
                    label=f"{split} (n = {n:,})",
                )
            ax.set_xlabel("position on the line (0 = A, 1 = B)")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
        axes[0].legend()
        fig.suptitle(str(found), x=0.01, ha="left", fontsize=9, wrap=True)
        _save(fig, path, "Error and loss on the line between two networks")


def before_and_after(before: Barrier, after: Barrier, path: Path) -> None:
    """Loss and error on the lines from A to B and from A to the aligned B, train and test."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = {"before": figures.OKABE_ITO["vermillion"], "after": figures.OKABE_ITO["blue"]}
    with mpl.rc_context():
        figures.use_style()
        fig = Figure(figsize=(8.6, 3.9), layout="constrained")
        axes = fig.subplots(1, 2)
        for ax, metric, label in zip(
            axes, ("error", "loss"), ("error (%)", "loss (nats)"), strict=True
        ):
            for when, found in (("before", before), ("after", after)):
                for split, values in found.curve.values.items():
                    ax.plot(
                        found.curve.alphas,
                        values[metric],
                        _STYLES.get(split, ":"),
                        color=colours[when],
                        label=f"{when}, {split} (n = {found.curve.sizes[split]:,})",
                    )
            ax.set_xlabel("position on the line (0 = A, 1 = B)")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        fig.suptitle(f"before: {before}\nafter: {after}", x=0.01, ha="left", fontsize=9, wrap=True)
        _save(fig, path, "Error and loss on the line before and after matching")


def by_k(found: Instability, path: Path, threshold: float, metric: str = "error") -> None:
    """The barrier against the fork step, with intervals; the steps are evenly spaced."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        figures.use_style()
        fig = Figure()
        ax = fig.subplots()
        for shift, split in ((-0.04, "test"), (0.04, "train")):
            points = [
                (i, v) for i, k in enumerate(found.ks) if (v := found.interval(k, split, metric))
            ]
            means = [v.value for _, v in points]
            ax.errorbar(
                [i + shift for i, _ in points],
                means,
                yerr=[
                    [m - v.low for m, (_, v) in zip(means, points, strict=True)],
                    [v.high - m for m, (_, v) in zip(means, points, strict=True)],
                ],
                fmt="o" + _STYLES[split],
                color=_COLOURS[split],
                label=split,
            )
        grey, unit = figures.OKABE_ITO["black"], "nats" if metric == "loss" else "points"
        ax.axhline(
            threshold, color=grey, linewidth=0.8, linestyle=":", label=f"{threshold:g} {unit}"
        )
        ax.set_xticks(range(len(found.ks)), [str(k) for k in found.ks])
        ax.set_xlabel(f"fork step k (of {found.recipe.steps:,})")
        ax.set_ylabel(f"{metric} barrier ({unit})")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.set_xlim(-0.5, len(found.ks) - 0.5)
        ax.legend(frameon=True)
        counts = sorted({len(found.values(k)) for k in found.ks})
        pairs = "–".join(str(c) for c in dict.fromkeys((counts[0], counts[-1])))
        ax.set_title(
            f"{found.recipe.net} on {found.recipe.data}: mean of {pairs} pairs, 95 % interval",
            fontsize=10,
        )
        _save(fig, path, f"{metric.capitalize()} barrier by fork step")


def layers(found: LayerBarriers, path: Path) -> None:
    """A bar for each layer and the whole network, and lines for the cumulative groups."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels = list(found.groups)
    cumulative = [k for k in ("shallow", "deep", "window") if found.select(k)]
    panels = bool(found.select("single")) + bool(cumulative)
    with mpl.rc_context():
        figures.use_style()
        fig = Figure(figsize=(9.4, max(3.4, 1.4 + 0.22 * len(labels))))
        axes = list(fig.subplots(1, max(panels, 1), squeeze=False)[0])
        if found.select("single"):
            ax = axes.pop(0)
            for shift, split in zip((-0.2, 0.2), found.splits, strict=False):
                heights = found.worst("single", split)
                values = [found.full_height(split), *(heights[label] for label in labels)]
                ax.barh(
                    [place + shift for place in range(len(values))],
                    values,
                    height=0.4,
                    color=_COLOURS.get(split),
                    hatch="//" if split == "train" else None,
                    label=f"{split} (n = {found.full.curve.sizes[split]:,})",
                )
            ax.set_yticks(range(len(labels) + 1), ["whole network", *labels], fontsize=8)
            ax.invert_yaxis()
            ax.set_xlabel("loss barrier at ½ (nats), larger of both defaults")
            ax.legend()
        split = found.splits[-1]
        for kind, style in zip(cumulative, ("o-", "s--", "^:"), strict=False):
            values = list(found.worst(kind, split).values())
            axes[0].plot(range(1, len(values) + 1), values, style, label=_WORDS[kind], markersize=4)
        if cumulative:
            axes[0].locator_params(axis="x", integer=True)
            axes[0].set_xlabel("number of layers (of the window: its place)")
            axes[0].set_ylabel(f"{split} loss barrier at ½ (nats)")
            axes[0].legend()
        title = "layer by layer" + ("" if found.bn == "none" else f", BatchNorm {found.bn}")
        fig.suptitle(title if found.valid else str(found.full), x=0.01, ha="left", fontsize=9)
        _save(fig, path, "Loss barriers of layers between two networks")
