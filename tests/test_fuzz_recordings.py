"""Damaged files that a user names or keeps in data/: each is read with finite content or refused by name, none hangs.

All cases follow from fixed seeds. A refusal is a UserError or, for a record, a RecordError.
"""
import contextlib
import io
import signal
import warnings

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg import arrays, ptbxl, signals
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
CELLS = (*NASTY[:14], "{}", "{'NORM'}", "[1]", "{None: 1}", '"' + "{" * 300 + '"', '"' + "(" * 9000 + '"', '"', "1.5",
         "NORM", "{'NORM': 1e999}", "__import__('os')", "9" * 400, "True")
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
    time = np.arange(10 * rate) / rate
    beats = np.arange(0.4, 9.8, 0.8) + 0.02 * np.sin(np.arange(12))
    return np.exp(-0.5 * ((time - beats[:, None]) / 0.02) ** 2).sum(axis=0)[:, None] * np.linspace(0.5, 1.5, 12)


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
    wfdb.wrsamp("record", fs=100, units=["mV"] * 12, sig_name=list(LEAD_NAMES), p_signal=ecg_like(), fmt=["16"] * 12,
                adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(tmp_path))
    header, data = (tmp_path / "record.hea").read_bytes(), (tmp_path / "record.dat").read_bytes()

    def act(rng, counts):
        name, content = ("record.hea", header) if damaged == "header" else ("record.dat", data)
        (tmp_path / name).write_bytes(mutate(rng, content))
        with outcome(counts, (tmp_path / name).read_bytes()[:3000]):
            check_windows(tmp_path / "record")
    fuzz(150 if damaged == "header" else 60, act, 5 if damaged == "header" else 0)


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
    fuzz(100, act, 5)


# ---- PTB-XL's tables, and the files in data/

TABLE = (b"ecg_id,patient_id,age,sex,scp_codes,strat_fold,filename_lr,filename_hr\n"
         + b"".join(b"%d,%d.0,6%d,1,\"{'NORM': 100.0, 'SR': 0.0}\",%d,records100/%05d_lr,records500/%05d_hr\n"
                    % (n, 7 * n, n % 10, n % 10 + 1, n, n) for n in range(1, 13)))
STATEMENTS = b",description,diagnostic,diagnostic_class\nNORM,normal,1.0,NORM\nIMI,infarction,1.0,MI\nSR,sinus,,\n"


@pytest.mark.parametrize("name", ["ptbxl_database.csv", "scp_statements.csv"])
def test_damaged_tables(tmp_path, name):
    """Cells of all kinds, broken quotes, lost lines; nothing is executed."""
    whole = {"ptbxl_database.csv": TABLE, "scp_statements.csv": STATEMENTS}
    for other, content in whole.items():
        (tmp_path / other).write_bytes(content)

    def act(rng, counts):
        content = mutate(rng, whole[name], CELLS, b",")
        (tmp_path / name).write_bytes(content)
        with outcome(counts, content):
            records = ptbxl.load_ptbxl(tmp_path, 100, None)
            assert records.index.is_unique and records["fold"].between(1, 10).all() and not records["present"].any()
            assert len([ptbxl.table_row(record) for record in records.itertuples()]) == len(records)
    fuzz(100, act, 10)


def bytes_of(write, *args, **options):
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def test_damaged_arrays(tmp_path):
    """train.npy with any bytes changed: opened and read whole and finite, or refused; nothing is unpickled."""
    good = bytes_of(np.save, np.random.default_rng(0).random((2, 5000, 12)).astype(np.float32))
    words = ("'<f4'", "'<f8'", "'<f2'", "'|O'", "'<i4'", "'<c8'", "'<M8[s]'", "(2, 5000, 12)", "(9999999999,)", "(2,",
             "5000,", "(0,", "(-2,", "(1e9,", "True,", "None", "{", "}", "[('a','<f4')]", "__import__")

    def act(rng, counts):
        values = bytearray(good[128:])
        for place in rng.integers(0, len(values) - 4, rng.integers(3)):
            values[place:place + 4] = rng.bytes(4)
        (tmp_path / "train.npy").write_bytes((good[:128] if rng.random() < 0.5 else mutate(rng, good[:128], words))
                                             + bytes(values))
        with outcome(counts, (tmp_path / "train.npy").read_bytes()[:140]):
            block = arrays.open_records(tmp_path, "train", 12).read(slice(0, 2))
            assert block.shape[1:] == (5000, 12) and np.isfinite(block).all()
    fuzz(100, act, 10)


def test_damaged_sidecars(tmp_path, monkeypatch):
    """R peaks, details, manifest and table of records: taken whole, made again, passed over, or refused by name."""
    made = np.random.default_rng(0).random((3, 5000, 12)).astype(np.float32)
    np.save(tmp_path / "train.npy", made)
    identity, peaks = arrays.fingerprint(made), [np.arange(300, 4900, 400, dtype=np.int32)] * 3
    monkeypatch.setattr(arrays, "find_r_peaks_by_slope", lambda _: peaks[0])
    whole = {"train_r_peaks_slope.npz": bytes_of(arrays.pack_r_peaks, peaks, "slope", identity),
             "train_details.npz": bytes_of(arrays.pack_details, list(made.min(1)), list(made.max(1)), [], identity),
             "manifest.json": b'{"arrays": {"train":\n {"shape": [3, 5000, 12], "fingerprint":\n "%s"}}}'
                              % identity.encode(),
             "train_records.csv": b"ecg_id,patient_id,age,sex,fold,label,superclasses\n1,5,61,F,1,0,NORM\n"
                                  b"2,,,,2,0,NORM\n3,5,62,M,9,0,NORM\n"}
    words = (*CELLS, "[", "[" * 20000, "null", "[1]", '"arrays"', "{}", "1e999", '"x"')

    def act(rng, counts):
        name = list(whole)[rng.integers(4)]
        for other, content in whole.items():
            (tmp_path / other).write_bytes(content)
        (tmp_path / name).write_bytes(mutate(rng, whole[name], words, b"," if name.endswith("csv") else b" "))
        with outcome(counts, (name, (tmp_path / name).read_bytes()[:2000])):
            records = arrays.open_records(tmp_path, "train", 12)
            found = arrays.load_r_peaks(tmp_path, "train", records, "slope")
            assert len(found) == 3 and all(row.dtype == np.int32 for row in found)
            table = arrays.load_table(tmp_path, "train", records)
            assert table is None or len(table["ecg_id"]) == len(table["patient_id"]) == 3
    fuzz(120, act, 10)


# ---- properties

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
