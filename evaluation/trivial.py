"""Trivial scores, to hold beside the network's on the same records: a number that does not beat them is not a result.

Detection: four numbers that take no training, and one serious rival, the median beat of a record under a principal
component analysis of the training normals. Localization: maps that know nothing but the signal or its R peaks.
A higher score is more anomalous.
"""
import numpy as np
import torch
from sklearn.decomposition import PCA

from dataloader import crop_global, valid_beats
from model import BEAT_BEFORE, BEAT_LENGTH
from scoring.passes import smooth_maps
from ecg.signals import SAMPLING_RATE, normalize_leads

COMPONENTS = 10                     # of the median beat: the best on fold 9 of PTB-XL among 2, 5, 8, 10, 15, 30
THINNING = 4                        # every fourth sample of the median beat: the pass band ends at 25 Hz
MEDIAN_BEAT = "median beat, PCA"


def detection_baselines(records, r_peaks: list) -> dict:
    """Scores that take no training, (records,) each. records: iterable of (5000, leads) as stored; R peaks of each."""
    steepness = [(np.abs(record).max(), np.abs(np.diff(record, axis=0)).mean()) for record in records]
    rhythm = np.array([describe_rhythm(positions) for positions in r_peaks], dtype=np.float64).reshape(-1, 2)
    return dict(zip(("largest amplitude", "mean |slope|", "heart rate", "RR irregularity"),
                    (*np.array(steepness, dtype=np.float64).T, *rhythm.T)))


def describe_rhythm(r_peaks: np.ndarray) -> tuple:
    """(beats a minute, RMS of successive RR differences / mean RR); (0, 0) and 0 where there are too few beats."""
    intervals = np.diff(r_peaks) / SAMPLING_RATE
    if not len(intervals):
        return 0.0, 0.0
    changes = np.diff(intervals)
    return 60 / intervals.mean(), np.sqrt(np.mean(changes ** 2)) / intervals.mean() if len(changes) else 0.0


def median_beat(record: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """The median of a record's valid beats, all leads, divided by its RMS: (120 * leads,) from (5000, leads) in mV."""
    positions, _ = valid_beats(r_peaks)
    samples = positions[:, None] + np.arange(-BEAT_BEFORE, BEAT_LENGTH - BEAT_BEFORE, THINNING)
    beat = np.median(record[samples], axis=0)
    return (beat / max(np.sqrt(np.mean(np.square(beat))), 1e-9)).ravel()


def fit_median_beats(normals, scale: dict, r_peaks: list, rows: np.ndarray) -> PCA:
    """Principal components of the median beats of rows of train.npy. normals: iterable of these (5000, leads).

    scale: "low" and "high" (records, leads) in mV of all of train.npy; they undo its normalisation, which hides how
    large the leads are beside each other. r_peaks: of all of train.npy.
    """
    beats = np.stack([median_beat((record + 1) / 2 * (scale["high"][row] - scale["low"][row]) + scale["low"][row],
                                  r_peaks[row]) for record, row in zip(normals, rows)])
    return PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(beats)


def score_median_beats(fitted: PCA, records, r_peaks: list) -> np.ndarray:
    """Squared Mahalanobis distance plus squared residual, each averaged over its dimensions: (records,).

    records: iterable of (5000, leads) in mV; r_peaks: of each.
    """
    beats = np.stack([median_beat(record, positions) for record, positions in zip(records, r_peaks)])
    inside = fitted.transform(beats)
    outside = beats - fitted.inverse_transform(inside)
    spare = beats.shape[1] - COMPONENTS
    return (np.square(inside) / fitted.explained_variance_).mean(axis=1) \
        + np.square(outside).sum(axis=1) / (fitted.noise_variance_ * spare)


def localization_baselines(records, r_peaks: list) -> dict:
    """Maps that know nothing of ECGs but where the R peaks are, (records, 4800, leads) each.

    records: iterable of (5000, leads), normalised; r_peaks: of each, those too near to an end for a beat included. Near
    an R peak (where there is none, a window that is scored), steep, or far from the lead's median is anomalous; the
    last two are smoothed like the scores.
    """
    def smooth(maps):
        return smooth_maps(torch.from_numpy(maps)).numpy()
    normalised = np.stack([normalize_leads(record) for record in records]).astype(np.float32)
    nearness = np.zeros_like(normalised)
    for row, positions in enumerate(r_peaks):
        positions = positions if len(positions) else valid_beats(positions)[0]
        nearness[row] = -np.abs(np.arange(normalised.shape[1])[:, None] - positions).min(axis=1)[:, None]
    return {"nearness to an R peak": crop_global(nearness),
            "|slope|": smooth(crop_global(np.abs(np.gradient(normalised, axis=1)))),
            "|amplitude|": smooth(crop_global(np.abs(normalised - np.median(normalised, axis=1, keepdims=True))))}
