"""Anomaly scores of beats without a network, which every network has to beat: their shape, and how early they come."""
import numpy as np
from scipy.ndimage import median_filter
from sklearn.decomposition import PCA

from dataloader import FIRST_R, LAST_R
from ecg.arrays import Records

PLACES = np.arange(-190, 250, 5)    # samples from R, 500 Hz: a beat as BeatGAN cuts it, at 100 Hz
COMPANDING = 0.35                   # power of the mV; chosen, as COMPONENTS, on validation beats
COMPONENTS, MOST = 20, 5000         # of the shape; training beats that it is fitted to
NEIGHBOURS = 9                      # beats around, whose median RR interval is the usual one


def score_shapes(records: Records, table: dict, training: np.ndarray) -> np.ndarray:
    """How unusual the shape of each beat is among training beats (beats,) bool: (beats,).

    By principal components of the companded mV: log(mean squared whitened component + residual over its usual size).
    table: of ecg.beats.Beats.
    """
    shapes = np.stack([records.signals[window][np.clip(place + PLACES, 0, records.signals.shape[1] - 1)].ravel()
                       for window, place in zip(table["window"], table["r_peak"])])
    shapes = np.sign(shapes) * np.abs(shapes) ** COMPANDING                                 # (beats, 88 * leads)
    normals = shapes[training][np.random.default_rng(0).permutation(np.count_nonzero(training))[:MOST]]
    pca = PCA(min(COMPONENTS, len(normals) // 4)).fit(normals)
    usual = np.median(residual(pca, normals))
    whitened = (pca.transform(shapes) ** 2 / pca.explained_variance_).mean(axis=1)
    return np.log(whitened + residual(pca, shapes) / usual)


def residual(pca: PCA, shapes: np.ndarray) -> np.ndarray:
    """The mean squared part of shapes (n, features) that the components do not tell: (n,)."""
    return ((shapes - pca.inverse_transform(pca.transform(shapes))) ** 2).mean(axis=1)


def score_earliness(table: dict) -> np.ndarray:
    """How early each beat comes, (beats,): minus log(RR interval before it / the median of those around it).

    The first beat of a record has the RR interval of the second.
    """
    times, scores = table["window"] * (LAST_R - FIRST_R - 1) + table["r_peak"], np.zeros(len(table["window"]))
    for record in np.unique(table["record"]):
        rows = np.flatnonzero(table["record"] == record)
        intervals = np.diff(times[rows]).astype(float)
        intervals = np.maximum(np.r_[intervals[:1], intervals], 1) if len(intervals) else np.ones(1)
        scores[rows] = -np.log(intervals / median_filter(intervals, NEIGHBOURS, mode="nearest"))
    return scores
