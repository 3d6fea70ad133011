"""Several processes do what one does; and batches and step read nothing from their device."""
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import dataloader
from ecg.arrays import load_r_peaks, open_signals
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


def test_sharded_scores_and_gradients_are_the_same(simulated, checkpoint, tmp_path):
    """Two processes give every record and map the score, and every weight the gradient, that one process gives.

    Blocks of two records, so that both have several; batches of 15, so that their shares differ.
    """
    flags = ("tests/score_and_step.py", simulated, checkpoint)
    for finished in (run_script(*flags, tmp_path / "one.npz"), run_twice(*flags, tmp_path / "two.npz")):
        assert finished.returncode == 0, finished.stderr
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert len(one["scores"]) > 6 and np.unique(one["scores"]).size == len(one["scores"])
    np.testing.assert_array_equal(two["scores"], one["scores"])
    np.testing.assert_array_equal(two["maps"], one["maps"])
    np.testing.assert_allclose(two["gradient"], one["gradient"], rtol=1e-3, atol=1e-5 * np.abs(one["gradient"]).max())


def test_scripts_in_two_processes(simulated, tmp_path):
    """train.py keeps one history, close to that of one process; test.py scores its checkpoint and reports once.

    They differ by what each process draws for dropout, and by BatchNorm, which sees half of the batch.
    """
    flags = ("--data_path", simulated, "--epochs", 2, "--batch_size", 15, "--lr", "1e-3", "--val_beats", 0, "--device",
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
    finished = run_twice("test.py", "--data_path", simulated, "--load_path", tmp_path / "two" / "model.pt",
                         "--protocol", "clean", "--device", "cpu", "--output_dir", tmp_path)
    assert finished.returncode == 0 and finished.stdout.count("written to") == 1, finished.stderr
    assert json.loads((tmp_path / "results.json").read_text())["processes"] == 2


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
