"""The arrays of all PTB-XL's records with their statements, as diagnosis/prepare.py writes them.

    statements.npy                (N, 5000, 12) float16, mV at 500 Hz, filtered
    statements_records.csv        ecg_id, patient_id, age, sex, fold, statements, heart_rate of each row
    statements_r_peaks_slope.npz  R peaks of each row, by the slope of all leads
    statements.json               the statements with their groups, mean and deviation of the attributes, provenance

A statement is present in a record where it is a key of its scp_codes. Its group follows from the records of folds 1-8
that have it; so do mean and deviation of the attributes.
"""
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloader import valid_beats
from ecg.arrays import TABLE_COLUMNS, TEST_FOLD, VALIDATION_FOLD, Records, fingerprint, load_npy, load_r_peaks
from ecg.signals import LEAD_NAMES, RECORD_LENGTH, SAMPLING_RATE
from utils import UserError

SPLIT = "statements"
SIGNALS, TABLE, MANIFEST = "statements.npy", "statements_records.csv", "statements.json"
GROUPS = {"rare": 1, "uncommon": 100, "common": 1000}       # least positives in folds 1-8 (rare: below 100, also none)
ATTRIBUTES = ("age", "sex", "heart_rate")                   # years, 1 for female, beats a minute
COLUMNS = {**TABLE_COLUMNS, "heart_rate": lambda cell: float(cell or "nan")}


def group_of(positives: int) -> str:
    """The group of a statement that this many training records have."""
    return max((least, name) for name, least in GROUPS.items() if max(positives, 1) >= least)[1]


def mark_statements(statements, codes: list) -> np.ndarray:
    """Which records have which statement: uint8 (records, codes). statements: the codes of each, as one text."""
    place = {code: column for column, code in enumerate(codes)}
    labels = np.zeros((len(statements), len(codes)), np.uint8)
    for row, text in enumerate(statements):
        labels[row, [place[code] for code in text.split() if code in place]] = 1
    return labels


def attributes_in(table: dict) -> np.ndarray:
    """The attributes of a table's records in their own units, NaN where unknown: (records, 3)."""
    sex = np.select([table["sex"] == "F", table["sex"] == "M"], [1.0, 0.0], np.nan)
    return np.stack([table["age"], sex, table["heart_rate"]], axis=1)


def heart_rate(r_peaks: np.ndarray) -> float:
    """Beats a minute by the median RR interval; NaN for fewer than two R peaks."""
    return float(60 * SAMPLING_RATE / np.median(np.diff(r_peaks))) if len(r_peaks) > 1 else float("nan")


@dataclass
class Statements:
    """All records with what is known of them.

    labels (N, codes) uint8; attributes (N, 3) float32, standardised, NaN where unknown; about: what statements.json
    says; beats: of each record its valid R peaks.
    """
    records: Records
    table: dict
    labels: np.ndarray
    attributes: np.ndarray
    beats: list
    about: dict

    @property
    def codes(self) -> list:
        return [statement["code"] for statement in self.about["statements"]]

    def rows_of(self, *folds: int) -> np.ndarray:
        """The rows of these folds."""
        return np.flatnonzero(np.isin(self.table["fold"], folds))

    def training_rows(self) -> np.ndarray:
        return np.flatnonzero(self.table["fold"] < VALIDATION_FOLD)

    def middle_beats(self, rows: np.ndarray) -> np.ndarray:
        """One valid beat of each of these records, the same always: R peaks (rows,)."""
        return np.array([self.beats[row][len(self.beats[row]) // 2] for row in rows])


def load_statements(data_path) -> Statements:
    """The arrays in a data folder. Raises UserError where one is missing, damaged, or of another run."""
    folder, remedy = Path(data_path), "make it with python -m diagnosis.prepare"
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder / MANIFEST} is missing; {remedy}, or name its folder with --data_path")
    signals = load_npy(folder / SIGNALS)
    try:
        about = json.loads((folder / MANIFEST).read_text())
        with open(folder / TABLE, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        table = {name: np.array([COLUMNS[name](row[name]) for row in rows]) for name in COLUMNS if name in rows[0]}
        same = about["fingerprint"] == fingerprint(signals) and len(rows) == len(signals)
        labels = mark_statements(table["statements"], [statement["code"] for statement in about["statements"]])
        of_attributes = np.array([about["attributes"][name] for name in ATTRIBUTES])               # (3, 2)
        attributes = ((attributes_in(table) - of_attributes[:, 0]) / of_attributes[:, 1]).astype(np.float32)
    except (OSError, ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
        raise UserError(f"{folder / MANIFEST} or {TABLE} beside it cannot be read ({type(error).__name__}); {remedy}"
                        ) from error
    if not same or signals.shape[1:] != (RECORD_LENGTH, len(LEAD_NAMES)):
        raise UserError(f"{folder / SIGNALS} and {MANIFEST} are of two runs; {remedy}")
    records = Records(signals, SIGNALS)
    r_peaks = load_r_peaks(data_path, SPLIT, records, "slope")
    return Statements(records, table, labels, attributes, [valid_beats(peaks)[0] for peaks in r_peaks], about)


def folds_named() -> dict:
    """The folds that results are reported on, by the names that results.json has."""
    return {"fold10": (TEST_FOLD,), "folds9and10": (VALIDATION_FOLD, TEST_FOLD)}
