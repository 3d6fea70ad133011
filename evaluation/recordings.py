"""One's own recordings, scored by a trained checkpoint: test.py --record PATH [PATH ...].

Each recording (recording_files.py says what is read) is cut into windows of 10 s, which are filtered, searched for R
peaks and scored as preprocess.py and test.py do it. Of each window there is a row in record_scores.csv, with the
percentile of its score among the normals of fold 9 (percentiles.py), and a figure. Not for clinical use.
"""
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import calibration
from evaluation import figures
import parallel
from scoring import percentiles
from scoring import passes
from dataloader import crop_global, normalize_records, valid_beats
from model import GLOBAL_START, load_checkpoint
from ecg.recording_files import read_recording
from ecg.signals import LEAD_II, LEAD_NAMES, RECORD_LENGTH, SAMPLING_RATE, filter_leads, find_r_peaks
from utils import UserError, choose_device, write_atomically

SCORES_FILE = "record_scores.csv"


def add_flags(parser):
    """Add --record and --record_rate to the flags of test.py."""
    group = parser.add_argument_group("recordings of one's own")
    group.add_argument("--record", nargs="+", metavar="PATH", help="score these instead of the test set: WFDB records "
                       "of twelve leads, or .csv files as recording_files.py describes them; draws each 10 s of them")
    group.add_argument("--record_rate", type=float, metavar="HZ", help="sampling rate of .csv files that do not say it")


@dataclass
class Window:
    """10 s of a recording. name: for files; start: a sample at 500 Hz; signal: (5000, 12) float32, filtered, mV."""
    record: str
    name: str
    start: int
    signal: np.ndarray
    r_peaks: np.ndarray

    def span(self) -> str:
        """Its first and last second in the recording."""
        return f"{seconds(self.start)}-{seconds(self.start + RECORD_LENGTH)}"

    def beats(self) -> int:
        """How many beats are scored; 0 where it is evenly spaced windows, as none is valid."""
        positions, real = valid_beats(self.r_peaks)
        return len(positions) if real else 0


def seconds(sample: int) -> str:
    """The time of a sample at 500 Hz, exactly."""
    return f"{sample / SAMPLING_RATE:.3f}".rstrip("0").rstrip(".")


def window_starts(samples: int) -> list:
    """Where the windows of a recording (at 500 Hz, 10 s or more) begin: one after the other, the last at its end.

    So the last two overlap where the length is not a multiple of 10 s, and no sample is left out.
    """
    starts = list(range(0, samples - RECORD_LENGTH + 1, RECORD_LENGTH))
    return starts + [samples - RECORD_LENGTH] * (samples % RECORD_LENGTH > 0)


def cut_windows(number: int, path, record_rate: float | None) -> list:
    """The Windows of a recording, the number-th that was named. Raises UserError."""
    signal, windows = read_recording(path, record_rate), []
    stem = re.sub(r"[^\w-]", "_", Path(path).stem)[:60]
    for start in window_starts(len(signal)):
        filtered = filter_leads(signal[start:start + RECORD_LENGTH])
        windows.append(Window(str(path), f"record_{number}-{stem}_{seconds(start)}s", start,
                              filtered.astype(np.float32), find_r_peaks(filtered[:, LEAD_II])))
    return windows


def score_recordings(arguments):
    """test.py --record: score, print, write and draw. arguments: of test.py. Raises UserError."""
    if len(arguments.load_path) > 1 or not arguments.load_model:
        raise UserError("--record needs one trained network; name one checkpoint with --load_path, and leave out "
                        "--load_model 0")
    device, path = choose_device(arguments.device), arguments.load_path[0]
    parallel.start(device)
    model, facts = load_checkpoint(path)
    if model.leads != len(LEAD_NAMES):
        raise UserError(f"{path} was trained on {model.leads} leads, but --record reads {len(LEAD_NAMES)}; name "
                        "another checkpoint")
    windows = [window for number, one in enumerate(arguments.record, 1)
               for window in cut_windows(number, one, arguments.record_rate)]
    fitted = percentiles.read_calibration(path, facts, arguments.mask_ratio, model.leads, arguments.protocol)
    protocols = percentiles.choose_protocols(arguments.protocol, model, fitted)
    scores, maps = score_windows(model.to(device).eval(), windows, protocols, fitted, arguments, device)
    if parallel.RANK == 0:
        normals, note = percentiles.read_normals(path, facts, arguments.mask_ratio)
        rows = make_rows(windows, scores, normals)
        write_atomically(Path(arguments.output_dir) / SCORES_FILE, lambda file: file.write(pack_rows(rows)))
        print_rows(rows, windows, protocols, note)
        draw_windows(model, windows, rows, maps, protocols[-1], arguments, device)
        print(f"written to {arguments.output_dir}\nNot for clinical use.")
    parallel.stop()


def score_windows(model, windows: list, protocols: tuple, fitted: dict | None, arguments, device) -> tuple:
    """({protocol: scores (windows,)}, maps (windows, 4800, 12) under the last of the protocols).

    fitted: the calibration, where "calibrated" is among the protocols. Scored is what test.py scores, for "paper" the
    signal in mV; the maps under "paper" are of the normalised signal, as they are in the localization benchmark.
    """
    in_millivolts, r_peaks = np.stack([window.signal for window in windows]), [window.r_peaks for window in windows]
    found = {}

    def score(signals, passes, with_maps):
        return passes.score_split(model, torch.from_numpy(signals).to(device), r_peaks, passes, arguments.mask_ratio,
                                   device, "recordings", with_maps=with_maps, amp=arguments.amp,
                                   with_profiles="calibrated" in protocols)
    for passes in dict.fromkeys(passes.PASSES[protocol] for protocol in protocols):
        found[passes] = score(in_millivolts, passes, passes == "clean")
    scores = {protocol: found[passes.PASSES[protocol]].scores for protocol in protocols}
    if protocols[-1] == "paper":
        normalised = normalize_records(torch.from_numpy(in_millivolts)).numpy()
        return scores, score(normalised, "paper", True).maps
    maps = found["clean"].maps
    if "calibrated" in protocols:
        scores["calibrated"] = calibration.score_records(fitted, calibration.features(found["clean"].profiles,
                                                                                      in_millivolts))
        maps = calibration.unusual_maps(fitted, maps, passes.beat_phases(r_peaks), scores["calibrated"])
    return scores, maps


def make_rows(windows: list, scores: dict, normals: dict) -> list:
    """The rows of record_scores.csv, a dict a window. Without scores in normals a percentile is ""."""
    rows = []
    for place, window in enumerate(windows):
        row = {"record": window.record, "start_s": window.start / SAMPLING_RATE,
               "end_s": (window.start + RECORD_LENGTH) / SAMPLING_RATE, "beats": window.beats()}
        for protocol, found in scores.items():
            row[f"{protocol}_score"] = float(found[place])
            row[f"{protocol}_percentile"] = (percentiles.percentile(found[place], normals[protocol])
                                             if protocol in normals else "")
        rows.append(row)
    return rows


def pack_rows(rows: list) -> bytes:
    """record_scores.csv, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def show_percentile(value) -> str:
    """A percentile as text."""
    return "-" if value == "" else f"{value:.1f}"


def print_rows(rows: list, windows: list, protocols: tuple, note: str):
    """Print the table, and what limits it. note: of percentiles.read_normals."""
    width = max(10, *(len(row["record"]) for row in rows)) + 2
    print(f"\n{'record':<{width}}{'window (s)':<16}{'beats':>6}"
          + "".join(f"{f'{protocol} score':>18}{'percentile':>12}" for protocol in protocols))
    for row, window in zip(rows, windows):
        print(f"{row['record']:<{width}}{window.span():<16}{row['beats']:>6}"
              + "".join(f"{row[f'{protocol}_score']:>18.4f}{show_percentile(row[f'{protocol}_percentile']):>12}"
                        for protocol in protocols))
    if any(rows[0][f"{protocol}_percentile"] != "" for protocol in protocols):
        print("percentile: so many percent of the normals of fold 9 score lower")
    if note:
        print(note)
    beatless = [f"{window.record} {window.span()} s" for window in windows if not window.beats()]
    if beatless:
        print(f"no valid beat in {len(beatless)} of {len(windows)} windows, which are scored on evenly spaced windows "
              f"instead: {', '.join(beatless)}")


def brightest(scores: np.ndarray) -> tuple:
    """The (start, stop) to draw: the 2.4 s with the highest scores of a map (4800, leads), starting on a 0.2 s line."""
    total = np.r_[0, np.cumsum(scores.sum(axis=1))]
    starts = np.arange(0, len(scores) - figures.LENGTH + 1, figures.SNAP)
    start = int(starts[np.argmax(total[starts + figures.LENGTH] - total[starts])])
    return start, start + figures.LENGTH


def draw_windows(model, windows: list, rows: list, maps: np.ndarray, protocol: str, arguments, device):
    """Draw each window with its restoration, in mV, and its map (windows, 4800, 12)."""
    restored = passes.restore_records(model, np.stack([window.signal for window in windows]),
                                       [window.r_peaks for window in windows], protocol, arguments.mask_ratio, device)
    for window, row, found, of_map in zip(tqdm(windows, desc="figures", leave=False), rows, restored, maps):
        low, high = window.signal.min(axis=0), window.signal.max(axis=0)
        signal = crop_global(window.signal[None])[0]
        title = (f"{Path(window.record).name[:60]}, {window.span()} s, {protocol} protocol: "
                 f"score {row[f'{protocol}_score']:.4g}, percentile {show_percentile(row[f'{protocol}_percentile'])} "
                 "(no truth)")
        in_millivolts = found if model.lead_scale is not None else (found + 1) / 2 * (high - low) + low
        figures.draw_localization(
            figures.Example(title, "mV", LEAD_NAMES, signal, in_millivolts,
                            np.zeros(signal.shape, np.uint8), of_map,
                            (window.start + GLOBAL_START) / SAMPLING_RATE),
            Path(arguments.output_dir), window.name, brightest(of_map))
