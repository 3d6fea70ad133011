"""Several processes do what one does; and batches and step read nothing from their device."""
import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from small import make_data, make_model, shrink

import dataloader
from dataloader import Normalisation, TrainingBatches, TrainingSet
from ecg.arrays import load_r_peaks, open_records
from model import load_checkpoint
from train import TrainingStep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("arrays") / "data")


def test_two_processes_do_what_one_does(data, tmp_path, monkeypatch):
    """Every record and map gets the score, every weight the gradient, and train.py one history, close to one process's.

    Blocks of two records, so that both have several; batches of 7, so that their shares differ. The histories differ by
    what each process draws for dropout, and by BatchNorm, which sees half of the batch.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, launcher in (("one", ()), ("two", torchrun)):
        process = subprocess.run([sys.executable, *launcher, str(ROOT / "tests" / "score_and_step.py"), str(data),
                                  str(tmp_path / f"{name}.npz")], capture_output=True, text=True, timeout=600,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr
    assert process.stdout.count("2 processes") == 1
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        one, two = dict(one), dict(two)
    assert np.unique(one["scores"]).size == len(one["scores"]) == 7
    np.testing.assert_array_equal(two["scores"], one["scores"])
    np.testing.assert_array_equal(two["maps"], one["maps"])
    np.testing.assert_allclose(two["gradient"], one["gradient"], rtol=1e-3, atol=1e-5 * np.abs(one["gradient"]).max())
    one, two = (list(csv.DictReader((tmp_path / name / "history.csv").read_text().splitlines()))
                for name in ("one", "two"))
    assert [row["epoch"] for row in two] == ["1", "2"]
    for row, other in zip(one, two):
        assert abs(float(row["loss"]) - float(other["loss"])) < 0.2
    shrink(monkeypatch)
    _, facts = load_checkpoint(tmp_path / "two" / "model.pt")
    assert facts["config"]["processes"] == 2 and len(facts["fold9_normals"]["clean"]) == 4


def test_no_step_waits_for_the_device(data, monkeypatch):
    """Batches, forward, backward and update read no value from the device: tensors that hold none take the same way."""
    shrink(monkeypatch)
    monkeypatch.setattr(dataloader, "fits", lambda *_: True)
    records, device = open_records(data, "train", 12), torch.device("meta")
    training = TrainingSet(records, np.arange(len(records)), load_r_peaks(data, "train", records, "slope"))
    batches = TrainingBatches(training, Normalisation(device=device), batch_size=3)
    model = make_model().to(device).train()
    step, seen = TrainingStep(model, torch.optim.AdamW(model.parameters()), device), 0
    copies, copy = [], torch.Tensor.to

    def counted(tensor, *arguments, **named):
        result = copy(tensor, *arguments, **named)
        copies.extend([tuple(tensor.shape)] * (result.device != tensor.device))
        return result
    monkeypatch.setattr(torch.Tensor, "to", counted)
    for batch, share, records_of_batch in batches.draw_epoch(1):
        if not seen:
            copies.clear()                                          # those before the first step are of the epoch
        assert all(part.is_meta for part in (*batch, *step(batch, share)))
        seen += records_of_batch
    assert seen == len(records) and copies == []
    with pytest.raises(RuntimeError):
        float(batch[0].mean())                                      # what the test would have caught


def test_other_scripts_refuse_several_processes():
    """They would write the same files twice, or see half of a batch each."""
    process = subprocess.run([sys.executable, "-m", "diagnosis.train", "--save_path", "x.pt"], cwd=ROOT, text=True,
                             capture_output=True, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    assert process.returncode == 2 and "train.py runs in one process; start it without torchrun" in process.stderr
