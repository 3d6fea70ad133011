"""The method is the published one: against measured values where they are there, else against the plain reference."""
import json
import zlib

import numpy as np
import pandas as pd
import plain
import pytest
import torch
from conftest import published_shapes, run_script, seeded_weights

from tools import synthetic
from model import compute_trend
from scoring.passes import score_split
from ecg.signals import filter_leads, find_r_peaks, normalize_leads

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
        assert find_r_peaks(filter_leads(reference_records[int(ecg_id)])[:, 1]).tolist() == expected, ecg_id


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_scores_and_maps_of_plain_loop(model, published_state, simulated_records, protocol):
    """The batched scores and maps equal one beat and one mask at a time, also where a record has no beat."""
    r_peaks = [find_r_peaks(record[:, 1]) for record in simulated_records[:2]] + [np.zeros(0, int)]
    records = np.stack(simulated_records).astype(np.float32)
    found = score_split(model, records, r_peaks, protocol, 30, torch.device("cpu"), "test", with_maps=True)
    with torch.inference_mode():
        for row, record in enumerate(records):
            score, heat = plain.score_record(published_state, record, r_peaks[row], protocol)
            assert abs(found.scores[row] / score - 1) <= TOLERANCE
            assert close(found.maps[row], heat)
    assert (found.without_r_peak, found.without_valid_beat) == (1, 1)


def report_of(folder, filtered, benchmark):
    """The authors' command line on their layout: float64 arrays, no sidecars, a checkpoint in published names.

    filtered: the test records in mV, benchmark: normalised; returns the scores' table and the maps (records, 4800, 12).
    """
    data, checkpoint = folder / "data", folder / "ckpt" / "mymodel.pt"
    data.mkdir(), checkpoint.parent.mkdir()
    torch.save({"model_state_dict": seeded_weights(published_shapes())}, checkpoint)
    np.save(data / "test.npy", np.stack(filtered))
    np.save(data / "label.npy", np.arange(len(filtered)) % 2)
    np.save(data / "benchmark_data.npy", np.stack(benchmark))
    np.save(data / "benchmark_label.npy", (np.stack(benchmark) > 0.5).astype(np.float64))
    finished = run_script("test.py", "--data_path", "./data/", "--load_model", "1", "--load_path", "./ckpt/mymodel.pt",
                          "--save_maps", "1", "--protocol", "paper", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    scores = pd.read_csv(folder / "results" / "detection_scores.csv")
    assert scores["ecg_id"].isna().all()
    return scores["paper"], np.load(folder / "results" / "localization_maps_paper.npy")


def test_authors_command_line_gives_their_numbers(reference, reference_records, tmp_path):
    """On the authors' layout and a published checkpoint, test.py gives the scores and maps that were measured."""
    filtered = {ecg_id: filter_leads(record) for ecg_id, record in reference_records.items()}
    expected_maps = np.load(reference / "localization_maps.npz")
    benchmark = [normalize_leads(filtered[ecg_id]) for ecg_id in expected_maps["ecg_id"]]
    scores, maps = report_of(tmp_path, list(filtered.values()), benchmark)
    expected = json.loads((reference / "detection_scores.json").read_text())
    np.testing.assert_allclose(scores, [expected[str(ecg_id)] for ecg_id in filtered], rtol=TOLERANCE)
    assert close(maps[:, ::20], expected_maps["score"])


def test_authors_command_line_gives_the_plain_numbers(simulated_records, published_state, tmp_path):
    """The same against the plain reference, on simulated records, one of them without any beat."""
    benchmark = [normalize_leads(simulated_records[1])]
    scores, maps = report_of(tmp_path, simulated_records, benchmark)
    with torch.inference_mode():
        expected = [plain.score_record(published_state, record, find_r_peaks(record[:, 1]), "paper")[0]
                    for record in simulated_records]
        expected_map = plain.score_record(published_state, benchmark[0], find_r_peaks(benchmark[0][:, 1]), "paper")[1]
    np.testing.assert_allclose(scores, expected, rtol=TOLERANCE)
    assert close(maps[0], expected_map)
