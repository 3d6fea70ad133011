"""Scores: their AUROCs, their maps, and that how the work is batched does not show in them."""
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from scoring import passes
from ecg.arrays import load_r_peaks, open_signals
from passes.fused import FusedMCF
from model import MCF, compute_trend
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def some_records(simulated):
    """Five simulated test records with their R peaks, the last without any."""
    signals = open_signals(simulated, "test", 12)
    return np.array(signals[:5]), load_r_peaks(simulated, "test", signals)[:4] + [np.zeros(0, np.int32)]


def test_fused_network_is_the_plain_one(model):
    """The form in which scoring runs the network restores what the plain network restores."""
    generator = torch.Generator().manual_seed(0)
    ecg, beat = torch.rand(3, 4800, 12, generator=generator), torch.rand(3, 480, 12, generator=generator)
    trend = compute_trend(ecg)
    with torch.inference_mode():
        fused = FusedMCF(model)
        found = fused.restore(fused.encode_global(ecg), fused.encode_local(beat),
                              fused.begin_trend(fused.encode_trend(trend)))
        expected = model(ecg, beat, trend)
    for one, other in zip((*found[0], *found[1], found[2]), (*expected[0], *expected[1], expected[2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", passes.PLAIN_PROTOCOLS)
def test_batching_does_not_show(model, some_records, protocol, monkeypatch):
    """Scores and maps are the same for any number of records and beats at once."""
    signals, r_peaks = some_records
    whole = passes.score_split(model, signals, r_peaks, protocol, 30, CPU, "test", with_maps=True)
    monkeypatch.setattr(scoring, "RECORDS_AT_ONCE", {"cpu": 2})
    monkeypatch.setattr(scoring, "BEATS_AT_ONCE", {"cpu": 3})
    parts = passes.score_split(model, signals, r_peaks, protocol, 30, CPU, "test", with_maps=True)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-5)
    np.testing.assert_allclose(parts.maps, whole.maps, rtol=1e-4, atol=1e-6)


def test_bfloat16_scores_are_close(model, some_records):
    """bfloat16 convolutions change a record's score by less than 2 %."""
    signals, r_peaks = some_records
    for protocol in passes.PLAIN_PROTOCOLS:
        exact, rough = (passes.score_split(model, signals, r_peaks, protocol, 30, CPU, "test", amp=amp).scores
                        for amp in ("off", "bf16"))
        assert 0 < np.abs(rough / exact - 1).max() < 0.02


def test_smoothing_is_scipys():
    """Maps are smoothed as by scipy's gaussian_filter1d, up to their very ends."""
    maps = np.random.default_rng(0).random((2, 700, 3)).astype(np.float32)
    found = passes.smooth_maps(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(found, gaussian_filter1d(maps, passes.SMOOTHING, axis=1), rtol=1e-5)


def test_clean_does_not_see_the_unit(model, some_records):
    """Under the clean protocol a record scores the same in another unit and with an offset; under paper not."""
    signals, r_peaks = (part[:1] for part in some_records)
    for protocol, same in (("clean", True), ("paper", False)):
        first, second = (passes.score_split(model, record, r_peaks, protocol, 30, CPU, "test").scores[0]
                         for record in (signals, signals * 3 + 1))
        assert (abs(first / second - 1) < 1e-4) == same, protocol


def test_hard_records_get_finite_scores(model):
    """A record of zeros, one with a flat lead and one of pure noise are scored and counted, none becomes NaN."""
    rng = np.random.default_rng(0)
    records = rng.normal(0, 0.1, (3, 5000, 12)).astype(np.float32)
    records[0] = 0
    records[1, :, 5] = 0
    for protocol in passes.PLAIN_PROTOCOLS:
        found = passes.score_split(model, records, [np.zeros(0, int), np.array([150, 900]), np.array([100, 4700])],
                                    protocol, 30, CPU, "test", with_maps=True)
        assert np.isfinite(found.scores).all() and np.isfinite(found.maps).all()
        assert (found.without_r_peak, found.without_valid_beat) == (1, 2)


def test_mode_of_the_model_is_kept(model, some_records):
    """Scoring runs in eval mode and leaves a training network in training mode."""
    signals, r_peaks = (part[:1] for part in some_records)
    evaluated = passes.score_split(model, signals, r_peaks, "clean", 30, CPU, "test").scores
    model.train()
    try:
        trained = passes.score_split(model, signals, r_peaks, "clean", 30, CPU, "test").scores
        assert model.training and trained == evaluated
    finally:
        model.eval()


def test_thin_out():
    """Fewer beats are spread over the record; None keeps all."""
    positions = np.arange(10) * 400 + 300
    assert passes.thin_out(positions, None) is positions and passes.thin_out(positions[:2], 3).tolist() == [300, 700]
    for number in range(1, 25):
        positions = np.arange(number) * 150 + 300
        for count in range(1, number + 1):
            chosen = passes.thin_out(positions, count)
            assert len(set(chosen.tolist())) == count and set(chosen) <= set(positions)
    assert passes.thin_out(np.arange(9), 1).tolist() == [4]


def test_unsound_weights_are_named(simulated):
    """Weights that are not finite end in a sentence, not in NaN scores."""
    network = MCF()
    torch.nn.init.constant_(network.norm.bias, float("nan"))
    signals = open_signals(simulated, "test", 12)[:1]
    with pytest.raises(UserError, match="row 0 of test.npy"):
        passes.score_split(network, signals, [np.array([2000])], "clean", 30, CPU, "test")


def test_auroc_polarity():
    """A higher score means more anomalous: perfect scores give 1, reversed ones 0."""
    labels = np.array([0, 0, 1, 1])
    assert passes.detection_auroc(labels, np.array([0.1, 0.2, 0.3, 0.4])) == 1
    assert passes.detection_auroc(labels, np.array([0.4, 0.3, 0.2, 0.1])) == 0
