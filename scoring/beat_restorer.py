"""A small network that restores a median beat of which some waves were changed, and tells which: for maps.

The cross-restoration network hides a part and restores it, so whoever asks it must know which part to hide. This one
sees the whole median beat, of which any part in any leads may be wrong (tools/train_restorer.py makes it so, from
normals alone), and gives the beat as it should be and, for each lead and place, the log-odds that it was changed.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ecg.leads import INDEPENDENT, TO_TWELVE
from scoring.beat_frame import TIMES
from utils import UserError

WEIGHTS = Path(__file__).resolve().parent.parent / "ckpt" / "restorer.pt"
WIDTH = 512
FARTHEST = 8.0                              # deviations: beyond them no input goes
EXPONENT, LEAST = 0.3, 1e-4                 # of the companded input, in which small waves count
BEATS_AT_ONCE = 256
HELD_BACK = 8                               # one normal in so many is not trained on, and tells what is usual


class BeatRestorer(nn.Module):
    """Perceptron from a beat of the eight independent leads (B, 103, 8), mV, and its RR interval (B,), s.

    centre, deviation: of the normals' beats, mV (103, 8); scale: mV of each lead that companding makes 1 (8,).
    """

    def __init__(self, centre, deviation, scale):
        super().__init__()
        for name, value in (("centre", centre), ("deviation", deviation), ("scale", scale)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))
        points = len(TIMES) * len(INDEPENDENT)
        self.first = nn.Linear(2 * points + 1, WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.to_beat = nn.Linear(WIDTH, points)
        self.to_changed = nn.Linear(WIDTH, len(TIMES) * len(TO_TWELVE))
        self.dropout = nn.Dropout(0.1)

    def standardise(self, beats):
        """mV -> deviations from the normals' mean, (B, 103, 8)."""
        return (beats - self.centre) / self.deviation

    def forward(self, beats, rr):
        """Returns the restored beats in deviations (B, 103, 8), and the log-odds that a point changed (B, 103, 12)."""
        companded = beats.sign() * (beats.abs() / self.scale).clamp(LEAST, 1) ** EXPONENT
        inputs = [self.standardise(beats).clamp(-FARTHEST, FARTHEST).flatten(1), companded.flatten(1),
                  4 * rr.log()[:, None]]
        x = F.gelu(self.first(torch.cat(inputs, dim=1)))
        for layer in self.middle:
            x = x + F.gelu(layer(self.dropout(x)))
        x = self.dropout(x)
        return (self.to_beat(x).view(-1, len(TIMES), len(INDEPENDENT)),
                self.to_changed(x).view(-1, len(TIMES), len(TO_TWELVE)))

    @torch.inference_mode()
    def restore(self, beats: np.ndarray, rr: np.ndarray) -> tuple:
        """Median beats at TIMES (n, 103, 12), mV, and RR intervals (n,), s -> (restored, mV, log-odds), such each."""
        self.eval()
        restored, changed = [], []
        for start in range(0, len(beats), BEATS_AT_ONCE):
            some = slice(start, start + BEATS_AT_ONCE)
            of_some = self(torch.from_numpy(beats[some][..., INDEPENDENT]).float(), torch.from_numpy(rr[some]).float())
            restored.append((of_some[0] * self.deviation + self.centre).numpy() @ TO_TWELVE.T)
            changed.append(of_some[1].numpy())
        return np.concatenate(restored), np.concatenate(changed)


def load_restorer(path=WEIGHTS) -> tuple:
    """(BeatRestorer, facts) as tools/train_restorer.py wrote them. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.pop("model_state_dict")
        model = BeatRestorer(state["centre"], state["deviation"], state["scale"])
        model.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with tools/train_restorer.py") from None
    except Exception as error:              # torch raises whatever a damaged file makes it meet
        raise UserError(f"{path} does not hold the weights of a beat restorer ({type(error).__name__}); make it again "
                        "with tools/train_restorer.py") from error
    return model.eval(), content
