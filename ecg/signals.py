"""What happens to a signal before it becomes a row of an array: resampling, filter, min-max; and what is no ECG."""
from fractions import Fraction

import numpy as np
from scipy.signal import butter, filtfilt, resample_poly

from utils import scale_minmax

SAMPLING_RATE = 500                 # Hz, of every array; other records are resampled on reading
MOST_PARTS = 10_000                 # resampling is by a fraction of whole numbers up to this, exact for whole rates
RECORD_LENGTH = 5000                # samples, 10 s
LEAD_NAMES = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LEAD_II = 1                         # the lead that R peaks are found in
PASS_BAND = (1.0, 25.0)             # Hz
FILTER_ORDER = 2
ROUNDING = 1e-9                     # of a lead's values: what varies less is flat
PLAUSIBLE_HEIGHT = (0.02, 50)       # mV from the lowest to the highest value of a lead, the median of many
LARGEST_MILLIVOLTS = 1e6            # no ECG comes near it; beyond it scores would leave the range of float32


class RecordError(Exception):
    """A record that cannot be used. The message is the reason, for the audit; remedy: what its owner can do."""

    def __init__(self, reason: str, remedy: str = "mend it, or leave it out"):
        super().__init__(" ".join(reason.split()))
        self.remedy = remedy


def resampling_ratio(sampling_rate: float) -> Fraction:
    """Samples at 500 Hz for one at sampling_rate, Hz."""
    return (SAMPLING_RATE / Fraction(sampling_rate)).limit_denominator(MOST_PARTS)


def resample(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """(samples, leads) at sampling_rate, Hz -> the same span at 500 Hz, by a polyphase filter.

    padtype="line" removes each lead's straight line first, so that the ends do not ring. A flat lead stays flat.
    """
    if sampling_rate == SAMPLING_RATE:
        return signal
    ratio = resampling_ratio(sampling_rate)
    resampled = resample_poly(signal, ratio.numerator, ratio.denominator, axis=0, padtype="line")
    return np.where(flat_leads(signal), signal[0], resampled)       # the filter adds a ripple to an offset


def flat_leads(signal: np.ndarray) -> np.ndarray:
    """Which leads of (samples, leads) are flat, up to rounding: bool (leads,)."""
    return np.ptp(signal, axis=0) <= ROUNDING * np.abs(signal).max(axis=0)


def filter_leads(signal: np.ndarray) -> np.ndarray:
    """Zero-phase Butterworth band-pass of (samples, leads) at 500 Hz: order 2 high-pass 1 Hz, then low-pass 25 Hz.

    A flat lead becomes 0, whatever its offset. The published code calls HeartPy's 35 Hz "notch" as well, which at
    500 Hz is an exact no-op.
    """
    flat = flat_leads(signal)       # the filter leaves rounding errors, which normalize_leads would blow up to [-1, 1]
    for cutoff, kind in zip(PASS_BAND, ("highpass", "lowpass")):
        signal = filtfilt(*butter(FILTER_ORDER, cutoff, kind, fs=SAMPLING_RATE), signal, axis=0)
    return np.where(flat, 0.0, signal)


def normalize_leads(signal: np.ndarray) -> np.ndarray:
    """Min-max each lead of (samples, leads) to [-1, 1]; a flat lead becomes 0, not 0 / 0."""
    return scale_minmax(signal, signal.min(axis=0), signal.max(axis=0))


def compand(millivolts: np.ndarray, scale, exponent: float) -> np.ndarray:
    """Small waves raised: sign(x) min(1, |x| / scale)^exponent of (..., leads). scale: mV that become 1, (leads,)."""
    return np.sign(millivolts) * np.minimum(1, np.abs(millivolts) / scale) ** exponent


def companding_scale(millivolts: np.ndarray) -> np.ndarray:
    """The scale of compand(), from (..., leads) of normals: twice what a lead exceeds 1 % of the time, mV (leads,)."""
    return 2 * np.quantile(np.abs(millivolts).reshape(-1, millivolts.shape[-1]), 0.99, axis=0)


def median_height(records: np.ndarray) -> float:
    """What the median lead of records (n, samples, leads) spans. Flat leads tell nothing; 0 where all are flat."""
    heights = np.ptp(records, axis=1)                                                           # (n, leads)
    return float(np.median(heights[heights > 0])) if heights.any() else 0.0


def doubt_height(height: float) -> str:
    """What is doubtful about a median_height taken for mV: a sentence without a full stop, or ""."""
    if not height or PLAUSIBLE_HEIGHT[0] <= height <= PLAUSIBLE_HEIGHT[1]:
        return ""
    guesses = ("the values may be volts, or mV that are called uV" if height < PLAUSIBLE_HEIGHT[0] else
               "the values may be uV that are called mV, or steps of a converter")
    return (f"a lead spans {height:.3g} mV (median), but an ECG's spans about 1 mV: {guesses}; no score means anything "
            "before that is corrected")
