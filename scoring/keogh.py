"""How anomalous each point of a test series of Keogh's is: by a network, and without one.

A map is (samples,), higher = more anomalous. What is told of a window is told of all its points. Overlaps are averaged,
and every map is smoothed as all maps are.
"""
import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.decomposition import PCA

from ecg.arrays import Records
from ecg.keogh import (FIRST, STRETCH, TEST_STRIDE, TRAINING_STRIDE, WINDOW, Series, cut_windows, lay_down,
                       make_records, shrink, window_starts)
from model import BEAT_BEFORE, BEAT_LENGTH, GLOBAL_START, MCF
from scoring.beats_without_network import residual
from scoring.passes import SMOOTHING, Scorer
from scoring.protocols import CLEAN

COMPONENTS = 20                                             # of PCA, a quarter of the windows at most
STRIDES = {"": (TRAINING_STRIDE, TEST_STRIDE), ", every window": (1, 1)}        # of rivals: as the network's, and all


def open_windows(signal: np.ndarray, stride: int, name: str) -> tuple:
    """The windows of a series as Records with one beat each: (records, R peaks of every one, where they begin)."""
    starts = window_starts(len(signal), stride)
    return Records(make_records(signal, starts), name), [np.array([FIRST + BEAT_BEFORE])] * len(starts), starts


def smooth(points: np.ndarray) -> np.ndarray:
    """A map (samples,) smoothed by the Gaussian of all maps, in samples of the series."""
    return gaussian_filter1d(points, SMOOTHING / STRETCH)


def paint(scores: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The map of scores of windows (n,)."""
    return smooth(lay_down(np.repeat(scores[:, None], WINDOW, axis=1), starts, length))


@torch.inference_mode()
def map_by_network(model: MCF, series: Series) -> dict:
    """{name: map} of a network: its error at each point, and the mean error of each window."""
    records, r_peaks, starts = open_windows(series.test, TEST_STRIDE, f"{series.name}_test.csv")
    scorer = Scorer(model, CLEAN)
    block = scorer.prepare(records, r_peaks, np.arange(len(records)))
    maps = scorer.score_block(block, with_maps=True)[1][:, FIRST - GLOBAL_START:][:, :BEAT_LENGTH]      # (n, 480, 2)
    errors, length = shrink(maps.mean(dim=2).cpu().numpy()), len(series.test)
    return {"network": smooth(lay_down(errors, starts, length)),
            "network, by window": paint(errors.mean(axis=1), starts, length)}


def map_without_network(series: Series) -> dict:
    """{name: map}: the distance to the nearest training window, the residual of PCA, and the distance to the median."""
    maps, length = {}, len(series.test)
    for name, (training_stride, test_stride) in STRIDES.items():
        training = standardise(cut_windows(series.train, window_starts(len(series.train), training_stride)))
        starts = window_starts(length, test_stride)
        test = standardise(cut_windows(series.test, starts))
        pca = PCA(min(COMPONENTS, len(training) // 4), random_state=0).fit(training)
        maps["discord" + name] = paint(nearest_distances(training, test), starts, length)
        maps["PCA" + name] = paint(residual(pca, test), starts, length)
    usual = np.median(series.train, axis=0), series.train.std(axis=0)
    maps["|x - median|"] = smooth((np.abs(series.test - usual[0]) / (usual[1] + (usual[1] == 0))).mean(axis=1))
    return maps


def standardise(windows: np.ndarray) -> np.ndarray:
    """Windows (n, 320, 2), each channel of each less its mean, over its standard deviation: (n, 640). Flat ones: 0."""
    centred = windows - windows.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    return (centred / (deviation + (deviation == 0))).reshape(len(windows), -1)


def nearest_distances(training: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The Euclidean distance of each test window (n, features) to the nearest training window (m, features): (n,)."""
    squared = (test ** 2).sum(axis=1)[:, None] + (training ** 2).sum(axis=1) - 2 * test @ training.T        # (n, m)
    return np.sqrt(squared.min(axis=1).clip(min=0))
