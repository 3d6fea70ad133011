"""Runs train.py as it is, and sends itself the signal KILL_WITH in the middle of epoch KILL_IN."""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
import utils  # noqa: E402
from dataloader import TrainingBatches  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs ignore Ctrl-C
draw_epoch = TrainingBatches.draw_epoch


def draw_then_die(self, epoch):
    for number, batch in enumerate(draw_epoch(self, epoch)):
        if epoch == int(os.environ["KILL_IN"]) and number == 1:
            os.kill(os.getpid(), signal.Signals[os.environ["KILL_WITH"]])
        yield batch


TrainingBatches.draw_epoch = draw_then_die
utils.run(train.main)
