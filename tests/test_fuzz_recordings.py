"""Damaged files that a user names: each is read with finite content or refused by name, none hangs.

All cases follow from fixed seeds. A refusal is a UserError or, for a record, a RecordError.
"""
import contextlib
import signal
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import beats_at, every, write_wfdb

from dataloader import valid_beats
from ecg import signals
from ecg.arrays import Records
from ecg.recording_files import find_flat, open_recording, windows_of
from ecg.r_peaks import find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.signals import LEAD_NAMES, RecordError
from utils import UserError

SECONDS = 20                        # no case takes one; what is still running then hangs
NASTY = ("", "0", "-1", "1", "nan", "inf", "1e999", "99999999999999999999", "2147483648", "(", "/", "x", "\x00",
         "\u00b5V", "16x0", "16x3", "16:7", "16+24", "212", "8", "310", "508", "~", "record", "V1", "500(0)/mV",
         "1e-300/mV", "0/mV", "1000.0(99999999)/mV", "1000/uV", "1000/V", "a" * 5000)
WORDS = (*NASTY, "v6", "aVR [mV]", "II [uV]", "time", "t [ms]", "# rate: 250 Hz", "# unit: uV", "#", '"', "0.1", ";",
         "0x10", "1_0", "\u0661", "-0", "1e7", "\r", "\ufeff", "[", ")")
properties = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class Hang(BaseException):
    """Not an Exception: code that catches all of these must not catch it."""


@contextlib.contextmanager
def outcome(counts, case):
    """Count what becomes of a case. Anything but acceptance or a one-line refusal fails, and says which case it was."""
    def give_up(*_):
        raise Hang
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        counts["accepted"] += 1
    except (UserError, RecordError) as error:
        assert "\n" not in str(error) and len(str(error)) > 5, case
        counts["refused"] += 1
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} in case {case!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutate(rng, data: bytes, words=NASTY, separator=b" ") -> bytes:
    """One to three of: a word, a byte, a line changed, doubled, dropped or moved; the end cut off; noise put in."""
    for _ in range(rng.integers(1, 4)):
        lines = data.split(b"\n")
        line = int(rng.integers(len(lines)))
        kind = rng.integers(8)
        if kind < 3:
            tokens = lines[line].split(separator)
            tokens[rng.integers(len(tokens))] = words[rng.integers(len(words))].encode()
            lines[line] = separator.join(tokens)
        elif kind == 3:
            del lines[line]
        elif kind == 4:
            lines.insert(int(rng.integers(len(lines) + 1)), lines[line])
        data = b"\n".join(lines)
        if kind == 5:
            data = data[:rng.integers(len(data) + 1)]
        elif kind >= 6 and data:
            place, noise = int(rng.integers(len(data))), rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8)
            data = data[:place] + noise.tobytes() + data[place + (len(noise) if kind == 6 else 0):]
    return data


def fuzz(cases, act, least):
    """act(random numbers, counts) once a case; at least so many are accepted, and so many refused."""
    counts = {"accepted": 0, "refused": 0}
    for case in range(cases):
        act(np.random.default_rng(case), counts)
    assert sum(counts.values()) == cases and min(counts.values()) >= least, counts


def ecg_like(rate=100):
    """(10 s, 12) mV with beats."""
    return beats_at(every(0.8), rate)


def check_windows(path):
    """Every window of a file is finite, and so is what becomes of it."""
    for _, window in windows_of(open_recording(path)):
        filtered = signals.filter_leads(window)
        assert window.shape == (5000, 12) and np.isfinite(filtered).all() and isinstance(find_flat(window), dict)
        assert np.isfinite(signals.normalize_leads(filtered)).all()
        find_r_peaks_by_slope(filtered)


# ---- recordings

@pytest.mark.parametrize("damaged", ["header", "samples"])
def test_damaged_wfdb_records(tmp_path, damaged):
    """No rate, length, gain or unit is made up; samples that are not the header's are told by checksum or length."""
    write_wfdb(tmp_path / "record", ecg_like(), 100)
    header, data = (tmp_path / "record.hea").read_bytes(), (tmp_path / "record.dat").read_bytes()

    def act(rng, counts):
        name, content = ("record.hea", header) if damaged == "header" else ("record.dat", data)
        (tmp_path / name).write_bytes(mutate(rng, content))
        with outcome(counts, (tmp_path / name).read_bytes()[:3000]):
            check_windows(tmp_path / "record")
    fuzz(100 if damaged == "header" else 60, act, 5 if damaged == "header" else 0)


@pytest.mark.parametrize("lines", [4, 1102])
def test_damaged_csv_files(tmp_path, lines):
    """Damage in the comments, names, units and first samples, or anywhere."""
    rows = "\n".join(",".join(f"{value:.3f}" for value in row) for row in np.resize(ecg_like(), (1100, 12)))
    whole = f"# rate: 100 Hz\n{','.join(f'{lead} [mV]' for lead in LEAD_NAMES)}\n{rows}\n".encode().split(b"\n")

    def act(rng, counts):
        separator = (b",", b" ", b"\n")[rng.integers(3)]
        content = b"\n".join((mutate(rng, b"\n".join(whole[:lines]), WORDS, separator), *whole[lines:]))
        (tmp_path / "own.csv").write_bytes(content)
        with outcome(counts, content[:2000]):
            check_windows(tmp_path / "own.csv")
    fuzz(80, act, 5)


# ---- properties

@properties
@given(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1), max_size=40))
def test_any_r_peaks_give_beats_inside(r_peaks):
    """Whatever the R peaks, there is at least one beat, and every beat lies inside the recording."""
    positions, real = valid_beats(np.array(r_peaks, dtype=np.int64))
    assert len(positions) and (positions >= 140).all() and (positions + 340 <= 5000).all()
    assert real == any(200 < peak < 4400 for peak in r_peaks)


@properties
@given(st.integers(0, 2 ** 32 - 1), st.floats(-6, 6) | st.floats(-320, 300), st.sampled_from([0.0, 0.3, -5.0, 1e4]),
       st.sampled_from(["noise", "drift", "spike", "steps", "beats", "flat"]))
def test_any_scale_gives_finite_leads(seed, power, offset, kind):
    """From 1e-320 to 1e300 mV: filter, min-max and R peaks are finite and inside, or the row is refused."""
    rng = np.random.default_rng(seed)
    shapes = {"noise": lambda: rng.normal(size=(5000, 12)), "drift": lambda: np.cumsum(rng.normal(size=(5000, 12)), 0),
              "spike": lambda: np.eye(5000, 12, k=-int(rng.integers(4000))), "beats": lambda: ecg_like(500),
              "steps": lambda: np.repeat(rng.normal(size=(50, 12)), 100, axis=0), "flat": lambda: np.ones((5000, 12))}
    ecg = shapes[kind]() * 10.0 ** power + offset
    ecg[:, rng.random(12) < 0.2] = offset
    with outcome({"accepted": 0, "refused": 0}, (seed, power, offset, kind)):
        filtered = signals.filter_leads(ecg)
        leads = signals.normalize_leads(filtered)
        assert np.isfinite(leads).all() and np.abs(leads).max() <= 1 + 1e-6
        for found in (find_r_peaks_by_slope(filtered), find_r_peaks_by_heartpy(filtered[:, 1])):
            assert (np.diff(found) > 0).all() and ((found >= 0) & (found < 5000)).all()
        with np.errstate(over="ignore"):
            assert np.isfinite(Records(filtered.astype(np.float32)[None], "test.npy").read([0])).all()
