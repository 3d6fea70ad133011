"""Recordings as text: a row names the leads, the rows below it hold a number for each, read block by block.

    # rate: 250 Hz
    # unit: mV
    I,II,III,aVR,aVL,aVF,V1,V2,V3,V4,V5,V6             or  time [ms];I [uV];II [uV];...

Cells are separated by commas, semicolons or tabs; with the latter two, numbers may have decimal commas. What stands
above the names may tell rate and unit, with # or without ("Sample rate,512 hertz"). The rate may also come from
--record_rate or a column of times, the unit from the names or --record_unit. What a file does not tell is not guessed,
and what it tells twice must agree.
"""
import itertools
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ecg.leads import find_leads, lead_named, millivolts_in
from ecg.signals import RecordError
from ecg.wfdb_files import Recording

LINES_AT_ONCE = 20_000
LONGEST_HEAD = 100                          # lines in which the leads must be named
SEPARATORS = (",", ";", "\t")
COLUMN = re.compile(r"(.*?)\s*(?:[\[(]\s*([^\[\]()]*?)\s*[\])]|[ _/]([mun]?V|[µμ]V|m?s))?", re.I)       # I [uV]
FACT = re.compile(r"[#%\s]*([^:=,;\t]*?)\s*[:=,;\t]\s*(.*?)[\s,;]*")       # "# rate: 250 Hz", "Sample rate,512 hertz"
RATE_KEYS = {"rate", "fs", "sfreq", "samplerate", "samplingrate", "frequency", "samplefrequency", "samplingfrequency"}
UNIT_KEYS = {"unit", "units"}
RATE = re.compile(r"(\d+(?:[.,]\d+)?)\s*(k)?\s*(?:hz|hertz|sps|samples?\s*(?:/|per)\s*s(?:ec|econd)?)?", re.IGNORECASE)
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", re.IGNORECASE | re.ASCII)
TIME_NAMES = {"time", "t", "timestamp"}
TIME_UNITS = {None: 1.0, "s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
PARTS = (1, 2, 10, 100, 1000)               # of a hertz, in a rate told by times, which are rounded
UNEVEN = 0.25                               # samples that a time may be off; a lost sample shifts some by half of one


@dataclass
class Table:
    """What the head of a file says. Lines count from 1."""
    path: object
    encoding: str
    facts: dict             # "rate", "unit": as written
    names: list             # of the columns, as written, less their units
    units: list             # of the columns, None where not given
    separator: str
    first_line: int         # of the samples


def open_csv(path, record_rate: float | None, record_unit: str | None) -> Recording:
    """Open a .csv file. record_rate: Hz, record_unit: of the flags, or None. Raises RecordError."""
    if not os.path.isfile(path):
        raise RecordError("there is no such file", "name another path")
    try:
        table = read_head(path)
    except (OSError, UnicodeError) as error:
        raise RecordError(f"unreadable ({type(error).__name__}: {error})", "name another file") from error

    def factor_of(column, lead):
        stated = {unit for unit in (table.units[column], table.facts.get("unit"), record_unit) if unit is not None}
        if not stated:
            raise RecordError(f"the unit of lead {lead} is not stated", f"give --record_unit, name the column "
                              f"'{lead} [mV]', or give a first line '# unit: mV'")
        if len({millivolts_in(unit, lead) for unit in stated}) > 1:
            raise RecordError(f"lead {lead} is in {' and in '.join(sorted(stated))}", "correct one of them")
        return millivolts_in(min(stated), lead)
    times = [column for column, name in enumerate(table.names) if name.strip('"').lower() in TIME_NAMES]
    leads = find_leads(table.names, factor_of, ignored={"", *(table.names[column] for column in times)})
    factor = time_factor(table, times[0]) if times else None
    columns = leads.columns + times[:1]
    parts = read_parts(table, columns)
    first = next(parts, None)
    if first is None or len(first) < 2:
        raise RecordError("no samples", "name another file")
    rates = {"its head": stated_rate(table.facts.get("rate")), "--record_rate": record_rate}
    if times:
        rates["its times"] = rate_of_times(first[:, -1] * factor, agreed_rate(rates), table.first_line)
    rate = agreed_rate(rates)
    leads.columns = list(range(len(leads.columns)))         # of the parts, which hold no others
    return Recording(rate, None, blocks_of(table, itertools.chain([first], parts), leads, rate, factor),
                     leads.notes)


def blocks_of(table: Table, parts, leads, rate: float, time_factor: float | None):
    """Yield (n, 12) mV from parts (n, columns), whose last column is of times where they have a factor."""
    done = 0
    for part in parts:
        if time_factor is not None and done:                # the last time of the part before, and this part's
            require_even(np.r_[before, part[:, -1]] * time_factor, rate, table.first_line + done - 1)
        before = part[-1, -1]
        yield leads.of(part, done, rate)
        done += len(part)


# ---- the head

def read_head(path) -> Table:
    """Read all that stands above the samples. Raises RecordError, OSError and UnicodeError."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        start[:1000].decode(encoding, errors="strict")
    except UnicodeDecodeError as error:
        encoding = "latin-1" if error.start < 990 else encoding       # else a letter was cut in two
    facts = {}
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(itertools.islice(file, LONGEST_HEAD), 1):
            separator = max(SEPARATORS, key=line.count)
            cells = [COLUMN.fullmatch(cell.strip('# "\r\n')) for cell in line.split(separator)]
            names = [cell[1] if cell else "" for cell in cells]
            if sum(lead_named(name) is not None for name in names) > 1 and ":" not in names[0]:
                units = [cell and (cell[3] if cell[2] is None else cell[2]) for cell in cells]
                return Table(path, encoding, facts, names, units, separator, number + 1)
            fact = FACT.fullmatch(line.strip().replace('"', ""))
            key = fact and re.sub(r"[ _-]|\(.*\)", "", fact[1].lower())
            for kind, keys in (("rate", RATE_KEYS), ("unit", UNIT_KEYS)):
                if key in keys and facts.setdefault(kind, fact[2]) != fact[2]:
                    raise RecordError(f"line {number} states the {kind} again", "remove one of the two")
    raise RecordError(f"no line among its first {LONGEST_HEAD} names the leads", "name I, II, III, aVR, aVL, aVF, V1 "
                      "to V6 in one line, separated by commas")


def stated_rate(text: str | None) -> float | None:
    """A rate as a head writes it, in Hz. Raises RecordError."""
    if text is None:
        return None
    match = RATE.fullmatch(text.strip())
    if not match:
        raise RecordError(f"its rate is stated as {text!r}", "write it as '# rate: 250 Hz'")
    return float(match[1].replace(",", ".")) * (1000 if match[2] else 1)


def agreed_rate(rates: dict) -> float | None:
    """The one rate that is stated, None where none is. rates: {who states it: Hz or None}. Raises RecordError."""
    stated = {source: rate for source, rate in rates.items() if rate is not None}
    if len(set(stated.values())) > 1:
        raise RecordError("two rates, " + " and ".join(f"{rate:g} Hz by {source}" for source, rate in stated.items()),
                          "correct one of them")
    return next(iter(stated.values()), None)


# ---- times

def time_factor(table: Table, column: int) -> float:
    """What times in a column are multiplied with to be in seconds. Raises RecordError."""
    unit = table.units[column] and table.units[column].lower().replace("μ", "µ")
    if unit not in TIME_UNITS:
        raise RecordError(f"its times are in {unit!r}", "convert them to seconds")
    return TIME_UNITS[unit]


def rate_of_times(times: np.ndarray, stated: float | None, first_line: int) -> float:
    """The rate, Hz, of times in seconds: the stated one, else the simplest near the mean that fits them all."""
    if not times[-1] > times[0]:
        raise RecordError("its times do not increase", "mend the column of times, or remove it")
    mean = (len(times) - 1) / (times[-1] - times[0])
    rates = [float(Fraction(mean).limit_denominator(parts)) for parts in PARTS] if stated is None else [stated]
    rate = next((rate for rate in rates if samples_off(times, rate).max() <= UNEVEN), rates[-1])
    require_even(times, rate, first_line)
    return rate


def samples_off(times: np.ndarray, rate: float) -> np.ndarray:
    """By how many samples each time, in seconds, is off."""
    return np.abs((times - times[0]) * rate - np.arange(len(times)))


def require_even(times: np.ndarray, rate: float, first_line: int):
    """Raise RecordError where a time is off by more than UNEVEN samples. first_line: of the times, in the file."""
    off = samples_off(times, rate)
    if off.max() > UNEVEN:
        worst = int(np.argmax(off > UNEVEN))
        raise RecordError(f"its times are not evenly spaced at {rate:.6g} Hz, line {first_line + worst} is off by "
                          f"{off[worst]:.2g} samples", "fill in the samples that are missing, or correct the rate")


# ---- the samples

def read_parts(table: Table, columns: list):
    """Yield these columns of the next lines, (n, columns). Raises RecordError that names the first wrong cell."""
    with open(table.path, encoding=table.encoding, errors="replace") as file:
        line, ended = table.first_line, None
        file = itertools.islice(file, table.first_line - 1, None)
        while lines := list(itertools.islice(file, LINES_AT_ONCE)):
            full = next((place for place, text in enumerate(lines) if not text.strip()), len(lines))
            if ended is None and full < len(lines):
                ended = line + full
            if ended is not None and any(text.strip() for text in lines[max(ended - line, 0):]):
                raise RecordError(f"nothing in line {ended}", "fill it in, or cut the recording there")
            if full:
                yield read_numbers(table, lines[:full], columns, line)
            line += len(lines)


def read_numbers(table: Table, lines: list, columns: list, first_line: int) -> np.ndarray:
    """The numbers in these columns of some lines, (lines, columns). Raises RecordError."""
    lines = [line.replace('"', "") for line in lines]
    if table.separator != ",":
        lines = [line.replace(",", ".") for line in lines]
    expected = len(table.names) - 1
    if all(line.count(table.separator) == expected for line in lines):
        try:
            values = np.loadtxt(lines, delimiter=table.separator, usecols=columns, ndmin=2, comments=None)
            if np.isfinite(values).all():
                return values
        except ValueError:                  # found again below, with its line and column
            pass
    for number, line in enumerate(lines, first_line):
        cells = line.rstrip("\r\n").split(table.separator)
        if len(cells) != len(table.names):
            raise RecordError(f"{len(cells)} values in line {number} for {len(table.names)} columns",
                              "correct that line")
        for column in columns:
            if not NUMBER.fullmatch(cells[column]) or not np.isfinite(float(cells[column])):
                raise RecordError(f"{cells[column][:40]!r} in line {number}, column {table.names[column]}, where a "
                                  "number must be", "fill it in, or cut the recording there")
    raise RecordError(f"no numbers in lines {first_line} to {first_line + len(lines) - 1}", "export it again")
