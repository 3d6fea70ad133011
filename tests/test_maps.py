"""Maps that tell where: the places of a beat and the way back, the models of beats, single beats, the restorer."""
import numpy as np
import pytest
import torch
from conftest import run_script

from ecg.arrays import Records, load_table, open_records
from ecg.leads import INDEPENDENT
from scoring.beat_frame import SAMPLES, TIMES, lay_back, typical_beats
from scoring.beat_models import BEAT_MODELS
from scoring.beat_restorer import HELD_BACK, BeatRestorer, load_restorer
from scoring.maps import WITH_NETWORK, WITHOUT_NETWORK, beat_to_beat, fit_maps, make_maps, network_unusualness
from scoring.usual import fit_rarity, rarity, show_record
from scoring.without_network import stretch_times
from tools.train_restorer import draw_batch, pass_high, train
from utils import UserError

LEAD_V3, BEAT = 8, 400                      # samples between beats
R_PEAKS = np.arange(300, 4800, BEAT)
T_WAVE = slice(150, 240)                    # samples after R in which T stands


def bump(at: float, width: float, times: np.ndarray) -> np.ndarray:
    return np.exp(-((times - at) / width) ** 2 / 2)


def normal_ecg(rng) -> np.ndarray:
    """(5000, 12) mV: P, QRS and T at R_PEAKS, their heights those of a heart of its own, Einthoven's law kept."""
    times = (np.arange(5000)[:, None] - R_PEAKS) / 500
    waves = [bump(at, width, times).sum(axis=1) for at, width in ((-0.16, 0.02), (0, 0.012), (0.38, 0.03))]
    heights = rng.normal(1, 0.15, (3, 1)) * (1 + rng.normal(0, 0.1, (3, 8))) * np.array([[0.1], [1], [0.4]])
    eight = np.transpose(waves) @ heights + rng.normal(0, 0.03, (5000, 8))
    first, second = eight[:, :1], eight[:, 1:2]
    return np.hstack([first, second, second - first, -(first + second) / 2, first - second / 2, second - first / 2,
                      eight[:, 2:]]).astype(np.float32)


@pytest.fixture(scope="module")
def normals():
    rng = np.random.default_rng(0)
    return Records(np.stack([normal_ecg(rng) for _ in range(160)]), "train.npy"), [R_PEAKS] * 160


@pytest.fixture(scope="module")
def restorer(normals):
    beats, rr = typical_beats(*normals, np.arange(160))
    return train(beats[..., INDEPENDENT], rr, steps=25)


@pytest.fixture(scope="module")
def fitted(normals, restorer):
    return fit_maps(*normals, np.arange(160), restorer)


def lesioned(seed: int = 5) -> np.ndarray:
    """A normal ECG whose T in V3 is turned over."""
    record = normal_ecg(np.random.default_rng(seed))
    for r in R_PEAKS:
        record[r + T_WAVE.start:r + T_WAVE.stop, LEAD_V3] *= -1
    return record


def test_a_beat_returns_to_its_place_at_every_beat():
    """Against a plain loop over samples; two rates, so that stretching counts."""
    values = np.random.default_rng(1).normal(size=(len(TIMES), 2))
    for step in (300, 500):
        peaks, rr = np.arange(400, 4500, step), step / 500
        laid = lay_back(values, peaks)
        moments = stretch_times(TIMES, rr)
        for number in range(100, 800, 7):
            start = min(0.42 * rr, -moments[0])
            beats = [r for r in peaks if r / 500 - start <= SAMPLES[number] / 500]
            seconds = (SAMPLES[number] - beats[-1]) / 500
            expected = [np.interp(seconds, moments, column) for column in values.T]
            np.testing.assert_allclose(laid[number], expected, atol=5e-3)


@pytest.mark.parametrize("name", [*BEAT_MODELS])
def test_what_is_left_of_a_normal_is_about_its_usual_size_and_a_t_that_is_turned_over_is_not(name, normals, fitted):
    model, usual = fitted[name], fitted[name]["usual"]
    new = np.stack([normal_ecg(np.random.default_rng(seed)) for seed in range(900, 940)])
    beats, _ = typical_beats(Records(new, "val.npy"), [R_PEAKS] * 40, np.arange(40))
    left = BEAT_MODELS[name][1](model, beats[..., INDEPENDENT])[..., 4] / usual[:, LEAD_V3]         # V3 of the eight
    spread = beats[..., LEAD_V3].std(axis=0) / usual[:, LEAD_V3]
    assert np.mean(left ** 2) < 0.7 * np.mean(spread ** 2)                  # the model explains something
    assert 0.5 < np.sqrt(np.mean(left ** 2)) < 1.3
    turned, _ = typical_beats(Records(lesioned()[None], "val.npy"), [R_PEAKS], [0])
    left = BEAT_MODELS[name][1](model, turned[..., INDEPENDENT])[0]
    peak = np.abs(left).max(axis=1).argmax()
    assert abs(stretch_times(TIMES, BEAT / 500)[peak] - 0.38) < 0.05 and np.abs(left[peak]).argmax() == 4
    assert left[peak, 4] < 0                                                                        # seen less expected


def test_maps_are_highest_where_the_lesion_is(normals, fitted, restorer):
    records = Records(np.stack([lesioned(), normal_ecg(np.random.default_rng(6))]), "val.npy")
    maps = make_maps(fitted, records, [R_PEAKS] * 2, [0, 1], restorer)
    assert list(maps) == [*WITHOUT_NETWORK[:3], "network", *WITHOUT_NETWORK[3:], WITH_NETWORK[-1]]
    at_t = np.isin(np.arange(100, 4900), (R_PEAKS[:, None] + np.arange(180, 201)).ravel())
    for name in ("residual", "conditional", "robust", "without network"):
        values = maps[name][0]
        assert values.shape == (4800, 12) and values.dtype == np.float32
        assert np.median(values[at_t, LEAD_V3]) > np.quantile(values, 0.98), name
    again = make_maps(fitted, records, [R_PEAKS] * 2, [1], restorer)
    for name, values in again.items():                                      # a row does not depend on its block
        np.testing.assert_allclose(values[0], maps[name][1], atol=1e-3)


def test_a_beat_unlike_the_others_and_an_early_one_are_marked_alone():
    record = normal_ecg(np.random.default_rng(7))
    record[2300:2700] = 2 * np.roll(record, 60, axis=0)[2300:2700]
    of_beat = beat_to_beat(record, R_PEAKS)
    inside = (SAMPLES > 2250) & (SAMPLES < 2750)
    assert of_beat[inside].max() > 20 * max(of_beat[~inside].max(), 0.05)
    early = R_PEAKS.copy()
    early[5] -= 120                                                         # of 400: 30 % early
    record = normal_ecg(np.random.default_rng(8))
    alone = beat_to_beat(record, early) - beat_to_beat(record, R_PEAKS)
    around = (SAMPLES > early[5] - 50) & (SAMPLES < early[5] + 150)
    assert alone[around].min() > 20
    assert not beat_to_beat(record, R_PEAKS).any()
    assert not beat_to_beat(record, R_PEAKS[:2]).any()


def test_the_high_pass_of_changes_is_that_of_the_records():
    """A change that every beat repeats, far from the ends of a long record, by scipy's filter."""
    from scipy.signal import butter, filtfilt
    rng = np.random.default_rng(2)
    change = np.cumsum(rng.normal(size=(len(TIMES), 1)), axis=0)
    low = (np.abs(np.fft.fftfreq(103, 1 / 103)) < 9)[:, None]
    change = np.real(np.fft.ifft(np.fft.fft(change, axis=0) * low, axis=0))
    repeated = np.tile(change, (21, 1))[:, 0]
    filtered = filtfilt(*butter(2, 1, "highpass", fs=100), repeated)[10 * 103:11 * 103]
    np.testing.assert_allclose(pass_high(change[None], np.ones(1))[0, :, 0], filtered, atol=0.02 * np.ptp(change))


def test_marks_of_a_batch_are_where_it_differs(normals):
    beats, rr = typical_beats(*normals, np.arange(160))
    changed, normal, _, visible = draw_batch(beats[..., INDEPENDENT], rr, np.random.default_rng(0))
    difference = (changed - normal).numpy()
    marked = visible.numpy()[..., [0, 1, 6, 7, 8, 9, 10, 11]] > 0
    assert 0.01 < marked.mean() < 0.15 and np.abs(difference)[marked].min() > 0.0199
    untouched = ~marked.any(axis=(1, 2)) & (np.abs(difference).max(axis=(1, 2)) < 1e-6)
    assert 0.1 < untouched.mean() < 0.4
    assert np.sign(difference)[marked].mean() ** 2 < 0.25


def test_restorer_returns_the_twelve_leads_in_millivolts_and_refuses_other_files(normals, restorer, tmp_path):
    beats, rr = typical_beats(*normals, np.arange(40))
    restored, odds = restorer.restore(beats, rr)
    assert restored.shape == odds.shape == beats.shape
    np.testing.assert_allclose(restored[..., 2], restored[..., 1] - restored[..., 0], atol=1e-5)
    assert np.mean((restored - beats) ** 2) < 0.5 * np.mean((beats - beats.mean(axis=0)) ** 2) + 0.01
    path = tmp_path / "weights.pt"
    for content in ({"model_state_dict": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match="train_restorer"):
            load_restorer(path)
    with pytest.raises(UserError, match="missing"):
        load_restorer(tmp_path / "no.pt")
    torch.save({"model_state_dict": restorer.state_dict(), "config": {"steps": 25}}, path)
    model, facts = load_restorer(path)
    np.testing.assert_array_equal(model.restore(beats, rr)[1], odds)
    assert facts == {"config": {"steps": 25}}


def test_rarity_is_the_share_of_normals(normals, fitted, restorer):
    quantiles = fit_rarity(fitted)
    beats, rr = typical_beats(*normals, np.arange(0, 160, 8))
    restored, odds = restorer.restore(beats, rr)
    unusual = network_unusualness(fitted["network"], beats - restored, odds)
    of_normals = np.stack([rarity(quantiles, of_one) for of_one in unusual])
    assert fitted["network"]["usual"].mean() < 0.05                         # mV: seen less expected
    assert 0.03 < np.mean(of_normals > 1) < 0.2 and 0.4 < np.mean(of_normals > 0.301) < 0.6
    assert of_normals.min() >= 0 and of_normals.max() <= 3.0001
    highest = rarity(quantiles, np.full(quantiles.shape[1:], 1e6))
    np.testing.assert_allclose(highest, 3)
    ecg, expected, rare = show_record(fitted, quantiles, Records(lesioned()[None], "val.npy"), [R_PEAKS], 0, restorer)
    assert ecg.shape == expected.shape == rare.shape == (4800, 12)
    np.testing.assert_array_equal(ecg, lesioned()[100:4900])


def test_the_restorer_sees_no_record_of_fold_9(simulated, tmp_path):
    """Nor the normals that tell what is usual."""
    finished = run_script("tools/train_restorer.py", "--data_path", simulated, "--steps", 1, "--save_path",
                          tmp_path / "restorer.pt")
    assert finished.returncode == 0, finished.stderr
    table = load_table(simulated, "train", open_records(simulated, "train", 12))
    normals = np.count_nonzero(table["fold"] != 9)
    assert 0 < normals < len(table["fold"])
    assert load_restorer(tmp_path / "restorer.pt")[1]["records"] == normals - len(range(0, normals, HELD_BACK))
