"""One's own recordings, scored by a trained checkpoint: test.py --record, and tools/score_recordings.py.

Each recording (ecg/recording_files.py says what is read) is cut into windows of 10 s, which are filtered, searched for
R peaks and scored as preprocess.py and test.py do it. record_scores.csv has a row a window: the scores of the network
and the one without it (ckpt/no_network.npz), with their percentiles among the normals of fold 9. record_unusual.csv
names the ten measurements of each window that are most unusual; the most anomalous windows are drawn. However long a
recording is, only those stay in memory, and a few numbers of the others. Not for clinical use.
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloader import valid_beats
from ecg.r_peaks import disagree, find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.recording_files import describe_flat, find_flat, open_recording, windows_of
from ecg.signals import (LEAD_II, LEAD_NAMES, RECORD_LENGTH, SAMPLING_RATE, RecordError, doubt_height, filter_leads,
                         median_height)
from evaluation import files, rival
from evaluation.recording_figures import (PREFIX, Recording, Window, as_records, draw_recording, peaks_of,
                                          show_percentile)
from model import load_checkpoint
from scoring import without_network
from scoring.passes import Scorer
from scoring.percentiles import percentile, read_normals
from scoring.protocols import PROTOCOLS, protocols_for
from utils import PROCESSES, UserError, choose_device, git_commit, pack_csv, require_writable, sha256_of, versions

SCORES_FILE, UNUSUAL_FILE, RESULTS_FILE = f"{PREFIX}scores.csv", f"{PREFIX}unusual.csv", f"{PREFIX}results.json"
NO_NETWORK = rival.NAME.replace(" ", "_")       # in the names of columns
WINDOWS_AT_ONCE = 32                # in memory, 8 MB
MOST_DRAWN = 10                     # windows of a recording, by default
MOST_TOLD = 4                       # unusual measurements that are printed
MOST_PRINTED = 60                   # windows of a recording; of more the most anomalous are printed


@dataclass(frozen=True)
class RecordingSettings:
    """How recordings are read, scored and drawn."""
    record_rate: float | None = None        # Hz, of .csv files that do not state it
    record_unit: str | None = None          # of .csv files that do not state it
    protocols: tuple = tuple(PROTOCOLS)     # names; the last one's scores say which windows are drawn
    mask_ratio: int = 30
    figures: int | None = None              # windows to draw of each recording; None: MOST_DRAWN, 0: none
    device: str = "auto"
    amp: str = "off"


def add_flags(parser):
    """Add the flags of reading recordings to a script's."""
    parser.add_argument("--record_rate", type=float, metavar="HZ", help="sampling rate of .csv files that do not state "
                        "it")
    parser.add_argument("--record_unit", metavar="UNIT", help="mV or uV: the unit of .csv files that do not state it")


def settings_of(arguments, protocols: tuple) -> RecordingSettings:
    """The settings in a script's parsed flags. protocols: names."""
    return RecordingSettings(arguments.record_rate, arguments.record_unit, protocols, arguments.mask_ratio,
                             arguments.figures, arguments.device, arguments.amp)


def prepare_window(start: int, signal: np.ndarray, detectors: set) -> Window:
    """Filter (5000, 12) mV and find its R peaks. start: a sample at 500 Hz."""
    filtered, offset = filter_leads(signal), start / SAMPLING_RATE
    flat = {lead: [(offset + begin, offset + end) for begin, end in spans] for lead, spans in find_flat(signal).items()}
    r_peaks = {"slope": find_r_peaks_by_slope(filtered)}
    if "heartpy" in detectors:
        r_peaks["heartpy"] = find_r_peaks_by_heartpy(filtered[:, LEAD_II])
    return Window(start, filtered.astype(np.float32), r_peaks, describe_flat(flat))


def score_recording(path, scorers: list, fitted: dict, normals: dict, settings: RecordingSettings) -> Recording:
    """Read and score a recording window by window. Raises RecordError and UserError.

    fitted: the rival without a network; normals: {name of a score: those of fold 9's normals}.
    """
    source = open_recording(path, settings.record_rate, settings.record_unit)
    recording, most = Recording(str(path), source.rate), MOST_DRAWN if settings.figures is None else settings.figures
    detectors = {scorer.protocol.detector for scorer in scorers}
    total = source.samples and -(-int(source.samples / source.rate) // (RECORD_LENGTH // SAMPLING_RATE))
    windows = iter(tqdm(windows_of(source), desc=Path(path).name, total=total, unit="window", leave=False))
    while batch := [prepare_window(*window, detectors) for window in itertools.islice(windows, WINDOWS_AT_ONCE)]:
        records = as_records(batch, str(path))
        scores = {scorer.protocol.name: scorer.score(records, peaks_of(batch, scorer)).scores for scorer in scorers}
        for place, window in enumerate(batch):
            of_window = {name: float(values[place]) for name, values in scores.items()}
            window.score = of_window[scorers[-1].protocol.name]
            features = without_network.describe(window.signal, window.r_peaks[rival.DETECTOR])
            of_window[NO_NETWORK] = float(without_network.score(fitted, features[None])[0])
            window.unusual = without_network.unusual(fitted, features)
            recording.unusual += [(str(path), window.start / SAMPLING_RATE, *measured) for measured in window.unusual]
            recording.rows.append(make_row(str(path), window, of_window, normals))
            recording.heights.append(median_height(window.signal[None]))
        recording.drawn = sorted(recording.drawn + batch, key=lambda window: -window.score)[:most]
    recording.notes = [*source.notes, *notes_of(recording)]
    return recording


def make_row(record: str, window: Window, scores: dict, normals: dict) -> dict:
    """A row of record_scores.csv. beats: R peaks by the slope of all leads; a percentile is "" without normals."""
    positions, real = valid_beats(window.r_peaks["slope"])
    row = {"record": record, "start_s": window.start / SAMPLING_RATE,
           "end_s": (window.start + RECORD_LENGTH) / SAMPLING_RATE, "beats": len(window.r_peaks["slope"]),
           "valid_beats": len(positions) if real else 0}
    if "heartpy" in window.r_peaks:
        row["heartpy_beats"] = len(window.r_peaks["heartpy"])
    for name, score in scores.items():
        row[f"{name}_score"] = score
        row[f"{name}_percentile"] = percentile(score, normals[name]) if name in normals else ""
    return row | {"flat": window.flat}


def notes_of(recording: Recording) -> list:
    """What is doubtful about a recording's amplitude and beats, sentences without a full stop."""
    notes, rows = [], recording.rows
    heights = [height for height in recording.heights if height > 0]
    if heights and (doubt := doubt_height(float(np.median(heights)))):
        notes.append(doubt)
    unsure = [row for row in rows if "heartpy_beats" in row and disagree(row["heartpy_beats"], row["beats"])]
    if unsure:
        first = unsure[0]
        notes.append("HeartPy, by which paper finds beats, and the slope of all leads differ by more than a quarter in "
                     f"{len(unsure)} of {len(rows)} windows (at {first['start_s']:g} s {first['heartpy_beats']} "
                     f"against {first['beats']} beats), so the paper score there is doubtful")
    beatless = [f"{row['start_s']:g}" for row in rows if not row["valid_beats"]]
    if beatless:
        notes.append(f"no valid beat in {len(beatless)} of {len(rows)} windows, which are scored on evenly spaced "
                     f"windows instead (from {', '.join(beatless[:10])}{' ...' * (len(beatless) > 10)} s on)")
    return notes


# ---- what is printed

def print_recording(recording: Recording, protocols: list):
    """Print a recording's windows, of many the most anomalous, and what was noticed."""
    rows, last, names = recording.rows, f"{protocols[-1]}_score", [*protocols, NO_NETWORK]
    print(f"\n{recording.path}, {recording.rate:g} Hz, {len(rows)} window{'s' * (len(rows) > 1)}"
          + f", the {MOST_DRAWN} most anomalous" * (len(rows) > MOST_PRINTED))
    print(f"{'window (s)':<18}{'beats':>6}" + "".join(f"{f'{name} score':>18}{'percentile':>12}" for name in names)
          + "  flat leads" * any(row["flat"] for row in rows))
    if len(rows) > MOST_PRINTED:
        rows = sorted(rows, key=lambda row: -row[last])[:MOST_DRAWN]
    for row in rows:
        print(f"{row['start_s']:g}-{row['end_s']:g}".ljust(18) + f"{row['beats']:>6}"
              + "".join(f"{row[f'{name}_score']:>18.4f}{show_percentile(row[f'{name}_percentile']):>12}"
                        for name in names) + f"  {row['flat']}".rstrip())
    start = max(rows, key=lambda row: row[f"{NO_NETWORK}_score"])["start_s"]
    sentences = [rival.tell(measured) for _, at, *measured in recording.unusual if at == start][:MOST_TOLD]
    print(f"most unusual from {start:g} s on: {'; '.join(sentences)}")
    for note in recording.notes:
        print(f"note: {note}")


# ---- all of it

def score_recordings(paths: list, load_path: str, output_dir, settings: RecordingSettings):
    """Score, print, write and draw. Recordings that cannot be scored are named, the others are scored all the same.

    Raises UserError, for such recordings too, at the end.
    """
    if PROCESSES > 1:
        raise UserError("recordings are scored by one process; start the script without torchrun")
    output = Path(output_dir)
    require_writable(output)
    files.require_ours(output, [path.name for path in output.glob(f"{PREFIX}*")], RESULTS_FILE)
    device = choose_device(settings.device, settings.amp)
    model, facts = load_checkpoint(load_path)
    if model.leads != len(LEAD_NAMES):
        raise UserError(f"{load_path} was trained on {model.leads} leads, but recordings have {len(LEAD_NAMES)}; name "
                        "another checkpoint")
    scorers = [Scorer(model.to(device).eval(), protocol, settings.mask_ratio, settings.amp)
               for protocol in protocols_for(model, settings.protocols)]
    protocols = [scorer.protocol.name for scorer in scorers]
    normals, note = read_normals(load_path, facts, settings.mask_ratio)
    fitted, of_normals = rival.load_rival(rival.FITTED_FILE)
    normals[NO_NETWORK] = of_normals
    rows, unusual, contents, about, refused = [], [], {}, [], {}
    for number, path in enumerate(paths, 1):
        try:
            recording = score_recording(path, scorers, fitted, normals, settings)
        except RecordError as error:
            refused[str(path)] = f"{path} cannot be scored: {error}; {error.remedy}"
            if len(paths) > 1:
                print(refused[str(path)], file=sys.stderr)
            continue
        print_recording(recording, protocols)
        rows += recording.rows
        unusual += recording.unusual
        contents |= draw_recording(number, recording, scorers[-1])
        about.append({"record": recording.path, "rate": recording.rate, "windows": len(recording.rows),
                      "notes": recording.notes})
    if rows:
        contents[SCORES_FILE] = pack_csv(list(rows[0]), [list(row.values()) for row in rows])
        contents[UNUSUAL_FILE] = pack_csv(("record", "start_s", *rival.UNUSUAL[1:]), unusual)
        files.write_report(output, contents, {
            "recordings": about, "not_scored": refused, "checkpoint": {"path": str(load_path),
                                                                       "sha256": sha256_of(load_path)},
            "protocols": protocols, "mask_ratio": settings.mask_ratio, "amp": settings.amp, "device": str(device),
            "versions": versions(), "commit": git_commit()}, RESULTS_FILE)
        print("\npercentile: so many percent of the normals of fold 9 score lower")
        print((f"{note}\n" if note else "") + f"written to {output}\nNot for clinical use.")
    if refused:
        raise UserError(next(iter(refused.values())) if len(paths) == 1 else
                        f"{len(refused)} of {len(paths)} recordings were not scored, as is said above: "
                        f"{', '.join(refused)}; mend them, or leave them out")
