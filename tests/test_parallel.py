"""Several processes do what one does; and no step of training waits for its device."""
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import dataloader
from arrays import load_r_peaks, open_signals
from dataloader import TrainingBatches
from model import MCF, load_checkpoint, save_checkpoint
from train import TrainingStep

TORCHRUN = ("--standalone", "--nproc_per_node", 2)


def run_twice(script, *arguments):
    """Run a script in two processes under torchrun, on the CPU with gloo."""
    import os
    import subprocess
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *map(str, TORCHRUN), str(ROOT / script),
                           *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A checkpoint of a network with random weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_checkpoint(path, model)
    return path


def test_sharded_scores_are_the_same(simulated, checkpoint, tmp_path, monkeypatch):
    """test.py in two processes gives every record and map the score that one process gives."""
    flags = ("--data_path", simulated, "--load_path", checkpoint, "--protocol", "clean", "--save_maps", 1, "--device",
             "cpu", "--output_dir")
    for finished in (run_script("test.py", *flags, tmp_path / "one", OMP_NUM_THREADS="1"),
                     run_twice("test.py", *flags, tmp_path / "two")):
        assert finished.returncode == 0, finished.stderr
    one, two = (list(csv.reader((tmp_path / name / "detection_scores.csv").open())) for name in ("one", "two"))
    assert one == two and len(one) > 5
    maps = [np.load(tmp_path / name / "localization_maps_clean.npy") for name in ("one", "two")]
    np.testing.assert_array_equal(*maps)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    assert finished.stdout.count("written to") == 1                                  # one process reports


def test_training_in_two_processes(simulated, tmp_path):
    """train.py in two processes keeps one history, and its weights are nearly those of one process.

    They differ by what each process draws for dropout and by BatchNorm, which sees half of the batch.
    """
    flags = ("--data_path", simulated, "--epochs", 2, "--batch_size", 15, "--lr", "1e-3", "--val_beats", 1, "--device",
             "cpu", "--save_path")
    for finished in (run_script("train.py", *flags, tmp_path / "one" / "model.pt"),
                     run_twice("train.py", *flags, tmp_path / "two" / "model.pt")):
        assert finished.returncode == 0, finished.stderr
    one, two = (list(csv.DictReader((tmp_path / name / "history.csv").open())) for name in ("one", "two"))
    assert [row["epoch"] for row in two] == ["1", "2"] and finished.stdout.count("2 processes") == 1
    for row, other in zip(one, two):
        assert abs(float(row["loss"]) - float(other["loss"])) < 0.1
    _, facts = load_checkpoint(tmp_path / "two" / "last.pt")
    assert facts["config"]["processes"] == 2


def test_no_step_waits_for_the_device(simulated, monkeypatch):
    """Batches, forward, backward and update read no value from the device: tensors that hold none take the same way."""
    signals = open_signals(simulated, "train", 12)
    arguments = SimpleNamespace(data_path=simulated, batch_size=16, mask_ratio=30, seed=0, workers=0, amp="off")
    monkeypatch.setattr(dataloader, "fits", lambda *_: True)
    device = torch.device("meta")
    batches = TrainingBatches(signals, np.arange(len(signals)), load_r_peaks(simulated, "train", signals), arguments,
                              device)
    model = MCF().to(device).train()
    step = TrainingStep(model, torch.optim.AdamW(model.parameters()), device, "off")
    seen = 0
    for batch, share, records in batches.draw_epoch(1):
        assert all(part.is_meta for part in (*batch, *step(batch, share)))
        seen += records
    assert seen == len(signals)
    with pytest.raises(RuntimeError):
        float(batch[0].mean())                                      # what the test would have caught
