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
from conftest import ROOT, full_disk, reset_signals, run_script
from small import beats_at, every, read_all, write_wfdb

import preprocess
from ecg import arrays, signals, writing
from ecg.r_peaks import find_r_peaks_by_heartpy, find_r_peaks_by_slope
from utils import UserError

TABLE, CLASSES = "ptbxl_database.csv", "scp_statements.csv"
CODES = {"normal": {"NORM": 100.0, "SR": 0.0}, "abnormal": {"IMI": 100.0, "NDT": 50.0, "SR": 0.0},
         "mixed": {"LVH": 50.0, "NORM": 80.0, "IMI": 15.0}, "unlabelled": {"SR": 0.0}}
KINDS, SUPERCLASSES = list(CODES), {"normal": "NORM", "abnormal": "MI STTC", "mixed": "HYP MI NORM"}
STATEMENTS = ",diagnostic,diagnostic_class\nNDT,1.0,STTC\nNORM,1.0,NORM\nIMI,1.0,MI\nLVH,1.0,HYP\nSR,,\n"
# (ecg_id, fold, kind), four a fold: folds 9 and 10 hold each kind once, the others two normals and one of two kinds
RECORDS = [(10 + 3 * n, n % 10 + 1, KINDS[max(0, n // 10 - (n % 10 < 8))]) for n in range(40)]
AGES = {13: 300.0, 16: float("nan")}                    # PTB-XL's way of saying 90 or older, and unknown
FLAT = 10       # the ecg_id whose lead II is flat, a normal of fold 1
load = partial(arrays.open_records, leads=12)


def wanted(split, absent=()):
    """The records that belong in a split's array, in order."""
    return [(ecg_id, fold, kind) for ecg_id, fold, kind in RECORDS if kind != "unlabelled" and ecg_id not in absent
            and (kind == "normal" and fold < 10 if split == "train" else fold == {"val": 9, "test": 10}[split])]


def make_ecg(ecg_id, rate):
    """(10 s, 12) mV: rhythm and drift differ from record to record, amplitudes from lead to lead."""
    times = every(0.7 + ecg_id % 17 / 50, 0.45, 9.4)
    ecg = beats_at(times, rate) + 0.2 * beats_at(times + 0.25, rate, 0.05)
    ecg += 0.2 * np.sin(np.arange(10 * rate) / rate + ecg_id)[:, None]
    return np.round(ecg * ([1, ecg_id != FLAT] + [1] * 10), 3)


def expected_row(ecg_id, split):
    filtered = signals.filter_leads(make_ecg(ecg_id, 500))
    return filtered if split in ("val", "test") else signals.normalize_leads(filtered)


def record_path(folder, ecg_id, rate=500):
    return Path(folder) / f"records{rate}" / "00000" / f"{ecg_id:05d}_{'lr' if rate == 100 else 'hr'}"


def write_ptbxl(folder, rate=500):
    """The two tables, rows not in the order of ecg_id, and the WFDB records at one of the two rates."""
    table = [{"ecg_id": ecg_id, "patient_id": ecg_id * 7.0, "age": AGES.get(ecg_id, 50.0),
              "sex": ecg_id % 2, "scp_codes": str(CODES[kind]), "strat_fold": fold,
              "filename_lr": f"records100/00000/{ecg_id:05d}_lr", "filename_hr": f"records500/00000/{ecg_id:05d}_hr"}
             for ecg_id, fold, kind in RECORDS]
    record_path(folder, 0, rate).parent.mkdir(parents=True)
    pd.DataFrame(table[::-1]).to_csv(folder / TABLE, index=False)
    (folder / CLASSES).write_text(STATEMENTS)
    for ecg_id, _, _ in RECORDS:
        write_wfdb(record_path(folder, ecg_id, rate), make_ecg(ecg_id, rate), rate)
    return folder


def run(ptbxl, data_path, *flags, refusal=()):
    """Run preprocess.py to exit code 0, or to a refusal, one sentence with these words; returns what it printed."""
    done = run_script("preprocess.py", "--ptbxl_path", ptbxl, "--data_path", data_path, "--workers", 1, *flags)
    assert all(word in done.refusal for word in refusal) if refusal else done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    return write_ptbxl(tmp_path_factory.mktemp("ptbxl"))


@pytest.fixture(scope="module")
def prepared(ptbxl, tmp_path_factory):
    """(data folder, what was printed) of a plain run."""
    data_path = tmp_path_factory.mktemp("plain") / "data"
    return data_path, run(ptbxl, data_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rows_labels_and_r_peaks_stand_side_by_side(prepared, monkeypatch, split):
    """Rows follow the ecg_id, training rows are min-maxed, val and test are in mV, a flat lead is 0 and not NaN.

    Normal is exactly {NORM}, mixed is abnormal; each row has its record beside it, and the R peaks it gives.
    """
    monkeypatch.setattr(arrays, "make_r_peaks", lambda *_: pytest.fail("the sidecar was not used"))
    records = load(prepared[0], split)
    rows = [expected_row(ecg_id, split) for ecg_id, *_ in wanted(split)]
    np.testing.assert_allclose(records.signals, rows, atol=1e-5)
    assert records.signals.dtype == np.float32 and (split != "train" or (records.signals[0, :, 1] == 0).all())
    r_peaks = {name: arrays.load_r_peaks(prepared[0], split, records, name) for name in arrays.R_PEAKS_FILES}
    table = arrays.load_table(prepared[0], split, records)
    expected = [(ecg_id, str(7 * ecg_id), min(AGES.get(ecg_id, 50.0), 90.0), "MF"[ecg_id % 2], fold,
                 int(kind != "normal"), SUPERCLASSES[kind], " ".join(CODES[kind]), len(positions))
                for (ecg_id, fold, kind), positions in zip(wanted(split), r_peaks["heartpy"], strict=True)]
    assert list(zip(*(column.tolist() for column in table.values()), strict=True)) == [
        pytest.approx(row, nan_ok=True) for row in expected]
    assert split == "train" or arrays.load_npy(arrays.label_path(prepared[0], split)).tolist() == [
        row[5] for row in expected]
    for (ecg_id, *_), row, of_heartpy, of_slope in zip(expected, records.millivolts(slice(None)), *r_peaks.values()):
        assert np.array_equal(of_heartpy, find_r_peaks_by_heartpy(row[:, 1]))
        assert np.array_equal(of_slope, find_r_peaks_by_slope(row))
        assert len(of_slope) > 5 and (len(of_heartpy) > 5 or ecg_id == FLAT)


def check_audit(stdout, data_path, missing=(), lost=()):
    """The audit in manifest.json and the one printed equal a count by hand."""
    titles = {"train": "train, folds 1-8", "val": "val, fold 9", "test": "test, fold 10", "all": "all"}
    for split, title in titles.items():
        chosen = [record for record in RECORDS if split in ("all", {9: "val", 10: "test"}.get(record[1], "train"))]
        ecg_ids, kinds = {record[0] for record in chosen}, Counter(record[2] for record in chosen)
        expected = {kind: kinds[kind] for kind in ("normal", "abnormal", "mixed", "unlabelled")} | {
            "missing": len(ecg_ids & set(missing)), "lost": len(ecg_ids & set(lost)), "no R peak": int(FLAT in ecg_ids),
            "unsure": int(FLAT in ecg_ids)}             # HeartPy sees nothing where the other leads tell the beats
        assert arrays.load_manifest(data_path)["audit"][split] == expected
        printed = re.search(rf"^{title}((?: +\d+)+)$", stdout, re.MULTILINE)
        assert printed[1].split() == [str(count) for count in expected.values()]


def test_audit_is_a_count_by_hand(prepared):
    """What became of the records can be checked against the paper's counts; nothing half-made is left."""
    data_path, stdout = prepared
    check_audit(stdout, data_path)
    manifest = arrays.load_manifest(data_path)
    assert manifest["lost"] == [] and manifest["source"]["records_in_table"] == 40
    assert {split: entry["shape"] for split, entry in manifest["arrays"].items()} == {
        split: [len(wanted(split)), 5000, 12] for split in ("train", "val", "test")}
    assert {path.name for path in data_path.iterdir()} == {arrays.MANIFEST} | {
        name for split in ("train", "val", "test") for name in writing.files_of(split)}


def test_outputs_do_not_depend_on_chance(ptbxl, prepared, tmp_path, monkeypatch):
    """The published labels depend on the order of a set; here neither hashes nor a slow worker change any byte."""
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    process = start(ptbxl, tmp_path / "data", f"time.sleep(1.5 * (task[0] == {FLAT}))", workers=2)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    first, second = read_all(prepared[0]), read_all(tmp_path / "data")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name != arrays.MANIFEST)    # it holds the time


def test_missing_and_corrupt_records_are_refused_or_counted(ptbxl, tmp_path):
    """A partial download is refused with its size and names; if it is allowed, all that lacks is counted and named."""
    folder, data_path = Path(shutil.copytree(ptbxl, tmp_path / "ptbxl")), tmp_path / "data"
    missing, lost = (13, 64, 124), 97
    for ecg_id, end in zip((*missing, 124), (".dat", ".hea", ".dat", ".hea")):
        record_path(folder, ecg_id).with_suffix(end).unlink()
    os.truncate(record_path(folder, lost).with_suffix(".dat"), 70000)
    run(folder, data_path, refusal=("3 of the 40 records", "records500/00000/00013_hr", "00064_hr", "--allow_missing"))
    assert not data_path.exists()
    stdout = run(folder, data_path, "--allow_missing")
    check_audit(stdout, data_path, missing, [lost])
    loss, = arrays.load_manifest(data_path)["lost"]
    assert f"\nlost: record {lost} (test): {loss['reason']}\n" in stdout and "unreadable" in loss["reason"]
    for split in ("train", "val", "test"):
        records, left = load(data_path, split), [ecg_id for ecg_id, *_ in wanted(split, (*missing, lost))]
        assert arrays.load_table(data_path, split, records)["ecg_id"].tolist() == left
        np.testing.assert_allclose(records.signals[-1], expected_row(left[-1], split), atol=1e-5)


@pytest.mark.parametrize("name, old, new, word", [
    (TABLE, None, "", "missing"), (CLASSES, None, "", "missing"), (TABLE, ".*", "", TABLE),
    (TABLE, ".*", "<html>404</html>\n", "scp_codes"), (TABLE, "strat_fold", "fold", "strat_fold"),
    (CLASSES, "diagnostic_class", "class", "diagnostic_class"), (CLASSES, ",MI", ",", CLASSES),
    (TABLE, "{'SR'", "{SR", "record 127"), (TABLE, "{'SR': 0.0}", "", "record 127"), (TABLE, "\n127", "\nabc", TABLE)])
def test_damaged_tables_are_refused(ptbxl, tmp_path, name, old, new, word):
    """A table that is missing, cut, lacks a column or holds unreadable codes is named; none is guessed around."""
    folder = Path(shutil.copytree(ptbxl, tmp_path / "ptbxl", ignore=shutil.ignore_patterns("records*")))
    (folder / "records500").symlink_to(ptbxl / "records500")
    text = (folder / name).read_text()
    (folder / name).unlink()
    if old is not None:
        (folder / name).write_text(re.sub(old, new, text, count=1, flags=re.DOTALL))
    run(folder, tmp_path / "data", refusal=(name, word))


@pytest.mark.parametrize("flags", [
    ("--limit", "0"), ("--workers", "0"), ("--data_path", "half.npz"), ("--sampling_rate", "100", "--allow_missing"),
    ("--ptbxl_path", TABLE), ("--benchmark_truth", "none.npz"), ("--benchmark_truth", "half.npz"),
    ("--benchmark_truth", "lone.npy"), ("--benchmark_truth", "shape.npz")])
def test_bad_flags_are_refused(ptbxl, tmp_path, monkeypatch, flags):
    """A value that cannot be, a file where a folder must be, no file of the rate, or damaged truth names its flag."""
    np.save(tmp_path / "lone.npy", np.zeros((1, 5000, 12)))
    np.savez(tmp_path / "shape.npz", ecg_id=[37], label=np.zeros((1, 100, 12)))
    (tmp_path / "half.npz").write_bytes((tmp_path / "shape.npz").read_bytes()[:700])
    (tmp_path / TABLE).touch()
    monkeypatch.chdir(tmp_path)
    run(ptbxl, "data", *flags, refusal=(flags[0] if flags[0] != "--data_path" else "half.npz",))


def test_a_rerun_replaces_and_a_failed_one_does_not(ptbxl, prepared, tmp_path, monkeypatch):
    """Good arrays stay when a run fails after it began to write; a good one replaces all; none in between has ids."""
    copied = Path(shutil.copytree(prepared[0], tmp_path / "data"))
    before = read_all(copied)
    run(ptbxl, copied, "--limit", 3, refusal=("val.npy", "--limit"))
    assert read_all(copied) == before
    run(ptbxl, copied, "--limit", 20)
    assert read_all(copied).keys() == before.keys()
    tables = [arrays.load_table(copied, split, load(copied, split)) for split in ("val", "test")]
    assert [table["ecg_id"].tolist() for table in tables] == [[34, 64], [37, 67]]
    assert arrays.load_npy(copied / "label.npy").tolist() == tables[1]["label"].tolist() == [0, 1]

    with monkeypatch.context() as patch:                    # a run that fails when its first arrays have their names
        patch.setattr(os, "replace", lambda old, new, replace=os.replace: replace(old, new) if "val_r" not in str(new)
                      else (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run(ptbxl, copied, refusal=("No space left",))
    assert arrays.load_manifest(copied) is None
    with pytest.raises(UserError, match="files of two runs"):
        load(copied, "test")
    run(ptbxl, copied)                                      # what it left is known to be ours, and replaced
    assert read_all(copied).keys() == before.keys() and read_all(copied)["test.npy"] == before["test.npy"]


def test_a_full_disk_leaves_what_was_there(ptbxl, prepared, tmp_path):
    """The system refuses the write, also to root; one sentence says why, and nothing half-written stays."""
    copied = Path(shutil.copytree(prepared[0], tmp_path / "data"))
    before = read_all(copied)
    with full_disk(10 ** 6):
        run(ptbxl, copied, "--limit", 20, refusal=("could not be written", "free some space"))
    assert read_all(copied) == before


@pytest.mark.parametrize("name", ["train.npy", "label.npy", "test_records.csv", "val_r_peaks.npz", "train_details.npz",
                                  "manifest.json"])
def test_no_file_is_replaced_that_is_not_ours(ptbxl, prepared, tmp_path, monkeypatch, name):
    """The authors' arrays, a table with notes of one's own, also in the place of ours: named, and not touched."""
    monkeypatch.setattr(preprocess, "prepare_all", lambda *_: pytest.fail("work was begun"))
    for ours_before in (False, True):
        if ours_before:
            shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        before = read_all(tmp_path)
        run(ptbxl, tmp_path, refusal=(str(tmp_path / name), "move it away"))
        assert read_all(tmp_path) == before


def test_the_small_download_gives_nearly_the_same(prepared, tmp_path):
    """records100 alone is enough: rows of the same shape, nearly the same values and R peaks at the same places."""
    run(write_ptbxl(tmp_path / "ptbxl", 100), tmp_path / "data", "--sampling_rate", 100)
    for split in ("train", "val", "test"):
        folders = (tmp_path / "data", prepared[0])
        low, high = (load(folder, split) for folder in folders)
        np.testing.assert_allclose(low.signals, high.signals, atol=0.03)
        for detector in arrays.R_PEAKS_FILES:
            for found, expected in zip(*(arrays.load_r_peaks(folder, split, records, detector) for folder, records in
                                         zip(folders, (low, high))), strict=True):
                np.testing.assert_allclose(found, expected, atol=3)


def test_benchmark_holds_the_marked_records_of_fold_10(ptbxl, tmp_path):
    """The benchmark is normalised, in table order, each record with its own points; training records never enter it."""
    points = {ecg_id: np.random.default_rng(ecg_id).random((5000, 12)) < 0.1 for ecg_id in (97, 13, 37)}
    np.savez(tmp_path / "truth.npz", ecg_id=list(points), label=list(points.values()))
    data_path = tmp_path / "data"
    run(ptbxl, data_path, "--benchmark_truth", tmp_path / "truth.npz")
    records = load(data_path, "benchmark")
    np.testing.assert_allclose(records.signals, [expected_row(ecg_id, "benchmark") for ecg_id in (37, 97)], atol=1e-5)
    in_millivolts = [expected_row(ecg_id, "test") for ecg_id in (37, 97)]
    np.testing.assert_allclose(records.millivolts([0, 1]), in_millivolts, atol=1e-5)
    assert np.array_equal(arrays.open_labels(data_path, "benchmark", (2, 5000, 12)), [points[37], points[97]])
    assert arrays.load_table(data_path, "benchmark", records)["ecg_id"].tolist() == [37, 97]
    assert arrays.load_manifest(data_path)["benchmark"]["data_set"] == "PTB-XL"


# ---- what stops a run: processes of their own

START = """import os, signal, time, preprocess
prepare_record = preprocess.prepare_record
def changed(task):
    {}
    return prepare_record(task)
preprocess.prepare_record = changed
preprocess.run(preprocess.main)"""


def start(ptbxl, data_path, line, workers=1):
    """Start preprocess.py with a line of code before each record is prepared."""
    command = [sys.executable, "-c", START.format(line), "--ptbxl_path", str(ptbxl), "--data_path", str(data_path),
               "--workers", str(workers)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, text=True,
                            stderr=subprocess.PIPE, preexec_fn=reset_signals)


@pytest.mark.parametrize("name, earlier", [("SIGINT", 0), ("SIGKILL", 1)])
def test_an_interrupted_run_leaves_nothing_that_looks_done(ptbxl, prepared, tmp_path, name, earlier):
    """Stopped after it has written rows, a run leaves no array that was not there, and earlier ones as they were."""
    out, number = tmp_path / "data", getattr(signal, name)
    shutil.copytree(prepared[0], out) if earlier else out.mkdir()
    before = read_all(out)
    process = start(ptbxl, out, "while task[0] > 60: signal.pause()")
    try:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in out.glob(f"{arrays.UNFINISHED}/*")) < 1e6:        # four rows
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(3):          # Python loses an interrupt that it raises inside a callback: a user presses again
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)    # Ctrl-C reaches workers as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.poll() == (-number if number == signal.SIGKILL else 130)
    finally:
        with contextlib.suppress(ProcessLookupError):       # SIGKILL leaves a stalled worker behind for a second
            os.killpg(process.pid, signal.SIGKILL)
        stderr = process.communicate()[1]
    if name == "SIGKILL":
        shutil.rmtree(out / arrays.UNFINISHED)
    assert read_all(out) == before and "Traceback" not in stderr and (name == "SIGKILL" or "\ninterrupted\n" in stderr)


def test_a_killed_worker_ends_the_run(ptbxl, tmp_path):
    """A worker that the system kills for want of memory ends the run in a sentence; it does not wait for ever."""
    line = "os.kill(os.getpid(), signal.SIGKILL) if task[0] == 61 else None"
    process = start(ptbxl, tmp_path / "data", line, workers=2)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "--workers" in stderr and "killed" in stderr and "Traceback" not in stderr
    assert list((tmp_path / "data").iterdir()) == []
