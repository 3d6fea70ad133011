"""The scoring protocols: what the published evaluation does, and what an unbiased reader would do.

In every mask True means masked: set to 0, to be restored.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dataloader import PATCH_LENGTH
from ecg.arrays import VALIDATION_FOLD
from model import BEAT_LENGTH, GLOBAL_LENGTH, MCF
from utils import UserError

PUBLISHED_BEAT_STARTS, PUBLISHED_BEAT_MASK = (20, 70, 120, 170, 220), 100       # samples of the beat, at every ratio


def unmasked() -> tuple:
    """The one pass of a network that was trained without masks (the paper's ablation)."""
    return torch.zeros(1, GLOBAL_LENGTH, dtype=torch.bool), torch.zeros(1, BEAT_LENGTH, dtype=torch.bool)


def published_masks(mask_ratio: int) -> tuple:
    """The masks of the published passes, global (P, 4800) and local (P, 480), P = 100 // mask_ratio.

    Pass j masks mask_ratio patches of the recording and 100 samples of the beat, whose starts repeat. At the published
    ratio, 30, three passes cover 90 % of the recording, and never the last 260 samples of the beat. At 0 one pass masks
    nothing.
    """
    if not mask_ratio:
        return unmasked()
    passes, stride = 100 // mask_ratio, GLOBAL_LENGTH // mask_ratio
    global_masks = torch.zeros(passes, GLOBAL_LENGTH, dtype=torch.bool)
    local_masks = torch.zeros(passes, BEAT_LENGTH, dtype=torch.bool)
    for j in range(passes):
        for patch in range(mask_ratio):
            first = PATCH_LENGTH * j + stride * patch
            global_masks[j, first:first + PATCH_LENGTH] = True
        first = PUBLISHED_BEAT_STARTS[j % len(PUBLISHED_BEAT_STARTS)]
        local_masks[j, first:first + PUBLISHED_BEAT_MASK] = True
    return global_masks, local_masks


def covering_masks(mask_ratio: int) -> tuple:
    """Masks that hide every sample exactly once, global (P, 4800) and local (P, 480), P = 100 / mask_ratio or 2.

    At 0 one pass masks nothing.
    """
    if not mask_ratio:
        return unmasked()
    passes = max(2, round(100 / mask_ratio))
    number = torch.arange(passes)[:, None]
    return (torch.arange(GLOBAL_LENGTH) // PATCH_LENGTH % passes == number,
            torch.arange(BEAT_LENGTH) * passes // BEAT_LENGTH == number)


@dataclass(frozen=True)
class Protocol:
    """How records are scored.

    detector: of the R peaks, as arrays.load_r_peaks names it; as_stored: whether detection sees records as they are
    stored, else normalised as in training; sum_overlaps: whether the local maps of overlapping beats are summed, else
    averaged; median_beat: whether the local branch sees a record's median beat in place of every beat (on fold 9 as
    good with min-max, in a sixth of the time); masks: --mask_ratio -> the masks of the passes, global (P, 4800) and
    local (P, 480); fold_held_back: that train.py does not train on.
    """
    name: str
    detector: str
    as_stored: bool
    sum_overlaps: bool
    median_beat: bool
    masks: Callable[[int], tuple]
    fold_held_back: int | None = None


PAPER = Protocol("paper", "heartpy", as_stored=True, sum_overlaps=True, median_beat=False, masks=published_masks)
CLEAN = Protocol("clean", "slope", as_stored=False, sum_overlaps=False, median_beat=True, masks=covering_masks,
                 fold_held_back=VALIDATION_FOLD)
PROTOCOLS = {"paper": PAPER, "clean": CLEAN}


def protocols_for(model: MCF, names) -> tuple:
    """The protocols of these names under which a network can be scored. Raises UserError where there is none.

    To a network with companded input, what the paper feeds means nothing.
    """
    protocols = tuple(PROTOCOLS[name] for name in names)
    if model.input["kind"] != "minmax":
        protocols = tuple(protocol for protocol in protocols if not protocol.as_stored)
    if not protocols:
        raise UserError("the network was trained on companded input, which the protocol paper does not know; choose "
                        "--protocol clean")
    return protocols
