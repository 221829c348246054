"""The papers' figures as PNG files: one function per figure, arrays in, one file out, one look for all.

Colours are Okabe and Ito's, told apart by people with colour-blindness; every line also has its own dash and marker,
so the figures survive a grey printer.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmr_fast._files import write_aside

if TYPE_CHECKING:
    from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vP*"
CLASS_COLOURS = (*COLOURS, "#882255", "#999933", "#BBBBBB")
IMAGE_COLOUR, TEXT_COLOUR = "#D55E00", "#0072B2"  # the paper's red and blue
DIRECTIONS = {"i2t": "image query, texts ranked", "t2i": "text query, images ranked"}
STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
}

Curve = tuple[np.ndarray, np.ndarray]
"""x and y of one line."""


def plot_directions(
    path: Path,
    title: str,
    curves: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str,
    *,
    looks: Sequence[str],
    log_x: bool = False,
) -> None:
    """Two panels, i2t and t2i, one line per name: curves[name]["i2t" or "t2i"] = (x, y).

    looks: all names of a report, so that a name looks the same in every figure, whichever others are there.
    """
    with _panels(path, title, 1, 2, (8.6, 3.7)) as (figure, axes):
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            for name, both in curves.items():
                x, y = both[direction]
                axis.plot(x, y, label=name, markevery=max(1, math.ceil(len(x) / 8)), **_look(looks.index(name)))
            axis.set_title(DIRECTIONS[direction])
            axis.set_xlabel(xlabel)
            if log_x:
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter("{x:g}")
        top = max(axis.get_ylim()[1] for axis in axes)
        for axis in axes:
            axis.set_ylim(0, min(1.02, top))
        axes[0].set_ylabel(ylabel)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / math.ceil(len(labels) / 4))
        )


def plot_losses(
    path: Path, title: str, epochs: Sequence[float], panels: Mapping[str, Mapping[str, np.ndarray]], unit: str = "epoch"
) -> None:
    """One panel per entry: panels[panel title][line name] = one value per epoch, or `unit`; NaN where there is none."""
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with _panels(path, title, rows, columns, (3.9 * columns, 3.1 * rows)) as (_, axes):
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
            for number, (name, values) in enumerate(lines.items()):
                known = np.isfinite(values)
                look = _look(number) | {"marker": "o" if known.sum() <= 12 else ""}
                axis.plot(np.asarray(epochs)[known], values[known], label=name, **look)
            axis.set_title(panel)
            axis.set_xlabel(unit)
            axis.set_xlim(min(epochs) - 0.02 * len(epochs), max(epochs) + 0.02 * len(epochs))
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axis.legend()


def plot_lines(
    path: Path, title: str, lines: Mapping[str, Curve], xlabel: str, ylabel: str, *, looks: Sequence[str],
    from_zero: bool = True, log_x: bool = False,
) -> None:  # fmt: skip
    """One panel, lines[name] = (x, y) each; looks as in plot_directions; y begins at 0 where `from_zero`."""
    with _panels(path, title, 1, 1, (6.4, 4.0)) as (_, axes):
        for name, (x, y) in lines.items():
            axes[0].plot(x, y, label=name, markevery=max(1, math.ceil(len(x) / 10)), **_look(looks.index(name)))
        axes[0].set_xlabel(xlabel)
        axes[0].set_ylabel(ylabel)
        if log_x:
            axes[0].set_xscale("log")
            axes[0].xaxis.set_major_formatter("{x:g}")
        if from_zero:
            axes[0].set_ylim(bottom=0)
        axes[0].legend()


def plot_panels(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Curve]], xlabel: str, ylabel: str, *,
    looks: Sequence[str],
) -> None:  # fmt: skip
    """A panel an entry beside each other, panels[panel title][line name] = (x, y); y begins at 0, x is shared."""
    with _panels(path, title, 1, len(panels), (4.3 * len(panels), 3.7)) as (_, axes):
        for axis, (panel, lines) in zip(axes, panels.items(), strict=True):
            for name, (x, y) in lines.items():
                axis.plot(x, y, label=name, **_look(looks.index(name)) | {"marker": ""})
            axis.set_title(panel)
            axis.set_xlabel(xlabel)
            axis.set_ylim(bottom=0)
            axis.legend()
        axes[0].set_ylabel(ylabel)


def plot_bands(path: Path, title: str, bands: Mapping[str, np.ndarray], xlabel: str, ylabel: str) -> None:
    """One panel, bands[name] = (runs, steps): the mean as a line, from the lowest run to the highest as a band."""
    with _panels(path, title, 1, 1, (6.4, 4.0)) as (_, axes):
        for number, (name, curves) in enumerate(bands.items()):
            x, look = np.arange(curves.shape[1]), _look(number)
            axes[0].plot(x, curves.mean(axis=0), label=name, markevery=max(1, math.ceil(len(x) / 10)), **look)
            axes[0].fill_between(
                x, curves.min(axis=0), curves.max(axis=0), color=look["color"], alpha=0.25, linewidth=0
            )
        axes[0].set_xlabel(xlabel)
        axes[0].set_ylabel(ylabel)
        if bands:
            axes[0].legend()


def plot_bars(path: Path, title: str, bars: Mapping[str, Mapping[str, float]], xlabel: str) -> None:
    """Horizontal bars, bars[series][row] = a share from 0 to 1, the series of a row under each other."""
    rows = list(dict.fromkeys(row for series in bars.values() for row in series))
    height = 0.8 / len(bars)
    with _panels(path, title, 1, 1, (7.2, 1.2 + 0.22 * len(rows) * (len(bars) + 0.6))) as (figure, axes):
        for number, (name, series) in enumerate(bars.items()):
            places = [rows.index(row) + number * height - 0.4 + height / 2 for row in series]
            colour = COLOURS[number % len(COLOURS)]
            axes[0].barh(places, list(series.values()), height * 0.92, color=colour, label=name)
            for place, value in zip(places, series.values(), strict=True):
                axes[0].text(value + 0.005, place, f"{value:.1%}", va="center", fontsize=7.5)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].invert_yaxis()
        axes[0].set_xlim(0, 1.08)
        axes[0].set_xlabel(xlabel)
        axes[0].grid(False, axis="y")
        axes[0].margins(y=0.01)
        if len(bars) > 1:
            figure.legend(loc="outside lower center", ncols=min(2, len(bars)))


def plot_photos(path: Path, title: str, clean: "Tensor", attacked: "Tensor", count: int = 6) -> None:
    """Rows of photos, (N, 3, H, W) from 0 to 1: clean, attacked, and the perturbation times ten around grey."""
    count = min(count, len(clean))
    before, after = clean[:count].float(), attacked[:count].float()
    strips = before, after, 0.5 + 10 * (after - before)
    with _panels(path, title, 3, count, (1.6 * count, 5.4)) as (_, axes):
        for number, axis in enumerate(axes):
            axis.imshow(strips[number // count][number % count].clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_axis_off()


def plot_tsne(
    path: Path, title: str, image: np.ndarray, text: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]
) -> None:
    """t-SNE of both modalities together, float (N, d) each: by modality and, given `labels` (N,), by class."""
    points = _tsne(np.concatenate([image, text]))
    modality = np.repeat([0, 1], [len(image), len(text)])
    panels = 1 if labels is None else 2
    with _panels(path, title, 1, panels, (4.4 * panels, 4.6)) as (_, axes):
        order = np.random.default_rng(0).permutation(len(points))  # neither modality hides the other
        colours = np.where(modality == 0, IMAGE_COLOUR, TEXT_COLOUR)
        axes[0].scatter(*points[order].T, c=colours[order], s=9, alpha=0.75, linewidths=0)
        for name, colour in (("image", IMAGE_COLOUR), ("text", TEXT_COLOUR)):
            axes[0].scatter([], [], c=colour, s=22, label=name)
        axes[0].set_title("by modality")
        if labels is not None:
            classes = np.concatenate([labels, labels])
            for number in np.unique(classes):
                name = class_names[number] if number < len(class_names) else f"class {number}"
                members = classes == number
                colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
                axes[1].scatter(*points[members].T, c=colour, s=9, alpha=0.75, linewidths=0, label=name)
            axes[1].set_title("by class")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(True)
            axis.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, fontsize=8, markerscale=1.5, columnspacing=1
            )


def _tsne(points: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.astype(np.float32))


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


@contextmanager
def _panels(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float]
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of rows x columns axes, saved to `path` when the body ends; needs no display, leaves no global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        figure.suptitle(textwrap.fill(title, int(11 * size[0])), fontweight="bold", fontsize=11)
        yield figure, list(axes.flat)
        with write_aside(path) as aside:
            figure.savefig(aside)
