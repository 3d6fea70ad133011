"""preprocess.py as its user runs it: from a small folder shaped like PTB-XL to arrays, audit, errors and interrupts."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb

from ecg import arrays
from ecg import signals
from preprocess import main, run
from utils import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE, CLASSES = "ptbxl_database.csv", "scp_statements.csv"
CODES = {"normal": {"NORM": 100.0, "SR": 0.0}, "abnormal": {"IMI": 100.0, "NDT": 50.0, "SR": 0.0},
         "mixed": {"LVH": 50.0, "NORM": 80.0, "IMI": 15.0}, "unlabelled": {"SR": 0.0}}
KINDS, SUPERCLASSES = list(CODES), {"normal": "NORM", "abnormal": "MI STTC", "mixed": "HYP MI NORM"}
STATEMENTS = ",diagnostic,diagnostic_class\nNDT,1.0,STTC\nNORM,1.0,NORM\nIMI,1.0,MI\nLVH,1.0,HYP\nSR,,\n"
# (ecg_id, fold, kind), four a fold: folds 9 and 10 hold each kind once, the others two normals and one of two kinds
RECORDS = [(10 + 3 * n, n % 10 + 1, KINDS[max(0, n // 10 - (n % 10 < 8))]) for n in range(40)]
FLAT = 10       # the ecg_id whose lead II is flat, a normal of fold 1
load = partial(arrays.open_signals, leads=12)


def wanted(split, absent=()):
    """The records that belong in a split's array, in order."""
    return [(ecg_id, fold, kind) for ecg_id, fold, kind in RECORDS if kind != "unlabelled" and ecg_id not in absent
            and (kind == "normal" and fold < 10 if split == "train" else fold == {"val": 9, "test": 10}[split])]


def make_ecg(ecg_id, rate):
    """(10 s, 12) mV of Gaussian waves: rhythm and amplitudes differ from record to record and lead to lead."""
    time_axis = np.arange(10 * rate) / rate
    beats = np.arange(0.45, 9.9, 0.7 + ecg_id % 17 / 50)
    beats += 0.02 * np.sin(np.arange(len(beats)))       # HeartPy refuses rhythms without any variability
    wave = sum(height * np.exp(-0.5 * ((time_axis - beats[:, None] - centre) / width) ** 2).sum(axis=0) for
               height, centre, width in ((0.1, -0.16, 0.025), (1.0, 0, 0.02), (-0.2, 0.05, 0.02), (0.08, 0.25, 0.05)))
    ecg = wave[:, None] * np.linspace(0.6, 1.4, 12) + 0.2 * np.sin(time_axis + ecg_id)[:, None]
    return np.round(ecg * ([1, ecg_id != FLAT] + [1] * 10), 3)


def expected_row(ecg_id, split):
    filtered = signals.filter_leads(make_ecg(ecg_id, 500))
    return filtered if split in ("val", "test") else signals.normalize_leads(filtered)


def record_path(folder, ecg_id, rate=500):
    return Path(folder) / f"records{rate}" / "00000" / f"{ecg_id:05d}_{'lr' if rate == 100 else 'hr'}"


def write_ptbxl(folder, rate=500):
    """The two tables, rows not in the order of ecg_id, and the WFDB records at one of the two rates."""
    table = [{"ecg_id": ecg_id, "patient_id": ecg_id * 7.0, "scp_codes": str(CODES[kind]), "strat_fold": fold,
              "filename_lr": f"records100/00000/{ecg_id:05d}_lr", "filename_hr": f"records500/00000/{ecg_id:05d}_hr"}
             for ecg_id, fold, kind in RECORDS]
    record_path(folder, 0, rate).parent.mkdir(parents=True)
    pd.DataFrame(table[::-1]).to_csv(folder / TABLE, index=False)
    (folder / CLASSES).write_text(STATEMENTS)
    for ecg_id, _, _ in RECORDS:
        path = record_path(folder, ecg_id, rate)
        wfdb.wrsamp(path.name, fs=rate, units=["mV"] * 12, sig_name=list(signals.LEAD_NAMES), fmt=["16"] * 12,
                    p_signal=make_ecg(ecg_id, rate), adc_gain=[1e3] * 12, baseline=[0] * 12, write_dir=str(path.parent))
    return folder


def command(ptbxl, *flags, start=(str(REPOSITORY / "preprocess.py"),), hash_seed="0"):
    """What starts preprocess.py: arguments, environment, captured text. One worker unless the flags say otherwise."""
    return {"args": [sys.executable, *start, "--ptbxl_path", str(ptbxl), "--workers", "1", *map(str, flags)],
            "env": os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def preprocess(ptbxl, cwd, *flags, refusal=(), **options):
    """Run to the end, to exit code 0, or where words are given to a refusal that says them; returns stdout, stderr."""
    done = subprocess.run(**command(ptbxl, *flags, **options), cwd=cwd, timeout=120, check=False)
    if refusal:
        check_refusal(done.returncode, done.stderr, *refusal)
    assert refusal or done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def call_main(ptbxl, cwd, monkeypatch, *flags):
    """The exit code of preprocess.py, called without a new process: for what is refused before any work."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["preprocess.py", "--ptbxl_path", str(ptbxl), "--workers", "1", *flags])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    return stopped.value.code


def check_refusal(returncode, stderr, *words):
    """Exit code 2 and one sentence that says these words, nothing else but perhaps a progress bar."""
    sentence, = (line for line in stderr.splitlines() if line and not line.startswith("preprocess:"))
    assert returncode == 2 and sentence.startswith("error: ") and all(word in sentence for word in words), sentence


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare_with(line):
    """What starts preprocess.py with a line of code before each record is prepared."""
    return ("-c", f"""import os, signal, time, preprocess
signal.signal(signal.SIGINT, signal.default_int_handler)
prepare_record = preprocess.prepare_record
def changed(task):
    {line}
    return prepare_record(task)
preprocess.prepare_record = changed
preprocess.run(preprocess.main)""")


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    return write_ptbxl(tmp_path_factory.mktemp("ptbxl"))


@pytest.fixture(scope="module")
def prepared(ptbxl, tmp_path_factory):
    """(data folder, stdout, stderr) of a plain run with the default --data_path."""
    cwd = tmp_path_factory.mktemp("plain")
    return cwd / "data", *preprocess(ptbxl, cwd)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_arrays_hold_the_filtered_records_in_table_order(prepared, split):
    """Rows follow the ecg_id, training rows are normalised, val and test are in mV, a flat lead is 0 and not NaN."""
    stored, expected = load(prepared[0], split), [expected_row(ecg_id, split) for ecg_id, _, _ in wanted(split)]
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    assert stored.dtype == np.float32 and (split != "train" or (stored[0, :, 1] == 0).all())


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_and_r_peaks_stand_beside_the_rows(prepared, monkeypatch, split):
    """Normal is exactly {NORM}, mixed is abnormal; each row has its record beside it, and the R peaks it gives."""
    monkeypatch.setattr(arrays, "find_r_peaks", lambda lead: pytest.fail("the sidecar was not used"))
    stored = load(prepared[0], split)
    r_peaks = arrays.load_r_peaks(prepared[0], split, stored)
    expected = [(ecg_id, fold, int(kind != "normal"), SUPERCLASSES[kind], " ".join(CODES[kind]), len(found))
                for (ecg_id, fold, kind), found in zip(wanted(split), r_peaks, strict=True)]
    table = arrays.load_records(prepared[0], split, stored)
    assert list(zip(*(column.tolist() for column in table.values()), strict=True)) == expected
    assert split == "train" or arrays.load_npy(arrays.label_path(prepared[0], split)).tolist() == [
        label for _, _, label, *_ in expected]
    for (ecg_id, *_), row, found in zip(expected, stored, r_peaks):
        assert np.array_equal(found, signals.find_r_peaks(row[:, 1])) and (len(found) > 5 or ecg_id == FLAT)


def test_normalisation_of_the_training_set_can_be_undone(prepared):
    """Beside train.npy stand the mV that became -1 and 1 in each lead; a flat lead has both equal."""
    stored = load(prepared[0], "train")
    details = arrays.load_details(prepared[0], "train", stored)
    assert details["phases"] is None and arrays.load_details(prepared[0], "train", stored[::-1]) is None
    for row, (ecg_id, *_), low, high in zip(stored, wanted("train"), details["low"], details["high"]):
        restored = (row + 1) / 2 * (high - low) + low
        np.testing.assert_allclose(restored, expected_row(ecg_id, "val"), atol=1e-5)


def check_audit(stdout, data_path, missing=(), lost=()):
    """The audit in manifest.json and the one printed equal a count by hand."""
    titles = {"train": "train, folds 1-8", "val": "val, fold 9", "test": "test, fold 10", "all": "all"}
    for split, title in titles.items():
        chosen = [record for record in RECORDS if split in ("all", {9: "val", 10: "test"}.get(record[1], "train"))]
        ecg_ids, kinds = {record[0] for record in chosen}, Counter(record[2] for record in chosen)
        expected = {kind: kinds[kind] for kind in ("normal", "abnormal", "mixed", "unlabelled")} | {
            "missing": len(ecg_ids & set(missing)), "lost": len(ecg_ids & set(lost)), "no R peak": int(FLAT in ecg_ids)}
        assert arrays.load_manifest(data_path)["audit"][split] == expected
        printed = re.search(rf"^{title}((?: +\d+)+)$", stdout, re.MULTILINE)
        assert printed[1].split() == [str(count) for count in expected.values()]


def test_audit_is_a_count_by_hand(prepared):
    """What became of the records can be checked against the paper's counts; nothing half-made or noisy is left."""
    data_path, stdout, stderr = prepared
    check_audit(stdout, data_path)
    assert "Warning" not in stderr and not {".part", ".tmp"} & {path.suffix for path in data_path.iterdir()}
    manifest = arrays.load_manifest(data_path)
    assert manifest["lost"] == [] and manifest["source"]["records_in_table"] == 40
    assert {split: entry["shape"] for split, entry in manifest["arrays"].items()} == {
        split: [len(wanted(split)), 5000, 12] for split in ("train", "val", "test")}


@pytest.mark.parametrize("hash_seed, workers, delay", [("1", 2, 2), ("2", 1, 0)])
def test_outputs_do_not_depend_on_chance(ptbxl, prepared, tmp_path, hash_seed, workers, delay):
    """The published labels depend on the order of a set; here neither hashes nor a slow worker change any byte."""
    start = prepare_with(f"time.sleep({delay} * (task[0] == {FLAT}))")
    stdout, _ = preprocess(ptbxl, tmp_path, "--workers", workers, hash_seed=hash_seed, start=start)
    check_audit(stdout, tmp_path / "data")
    first, second = read_all(prepared[0]), read_all(tmp_path / "data")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name != "manifest.json")    # it holds the time


def test_missing_and_corrupt_records_are_refused_or_counted(ptbxl, tmp_path):
    """A partial download is refused with its size and names; if it is allowed, all that lacks is counted and named."""
    folder, data_path = Path(shutil.copytree(ptbxl, tmp_path / "ptbxl")), tmp_path / "data"
    missing, lost = (13, 64, 124), 97
    for ecg_id, end in zip((*missing, 124), (".dat", ".hea", ".dat", ".hea")):
        record_path(folder, ecg_id).with_suffix(end).unlink()
    os.truncate(record_path(folder, lost).with_suffix(".dat"), 70000)
    words = ("3 of the 40 records", "records500/00000/00013_hr", "00064_hr", "00124_hr", "--allow_missing")
    assert preprocess(folder, tmp_path, refusal=words)[0] == "" and not data_path.exists()
    stdout = preprocess(folder, tmp_path, "--allow_missing")[0]
    check_audit(stdout, data_path, missing, [lost])
    loss, = arrays.load_manifest(data_path)["lost"]
    assert f"\nlost: record {lost} (test): {loss['reason']}\n" in stdout and "unreadable" in loss["reason"]
    for split in ("train", "val", "test"):
        stored, left = load(data_path, split), [ecg_id for ecg_id, _, _ in wanted(split, (*missing, lost))]
        assert arrays.signal_path(data_path, split).stat().st_size == 128 + len(left) * 5000 * 12 * 4
        assert arrays.load_records(data_path, split, stored)["ecg_id"].tolist() == left
        np.testing.assert_allclose(stored[-1], expected_row(left[-1], split), atol=1e-5)


@pytest.mark.parametrize("name, old, new, word", [
    (TABLE, None, "", "missing"), (CLASSES, None, "", "missing"), (TABLE, ".*", "", TABLE),
    (TABLE, ".*", "<html>404</html>\n", "scp_codes"), (TABLE, "scp_codes", "codes", "scp_codes"),
    (TABLE, "strat_fold", "fold", "strat_fold"), (TABLE, "filename_hr", "file", "filename_hr"),
    (TABLE, "ecg_id", "number", "ecg_id"), (CLASSES, "diagnostic_class", "class", "diagnostic_class"),
    (CLASSES, ",MI", ",", CLASSES), (TABLE, "{'SR'", "{SR", "record 127"), (TABLE, "{'SR': 0.0}", "", "record 127"),
    (TABLE, "\n127", "\nabc", TABLE)])
def test_damaged_tables_are_refused(ptbxl, tmp_path, monkeypatch, capsys, name, old, new, word):
    """A table that is missing, cut, lacks a column or holds unreadable codes is named; none is guessed around."""
    folder = Path(shutil.copytree(ptbxl, tmp_path / "ptbxl", ignore=shutil.ignore_patterns("records*")))
    (folder / "records500").symlink_to(ptbxl / "records500")
    text = (folder / name).read_text()
    (folder / name).unlink()
    if old is not None:
        (folder / name).write_text(re.sub(old, new, text, count=1, flags=re.DOTALL))
    check_refusal(call_main(folder, tmp_path, monkeypatch), capsys.readouterr().err, name, word)


@pytest.mark.parametrize("flags", [
    ("--limit", "0"), ("--workers", "0"), ("--data_path", "half.npz"), ("--sampling_rate", "100", "--allow_missing"),
    *(("--benchmark_truth", name) for name in ("none.npz", "half.npz", "lone.npy", "shape.npz"))])
def test_bad_flags_are_refused(ptbxl, tmp_path, monkeypatch, capsys, flags):
    """A value that cannot be, a file where a folder must be, no file of the rate, or damaged truth names its flag."""
    np.save(tmp_path / "lone.npy", np.zeros((1, 5000, 12)))
    np.savez(tmp_path / "shape.npz", ecg_id=[37], label=np.zeros((1, 100, 12)))
    (tmp_path / "half.npz").write_bytes((tmp_path / "shape.npz").read_bytes()[:700])
    check_refusal(call_main(ptbxl, tmp_path, monkeypatch, *flags), capsys.readouterr().err, flags[0])


def test_a_rerun_replaces_and_a_failed_one_does_not(ptbxl, prepared, tmp_path):
    """Good arrays stay when a run fails after it began to write; a good one replaces all; none in between has ids."""
    copied = Path(shutil.copytree(prepared[0], tmp_path / "data"))
    before = read_all(copied)
    preprocess(ptbxl, tmp_path, "--limit", 3, refusal=("val.npy", "--limit"))
    assert read_all(copied) == before
    preprocess(ptbxl, tmp_path, "--limit", 20)
    assert read_all(copied).keys() == before.keys()
    records = [arrays.load_records(copied, split, load(copied, split)) for split in ("val", "test")]
    assert [table["ecg_id"].tolist() for table in records] == [[34, 64], [37, 67]]
    assert arrays.load_npy(copied / "label.npy").tolist() == records[1]["label"].tolist() == [0, 1]
    (copied / "val_r_peaks.npz").unlink()
    (copied / "val_r_peaks.npz").mkdir()        # fails the run when its first arrays have their names
    preprocess(ptbxl, tmp_path, refusal=("val_r_peaks.npz",))
    made = arrays.load_npy(copied / "test.npy")
    assert arrays.load_manifest(copied) is None and arrays.load_records(copied, "test", made) is None
    with pytest.raises(UserError, match="files of two runs"):
        load(copied, "test")


def test_the_small_download_gives_nearly_the_same(prepared, tmp_path):
    """records100 alone is enough: rows of the same shape, nearly the same values and R peaks at the same places."""
    preprocess(write_ptbxl(tmp_path / "ptbxl", 100), tmp_path, "--sampling_rate", 100)
    for split in ("train", "val", "test"):
        folders = (tmp_path / "data", prepared[0])
        low, high = (load(folder, split) for folder in folders)
        np.testing.assert_allclose(low, high, atol=0.03)
        for found, expected in zip(*map(arrays.load_r_peaks, folders, [split] * 2, (low, high)), strict=True):
            np.testing.assert_allclose(found, expected, atol=3)


def test_benchmark_holds_the_marked_records_of_fold_10(ptbxl, tmp_path):
    """The benchmark is normalised, in table order, each record with its own points; training records never enter it."""
    points = {ecg_id: np.random.default_rng(ecg_id).random((5000, 12)) < 0.1 for ecg_id in (97, 13, 37)}
    np.savez(tmp_path / "truth.npz", ecg_id=list(points), label=list(points.values()))
    preprocess(ptbxl, tmp_path, "--benchmark_truth", "truth.npz")
    data_path, stored = tmp_path / "data", load(tmp_path / "data", "benchmark")
    np.testing.assert_allclose(stored, [expected_row(ecg_id, "benchmark") for ecg_id in (37, 97)], atol=1e-5)
    assert np.array_equal(arrays.open_labels(data_path, "benchmark", stored.shape), [points[37], points[97]])
    assert arrays.load_records(data_path, "benchmark", stored)["ecg_id"].tolist() == [37, 97]
    truth = arrays.load_details(data_path, "benchmark", stored)
    millivolts = [expected_row(ecg_id, "test") for ecg_id in (37, 97)]
    assert truth["phases"] is None and arrays.load_manifest(data_path)["benchmark"]["data_set"] == "PTB-XL"
    np.testing.assert_allclose(truth["low"], np.min(millivolts, axis=1), atol=1e-5)
    np.testing.assert_allclose(truth["high"], np.max(millivolts, axis=1), atol=1e-5)


@pytest.mark.parametrize("name, earlier", [("SIGINT", 0), ("SIGTERM", 0), ("SIGKILL", 0), ("SIGKILL", 1)])
def test_an_interrupted_run_leaves_nothing_that_looks_done(ptbxl, prepared, tmp_path, name, earlier):
    """Stopped after it has written rows, a run leaves no array that was not there, and earlier ones as they were."""
    out, start = tmp_path / "data", prepare_with("while task[0] > 60: signal.pause()")
    shutil.copytree(prepared[0], out) if earlier else out.mkdir()
    before, number = read_all(out), getattr(signal, name)
    process = subprocess.Popen(**command(ptbxl, start=start), cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in out.glob("*.part")) < 1e6:        # four rows
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)    # Ctrl-C reaches workers as well
        assert process.wait(timeout=30) == (-number if number == signal.SIGKILL else 130)
    finally:
        with contextlib.suppress(ProcessLookupError):       # SIGKILL leaves a stalled worker behind for a second
            os.killpg(process.pid, signal.SIGKILL)
        stderr = process.communicate()[1]
    left = {path: content for path, content in read_all(out).items() if name != "SIGKILL" or path[-5:] != ".part"}
    assert left == before and "Traceback" not in stderr and (name == "SIGKILL" or "\ninterrupted\n" in stderr)


def test_a_killed_worker_ends_the_run(ptbxl, tmp_path):
    """A worker that the system kills for want of memory ends the run in a sentence; it does not wait for ever."""
    start = prepare_with("os.kill(os.getpid(), signal.SIGKILL) if task[0] == 61 else None")
    preprocess(ptbxl, tmp_path, "--workers", 2, start=start, refusal=("--workers", "killed"))
    assert list((tmp_path / "data").iterdir()) == []
