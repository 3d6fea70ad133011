"""A place in the beat: times from R at a rate of 60 a minute, the median beat on them, and the way back to the record.

Normals of all rates are compared at the same place, as in without_network.py: time is stretched by the RR interval.
"""
import numpy as np

from dataloader import valid_beats
from ecg.arrays import ROWS_AT_ONCE, Records
from ecg.signals import SAMPLING_RATE
from model import GLOBAL_LENGTH, GLOBAL_START
from scoring.without_network import interpolate, stretch_times, unstretch_times

TIMES = np.arange(-43, 60) / 100            # s from R: from before the longest PR interval to after T
PLACE = 5                                   # samples of a place, 10 ms
SAMPLES = np.arange(GLOBAL_START + PLACE // 2, GLOBAL_START + GLOBAL_LENGTH, PLACE)     # the middle of each: (960,)
LATEST_START = 0.42                         # of the RR interval before R: no beat begins earlier


def usual_interval(r_peaks: np.ndarray) -> float:
    """The median RR interval, s; 1 where there is none."""
    return float(np.median(np.diff(r_peaks))) / SAMPLING_RATE if len(r_peaks) > 1 else 1.0


def beat_at_times(record: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """The median beat of a record (5000, leads) at TIMES: (103, leads), in the record's unit."""
    moments = stretch_times(TIMES, usual_interval(r_peaks)) * SAMPLING_RATE
    return np.median(interpolate(record, valid_beats(r_peaks)[0][:, None] + moments), axis=0)


def typical_beats(records: Records, r_peaks: list, rows) -> tuple:
    """The median beats of rows at TIMES, (n, 103, leads) mV, and their usual RR intervals (n,), s; float32.

    r_peaks: of every record. Raises UserError where nobody knows the records' mV.
    """
    rows = np.asarray(rows)
    beats = [beat_at_times(record, r_peaks[row]) for start in range(0, len(rows), ROWS_AT_ONCE)
             for row, record in zip(rows[start:start + ROWS_AT_ONCE],
                                    records.millivolts(rows[start:start + ROWS_AT_ONCE]))]
    return np.array(beats, np.float32), np.array([usual_interval(r_peaks[row]) for row in rows], np.float32)


def lay_back(values: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """What holds for the places of a beat, (103, leads), at every beat of a record: (960, leads) at SAMPLES.

    A sample belongs to the beat that began last; before the first beat and after the last one there is one more.
    """
    rr = usual_interval(r_peaks)
    beats = np.asarray(r_peaks if len(r_peaks) else valid_beats(r_peaks)[0], dtype=float)
    beats = np.concatenate([[beats[0] - rr * SAMPLING_RATE], beats, [beats[-1] + rr * SAMPLING_RATE]])
    earliest = -stretch_times(TIMES[:1], rr)[0] * SAMPLING_RATE
    starts = beats[1:] - np.minimum(LATEST_START * np.diff(beats), earliest)
    seconds = (SAMPLES - beats[np.searchsorted(starts, SAMPLES, side="right")]) / SAMPLING_RATE
    return interpolate(values, (unstretch_times(seconds, rr) - TIMES[0]) * 100)
