"""The method is the published one: against measured values where they are there, else against the plain reference."""
import json
import zlib

import numpy as np
import plain
import pytest
import torch
from conftest import published_shapes

from ecg.arrays import Records
from ecg.r_peaks import find_r_peaks_by_heartpy
from ecg.signals import filter_leads, normalize_leads
from model import compute_trend
from scoring.passes import Scorer
from scoring.protocols import PAPER, PROTOCOLS
from tools import synthetic

TOLERANCE = 1e-4        # relative, float32


def close(found, expected):
    """Whether the largest deviation is within 1e-4 of the largest expected value."""
    return np.abs(np.asarray(found) - expected).max() <= TOLERANCE * np.abs(expected).max()


def forward_input():
    rng = np.random.RandomState(zlib.crc32(b"input"))
    return [torch.from_numpy(rng.uniform(-1, 1, (2, samples, 12)).astype(np.float32)) for samples in (4800, 480)]


@pytest.fixture(scope="module")
def simulated_records():
    """Three filtered records: a normal, one with a bundle branch block, and one without any beat."""
    chosen = [synthetic.simulate_record(0, ecg_id).signal for ecg_id in (1, 3)]
    noise = np.random.default_rng(0).normal(0, 0.1, chosen[0].shape)
    return [filter_leads(record) for record in (*chosen, noise)]


def test_published_names_and_shapes(reference):
    """The checkpoint that the tests make up has exactly the published names and shapes."""
    assert published_shapes() == json.loads((reference / "state_shapes.json").read_text())


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


def test_filter_and_normalization_of_plain_reference():
    """The same, lead by lead."""
    record = synthetic.simulate_record(0, 1).signal
    assert close(filter_leads(record), plain.filter_record(record))
    assert close(normalize_leads(record), plain.normalize(record))


def test_r_peaks_as_measured(reference, reference_records):
    """R peaks are HeartPy's, sample for sample."""
    for ecg_id, expected in json.loads((reference / "r_peaks.json").read_text()).items():
        assert find_r_peaks_by_heartpy(filter_leads(reference_records[int(ecg_id)])[:, 1]).tolist() == expected, ecg_id


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_and_maps_of_plain_loop(model, published_state, simulated_records, protocol):
    """The batched scores and maps equal one beat and one mask at a time, also where a record has no beat."""
    r_peaks = [find_r_peaks_by_heartpy(simulated_records[1][:, 1])[2:4], np.zeros(0, int)]
    records = Records(np.stack(simulated_records[1:]).astype(np.float32), "test.npy")
    scorer = Scorer(model, PROTOCOLS[protocol], median=False)
    scored, localized = scorer.score(records, r_peaks), scorer.score(records, r_peaks, with_maps=True)
    with torch.inference_mode():
        for row, record in enumerate(records.signals):
            score, heat = plain.score_record(published_state, record, r_peaks[row], protocol)
            if protocol == "paper" and row == 0:            # maps are of the normalised record
                _, heat = plain.score_record(published_state, plain.normalize(record), r_peaks[row], protocol)
            assert abs(scored.scores[row] / score - 1) <= TOLERANCE
            assert protocol == "paper" and row == 1 or close(localized.maps[row], heat)
    assert (scored.without_r_peak, scored.without_valid_beat) == (1, 1)


def test_scores_and_maps_as_measured(reference, reference_records, model):
    """Of filtered records in mV the published detection scores, and from the same records in mV the published maps."""
    expected, maps = json.loads((reference / "detection_scores.json").read_text()), np.load(
        reference / "localization_maps.npz")
    filtered = np.stack([filter_leads(record) for record in reference_records.values()]).astype(np.float32)
    r_peaks = [find_r_peaks_by_heartpy(record[:, 1]) for record in filtered]
    scorer, records = Scorer(model, PAPER), Records(filtered, "test.npy")
    np.testing.assert_allclose(scorer.score(records, r_peaks).scores, [expected[str(ecg_id)] for ecg_id in
                                                                       reference_records], rtol=TOLERANCE)
    rows = [list(reference_records).index(ecg_id) for ecg_id in maps["ecg_id"]]
    assert close(scorer.score(records, r_peaks, rows, with_maps=True).maps[:, ::20], maps["score"])
