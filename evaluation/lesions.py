"""Implanted lesions: which lead and moment of an otherwise normal ECG is abnormal, and whether a map tells it."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataloader import crop_global
from ecg.arrays import (LESIONS_OF, Records, fingerprint, label_path, load_manifest, load_npy, load_r_peaks, load_table,
                        open_labels, open_records, phases_path, signal_path)
from ecg.lesions import KINDS
from evaluation.metrics import Resamples
from evaluation.places import average_places, rank_places, share_of_order, with_kinds
from evaluation.points import PointRanking
from utils import UserError

DETECTOR = "slope"                  # of the R peaks
THINNING = 5                        # every 5th sample is ranked, 100 a second: no signal holds anything above 25 Hz
ROWS_AT_ONCE = 256                  # whose maps are in memory at 500 Hz
NONE = "none"                       # the kind of a record without a lesion; it counts in the pooled number alone


@dataclass
class Lesions:
    """The rows of a split of lesions, with one lesion each or none.

    labels: (rows, 960, leads), phases: (rows, 960), both thinned; kinds, descriptions, ecg_ids: (rows,); r_peaks: of
    each row by DETECTOR.
    """
    records: Records
    r_peaks: list
    labels: np.ndarray
    phases: np.ndarray
    kinds: np.ndarray
    descriptions: np.ndarray
    ecg_ids: np.ndarray
    resamples: Resamples

    def collect(self, maps_of: Callable) -> np.ndarray:
        """The maps of all rows, thinned: (rows, 960, leads) float32.

        maps_of: (records, r_peaks of all rows, rows) -> (n, 4800, leads), called for some hundred rows at a time.
        """
        maps = np.empty(self.labels.shape, dtype=np.float32)
        for start in range(0, len(maps), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(maps)))
            maps[rows] = thinned(maps_of(self.records, self.r_peaks, rows))
        return maps


def thinned(points: np.ndarray) -> np.ndarray:
    """Every THINNING-th sample of (n, 4800, ...)."""
    return points[:, ::THINNING]


def open_lesions(data_path, split: str, source: Records) -> Lesions | None:
    """The lesions in the normals of a split ("val" or "test"), or None where there are none. source: its records.

    Raises UserError where they were made of other records.
    """
    name = LESIONS_OF[split]
    if not signal_path(data_path, name).exists():
        return None
    records = open_records(data_path, name, source.leads)
    table = load_table(data_path, name, records)
    if table is None or load_manifest(data_path)["arrays"][name].get("made_of") != fingerprint(source.signals):
        raise UserError(f"{signal_path(data_path, name)} was made of other records than {source.name} holds; make it "
                        "again with preprocess.py --lesions 1, or delete it")
    labels, phases = open_labels(data_path, name, records.signals.shape), load_npy(phases_path(data_path, name))
    if phases.shape != labels.shape[:2]:
        raise UserError(f"{phases_path(data_path, name)} does not fit {label_path(data_path, name)}; make both again "
                        "with preprocess.py --lesions 1")
    return Lesions(records, load_r_peaks(data_path, name, records, DETECTOR),
                   *(np.ascontiguousarray(thinned(crop_global(points))) for points in (labels, phases)),
                   table["kind"], table["description"], table["ecg_id"], Resamples(table["patient_id"]))


def evaluate_lesions(lesions: Lesions, maps: np.ndarray) -> dict:
    """{"pooled" and the names of PLACES: Estimate with "by_kind"} of maps as collect() gives them.

    The three within a record are means over the kinds. Pooled is over all points of all rows, those without a lesion
    included; of a kind, over its rows and those without a lesion.
    """
    kinds = {name: lesions.kinds == name for name in KINDS if name != NONE and name in lesions.kinds}
    groups = {name: rows | (lesions.kinds == NONE) for name, rows in kinds.items()}
    pooled = PointRanking(lesions.labels, maps, lesions.resamples).pool_rows(
        {**groups, "all": np.full(len(maps), True)})
    over_all = pooled.pop("all")
    own = rank_places(lesions.labels, lesions.phases[:, :, None], maps)
    return {"pooled": with_kinds(pooled, over_all), **average_places(own, lesions.resamples, kinds)}


def figure_name(kind: str) -> str:
    """The figure of a lesion of a kind."""
    return f"lesion_{kind}"


def choose_lesions(lesions: Lesions, maps: np.ndarray, protocol: str) -> list:
    """The rows to draw: of each kind the median one by its own AUROC. maps: of collect(), by a protocol.

    Returns [(row, name of the figure, title)].
    """
    own = np.array([share_of_order(scores[label == 1], scores[label == 0])
                    for label, scores in zip(lesions.labels, maps)])
    chosen = []
    for kind, title in KINDS.items():
        rows = np.flatnonzero((lesions.kinds == kind) & np.isfinite(own))
        if len(rows):
            row = int(rows[np.argsort(-own[rows], kind="stable")[len(rows) // 2]])
            chosen.append((row, figure_name(kind), f"{title}: {lesions.descriptions[row]}; the median of {len(rows)} by "
                           f"AUROC, {own[row]:.2f} ({protocol})\nThe lesion is implanted in the normal ECG "
                           f"{lesions.ecg_ids[row]}."))
    return chosen
