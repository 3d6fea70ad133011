"""How well beats are told apart: numbers from scores, classes and patients; intervals over patients as in metrics.py.

A score is (beats,), of all beats of a table (ecg.beats.Beats), NaN where a beat was not scored. Higher is more
anomalous.
"""
import numpy as np

from dataloader import crop_global
from ecg.arrays import EXCLUDED
from ecg.beats import ABNORMAL, OTHER, patients_of
from evaluation.metrics import Resamples, add_z, best_threshold, estimate
from evaluation.places import average_places, rank_places
from evaluation.points import PointRanking

CLASSES = ("S", "V", "F")                   # reported one by one; of Q there are 15
EXTENT = (-194, 250)                        # samples from R, 500 Hz: BeatGAN's beat, whose points are localized


def evaluate_beats(table: dict, split: str, score: np.ndarray) -> dict:
    """All numbers of one score under a split: of its test beats, with the threshold of its validation beats.

    "f1_best" is that of the best threshold on the test beats themselves, as published, so optimistic.
    """
    tested, labels = (table[split] == "test") & np.isfinite(score), (table["class"] != "N").astype(int)
    validated = (table[split] == "val") & np.isfinite(score)
    patients = patients_of(table["record"])
    number, beats = by_patient(patients[tested], labels[tested], score[tested])
    classes = by_patient(patients[tested], class_codes(table["class"][tested]), score[tested])[1].labels
    numbers = beats.pool()
    numbers["by_class"] = {name: {"auroc": beats.pool_part((classes == 0) | (classes == code)),
                                  "beats": int(np.count_nonzero(classes == code))}
                           for code, name in enumerate(ABNORMAL, 1) if name in CLASSES and (classes == code).any()}
    for name, rows in (("f1_best", tested), ("f1", validated)):
        threshold = best_threshold(labels[rows], score[rows])
        numbers[name] = {"threshold": threshold, **operate(patients[tested], labels[tested],
                                                           score[tested] >= threshold)}
    numbers["beats"] = {"normal": int((labels[tested] == 0).sum()), "abnormal": int(labels[tested].sum()),
                        "patients": number}
    return numbers


def class_codes(classes: np.ndarray) -> np.ndarray:
    """0 for N, 1 + the place in ABNORMAL for the others: (beats,) uint8."""
    return np.array([0 if name == "N" else 1 + ABNORMAL.index(name) for name in classes], dtype=np.uint8)


def by_patient(records: np.ndarray, codes: np.ndarray, score: np.ndarray) -> tuple:
    """(how many patients, the PointRanking of their beats), a row a patient: what PointRanking holds as points."""
    names, rows = np.unique(records, return_inverse=True)
    most = np.bincount(rows).max()
    labels, scores = np.full((len(names), most, 1), EXCLUDED), np.full((len(names), most, 1), np.median(score))
    for row in range(len(names)):
        own = rows == row
        labels[row, :own.sum(), 0], scores[row, :own.sum(), 0] = codes[own], score[own]
    return len(names), PointRanking(labels, scores, Resamples(names))


def operate(records: np.ndarray, labels: np.ndarray, called: np.ndarray) -> dict:
    """Sensitivity, precision and F1 of beats that are called abnormal, with intervals over patients."""
    names, rows = np.unique(records, return_inverse=True)
    kinds = (called & (labels == 1), called & (labels == 0), ~called & (labels == 1))
    counts = np.stack([np.bincount(rows, kind, len(names)) for kind in kinds])              # (3, patients)

    def measures(true, false_alarm, missed):
        with np.errstate(invalid="ignore"):
            return {"sensitivity": true / (true + missed), "precision": true / (true + false_alarm),
                    "f1": 2 * true / (2 * true + false_alarm + missed)}
    values, resampled = measures(*counts.sum(axis=1)), measures(*(counts @ Resamples(names).weights.T.astype(float)))
    patients = min(np.count_nonzero(counts[0] + counts[2]), np.count_nonzero(counts[0] + counts[1]))
    return {name: estimate(values[name], resampled[name], patients) for name in values}


def less_the_usual(table: dict, score: np.ndarray) -> np.ndarray:
    """A score less the median of its record's scored beats: what is unusual for this patient. It needs no label."""
    relative = score.copy()
    for record in np.unique(table["record"]):
        own = (table["record"] == record) & np.isfinite(score)
        if own.any():
            relative[own] -= np.median(score[own])
    return relative


def sum_of_z(table: dict, split: str, scores: list) -> np.ndarray:
    """Scores added, each as its z-score among the normal validation beats of the split."""
    normal = (table[split] == "val") & (table["class"] == "N") & np.isfinite(sum(scores))
    return add_z(scores, normal)


# ---- localization

def mark_points(table: dict, rows: np.ndarray, length: int, leads: int, classes=CLASSES) -> np.ndarray:
    """The labels of the points of windows: (rows, 4800, leads) uint8.

    1 in beats that a cardiologist called one of the classes, 0 in those called normal alone, else EXCLUDED.
    """
    labels = np.full((len(rows), length), EXCLUDED, np.uint8)
    for names, label in ((("N",), 0), (tuple({*ABNORMAL, OTHER} - set(classes)), EXCLUDED), (classes, 1)):
        for row, window in enumerate(rows):
            beats = (table["window"] == window) & np.isin(table["class"], names)
            for place in table["r_peak"][beats]:
                labels[row, max(0, place + EXTENT[0]):place + EXTENT[1]] = label
    return np.repeat(crop_global(labels)[:, :, None], leads, axis=2)


def paint(table: dict, rows: np.ndarray, score: np.ndarray, length: int) -> np.ndarray:
    """A map (rows, 4800, 1) that is each beat's score where the beat is, the higher one where two overlap.

    A beat without a score (NaN) leaves no trace.
    """
    painted = np.full((len(rows), length), np.nanmin(score), np.float32)
    for row, window in enumerate(rows):
        for beat in np.flatnonzero(table["window"] == window):
            part = painted[row, max(0, table["r_peak"][beat] + EXTENT[0]):table["r_peak"][beat] + EXTENT[1]]
            np.fmax(part, score[beat], out=part)
    return crop_global(painted)[:, :, None]


def evaluate_maps(labels: np.ndarray, maps: dict, patients: np.ndarray) -> dict:
    """{name of a map: AUROC of points pooled, mean per window, and the windows with points of both kinds}.

    labels, maps: (windows, 4800, leads); patients: (windows,) whose they are.
    """
    numbers, resamples = {}, Resamples(patients)
    for name, of_map in maps.items():
        ranking = PointRanking(labels, np.broadcast_to(of_map, labels.shape), resamples)
        own = rank_places(labels, None, np.broadcast_to(of_map, labels.shape))
        numbers[name] = {"pooled": ranking.pool()["auroc"], "windows": int(np.isfinite(own[:, 0]).sum()),
                         "per_window": average_places(own, resamples)["per_record"]}
    return numbers
