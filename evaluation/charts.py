"""The charts of the report: curves, histograms, AUROCs by group, learning curves. Arrays go in, a figure comes out."""
import textwrap
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from evaluation.figures import BLACK, BLUE, COLUMN_MM, GREEN, ORANGE, PAGE_MM, VERMILION, new_figure, styled

SERIES = (                              # colour, line style, marker; the first four differ in lightness too
    (BLACK, "-", "o"), (ORANGE, "--", "s"), (BLUE, "-.", "^"), (GREEN, ":", "D"),
    (VERMILION, (0, (7, 1, 1, 1, 1, 1)), "v"), (BLACK, (0, (1, 2)), "P"), (ORANGE, (0, (6, 2)), "X"),
    (BLUE, (0, (3, 1, 1, 1)), "<"))
CLASSES = (("normal", {"edgecolor": BLUE, "linestyle": "-", "hatch": None}),
           ("abnormal", {"edgecolor": ORANGE, "linestyle": "--", "hatch": "////"}))
THRESHOLDS = {"youden": ("threshold: largest Youden index", "--"),
              "sensitivity_90": ("threshold: sensitivity 90 %", ":")}


def estimate(of: dict | None) -> np.ndarray:
    """Value, low and high of {"value", "low", "high"}; NaN for what is None or absent."""
    return np.array([number((of or {}).get(key)) for key in ("value", "low", "high")])


def number(value) -> float:
    """A float; NaN where a table holds nothing."""
    return float("nan") if value is None or value == "" else float(value)


def in_words(of: dict | None) -> str:
    """An estimate as text."""
    value, low, high = estimate(of)
    interval = f" [{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else ""
    return f"{value:.3f}{interval}" if np.isfinite(value) else "not defined"


@styled
def draw_detection_curves(curves: dict, prevalence: float) -> Figure:
    """detection_curves: ROC and precision-recall by series, with bands of confidence and the levels of chance.

    curves: {name: of metrics.curves, with "auroc" and "average_precision": {"value", "low", "high"}}; prevalence:
    share of abnormal records.
    """
    height = 91 + 4 * len(curves)
    figure = new_figure(PAGE_MM, height)
    panels = (("fpr", "tpr", "auroc", "AUROC", "1 - specificity", "sensitivity"),
              ("recall", "precision", "average_precision", "average precision", "recall (sensitivity)", "precision"))
    for left, (across, up, area, area_name, across_name, up_name) in zip((13, 98), panels):
        axes = figure.add_axes((left / PAGE_MM, 1 - 69 / height, 66 / PAGE_MM, 66 / height))
        for (name, curve), (colour, line, _) in zip(curves.items(), cycle(SERIES)):
            axes.plot(curve[across], curve[up], color=colour, linestyle=line, zorder=3,
                      label=f"{name}: {in_words(curve.get(area))}")
            edges = curve[f"{up}_low"], curve[f"{up}_high"]
            axes.fill_between(curve[across], *edges, color=colour, alpha=0.15, linewidth=0)
            for edge in edges:
                axes.plot(curve[across], edge, color=colour, linestyle=line, linewidth=0.4)
        chance = (0, 1) if area == "auroc" else (prevalence, prevalence)
        axes.plot((0, 1), chance, color="#777777", linewidth=0.7, label="chance: 0.500" if area == "auroc" else
                  f"chance (prevalence): {prevalence:.3f}")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=across_name, ylabel=up_name)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), title=f"{area_name} [95 % interval]", alignment="left")
    return figure


@styled
def draw_score_histograms(scores: dict, labels: np.ndarray, thresholds: dict) -> Figure:
    """score_histograms: normal and abnormal records by score, a panel per name.

    scores: {name: (N,)}; labels: (N,), 1 = abnormal; thresholds: {name: {"youden": x, "sensitivity_90": x} or None}.
    The axis is logarithmic where all scores are above 0.
    """
    columns = min(2, len(scores))
    rows = -(-len(scores) // columns)
    figure = new_figure(COLUMN_MM * columns, 50 * rows + (10 if columns == 2 else 18), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, values) in zip(panels, scores.items()):
        edges, logarithmic = bin_edges(np.asarray(values, dtype=np.float64))
        for label, (_, look) in enumerate(CLASSES):
            chosen = np.asarray(values)[np.asarray(labels) == label]
            shares = np.histogram(chosen, edges)[0] * 100 / max(1, len(chosen))
            axes.stairs(shares, edges, fill=True, facecolor=look["edgecolor"], alpha=0.25, linewidth=0)
            axes.stairs(shares, edges, **look)
        for key, value in (thresholds.get(name) or {}).items():
            if np.isfinite(number(value)):
                axes.axvline(value, color=BLACK, linestyle=THRESHOLDS[key][1], linewidth=0.9)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(4) if edges[-1] < 10 * edges[0] else LogLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.minorticks_off()
        axes.set(title=name, xlabel="anomaly score", ylabel="records of the class (%)", xlim=edges[[0, -1]])
    for axes in panels[len(scores):]:
        axes.set_visible(False)
    handles = [Patch(facecolor=look["edgecolor"] + "40", label=kind, **look) for kind, look in CLASSES]
    handles += [Line2D([], [], color=BLACK, linestyle=line, linewidth=0.9, label=label)
                for key, (label, line) in THRESHOLDS.items() if any(key in (of or {}) for of in thresholds.values())]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns)
    return figure


def bin_edges(values: np.ndarray) -> tuple:
    """(edges (41,), whether they grow by factors): of bins from the least to the largest of values (N,)."""
    low, high = values.min(), values.max()
    logarithmic = bool(low > 0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):       # constant scores
        low, high = (low / 2, high * 2) if logarithmic else (low - 1, high + 1)
    return (np.geomspace if logarithmic else np.linspace)(low, high, 41), logarithmic


@styled
def draw_group_aurocs(groups: dict, title: str) -> Figure:
    """AUROCs by group with their intervals, sorted by the first series.

    groups: {label: {series: {"value", "low", "high"}}}; a value without an interval is a hollow marker.
    """
    series = list(dict.fromkeys(key for group in groups.values() for key in group))
    table = {textwrap.fill(label, 48): np.array([estimate(group.get(key)) for key in series])
             for label, group in groups.items()}
    order = sorted(table, key=lambda label: np.nan_to_num(table[label][0, 0], nan=-1))
    pitch = max(2.2 * len(series) + 1, 3.4 * max(label.count("\n") + 1 for label in order))
    figure = new_figure(PAGE_MM, 26 + 4 * -(-len(series) // 3) + pitch * len(order), layout="constrained")
    axes = figure.subplots()
    for place, (key, (colour, _, marker)) in enumerate(zip(series, cycle(SERIES))):
        shift = (place - (len(series) - 1) / 2) * 2.2 / pitch
        for row, label in enumerate(order):
            value, low, high = table[label][place]
            known = np.isfinite([low, high]).all()
            if known:
                axes.plot((low, high), (row - shift,) * 2, color=colour, linewidth=0.9, clip_on=False)
            axes.plot(value, row - shift, marker, color=colour, markerfacecolor=colour if known else "white",
                      clip_on=False, zorder=3)
        axes.plot([], [], marker, color=colour, linestyle="-", linewidth=0.9, label=key)
    axes.axvline(0.5, color="#777777", linewidth=0.7, linestyle="--", label="chance")
    least = np.nanmin(np.stack(list(table.values())), initial=0.3)
    axes.set(xlim=(least, 1), ylim=(-0.7, len(order) - 0.3), xlabel="AUROC with 95 % interval (hollow: none)")
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="#E5E5E5", linewidth=0.5)
    axes.set_axisbelow(True)
    figure.suptitle(title, size=8)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def draw_learning_curves(history: list) -> Figure:
    """learning_curves: the loss and its terms by epoch, and the AUROC of validation and test where there is one.

    history: a dict per epoch with "epoch", "loss", "loss_global", "loss_local", "loss_trend", "val_auroc",
    "test_auroc", an AUROC None or "" where it was not measured.
    """
    def column(key):
        return np.array([number(row.get(key)) for row in history])

    epochs = column("epoch")
    aurocs = {label: column(key) for label, key in (("validation", "val_auroc"), ("test", "test_auroc"))
              if np.isfinite(column(key)).any()}
    figure = new_figure(COLUMN_MM, 115 if aurocs else 65, layout="constrained")
    panels = figure.subplots(1 + bool(aurocs), 1, sharex=True, squeeze=False).ravel()
    terms = {"loss, the sum": "loss", "global": "loss_global", "local": "loss_local", "trend": "loss_trend"}
    for axes, lines in zip(panels, ({label: column(key) for label, key in terms.items()}, aurocs)):
        for (label, values), (colour, line, marker) in zip(lines.items(), cycle(SERIES)):
            known = np.isfinite(values)
            axes.plot(epochs[known], values[known], color=colour, linestyle=line, marker=marker, label=label,
                      markevery=max(1, known.sum() // 12))
    panels[0].set(ylabel="training loss")
    panels[-1].set(xlabel="epoch", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if aurocs:
        label, values = next(iter(aurocs.items()))          # validation where there is one
        best = np.nanargmax(values)
        panels[1].plot(epochs[best], values[best], "*", color=VERMILION, markersize=8, markeredgecolor=BLACK,
                       markeredgewidth=0.6, zorder=4, label=f"best {label}: {values[best]:.3f}, epoch {epochs[best]:g}")
        panels[1].set(ylabel="detection AUROC\nwhile training")
    for axes, legend_columns in zip(panels, (2, 1)):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=legend_columns)
    return figure
