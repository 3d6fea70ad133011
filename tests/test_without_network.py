"""scoring/without_network.py against plain loops, and on simulated normals and one with an inverted T wave."""
import numpy as np
import pytest

from ecg.signals import LEAD_NAMES
from scoring import without_network

WAVES = {"P": (-0.16, 0.02), "q": (-0.03, 0.008), "R": (0, 0.012), "S": (0.035, 0.01), "T": (0.24, 0.04)}  # s from R, s
HEIGHTS = np.array([[0.1, -0.05, 0.8, -0.2, 0.3]]) * np.linspace(0.6, 1.2, 12)[:, None]                      # mV


def simulate(rng, change=()):
    """A record (5000, 12), mV, and its R peaks. change: (lead, wave, factor) for each wave that is not normal."""
    heights = HEIGHTS * rng.normal(1, 0.12, HEIGHTS.shape)
    for lead, wave, factor in change:
        heights[LEAD_NAMES.index(lead), list(WAVES).index(wave)] *= factor
    r_peaks = np.round(250 + np.cumsum(rng.normal(rng.uniform(350, 500), 8, 9))).astype(int)
    r_peaks = r_peaks[r_peaks < 4990]
    time = np.arange(-200, 350)[:, None] / 500
    shapes = np.concatenate([np.exp(-0.5 * ((time - delay) / spread) ** 2) for delay, spread in WAVES.values()], axis=1)
    record = 0.01 * rng.normal(size=(5500, 12))
    for r_peak in r_peaks:
        record[r_peak - 200:r_peak + 350] += shapes @ heights.T
    return record[:5000], r_peaks


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    return without_network.fit(np.stack([without_network.describe(*simulate(rng)) for _ in range(400)]))


def describe_all(records):
    return np.stack([without_network.describe(*record) for record in records])


def test_measurements_are_those_of_a_plain_loop():
    record, r_peaks = simulate(np.random.default_rng(1))
    numbers = dict(zip([name[:2] for name in without_network.NAMES],
                       without_network.describe(record, r_peaks)[without_network.NAMED]))
    for lead, name in enumerate(LEAD_NAMES):
        beat = {ms: np.median([record[r + ms // 2, lead] for r in r_peaks if 200 < r < 4400])
                for ms in range(-440, 960, 4)}
        of = lambda first, last: [beat[ms] for ms in range(first, last + 1, 4)]     # noqa: E731
        expected = {"R": max(of(-60, 68)), "S": min(of(-60, 68)), "P": max(of(-220, -72)),
                    "initial r": max(of(-60, -8)), "late r": max(of(16, 88)),
                    "ST": np.mean(of(68, 100)) - np.mean(of(-80, -64)),
                    "T": max(of(148, 420), key=abs), "highest T": max(of(148, 420))}
        assert {wave: numbers[name, wave] for wave in expected} == pytest.approx(expected, abs=1e-6)
    assert numbers["all", "rate"] == pytest.approx(30_000 / np.median(np.diff(r_peaks)), rel=1e-6)
    assert numbers["all", "longest RR"] == 2 * np.diff(r_peaks).max()


def test_the_shape_stretches_with_the_rr_interval():
    """At 60 a minute the shape is the median beat itself; at 94 what comes after QRS is shorter by the root of RR."""
    beat = np.sin(np.arange(350) / 20)[:, None] * np.arange(1, 9)
    times = without_network.TIMES
    at_60 = np.array([np.interp(1000 * t + 440, 4 * np.arange(350), beat[:, 0]) for t in times])
    assert without_network.stretched(beat, times, 1.0)[:, 0] == pytest.approx(at_60)
    late = times > without_network.RIGID
    moments = 0.05 + (times[late] - 0.05) * np.sqrt(0.64)
    at_94 = np.interp(1000 * moments + 440, 4 * np.arange(350), beat[:, 0])
    assert without_network.stretched(beat, times, 0.64)[late, 0] == pytest.approx(at_94)


def test_unseen_normals_score_about_0_and_1(fitted):
    """Scaled by normals that were fitted to, unseen ones would be far above; few normals make it a little below."""
    rng = np.random.default_rng(2)
    scores = without_network.score(fitted, describe_all(simulate(rng) for _ in range(100)))
    assert abs(scores.mean()) < 1.5 and 0.6 < scores.std() < 1.4


@pytest.mark.parametrize("lead", ["V5", "aVL"])
def test_an_inverted_t_is_anomalous_and_told_first(fitted, lead):
    rng = np.random.default_rng(3)
    features = without_network.describe(*simulate(rng, [(lead, "T", -1.0)]))
    (found, wave, value, unit, low, high, z), *others = without_network.unusual(fitted, features, 5)
    assert (found, wave, unit) == (lead, "T", "mV") and value < 0 < low < high and z < -1.96
    assert len(others) == 4 and all(abs(other[-1]) <= abs(z) for other in others)
    normals = without_network.score(fitted, describe_all(simulate(rng) for _ in range(50)))
    assert without_network.score(fitted, features[None])[0] > normals.max()


@pytest.mark.parametrize("rate_change, change", [(1.5, ()), (1, [(lead, "R", 0.3) for lead in LEAD_NAMES])])
def test_fast_and_low_voltage_records_score_higher(fitted, rate_change, change):
    rng = np.random.default_rng(4)
    record, r_peaks = simulate(rng, change)
    changed = without_network.describe(record, np.arange(250, 4990, int(np.diff(r_peaks)[0] / rate_change)))
    assert without_network.score(fitted, changed[None])[0] > 2


@pytest.mark.parametrize("r_peaks", [[], [2500], [10, 4900], [199, 2000, 4999]])
@pytest.mark.parametrize("flat", [slice(0, 0), slice(0, 1), slice(0, 12)])
def test_nothing_is_ever_nan(fitted, r_peaks, flat):
    record, _ = simulate(np.random.default_rng(5))
    record[:, flat] = 0
    features = without_network.describe(record, np.array(r_peaks, dtype=np.int32))
    assert np.isfinite(features).all() and np.isfinite(without_network.score(fitted, features[None])).all()
    assert all(np.isfinite(told[2:3] + told[4:]).all() for told in without_network.unusual(fitted, features, 200))


def test_what_is_fitted_is_plain_and_lasts(fitted, tmp_path):
    features = describe_all(simulate(np.random.default_rng(seed)) for seed in range(6, 9))
    np.savez(tmp_path / "fitted.npz", **fitted)
    with np.load(tmp_path / "fitted.npz", allow_pickle=False) as kept:
        assert np.array_equal(without_network.score(dict(kept), features), without_network.score(fitted, features))
