"""The figures of the report, PNG and PDF at true size. Plain arrays go in, files come out; no window opens.

Series differ in colour (Okabe and Ito 2008, "Color universal design"), in lightness and in line style, marker or hatch,
so that they stay apart in grey print and for colour-blind readers.
"""
import textwrap
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from ecg.arrays import EXCLUDED
from ecg.signals import SAMPLING_RATE
from utils import write_atomically

BLACK, BLUE, ORANGE, GREEN, VERMILION, SKY = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
SERIES = (                              # colour, line style, marker; the first four differ in lightness too
    (BLACK, "-", "o"), (ORANGE, "--", "s"), (BLUE, "-.", "^"), (GREEN, ":", "D"),
    (VERMILION, (0, (7, 1, 1, 1, 1, 1)), "v"), (BLACK, (0, (1, 2)), "P"), (ORANGE, (0, (6, 2)), "X"),
    (BLUE, (0, (3, 1, 1, 1)), "<"))
CLASSES = (("normal", {"edgecolor": BLUE, "linestyle": "-", "hatch": None}),
           ("abnormal", {"edgecolor": ORANGE, "linestyle": "--", "hatch": "////"}))
THRESHOLDS = {"youden": ("threshold: largest Youden index", "--"),
              "sensitivity_90": ("threshold: sensitivity 90 %", ":")}
STYLE = {"font.size": 7, "axes.titlesize": 8, "legend.frameon": False, "legend.handlelength": 3.5,
         "axes.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "xtick.major.width": 0.5,
         "ytick.major.width": 0.5, "lines.linewidth": 1.1, "lines.markersize": 3.5, "hatch.linewidth": 0.5,
         "pdf.fonttype": 42, "text.parse_math": False}
styled = style.context(("default", STYLE))      # a decorator: matplotlib settings neither come in nor stay changed

PATTERNS = tuple(f"{name}.{kind}" for kind in ("png", "pdf") for name in (
    "localization_*", "detection_curves", "score_histograms", "auroc_by_*", "learning_curves"))     # all that is drawn
PIXELS_PER_MM = 7                       # 178 dpi, whole pixels for the grid
COLUMN_MM, PAGE_MM = 85, 170            # the widths that journals print at
MM_PER_SECOND, MM_PER_UNIT = 25, 10     # of the ECG grid; a unit is a millivolt
MOST_UNITS = 8                          # of a row of leads; what reaches beyond is cut off
ROWS = 3
LENGTH, SNAP = 1200, 100                # samples: the window shown, and a large square of the grid
MARKED = 1                             # in the truth; 0 is normal, EXCLUDED not annotated
TRACE = {"color": BLACK, "linestyle": "-", "linewidth": 0.8}
RESTORED = {"color": VERMILION, "linestyle": (0, (4, 1.5)), "linewidth": 0.9}
MARKING = {MARKED: {"facecolor": "#DDF0FB", "edgecolor": SKY, "hatch": "////", "linewidth": 0.4},
           EXCLUDED: {"facecolor": "#FFFFFF", "edgecolor": "#777777", "hatch": "xxxxxxxx", "linewidth": 0}}


@dataclass
class Example:
    """A record for draw_localization. Arrays are (samples, leads) at 500 Hz; a higher score is more anomalous.

    title: what follows a line break is in small print; unit: "mV", or "normalised"; truth: uint8, 1 marked as abnormal,
    0 normal, EXCLUDED where nobody says; all 0 where there is none.
    """
    title: str
    unit: str
    lead_names: tuple
    signal: np.ndarray
    restored: np.ndarray
    truth: np.ndarray
    scores: np.ndarray
    start_seconds: float = 0.2          # of the first sample, in the record


def new_figure(width_mm: float, height_mm: float, **settings) -> Figure:
    """An empty figure of that size on paper, a touch larger, as rounding would cost a pixel."""
    return Figure(figsize=((width_mm + 1e-6) / 25.4, (height_mm + 1e-6) / 25.4), **settings)


@styled
def save_figure(figure: Figure, output: Path, name: str):
    """Write output/name.png and output/name.pdf, the same bytes for the same figure, and empty it. Raises UserError."""
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        write_atomically(Path(output) / f"{name}.{kind}", lambda file, kind=kind, metadata=metadata: figure.savefig(
            file, format=kind, metadata=metadata, dpi=25.4 * PIXELS_PER_MM))
    figure.clear()


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


def marked_window(truth: np.ndarray) -> tuple:
    """The 2.4 s (start, stop) with the most marked points of truth (samples, leads), starting on a 0.2 s line.

    Of equals the one with the most annotated points, then the first.
    """
    starts = np.arange(0, max(1, len(truth) - LENGTH + 1), SNAP)
    stops = np.minimum(starts + LENGTH, len(truth))
    marked, annotated = (np.r_[0, np.cumsum(points.sum(axis=1))] for points in (truth == MARKED, truth != EXCLUDED))
    best = np.lexsort((starts, annotated[starts] - annotated[stops], marked[starts] - marked[stops]))[0]
    return int(starts[best]), int(stops[best])


def row_limits(values: np.ndarray) -> tuple:
    """(low, high, whether cut): whole units apart and on half units, so that all values of a row of leads fit."""
    finite = values[np.isfinite(values)]
    least, most = (finite.min() - 0.05, finite.max() + 0.05) if finite.size else (0.0, 0.0)
    low = np.floor(2 * least) / 2
    height = max(2, np.ceil(most - low))
    if height > MOST_UNITS:
        low = np.floor(np.median(finite)) - MOST_UNITS / 2
        return low, low + MOST_UNITS, True
    low -= np.floor(low + height - most) / 2                # as much room above as below
    return low, low + height, False


def stretches(where: np.ndarray) -> np.ndarray:
    """(K, 2) first and end indices of the runs in which where (N,) is true."""
    return np.flatnonzero(np.diff(np.r_[False, where, False].astype(np.int8))).reshape(-1, 2)


@styled
def draw_localization(example: Example, output: Path, name: str, window: tuple | None = None):
    """A record with its restoration, truth and score map on an ECG grid, 25 mm/s and 10 mm/mV at true size (Fig. 3).

    window: (start, stop) samples, the same for all leads; default marked_window. Leads stand in columns of three, with
    a strip of scores under each: 0, or the 1st percentile where it is lower, to the 99th of the whole record. Raises
    UserError where nothing can be written.
    """
    start, stop = window or marked_window(example.truth)
    leads = len(example.lead_names)
    rows, columns = min(ROWS, leads), -(-leads // ROWS)
    limits = [row_limits(np.stack([example.signal, example.restored])[:, start:stop, row::ROWS]) for row in range(rows)]
    wide = (stop - start) / SAMPLING_RATE * MM_PER_SECOND
    heights = [round(high - low) * MM_PER_UNIT for low, high, _ in limits]
    width, height = max(PAGE_MM, int(np.ceil(13 + columns * (wide + 3)))), 32 + sum(heights) + rows * 10
    finite = example.scores[np.isfinite(example.scores)]
    low, top = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    low = min(low, 0)                               # errors begin at 0, calibrated scores anywhere
    colours = ScalarMappable(Normalize(low, top if top > low else low + 1), "Greys")
    figure = new_figure(width, height)

    def place(left, bottom, wide, high):
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    for lead in range(leads):
        column, row = divmod(lead, ROWS)
        left, bottom = 8 + column * (wide + 3), height - 11 - sum(heights[:row + 1]) - 10 * row - 5
        pair = place(left, bottom, wide, heights[row]), place(left, bottom - 5, wide, 4.2)
        draw_lead(*pair, example, lead, (start, stop), limits[row][:2], colours)
        if row == rows - 1 or lead == leads - 1:
            pair[1].tick_params(bottom=True, labelbottom=True, length=2, pad=1.5)
            pair[1].set_xlabel("time (s)", labelpad=1)
    scale = "25 mm/s, 10 mm/mV" if example.unit == "mV" else "25 mm/s; normalised, no mV scale (10 mm a unit)"
    cut = f"; traces are cut off at {MOST_UNITS} cm" if any(cut for *_, cut in limits) else ""
    title, _, rest = example.title.partition("\n")
    figure.text(8 / width, 1 - 3 / height, title, va="top", size=9, weight="bold")
    strip = "score above, marks below" if example.truth.any() else "score"
    figure.text(8 / width, 1 - 8 / height, f"{scale}{cut}. Strip under a lead: {strip}. {rest}", va="top")
    marks = [Patch(label="marked as abnormal", **MARKING[MARKED]), Patch(label="not annotated", **MARKING[EXCLUDED])]
    figure.legend(handles=[Line2D([], [], label="ECG", **TRACE), Line2D([], [], label="restored", **RESTORED),
                           *(marks if example.truth.any() else ())],
                  loc="lower left", bbox_to_anchor=(8 / width, 2 / height), ncols=2, borderpad=0, borderaxespad=0)
    bar = place(width - 60, 7, 50, 3)
    beyond = "max" if low == 0 else "both"
    figure.colorbar(colours, cax=bar, orientation="horizontal", extend=beyond).outline.set_linewidth(0.5)
    bar.tick_params(length=2, pad=1.5)
    bar.xaxis.set_major_locator(MaxNLocator(5))
    figure.text(1 - 62 / width, 8.5 / height, "anomaly score", ha="right", va="center")
    save_figure(figure, output, name)


def draw_lead(axes, strip, example: Example, lead: int, window: tuple, limits: tuple, colours: ScalarMappable):
    """A lead on its grid, and below it the strip of its scores over a bar of its truth."""
    start, stop = window
    begin, end = (example.start_seconds + sample / SAMPLING_RATE for sample in window)
    time = example.start_seconds + np.arange(start, stop) / SAMPLING_RATE
    low, high = limits
    for millimetres, colour, width in ((1, "#F2DFDF", 0.3), (5, "#DDBBBB", 0.6)):
        lines = {"color": colour, "linewidth": width, "zorder": 0}
        axes.vlines(np.arange(begin, end + 1e-6, millimetres / MM_PER_SECOND), low, high, **lines)
        axes.hlines(np.arange(low, high + 1e-6, millimetres / MM_PER_UNIT), begin, end, **lines)
    axes.plot(time, example.signal[start:stop, lead], **TRACE)
    axes.plot(time, example.restored[start:stop, lead], **RESTORED)
    strip.imshow(example.scores[None, start:stop, lead], cmap=colours.cmap, norm=colours.norm, aspect="auto",
                 extent=(begin, end, 0, 1))
    strip.axhline(0, color=BLACK, linewidth=0.4)
    for kind, look in MARKING.items():
        found = stretches(example.truth[start:stop, lead] == kind) / SAMPLING_RATE
        spans = [(begin + first, last - first) for first, last in found]
        strip.broken_barh(spans, (-0.5, 0.5), zorder=0.5, **look)
        if kind == MARKED:
            axes.broken_barh(spans, (low, high - low), zorder=0.5, **look)
    axes.set(xlim=(begin, end), ylim=limits, xticks=[], yticks=[])
    strip.set(xlim=(begin, end), ylim=(-0.5, 1), yticks=[])
    strip.set_xticks(ticks := np.arange(begin, end - 0.2, 0.4), [f"{tick:.2f}" for tick in ticks])
    strip.tick_params(bottom=False, labelbottom=False)
    axes.set_title(example.lead_names[lead], loc="left", weight="bold", pad=1.5)
    for box in (axes, strip):
        box.spines[:].set(visible=True, linewidth=0.4)


@styled
def draw_detection_curves(curves: dict, output: Path, prevalence: float):
    """detection_curves: ROC and precision-recall by series, with bands of confidence and the levels of chance.

    curves: {name: {"fpr", "tpr", "tpr_low", "tpr_high", "recall", "precision", "precision_low", "precision_high":
    (K,), "auroc", "average_precision": {"value", "low", "high"}}}, a band may be None; prevalence: share of abnormal
    records. Raises UserError where nothing can be written.
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
            edges = [curve.get(f"{up}_{edge}") for edge in ("low", "high")]
            if all(edge is not None for edge in edges):
                axes.fill_between(curve[across], *edges, color=colour, alpha=0.15, linewidth=0)
                for edge in edges:
                    axes.plot(curve[across], edge, color=colour, linestyle=line, linewidth=0.4)
        chance = (0, 1) if area == "auroc" else (prevalence, prevalence)
        axes.plot((0, 1), chance, color="#777777", linewidth=0.7, label="chance: 0.500" if area == "auroc" else
                  f"chance (prevalence): {prevalence:.3f}")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=across_name, ylabel=up_name)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), title=f"{area_name} [95 % interval]", alignment="left")
    save_figure(figure, output, "detection_curves")


@styled
def draw_score_histograms(scores: dict, labels: np.ndarray, output: Path, thresholds: dict):
    """score_histograms: normal and abnormal records by score, a panel per name.

    scores: {name: (N,)}; labels: (N,), 1 = abnormal; thresholds: {name: {"youden": x, "sensitivity_90": x} or None}.
    The axis is logarithmic where all scores are above 0. Raises UserError where nothing can be written.
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
            factor = edges[-1] / edges[0]
            subs = (1, 2, 5) if factor < 1e3 else (1,)
            axes.xaxis.set_major_locator(MaxNLocator(4) if factor < 10 else LogLocator(subs=subs))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.minorticks_off()
        axes.set(title=name, xlabel="anomaly score", ylabel="records of the class (%)", xlim=edges[[0, -1]])
    for axes in panels[len(scores):]:
        axes.set_visible(False)
    handles = [Patch(facecolor=look["edgecolor"] + "40", label=kind, **look) for kind, look in CLASSES]
    handles += [Line2D([], [], color=BLACK, linestyle=line, linewidth=0.9, label=label)
                for key, (label, line) in THRESHOLDS.items() if any(key in (of or {}) for of in thresholds.values())]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns)
    save_figure(figure, output, "score_histograms")


def bin_edges(values: np.ndarray) -> tuple:
    """(edges (41,), whether they grow by factors): of bins from the least to the largest of values (N,)."""
    low, high = values.min(), values.max()
    logarithmic = bool(low > 0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):       # constant scores
        low, high = (low / 2, high * 2) if logarithmic else (low - 1, high + 1)
    return (np.geomspace if logarithmic else np.linspace)(low, high, 41), logarithmic


@styled
def draw_group_aurocs(groups: dict, output: Path, name: str, title: str):
    """AUROCs by group with their intervals, sorted by the first series.

    groups: {label: {series: {"value", "low", "high"}}}; a value without an interval is a hollow marker. Raises
    UserError where nothing can be written.
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
    save_figure(figure, output, name)


@styled
def draw_learning_curves(history: list, output: Path):
    """learning_curves: the loss and its terms by epoch, and the AUROC of validation and test where there is one.

    history: a dict per epoch with "epoch", "loss", "loss_global", "loss_local", "loss_trend", "val_auroc",
    "test_auroc", an AUROC None or "" where it was not measured. Raises UserError where nothing can be written.
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
        panels[1].set(ylabel="detection AUROC")
    for axes, legend_columns in zip(panels, (2, 1)):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=legend_columns)
    save_figure(figure, output, "learning_curves")
