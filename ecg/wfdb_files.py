"""WFDB records (a .hea header and its signal files) as PhysioNet publishes them, read block by block.

wfdb is imported where it is used: training and scoring on prepared arrays do not need it.
"""
import re
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

import numpy as np

from ecg.leads import Leads, find_leads, millivolts_in
from ecg.signals import RECORD_LENGTH, SAMPLING_RATE, RecordError, resample
from utils import UserError

SAMPLES_AT_ONCE = 1 << 16
MOST_PER_FRAME = 500                # samples a frame, and of skew; damaged headers ask for billions
GAIN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\([-+]?\d+\))?(?:/(\S+))?")    # 1000(0)/mV


@dataclass
class Recording:
    """A recording before its samples are read. Reading blocks may raise RecordError."""
    rate: float | None              # Hz; None: the file does not state it
    samples: int | None             # None: nobody knows before they are read
    blocks: object                  # an iterator over (n, 12) mV at this rate
    notes: list                     # what was noticed, sentences without a full stop


def read_record(path, sampling_rate: int) -> np.ndarray:
    """Read a record of 10 s (path without extension) as (5000, 12) mV at 500 Hz, leads in the order of LEAD_NAMES.

    Leads are found by name, whatever their order and case. Raises RecordError where the file cannot be read, the rate
    is not sampling_rate, the length not 10 s, a lead is absent or there twice, its gain not stated, its samples do not
    add up to the header's checksum, or one of them is not finite.
    """
    recording = open_wfdb(f"{path}.hea")
    if recording.rate != sampling_rate:
        raise RecordError(f"sampled at {recording.rate or 0:g} Hz, expected {sampling_rate}")
    expected = sampling_rate * RECORD_LENGTH // SAMPLING_RATE
    if recording.samples not in (None, expected):
        raise RecordError(f"{recording.samples / sampling_rate:g} s long, expected 10")
    signal = np.concatenate(list(recording.blocks))
    if len(signal) != expected:
        raise RecordError(f"{len(signal) / sampling_rate:g} s long, expected 10")
    return resample(signal, sampling_rate)


def find_header(path) -> Path:
    """The header of a record that is named with or without it: X, X.hea, X.dat, X.mat. Raises RecordError."""
    path = Path(path)
    candidates = [path.with_name(f"{path.name}.hea"), path.with_suffix(".hea")]
    if path.suffix.lower() == ".hea":
        candidates = [path]
    for candidate in candidates:
        if isfile(candidate):
            return candidate
    raise RecordError(f"it is neither a .csv file nor a WFDB record, as {candidates[-1]} is missing",
                      "name another path")


def open_wfdb(header_path) -> Recording:
    """Open the record of a header. Raises RecordError, and UserError where wfdb is not installed."""
    try:
        import wfdb
    except ImportError as error:
        raise UserError("wfdb is not installed, and reads WFDB records; pip install -r requirements.txt") from error
    header_path = Path(header_path)
    stem = str(header_path)[:-len(".hea")]
    try:
        header = wfdb.rdheader(stem)
        states_rate, gains = stated_in_header(header_path)
    except Exception as error:      # wfdb raises whatever its parser trips over; each means an unreadable header
        raise RecordError(f"unreadable header ({type(error).__name__}: {error})") from error
    require_readable(header, header_path.parent)

    def factor_of(column, lead):
        gain, unit = gains[column] if len(gains) == header.n_sig else (None, None)
        if not gain or gain != header.adc_gain[column]:             # 0 means unknown, and wfdb takes 200
            raise RecordError(f"the header does not state the gain of lead {lead}", "add it, such as 1000/mV")
        return millivolts_in(unit or "mV", lead)                    # WFDB's default
    leads = find_leads(header.sig_name, factor_of)
    return Recording(header.fs if states_rate else None, header.sig_len, read_blocks(stem, header, leads), leads.notes)


def require_readable(header, folder: Path):
    """Raise RecordError for a wfdb header that wfdb should not be asked to read the signals of."""
    if getattr(header, "n_seg", None) is not None:
        raise RecordError("more than one segment", "give the segments one by one")
    if not header.n_sig:
        raise RecordError("no signals")
    if max(*header.samps_per_frame, *(abs(skew or 0) for skew in header.skew)) > MOST_PER_FRAME:
        raise RecordError(f"a frame or skew of more than {MOST_PER_FRAME} samples")
    for name in header.file_name:
        if not isfile(folder / name):              # False also for a name that is too long
            raise RecordError(f"its signal file {folder / name} is missing", "put it beside the header, or correct its "
                              "name there")


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
    stated = [GAIN.fullmatch((*fields, "", "")[2]) for fields in others]
    return len(first) > 2, [(float(match[1]), match[2]) if match else (None, None) for match in stated]


def read_blocks(stem: str, header, leads: Leads):
    """Yield (n, 12) mV. Raises RecordError, at the end where the samples do not add up to the header's checksums.

    wfdb itself compares them on writing alone. Every record of PTB-XL and LUDB passes. A column without a checksum
    passes, as do columns that wfdb shifts (skew) or averages (several samples a frame).
    """
    import wfdb
    totals = np.zeros(header.n_sig, dtype=np.int64)
    for start in range(0, header.sig_len or 1, SAMPLES_AT_ONCE):
        end = min(start + SAMPLES_AT_ONCE, header.sig_len) if header.sig_len else None      # None: to the end
        try:
            record = wfdb.rdrecord(stem, sampfrom=start, sampto=end, physical=False)
            totals += record.calc_checksum()
            values = record.dac()
        except Exception as error:      # wfdb raises whatever it trips over, such as a file that is too short
            raise RecordError(f"unreadable samples ({type(error).__name__}: {error})", "download it again") from error
        yield leads.of(values, start, header.fs)
    for column in leads.columns:
        stated = header.checksum[column]
        if (stated is not None and not header.skew[column] and header.samps_per_frame[column] == 1
                and (int(totals[column]) - stated) % 2 ** 16):
            raise RecordError(f"the samples of lead {header.sig_name[column]} do not add up to their checksum",
                              "download it again")
