"""Implanted lesions: which lead and moment of an otherwise normal ECG is abnormal, and whether a map tells it."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataloader import crop_global
from ecg.arrays import (LESIONS_OF, Records, fingerprint, label_path, load_manifest, load_npy, load_r_peaks, load_table,
                        open_labels, open_records, phases_path, signal_path)
from ecg.lesions import KINDS
from evaluation.metrics import Resamples
from evaluation.places import PLACES, average_places, rank_places, thinned, with_kinds
from evaluation.points import bin_edges, pool_counts
from utils import PROCESSES, UserError

DETECTOR = "slope"                  # of the R peaks
ROWS_AT_ONCE = 128                  # whose maps are in memory, of each process
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


@dataclass
class Ranks:
    """How a map ranks the points of each row: own, (rows, 3) the numbers of PLACES; positive, negative: (rows, bins)
    points by score, for what is pooled."""
    own: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    def reversed(self) -> "Ranks":
        """Those of minus the map."""
        return Ranks(1 - self.own, self.positive[:, ::-1], self.negative[:, ::-1])


def rank_lesions(lesions: Lesions, maps_of: Callable) -> dict:
    """{name: Ranks} of maps that are made, ranked and dropped a block of rows at a time.

    maps_of: (records, r_peaks of all rows, rows) -> {name: (n, 4800, leads)}, higher = more anomalous. The bins of the
    pooled numbers are those of the first block.
    """
    ranks, edges = {}, {}
    for start in range(0, len(lesions.kinds), ROWS_AT_ONCE * PROCESSES):
        rows = np.arange(start, min(start + ROWS_AT_ONCE * PROCESSES, len(lesions.kinds)))
        labels, phases = lesions.labels[rows], lesions.phases[rows]
        for name, maps in maps_of(lesions.records, lesions.r_peaks, rows).items():
            maps = thinned(maps)
            of_bins = edges.setdefault(name, bin_edges(maps))
            bins = np.searchsorted(of_bins, maps, side="right")
            counts = [np.stack([np.bincount(bins[row][labels[row] == kind], minlength=len(of_bins) + 1)
                                for row in range(len(rows))]).astype(np.float32) for kind in (1, 0)]
            ranks.setdefault(name, []).append((rank_places(labels, phases[:, :, None], maps), *counts))
    return {name: Ranks(*map(np.concatenate, zip(*blocks))) for name, blocks in ranks.items()}


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


def evaluate_lesions(lesions: Lesions, ranks: Ranks) -> dict:
    """{"pooled" and the names of PLACES: Estimate with "by_kind"} of a map.

    The three within a record are means over the kinds. Pooled is over all points of all rows, those without a lesion
    included; of a kind, over its rows and those without a lesion.
    """
    kinds = {name: lesions.kinds == name for name in KINDS if name != NONE and name in lesions.kinds}

    def pool(rows):
        return pool_counts(ranks.positive, ranks.negative, rows, lesions.resamples)
    pooled = with_kinds({name: pool(rows | (lesions.kinds == NONE)) for name, rows in kinds.items()},
                        pool(np.full(len(lesions.kinds), True)))
    return {"pooled": pooled, **average_places(ranks.own, lesions.resamples, kinds)}


def figure_name(kind: str) -> str:
    """The figure of a lesion of a kind."""
    return f"lesion_{kind}"


def choose_lesions(lesions: Lesions, ranks: Ranks, protocol: str) -> list:
    """The rows to draw: of each kind the median one by its own AUROC, as a protocol ranks it.

    Returns [(row, name of the figure, title)].
    """
    own = ranks.own[:, PLACES.index("per_record")]
    chosen = []
    for kind, title in KINDS.items():
        rows = np.flatnonzero((lesions.kinds == kind) & np.isfinite(own))
        if len(rows):
            row = int(rows[np.argsort(-own[rows], kind="stable")[len(rows) // 2]])
            chosen.append((row, figure_name(kind), f"{title}: {lesions.descriptions[row]}; the median of {len(rows)} "
                           f"by AUROC, {own[row]:.2f} ({protocol})\nThe lesion is implanted in the normal ECG "
                           f"{lesions.ecg_ids[row]}."))
    return chosen
