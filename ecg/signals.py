"""From a WFDB record to a filtered 12-lead ECG and its R peaks: what happens to a signal before it becomes an array.

wfdb and heartpy are imported where they are used: training and scoring on prepared arrays need neither.
"""
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy.signal import butter, filtfilt, resample_poly

from utils import UserError, scale_minmax

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
GAIN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\([-+]?\d+\))?/(\S+)")    # in WFDB: 1000(0)/mV
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3}       # not "v": wfdb reads a Greek micro sign as no letter, and µV as V


class RecordError(Exception):
    """A record that cannot be used. The message is the reason, for the audit."""


def read_record(path, sampling_rate: int) -> np.ndarray:
    """Read a WFDB record (path without extension) as (5000, 12) mV at 500 Hz, leads in the order of LEAD_NAMES.

    Leads are found by name, whatever their order and case. Raises RecordError where the file cannot be read, the rate
    is not sampling_rate, the length not 10 s, a lead is absent or there twice, its gain or unit not stated, its samples
    do not add up to the header's checksum, or one of them is not finite.
    """
    record, signal, damaged = read_signals(path, lambda header: require_readable(header, sampling_rate))
    if len(signal) != sampling_rate * RECORD_LENGTH // SAMPLING_RATE:
        raise RecordError(f"{len(signal) / sampling_rate:g} s long, expected 10")
    units = units_of_leads(record, stated_in_header(f"{path}.hea")[1])
    unknown = sorted({unit for unit in units if unit.lower() not in MILLIVOLTS})
    if unknown:
        raise RecordError(f"unit {', '.join(unknown)}, expected mV")
    factors = [MILLIVOLTS[unit.lower()] for unit in units]
    return resample(order_leads(signal, record.sig_name, factors, damaged), sampling_rate)


def read_signals(path, require) -> tuple:
    """Read a WFDB record (path without extension): (wfdb.Record, all signals (samples, n), damaged columns).

    require: is called with the header, and raises RecordError where wfdb shall not go on. Raises RecordError, and
    UserError where wfdb is not installed.
    """
    try:
        import wfdb
    except ImportError as error:
        raise UserError("wfdb is not installed, and reads WFDB records; pip install -r requirements.txt") from error
    try:
        require(wfdb.rdheader(str(path)))
        record = wfdb.rdrecord(str(path), physical=False)
        return record, record.dac(), unlike_checksum(record)
    except RecordError:
        raise
    except Exception as error:      # wfdb raises whatever its parser trips over; each means an unreadable record
        reason = " ".join(str(error).split()).replace(f"{Path(path).parent}{os.sep}", "")
        raise RecordError(f"unreadable ({type(error).__name__}: {reason[:100]})") from error


def order_leads(signal: np.ndarray, names: list, factors: list, damaged: set = frozenset()) -> np.ndarray:
    """(samples, n) -> (samples, 12) in the order of LEAD_NAMES, each lead multiplied with its factor to be in mV.

    names: of the columns. Raises RecordError where a lead is absent or there twice, in damaged (columns), not finite,
    or larger than any ECG.
    """
    columns = columns_of_leads(names)
    signal = signal[:, columns] * factors
    for lead, column, samples in zip(LEAD_NAMES, columns, signal.T):
        if column in damaged:
            raise RecordError(f"the samples of lead {lead} do not add up to their checksum; download it again")
        if not np.isfinite(samples).all():
            raise RecordError(f"missing samples in lead {lead}")
        if np.abs(samples).max() > LARGEST_MILLIVOLTS:
            raise RecordError(f"lead {lead} reaches {np.abs(samples).max():.3g} mV; its gain or unit is wrong")
    return signal


def require_readable(header, sampling_rate: int | None = None):
    """Raise RecordError for a wfdb header of another rate or length, before wfdb allocates whatever it asks for.

    sampling_rate: of records of 10 s; where it is None, any rate and length will do.
    """
    if not header.n_sig:
        raise RecordError("no signals")
    if sampling_rate and header.fs != sampling_rate:
        raise RecordError(f"sampled at {header.fs:g} Hz, expected {sampling_rate}")
    if sampling_rate and header.sig_len not in (None, sampling_rate * RECORD_LENGTH // SAMPLING_RATE):
        raise RecordError(f"{header.sig_len / sampling_rate:g} s long, expected 10")
    if getattr(header, "n_seg", None) is not None:
        raise RecordError("more than one segment")
    if max(*header.samps_per_frame, *(abs(skew or 0) for skew in header.skew)) > SAMPLING_RATE:
        raise RecordError("a frame or skew of more than 500 samples")


def stated_in_header(path) -> tuple:
    """What a WFDB header states itself, where wfdb fills in defaults: (whether a rate, [(gain, unit)] of its signals).

    wfdb also drops the Greek letter of µV. The header must be one that wfdb has read.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    first, *others = (line.split() for line in text.splitlines() if line.strip() and line.strip()[0] != "#")
    found = [GAIN.fullmatch((*fields, "", "")[2]) for fields in others]
    return len(first) > 2, [(float(match[1]), match[2]) if match else (None, None) for match in found]


def units_of_leads(record, gains: list) -> list:
    """The units of LEAD_NAMES in a wfdb.Record, as its header states them. gains: of stated_in_header.

    Raises RecordError where a lead is absent, or the header does not state its gain and unit.
    """
    units = []
    for lead, column in zip(LEAD_NAMES, columns_of_leads(record.sig_name)):
        gain, unit = gains[column] if len(gains) == record.n_sig else (None, "")
        if not gain or gain != record.adc_gain[column]:             # 0 means unknown, and wfdb takes 200
            raise RecordError(f"the header does not state the gain and unit of lead {lead}, such as 1000/mV")
        units.append(unit)
    return units


def unlike_checksum(record) -> set:
    """The columns of a wfdb.Record, read with physical=False, whose samples do not add up to the header's checksum.

    wfdb itself compares them on writing alone. Every record of PTB-XL and LUDB passes. A column without a checksum
    passes, as do columns that wfdb shifted (skew) or averaged (several samples a frame).
    """
    return {column for column, (stated, skew, per_frame, found) in enumerate(zip(
        record.checksum, record.skew, record.samps_per_frame, record.calc_checksum(), strict=True))
        if stated is not None and not skew and per_frame == 1 and (found - stated) % 2 ** 16}


def columns_of_leads(names: list) -> list:
    """Where each of LEAD_NAMES stands among a record's names, whatever their case. Raises RecordError."""
    names = [str(name).strip().lower() for name in names]
    absent, doubled = ([lead for lead in LEAD_NAMES if test(names.count(lead.lower()))]
                       for test in (lambda count: count == 0, lambda count: count > 1))
    if absent:
        raise RecordError(f"no lead {', '.join(absent)}")
    if doubled:
        raise RecordError(f"more than one lead {', '.join(doubled)}")
    return [names.index(lead.lower()) for lead in LEAD_NAMES]


def resample(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """(samples, leads) at sampling_rate, Hz -> the same span at 500 Hz, by a polyphase filter.

    padtype="line" removes each lead's straight line first, so that the ends do not ring. A flat lead stays flat.
    """
    if sampling_rate == SAMPLING_RATE:
        return signal
    ratio = (SAMPLING_RATE / Fraction(sampling_rate)).limit_denominator(MOST_PARTS)
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


def doubt_amplitude(records: np.ndarray) -> str:
    """What is doubtful about the size of records (n, samples, leads), taken for mV: a sentence, or "".

    Judged is the median record, and of it the median lead; flat leads tell nothing.
    """
    heights = np.ptp(records, axis=1)                                                           # (n, leads)
    median = np.median(heights[heights > 0]) if heights.any() else 1.0
    if PLAUSIBLE_HEIGHT[0] <= median <= PLAUSIBLE_HEIGHT[1]:
        return ""
    small = median < PLAUSIBLE_HEIGHT[0]
    guesses = ("the values may be in volts, or may be mV that are called uV" if small else
               "the values may be in uV, or in steps of the analog-to-digital converter")
    return (f"a lead spans {median:.3g} mV (median), but an ECG's spans about 1 mV: {guesses}; the scores mean nothing "
            "before that is corrected")
