"""The simulated PTB-XL: its files read as the real ones do, its ECGs are sound, and its truth is exact."""
import csv

import numpy as np
import pytest
import wfdb
from small import read_all

from ecg.r_peaks import find_r_peaks_by_heartpy
from ecg.signals import LEAD_II, filter_leads
from tools import synthetic
from utils import UserError

RECORDS, SEED = 60, 0                       # of the fixture
STEP = 1 / synthetic.GAIN  # mV


@pytest.fixture(scope="module")
def folder(simulated):
    return simulated.parent / "ptb-xl"


@pytest.fixture(scope="module")
def by_kind():
    """The first record of each abnormality, and record 1, a normal one."""
    first = {}
    for ecg_id in range(1, RECORDS + 1):
        abnormality = synthetic.plan(ecg_id)[0]
        first.setdefault(abnormality.code if abnormality else "NORM", ecg_id)
    return {kind: synthetic.simulate_record(SEED, ecg_id) for kind, ecg_id in first.items()}


def test_records_read_as_ptbxl(folder):
    """Both rates read with wfdb as 10 s of 12 leads in mV, named as in PTB-XL, and tell of the same signal.

    III, aVR, aVL and aVF follow from I and II, but for rounding to 16 bit (Einthoven, Goldberger).
    """
    with open(folder / "ptbxl_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["ecg_id"]) for row in rows] == list(range(1, RECORDS + 1))
    for row in rows[:8]:
        high, fields = wfdb.rdsamp(str(folder / row["filename_hr"]))
        low, fields_low = wfdb.rdsamp(str(folder / row["filename_lr"]))
        assert (high.shape, low.shape, fields["fs"], fields_low["fs"]) == ((5000, 12), (1000, 12), 500, 100)
        assert fields["units"] == ["mV"] * 12 and fields["sig_name"] == list(synthetic.LEADS)
        simulated = synthetic.simulate_record(SEED, int(row["ecg_id"])).signal
        assert np.abs(high - simulated).max() <= 0.51 * STEP  # nothing clipped, nothing NaN
        assert np.corrcoef(high[::5].ravel(), low.ravel())[0, 1] > 0.98
    one, two, three, avr, avl, avf = high.T[:6]
    for nothing in (one + three - two, avr + avl + avf, avr + (one + two) / 2):
        assert np.abs(nothing).max() < 1.6 * STEP


def test_the_seed_alone_gives_the_bytes(folder, tmp_path):
    """The same seed gives the same files, and nothing of an earlier run is left; others give other people."""
    stale = tmp_path / "records500/00000/00041_hr.dat"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"an earlier, longer run")
    (tmp_path / synthetic.SIMULATED_MARKER).write_text(synthetic.MARKER_START)
    synthetic.write_dataset(tmp_path, synthetic.MIN_RECORDS, SEED)
    again, before = ({name: content for name, content in read_all(place).items() if name.startswith("records")}
                     for place in (tmp_path, folder))
    assert len(again) == 4 * synthetic.MIN_RECORDS and again.items() <= before.items()
    leads = [synthetic.simulate_record(seed, ecg_id).signal[:, 1] for seed, ecg_id in ((0, 1), (0, 2), (1, 1))]
    assert (np.corrcoef(leads)[~np.eye(3, dtype=bool)] < 0.9).all()


@pytest.mark.parametrize("records", [synthetic.MIN_RECORDS, 600])
def test_every_fold_is_usable(records):
    """Each fold has normals to train on, folds 9 and 10 have abnormals to validate and test on, at any size."""
    plans = [synthetic.plan(ecg_id) for ecg_id in range(1, records + 1)]
    normals = [fold for kind, codes, fold in plans if kind is None and "NORM" in codes]
    abnormals = [fold for kind, _, fold in plans if kind is not None]
    assert set(normals) == set(range(1, 11)) and 0.6 < len(normals) / records < 0.7
    assert min(abnormals.count(9), abnormals.count(10)) >= (4 if records < 600 else 25)


def test_truth_marks_what_is_changed_and_nothing_else(folder, by_kind):
    """The abnormal records of fold 10 have a truth. Normals have no mark, nor have the leads that a row calls spared.

    Where one beat is abnormal, the truth covers that beat and leaves the rest of the record alone.
    """
    with np.load(folder / "localization_truth.npz", allow_pickle=False) as file:
        truth = dict(zip(file["ecg_id"], file["label"]))
    plans = {ecg_id: synthetic.plan(ecg_id) for ecg_id in range(1, RECORDS + 1)}
    assert list(truth) == [ecg_id for ecg_id, (abnormality, _, fold) in plans.items() if abnormality and fold == 10]
    for ecg_id, label in truth.items():
        assert label.dtype == np.uint8 and np.array_equal(label, synthetic.simulate_record(SEED, ecg_id).truth)
    assert not by_kind["NORM"].truth.any()
    for abnormality in synthetic.ABNORMALITIES:
        marks = by_kind[abnormality.code].truth
        marked = {lead for lead, any_mark in zip(synthetic.LEADS, marks.any(axis=0)) if any_mark}
        assert not marked & set(abnormality.spared), abnormality.code
        assert len(marked) >= 0.6 * (12 - len(abnormality.spared)) and marks.mean() < 0.6, abnormality.code
    samples, r_samples = np.flatnonzero(by_kind["IVCD"].truth.any(axis=1)), 500 * by_kind["IVCD"].r_times
    assert 100 < samples[-1] - samples[0] < 350
    assert ((r_samples > samples[0]) & (r_samples < samples[-1])).sum() == 1


def test_mark_closes_short_gaps_alone():
    """A mark starts and ends where the difference does; a gap under 40 ms inside it is closed, a longer one is not."""
    normal, abnormal = np.zeros((5000, 12)), np.zeros((5000, 12))
    abnormal[0:10, 0] = abnormal[29:40, 0] = abnormal[60:70, 0] = 1  # gaps of 38 and 40 ms
    abnormal[:, 1] = 0.9 * synthetic.TRUTH_THRESHOLD
    truth = synthetic.mark(abnormal, normal)
    assert np.array_equal(np.flatnonzero(truth[:, 0]), np.r_[0:40, 60:70]) and not truth[:, 1:].any()


def test_heartpy_finds_the_simulated_r_peaks(by_kind):
    """The pipeline's R peaks (HeartPy on the filtered lead II) are the simulated ones, in normals and abnormals."""
    for kind, record in by_kind.items():
        peaks = find_r_peaks_by_heartpy(filter_leads(record.signal)[:, LEAD_II]) / synthetic.RATE
        inner = record.r_times[(record.r_times > 0.3) & (record.r_times < 9.7)]  # HeartPy may miss one at the ends
        far = np.abs(peaks[:, None] - record.r_times)
        assert far.min(axis=1).max() < 0.04 and far[:, np.isin(record.r_times, inner)].min(axis=0).max() < 0.04, kind


@pytest.mark.parametrize("out, records, seed, flag", [
    ("real", RECORDS, SEED, "--out"), ("real/ptbxl_database.csv", RECORDS, SEED, "--out"),
    ("new", synthetic.MIN_RECORDS - 1, SEED, "--records"), ("new", RECORDS, -1, "--seed")])
def test_what_cannot_be_written_is_refused(tmp_path, out, records, seed, flag):
    """A folder of real recordings is never overwritten, and a count or seed that cannot work is explained."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "ptbxl_database.csv").write_text("real")
    with pytest.raises(UserError, match=flag):
        synthetic.write_dataset(tmp_path / out, records, seed)
    assert read_all(tmp_path) == {"real/ptbxl_database.csv": b"real"}
