"""From a WFDB record to a filtered 12-lead ECG and its R peaks: what happens to a signal before it becomes an array.

wfdb and heartpy are imported where they are used: training and scoring on prepared arrays need neither.
"""
import os
import warnings
from pathlib import Path

import numpy as np
from scipy.signal import butter, filtfilt, resample_poly

from utils import UserError

SAMPLING_RATE = 500                 # Hz, of every array; 100 Hz records are resampled on reading
RECORD_LENGTH = 5000                # samples, 10 s
LEAD_NAMES = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LEAD_II = 1                         # the lead that R peaks are found in
PASS_BAND = (1.0, 25.0)             # Hz
FILTER_ORDER = 2
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3}       # not "v": wfdb reads a Greek micro sign as no letter, and µV as V


class RecordError(Exception):
    """A record that cannot be used. The message is the reason, for the audit."""


def read_record(path, sampling_rate: int) -> np.ndarray:
    """Read a WFDB record (path without extension) as (5000, 12) mV at 500 Hz, leads in the order of LEAD_NAMES.

    Leads are found by name, whatever their order and case. Raises RecordError where the file cannot be read, the rate
    is not sampling_rate, the length not 10 s, a lead is absent, or a sample is not finite.
    """
    import wfdb
    try:
        signal, fields = wfdb.rdsamp(str(path))
    except Exception as error:      # wfdb raises whatever its parser trips over; each means an unreadable record
        reason = " ".join(str(error).split()).replace(f"{Path(path).parent}{os.sep}", "")
        raise RecordError(f"unreadable ({type(error).__name__}: {reason[:100]})") from error
    if signal is None:
        raise RecordError("no signals")
    if fields["fs"] != sampling_rate:
        raise RecordError(f"sampled at {fields['fs']:g} Hz, expected {sampling_rate}")
    if len(signal) != sampling_rate * RECORD_LENGTH // SAMPLING_RATE:
        raise RecordError(f"{len(signal) / sampling_rate:g} s long, expected 10")
    position = {str(name).strip().lower(): column for column, name in enumerate(fields["sig_name"])}
    absent = [lead for lead in LEAD_NAMES if lead.lower() not in position]
    if absent:
        raise RecordError(f"no lead {', '.join(absent)}")
    columns = [position[lead.lower()] for lead in LEAD_NAMES]
    units = [fields["units"][column] for column in columns]
    unknown = sorted({unit for unit in units if unit.lower() not in MILLIVOLTS})
    if unknown:
        raise RecordError(f"unit {', '.join(unknown)}, expected mV")
    signal = signal[:, columns] * [MILLIVOLTS[unit.lower()] for unit in units]
    for lead, column in zip(LEAD_NAMES, signal.T):
        if not np.isfinite(column).all():
            raise RecordError(f"missing samples in lead {lead}")
    return resample(signal, sampling_rate)


def resample(signal: np.ndarray, sampling_rate: int) -> np.ndarray:
    """(samples, leads) at sampling_rate -> the same span at 500 Hz, by a polyphase filter.

    padtype="line" removes each lead's straight line first, so that the ends do not ring.
    """
    if sampling_rate == SAMPLING_RATE:
        return signal
    return resample_poly(signal, SAMPLING_RATE, sampling_rate, axis=0, padtype="line")


def filter_leads(signal: np.ndarray) -> np.ndarray:
    """Zero-phase Butterworth band-pass of (samples, leads) at 500 Hz: order 2 high-pass 1 Hz, then low-pass 25 Hz.

    The published code calls HeartPy's 35 Hz "notch" as well, which at 500 Hz is an exact no-op.
    """
    for cutoff, kind in zip(PASS_BAND, ("highpass", "lowpass")):
        signal = filtfilt(*butter(FILTER_ORDER, cutoff, kind, fs=SAMPLING_RATE), signal, axis=0)
    return signal


def normalize_leads(signal: np.ndarray) -> np.ndarray:
    """Min-max each lead of (samples, leads) to [-1, 1]; a flat lead becomes 0, not 0 / 0."""
    low, high = signal.min(axis=0), signal.max(axis=0)
    flat = high == low
    return np.where(flat, 0.0, 2 * (signal - low) / np.where(flat, 1.0, high - low) - 1)


def find_r_peaks(lead: np.ndarray) -> np.ndarray:
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
