"""What is scored without a network, to hold beside it: trivial scores, and the rival of scoring/without_network.py."""
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloader import choose_rows
from ecg.arrays import (SIGNAL_FILES, VALIDATION_FOLD, Records, fingerprint, load_r_peaks, load_table, open_records,
                        signal_path)
from ecg.signals import LEAD_NAMES
from evaluation.detection import combine, evaluate_detection
from evaluation.lesions import evaluate_lesions, rank_lesions
from evaluation.localization import evaluate_thinned
from evaluation.numbers import Scored, Truth, beyond_map, beyond_parts, evaluate, evaluate_maps
from evaluation.report import COMBINATION, TRIVIAL, UNUSUAL_FILE
from evaluation.splits import Split
from evaluation.trivial import OPPOSITES, make_maps, score_people, score_signals, with_opposites
from scoring import without_network
from scoring.beat_restorer import WEIGHTS, BeatRestorer, load_restorer
from scoring.maps import CHOSEN, WITH_NETWORK, fit_maps
from scoring.maps import make_maps as make_place_maps
from scoring.usual import fit_rarity, show_record
from utils import UserError, pack_csv, write_atomically

FITTED_FILE = Path(__file__).resolve().parent.parent / "ckpt" / "no_network.npz"    # the rival fitted to PTB-XL
NORMALS = "fold9_normals"               # in it: the scores of fold 9's normals, ascending
NAME = "no network"                     # the rival in columns and in results.json
COMBINED, NETWORK = "combined", "clean"  # the protocol of both together, and the network's part of it
DETECTOR = "slope"                      # of the R peaks, for all of this
COMPOSED = (COMBINATION, *WITH_NETWORK)             # of several maps, or by a network: no rivals
LEAST_NORMALS, LEAST_FOR_MAPS = 20, 100     # to fit the rival to, and the maps of the median beat
UNUSUAL = ("record", "lead", "wave", "value", "unit", "usual_low", "usual_high", "z")       # columns of UNUSUAL_FILE
ROWS_AT_ONCE = 64


@dataclass
class PlaceMaps:
    """The maps of scoring/maps.py, fitted to normals. restorer: their network, or None where its weights are not there;
    quantiles: of usual.fit_rarity, or None without it."""
    fitted: dict
    restorer: BeatRestorer | None
    quantiles: np.ndarray | None

    @classmethod
    def fit(cls, records: Records, r_peaks: list, rows: np.ndarray) -> "PlaceMaps | None":
        """rows: of the training normals. None where they are too few."""
        if len(rows) < LEAST_FOR_MAPS:
            return None
        restorer, facts = load_restorer(WEIGHTS) if WEIGHTS.exists() else (None, {})
        if restorer is not None and facts.get("train_fingerprint") != fingerprint(records.signals):
            print(f"{WEIGHTS.name}, whose maps tell where, was trained on other normals than this train.npy; "
                  "python -m tools.train_restorer trains it on these")
        fitted = fit_maps(records, r_peaks, rows, restorer)
        return cls(fitted, restorer, None if restorer is None else fit_rarity(fitted))

    def make(self, records: Records, r_peaks: list, rows: np.ndarray) -> dict:
        """{name: (n, 4800, leads)}."""
        return make_place_maps(self.fitted, records, r_peaks, rows, self.restorer)

    def show(self, records: Records, r_peaks: list, rows: np.ndarray) -> tuple | None:
        """(ECGs, as expected, both mV, rarity), (n, 4800, 12) each, for figures; None without a network or mV."""
        if self.restorer is None or not records.in_millivolts:
            return None
        shown = [show_record(self.fitted, self.quantiles, records, r_peaks, row, self.restorer) for row in rows]
        return tuple(map(np.stack, zip(*shown)))


@dataclass
class Rivals:
    """What test.py scores beside the network.

    scores: {name: {split: (records,)}}; baselines: their numbers, and those of single maps without a network; maps: the
    numbers of the maps in COMPOSED; fitted, of_places: the rival and the maps, or None where they could not be fitted.
    """
    scores: dict
    baselines: dict
    maps: dict
    fitted: dict | None
    of_places: PlaceMaps | None


def score_rivals(data_path, truth: Truth) -> Rivals:
    """Score the test records and fold 9 without a network, and localize in benchmark and lesions. Raises UserError."""
    splits = [split for split in truth.splits.values() if split.name != "benchmark"]
    normals, table = open_normals(data_path, splits[0].records.leads)
    fitted = without_network.fit(describe(*normals)) if normals else None
    columns = {}
    for split in splits:
        scores = score_signals(split.records, split.r_peaks[DETECTOR]) | score_people(split.table, table)
        if fitted and split.records.in_millivolts:
            features = describe(split.records, split.r_peaks[DETECTOR])
            parts = without_network.score_parts(fitted, features)
            scores |= dict(zip(without_network.PARTS, parts.T)) | {NAME: parts @ without_network.WEIGHTS}
        for name, score in scores.items():
            columns.setdefault(name, {})[split.name] = score
    columns = {name: score for name, score in columns.items() if len(score) == len(splits)}
    of_places = PlaceMaps.fit(*normals) if normals and (truth.benchmark or truth.lesions) else None
    localized, ranked = localize(truth, fitted, of_places)
    baselines = {"detection": {name: evaluate_detection(truth.cohort, score) for name, score in columns.items()}}
    for part, numbers in (("localization", localized), ("lesions", ranked)):
        if numbers:
            baselines[part] = {name: one for name, one in numbers.items() if name not in COMPOSED}
    composed = [{name: one for name, one in numbers.items() if name in COMPOSED} for numbers in (localized, ranked)]
    entries = evaluate_maps(*composed, baselines)
    if CHOSEN in entries:
        entries[CHOSEN]["beyond_without_network"] = beyond_map(entries[CHOSEN], entries[COMBINATION])
    return Rivals(columns, baselines, entries, fitted, of_places)


def localize(truth: Truth, fitted: dict | None, of_places: PlaceMaps | None) -> tuple:
    """({map: its numbers} of the benchmark, the same of the lesions) of all that needs no checkpoint, {} each where
    there is none."""
    benchmark, lesions, localized, ranked = truth.splits.get("benchmark"), truth.lesions, {}, {}

    def maps_of(scores, records, r_peaks, rows):
        maps = make_maps(scores, records, r_peaks, rows)
        return maps | (of_places.make(records, r_peaks, rows) if of_places and records.in_millivolts else {})
    if benchmark:
        r_peaks = benchmark.r_peaks[DETECTOR]
        scores = score_records(fitted, benchmark.records, r_peaks)
        localized = evaluate_thinned(truth.benchmark, benchmark, r_peaks,
                                     lambda *where: with_opposites(maps_of(scores, *where)))
    if lesions:
        ranks = rank_lesions(lesions, partial(maps_of, score_records(fitted, lesions.records, lesions.r_peaks)))
        ranks |= {OPPOSITES[name]: one.reversed() for name, one in ranks.items() if name in OPPOSITES}
        ranked = {name: evaluate_lesions(lesions, one) for name, one in ranks.items()}
    return localized, ranked


def score_records(fitted: dict | None, records: Records, r_peaks: list) -> np.ndarray | None:
    """The rival's scores of records, or None where it was not fitted or nobody knows their mV."""
    if fitted is None or not records.in_millivolts:
        return None
    return without_network.score(fitted, describe(records, r_peaks))


def evaluate_all(truth: Truth, scored: dict, rivals: Rivals) -> tuple:
    """({protocol: its numbers}, {column: scores}) of {protocol: Scored}, of both parts combined, and of the rivals.

    "combined" exists where both parts and fold 9 do: its rival has not seen fold 9, and under `clean` neither has the
    network.
    """
    entries = {name: evaluate(truth, one, rivals.baselines) for name, one in scored.items()}
    columns = {name: one.scores for name, one in scored.items()}
    if NETWORK in scored and rivals.fitted and "val" in truth.splits:
        scores = combine([columns[NETWORK], rivals.scores[NAME]], truth.cohort.fold9_labels)
        entry = evaluate(truth, Scored(scores, None, DETECTOR, {}), rivals.baselines)
        parts = {NETWORK: entries[NETWORK]["detection"], NAME: rivals.baselines["detection"][NAME]}
        entries[COMBINED] = {**entry, "beyond_parts": beyond_parts(entry["detection"], parts)}
        columns[COMBINED] = scores
    return entries, columns | {TRIVIAL + name: score for name, score in rivals.scores.items()}


def open_normals(data_path, leads: int) -> tuple:
    """((records, R peaks of all of them, rows), the table or {}) of the normals of folds 1-8.

    None in place of the first where nothing can be fitted to them, with a word why.
    """
    table = {}
    try:
        if not signal_path(data_path, "train").exists():
            raise UserError(f"{data_path} holds no {SIGNAL_FILES['train']}; make it with preprocess.py")
        records = open_records(data_path, "train", leads)
        known = load_table(data_path, "train", records) or {}
        has_fold9 = "fold" in known or signal_path(data_path, "val").exists()
        rows = choose_rows(VALIDATION_FOLD if has_fold9 else None, known, len(records))
        table = {name: column[rows] for name, column in known.items()}
        if leads != len(LEAD_NAMES):
            raise UserError(f"it needs {len(LEAD_NAMES)} leads, and --dims is {leads}")
        if len(rows) < LEAST_NORMALS:
            raise UserError(f"{SIGNAL_FILES['train']} holds {len(rows)} normals of other folds than 9, fewer than "
                            f"{LEAST_NORMALS}")
        records.millivolts(rows[:1])                    # raises where nobody knows them
        return (records, load_r_peaks(data_path, "train", records, DETECTOR), rows), table
    except UserError as error:
        print(f"the rival '{NAME}' is skipped: {error}")
        return None, table


def fit_rival(data_path, leads: int) -> tuple:
    """(the rival fitted to the normals of folds 1-8, or None with a word why; the table of these normals, or {})."""
    normals, table = open_normals(data_path, leads)
    return without_network.fit(describe(*normals)) if normals else None, table


def save_rival(path, fitted: dict, normals: np.ndarray):
    """Write the fitted rival and scores of normals it was not fitted to, plain arrays in a .npz. Raises UserError."""
    file = io.BytesIO()
    np.savez_compressed(file, **fitted, **{NORMALS: np.sort(normals)})
    write_atomically(path, lambda target: target.write(file.getbuffer()))


def load_rival(path) -> tuple:
    """(the fitted rival, ascending scores of fold 9's normals) of save_rival's file. Raises UserError."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            fitted = dict(stored)
        normals = fitted.pop(NORMALS)
        without_network.score(fitted, np.ones((1, without_network.NAMED.start + len(without_network.NAMES))))
        if not all(np.isfinite(values).all() for values in (normals, *fitted.values())):
            raise ValueError("not finite")
    except Exception as error:          # a damaged archive raises whatever it meets
        raise UserError(f"{path} cannot be read as the score without a network ({type(error).__name__}); make it with "
                        "python -m tools.fit_no_network, or fetch it again") from error
    return fitted, normals


def tell(measured: tuple) -> str:
    """One of without_network.unusual as text: "T in V5 -0.12 mV (usual 0.08 to 0.61)".

    Even the most unusual ones of an ordinary record lie in the usual range: "T in V5 0.30 mV (within 0.08 to 0.61)".
    """
    lead, wave, value, unit, low, high, _ = measured
    digits, usual = 2 if unit == "mV" else 0, "within" if low <= value <= high else "usual"
    return (f"{wave}{'' if lead == 'all' else f' in {lead}'} {value:.{digits}f} {unit} ({usual} {low:.{digits}f} to "
            f"{high:.{digits}f})")


def describe(records: Records, r_peaks: list, rows=None) -> np.ndarray:
    """The rival's features of rows (default: all) of records. Raises UserError where their mV are unknown."""
    rows = np.arange(len(records)) if rows is None else rows
    features = []
    for start in tqdm(range(0, len(rows), ROWS_AT_ONCE), desc="measure beats", leave=False):
        some = rows[start:start + ROWS_AT_ONCE]
        features += [without_network.describe(record, r_peaks[row])
                     for record, row in zip(records.millivolts(some), some)]
    return np.stack(features)


def pack_unusual(fitted: dict, split: Split, rows: np.ndarray, names: list) -> dict:
    """{file: bytes}: the ten most unusual measurements of these rows. names: of all records of the split."""
    if not split.records.in_millivolts:
        return {}
    rows = np.unique(rows)
    features = describe(split.records, split.r_peaks[DETECTOR], rows)
    return {UNUSUAL_FILE: pack_csv(UNUSUAL, [(names[row], *measured) for row, of_record in zip(rows, features)
                                             for measured in without_network.unusual(fitted, of_record)])}
