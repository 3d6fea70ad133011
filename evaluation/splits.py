"""The splits that test.py scores: opened, checked, and described for the report."""
import hashlib
from dataclasses import dataclass

import numpy as np

from evaluation import numbers
import parallel
from ecg.arrays import (NORMALISED_SPLITS, SIGNAL_FILES, describes, details_path, fingerprint, iterate_rows, label_path,
                    load_details, load_manifest, load_r_peaks, load_records, open_labels, open_signals, require_sound,
                    signal_path)
from dataloader import crop_global, to_millivolts
from ecg.ludb import split_diagnoses
from ecg.signals import LEAD_NAMES
from utils import UserError


@dataclass
class Split:
    """A split to score. records: columns of its table, or None where nothing tells which records these are."""
    name: str
    signals: np.ndarray                 # (records, 5000, leads)
    labels: np.ndarray                  # (records,), of the benchmark (records, 5000, leads)
    r_peaks: list
    records: dict | None
    details: dict | None = None         # of arrays.load_details, of a split that is stored normalised

    def rows(self):
        """The records one by one, checked to be finite."""
        return iterate_rows(self.signals, SIGNAL_FILES[self.name])


    def millivolts(self):
        """The records in mV, (records, 5000, leads) or an iterable of them; None where nobody knows their amplitude."""
        if self.name not in NORMALISED_SPLITS:
            return self.signals
        return None if self.details is None else np.stack([
            to_millivolts(record[None], self.details, [row])[0] for row, record in enumerate(self.rows())])

    def require_millivolts(self):
        """millivolts(), which a network trained on --normalization scale needs. Raises UserError."""
        found = self.millivolts()
        if found is None:
            raise UserError(f"{SIGNAL_FILES[self.name]} tells no amplitude, which this checkpoint needs, as no "
                            f"{details_path('', self.name)} belongs to it; make it with preprocess.py, or name a "
                            "checkpoint of --normalization minmax")
        return found


def load_split(arguments, name: str) -> Split:
    """Open and check a split. Raises UserError."""
    signals = open_signals(arguments.data_path, name, arguments.dims)
    labels = open_labels(arguments.data_path, name, signals.shape if name == "benchmark" else signals.shape[:1])
    if name == "benchmark":
        marked, normal = (np.count_nonzero(crop_global(labels) == kind) for kind in (1, 0))
        if not marked or not normal:
            raise UserError(f"{label_path(arguments.data_path, name)} marks none or all of the samples that are "
                            "scored, 100:4900; make it again, or remove the benchmark")
    require_sound(signals, name)
    details = load_details(arguments.data_path, name, signals) if name in NORMALISED_SPLITS else None
    return Split(name, signals, labels, load_r_peaks(arguments.data_path, name, signals),
                 load_records(arguments.data_path, name, signals), details)


def load_splits(arguments) -> dict:
    """The splits to score by name: test, and what there is of val (fold 9) and benchmark. Raises UserError."""
    wanted = ["test"] + ["val"] * arguments.fold9 + ["benchmark"]
    with parallel.one_after_the_first():                            # R peaks are found once, if they have to be
        splits = {name: load_split(arguments, name) for name in wanted
                  if name == "test" or signal_path(arguments.data_path, name).exists()}
    if "benchmark" not in splits:
        print(f"localization is skipped: {arguments.data_path} holds no {SIGNAL_FILES['benchmark']}; put the authors' "
              "two benchmark files there, or make them with preprocess.py --ludb_path.")
    if arguments.fold9 and "val" not in splits:
        print(f"operating points are skipped: {arguments.data_path} holds no {SIGNAL_FILES['val']}, fold 9, which "
              "sets them; make it with preprocess.py.")
    return splits


def open_benchmark(arguments, split: Split) -> numbers.Benchmark:
    """The benchmark's truth, and what tells the phases of the beat and the diagnoses, where that is known."""
    known = (split.records or {}).get("diagnoses")
    diagnoses = None if known is None else [split_diagnoses(text) for text in known]
    leads = split.signals.shape[2]
    names = LEAD_NAMES if leads == len(LEAD_NAMES) else tuple(f"lead {place + 1}" for place in range(leads))
    rows = split.records["ecg_id"].tolist() if split.records else [f"in row {row}" for row in range(len(split.labels))]
    return numbers.crop_benchmark(split.labels, split.details, diagnoses, rows, names)


def describe_data(data_path, splits: list) -> dict:
    """Provenance for results.json: the manifest where it describes the arrays that were scored, and their identity."""
    manifest = load_manifest(data_path)
    described = all(describes(manifest, split.name, split.signals) for split in splits)
    if manifest and not described:
        print(f"the manifest in {data_path} does not describe all arrays that are scored, and is left out of the "
              "report; see that the labels belong to the same signals.")
    return {"data": manifest if described else None, "arrays": {split.name: identity_of(split) for split in splits}}


def identity_of(split: Split) -> dict:
    """What results.json says a split is, its labels included."""
    return {"shape": list(split.signals.shape), "fingerprint": fingerprint(split.signals),
            "labels": hashlib.sha256(np.ascontiguousarray(split.labels, np.uint8)).hexdigest()}
