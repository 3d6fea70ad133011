"""Runs train.py as it is, with few channels, and sends itself SIGKILL in the middle of epoch KILL_IN."""
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import model  # noqa: E402
import small  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from dataloader import TrainingBatches  # noqa: E402

model.WIDTHS = small.WIDTHS
draw_epoch = TrainingBatches.draw_epoch


def draw_then_die(self, epoch):
    for number, batch in enumerate(draw_epoch(self, epoch)):
        if epoch == int(os.environ.get("KILL_IN", 0)) and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


TrainingBatches.draw_epoch = draw_then_die
utils.run(train.main)
