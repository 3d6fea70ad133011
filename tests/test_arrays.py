"""The files in data/: what is damaged or does not belong together is refused by name, what can be remade is remade."""
import io
import json
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

from ecg import arrays
from ecg import signals
from utils import UserError


def make_signals(records=4, scale=1.0):
    """(records, 5000, 12) float32, filtered, beats at another rate in each record; the last one is flat."""
    time = np.arange(5000) / 500
    made = np.zeros((records, 5000, 12), np.float32)
    for number in range(records - 1):
        beats = np.arange(0.4, 9.8, 0.7 + 0.1 * number)
        beats += 0.02 * np.sin(np.arange(len(beats)))       # HeartPy refuses rhythms without any variability
        wave = scale * np.exp(-0.5 * ((time - beats[:, None]) / 0.02) ** 2).sum(axis=0)
        made[number] = signals.filter_leads(wave[:, None])
    return made


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(**content):
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def check_message(caught, path):
    """A message for the user: one line that names the file."""
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A data folder with train.npy (4 records, the last without R peaks) and no sidecar."""
    np.save(tmp_path / "train.npy", make_signals())
    return tmp_path


def open_train(folder):
    return arrays.open_signals(folder, "train", 12)


@pytest.fixture
def searches(monkeypatch):
    """A list that grows by one at every call of find_r_peaks."""
    calls, find = [], signals.find_r_peaks
    monkeypatch.setattr(arrays, "find_r_peaks", lambda lead: calls.append(1) or find(lead))
    return calls


# ---- load_npy

GOOD = npy(np.zeros((2, 5000, 12), np.float32))
DAMAGED = {"pickled objects": npy(np.array([{}, 1], dtype=object), allow_pickle=True), "truncated": GOOD[:-100],
           "header only": GOOD[:128], "half a header": GOOD[:50], "empty": b"", "text": b"I, II, III\n0.1, 0.2, 0.3\n",
           "damaged header": GOOD.replace(b"(2, 5000, 12)", b"(2, 5000, 12 "), "an archive": npz(signals=np.zeros(3)),
           "half an archive": npz(signals=np.zeros(3))[:90]}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_arrays_are_refused_by_name(tmp_path, name):
    """Whatever stands in the place of an array ends in one sentence that names the file; no pickle is ever run."""
    path = tmp_path / "train.npy"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        arrays.load_npy(path)
    check_message(caught, path)


def test_missing_array_names_its_remedy(tmp_path):
    """The first error of a new user: no array yet. It says which, and that preprocess.py makes it."""
    with pytest.raises(UserError, match="preprocess.py") as caught:
        arrays.load_npy(tmp_path / "test.npy")
    check_message(caught, tmp_path / "test.npy")
    (tmp_path / "val.npy").mkdir()
    with pytest.raises(UserError) as caught:
        arrays.load_npy(tmp_path / "val.npy")
    check_message(caught, tmp_path / "val.npy")


# ---- open_signals, open_labels

@pytest.mark.parametrize("array, reason", [
    (np.zeros((5000, 12)), "shape"), (np.zeros((2, 4800, 12)), "shape"), (np.zeros((2, 5000, 8)), "--dims"),
    (np.zeros((2, 12, 5000)), "shape"), (np.zeros((0, 5000, 12)), "shape"), (np.array(1.0), "shape"),
    (np.zeros((2, 5000, 12), np.int16), "int16"), (np.zeros((2, 5000, 12), complex), "complex128")])
def test_signals_of_another_shape_or_type_are_refused(tmp_path, array, reason):
    """Wrong dimensions, length, leads or integers would only fail, or score nonsense, much later."""
    np.save(tmp_path / "test.npy", array)
    with pytest.raises(UserError, match=reason) as caught:
        arrays.open_signals(tmp_path, "test", 12)
    check_message(caught, tmp_path / "test.npy")


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", ">f8"])
def test_signals_are_opened_whatever_their_precision(tmp_path, dtype):
    """The authors' float64 arrays load as well, and are mapped, not read into memory."""
    np.save(tmp_path / "test.npy", make_signals().astype(dtype))
    opened = arrays.open_signals(tmp_path, "test", 12)
    assert isinstance(opened, np.memmap) and opened.shape == (4, 5000, 12)


@pytest.mark.parametrize("labels", [
    [0, 1], [0, 1, 2], [0, 1, -1], [0, 1, np.nan], [1, 1, 1], [0, 0, 0], [[0, 1, 1]], ["0", "1", "1"]])
def test_bad_labels_are_refused(tmp_path, labels):
    """AUROC needs 0 and 1, both, one a record: another length, another value, NaN or one class alone is named."""
    np.save(tmp_path / "label.npy", np.array(labels))
    with pytest.raises(UserError) as caught:
        arrays.open_labels(tmp_path, "test", (3,))
    check_message(caught, tmp_path / "label.npy")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, bool])
def test_good_labels_are_opened(tmp_path, dtype):
    """Labels of any number type, per record and per point, come back as they were."""
    np.save(tmp_path / "label.npy", np.array([0, 1, 1], dtype))
    assert arrays.open_labels(tmp_path, "test", (3,)).tolist() == [0, 1, 1]
    points = np.zeros((2, 5000, 12), dtype)
    points[1, 100:200, 3] = 1
    np.save(tmp_path / "benchmark_label.npy", points)
    assert np.array_equal(arrays.open_labels(tmp_path, "benchmark", points.shape), points)


def test_only_the_benchmark_excludes_points(tmp_path):
    """A point without a truth is neither normal nor abnormal; a record's label always is, and both kinds must be."""
    points = np.zeros((2, 5000, 12), np.uint8)
    points[0, :100], points[1, 100:200, 3] = arrays.EXCLUDED, 1
    np.save(tmp_path / "benchmark_label.npy", points)
    assert np.array_equal(arrays.open_labels(tmp_path, "benchmark", points.shape), points)
    np.save(tmp_path / "label.npy", np.array([0, 1, arrays.EXCLUDED], np.uint8))
    with pytest.raises(UserError, match="expected 0"):
        arrays.open_labels(tmp_path, "test", (3,))
    for kept in (0, 1):                     # one kind and excluded points
        np.save(tmp_path / "benchmark_label.npy", np.where(points == kept, kept, arrays.EXCLUDED))
        with pytest.raises(UserError, match="both"):
            arrays.open_labels(tmp_path, "benchmark", points.shape)


# ---- the benchmark's truth

def write_truth(folder, signal, phases):
    with open(arrays.details_path(folder, "benchmark"), "wb") as file:
        arrays.pack_details(file, list(signal.min(axis=1)), list(signal.max(axis=1)), phases,
                            arrays.fingerprint(signal))


@pytest.mark.parametrize("delineated", [True, False])
def test_truth_belongs_to_its_signals(tmp_path, delineated):
    """Phases and bounds are given for the signals they were written for, not for the authors' in their place."""
    signal = make_signals()
    assert arrays.load_details(tmp_path, "benchmark", signal) is None
    phases = np.random.default_rng(0).integers(0, 7, signal.shape).astype(np.uint8)
    write_truth(tmp_path, signal, list(phases) if delineated else [])
    truth = arrays.load_details(tmp_path, "benchmark", signal)
    assert np.array_equal(truth["phases"], phases) if delineated else truth["phases"] is None
    assert np.array_equal(truth["low"], signal.min(axis=1)) and np.array_equal(truth["high"], signal.max(axis=1))
    assert truth["low"].dtype == truth["high"].dtype == np.float32
    assert arrays.load_details(tmp_path, "benchmark", signal[::-1]) is None


@pytest.mark.parametrize("damage", [
    lambda old: b"", lambda old: old[:len(old) // 2], lambda old: npz(fingerprint=arrays.fingerprint(make_signals())),
    lambda old: npz(fingerprint=arrays.fingerprint(make_signals()), low=np.zeros((3, 12)), high=np.zeros((4, 12))),
    lambda old: npz(fingerprint=arrays.fingerprint(make_signals()), low=np.zeros((4, 12)), high=np.zeros((4, 12)),
                    phases=np.zeros((4, 4800, 12)))])
def test_damaged_truth_is_refused_by_name(tmp_path, damage):
    """Unlike R peaks, a truth cannot be made from the arrays: what is damaged is said, not left out."""
    signal, path = make_signals(), arrays.details_path(tmp_path, "benchmark")
    write_truth(tmp_path, signal, [])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        arrays.load_details(tmp_path, "benchmark", signal)
    check_message(caught, path)


# ---- read_rows

@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("rows", [slice(1, 3), [3, 0], np.array([2, 2]), np.array([True, False, True, False])])
def test_rows_come_out_as_float32_in_the_order_asked(dtype, rows):
    """float64 and float16 arrays feed a float32 network, and shuffled rows stay shuffled."""
    signal = (make_signals() + np.arange(4)[:, None, None]).astype(dtype)
    block = arrays.read_rows(signal, rows, "train.npy")
    assert block.dtype == np.float32 and block.flags.c_contiguous
    assert np.array_equal(block, signal[rows].astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [slice(1, 4), [3, 2, 0], [-2], np.array([False, False, True, True])])
def test_a_row_that_is_not_finite_is_named(value, rows):
    """One NaN would make every weight NaN: the file and the number of its row are said instead."""
    signal = make_signals().astype(np.float64)
    signal[2, 4321, 11] = value
    with pytest.raises(UserError, match=r"train.npy.*row 2\b"):
        arrays.read_rows(signal, rows, "train.npy")
    assert len(arrays.read_rows(signal, [0, 1, 3], "train.npy")) == 3


# ---- R peaks

def check_peaks(r_peaks, signal):
    """One int32 array a record, as find_r_peaks gives them."""
    assert len(r_peaks) == len(signal)
    for found, record in zip(r_peaks, signal):
        assert found.dtype == np.int32 and np.array_equal(found, signals.find_r_peaks(record[:, 1]))


def test_r_peaks_are_found_once(folder, searches):
    """HeartPy takes minutes on PTB-XL: a missing sidecar is made on the first load and used from the second on."""
    signal = open_train(folder)
    check_peaks(arrays.load_r_peaks(folder, "train", signal), signal)
    assert len(searches) == 4
    again = arrays.load_r_peaks(folder, "train", signal)
    check_peaks(again, signal)
    assert len(searches) == 4
    assert len(again[-1]) == 0 and min(map(len, again[:-1])) > 8


def test_records_without_r_peaks_survive(tmp_path, searches):
    """Where HeartPy finds nothing in any record, that is kept too, and every record still has its (empty) place."""
    np.save(tmp_path / "train.npy", np.zeros((3, 5000, 12), np.float32))
    for _ in range(2):
        r_peaks = arrays.load_r_peaks(tmp_path, "train", open_train(tmp_path))
        assert [found.tolist() for found in r_peaks] == [[], [], []] and len(searches) == 3


@pytest.mark.parametrize("change", ["values", "order", "records", "type"])
def test_stale_r_peaks_are_found_again(folder, searches, change):
    """R peaks of other signals under the same name must not be used; the new ones replace them for good."""
    arrays.load_r_peaks(folder, "train", open_train(folder))
    other = {"values": make_signals(scale=0.5), "order": make_signals()[::-1], "records": make_signals(3),
             "type": make_signals().astype(np.float64)}[change]
    np.save(folder / "train.npy", other)
    searches.clear()
    for _ in range(2):
        check_peaks(arrays.load_r_peaks(folder, "train", open_train(folder)), other)
        assert len(searches) == len(other)


def break_stream(sidecar):
    """The sidecar with the first byte of the compressed peaks spoiled, as a bad disk does."""
    with zipfile.ZipFile(io.BytesIO(sidecar)) as archive:
        start = archive.getinfo("peaks.npy").header_offset
    name, extra = (int.from_bytes(sidecar[start + at:start + at + 2], "little") for at in (26, 28))
    start += 30 + name + extra
    return sidecar[:start] + b"\xff" + sidecar[start + 1:]


GARBAGE = {"text": lambda old: b"not an archive", "empty": lambda old: b"", "half": lambda old: old[:len(old) // 2],
           "no peaks": lambda old: npz(fingerprint="x"), "no fingerprint": lambda old: npz(peaks=np.zeros((4, 2), int)),
           "objects": lambda old: npz(fingerprint=np.array([None])), "a lone array": lambda old: npy(np.zeros((4, 2))),
           "bad stream": break_stream}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_sidecars_are_made_again(folder, searches, name):
    """A sidecar holds nothing that cannot be found again, so a damaged one costs a search, never the run."""
    signal, path = open_train(folder), arrays.r_peaks_path(folder, "train")
    arrays.load_r_peaks(folder, "train", signal)
    path.write_bytes(GARBAGE[name](path.read_bytes()))
    for _ in range(2):
        check_peaks(arrays.load_r_peaks(folder, "train", signal), signal)
    assert len(searches) == 8


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(folder, monkeypatch, capsys):
    """Arrays on a read-only share are scored all the same; the user is told that the R peaks are not kept."""
    def refuse(path, *_):
        raise UserError(f"{path} could not be written")
    monkeypatch.setattr(arrays, "save_r_peaks", refuse)
    check_peaks(arrays.load_r_peaks(folder, "train", open_train(folder)), make_signals())
    assert "not kept" in capsys.readouterr().out and not arrays.r_peaks_path(folder, "train").exists()


def test_a_full_disk_keeps_the_old_sidecar(folder, monkeypatch):
    """A sidecar is replaced as a whole or not at all, and nothing half-written stays behind."""
    path = arrays.r_peaks_path(folder, "train")
    arrays.load_r_peaks(folder, "train", open_train(folder))
    before = path.read_bytes()

    def fill_up(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", fill_up)
    with pytest.raises(UserError, match="No space left") as caught:
        arrays.save_r_peaks(path, [np.array([5])], "other")
    check_message(caught, path)
    assert path.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ["train.npy", path.name]


def test_machines_without_heartpy(folder, monkeypatch):
    """With a sidecar HeartPy is not needed; without one, its absence is said in a sentence that names it."""
    signal = open_train(folder)
    arrays.load_r_peaks(folder, "train", signal)
    monkeypatch.setitem(sys.modules, "heartpy", None)       # makes its import fail
    assert len(arrays.load_r_peaks(folder, "train", signal)) == 4
    arrays.r_peaks_path(folder, "train").unlink()
    with pytest.raises(UserError, match="(?i)heartpy"):
        arrays.load_r_peaks(folder, "train", signal)


# ---- records and manifest

def write_records(folder, described, rows=4):
    """train_records.csv, and a manifest that describes these signals."""
    table = pd.DataFrame({"ecg_id": range(1, rows + 1), "superclasses": ["NORM", "", "NA", "MI STTC"][:rows]})
    table.to_csv(arrays.records_path(folder, "train"), index=False)
    content = {"arrays": {"train": {"fingerprint": arrays.fingerprint(described)}}}
    (folder / arrays.MANIFEST).write_text(json.dumps(content))


def test_records_belong_to_their_signals(folder):
    """ecg_ids are given for the signals they were written for, and for no others: not exchanged, cut or undescribed."""
    signal = open_train(folder)
    assert arrays.load_records(folder, "train", signal) is None
    write_records(folder, signal)
    records = arrays.load_records(folder, "train", signal)
    assert records["ecg_id"].tolist() == [1, 2, 3, 4]
    assert records["superclasses"].tolist() == ["NORM", "", "NA", "MI STTC"]
    assert arrays.load_records(folder, "train", make_signals(scale=0.5)) is None
    assert arrays.load_records(folder, "test", signal) is None
    write_records(folder, signal, rows=3)
    assert arrays.load_records(folder, "train", signal) is None
    write_records(folder, signal)
    (folder / arrays.MANIFEST).unlink()
    assert arrays.load_records(folder, "train", signal) is None


@pytest.mark.parametrize("file, content", [("manifest.json", b"{"), ("manifest.json", bytes(range(128, 256))),
                                           ("train_records.csv", b""), ("train_records.csv", b"ecg_id\n1\n2,3,4\n")])
def test_damaged_tables_are_named(folder, file, content):
    """A damaged manifest or table of records ends in one sentence that names it."""
    signal = open_train(folder)
    write_records(folder, signal)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        arrays.load_records(folder, "train", signal)
    check_message(caught, folder / file)
