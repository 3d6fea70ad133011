"""Golden values, a few a protocol, from arrays through the network to results.json: what no change may move unseen."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import published_shapes, run_script
from small import shrink

from dataloader import valid_beats
from ecg import arrays
from ecg.signals import filter_leads

# {score: (detection AUROC, scores of the first normal and the first abnormal record, pooled and per-record AUROC)}, of
# seeded weights that know nothing.
GOLDEN = {"paper": (2 / 3, 0.5190520, 0.5195066, 0.7637266, 0.7631510),
          "clean": (1 / 2, 1.0164779, 0.9840443, 0.7682637, 0.7677146),
          "combined": (1, -0.432211, 4.032890), "no network": (1, 0.637064, 8.742230)}


@pytest.fixture(scope="module")
def few(simulated, tmp_path_factory):
    """A few of the simulated records, two beats of each."""
    folder = tmp_path_factory.mktemp("few")
    shutil.copytree(simulated, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("val*", "test*", "bench*"))
    for split, normal, abnormal in (("test", 3, 4), ("val", 3, 3), ("benchmark", 2, 0)):
        records = arrays.open_records(simulated, split, 12)
        labels = np.load(arrays.label_path(simulated, split))
        kinds = np.zeros(len(records)) if split == "benchmark" else labels
        rows = np.concatenate([np.flatnonzero(kinds == 0)[:normal], np.flatnonzero(kinds == 1)[:abnormal]])
        np.save(arrays.signal_path(folder, split), records.signals[rows])
        np.save(arrays.label_path(folder, split), labels[rows])
        identity = arrays.fingerprint(records.signals[rows])
        for detector in ("heartpy", "slope"):
            peaks = arrays.load_r_peaks(simulated, split, records, detector)
            with open(arrays.r_peaks_path(folder, split, detector), "wb") as file:
                arrays.pack_r_peaks(file, [valid_beats(peaks[row])[0][:2] for row in rows], detector, identity)
    return folder


def test_golden_values(few, published_state, tmp_path):
    """Detection and localization under every protocol are what they were; so a flipped sign or a shifted beat shows."""
    torch.save({"model_state_dict": published_state}, tmp_path / "model.pt")
    finished = run_script("test.py", "--data_path", few, "--load_path", tmp_path / "model.pt", "--figures", 0,
                          "--output_dir", tmp_path / "results")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    scores = pd.read_csv(tmp_path / "results" / "detection_scores.csv").query("split == 'test'")
    found = {name: [entry["detection_auroc"], *scores[name][[0, 3]], entry["localization_auroc_pooled"],
                    entry["localization_auroc_per_record"]] for name, entry in results.items() if name in GOLDEN}
    found["no network"] = [results["baselines"]["detection"]["no network"]["auroc"]["value"],
                           *scores["trivial: no network"][[0, 3]]]
    assert set(found) == set(GOLDEN) and found["combined"][3:] == [None, None]
    for name, values in GOLDEN.items():
        assert found[name][:len(values)] == pytest.approx(list(values), rel=5e-4), name


@pytest.fixture
def authors_workplace(simulated, published_state, tmp_path):
    """A folder in the authors' layout: a few float64 rows of arrays, no sidecars, no benchmark."""
    (tmp_path / "data").mkdir()
    (tmp_path / "ckpt").mkdir()
    torch.save({"model_state_dict": published_state}, tmp_path / "ckpt" / "mymodel.pt")
    both = np.argsort(np.load(simulated / "label.npy"))[[0, 1, -2, -1]]         # two normals, two abnormals
    for name, rows in (("train", slice(12)), ("test", both), ("label", both)):
        np.save(tmp_path / "data" / f"{name}.npy", np.load(simulated / f"{name}.npy")[rows].astype(np.float64))
    return tmp_path


def test_the_authors_line_on_the_authors_layout(authors_workplace):
    """The published command line, word for word, on float64 arrays without sidecars; what is not there is said."""
    finished = run_script("test.py", "--data_path", "./data/", "--load_model", "1", "--load_path", "./ckpt/mymodel.pt",
                          cwd=authors_workplace)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((authors_workplace / "results" / "results.json").read_text())
    assert {"paper", "clean", "combined"} & set(results) == {"paper", "clean"} and results["data"] is None
    assert results["paper"]["localization_auroc_pooled"] is None and results["paper"]["seconds"]["detection"] > 0
    for word in ("localization is skipped", "'no network' is skipped", "operating points and combined are skipped"):
        assert word in finished.stdout
    assert results["paper"]["detection"]["within_age_bands"] == {"macro": None, "bands": {}}
    assert results["paper"]["counts"]["patients"] == 4 and len(results["checkpoint"]["sha256"]) == 64


def test_untrained_network_is_said_to_be_one(authors_workplace, monkeypatch):
    """--load_model 0 scores an untrained network, as published, and says so."""
    shrink(monkeypatch)
    finished = run_script("test.py", "--load_model", 0, "--protocol", "paper", "--figures", 0, cwd=authors_workplace)
    assert finished.returncode == 0 and "untrained" in finished.stdout
    results = json.loads((authors_workplace / "results" / "results.json").read_text())
    assert {"paper", "clean", "combined"} & set(results) == {"paper"}


def test_published_names_and_shapes(reference):
    """The checkpoint that the tests make up has exactly the published names and shapes."""
    assert published_shapes() == json.loads((reference / "state_shapes.json").read_text())


def test_the_authors_command_line_gives_their_numbers(reference, reference_records, published_state, tmp_path):
    """On float64 arrays without sidecars and a published checkpoint: the scores and maps that were measured."""
    filtered = {ecg_id: filter_leads(record) for ecg_id, record in reference_records.items()}
    expected_maps = np.load(reference / "localization_maps.npz")
    benchmark = np.stack([filtered[ecg_id] for ecg_id in expected_maps["ecg_id"]])          # mV: test.py normalises
    for name, array in (("test", np.stack(list(filtered.values()))), ("label", np.arange(len(filtered)) % 2),
                        ("benchmark_data", benchmark), ("benchmark_label", (benchmark > 0.5).astype(np.float64))):
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / f"{name}.npy", array)
    (tmp_path / "ckpt").mkdir()
    torch.save({"model_state_dict": published_state}, tmp_path / "ckpt" / "mymodel.pt")
    finished = run_script("test.py", "--data_path", "./data/", "--load_model", "1", "--load_path", "./ckpt/mymodel.pt",
                          "--protocol", "paper", "--save_maps", 1, "--figures", 0, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    scores = pd.read_csv(tmp_path / "results" / "detection_scores.csv")["paper"]
    expected = json.loads((reference / "detection_scores.json").read_text())
    np.testing.assert_allclose(scores, [expected[str(ecg_id)] for ecg_id in filtered], rtol=1e-4)
    maps = np.load(tmp_path / "results" / "localization_maps_paper.npy")[:, ::20]
    assert np.abs(maps - expected_maps["score"]).max() <= 1e-4 * np.abs(expected_maps["score"]).max()
