"""Beats of the MIT-BIH arrhythmia database as preprocess.py --mitdb_path leaves them in data/ (see ecg/mitbih.py).

    mitbih.npy         (W, 5000, 2) float32, mV: windows of 10 s at 500 Hz, filtered as all records are
    mitbih_beats.csv   a row a beat: its record, the row of its window, R there, its class, and its part of each split
    mitbih.json        what they were made of: the audit, and the fingerprint of the windows
"""
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg.arrays import Records, fingerprint, load_npy
from utils import UserError

WINDOWS, BEATS, MANIFEST = "mitbih.npy", "mitbih_beats.csv", "mitbih.json"
SPLITS, PARTS = ("within", "between"), ("train", "val", "test")
ABNORMAL = ("S", "V", "F", "Q")                         # classes of beats; N is normal
OTHER = "!"                                             # a flutter wave: not a beat to score, nor normal


def patients_of(records: np.ndarray) -> np.ndarray:
    """The patients of records, by the record's name: 201 and 202 are of one man, who so stands in DS1 and in DS2."""
    return np.where(records == "202", "201", records)


@dataclass
class Beats:
    """The windows, and the beats in them. table: its columns, (beats,) each."""
    records: Records
    table: dict

    def r_peaks(self, chosen) -> list:
        """The R peaks of the chosen beats (beats,) bool, by window: a list of int32 arrays."""
        rows, places = self.table["window"][chosen], self.table["r_peak"][chosen]
        return np.split(places.astype(np.int32), np.searchsorted(rows, np.arange(1, len(self.records))))

    def require_parts(self, split: str):
        """Raise UserError where a part of a split has no beat, as in a trial on a few recordings."""
        if absent := [part for part in PARTS if part not in self.table[split]]:
            raise UserError(f"{BEATS} has no {' and no '.join(absent)} beat of the split {split}; make it again with "
                            "preprocess.py --mitdb_path, without --limit")

    def training_windows(self, split: str) -> tuple:
        """(rows of windows without an abnormal beat, the training beats of all windows, as r_peaks gives them).

        The global branch sees the whole window; in it may be normals that are tested on.
        """
        self.require_parts(split)
        chosen, abnormal = self.table[split] == "train", self.table["class"] != "N"
        rows = np.setdiff1d(self.table["window"][chosen], self.table["window"][abnormal])
        return rows, self.r_peaks(chosen)


def open_beats(data_path, leads: int) -> Beats:
    """The beats and windows in data_path. Raises UserError where they are absent or do not belong together."""
    data_path = Path(data_path)
    if not (data_path / WINDOWS).exists():
        raise UserError(f"{data_path / WINDOWS} is missing; make it with preprocess.py --mitdb_path, or name its "
                        "folder with --data_path")
    records = Records(load_npy(data_path / WINDOWS), WINDOWS)
    if records.leads != leads:
        raise UserError(f"{data_path / WINDOWS} has {records.leads} leads, not {leads}; set --dims {records.leads}")
    try:
        if json.loads((data_path / MANIFEST).read_text())["fingerprint"] != fingerprint(records.signals):
            raise ValueError("they are of different runs")
        with open(data_path / BEATS, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        types = {"record": str, "window": int, "r_peak": int, "class": str, "within": str, "between": str}
        return Beats(records, {name: np.array([kind(row[name]) for row in rows]) for name, kind in types.items()})
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{WINDOWS}, {BEATS} and {MANIFEST} in {data_path} do not belong together ({str(error)[:80]}); "
                        "make them again with preprocess.py --mitdb_path") from error
