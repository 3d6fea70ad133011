"""Filter, R peaks, trend and forward pass are the published ones: as measured, where that is there, and as written out.

tests/test_golden.py holds scores and maps to the measured ones.
"""
import json
import zlib

import numpy as np
import plain
import torch

from ecg.r_peaks import find_r_peaks_by_heartpy
from ecg.signals import filter_leads, normalize_leads
from model import compute_trend

TOLERANCE = 1e-4        # relative, float32


def close(found, expected):
    """Whether the largest deviation is within 1e-4 of the largest expected value."""
    return np.abs(np.asarray(found) - expected).max() <= TOLERANCE * np.abs(expected).max()


def forward_input():
    rng = np.random.RandomState(zlib.crc32(b"input"))
    return [torch.from_numpy(rng.uniform(-1, 1, (2, samples, 12)).astype(np.float32)) for samples in (4800, 480)]


def test_trend_and_forward_pass_as_measured(reference, model):
    """Published weights restore a fixed input to the measured values."""
    ecg, beat = forward_input()
    expected = np.load(reference / "forward.npz")
    with torch.inference_mode():
        trend = compute_trend(ecg)
        (restored_global, logvar_global), (restored_local, logvar_local), restored_trend = model(ecg, beat, trend)
    for name, value in (("trend", trend), ("restored_global", restored_global), ("logvar_global", logvar_global),
                        ("restored_trend", restored_trend)):
        assert close(value[:, ::48], expected[name]), name
    assert close(restored_local[:, ::4], expected["restored_local"])
    assert close(logvar_local[:, ::4], expected["logvar_local"])


def test_trend_and_forward_pass_of_plain_reference(model, published_state):
    """The network computes what its description says, written out without torch.nn."""
    ecg, beat = forward_input()
    with torch.inference_mode():
        trend = compute_trend(ecg)
        found = model(ecg, beat, trend)
        for row in range(2):
            assert close(trend[row], plain.trend_of(ecg[row].numpy()))
            expected = plain.forward(published_state, ecg[row], beat[row], trend[row])
            for pair, (restored, logvar) in zip(found, expected[:2]):
                assert close(pair[0][row], restored.numpy()) and close(pair[1][row], logvar.numpy())
            assert close(found[2][row], expected[2].numpy())


def test_filter_and_normalization_as_measured(reference, reference_records):
    """Filtered and normalised records equal the published preprocessing's."""
    expected = np.load(reference / "filtered.npz")
    for row, ecg_id in enumerate(expected["ecg_id"]):
        filtered = filter_leads(reference_records[ecg_id])
        assert close(filtered[::10], expected["raw_filtered"][row])
        assert close(normalize_leads(filtered)[::10], expected["normalized"][row])


def test_r_peaks_as_measured(reference, reference_records):
    """R peaks are HeartPy's, sample for sample."""
    for ecg_id, expected in json.loads((reference / "r_peaks.json").read_text()).items():
        assert find_r_peaks_by_heartpy(filter_leads(reference_records[int(ecg_id)])[:, 1]).tolist() == expected, ecg_id
