"""What happens to a signal before it is a row of an array: resampling, filter, min-max, doubts."""
import warnings

import numpy as np
import pytest
from scipy.signal import butter, filtfilt
from small import beats_at, every

from ecg import signals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # pkg_resources, at HeartPy's import
    from heartpy.filtering import filter_signal


@pytest.fixture
def noise():
    return np.cumsum(np.random.default_rng(0).normal(size=(5000, 12)), axis=0) / 100


def test_filter_is_the_published_one(noise):
    """High-pass 1 Hz, then low-pass 25 Hz, order 2, zero phase, lead by lead; HeartPy's "notch" changes nothing."""
    filtered = signals.filter_leads(noise)
    for lead in range(12):
        high = filtfilt(*butter(2, 1 / 250, "highpass"), noise[:, lead])
        low = filtfilt(*butter(2, 25 / 250, "lowpass"), high)
        np.testing.assert_allclose(filtered[:, lead], low, rtol=0, atol=1e-12)
        high = filter_signal(noise[:, lead], cutoff=1, sample_rate=500, order=2, filtertype="highpass")
        low = filter_signal(high, cutoff=25, sample_rate=500, order=2, filtertype="lowpass")
        np.testing.assert_allclose(filtered[:, lead], low, rtol=0, atol=1e-12)
        np.testing.assert_allclose(filter_signal(low, cutoff=35, sample_rate=500, filtertype="notch"), low,
                                   rtol=0, atol=1e-9)


@pytest.mark.parametrize("peak", [0.05, 0.5, 3.33, 9.9])
def test_resampling_keeps_time(peak):
    """A peak at t seconds of a 100 Hz record is at t seconds at 500 Hz, and the record is 5000 samples long."""
    bump = np.exp(-0.5 * ((np.arange(1000) / 100 - peak) / 0.03) ** 2)
    resampled = signals.resample(np.stack([bump, 2 * bump], axis=1), 100)
    assert resampled.shape == (5000, 2) and (np.abs(resampled.argmax(axis=0) - 500 * peak) <= 1).all()
    np.testing.assert_allclose(resampled.max(axis=0), [1, 2], rtol=0.02)
    assert np.array_equal(signals.resample(resampled, 500), resampled)


@pytest.mark.parametrize("offset", [0.0, 0.3, -1.234, 32.767])
def test_resampling_does_not_ring(offset):
    """A lead with a drift comes back as the same line, also at both ends; a flat lead is 0 after the filter."""
    line = np.linspace(4, 6, 1000)
    read = signals.resample(np.stack([line, np.full(1000, offset)] + [line] * 10, axis=1), 100)
    np.testing.assert_allclose(read[:, 0], np.interp(np.arange(5000) / 500, np.arange(1000) / 100, line), atol=0.02)
    for signal in (read, read[::5].repeat(5, axis=0)):
        filtered = signals.filter_leads(signal)
        assert (filtered[:, 1] == 0).all() and (signals.normalize_leads(filtered)[:, 1] == 0).all()


def test_amplitudes_are_doubted_by_the_median_lead():
    """One lead that is off, or flat ones, do not make a record doubtful; 50 mV and 0.02 mV are the limits."""
    ecg = beats_at(every(0.8))[None]
    for factor, words in ((1, ""), (100, "uV that are called mV"), (0.01, "called uV")):
        said = signals.doubt_height(signals.median_height(ecg * factor))
        assert words in said and bool(said) == bool(words)
    assert not signals.doubt_height(signals.median_height(ecg * ([0] * 6 + [1] * 5 + [1000])))
    assert not signals.doubt_height(signals.median_height(0 * ecg))
