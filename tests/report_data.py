"""What the tests of test.py's report share: simulated arrays, a checkpoint, a stand-in for the network, a short run."""
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from small import TIME, read_all

import test as script
from ecg.arrays import fingerprint
from evaluation import figures, files, rival
from scoring import without_network
from scoring.passes import Scores
from utils import save_json

PROTOCOLS = ("paper", "clean", "combined")
RIVALS = ("largest amplitude", "mean |slope|", "heart rate", "RR irregularity", "age", "|age - mean|", "sex",
          "shape", "measurements", "rhythm", "no network")
SIZES = {"train": 170, "test": 60, "val": 40, "benchmark": 4}
KINDS = ("none", "t_wave", "p_loss")


def draw_ecgs(rng, labels):
    """(records, 5000, 12) mV: a beat every 0.7 to 1 s; where the label is 1 its T wave is small."""
    rate, size = rng.uniform(0.7, 1, (len(labels), 1)), rng.normal(1, 0.2, (len(labels), 1, 12))
    time = TIME % rate - 0.3
    t_wave = np.where(labels == 1, 0.1, 0.3)[:, None] * np.exp(-((time - 0.25) / 0.05) ** 2)
    ecgs = (np.exp(-(time / 0.015) ** 2) + t_wave)[..., None] * size
    return (ecgs + rng.normal(0, 0.02, ecgs.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of arrays with tables, every patient with two records, and a benchmark with phases and diagnoses."""
    folder, rng, known = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0), {}
    for split, number in SIZES.items():
        labels = np.arange(number) % 2 * (split != "train")
        ecgs, name = draw_ecgs(rng, labels), {"benchmark": "benchmark_data"}.get(split, split)
        low, high = ecgs.min(axis=1), ecgs.max(axis=1)
        if split in ("train", "benchmark"):
            ecgs = (2 * (ecgs - low[:, None]) / (high - low)[:, None] - 1).astype(np.float32)
            phases = np.where((TIME % 0.9 < 0.3)[:, None], 3, 5) * np.ones(ecgs.shape, np.uint8)
            extra = {"phases": phases.astype(np.uint8)} if split == "benchmark" else {}
            np.savez(folder / f"{split}_details.npz", low=low, high=high, fingerprint=fingerprint(ecgs), **extra)
        np.save(folder / f"{name}.npy", ecgs)
        known[split] = {"fingerprint": fingerprint(ecgs)}
        table = pd.DataFrame({"ecg_id": np.arange(number), "patient_id": np.arange(number) // 2, "fold": 1,
                              "age": rng.integers(30, 90, number), "sex": rng.choice(["F", "M"], number),
                              "superclasses": np.where(labels, "MI", "NORM"), "statements": "SR"})
        table.loc[3, ["age", "sex"]] = [np.nan, ""]
        if split == "benchmark":
            labels = np.repeat((phases == 5)[..., :1] * labels[:, None, None], 12, axis=2).astype(np.uint8)
            table = table[["ecg_id"]].assign(diagnoses=np.where(labels.any(axis=(1, 2)), "Scar formation: septal.", ""))
        table.to_csv(folder / f"{split}_records.csv", index=False)
        if split != "train":
            np.save(folder / {"test": "label.npy"}.get(split, f"{split}_label.npy"), labels)
    known["test_lesions"] = {**draw_lesions(folder), "made_of": known["test"]["fingerprint"]}
    save_json(folder / "manifest.json", {"arrays": known, "source": {"data_set": "simulated"}})
    return folder


def draw_lesions(folder):
    """Lesions in six normals of the test set, a row of each kind: marked and higher by 0.3 mV is QRS, in five leads."""
    rows = np.repeat(np.arange(0, 12, 2), len(KINDS))
    kinds, ecgs = np.tile(KINDS, 6), np.load(folder / "test.npy")[rows]
    phases = np.repeat(np.where(TIME % 0.9 < 0.3, 3, 5).astype(np.uint8)[None], len(rows), axis=0)
    truth = ((phases == 3)[:, :, None] & (kinds != "none")[:, None, None] & (np.arange(12) < 5)).astype(np.uint8)
    ecgs += np.float32(0.3) * truth
    for name, array in (("", ecgs), ("_truth", truth), ("_phases", phases)):
        np.save(folder / f"test_lesions{name}.npy", array)
    pd.DataFrame({"ecg_id": rows, "patient_id": rows // 2, "kind": kinds, "description": "higher"}).to_csv(
        folder / "test_lesions_records.csv", index=False)
    return {"fingerprint": fingerprint(ecgs)}


class StandIn:
    """Scores without the network, as Scorer does with it; under paper the scores are worse."""

    def __init__(self, model, protocol, mask_ratio=30, amp="off"):
        self.protocol = protocol

    def score(self, records, r_peaks, rows=None, with_maps=False):
        ecgs = records.read(np.arange(len(records)) if rows is None else rows)
        noise = np.random.default_rng(len(ecgs)).normal(size=len(ecgs)) * 0.02 * (1 + self.protocol.as_stored)
        maps = np.abs(ecgs[:, 100:4900]) if with_maps else None
        return Scores(1 / ecgs.std(axis=(1, 2)) + noise, maps)

    def map_few(self, records, r_peaks, rows):
        return self.score(records, r_peaks, rows, with_maps=True).maps

    def restore(self, records, r_peaks, rows):
        ecgs = records.millivolts(rows)[:, 100:4900]
        return ecgs, ecgs - 0.25


def use_stand_in(patch):
    """StandIn in place of Scorer, a rival that is fitted quickly, no maps of median beats, figures of a few bytes."""
    patch.setattr(script, "Scorer", StandIn)
    patch.setattr(rival, "WEIGHTS", files.Path("absent.pt"))
    patch.setattr(rival, "LEAST_FOR_MAPS", 10 ** 6)
    patch.setattr(without_network, "CROSS_FITS", 2)
    patch.setattr(figures, "pack", lambda figure: {"png": b"png", "pdf": b"pdf"})


@pytest.fixture
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(published_state, tmp_path_factory):
    """A checkpoint in the published format."""
    path = tmp_path_factory.mktemp("ckpt") / "mymodel.pt"
    torch.save({"model_state_dict": published_state}, path)
    return path


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def hashes(folder):
    """The SHA-256 of every file but results.json."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in read_all(folder).items()
            if name != "results.json"}


def report_into(folder, arrays, checkpoint, *flags):
    return run_script("test.py", "--data_path", arrays, "--load_path", checkpoint, "--protocol", "clean", "--fold9", 0,
                      "--output_dir", folder, *flags)
