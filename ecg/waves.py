"""Where the waves of a 12-lead ECG begin and end, from its median beat and all leads together (numpy and scipy alone).

The boundaries are those of the slope over all leads: the square root of the sum over leads of the squared derivative.
One boundary serves all leads and beats, in samples after the R peak. Times are in samples at 500 Hz, signals in mV.
"""
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from ecg.ludb import PHASES
from ecg.signals import SAMPLING_RATE

FEWEST_BEATS = 4                                # of a median beat
LEAST_CORRELATION = 0.85                        # of a QRS with the median one; below it is an artefact or other beat
EARLY, LATE = 0.65, 1.6                         # of the median RR: beyond stands a premature beat or a missed one
LEAST_P = 0.05                                  # mV: a P wave that is lower in every lead cannot be seen


def samples(milliseconds: float) -> int:
    """Milliseconds as samples at 500 Hz."""
    return round(milliseconds * SAMPLING_RATE / 1000)


@dataclass(frozen=True)
class Waves:
    """The median beat of a record and its waves. (onset, end): samples after R, the end exclusive."""
    rr: int                 # the median RR interval
    before: int             # the median beat begins so many samples before R
    beat: np.ndarray        # (samples, leads) mV
    p: tuple | None         # None where no P wave can be seen
    qrs: tuple
    t: tuple

    def part(self, onset: int, end: int) -> np.ndarray:
        """The median beat from onset to end, samples after R: (end - onset, leads) mV."""
        return self.beat[onset + self.before:end + self.before]


def find_waves(signal: np.ndarray, r_peaks: np.ndarray) -> Waves | None:
    """The waves of a filtered ECG (samples, leads) in mV.

    None where it has too few beats, a beat unlike the others or out of time, or no plausible waves."""
    if len(r_peaks) < FEWEST_BEATS + 1:
        return None
    intervals = np.diff(r_peaks)
    rr = int(np.median(intervals))
    if not samples(350) <= rr <= samples(1600) or intervals.min() < EARLY * rr or intervals.max() > LATE * rr:
        return None
    before, after = min(samples(340), int(0.5 * rr)), min(samples(640), int(0.75 * rr))
    whole = r_peaks[(r_peaks >= before) & (r_peaks + after <= len(signal))]
    if len(whole) < FEWEST_BEATS:
        return None
    beat = np.median([signal[r - before:r + after] for r in whole], axis=0)
    qrs = find_qrs(beat, before)
    t = find_t(beat, before, qrs, rr)
    if t is None or not all(alike(signal, whole, beat[before + qrs[0]:before + qrs[1]], qrs[0])):
        return None
    return Waves(rr, before, beat, find_p(beat, before, qrs, t[1] - rr), qrs, t)


def alike(signal: np.ndarray, r_peaks: np.ndarray, qrs: np.ndarray, onset: int) -> list:
    """Whether the QRS of each beat has the shape of qrs (n, leads), which begins onset samples after R."""
    parts = [signal[r + onset:r + onset + len(qrs)] for r in r_peaks]
    return [np.corrcoef((part - part.mean(axis=0)).ravel(), (qrs - qrs.mean(axis=0)).ravel())[0, 1] > LEAST_CORRELATION
            for part in parts]


def slope_of(beat: np.ndarray, sigma_ms: float) -> np.ndarray:
    """The slope over all leads of (samples, leads), smoothed by a Gaussian: (samples,) mV a sample."""
    return np.linalg.norm(gaussian_filter1d(beat, samples(sigma_ms), axis=0, order=1), axis=1)


def height_over(beat: np.ndarray, first: int, last: int) -> np.ndarray:
    """The distance of (samples, leads) from the straight line between two of its samples, all leads: (samples,) mV."""
    share = ((np.arange(len(beat)) - first) / (last - first))[:, None]
    return np.linalg.norm(beat - beat[first] - share * (beat[last] - beat[first]), axis=1)


def steep_edge(slope: np.ndarray, start: int, stop: int, share: float) -> int:
    """From the steepest sample between start and stop on towards stop: the first sample below a share of its slope.

    The least slope on the way where none is. stop may be left of start.
    """
    step = 1 if stop > start else -1
    way = slope[start:stop:step]
    steepest = int(np.argmax(way))
    rest = way[steepest:]
    below = np.flatnonzero(rest < share * rest[0])
    return start + step * (steepest + (int(below[0]) if len(below) else int(np.argmin(rest))))


def find_qrs(beat: np.ndarray, before: int) -> tuple:
    """(onset, end) of QRS: where the slope over all leads stays above a share of its maximum around R."""
    slope = slope_of(beat, 4)
    first, last = before - samples(80), before + samples(110)
    high = first + np.flatnonzero(slope[first:last] > 0.10 * slope[first:last].max())
    onset, end = int(high[0]) - before, int(high[-1]) + 1 - before
    return min(onset, -samples(24)), max(end, samples(30))


def find_t(beat: np.ndarray, before: int, qrs: tuple, rr: int) -> tuple | None:
    """(onset, end) of T, None where nothing rises from the level between T and P."""
    first = before + qrs[1] + samples(60)
    last = min(len(beat) - samples(20), before + int(min(0.6 * rr + samples(60), samples(520))))
    if last - first < samples(100):
        return None
    peak = first + int(np.argmax(height_over(beat, before + qrs[0], len(beat) - 1)[first:last]))
    slope = slope_of(beat, 12)
    end = steep_edge(slope, peak, min(peak + samples(170), len(beat) - 1), 0.2)
    onset = steep_edge(slope, peak, max(before + qrs[1] + samples(20), peak - samples(200)), 0.3)
    return (onset - before, end - before) if end - onset >= samples(60) else None


def find_p(beat: np.ndarray, before: int, qrs: tuple, t_end: int) -> tuple | None:
    """(onset, end) of P, None where none is seen between the last T (t_end, samples after R, below 0) and QRS."""
    first, last = max(samples(10), t_end + before), qrs[0] + before - samples(16)
    if last - first < samples(80):
        return None
    height = height_over(beat, first, last)[first:last]
    peak = first + int(np.argmax(height))
    slope = slope_of(beat, 8)
    onset = steep_edge(slope, peak, max(first - 1, peak - samples(90)), 0.25)
    end = steep_edge(slope, peak, min(last, peak + samples(80)), 0.25)
    if end - onset < samples(40) or np.abs(beat[peak] - (beat[onset] + beat[end]) / 2).max() < LEAST_P:
        return None
    return onset - before, end - before


def phases_of(waves: Waves, beats: np.ndarray, length: int) -> np.ndarray:
    """The phase of each sample, uint8 (length,), of beats at these R peaks, which may lie outside.

    1 + the index into ludb.PHASES, 0 where there is none. Where two beats overlap, the later one's P takes
    precedence over the TP, and the earlier one's T over the P.
    """
    phases, of_t = np.zeros(length, dtype=np.uint8), 1 + PHASES.index("T")
    p = waves.p or (waves.qrs[0], waves.qrs[0])
    for r, following in zip(beats, [*beats[1:], None]):
        stop = waves.t[1] + r if following is None else max(waves.t[1] + r, following + p[0])
        edges = np.array([r + p[0], r + p[1], r + waves.qrs[0], r + waves.qrs[1], r + waves.t[0], r + waves.t[1], stop])
        for code, (start, end) in enumerate(zip(edges, edges[1:]), 1):
            start, end = np.clip((start, end), 0, length)
            phases[start:end] = np.where(phases[start:end] == of_t, of_t, code)
    return phases
