"""Runs train.py as it is, and kills itself without warning in the middle of the second epoch."""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from dataloader import TrainingBatches  # noqa: E402

draw_epoch = TrainingBatches.draw_epoch


def draw_then_die(self, epoch):
    for number, batch in enumerate(draw_epoch(self, epoch)):
        if epoch == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


TrainingBatches.draw_epoch = draw_then_die
train.main()
