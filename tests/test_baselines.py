"""baselines.py: the trivial scores are what their names say, and finite on whatever is scored."""
import numpy as np
import pytest

from evaluation import trivial


def test_trivial_maps():
    """High at the R peak, where the lead is steep, where it is far off."""
    record = np.zeros((1, 5000, 2), np.float32)
    record[0, 2000:2200, 0] = 1
    found = trivial.localization_baselines(record, [np.array([2500])])
    assert all(maps.shape == (1, 4800, 2) for maps in found.values())
    assert found["nearness to an R peak"][0, :, 1].argmax() == 2400
    assert abs(found["|slope|"][0, :1950, 0].argmax() - 1900) <= 1
    assert found["|amplitude|"][0, 2000, 0] > 0.9 and found["|amplitude|"][0, 1000, 0] < 1e-6


@pytest.mark.parametrize("peaks, near", [([60, 2500, 4700], [100, 2500, 4700]), ([4700], [4700]), ([], [340, 820])])
def test_nearness_knows_every_r_peak(peaks, near):
    """R peaks whose beat does not fit into the recording count as well; without any it is nearness to a window."""
    record = np.zeros((1, 5000, 2), np.float32)
    maps = trivial.localization_baselines(record, [np.array(peaks, np.int32)])["nearness to an R peak"][0, :, 1]
    for place in near:
        around = maps[max(0, place - 130):place - 70]
        assert maps[place - 100] == around.max() == -min(abs(place - peak) for peak in (peaks or near))


def test_trivial_detection():
    """Amplitude, slope, rate and irregularity; a record without a rhythm scores 0, not NaN."""
    record = np.zeros((1, 5000, 2), np.float32)
    record[0, 2000:2200, 0] = 3
    peaks = [np.array([500, 1000, 1500, 2250]), np.zeros(0, np.int32), np.array([700]), np.array([700, 1200])]
    found = trivial.detection_baselines(np.repeat(record, 4, axis=0), peaks)
    assert found["largest amplitude"].tolist() == [3] * 4
    assert found["mean |slope|"] == pytest.approx(6 / (4999 * 2))
    assert found["heart rate"] == pytest.approx([60 / (3.5 / 3), 0, 0, 60])
    changes = np.sqrt(np.mean(np.square([0, 0.5])))
    assert found["RR irregularity"] == pytest.approx([changes / (3.5 / 3), 0, 0, 0])


@pytest.fixture
def beats():
    """64 records of ten noisy beats in three leads, mV, their R peaks, and the same normalised with its scale."""
    rng = np.random.default_rng(0)
    time = np.arange(-140, 340)
    size = rng.normal(1, 0.1, (64, 3))
    shape = np.exp(-(time / 8) ** 2) + 0.3 * np.exp(-((time - 140) / 30) ** 2)
    records = rng.normal(0, 0.02, (64, 5000, 3))
    peaks = np.arange(300, 4400, 450)
    for peak in peaks:
        records[:, peak - 140:peak + 340] += size[:, None] * shape[:, None]
    low, high = records.min(axis=1), records.max(axis=1)
    normalised = 2 * (records - low[:, None]) / (high - low)[:, None] - 1
    return records.astype(np.float32), [peaks] * 64, normalised.astype(np.float32), {"low": low, "high": high}


def test_median_beat(beats):
    """It ignores one wild beat and the gain, not the shape; and its distance finds an odd one among the normals."""
    records, peaks, normalised, scale = beats
    odd = records[:4].copy()
    odd[0, peaks[0][3] - 140:peaks[0][3] + 340] += 5                     # one beat of ten
    odd[1] *= 3
    odd[2, :, 1] *= -1                                                   # a lead upside down
    plain = trivial.median_beat(records[1], peaks[1])
    assert plain.shape == (360,) and np.sqrt(np.mean(plain ** 2)) == pytest.approx(1)
    assert trivial.median_beat(odd[1], peaks[1]) == pytest.approx(plain, abs=1e-5)
    fitted = trivial.fit_median_beats(normalised, scale, peaks, np.arange(8, 64))
    usual = trivial.score_median_beats(fitted, records[:8], peaks)
    found = trivial.score_median_beats(fitted, odd, peaks)
    assert found[2] > 10 * usual.max() and found[:2].max() < 3 * usual.max()
    flat = trivial.score_median_beats(fitted, np.zeros((1, 5000, 3), np.float32), [np.zeros(0, int)])
    assert np.isfinite(flat).all()


def test_median_beats_are_fitted_in_millivolts(beats):
    """The scale undoes the normalisation of train.npy: the fit is that of the records in mV."""
    records, peaks, normalised, scale = beats
    ones = {"low": -np.ones((64, 3)), "high": np.ones((64, 3))}
    from_normalised = trivial.fit_median_beats(normalised, scale, peaks, np.arange(64))
    from_records = trivial.fit_median_beats(records, ones, peaks, np.arange(64))
    assert from_normalised.explained_variance_ == pytest.approx(from_records.explained_variance_, rel=1e-3)
