"""R peaks on simulated beats, and on a record of which HeartPy finds every T wave."""
import heartpy
import numpy as np
import pytest
from conftest import SHARED

from ecg import signals
from ecg.r_peaks import disagree, find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.wfdb_files import read_record

TWO = 2                         # samples, 4 ms
DOUBLED_BEATS = SHARED / "cases" / "doubled_beats" / "ptbxl60"


def simulate(places, width=1.0, seed=0):
    """Twelve filtered leads, mV, with an R wave at each of places, in samples; width: of QRS, 1 = about 80 ms."""
    rng, time = np.random.default_rng(seed), np.arange(5000)[:, None] / 500
    waves = ((-0.16, 0.02, 0.1), (-0.03 * width, 0.008 * width, -0.1), (0, 0.012 * width, 1.0),
             (0.035 * width, 0.01 * width, -0.2), (0.22, 0.04, 0.3))          # s from R, s, mV
    signal = 0.01 * rng.normal(size=(5000, 12))
    for place in places:
        for delay, spread, height in waves:
            signal += height * np.exp(-0.5 * ((time - place / 500 - delay) / spread) ** 2) * rng.uniform(0.95, 1.05)
    return signals.filter_leads(signal * np.linspace(-0.5, 1.2, 12))


@pytest.mark.parametrize("rate, width", [(40, 1), (75, 1), (75, 2), (130, 1), (220, 1)])
def test_every_beat_is_met_at_its_r_wave(rate, width):
    regular = np.arange(250, 4800, 30_000 / rate)
    places = np.round(regular + np.random.default_rng(rate).uniform(-0.03, 0.03, len(regular)) * 30_000 / rate)
    found = find_r_peaks_by_slope(simulate(places, width))
    assert found.dtype == np.int32 and len(found) == len(places)
    assert np.abs(found - places).max() <= TWO


def test_a_premature_beat_of_another_shape_keeps_its_place():
    signal = simulate(np.arange(300, 4800, 400))
    wide = np.exp(-0.5 * ((np.arange(5000) - 2460) / 18) ** 2)[:, None] * np.linspace(1.5, -1.0, 12)
    signal[1900:2700] = simulate([1900, 2300])[1900:2700]                     # the next beat is left out
    found = find_r_peaks_by_slope(signal + signals.filter_leads(wide))
    assert np.abs(found[:, None] - np.array([2300, 2460])).min(axis=0).max() <= 2 * TWO


def test_unit_offset_and_polarity_of_a_lead_do_not_matter():
    signal = simulate(np.arange(300, 4800, 350))
    expected = find_r_peaks_by_slope(signal)
    for other in (1000 * signal, signals.normalize_leads(signal), signal * np.resize([1, -3], 12) + 5):
        assert np.array_equal(find_r_peaks_by_slope(other), expected)


def test_flat_leads_do_not_count():
    signal = simulate(np.arange(300, 4800, 350))[:, :3]
    with_flat = np.concatenate([np.zeros((5000, 1)), signal, np.full((5000, 1), -1.0)], axis=1)
    assert np.array_equal(find_r_peaks_by_slope(with_flat), find_r_peaks_by_slope(signal))
    assert len(find_r_peaks_by_slope(np.zeros((5000, 12)))) == len(find_r_peaks_by_slope(np.full((5000, 1), 2.0))) == 0


@pytest.mark.skipif(not DOUBLED_BEATS.with_suffix(".dat").exists(), reason="shared/cases/doubled_beats is absent")
def test_tall_t_waves_are_no_beats():
    signal = signals.filter_leads(read_record(DOUBLED_BEATS, 500))
    assert len(find_r_peaks_by_slope(signal)) == len(find_r_peaks_by_slope(signal[:, [signals.LEAD_II]])) == 8


# ---- HeartPy

def rhythm():
    """A lead of an irregular rhythm whose R waves are upright, and its R peaks."""
    places = np.arange(250, 4800, 400) + np.round(10 * np.sin(np.arange(12)))
    return simulate(places)[:, -1].astype(np.float32), places


@pytest.mark.filterwarnings("ignore::RuntimeWarning")       # HeartPy's, of measures that are not used
def test_r_peaks_are_heartpys_and_at_the_beats():
    """The peaklist of HeartPy's process(), one at each beat to 10 ms, whatever the unit of the lead."""
    lead, places = rhythm()
    found = find_r_peaks_by_heartpy(lead)
    assert found.dtype == np.int32 and np.array_equal(found, heartpy.process(lead.astype(float), 500.0)[0]["peaklist"])
    assert len(found) == len(places) and np.abs(found - places).max() <= 5
    for other in (1000 * lead, signals.normalize_leads(lead)):
        assert np.array_equal(found, find_r_peaks_by_heartpy(other))


@pytest.mark.parametrize("lead", [
    np.zeros(5000), np.full(5000, -3.0), np.full(5000, np.nan), np.full(5000, np.inf), np.zeros(0), np.ones(1),
    np.eye(1, 5000, 2500)[0], np.repeat([0.0, 1.0], 2500), np.arange(5000.0), np.sin(np.arange(5000) / 3),
    np.random.default_rng(2).normal(size=5000), np.cumsum(np.random.default_rng(2).normal(size=5000))])
def test_leads_without_a_rhythm_have_no_r_peaks_or_valid_ones(lead):
    """HeartPy raises all kinds of errors on them: each means an empty array, no record is dropped."""
    before = lead.copy()
    finite = np.nan_to_num(lead, posinf=0)[:, None]
    for found in (find_r_peaks_by_heartpy(lead), *([find_r_peaks_by_slope(finite)] if len(lead) > 1 else [])):
        assert found.dtype == np.int32 and (np.diff(found) > 0).all() and ((found >= 0) & (found < len(lead))).all()
    assert np.array_equal(lead, before, equal_nan=True), "the lead was changed in place"


def test_a_quarter_more_beats_is_no_agreement():
    assert not disagree(10, 8) and not disagree(8, 10) and disagree(11, 8) and disagree(0, 1) and not disagree(0, 0)
    if DOUBLED_BEATS.with_suffix(".dat").exists():
        lead = signals.filter_leads(read_record(DOUBLED_BEATS, 500))[:, signals.LEAD_II]
        assert len(find_r_peaks_by_heartpy(lead)) == 29 and disagree(29, 8)
