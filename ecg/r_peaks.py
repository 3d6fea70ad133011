"""R peaks, by two detectors: HeartPy on lead II, as the paper has it, and the slope of all leads together.

A QRS complex differs from a T wave by how steep it is, in every lead; HeartPy counts tall T waves as beats. In the
slope every lead counts by its signal to noise, not by its unit: a record in mV and the same record after min-max have
the same beats.
"""
import warnings

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from ecg.signals import SAMPLING_RATE
from utils import UserError

MOST_DIFFERENCE = 0.25      # between the numbers of beats of two detectors that agree
SMOOTHING = 20              # samples, 40 ms: joins the upstroke and the downstroke of a QRS, wide ones too
REFRACTORY = 125            # samples, 250 ms: 240 beats a minute at most
STEEPEST = 98               # percentile of the slope: QRS complexes take more than 2 % of a record
THRESHOLD = 0.4             # of that percentile: in LUDB steep T waves reach 0.37, and no QRS is below 0.5
LATEST_T = 180              # samples, 360 ms after a beat: until then a T wave may be what is less steep than the beat,
T_WAVE = 0.6                # by this factor (Pan and Tompkins 1985, with 0.5); it matters where there is one lead only
QUIET = 0.05                # of a lead's root mean square slope: the least noise that it is taken to have
SPARSE = 4                  # samples: often enough for a median over the record, and four times as fast
HALF_WIDTH = 50             # samples, 100 ms before and after: the part of a beat that is laid on the median beat
FARTHEST = 30               # samples, 60 ms: no beat is moved farther to lie on it
ROUNDS = 2                  # of alignment; the second has the sharper median beat
ALIKE = 0.6                 # correlation with the median beat; below it a beat has another shape, and an R of its own


def find_r_peaks_by_heartpy(lead: np.ndarray) -> np.ndarray:
    """R peaks of a filtered lead (samples,) at 500 Hz, as sample indices (int32), found by HeartPy.

    The unit of the lead does not matter. Empty where HeartPy finds no plausible heart rate (40 to 180 a minute).
    Raises UserError where HeartPy is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # numpy's warnings inside HeartPy, pkg_resources' at its import
        try:
            import heartpy
        except ImportError as error:
            raise UserError("HeartPy is not installed, and finds the R peaks; pip install -r requirements.txt, or copy "
                            "the *_r_peaks.npz of the same arrays") from error
        try:
            working_data, _ = heartpy.process(np.asarray(lead, dtype=np.float64), SAMPLING_RATE)
        except Exception:       # on signals without a rhythm HeartPy raises BadSignalWarning, IndexError, ValueError...
            return np.zeros(0, dtype=np.int32)
    return np.asarray(working_data["peaklist"], dtype=np.int32)


def find_r_peaks_by_slope(signal: np.ndarray) -> np.ndarray:
    """R peaks of (samples, leads), filtered 1-25 Hz, at 500 Hz, as rising sample indices (int32).

    The unit and offset of a lead do not matter, and flat leads do not count; empty where all are flat. Beats of one
    shape are all met at the same moment: that of the tallest deflection, over all leads, of their median beat.
    """
    slope = np.gradient(signal, axis=0)
    size = np.sqrt(np.mean(slope ** 2, axis=0, dtype=np.float64))
    alive = size > 1e-9 * np.ptp(signal, axis=0).max(initial=0)
    if not alive.any():
        return np.zeros(0, dtype=np.int32)
    noise = np.maximum(np.median(np.abs(slope[::SPARSE, alive]), axis=0), QUIET * size[alive])
    slope = (slope[:, alive] / noise).astype(np.float32)
    curve = gaussian_filter1d(np.sqrt(np.sum(slope ** 2, axis=1)), SMOOTHING)
    peaks, _ = find_peaks(curve, height=THRESHOLD * np.percentile(curve, STEEPEST), distance=REFRACTORY)
    peaks = without_t_waves(peaks, curve[peaks])
    if len(peaks):
        peaks, alike = align(slope, peaks)
        beats = windows(signal[:, alive], peaks, HALF_WIDTH + FARTHEST) / noise
        peaks = peaks + np.where(alike, tallest(np.median(beats, axis=0)), tallest(beats))
    return peaks[(peaks >= 0) & (peaks < len(signal))].astype(np.int32)


def disagree(heartpy: int, slope: int) -> bool:
    """Whether the two detectors' numbers of beats differ by more than a quarter of the smaller one."""
    return max(heartpy, slope) > (1 + MOST_DIFFERENCE) * min(heartpy, slope)


def without_t_waves(peaks: np.ndarray, steepness: np.ndarray) -> np.ndarray:
    """Of peaks (n,) with their steepness (n,), those that are not the T wave of the one before."""
    beats = []
    for index, place in enumerate(peaks):
        if not (beats and place - peaks[beats[-1]] < LATEST_T and steepness[index] < T_WAVE * steepness[beats[-1]]):
            beats.append(index)
    return peaks[beats]


def windows(signal: np.ndarray, centres: np.ndarray, half_width: int) -> np.ndarray:
    """(samples, leads) -> (centres, 2 half_width + 1, leads); beyond the ends the first and last sample go on."""
    places = centres[:, None] + np.arange(-half_width, half_width + 1)
    return signal[np.clip(places, 0, len(signal) - 1)]


def align(slope: np.ndarray, peaks: np.ndarray) -> tuple:
    """Move beats (beats,) so that their slopes (samples, leads) lie on those of the median beat.

    Returns the new indices, those of another shape unmoved, and whether a beat has the shape of the median beat.
    """
    around, width = windows(slope, peaks, HALF_WIDTH + FARTHEST), 2 * HALF_WIDTH + 1
    energy = sliding_window_view(np.sum(around ** 2, axis=2), width, axis=1).sum(axis=2)
    moved = peaks
    for _ in range(ROUNDS):
        typical = np.median(windows(slope, moved, HALF_WIDTH), axis=0)
        padded = np.pad(typical, ((2 * FARTHEST,) * 2, (0, 0)))
        shifted = sliding_window_view(padded, around.shape[1], axis=0)[::-1]        # (2 FARTHEST + 1, leads, samples)
        match = np.tensordot(around, shifted, axes=((1, 2), (2, 1)))                # (beats, 2 FARTHEST + 1)
        match = match / np.sqrt(np.maximum(energy * np.sum(typical ** 2), np.finfo(np.float32).tiny))
        alike = match.max(axis=1) > ALIKE
        moved = peaks + np.where(alike, match.argmax(axis=1) - FARTHEST, 0)
    return moved, alike


def tallest(beats: np.ndarray) -> np.ndarray:
    """The tallest deflection over all leads, from the first sample's level, of windows (..., samples, leads).

    In samples after the middle, FARTHEST before or after it at most.
    """
    height = np.sum((beats - beats[..., :1, :]) ** 2, axis=-1)
    middle = height.shape[-1] // 2
    return np.argmax(height[..., middle - FARTHEST:middle + FARTHEST + 1], axis=-1) - FARTHEST
