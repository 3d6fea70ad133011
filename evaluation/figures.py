"""What all figures share, and the figure of a record: its ECG, what the network restored, truth and scores (Fig. 3).

Plain arrays go in, a figure comes out, and pack() makes its files; no window opens. Colours are of Okabe and Ito 2008,
"Color universal design"; what differs in colour differs in lightness and in line style, marker or hatch too.
"""
import io
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ecg.arrays import EXCLUDED
from ecg.signals import SAMPLING_RATE

BLACK, BLUE, ORANGE, GREEN, VERMILION, SKY = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
STYLE = {"font.size": 7, "axes.titlesize": 8, "legend.frameon": False, "legend.handlelength": 3.5,
         "axes.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False, "xtick.major.width": 0.5,
         "ytick.major.width": 0.5, "lines.linewidth": 1.1, "lines.markersize": 3.5, "hatch.linewidth": 0.5,
         "pdf.fonttype": 42, "text.parse_math": False}
styled = style.context(("default", STYLE))      # a decorator: matplotlib settings neither come in nor stay changed

PIXELS_PER_MM = 7                       # 178 dpi, whole pixels for the grid
COLUMN_MM, PAGE_MM = 85, 170            # the widths that journals print at
MM_PER_SECOND, MM_PER_UNIT = 25, 10     # of the ECG grid; a unit is a millivolt
MOST_UNITS = 8                          # of a row of leads; what reaches beyond is cut off
RARITIES = {"usual": 0.3, "1 in 10": 1, "1 in 100": 2, "1 in 1,000": 3}     # -log10 of the share of normals
ROWS = 3
LENGTH, SNAP = 1200, 100                # samples: the window shown, and a large square of the grid
MARKED = 1                             # in the truth; 0 is normal, EXCLUDED not annotated
TRACE = {"color": BLACK, "linestyle": "-", "linewidth": 0.8}
RESTORED = {"color": VERMILION, "linestyle": (0, (4, 1.5)), "linewidth": 0.9}
MARKING = {MARKED: {"facecolor": "#DDF0FB", "edgecolor": SKY, "hatch": "////", "linewidth": 0.4},
           EXCLUDED: {"facecolor": "#FFFFFF", "edgecolor": "#777777", "hatch": "xxxxxxxx", "linewidth": 0}}


@dataclass
class Example:
    """A record for draw_record. Arrays are (samples, leads) at 500 Hz; a higher score is more anomalous.

    title: what follows a line break is in small print; unit: "mV", or "normalised"; truth: uint8, 1 marked as abnormal,
    0 normal, EXCLUDED where nobody says; all 0 where there is none. rare: whether scores tell how rare it is among
    normals what differs at this lead and moment of the beat, and restored is what was expected there. measured: what
    stands under the figure, one sentence each.
    """
    title: str
    unit: str
    lead_names: tuple
    signal: np.ndarray
    restored: np.ndarray
    truth: np.ndarray
    scores: np.ndarray
    start_seconds: float = 0.2          # of the first sample, in the record
    rare: bool = False
    measured: tuple = ()


def new_figure(width_mm: float, height_mm: float, **settings) -> Figure:
    """An empty figure of that size on paper, a touch larger, as rounding would cost a pixel."""
    return Figure(figsize=((width_mm + 1e-6) / 25.4, (height_mm + 1e-6) / 25.4), **settings)


@styled
def pack(figure: Figure) -> dict:
    """{"png": its bytes, "pdf": its bytes}, the same for the same figure; empties the figure."""
    packed = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata=metadata, dpi=25.4 * PIXELS_PER_MM)
        packed[kind] = file.getvalue()
    figure.clear()
    return packed


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
def draw_record(example: Example, window: tuple | None = None) -> Figure:
    """A record with its restoration, truth and score map on an ECG grid, 25 mm/s and 10 mm/mV at true size (Fig. 3).

    window: (start, stop) samples, the same for all leads; default marked_window. Leads stand in columns of three, with
    a strip of scores under each: of rare ones from usual to 1 in 1,000 normals, else to the record's 99th percentile.
    """
    start, stop = window or marked_window(example.truth)
    leads = len(example.lead_names)
    rows, columns = min(ROWS, leads), -(-leads // ROWS)
    limits = [row_limits(np.stack([example.signal, example.restored])[:, start:stop, row::ROWS]) for row in range(rows)]
    wide = (stop - start) / SAMPLING_RATE * MM_PER_SECOND
    heights = [round(high - low) * MM_PER_UNIT for low, high, _ in limits]
    foot = 4 * -(-len(example.measured) // 2) + 6 * bool(example.measured)          # two columns below all else
    width, height = max(PAGE_MM, int(np.ceil(13 + columns * (wide + 3)))), 32 + sum(heights) + rows * 10 + foot
    finite = example.scores[np.isfinite(example.scores)]
    top = RARITIES["1 in 1,000"] if example.rare else np.percentile(finite, 99) if finite.size else 0
    colours = ScalarMappable(Normalize(RARITIES["usual"] if example.rare else 0, top if top > 0 else 1), "Greys")
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
    write_around(figure, example, any(cut for *_, cut in limits), foot)
    bar = place(width - 60, 7 + foot, 50, 3)
    figure.colorbar(colours, cax=bar, orientation="horizontal", extend="max").outline.set_linewidth(0.5)
    bar.tick_params(length=2, pad=1.5)
    bar.xaxis.set_major_locator(MaxNLocator(5))
    if example.rare:
        bar.set_xticks(list(RARITIES.values()), list(RARITIES))
    scale = "normals that differ as much" if example.rare else "anomaly score"
    figure.text(1 - 62 / width, (8.5 + foot) / height, scale, ha="right", va="center")
    return figure


def write_around(figure: Figure, example: Example, cut: bool, foot: float):
    """Title, scale, legend and measurements of a record's figure.

    cut: whether traces do not fit; foot: mm at the bottom for the measurements.
    """
    width, height = figure.get_size_inches() * 25.4
    scale = "25 mm/s, 10 mm/mV" if example.unit == "mV" else "25 mm/s; normalised, no mV scale (10 mm a unit)"
    cut_off = f"; traces are cut off at {MOST_UNITS} cm" if cut else ""
    title, _, rest = example.title.partition("\n")
    figure.text(8 / width, 1 - 3 / height, title, va="top", size=9, weight="bold")
    strip = "how rare the difference is in this place" if example.rare else "score"
    strip += " (above), marks (below)" if example.truth.any() else ""
    figure.text(8 / width, 1 - 8 / height, f"{scale}{cut_off}. Strip under a lead: {strip}. {rest}", va="top")
    marks = [Patch(label="marked as abnormal", **MARKING[MARKED]), Patch(label="not annotated", **MARKING[EXCLUDED])]
    lines = [Line2D([], [], label="ECG", **TRACE),
             Line2D([], [], label="expected" if example.rare else "restored", **RESTORED)]
    figure.legend(handles=[*lines, *(marks if example.truth.any() else ())], loc="lower left", ncols=2, borderpad=0,
                  bbox_to_anchor=(8 / width, (2 + foot) / height), borderaxespad=0)
    if example.measured:
        figure.text(8 / width, foot / height, "Most unusual measurements of the median beat and the rhythm, with the "
                    "central 95 % of normals", va="top", weight="bold")
    for place, text in enumerate(example.measured):
        column, row = divmod(place, -(-len(example.measured) // 2))
        figure.text((8 + column * (width - 16) / 2) / width, (foot - 4 - 4 * row) / height, text, va="top")


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
        marks = stretches(example.truth[start:stop, lead] == kind) / SAMPLING_RATE
        spans = [(begin + first, last - first) for first, last in marks]
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


