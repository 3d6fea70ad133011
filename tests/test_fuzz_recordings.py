"""Damaged files that a user names: each is read with finite content or refused in a sentence. Fixed seeds."""
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

HEADER_WORDS = (
    "", "0", "-1", "1", "nan", "inf", "1e999", "99999999999999999999", "2147483648", "(", "/", "x", "\x00", "\u00b5V",
    "16x0", "16x3", "16:7", "16+24", "212", "8", "310", "508", "~", "record", "V1", "500(0)/mV", "1e-300/mV", "0/mV",
    "1000.0(99999999)/mV", "1000/uV", "1000/V", "a" * 5000)
CSV_WORDS = (*HEADER_WORDS, "v6", "aVR [mV]", "II [uV]", "time", "t [ms]", "# rate: 250 Hz", "# unit: uV", "#", '"',
             "0.1", ";", "0x10", "1_0", "\u0661", "-0", "1e7", "\r", "\ufeff", "[", ")")
properties = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def mutate(rng, data: bytes, words, separator) -> bytes:
    """One to three of: a word changed, a line dropped or doubled, the end cut off, noise put in."""
    for _ in range(rng.integers(1, 4)):
        lines, kind = data.split(b"\n"), int(rng.integers(7))
        line = int(rng.integers(len(lines)))
        if kind < 3:
            tokens = lines[line].split(separator)
            tokens[rng.integers(len(tokens))] = words[rng.integers(len(words))].encode()
            lines[line] = separator.join(tokens)
        lines[line:line + 1] = lines[line:line + 1] * {3: 0, 4: 2}.get(kind, 1)
        data, place = b"\n".join(lines), int(rng.integers(len(data) + 1))
        data = data[:place] + rng.bytes(5) * (kind == 6) + data[place:] * (kind != 5)
    return data


def check_windows(path):
    """Whether a file is read; every window is finite then, and so is what becomes of it. Else one line says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _, window in windows_of(open_recording(path)):
                filtered = signals.filter_leads(window)
                assert window.shape == (5000, 12) and np.isfinite(filtered).all() and find_flat(window) is not None
                assert np.isfinite(signals.normalize_leads(filtered)).all()
                find_r_peaks_by_slope(filtered)
    except (UserError, RecordError) as error:
        assert "\n" not in str(error) and len(str(error)) > 5
        return False
    return True


@pytest.mark.parametrize("name, lines, cases", [("record.hea", 99, 100), ("record.dat", 99, 50), ("own.csv", 4, 60),
                                                ("own.csv", 1102, 40)])
def test_damaged_recordings(tmp_path, name, lines, cases):
    """No rate, length, gain or unit is made up; damage in a header or the first lines, or anywhere."""
    ecg, path, accepted = beats_at(every(0.8), 100), tmp_path / name, 0
    write_wfdb(tmp_path / "record", ecg, 100)
    rows = "\n".join(",".join(f"{value:.3f}" for value in row) for row in np.resize(ecg, (1100, 12)))
    (tmp_path / "own.csv").write_text(f"# rate: 100 Hz\n{','.join(f'{lead} [mV]' for lead in LEAD_NAMES)}\n{rows}\n")
    whole = path.read_bytes().split(b"\n")
    for case in range(cases):
        rng = np.random.default_rng(case)
        words, separators = (CSV_WORDS, (b",", b" ", b"\n")) if name == "own.csv" else (HEADER_WORDS, (b" ",))
        damaged = mutate(rng, b"\n".join(whole[:lines]), words, separators[rng.integers(len(separators))])
        path.write_bytes(b"\n".join([damaged, *whole[lines:]]))
        try:
            accepted += check_windows(path.with_suffix("") if name != "own.csv" else path)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} in case {case}: {damaged[:2000]!r}") from error
    assert (2 if name != "record.dat" else 0) <= accepted <= cases - 5


@properties
@given(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1), max_size=40))
def test_any_r_peaks_give_beats_inside(r_peaks):
    """Whatever the R peaks, there is at least one beat, and every beat lies inside the recording."""
    positions, real = valid_beats(np.array(r_peaks, dtype=np.int64))
    assert len(positions) and (positions >= 140).all() and (positions + 340 <= 5000).all()
    assert real == any(200 < peak < 4400 for peak in r_peaks)


@pytest.mark.filterwarnings("ignore")
@properties
@given(st.integers(0, 2 ** 32 - 1), st.floats(-6, 6) | st.floats(-320, 300), st.sampled_from([0.0, 0.3, -5.0, 1e4]),
       st.sampled_from(["noise", "drift", "spike", "steps", "beats", "flat"]))
def test_any_scale_gives_finite_leads(seed, power, offset, kind):
    """From 1e-320 to 1e300 mV: filter, min-max and R peaks are finite and inside, or the row is refused."""
    rng = np.random.default_rng(seed)
    shapes = {"noise": lambda: rng.normal(size=(5000, 12)), "drift": lambda: np.cumsum(rng.normal(size=(5000, 12)), 0),
              "spike": lambda: np.eye(5000, 12, k=-int(rng.integers(4000))), "beats": lambda: beats_at(every(0.8)),
              "steps": lambda: np.repeat(rng.normal(size=(50, 12)), 100, axis=0), "flat": lambda: np.ones((5000, 12))}
    ecg = shapes[kind]() * 10.0 ** power + offset
    ecg[:, rng.random(12) < 0.2] = offset
    filtered = signals.filter_leads(ecg)
    leads = signals.normalize_leads(filtered)
    assert np.isfinite(leads).all() and np.abs(leads).max() <= 1 + 1e-6
    for peaks in (find_r_peaks_by_slope(filtered), find_r_peaks_by_heartpy(filtered[:, 1])):
        assert (np.diff(peaks) > 0).all() and ((peaks >= 0) & (peaks < 5000)).all()
    try:
        assert np.isfinite(Records(filtered.astype(np.float32)[None], "test.npy").read([0])).all()
    except UserError as error:
        assert "row 0" in str(error)
