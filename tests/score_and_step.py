"""Scores a few records, takes the gradient of a batch and trains, in as many processes as torchrun starts: DATA OUT.

The network of the first two stays in eval mode, so that neither dropout nor BatchNorm makes a difference.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import model  # noqa: E402
import small  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from dataloader import Normalisation, TrainingBatches, TrainingSet  # noqa: E402
from ecg.arrays import load_r_peaks, open_records  # noqa: E402
from scoring import passes  # noqa: E402
from scoring.protocols import CLEAN  # noqa: E402

model.WIDTHS = small.WIDTHS
data, out = sys.argv[1:]
torch.set_num_threads(1)
device = torch.device("cpu")
utils.start_processes(device)
network = small.make_model()
passes.RECORDS_AT_ONCE = {"cpu": 2}
benchmark, normals = open_records(data, "benchmark", 12), open_records(data, "train", 12)
found = passes.Scorer(network, CLEAN).score(benchmark, load_r_peaks(data, "benchmark", benchmark, "slope"),
                                            range(7), with_maps=True, beats_per_record=2)
training = TrainingSet(normals, np.arange(len(normals)), load_r_peaks(data, "train", normals, "slope"))
batches = TrainingBatches(training, Normalisation(), batch_size=7)
step = train.TrainingStep(network, torch.optim.SGD(network.parameters(), 0.0), device)
batch, share, _ = next(batches.draw_epoch(1))
step(batch, share)
if utils.RANK == 0:
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    np.savez(out, scores=found.scores, maps=found.maps, gradient=gradient.numpy())
utils.wait_for_all()
sys.argv = ["train.py", "--data_path", data, "--save_path", str(Path(out).with_suffix("") / "model.pt"), "--epochs",
            "2", "--batch_size", "7", "--hidden", "2", "--lr", "1e-2", "--protocol", "clean", "--device", "cpu"]
utils.run(train.main, alone=False)
