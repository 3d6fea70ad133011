"""From a file of one's own to windows of 10 s: twelve leads, mV, 500 Hz. However long the file, memory stays small."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d

from ecg.csv_files import agreed_rate, open_csv
from ecg.signals import LEAD_NAMES, RECORD_LENGTH, SAMPLING_RATE, RecordError, resample, resampling_ratio
from ecg.wfdb_files import Recording, find_header, open_wfdb

LEAST_RATE, MOST_RATE = 100, 20_000         # Hz
SHORT = 5                                   # samples at 500 Hz, 10 ms, that a recording of 10 s may lack
FLAT_FOR = 1000                             # samples, 2 s; no heart is silent for longer in one lead alone
FLAT_RANGE = 0.01                           # of the leads' median height: what varies less is flat


def open_recording(path, record_rate: float | None = None, record_unit: str | None = None) -> Recording:
    """Open a WFDB record (with or without .hea, .dat, .mat) or a .csv file. Raises RecordError and UserError.

    record_rate, Hz, and record_unit: where a .csv file does not state them; a rate that is stated must agree.
    """
    if Path(path).suffix.lower() in (".csv", ".txt", ".tsv"):
        recording = open_csv(path, record_rate, record_unit)
    else:
        recording = open_wfdb(find_header(path))
        recording.rate = agreed_rate({"its header": recording.rate, "--record_rate": record_rate})
    if recording.rate is None:
        raise RecordError("its sampling rate is not stated", "give --record_rate, or state it in the header of a WFDB "
                          "record, in a first line '# rate: 250 Hz' of a .csv file")
    if not LEAST_RATE <= recording.rate <= MOST_RATE:                   # so NaN is refused too
        raise RecordError(f"a rate of {recording.rate:g} Hz, not {LEAST_RATE} to {MOST_RATE}", "state the rate in Hz, "
                          "and times in seconds")
    return recording


@dataclass
class Tail:
    """The part of a recording that is in memory. signal: (n, 12) mV; first: the number of its first sample."""
    signal: np.ndarray
    first: int

    def window(self, start: int, rate: float) -> np.ndarray:
        """The 10 s from a sample at 500 Hz on, (5000, 12)."""
        first, end = span_of(start, rate)
        ratio = resampling_ratio(rate)
        part = resample(self.signal[first - self.first:end - self.first], rate)
        skipped = start - first * ratio.numerator // ratio.denominator
        return part[skipped:skipped + RECORD_LENGTH]

    def forget(self, before: int):
        """Drop what comes before this sample."""
        self.signal, self.first = self.signal[max(before - self.first, 0):], max(before, self.first)


def span_of(start: int, rate: float) -> tuple:
    """The (first, end) samples at rate that tell the 10 s from sample start at 500 Hz on.

    So much on either side is added as the filter of resampling reaches, twice; first is a whole sample at 500 Hz too.
    """
    ratio = resampling_ratio(rate)
    reach = math.ceil(20 * max(1, 1 / ratio)) if ratio != 1 else 0
    first = max(0, math.floor(start / ratio) - reach) // ratio.denominator * ratio.denominator
    return first, math.ceil((start + RECORD_LENGTH) / ratio) + reach


def windows_of(recording: Recording):
    """Yield (start, (5000, 12) mV at 500 Hz): windows one after the other, the last one at the end.

    start: a sample at 500 Hz. So the last two overlap where the length is not a multiple of 10 s, and no sample is left
    out. A recording that lacks up to 10 ms of 10 s is padded with its last value, which recording.notes says.
    Raises RecordError where it is shorter, or cannot be read on.
    """
    rate, tail, start = recording.rate, Tail(np.zeros((0, len(LEAD_NAMES))), 0), 0
    for block in recording.blocks:
        tail.signal = np.concatenate([tail.signal, block])
        while tail.first + len(tail.signal) >= span_of(start, rate)[1]:
            yield start, tail.window(start, rate)
            start += RECORD_LENGTH
        tail.forget(span_of(max(start - RECORD_LENGTH, 0), rate)[0])            # the last window reaches back
    samples = tail.first + len(tail.signal)
    length = math.ceil(samples * resampling_ratio(rate))
    while start + RECORD_LENGTH <= length:
        yield start, tail.window(start, rate)
        start += RECORD_LENGTH
    if start < length and length >= RECORD_LENGTH:
        yield length - RECORD_LENGTH, tail.window(length - RECORD_LENGTH, rate)
    elif length < RECORD_LENGTH:
        lacking = RECORD_LENGTH - length
        if lacking > SHORT:
            raise RecordError(f"{samples / rate:.4g} s long, and 10 s is the least", "leave it out")
        recording.notes.append(f"{1000 * lacking / SAMPLING_RATE:g} ms short of 10 s, padded with its last value")
        yield 0, np.pad(tail.window(0, rate), ((0, lacking), (0, 0)), mode="edge")


def find_flat(window: np.ndarray) -> dict:
    """Where leads of a window (5000, 12) are flat for 2 s or longer: {lead: [(start, end) in s of the window]}.

    That is how an electrode shows which has no contact. Rounding and a little noise count as flat.
    """
    heights = np.ptp(window, axis=0)
    limit = FLAT_RANGE * np.median(heights[heights > 0]) if heights.any() else 0.0
    limit = limit + 1e-9 * np.abs(window).max(axis=0)
    before = FLAT_FOR // 2                                                      # a window of FLAT_FOR samples around
    flat = maximum_filter1d(window, FLAT_FOR, axis=0) - minimum_filter1d(window, FLAT_FOR, axis=0) <= limit
    flat[:before], flat[len(flat) - before + 1:] = flat[before], flat[len(flat) - before]
    spans = {}
    for lead, of_lead in zip(LEAD_NAMES, flat.T):
        edges = np.flatnonzero(np.diff(of_lead, prepend=False, append=False))   # of the middles of flat stretches
        spans[lead] = [(max(start - before, 0) / SAMPLING_RATE, min(end + before, len(window)) / SAMPLING_RATE)
                       for start, end in zip(edges[::2], edges[1::2])]
    return {lead: of_lead for lead, of_lead in spans.items() if of_lead}


def describe_flat(flat: dict) -> str:
    """What find_flat found, as text: "V1 0-10; II, III 3.2-6"."""
    leads_of = {}
    for lead, spans in flat.items():
        leads_of.setdefault(", ".join(f"{start:.3g}-{end:.3g}" for start, end in spans), []).append(lead)
    return "; ".join(f"{'all leads' if len(leads) == len(LEAD_NAMES) else ', '.join(leads)} {spans}"
                     for spans, leads in leads_of.items())
