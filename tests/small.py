"""Small things for quick tests: a network of few channels, and a data folder of few records."""
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import utils
from ecg import arrays
from ecg.signals import LEAD_NAMES, normalize_leads

WIDTHS = (2, 2, 4, 4, 8)            # in place of model.WIDTHS: the same layers, a thousandth of the arithmetic
TIME = np.arange(5000) / 500


def shrink(patch):
    """Let every network made from now on have few channels, in one thread: more would wait for each other.

    patch: a MonkeyPatch.
    """
    patch.setattr(model, "WIDTHS", WIDTHS)
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="module")
def few_channels():
    """For the tests of a file that imports it."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


def every(seconds, first=0.3, end=9.8):
    """The times of a regular rhythm with the little variability that HeartPy wants."""
    times = np.arange(first, end, seconds)
    return times + 0.01 * np.sin(np.arange(len(times)))


def beats_at(times, rate=500, width=0.02, seconds=10):
    """(samples, 12) mV with an R wave at each time in seconds, of another height in every lead."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.exp(-0.5 * ((time - np.asarray(times)[:, None]) / width) ** 2).sum(axis=0)
    return wave[:, None] * np.linspace(0.6, 1.4, 12)


def write_wfdb(path, signal, rate=500, leads=LEAD_NAMES, unit="mV", gain=1000.0, **options):
    """Write a WFDB record of values in this unit; returns its path, without extension."""
    import wfdb
    path, number = Path(path), signal.shape[1]
    wfdb.wrsamp(path.name, fs=rate, units=[unit] * number, sig_name=list(leads), p_signal=signal, fmt=["16"] * number,
                adc_gain=[gain] * number, **({"baseline": [0] * number} | options), write_dir=str(path.parent))
    return path


def read_all(folder):
    """The content of all files in a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def make_records(seed, rows):
    """(rows, 5000, 12) float32 mV with beats, every second record's after its R peak turned round, and R peaks."""
    rng = np.random.default_rng(seed)
    r_peaks = [np.rint(np.arange(0.5, 9.8, 0.7 + 0.02 * row) * 500).astype(np.int32) for row in range(rows)]
    records = []
    for row, peaks in enumerate(r_peaks):
        after = TIME - peaks[:, None] / 500
        wave = np.exp(-0.5 * (after / 0.02) ** 2) + (-1) ** row * 0.3 * np.exp(-0.5 * ((after - 0.25) / 0.04) ** 2)
        records.append(wave.sum(axis=0)[:, None] * rng.uniform(0.5, 1.5, 12) + rng.normal(0, 0.01, (5000, 12)))
    return np.stack(records).astype(np.float32), r_peaks


def describe(data):
    """Let the manifest and the R peaks be those of the arrays that are in the folder."""
    manifest = {"arrays": {}, "source": {"data_set": "PTB-XL"}}
    for path in data.glob("*.npy"):
        split = next((split for split, name in arrays.SIGNAL_FILES.items() if name == path.name), None)
        if split:
            records = arrays.load_npy(path)
            identity = manifest["arrays"].setdefault(split, {})["fingerprint"] = arrays.fingerprint(records)
            for detector in arrays.R_PEAKS_FILES:
                utils.write_atomically(arrays.r_peaks_path(data, split, detector), lambda file: arrays.pack_r_peaks(
                    file, make_records(0, len(records))[1], detector, identity))
    utils.save_json(data / arrays.MANIFEST, manifest)


def make_data(data, rows=8):
    """Write the arrays of a data folder as preprocess.py does: train (folds 1 to 9), val, test, benchmark."""
    data.mkdir(parents=True)
    for seed, split in enumerate(("train", "val", "test", "benchmark")):
        records, _ = make_records(seed, rows)
        if split in arrays.NORMALISED_SPLITS:
            low, high = records.min(axis=1), records.max(axis=1)
            records = np.stack([normalize_leads(record) for record in records]).astype(np.float32)
            with open(arrays.details_path(data, split), "wb") as file:
                arrays.pack_details(file, low, high, [], arrays.fingerprint(records))
        np.save(arrays.signal_path(data, split), records)
        if split != "train":
            marked = (TIME % 1 < 0.1)[:, None] * np.ones((rows, 1, 12), np.uint8)
            np.save(arrays.label_path(data, split), marked if split == "benchmark" else np.arange(rows) % 2)
    folds = "".join(f"{100 + row},{9 if row == rows - 1 else 1 + row % 8}\n" for row in range(rows))
    (data / "train_records.csv").write_text("ecg_id,fold\n" + folds)
    describe(data)
    return data


def make_model(**options):
    """The smallest network with weights that follow from a seed, in eval mode. Call it after shrink."""
    torch.manual_seed(0)
    return model.MCF(hidden=2, **options).eval()
