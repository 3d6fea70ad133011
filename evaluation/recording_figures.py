"""A recording that was scored, and its figures: the most anomalous windows, and the score over time."""
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ecg.arrays import Records
from ecg.signals import LEAD_NAMES, SAMPLING_RATE
from evaluation import figures
from evaluation.rival import tell
from model import GLOBAL_START
from scoring.passes import Scorer

PREFIX = "record_"                  # of every file that is written
FEW_WINDOWS = 6                     # of which no score over time is drawn
MINUTES, HOURS = 600, 7200          # s, from which on time is told so


@dataclass
class Window:
    """10 s of a recording. start: a sample at 500 Hz; signal: (5000, 12) float32, filtered, mV; r_peaks by detector."""
    start: int
    signal: np.ndarray
    r_peaks: dict
    flat: str               # leads without contact, and their seconds in the recording
    score: float = 0.0      # under the last protocol
    unusual: list = field(default_factory=list)     # of without_network.unusual


@dataclass
class Recording:
    """A recording that was scored. rows: of record_scores.csv; unusual: of record_unusual.csv; drawn: the most
    anomalous Windows; notes: sentences."""
    path: str
    rate: float
    rows: list = field(default_factory=list)
    unusual: list = field(default_factory=list)
    drawn: list = field(default_factory=list)
    heights: list = field(default_factory=list)     # mV that the median lead spans, a number a window
    notes: list = field(default_factory=list)


def as_records(windows: list, name: str) -> Records:
    """Windows as what a Scorer reads."""
    return Records(np.stack([window.signal for window in windows]), name)


def peaks_of(windows: list, scorer: Scorer) -> list:
    """The R peaks of windows by the detector of a scorer's protocol."""
    return [window.r_peaks[scorer.protocol.detector] for window in windows]


def show_percentile(value) -> str:
    """A percentile as text."""
    return "-" if value == "" else f"{value:.1f}"


def brightest(scores: np.ndarray) -> tuple:
    """The (start, stop) to draw: the 2.4 s with the highest scores of a map (4800, leads), starting on a 0.2 s line."""
    total = np.r_[0, np.cumsum(scores.sum(axis=1))]
    starts = np.arange(0, len(scores) - figures.LENGTH + 1, figures.SNAP)
    start = int(starts[np.argmax(total[starts + figures.LENGTH] - total[starts])])
    return start, start + figures.LENGTH


def draw_recording(number: int, recording: Recording, scorer: Scorer) -> dict:
    """The figures of a recording, {file name: bytes}: its most anomalous windows, and the scores of many over time."""
    stem = f"{PREFIX}{number}-{re.sub(r'[^A-Za-z0-9_-]', '_', Path(recording.path).stem)[:60]}"
    name, contents = scorer.protocol.name, {}
    for window in tqdm(recording.drawn, desc="figures", leave=False):
        records, r_peaks = as_records([window], recording.path), peaks_of([window], scorer)
        of_map = scorer.score(records, r_peaks, with_maps=True).maps[0]                     # (4800, 12)
        signal, restored = (part[0] for part in scorer.restore(records, r_peaks, [0]))
        row = next(row for row in recording.rows if row["start_s"] == window.start / SAMPLING_RATE)
        title = (f"{Path(recording.path).name[:60]}, {row['start_s']:g}-{row['end_s']:g} s\n"
                 f"Protocol {name}: score {row[f'{name}_score']:.4g}, percentile "
                 f"{show_percentile(row[f'{name}_percentile'])} (no truth)."
                 + f" Flat: {row['flat']} s" * bool(row["flat"]))
        first = (window.start + GLOBAL_START) / SAMPLING_RATE
        example = figures.Example(title, "mV", LEAD_NAMES, signal, restored, np.zeros(signal.shape, np.uint8), of_map,
                                  first, measured=tuple(map(tell, window.unusual)))
        packed = figures.pack(figures.draw_record(example, brightest(of_map)))
        contents |= {f"{stem}_{row['start_s']:g}s.{kind}": content for kind, content in packed.items()}
    if len(recording.rows) > FEW_WINDOWS and recording.drawn:
        drawn = draw_scores_over_time(Path(recording.path).name[:60], [row["start_s"] for row in recording.rows],
                                             {name: [row[f"{name}_score"] for row in recording.rows]})
        contents |= {f"{stem}_scores.{kind}": content for kind, content in figures.pack(drawn).items()}
    return contents


@figures.styled
def draw_scores_over_time(title: str, starts: list, scores: dict) -> Figure:
    """The scores of a long recording's windows. starts: s; scores: {protocol: one a window}."""
    unit, length = ("h", 3600) if starts[-1] >= HOURS else ("min", 60) if starts[-1] >= MINUTES else ("s", 1)
    figure = figures.new_figure(figures.PAGE_MM, 55, layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(scores.items(), (figures.BLUE, figures.ORANGE)):
        axes.plot(np.array(starts) / length, values, color=colour, linewidth=0.6, label=name)
    axes.set(xlabel=f"start of the window ({unit})", ylabel=f"score, {', '.join(scores)}", title=title, yscale="log",
             xlim=(0, starts[-1] / length))
    return figure
