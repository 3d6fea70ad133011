"""The files in data/: what is damaged or does not belong together is refused by name, what can be remade is remade."""
import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
from small import beats_at, every

from ecg import arrays, signals
from ecg.arrays import Records
from utils import UserError


def make_signals(records=4, scale=1.0):
    """(records, 5000, 12) float32, filtered, beats at another rate in each record; the last one is flat."""
    made = [signals.filter_leads(scale * beats_at(every(0.7 + 0.1 * number, 0.4))) for number in range(records - 1)]
    return np.stack([*made, np.zeros((5000, 12))]).astype(np.float32)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(**content):
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def refuse(path, act, *arguments, match=None):
    """act(*arguments) is a UserError of one line that names the file."""
    with pytest.raises(UserError, match=match) as caught:
        act(*arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A data folder with train.npy (4 records, the last without R peaks) and no sidecar."""
    np.save(tmp_path / "train.npy", make_signals())
    return tmp_path


def open_train(folder):
    return arrays.open_records(folder, "train", 12)


# ---- arrays and labels

GOOD = npy(np.zeros((2, 5000, 12), np.float32))


@pytest.mark.parametrize("content", [
    npy(np.array([{}, 1], dtype=object), allow_pickle=True), GOOD[:-100], GOOD[:128], GOOD[:50], b"",
    b"I, II, III\n0.1, 0.2, 0.3\n", GOOD.replace(b"(2, 5000, 12)", b"(2, 5000, 12 "), npz(signals=np.zeros(3)),
    npz(signals=np.zeros(3))[:90], None],
    ids=["pickle", "cut", "header only", "half a header", "empty", "text", "bad header", "archive", "half", "missing"])
def test_damaged_arrays_are_refused_by_name(tmp_path, content):
    """Whatever stands in the place of an array ends in one sentence that names the file; no pickle is ever run."""
    if content is not None:
        (tmp_path / "train.npy").write_bytes(content)
    refuse(tmp_path / "train.npy", arrays.load_npy, tmp_path / "train.npy", match="make it")


@pytest.mark.parametrize("array, reason", [
    (np.zeros((5000, 12)), "shape"), (np.zeros((2, 5000, 8)), "--dims"), (np.zeros((2, 12, 5000)), "shape"),
    (np.zeros((0, 5000, 12)), "shape"), (np.array(1.0), "shape"), (np.zeros((2, 5000, 12), np.int16), "int16"),
    (np.zeros((2, 5000, 12), complex), "complex128")])
def test_signals_of_another_shape_or_type_are_refused(tmp_path, array, reason):
    """Wrong dimensions, length, leads or integers would only fail, or score nonsense, much later."""
    np.save(tmp_path / "test.npy", array)
    refuse(tmp_path / "test.npy", arrays.open_records, tmp_path, "test", 12, match=reason)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, 1, np.nan], [1, 1, 1], [[0, 1, 1]], ["0", "1", "1"]])
def test_bad_labels_are_refused(tmp_path, labels):
    """AUROC needs 0 and 1, both, one a record: another length, another value, NaN or one class alone is named."""
    np.save(tmp_path / "label.npy", np.array(labels))
    refuse(tmp_path / "label.npy", arrays.open_labels, tmp_path, "test", (3,))


def test_only_the_benchmark_excludes_points(tmp_path):
    """Labels of any number type come back as they were; a point may have no truth, a record always has."""
    for dtype in (np.uint8, np.float64, bool):
        np.save(tmp_path / "label.npy", np.array([0, 1, 1], dtype))
        assert arrays.open_labels(tmp_path, "test", (3,)).tolist() == [0, 1, 1]
    points = np.zeros((2, 5000, 12), np.uint8)
    points[0, :100], points[1, 100:200, 3] = arrays.EXCLUDED, 1
    np.save(tmp_path / "benchmark_label.npy", points)
    assert np.array_equal(arrays.open_labels(tmp_path, "benchmark", points.shape), points)
    np.save(tmp_path / "label.npy", np.array([0, 1, arrays.EXCLUDED], np.uint8))
    refuse("label.npy", arrays.open_labels, tmp_path, "test", (3,), match="expected 0")
    np.save(tmp_path / "benchmark_label.npy", np.where(points == 1, 1, arrays.EXCLUDED))
    refuse("benchmark_label.npy", arrays.open_labels, tmp_path, "benchmark", points.shape, match="both")


# ---- records

@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
@pytest.mark.parametrize("rows", [slice(1, 3), [3, 0], np.array([True, False, True, False])])
def test_rows_come_out_as_float32_in_the_order_asked(tmp_path, dtype, rows):
    """float64 and float16 arrays feed a float32 network, are mapped, and shuffled rows stay shuffled."""
    signal = (make_signals() + np.arange(4)[:, None, None]).astype(dtype)
    np.save(tmp_path / "test.npy", signal)
    records = arrays.open_records(tmp_path, "test", 12)
    read = records.read(rows)
    assert isinstance(records.signals, np.memmap) and records.in_millivolts and (len(records), records.leads) == (4, 12)
    assert read.dtype == np.float32 and read.flags.c_contiguous
    assert np.array_equal(read, signal[rows].astype(np.float32)) and np.array_equal(records.millivolts(rows), read)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
@pytest.mark.parametrize("rows", [slice(1, 4), [3, 2, 0], [-2], np.array([False, False, True, True])])
def test_a_row_that_is_not_finite_is_named(value, rows):
    """One NaN would make every weight NaN: the file and the number of its row are said instead."""
    signal = make_signals().astype(np.float64)
    signal[2, 4321, 11] = value
    records = Records(signal, "train.npy")
    refuse("train.npy", records.read, rows, match=r"row 2\b")
    refuse("train.npy", records.require_sound, match=r"row 2\b")
    assert len(records.read([0, 1, 3])) == len(list(records.iterate([0, 1, 3]))) == 3


def test_min_maxed_records_lead_back_to_millivolts(tmp_path):
    """By the bounds that stand beside them, and by no others; the authors' own have none, and that is said."""
    signal = make_signals()
    low, high = signal.min(axis=1), signal.max(axis=1)
    stored = np.stack([signals.normalize_leads(record) for record in signal])
    np.save(tmp_path / "train.npy", stored)
    assert not open_train(tmp_path).in_millivolts
    refuse("train.npy", open_train(tmp_path).millivolts, [0], match="preprocess.py")
    phases = np.random.default_rng(0).integers(0, 7, signal.shape).astype(np.uint8)
    for identity, known in (("other", False), (arrays.fingerprint(stored), True)):
        with open(arrays.details_path(tmp_path, "train"), "wb") as file:
            arrays.pack_details(file, list(low), list(high), list(phases) if known else [], identity)
        assert open_train(tmp_path).in_millivolts == known
    np.testing.assert_allclose(open_train(tmp_path).millivolts([2, 0]), signal[[2, 0]], atol=1e-6)
    assert np.array_equal(arrays.load_details(tmp_path, "train", stored)["phases"], phases)
    assert arrays.load_details(tmp_path, "train", stored[::-1]) is None


@pytest.mark.parametrize("damage", [
    lambda old: b"", lambda old: old[:len(old) // 2], lambda old: npz(fingerprint=arrays.fingerprint(make_signals())),
    lambda old: npz(fingerprint=arrays.fingerprint(make_signals()), low=np.zeros((3, 12)), high=np.zeros((4, 12))),
    lambda old: npz(fingerprint=arrays.fingerprint(make_signals()), low=np.full((4, 12), np.nan),
                    high=np.zeros((4, 12))),
    lambda old: npz(fingerprint=arrays.fingerprint(make_signals()), low=np.zeros((4, 12)), high=np.zeros((4, 12)),
                    phases=np.zeros((4, 4800, 12)))])
def test_damaged_details_are_refused_by_name(folder, damage):
    """Unlike R peaks, they cannot be made from the arrays: what is damaged is said, not left out."""
    signal, path = make_signals(), arrays.details_path(folder, "train")
    with open(path, "wb") as file:
        arrays.pack_details(file, list(signal.min(axis=1)), list(signal.max(axis=1)), [], arrays.fingerprint(signal))
    path.write_bytes(damage(path.read_bytes()))
    refuse(path, open_train, folder)


@pytest.mark.parametrize("factor, guess", [(1, None), (1000, "uV that are called mV"), (0.001, "volts")])
def test_an_amplitude_that_no_ecg_has_is_doubted(tmp_path, capsys, factor, guess):
    """A test.npy in uV scores without an error, and means nothing; min-maxed ones tell no amplitude."""
    np.save(tmp_path / "test.npy", make_signals() * factor)
    np.save(tmp_path / "train.npy", make_signals() * factor)
    open_train(tmp_path)
    assert capsys.readouterr().out == ""
    arrays.open_records(tmp_path, "test", 12)
    printed = capsys.readouterr().out
    assert guess in printed and str(tmp_path / "test.npy") in printed if guess else printed == ""


# ---- R peaks

@pytest.fixture
def searches(monkeypatch):
    """A list that grows by one at every record that a detector sees."""
    calls = []
    for name in ("find_r_peaks_by_heartpy", "find_r_peaks_by_slope"):
        monkeypatch.setattr(arrays, name, lambda signal, find=getattr(arrays, name): calls.append(1) or find(signal))
    return calls


@pytest.mark.parametrize("detector", arrays.R_PEAKS_FILES)
def test_r_peaks_are_found_once(folder, searches, detector):
    """A missing sidecar is made on the first load and used from the second on; each detector has its own."""
    for _ in range(2):
        r_peaks = arrays.load_r_peaks(folder, "train", open_train(folder), detector)
        assert len(searches) == 4 and all(positions.dtype == np.int32 for positions in r_peaks)
        assert len(r_peaks[-1]) == 0 and min(map(len, r_peaks[:-1])) > 8
    assert [path.name for path in folder.glob("*.npz")] == [arrays.r_peaks_path("", "train", detector).name]
    other, = set(arrays.R_PEAKS_FILES) - {detector}         # under a wrong name they are not taken
    arrays.r_peaks_path(folder, "train", detector).rename(arrays.r_peaks_path(folder, "train", other))
    assert other == "heartpy" or len(arrays.load_r_peaks(folder, "train", open_train(folder), other)) == 4
    assert len(searches) == (4 if other == "heartpy" else 8)


@pytest.mark.parametrize("change", ["values", "order", "records", "type"])
def test_stale_r_peaks_are_found_again(folder, searches, change):
    """R peaks of other signals under the same name must not be used; the new ones replace them for good."""
    arrays.load_r_peaks(folder, "train", open_train(folder), "slope")
    other = {"values": make_signals(scale=0.5), "order": make_signals()[::-1], "records": make_signals(3),
             "type": make_signals().astype(np.float64)}[change]
    np.save(folder / "train.npy", other)
    searches.clear()
    for _ in range(2):
        assert len(arrays.load_r_peaks(folder, "train", open_train(folder), "slope")) == len(searches) == len(other)


@pytest.mark.parametrize("damage", [lambda old: b"not an archive", lambda old: old[:len(old) // 2],
                                    lambda old: npz(fingerprint="x"), lambda old: npz(peaks=np.zeros((4, 2), int)),
                                    lambda old: npz(fingerprint=np.array([None]))])
def test_garbage_sidecars_are_passed_over_and_stay(folder, searches, capsys, damage):
    """What is not readable may be the user's own: it costs a search, is not overwritten, and is said."""
    path = arrays.r_peaks_path(folder, "train", "slope")
    arrays.load_r_peaks(folder, "train", open_train(folder), "slope")
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    assert len(arrays.load_r_peaks(folder, "train", open_train(folder), "slope")) == 4 and len(searches) == 8
    printed = capsys.readouterr().out
    assert str(path) in printed and (path.read_bytes() == before or "belongs to other signals" in printed)


def test_what_cannot_be_kept_is_used_all_the_same(folder, monkeypatch, capsys):
    """Arrays on a read-only share are scored; a full disk leaves the old sidecar, and nothing half-written."""
    path = arrays.r_peaks_path(folder, "train", "slope")
    arrays.load_r_peaks(folder, "train", open_train(folder), "slope")
    before = path.read_bytes()
    np.save(folder / "train.npy", make_signals(scale=2))

    def fill_up(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", fill_up)
    assert len(arrays.load_r_peaks(folder, "train", open_train(folder), "slope")) == 4
    assert "not kept" in capsys.readouterr().out and path.read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["train.npy", path.name]


def test_machines_without_heartpy(folder, monkeypatch):
    """With a sidecar HeartPy is not needed; without one, its absence is said in a sentence that names it."""
    records = open_train(folder)
    arrays.load_r_peaks(folder, "train", records, "heartpy")
    monkeypatch.setitem(sys.modules, "heartpy", None)       # makes its import fail
    assert len(arrays.load_r_peaks(folder, "train", records, "heartpy")) == 4
    arrays.r_peaks_path(folder, "train", "heartpy").unlink()
    refuse("HeartPy", arrays.load_r_peaks, folder, "train", records, "heartpy")


# ---- the table and the manifest

def write_table(folder, described, **columns):
    """train_records.csv, and a manifest that describes these signals."""
    table = pd.DataFrame({"ecg_id": range(1, 5), "superclasses": ["NORM", "", "NA", "MI STTC"], **columns})
    table.to_csv(arrays.table_path(folder, "train"), index=False)
    content = {"arrays": {"train": {"fingerprint": arrays.fingerprint(described)}}}
    (folder / arrays.MANIFEST).write_text(json.dumps(content))


def test_tables_belong_to_their_signals(folder):
    """ecg_ids are given for the signals they were written for, and for no others: not exchanged or undescribed."""
    records, other = open_train(folder), Records(make_signals(scale=0.5), "other")
    assert arrays.load_table(folder, "train", records) is None
    write_table(folder, records.signals)
    table = arrays.load_table(folder, "train", records)
    assert table["ecg_id"].tolist() == [1, 2, 3, 4] and "age" not in table
    assert table["superclasses"].tolist() == ["NORM", "", "NA", "MI STTC"] and len(set(table["patient_id"])) == 4
    assert arrays.load_table(folder, "train", other) is None and arrays.load_table(folder, "test", records) is None
    (folder / arrays.MANIFEST).unlink()
    assert arrays.load_table(folder, "train", records) is None


def test_people_in_tables(folder):
    """A patient of several records is one; an unknown one is the record's own; an age or sex may be unknown."""
    records = open_train(folder)
    write_table(folder, records.signals, patient_id=["7", "", "7", ""], age=["90", "", "51", "0"],
                sex=["F", "M", "", "M"])
    table = arrays.load_table(folder, "train", records)
    patients = table["patient_id"].tolist()
    assert patients[0] == patients[2] == "7" and len(set(patients)) == 3
    np.testing.assert_array_equal(table["age"], [90, np.nan, 51, 0])
    assert table["sex"].tolist() == ["F", "M", "", "M"]


@pytest.mark.parametrize("file, content", [
    ("manifest.json", b"{"), ("manifest.json", b'{"mine": 1}'), ("manifest.json", bytes(range(128, 256))),
    ("train_records.csv", b""), ("train_records.csv", b"ecg_id\n1\n2\n"), ("train_records.csv", b"ecg_id\n1\n2,3,4\n")])
def test_damaged_tables_are_named(folder, file, content):
    """A damaged manifest or table of records ends in one sentence that names it."""
    records = open_train(folder)
    write_table(folder, records.signals)
    (folder / file).write_bytes(content)
    refuse(folder / file, arrays.load_table, folder, "train", records)
