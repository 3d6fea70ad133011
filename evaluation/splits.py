"""The splits that test.py scores, opened and checked before hours of work on them."""
from dataclasses import dataclass

import numpy as np

from dataloader import crop_global
from ecg.arrays import (SIGNAL_FILES, Records, label_path, load_r_peaks, load_table, open_labels, open_records,
                        signal_path)
from utils import UserError, one_after_the_first


@dataclass
class Split:
    """A split to score.

    labels: (records,), of the benchmark (records, 5000, leads); r_peaks: {detector: those of each record}; table: its
    columns, empty where nothing tells which records these are; patients: (records,) whose record each is, where that
    is unknown each of its own patient.
    """
    name: str
    records: Records
    labels: np.ndarray
    r_peaks: dict
    table: dict
    patients: np.ndarray


def load_split(data_path, name: str, leads: int, detectors) -> Split:
    """Open and check a split, with its R peaks by each of the detectors. Raises UserError."""
    records = open_records(data_path, name, leads)
    shape = (len(records),) if name != "benchmark" else records.signals.shape
    labels = open_labels(data_path, name, shape)
    if name == "benchmark":
        marked, normal = (np.count_nonzero(crop_global(labels) == kind) for kind in (1, 0))
        if not marked or not normal:
            raise UserError(f"{label_path(data_path, name)} marks none or all of the samples that are scored, "
                            "100:4900; make it again, or remove the benchmark")
    records.require_sound()
    r_peaks = {detector: load_r_peaks(data_path, name, records, detector) for detector in sorted(detectors)}
    table = load_table(data_path, name, records) or {}
    return Split(name, records, labels, r_peaks, table, table.get("patient_id", np.arange(len(records))))


def load_splits(data_path, leads: int, detectors, fold9: bool) -> dict:
    """The splits to score by name: test, and what there is of val (fold 9) and benchmark. Raises UserError."""
    names = ["test"] + ["val"] * fold9 + ["benchmark"]
    with one_after_the_first():                                     # R peaks are found once, if they have to be
        splits = {name: load_split(data_path, name, leads, detectors) for name in names
                  if name == "test" or signal_path(data_path, name).exists()}
    if "benchmark" not in splits:
        print(f"localization is skipped: {data_path} holds no {SIGNAL_FILES['benchmark']}; put the authors' two "
              "benchmark files there, or make them with preprocess.py --ludb_path.")
    if fold9 and "val" not in splits:
        print(f"operating points and combined are skipped: {data_path} holds no {SIGNAL_FILES['val']}, fold 9, which "
              "sets them; make it with preprocess.py.")
    return splits
