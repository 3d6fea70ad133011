"""Trivial scores and maps, to hold beside the network's on the same records: what does not beat them says nothing.

Detection: how large, steep, fast and irregular a record is, and who it is of: age and sex. Localization: maps that know
nothing but the signal and its R peaks. A higher score is more anomalous.
"""
import numpy as np
import torch

from dataloader import crop_global, valid_beats
from ecg.arrays import Records
from ecg.signals import SAMPLING_RATE, normalize_leads
from scoring.passes import smooth_maps

OPPOSITES = {"nearness to an R peak": "distance to an R peak", "|amplitude|": "small |amplitude|"}   # maps, reversed
NEARNESS_SPREAD = 60                # samples: about the standard deviation of the distance to the nearest R peak


def score_signals(records: Records, r_peaks: list) -> dict:
    """{name: (records,)}: the largest amplitude and the mean slope as stored, the rate and how irregular it is."""
    size = [(np.abs(record).max(), np.abs(np.diff(record, axis=0)).mean()) for record in records.iterate()]
    rhythm = np.array([describe_rhythm(positions) for positions in r_peaks], dtype=np.float64).reshape(-1, 2)
    return dict(zip(("largest amplitude", "mean |slope|", "heart rate", "RR irregularity"),
                    (*np.array(size, dtype=np.float64).T, *rhythm.T)))


def describe_rhythm(r_peaks: np.ndarray) -> tuple:
    """(beats a minute, RMS of successive RR differences / mean RR); (0, 0) and 0 where there are too few beats."""
    intervals = np.diff(r_peaks) / SAMPLING_RATE
    if not len(intervals):
        return 0.0, 0.0
    changes = np.diff(intervals)
    return 60 / intervals.mean(), np.sqrt(np.mean(changes ** 2)) / intervals.mean() if len(changes) else 0.0


def score_people(table: dict, normals: dict) -> dict:
    """{name: (records,)}: age, its distance from the normals' mean age, and being male; those that tables tell.

    table, normals: columns of load_table, of the records and of the training normals, {} where there is none. A record
    without an age or sex is scored as the mean of the others.
    """
    scores = {}
    ages, sexes, usual = (known.get(name, np.array([])) for known, name in
                          ((table, "age"), (table, "sex"), (normals, "age")))
    if np.isfinite(ages).any():
        scores["age"] = np.where(np.isfinite(ages), ages, np.nanmean(ages))
        if np.isfinite(usual).any():
            scores["|age - mean|"] = np.abs(scores["age"] - np.nanmean(usual))
    if (sexes != "").any():
        scores["sex"] = np.where(sexes == "", (sexes[sexes != ""] == "M").mean(), sexes == "M")
    return scores


def make_maps(scores: np.ndarray | None, records: Records, r_peaks: list, rows: np.ndarray) -> dict:
    """Maps that know nothing of ECGs but where the R peaks are, {name: (n, 4800, leads)} of rows of records.

    scores: (records,) of all records without a network, or None: then no map says which record is abnormal; r_peaks:
    of every record. Near an R peak (where there is none, a window that is scored), steep, or far from the lead's median
    is anomalous; the last two are smoothed like the networks' maps.
    """
    signals = np.stack([normalize_leads(record) for record in records.iterate(rows)]).astype(np.float32)
    nearness = -np.stack([distance_to_r_peak(r_peaks[row], signals.shape[1]) for row in rows]).astype(np.float32)
    nearness = np.broadcast_to(crop_global(nearness)[:, :, None], crop_global(signals).shape)
    maps = {"nearness to an R peak": nearness, "|slope|": smooth(np.abs(np.gradient(signals, axis=1))),
            "|amplitude|": smooth(np.abs(signals - np.median(signals, axis=1, keepdims=True)))}
    if scores is not None:
        of_rows = ((scores - scores.mean()) / max(scores.std(), 1e-12))[rows].astype(np.float32)[:, None, None]
        maps["record's score"] = np.broadcast_to(of_rows, nearness.shape)
        maps["nearness + record's score"] = nearness / NEARNESS_SPREAD + of_rows    # each with a deviation of about 1
    return maps


def with_opposites(maps: dict) -> dict:
    """Maps by name, and the reverse of those in OPPOSITES."""
    return maps | {OPPOSITES[name]: -one for name, one in maps.items() if name in OPPOSITES}


def distance_to_r_peak(r_peaks: np.ndarray, length: int) -> np.ndarray:
    """Of each sample (length,) to the nearest R peak, those too near to an end for a beat included."""
    positions = r_peaks if len(r_peaks) else valid_beats(r_peaks)[0]
    return np.abs(np.arange(length)[:, None] - positions).min(axis=1)


def smooth(maps: np.ndarray) -> np.ndarray:
    """(n, 5000, leads), smoothed as the networks' maps are: (n, 4800, leads)."""
    return smooth_maps(torch.from_numpy(crop_global(maps))).numpy()
