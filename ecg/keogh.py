"""Keogh's seven ECG series with one discord each (Keogh et al., ICDM 2005, HOT SAX): windows, and the way back.

NAME_train.csv and NAME_test.csv have a sample a row and no header: two channels, and a label that is 1 in the one
anomalous run of the test series. They are the labelled series that RNN-Time-series-Anomaly-Detection (chickenbestlover,
GitHub) holds as pickles of such rows. The values are not filtered; their unit, zero line and rate are not stated.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg.signals import RECORD_LENGTH
from utils import UserError

SERIES = ("chfdb_chf01_275", "chfdb_chf13_45590", "ltstdb_20221_43", "ltstdb_20321_240", "mitdb__100_180", "stdb_308_0",
          "xmitdb_x108_0")
CHANNELS = 2
WINDOW, TRAINING_STRIDE, TEST_STRIDE = 320, 40, 160
STRETCH = 1.5                                   # a window becomes a beat of the network, 480 samples
FIRST = 2260                                    # of a record's samples, where its window begins: in the middle
LABELS = {"train": {0}, "test": {0, 1}}


@dataclass
class Series:
    """train, test: (samples, 2); labels: of the test samples, (samples,), 1 = anomalous."""
    name: str
    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray


def read_series(folder, name: str) -> Series:
    """A series from its two files. Raises UserError where one is missing, or not what is described above."""
    rows = {}
    for part, labels in LABELS.items():
        path = Path(folder) / f"{name}_{part}.csv"
        try:
            rows[part] = np.array([line.split(",") for line in path.read_text().splitlines()], dtype=float, ndmin=2)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; name the folder of Keogh's series with --keogh_path") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as rows of numbers ({str(error)[:80]}); get it again") from error
        samples, columns = rows[part].shape
        if (columns != CHANNELS + 1 or samples < WINDOW or not np.isfinite(rows[part]).all()
                or set(rows[part][:, CHANNELS]) != labels):
            raise UserError(f"{path} must have {WINDOW} rows or more of two finite values and a label, which is "
                            f"{' or '.join(map(str, labels))}; get it again")
    return Series(name, rows["train"][:, :CHANNELS], rows["test"][:, :CHANNELS], rows["test"][:, CHANNELS])


def window_starts(length: int, stride: int) -> np.ndarray:
    """Where the windows of a series begin: every stride samples, and one more that reaches its end."""
    return np.unique(np.r_[0:length - WINDOW + 1:stride, length - WINDOW])


def cut_windows(signal: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The windows (n, 320, 2) of a signal (samples, 2)."""
    return signal[starts[:, None] + np.arange(WINDOW)]


def make_records(signal: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """A record (n, 5000, 2) float32 around each window, stretched; the series' first and last values go on forever.

    Its samples 2260:2740 are the window.
    """
    places = starts[:, None] + (np.arange(RECORD_LENGTH) - FIRST) / STRETCH                         # (n, 5000)
    return np.stack([np.interp(places, np.arange(len(signal)), channel) for channel in signal.T], 2).astype(np.float32)


def shrink(errors: np.ndarray) -> np.ndarray:
    """The values of stretched windows (n, 480) at the samples of the series: (n, 320)."""
    return np.stack([np.interp(np.arange(WINDOW) * STRETCH, np.arange(len(row)), row) for row in errors])


def lay_down(values: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The values of windows (n, 320), which cover a series, at its samples: (length,), the mean where they overlap."""
    places = (starts[:, None] + np.arange(WINDOW)).ravel()
    return np.bincount(places, values.ravel(), length) / np.bincount(places, minlength=length)
