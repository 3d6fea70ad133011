"""What is scored without a network: the trivial scores are what their names say, and finite on whatever is scored."""
import numpy as np
import pytest
from conftest import run_script

from ecg.arrays import Records, load_r_peaks, open_records
from evaluation import rival, trivial
from scoring import without_network
from utils import UserError


def test_trivial_maps():
    """High at the R peak, where the lead is steep, where it is far off."""
    record = np.zeros((1, 5000, 2), np.float32)
    record[0, 2000:2200, 0] = 1
    found = trivial.make_maps(None, Records(record, "test.npy"), [np.array([2500])], np.array([0]))
    assert all(maps.shape == (1, 4800, 2) for maps in found.values())
    assert found["nearness to an R peak"][0, :, 1].argmax() == 2400
    assert abs(found["|slope|"][0, :1950, 0].argmax() - 1900) <= 1
    assert found["|amplitude|"][0, 2000, 0] > 0.9 and found["|amplitude|"][0, 1000, 0] < 1e-6


def test_maps_with_the_records_score():
    """The score is the same in all of a record, in the order of the records given; nearness adds to it as much."""
    records, peaks = Records(np.zeros((3, 5000, 2), np.float32), "test.npy"), [np.array([2500])] * 3
    found = trivial.make_maps(np.array([1.0, 5.0, 3.0]), records, peaks, np.array([1, 2]))
    constant, both = found["record's score"], found["nearness + record's score"]
    assert constant.shape == (2, 4800, 2) and (constant[0] == constant[0, 0, 0]).all()
    assert constant[0, 0, 0] == pytest.approx(np.sqrt(1.5)) and constant[1, 0, 0] == 0
    assert both[0] - both[1] == pytest.approx(constant[0], rel=1e-4)
    assert both[1, 2400, 1] == both[1].max() == 0 and both[1, 2340, 0] == pytest.approx(-1)


@pytest.mark.parametrize("peaks, near", [([60, 2500, 4700], [100, 2500, 4700]), ([4700], [4700]), ([], [340, 820])])
def test_nearness_knows_every_r_peak(peaks, near):
    """R peaks whose beat does not fit into the recording count as well; without any it is nearness to a window."""
    record = Records(np.zeros((1, 5000, 2), np.float32), "test.npy")
    maps = trivial.make_maps(None, record, [np.array(peaks, np.int32)], np.array([0]))["nearness to an R peak"][0, :, 1]
    for place in near:
        around = maps[max(0, place - 130):place - 70]
        assert maps[place - 100] == around.max() == -min(abs(place - peak) for peak in (peaks or near))


def test_trivial_detection():
    """Amplitude, slope, rate and irregularity; a record without a rhythm scores 0, not NaN."""
    record = np.zeros((1, 5000, 2), np.float32)
    record[0, 2000:2200, 0] = 3
    peaks = [np.array([500, 1000, 1500, 2250]), np.zeros(0, np.int32), np.array([700]), np.array([700, 1200])]
    found = trivial.score_signals(Records(np.repeat(record, 4, axis=0), "test.npy"), peaks)
    assert found["largest amplitude"].tolist() == [3] * 4
    assert found["mean |slope|"] == pytest.approx(6 / (4999 * 2))
    assert found["heart rate"] == pytest.approx([60 / (3.5 / 3), 0, 0, 60])
    changes = np.sqrt(np.mean(np.square([0, 0.5])))
    assert found["RR irregularity"] == pytest.approx([changes / (3.5 / 3), 0, 0, 0])


def test_people():
    """Older and male is more anomalous; who is unknown scores as the mean of the others; what no table tells is out."""
    table = {"age": np.array([20, 80, np.nan]), "sex": np.array(["F", "M", ""])}
    found = trivial.score_people(table, {"age": np.array([40.0, np.nan, 50.0])})
    assert {name: score.tolist() for name, score in found.items()} == {
        "age": [20, 80, 50], "|age - mean|": [25, 35, 5], "sex": [0, 1, 0.5]}
    assert set(trivial.score_people(table, {})) == {"age", "sex"} and trivial.score_people({}, table) == {}
    assert trivial.score_people({"age": np.array([np.nan]), "sex": np.array([""])}, table) == {}


def test_the_rival_sees_millivolts():
    """Records that are stored normalised are described in mV; where nobody knows these it is refused."""
    rng = np.random.default_rng(0)
    ecgs, peaks = rng.normal(0, 0.3, (3, 5000, 12)).astype(np.float32), [np.arange(300, 4400, 450)] * 3
    low, high = ecgs.min(axis=1), ecgs.max(axis=1)
    stored = (2 * (ecgs - low[:, None]) / (high - low)[:, None] - 1).astype(np.float32)
    plain = rival.describe(Records(ecgs, "test.npy"), peaks)
    np.testing.assert_allclose(rival.describe(Records(stored, "train.npy", (low, high)), peaks), plain, atol=1e-3)
    np.testing.assert_array_equal(rival.describe(Records(ecgs, "test.npy"), peaks, np.array([2])), plain[2:])
    with pytest.raises(UserError, match="mV"):
        rival.describe(Records(stored, "train.npy", None, in_millivolts=False), peaks)


def test_the_rival_in_a_file(simulated, tmp_path):
    """The tool's file scores as the fit itself does; its normals are fold 9's; a damaged file is named."""
    path = tmp_path / "no_network.npz"
    finished = run_script("tools/fit_no_network.py", "--data_path", simulated, "--save_path", path)
    assert finished.returncode == 0, finished.stderr
    fitted, normals = rival.load_rival(path)
    records = open_records(simulated, "val", 12)
    features = rival.describe(records, load_r_peaks(simulated, "val", records, "slope"))
    scores = without_network.score(rival.fit_rival(simulated, 12)[0], features)
    np.testing.assert_allclose(without_network.score(fitted, features), scores)
    normal = np.load(simulated / "val_label.npy") == 0
    np.testing.assert_allclose(normals, sorted(scores[normal]), rtol=1e-4)                  # float32 features
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="no_network.npz cannot be read"):
        rival.load_rival(path)


def test_a_measurement_in_words():
    assert rival.tell(("V5", "T", -0.123, "mV", 0.08, 0.61, -4.0)) == "T in V5 -0.12 mV (usual 0.08 to 0.61)"
    assert rival.tell(("all", "rate", 141.7, "1/min", 50.2, 99.0, 4.0)) == "rate 142 1/min (usual 50 to 99)"
    assert rival.tell(("V5", "T", 0.3, "mV", 0.08, 0.61, 1.0)) == "T in V5 0.30 mV (within 0.08 to 0.61)"


def test_fold_9_is_not_fitted_to_where_folds_are_unknown(simulated, monkeypatch, capsys):
    monkeypatch.setattr(rival, "load_table", lambda *_: None)
    assert rival.fit_rival(simulated, 12)[0] is None and "fold 9 is held back, but" in capsys.readouterr().out
