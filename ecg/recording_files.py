"""From a file of one's own to twelve leads in mV at 500 Hz: WFDB records and .csv files, any rate, any order of leads.

A CSV file's first row names the leads, in any case, with their units or not, after comments or not:

    # rate: 250 Hz
    # unit: mV
    I,II,III,aVR,aVL,aVF,V1,V2,V3,V4,V5,V6             or  time,I [uV],II [uV],...

The comments may be left out where --record_rate or a column time (in seconds) tells the rate, and the names the units.
What a file does not tell is not guessed, what it tells twice must agree: else it is refused.
"""
import csv
import itertools
import re
import unicodedata
from array import array
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ecg import signals
from ecg.signals import LEAD_NAMES, MILLIVOLTS, RECORD_LENGTH
from utils import UserError

LEAST_RATE, MOST_RATE = 100, 20_000         # Hz
MOST_SAMPLES = 24 * 3600 * 1000             # 24 h at 1000 Hz, 8 GB in memory
TIME_NAMES = ("time", "t")
PARTS = (1, 2, 10, 100, 1000)               # of a hertz, in a rate told by times, which are rounded
UNEVEN = 0.25                               # samples that a time may be off; a lost sample shifts some by half of one
RATE = re.compile(r"(\d+(?:\.\d+)?)\s*hz", re.IGNORECASE)
COLUMN = re.compile(r"([^\[\]()]*?)\s*(?:[\[(]\s*([^\[\]()]*?)\s*[\])])?")                  # II [uV]


def refusal(path, reason: str, remedy: str) -> UserError:
    """The sentence for a recording that is not scored."""
    return UserError(f"{path} given as --record {reason}; {remedy}")


def read_recording(path, record_rate: float | None) -> np.ndarray:
    """Read a WFDB record or a .csv file as (samples, 12) mV at 500 Hz, leads in the order of LEAD_NAMES.

    path: of a record with or without .hea or .dat; record_rate: Hz, of --record_rate, or None. Raises UserError where
    the file is not understood, or shorter than 10 s.
    """
    reader = read_csv if Path(path).suffix.lower() == ".csv" else read_wfdb
    try:
        signal, rate = reader(path, record_rate)
    except signals.RecordError as error:
        raise refusal(path, f"cannot be scored: {error}", "mend it, or leave it out") from error
    resampled = signals.resample(signal, rate)
    if len(resampled) < RECORD_LENGTH:
        raise refusal(path, f"is {len(signal) / rate:.4g} s long, and 10 s is the least", "leave it out")
    return resampled


# ---- units and rates

def factor_of(path, unit: str, lead: str) -> float:
    """What a lead's values in this unit are multiplied with to be in mV. Raises UserError."""
    plain = unicodedata.normalize("NFKC", unit).strip().lower().replace("μ", "u")       # the letter, and the micro sign
    if plain not in MILLIVOLTS:
        raise refusal(path, f"has lead {lead} in {unit!r}", "convert it to mV or uV")
    return MILLIVOLTS[plain]


def settle_rate(path, stated: dict, times: np.ndarray | None = None, first_line: int = 0) -> float:
    """The sampling rate in Hz from all that tells it, {source: Hz or None} and the times (samples,) of a column.

    first_line: of the times, in the file. Raises UserError where nothing tells it, where two contradict each other, and
    out of range.
    """
    stated = {source: rate for source, rate in stated.items() if rate is not None}
    if len(set(stated.values())) > 1:
        told = " and ".join(f"{rate:g} Hz by {source}" for source, rate in stated.items())
        raise refusal(path, f"has two rates, {told}", "correct one of them")
    rate = next(iter(stated.values()), None)
    if times is not None:
        rate = rate_of_times(path, times, rate, first_line)
    if rate is None:
        raise refusal(path, "does not state its sampling rate", "give --record_rate, or state it in the header of a "
                      "WFDB record, in a first line '# rate: 250 Hz' of a .csv file")
    if not LEAST_RATE <= rate <= MOST_RATE:                     # so NaN is refused too
        raise refusal(path, f"has a rate of {rate:g} Hz, not {LEAST_RATE} to {MOST_RATE}",
                      "state the rate in Hz, and times in seconds")
    return rate


def rate_of_times(path, times: np.ndarray, stated: float | None, first_line: int) -> float:
    """The rate of a column of times in seconds: the stated one, else the simplest near the mean that fits them all.

    Raises UserError where a time is off by more than UNEVEN samples.
    """
    span = times[-1] - times[0]
    if not span > 0:
        raise refusal(path, "has times that do not increase", "mend its column of times, or remove it")
    mean = (len(times) - 1) / span
    for rate in [Fraction(mean).limit_denominator(parts) for parts in PARTS] if stated is None else [stated]:
        rate = float(rate)
        off = np.abs((times - times[0]) * rate - np.arange(len(times)))
        if off.max() <= UNEVEN:
            return rate
    worst = int(np.argmax(off > UNEVEN))
    raise refusal(path, f"has times that are not evenly spaced at {rate:.6g} Hz, line {first_line + worst} is off by "
                  f"{off[worst]:.2g} samples", "fill in the samples that are missing, or correct the rate")


# ---- WFDB

def require_recording(header):
    """Raise signals.RecordError for a wfdb header that wfdb should not be asked to read the signals of."""
    signals.require_readable(header)
    if header.sig_len is not None and header.sig_len > MOST_SAMPLES:
        raise signals.RecordError(f"{header.sig_len:,} samples long, more than {MOST_SAMPLES:,}")


def read_wfdb(path, record_rate: float | None) -> tuple:
    """A WFDB record as ((samples, 12) mV at its rate, rate). Raises UserError and signals.RecordError."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".hea", ".dat") else path
    header_path = stem.with_name(f"{stem.name}.hea")
    if not header_path.is_file():
        raise UserError(f"{path} given as --record is neither a .csv file nor a WFDB record, as {header_path} is "
                        "missing; name another path")
    record, signal, damaged = signals.read_signals(stem, require_recording)
    states_rate, gains = signals.stated_in_header(header_path)
    rate = settle_rate(path, {"its header": record.fs if states_rate else None, "--record_rate": record_rate})
    units = signals.units_of_leads(record, gains)
    factors = [factor_of(path, unit, lead) for lead, unit in zip(LEAD_NAMES, units)]
    return signals.order_leads(signal, record.sig_name, factors, damaged), rate


# ---- CSV

@dataclass
class Table:
    """A .csv file. names: of the columns, in lower case; values: (samples, columns); first_line: of the samples."""
    comments: dict
    names: list
    units: list
    values: np.ndarray
    first_line: int


def read_csv(path, record_rate: float | None) -> tuple:
    """A .csv file as ((samples, 12) mV at its rate, rate). Raises UserError and signals.RecordError."""
    try:
        table = read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} given as --record is missing; name another path") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise refusal(path, f"is not readable as CSV in UTF-8 ({str(error)[:80]})", "export it again") from error
    stated = table.comments.get("rate")
    in_comment = RATE.fullmatch(stated or "")
    if stated is not None and not in_comment:
        raise refusal(path, f"states its rate as {stated!r}", "write it as '# rate: 250 Hz'")
    factors = [factor_of(path, settle_unit(path, table, lead), lead) for lead in LEAD_NAMES]
    times = next((table.values[:, place] for place, name in enumerate(table.names) if name in TIME_NAMES), None)
    rate = settle_rate(path, {"its comment": in_comment and float(in_comment[1]), "--record_rate": record_rate}, times,
                       table.first_line)
    return signals.order_leads(table.values, table.names, factors), rate


def settle_unit(path, table: Table, lead: str) -> str:
    """A lead's unit, from its name in the first row or from the comment. Raises UserError."""
    in_name, in_comment = table.units[table.names.index(lead.lower())], table.comments.get("unit")
    if in_name is None and in_comment is None:
        raise refusal(path, f"does not state the unit of lead {lead}", f"name the column '{lead} [mV]', or give a "
                      "first line '# unit: mV'")
    if None not in (in_name, in_comment) and factor_of(path, in_name, lead) != factor_of(path, in_comment, lead):
        raise refusal(path, f"has lead {lead} in {in_name} by its name and in {in_comment} by its comment",
                      "correct one of them")
    return in_comment if in_name is None else in_name


def read_table(path) -> Table:
    """Read a .csv file. Raises UserError for what is wrong in it, and what open and csv raise."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        comments, line, number = {}, file.readline(), 1
        while line.startswith("#"):
            key, _, value = (part.strip() for part in line[1:].partition(":"))
            if key.lower() in ("rate", "unit") and key.lower() in comments:
                raise refusal(path, f"states its {key.lower()} again in line {number}", "remove one of the two")
            comments[key.lower()] = value
            line, number = file.readline(), number + 1
        rows = csv.reader(itertools.chain([line], file), strict=True)
        names, units = read_names(path, next(rows, []), number)
        return Table(comments, names, units, read_samples(path, rows, names, number - 1), number + 1)


def read_names(path, cells: list, line: int) -> tuple:
    """(names in lower case, units or None) of the columns, from the row that names them. Raises UserError."""
    names, units, known = [], [], [lead.lower() for lead in LEAD_NAMES] + ["time"]
    for place, cell in enumerate(cells, 1):
        match = COLUMN.fullmatch(cell.strip())
        name, unit = (match[1].lower(), match[2]) if match else ("", None)
        name = "time" if name in TIME_NAMES else name
        if name not in known:
            raise refusal(path, f"has a column {place} named {cell.strip()[:40]!r} in line {line}", "that line must "
                          f"name the leads {', '.join(LEAD_NAMES)}, separated by commas, and nothing else but time")
        if name == "time" and unit not in (None, "s"):
            raise refusal(path, f"has times in {unit!r}, column {place} of line {line}", "convert them to seconds")
        if name in names:
            raise refusal(path, f"names {cell.strip()} a second time, column {place} of line {line}", "remove one")
        names.append(name)
        units.append(unit)
    absent = [lead for lead in LEAD_NAMES if lead.lower() not in names]
    if absent:
        raise refusal(path, f"has no column {', '.join(absent)} in line {line}", "all twelve leads are needed, by name")
    return names, units


def read_samples(path, rows, names: list, lines_before: int) -> np.ndarray:
    """The rows that a csv.reader still holds, (samples, columns). Raises UserError that names the first wrong cell."""
    values, empty = array("d"), None
    for cells in rows:
        line = lines_before + rows.line_num
        if not cells:                                           # only at the end
            empty = empty or line
            continue
        if empty:
            raise refusal(path, f"has nothing in line {empty}", "fill it in, or cut the recording there")
        if len(cells) != len(names):
            raise refusal(path, f"has {len(cells)} values in line {line} for {len(names)} columns", "correct that line")
        numbers = [number_of(cell) for cell in cells]
        if None in numbers:
            place = numbers.index(None)
            raise refusal(path, f"has {cells[place][:40]!r} in line {line}, column {names[place]}, where a number must "
                          "be", "fill it in, or cut the recording there")
        values.extend(numbers)
    if len(values) < 2 * len(names):
        raise refusal(path, "holds no samples", "name another file")
    return np.array(values).reshape(-1, len(names))


def number_of(text: str) -> float | None:
    """A cell as a finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if -np.inf < number < np.inf else None
