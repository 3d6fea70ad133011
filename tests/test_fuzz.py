"""More than 2,000 damaged or arbitrary inputs: each is accepted with finite content or refused by name, none hangs.

Headers (800), .csv files (800) and .npy files (500) alone are as many, 800 of them in test_fuzz_recordings.py;
pytest tests/test_fuzz.py tests/test_fuzz_recordings.py -s prints how many were accepted. A refusal is a UserError or,
for a record, a RecordError, which the audit of preprocess.py prints. All cases follow from fixed seeds.
"""
import contextlib
import io
import signal
import warnings

import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg import arrays
from ecg import ptbxl
from scoring import passes
from ecg import signals
from dataloader import cut_beats, make_batch, normalize_records, scoring_masks, valid_beats
from model import MCF, compute_trend
from utils import UserError

SECONDS = 20                        # no case takes one; what is still running then hangs
MB = 2 ** 20
NASTY = ("", "0", "-1", "1", "nan", "inf", "1e999", "-1e-999", "99999999999999999999", "2147483648", "1e308", "(", "/",
         "x", "\x00", "\u00b5V", "16x0", "16x3", "16:7", "16+24", "212", "80", "8", "310", "24", "32", "61", "508", "~",
         "record", "V1", "500(0)/mV", "1e-300/mV", "0/mV", "1000.0(99999999)/mV", "1000/uV", "1000/V", "a" * 5000)
properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)


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
    except (UserError, signals.RecordError) as error:
        assert "\n" not in str(error) and len(str(error)) > 5, case
        counts["refused"] += 1
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} in case {case!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tell(counts: dict, what: str) -> dict:
    """Print what became of the cases; returns the counts."""
    print(f"{sum(counts.values())} {what}: {counts['accepted']} accepted, {counts['refused']} refused")
    return counts


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


# ---- WFDB records

def ecg_like(rate=100):
    """(10 s, 12) mV with beats."""
    time = np.arange(10 * rate) / rate
    beats = np.arange(0.4, 9.8, 0.8) + 0.02 * np.sin(np.arange(12))
    return np.exp(-0.5 * ((time - beats[:, None]) / 0.02) ** 2).sum(axis=0)[:, None] * np.linspace(0.5, 1.5, 12)


@pytest.fixture(scope="module")
def network():
    """The smallest network."""
    torch.manual_seed(0)
    return MCF(hidden=2).eval()


def fuzz_records(folder, cases, change) -> tuple:
    """Read, filter and search each case; returns counts and the accepted records."""
    wfdb.wrsamp("record", fs=100, units=["mV"] * 12, sig_name=list(signals.LEAD_NAMES), p_signal=ecg_like(),
                fmt=["16"] * 12, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(folder))
    header, data = (folder / "record.hea").read_bytes(), (folder / "record.dat").read_bytes()
    counts, accepted = {"accepted": 0, "refused": 0}, []
    for case in range(cases):
        texts = change(np.random.default_rng(case), header, data)
        for name, content in zip(("record.hea", "record.dat"), texts):
            (folder / name).write_bytes(content)
        with outcome(counts, (case, texts[0][:3000])):
            filtered = signals.filter_leads(signals.read_record(folder / "record", 100)).astype(np.float32)
            r_peaks = signals.find_r_peaks(filtered[:, signals.LEAD_II])
            assert filtered.shape == (5000, 12) and np.isfinite(filtered).all()
            assert np.isfinite(signals.normalize_leads(filtered)).all()
            accepted.append((filtered, r_peaks))
    assert sum(counts.values()) == cases and counts["refused"] > 0
    tell(counts, "records of PTB-XL, headers or samples damaged")
    return counts, accepted


def check_scores(network, records, r_peaks):
    """Scores and maps are finite under both protocols."""
    for protocol in passes.PLAIN_PROTOCOLS:
        found = passes.score_split(network, records, r_peaks, protocol, 30, torch.device("cpu"), "test",
                                    with_maps=True, beats_per_record=2)
        assert np.isfinite(found.scores).all() and np.isfinite(found.maps).all()


def test_400_damaged_headers(tmp_path, network):
    """Fields of all kinds replaced, lines lost or doubled, bytes changed: read and scored, or refused; no hang."""
    counts, accepted = fuzz_records(tmp_path, 400, lambda rng, header, data: (mutate(rng, header), data))
    assert counts["accepted"] > 10
    some = accepted[::max(1, len(accepted) // 20)]
    check_scores(network, np.stack([filtered for filtered, _ in some]), [found for _, found in some])


def test_200_damaged_samples(tmp_path):
    """A .dat with bytes changed, lost or added does not fit its checksum or length: none is taken for a recording."""
    counts, _ = fuzz_records(tmp_path, 200, lambda rng, header, data: (header, mutate(rng, data)))
    assert counts["accepted"] < 10              # changes that leave every lead's sum as it was


# ---- PTB-XL's tables

TABLE = (b"ecg_id,patient_id,scp_codes,strat_fold,filename_lr,filename_hr\n"
         + b"".join(b"%d,%d.0,\"{'NORM': 100.0, 'SR': 0.0}\",%d,records100/%05d_lr,records500/%05d_hr\n"
                    % (n, 7 * n, n % 10 + 1, n, n) for n in range(1, 13)))
STATEMENTS = b",description,diagnostic,diagnostic_class\nNORM,normal,1.0,NORM\nIMI,infarction,1.0,MI\nSR,sinus,,\n"
CELLS = (*NASTY[:16], "{}", "{'NORM'}", "[1]", "{1: 2}", "{None: 1}", '"' + "{" * 300 + '"', '"' + "(" * 9000 + '"',
         '"', "-0", "1.5", "NORM", "None", "\xa0", "{'NORM': 1e999}", "__import__('os')", "9" * 400, "True",
         "2020-01-01")


@pytest.mark.parametrize("name, start", [("ptbxl_database.csv", 0), ("scp_statements.csv", 1000)])
def test_200_damaged_tables(tmp_path, name, start):
    """ptbxl_database.csv and scp_statements.csv: cells of all kinds, broken quotes, lost lines; nothing is executed."""
    whole = {"ptbxl_database.csv": TABLE, "scp_statements.csv": STATEMENTS}
    for other, content in whole.items():
        (tmp_path / other).write_bytes(content)
    counts = {"accepted": 0, "refused": 0}
    for case in range(start, start + 200):
        damaged = mutate(np.random.default_rng(case), whole[name], CELLS, b",")
        (tmp_path / name).write_bytes(damaged)
        with outcome(counts, (case, damaged)):
            records = ptbxl.load_ptbxl(tmp_path, 100, None)
            assert records.index.is_unique and records["fold"].between(1, 10).all()
            present = ptbxl.files_of(records, tmp_path)
            rows = [ptbxl.table_row(record) | {"to": ptbxl.destinations(record, {})} for record in records.itertuples()]
            assert len(rows) == len(records) and not present.any()
    assert min(tell(counts, f"{name} files").values()) > 20


# ---- the files in data/

def bytes_of(write, *args, **options):
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def test_300_damaged_arrays(tmp_path):
    """train.npy with any bytes changed: opened and read whole and finite, or refused; nothing is unpickled."""
    good = bytes_of(np.save, np.random.default_rng(0).random((2, 5000, 12)).astype(np.float32))
    header = good[:128]
    words = ("'<f4'", "'<f8'", "'<f2'", "'|O'", "'<i4'", "'<c8'", "'|S4'", "'<M8[s]'", "(2, 5000, 12)", "(9999999999,)",
             "(2,", "5000,", "(0,", "(-2,", "(1e9,", "True,", "False,", "None", "{", "}", "[('a','<f4')]", "__import__")
    counts = {"accepted": 0, "refused": 0}
    for case in range(300):
        rng, values = np.random.default_rng(case), bytearray(good[128:])
        for place in rng.integers(0, len(values) - 4, case % 3):
            values[place:place + 4] = rng.bytes(4)
        damaged = (header if case % 2 else mutate(rng, header, words)) + bytes(values)
        (tmp_path / "train.npy").write_bytes(damaged)
        with outcome(counts, (case, damaged[:140])):
            opened = arrays.open_signals(tmp_path, "train", 12)
            block = arrays.read_rows(opened, slice(0, 2), "train.npy")
            assert block.shape[1:] == (5000, 12) and np.isfinite(block).all()
            assert np.isfinite(normalize_records(torch.from_numpy(block)).numpy()).all()
    assert min(tell(counts, "train.npy files").values()) > 20


def test_200_label_files(tmp_path):
    """label.npy of any type, shape and value: 0 and 1, both, one a record, or refused."""
    kinds = ["?", "u1", "i1", "<i8", ">i4", "<f2", "<f8", "<c8", "U2", "S3", "M8[D]", "m8[s]", "V4", [("a", "i4")]]
    counts = {"accepted": 0, "refused": 0}
    for case in range(200):
        rng = np.random.default_rng(case)
        labels = rng.integers(*((0, 2) if case % 4 else (-1, 4)), [4, 4, 4, 3, 0, (2, 2)][case % 6])
        with contextlib.suppress(TypeError, ValueError):            # a kind that integers cannot become
            labels = labels.astype(kinds[case % len(kinds)])
        damaged = bytes_of(np.save, labels)
        (tmp_path / "label.npy").write_bytes(mutate(rng, damaged) if case % 7 == 0 else damaged)
        with outcome(counts, (case, labels)):
            opened = arrays.open_labels(tmp_path, "test", (4,))
            assert {0, 1} == set(np.asarray(opened, dtype=float).tolist()) and opened.shape == (4,)
    assert min(tell(counts, "label.npy files").values()) > 20


def test_300_damaged_sidecars(tmp_path, monkeypatch):
    """R peaks, details, manifest and table of records: taken whole, made again, passed over, or refused by name."""
    made = np.random.default_rng(0).random((3, 5000, 12)).astype(np.float32)
    np.save(tmp_path / "train.npy", made)
    opened = arrays.open_signals(tmp_path, "train", 12)
    identity, peaks = arrays.fingerprint(opened), [np.arange(300, 4900, 400, dtype=np.int32)] * 3
    monkeypatch.setattr(arrays, "find_r_peaks", lambda _: peaks[0])
    whole = {"train_r_peaks.npz": bytes_of(arrays.pack_r_peaks, peaks, identity),
             "train_details.npz": bytes_of(arrays.pack_details, list(made.min(1)), list(made.max(1)), [], identity),
             "manifest.json": b'{"arrays": {"train":\n {"shape": [3, 5000, 12], "fingerprint":\n "%s"}}}'
                              % identity.encode(),
             "train_records.csv": b"ecg_id,fold,label,superclasses,statements,r_peaks\n1,1,0,NORM,NORM SR,12\n"
                                  b"2,2,0,NORM,NORM,12\n3,9,0,NORM,NORM,12\n"}
    json_words = (*CELLS, "[", "[" * 20000, "null", "[1]", '"arrays"', "{}", "1e999", '"x"')
    counts = {"accepted": 0, "refused": 0}
    for case in range(300):
        name, rng = list(whole)[case % 4], np.random.default_rng(case)
        for other, content in whole.items():
            (tmp_path / other).write_bytes(content)
        damaged = mutate(rng, whole[name], json_words, b"," if name.endswith("csv") else b" ")
        (tmp_path / name).write_bytes(damaged)
        with outcome(counts, (case, name, damaged[:2000])):
            found = arrays.load_r_peaks(tmp_path, "train", opened)
            assert len(found) == 3 and all(row.dtype == np.int32 for row in found)
            details = arrays.load_details(tmp_path, "train", opened)
            assert details is None or details["low"].shape == (3, 12)
            records = arrays.load_records(tmp_path, "train", opened)
            assert records is None or len(records["ecg_id"]) == 3
    assert min(tell(counts, "sidecars").values()) > 20


# ---- properties

def made_ecg(seed, scale, offset, kind):
    """(5000, 12) finite float64 of any scale and shape."""
    rng = np.random.default_rng(seed)
    shapes = {"noise": lambda: rng.normal(size=(5000, 12)), "drift": lambda: np.cumsum(rng.normal(size=(5000, 12)), 0),
              "spike": lambda: np.eye(5000, 12, k=-int(rng.integers(4000))), "steps": lambda: np.repeat(
                  rng.normal(size=(50, 12)), 100, axis=0), "beats": lambda: ecg_like(500), "flat": lambda: np.ones(
                  (5000, 12)), "rounded": lambda: np.rint(rng.normal(size=(5000, 12)))}
    made = shapes[kind]() * scale + offset
    made[:, rng.random(12) < 0.2] = offset
    return made


KINDS = st.sampled_from(["noise", "drift", "spike", "steps", "beats", "flat", "rounded"])
SEEDS, POWERS = st.integers(0, 2 ** 32 - 1), st.floats(-6, 6) | st.floats(-320, 300)
OFFSETS = st.sampled_from([0.0, 0.3, -5.0, 1e-300, 1e4])


@properties
@given(SEEDS, POWERS, OFFSETS, KINDS)
def test_any_scale_gives_finite_leads_and_beats(seed, power, offset, kind):
    """From 1e-320 to 1e300 mV: filter, normalisation, R peaks, beats and trend are finite, or the row is refused."""
    ecg = made_ecg(seed, 10.0 ** power, offset, kind)
    with outcome({"accepted": 0, "refused": 0}, (seed, power, offset, kind)):
        filtered = signals.filter_leads(ecg)
        leads = signals.normalize_leads(filtered)
        assert np.isfinite(leads).all() and np.abs(leads).max() <= 1 + 1e-6
        r_peaks = signals.find_r_peaks(filtered[:, signals.LEAD_II])
        with np.errstate(over="ignore"):
            block = arrays.read_rows(filtered.astype(np.float32)[None], slice(0, 1), "test.npy")
        positions, _ = valid_beats(r_peaks)
        for records in (torch.from_numpy(block), normalize_records(torch.from_numpy(block))):
            beats = cut_beats(records, torch.zeros(len(positions), dtype=torch.long), torch.from_numpy(positions))
            assert beats.isfinite().all() and beats.abs().max() <= 1 + 1e-6
            trend = compute_trend(records[:, 100:4900])
            assert trend.isfinite().all() and trend.abs().max() <= 1 + 1e-6


@settings(properties, max_examples=15)
@given(st.lists(st.tuples(SEEDS, st.floats(-40, 6), KINDS), min_size=1, max_size=3),
       st.lists(st.lists(st.integers(-10 ** 6, 10 ** 6), max_size=30), min_size=3, max_size=3))
def test_any_record_gets_a_finite_score(network, made, r_peaks):
    """Any accepted record with R peaks anywhere, even outside it, gets finite scores and maps, one beat or thirty."""
    records = np.stack([made_ecg(seed, 10.0 ** power, 0, kind) for seed, power, kind in made]).astype(np.float32)
    records = np.clip(records, -1e6, 1e6)
    check_scores(network, records, [np.array(found, np.int64) for found in r_peaks[:len(made)]])


@settings(properties, max_examples=200)
@given(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1), max_size=40))
def test_any_r_peaks_give_beats_inside(r_peaks):
    """Whatever the R peaks, there is at least one beat, and every beat lies inside the recording."""
    positions, real = valid_beats(np.array(r_peaks, dtype=np.int64))
    assert len(positions) and (positions >= 140).all() and (positions + 340 <= 5000).all()
    assert real == any(200 < peak < 4400 for peak in r_peaks)


@settings(properties, max_examples=100)
@given(st.integers(1, 100), st.sampled_from(passes.PLAIN_PROTOCOLS), SEEDS)
def test_any_mask_ratio_gives_finite_batches(mask_ratio, protocol, seed):
    """Every --mask_ratio has masks that hide something but not all; clean hides every sample exactly once."""
    global_masks, local_masks = scoring_masks(protocol, mask_ratio)
    for masks in (global_masks, local_masks):
        assert masks.any(dim=1).all()
        assert protocol != "clean" or (masks.sum(dim=0) == 1).all()
    records = torch.from_numpy(made_ecg(seed, 1.0, 0.0, "noise").astype(np.float32))[None]
    batch = make_batch(records, torch.tensor([2000]), global_masks[0], local_masks[0])
    assert all(part.isfinite().all() for part in batch)
