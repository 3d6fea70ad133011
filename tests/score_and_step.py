"""Scores a few records and takes the gradient of a batch, in as many processes as torchrun starts: DATA CHECKPOINT OUT.

The network stays in eval mode, so that neither dropout nor BatchNorm makes a difference.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parallel  # noqa: E402
from scoring import passes  # noqa: E402
from ecg.arrays import load_r_peaks, open_signals  # noqa: E402
from dataloader import TrainingBatches  # noqa: E402
from model import load_checkpoint  # noqa: E402
from train import TrainingStep  # noqa: E402

data, checkpoint, out = sys.argv[1:]
torch.set_num_threads(1)
device = torch.device("cpu")
parallel.start(device)
model, _ = load_checkpoint(checkpoint)
model.eval()
passes.RECORDS_AT_ONCE = {"cpu": 2}
signals = open_signals(data, "benchmark", 12)[:7]
r_peaks = load_r_peaks(data, "benchmark", open_signals(data, "benchmark", 12))[:7]
found = passes.score_split(model, signals, r_peaks, "clean", 30, device, "benchmark", with_maps=True,
                            beats_per_record=2)
train = open_signals(data, "train", 12)
arguments = SimpleNamespace(data_path=data, batch_size=15, mask_ratio=30, seed=0, workers=0, amp="off")
batches = TrainingBatches(train, np.arange(len(train)), load_r_peaks(data, "train", train), arguments, device)
step = TrainingStep(model, torch.optim.SGD(model.parameters(), 0.0), device, "off")
batch, share, _ = next(batches.draw_epoch(1))
step(batch, share)
if parallel.RANK == 0:
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    np.savez(out, scores=found.scores, maps=found.maps, gradient=gradient.numpy())
parallel.stop()
