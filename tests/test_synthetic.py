"""The simulated PTB-XL: its files read as the real ones do, its ECGs are sound, and its truth is exact."""
import ast
import csv
import hashlib

import heartpy
import numpy as np
import pytest
import wfdb
from scipy.signal import butter, filtfilt

from tools import synthetic
from utils import UserError

RECORDS, SEED = 60, 3
STEP = 1 / synthetic.GAIN  # mV


def read_rows(folder):
    with open(folder / "ptbxl_database.csv", newline="") as file:
        return list(csv.DictReader(file))


def hash_files(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "ptb-xl"
    synthetic.write_dataset(out, RECORDS, SEED)
    return out


@pytest.fixture(scope="module")
def truth(folder):
    with np.load(folder / "localization_truth.npz", allow_pickle=False) as file:
        return dict(zip(file["ecg_id"], file["label"]))


@pytest.fixture(scope="module")
def by_kind():
    """The first record of each abnormality, and record 1, a normal one."""
    found = {}
    for ecg_id in range(1, RECORDS + 1):
        abnormality = synthetic.plan(ecg_id)[0]
        found.setdefault(abnormality.code if abnormality else "NORM", ecg_id)
    return {kind: synthetic.simulate_record(SEED, ecg_id) for kind, ecg_id in found.items()}


def test_records_read_as_ptbxl(folder):
    """Both rates read with wfdb as 10 s of 12 leads in mV, named as in PTB-XL, and tell of the same signal."""
    for row in read_rows(folder)[:8]:
        high, fields = wfdb.rdsamp(str(folder / row["filename_hr"]))
        low, fields_low = wfdb.rdsamp(str(folder / row["filename_lr"]))
        assert high.shape == (5000, 12) and low.shape == (1000, 12)
        assert (fields["fs"], fields_low["fs"]) == (500, 100)
        assert fields["units"] == ["mV"] * 12 and fields["sig_name"] == list(synthetic.LEADS)
        simulated = synthetic.simulate_record(SEED, int(row["ecg_id"])).signal
        assert np.abs(high - simulated).max() <= 0.51 * STEP  # nothing clipped, nothing NaN
        assert np.corrcoef(high[::5].ravel(), low.ravel())[0, 1] > 0.98


def test_limb_leads_obey_einthoven(folder):
    """III, aVR, aVL and aVF follow from I and II, but for rounding to 16 bit."""
    one, two, three, avr, avl, avf = wfdb.rdsamp(str(folder / "records500/00000/00007_hr"))[0].T[:6]
    assert np.abs(one + three - two).max() < 1.6 * STEP
    assert np.abs(avr + avl + avf).max() < 1.6 * STEP
    assert np.abs(avr + (one + two) / 2).max() < 1.1 * STEP


def test_same_seed_gives_same_bytes(folder, tmp_path):
    """A score on simulated data can be repeated anywhere from --seed alone; nothing of an earlier run is left over."""
    stale = tmp_path / "records500/00000/00061_hr.dat"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"an earlier, longer run")
    (tmp_path / synthetic.SIMULATED_MARKER).write_text(synthetic.MARKER_START)
    synthetic.write_dataset(tmp_path, RECORDS, SEED)
    assert hash_files(tmp_path) == hash_files(folder)


def test_seed_and_record_change_the_ecg():
    """Every record is another person, and another seed gives other people."""
    signals = [synthetic.simulate_record(seed, ecg_id).signal for seed, ecg_id in ((0, 1), (0, 2), (1, 1))]
    assert all(np.corrcoef(signals[i][:, 1], signals[j][:, 1])[0, 1] < 0.9 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("records", [synthetic.MIN_RECORDS, RECORDS, 600])
def test_every_fold_is_usable(records):
    """Each fold has normals to train on, folds 9 and 10 have abnormals to validate and test on, at any size."""
    plans = [synthetic.plan(ecg_id) for ecg_id in range(1, records + 1)]
    normals = [fold for kind, codes, fold in plans if kind is None and "NORM" in codes]
    abnormals = [fold for kind, _, fold in plans if kind is not None]
    assert set(normals) == set(range(1, 11))
    assert min(abnormals.count(9), abnormals.count(10)) >= 4
    assert 0.6 < len(normals) / records < 0.7
    if records == 600:
        assert set(abnormals) == set(range(1, 11))
        assert normals.count(10) >= 30 and abnormals.count(10) >= 25


def test_table_tells_what_was_simulated(folder):
    """scp_codes, strat_fold and scp_statements.csv lead to the simulated kind, mixed and undiagnosed ones included."""
    with open(folder / "scp_statements.csv", newline="") as file:
        superclass = {row[""]: row["diagnostic_class"] for row in csv.DictReader(file) if row["diagnostic"] == "1.0"}
    rows = read_rows(folder)
    assert [int(row["ecg_id"]) for row in rows] == list(range(1, RECORDS + 1))
    assert len({row["patient_id"] for row in rows}) == RECORDS
    found = set()
    for row in rows:
        abnormality, codes, fold = synthetic.plan(int(row["ecg_id"]))
        assert ast.literal_eval(row["scp_codes"]) == codes and int(row["strat_fold"]) == fold
        classes = frozenset(superclass[code] for code in codes if code in superclass)
        assert (not classes or classes == {"NORM"}) == (abnormality is None)
        found.add(classes)
    assert {frozenset({name}) for name in ("NORM", "CD", "MI", "STTC", "HYP")} | {frozenset()} <= found
    assert any(len(classes) == 2 and "NORM" in classes for classes in found)


def test_truth_covers_the_abnormals_of_fold_10(folder, truth):
    """localization_truth.npz has a label for each abnormal record of fold 10 and for no other."""
    expected = [ecg_id for ecg_id in range(1, RECORDS + 1)
                if synthetic.plan(ecg_id)[0] is not None and synthetic.plan(ecg_id)[2] == 10]
    assert list(truth) == expected
    for ecg_id, label in truth.items():
        assert label.shape == (5000, 12) and label.dtype == np.uint8
        assert np.array_equal(label, synthetic.simulate_record(SEED, ecg_id).truth)
        assert set(np.unique(label)) == {0, 1}


def test_truth_marks_what_is_changed_and_nothing_else(by_kind):
    """Normals have no mark, an abnormality none in the leads that its row calls spared, and some in most others."""
    assert not by_kind.pop("NORM").truth.any()
    assert set(by_kind) == {abnormality.code for abnormality in synthetic.ABNORMALITIES}
    for abnormality in synthetic.ABNORMALITIES:
        truth = by_kind[abnormality.code].truth
        marked = {lead for lead, any_mark in zip(synthetic.LEADS, truth.any(axis=0)) if any_mark}
        assert not marked & set(abnormality.spared), abnormality.code
        assert len(marked) >= 0.6 * (12 - len(abnormality.spared)), abnormality.code
        assert truth.mean() < 0.6, abnormality.code


def test_single_beat_is_marked_once(by_kind):
    """Where one beat is abnormal, the truth covers that beat and leaves the rest of the record alone."""
    samples = np.flatnonzero(by_kind["IVCD"].truth.any(axis=1))
    assert 100 < samples[-1] - samples[0] < 350
    r_samples = 500 * by_kind["IVCD"].r_times
    assert ((r_samples > samples[0]) & (r_samples < samples[-1])).sum() == 1


def test_mark_closes_short_gaps_alone():
    """A mark starts and ends where the difference does; a gap under 40 ms inside it is closed, a longer one is not."""
    normal, abnormal = np.zeros((5000, 12)), np.zeros((5000, 12))
    abnormal[0:10, 0] = abnormal[29:40, 0] = abnormal[60:70, 0] = 1  # gaps of 38 and 40 ms
    abnormal[:, 1] = 0.9 * synthetic.TRUTH_THRESHOLD
    truth = synthetic.mark(abnormal, normal)
    assert np.array_equal(np.flatnonzero(truth[:, 0]), np.r_[0:40, 60:70])
    assert not truth[:, 1:].any()


def test_heartpy_finds_the_simulated_r_peaks(by_kind):
    """The pipeline's R peaks (HeartPy on the filtered lead II) are the simulated ones, in normals and abnormals."""
    for kind, record in by_kind.items():
        lead = record.signal[:, 1]
        for cutoff, side in ((1, "high"), (25, "low")):
            lead = filtfilt(*butter(2, cutoff, side, fs=synthetic.RATE), lead)
        found = np.array(heartpy.process(lead, float(synthetic.RATE))[0]["peaklist"]) / synthetic.RATE
        inner = record.r_times[(record.r_times > 0.3) & (record.r_times < 9.7)]  # HeartPy may miss one at the ends
        assert all(np.abs(found - r_time).min() < 0.04 for r_time in inner), kind
        assert all(np.abs(record.r_times - peak).min() < 0.04 for peak in found), kind


def test_foreign_folder_is_refused(tmp_path):
    """A folder of real recordings is never overwritten, and a count or seed that cannot work is explained."""
    (tmp_path / "ptbxl_database.csv").write_text("real")
    with pytest.raises(UserError, match="--out"):
        synthetic.write_dataset(tmp_path, RECORDS, SEED)
    with pytest.raises(UserError, match="--out"):
        synthetic.write_dataset(tmp_path / "ptbxl_database.csv", RECORDS, SEED)
    assert (tmp_path / "ptbxl_database.csv").read_text() == "real"
    with pytest.raises(UserError, match="--records"):
        synthetic.write_dataset(tmp_path / "new", synthetic.MIN_RECORDS - 1, SEED)
    with pytest.raises(UserError, match="--seed"):
        synthetic.write_dataset(tmp_path / "new", RECORDS, -1)
    assert not (tmp_path / "new").exists()
