"""What lesions are made of: the recorded waves of a normal ECG, taken off their baseline, and smooth windows in time.

Only the eight independent leads I, II, V1 ... V6 are handled here, (5000, 8) in mV at 500 Hz.
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import butter, filtfilt
from scipy.signal.windows import tukey

from ecg.leads import INDEPENDENT, TO_TWELVE
from ecg.signals import FILTER_ORDER, PASS_BAND, RECORD_LENGTH, SAMPLING_RATE
from ecg.waves import Waves, find_waves, phases_of, samples

TIME = np.arange(RECORD_LENGTH)
HIGH_PASS, LOW_PASS = (butter(FILTER_ORDER, cutoff, kind, fs=SAMPLING_RATE)
                       for cutoff, kind in zip(PASS_BAND, ("highpass", "lowpass")))


@dataclass
class Ecg:
    """A normal ECG to implant in: signal (5000, 12) mV, r_peaks (n,) samples, and its waves."""
    signal: np.ndarray
    r_peaks: np.ndarray
    waves: Waves

    @cached_property
    def eight(self) -> np.ndarray:
        """The independent leads, (5000, 8) mV."""
        return self.signal[:, INDEPENDENT].astype(np.float64)

    @cached_property
    def smooth(self) -> np.ndarray:
        """The same without what is faster than P and T: what stays when such a wave is taken away is the noise."""
        return gaussian_filter1d(self.eight, samples(12), axis=0)

    @property
    def beats(self) -> list:
        """R peaks with one more at either end, whose T or P may lie in the record."""
        return [self.r_peaks[0] - self.waves.rr, *self.r_peaks, self.r_peaks[-1] + self.waves.rr]

    def typical(self, onset: int, end: int) -> np.ndarray:
        """The median beat from onset to end (samples after R) above the line between them, eight leads."""
        part = self.waves.part(onset, end)[:, INDEPENDENT]
        return part - np.linspace(part[0], part[-1], len(part))

    @property
    def steady_beats(self) -> np.ndarray:
        """The indices of R peaks amid a steady rhythm, a second or more from either end."""
        steady = np.abs(np.diff(self.r_peaks) - self.waves.rr) < 0.15 * self.waves.rr
        inside = (self.r_peaks >= SAMPLING_RATE) & (self.r_peaks < RECORD_LENGTH - SAMPLING_RATE)
        return 1 + np.flatnonzero(steady[:-1] & steady[1:] & inside[1:-1])

    @property
    def voltage(self) -> float:
        """The height of QRS from its lowest to its highest, mV, the median over the leads."""
        return float(np.median(np.ptp(self.waves.part(*self.waves.qrs), axis=0)))

    @property
    def phases(self) -> np.ndarray:
        """The phase of each sample as recorded, uint8 (5000,)."""
        return phases_of(self.waves, self.beats, RECORD_LENGTH)


def read_ecg(signal: np.ndarray, r_peaks: np.ndarray) -> Ecg | None:
    """An ECG (5000, 12) mV to implant in; None where its waves cannot be found or a beat is unlike the others."""
    waves = find_waves(signal, r_peaks)
    return waves and Ecg(signal, np.asarray(r_peaks, dtype=np.int64), waves)


def window(start: float, full: float, fall: float, stop: float) -> np.ndarray:
    """(5000, 1): 0 until start, a raised cosine to 1 at full, 1 until fall, a raised cosine to 0 at stop."""
    return (1 - np.cos(np.pi * np.interp(TIME, (start, full, fall, stop), (0, 1, 1, 0))))[:, None] / 2


def recorded(signal: np.ndarray, start: int, stop: int, ramp: int = samples(16)) -> np.ndarray:
    """What a wave of (5000, leads) adds to the straight line between its ends, 0 outside.

    Where an end is outside the record, the line is level.
    """
    inside = [end for end in (start, stop) if 0 <= end < RECORD_LENGTH]
    if not inside:
        return np.zeros_like(signal)
    levels = [signal[max(0, end - 3):end + 4].mean(axis=0) for end in inside]
    share = np.clip((TIME - start) / (stop - start), 0, 1)[:, None]
    line = levels[0] + share * (levels[-1] - levels[0])
    return (signal - line) * window(start, start + ramp, stop - ramp, stop)


def recorded_beat(ecg: Ecg, r: int) -> np.ndarray:
    """The beat at r from before P to after T, (5000, 8) mV; outside QRS without the noise, which stays where it is."""
    (onset, end), p = ecg.waves.qrs, ecg.waves.p or (ecg.waves.qrs[0] - samples(60),)
    edges = onset - samples(40), onset - samples(20), end + samples(10), end + samples(30)
    sharp = window(*(r + edge for edge in edges))
    mixed = ecg.smooth + sharp * (ecg.eight - ecg.smooth)
    return recorded(mixed, r + p[0] - samples(12), r + ecg.waves.t[1] + samples(24))


def recorded_p(ecg: Ecg, r: int) -> tuple:
    """(start, wave (n, 8) mV): the P of the beat at r, which is the typical one where and as tall as it fits best."""
    onset, end = ecg.waves.p[0] - samples(12), min(ecg.waves.p[1] + samples(12), ecg.waves.qrs[0] - samples(8))
    shape = gaussian_filter1d(ecg.typical(onset, end), samples(8), axis=0) * tukey(end - onset, 0.35)[:, None]
    best = (0.0, r + onset)
    for start in range(r + onset - samples(24), r + onset + samples(24) + 1, 2):
        if 0 <= start and start + len(shape) <= RECORD_LENGTH:
            part = ecg.eight[start:start + len(shape)]
            fit = np.sum((part - np.linspace(part[0], part[-1], len(part))) * shape) / np.sum(shape ** 2)
            best = max(best, (fit, start))
    return best[1], shape * (np.clip(best[0], 0.7, 1.3) if best[0] else 1)


def ventricular_beat(forces: tuple, size: float, onset: int, width: int, end: int, rng) -> np.ndarray:
    """(5000, 8) mV: QRS along the forces, its beginning in a direction of its own, and T against them."""
    forces = np.array(forces) * rng.uniform(0.85, 1.15, len(forces)) * size
    first = rng.normal(0, 0.2 * size, len(forces))
    qrs = window(*(onset + share * width for share in (0, 0.5, 0.55, 1))) * forces
    qrs += window(*(onset + share * width for share in (0, 0.2, 0.25, 0.6))) * first
    peak = onset + width + 0.6 * (end - onset - width)
    return qrs - 0.4 * forces * window(onset + 0.8 * width, peak, peak, end)


def add(delta: np.ndarray, start: int, wave: np.ndarray):
    """Add a wave (n, leads) to delta (5000, leads) from a sample on; what lies outside the record is dropped."""
    first, last = max(0, start), min(RECORD_LENGTH, start + len(wave))
    if first < last:
        delta[first:last] += wave[first - start:last - start]


def on_leads(columns: list, values) -> np.ndarray:
    """(8,): values in these columns of the eight leads, 0 in the others."""
    of_leads = np.zeros(TO_TWELVE.shape[1])
    of_leads[columns] = values
    return of_leads


def low_pass(delta: np.ndarray) -> np.ndarray:
    """The 25 Hz low-pass of the ECG, for what is drawn; what is recorded has passed it."""
    return filtfilt(*LOW_PASS, delta, axis=0)


def high_pass(delta: np.ndarray) -> np.ndarray:
    """The 1 Hz high-pass of the ECG, zero-phase as there."""
    return filtfilt(*HIGH_PASS, delta, axis=0)
