"""Anomaly scores of single beats, and maps of the windows that hold them, under the protocol clean.

The global branch and the trend restore a window once a pass, beside its median beat; the local branch restores every
beat. So a beat costs a tenth of what a record costs, and all passes together hide each of its samples exactly once.
"""
import numpy as np
import torch
from tqdm import tqdm

from dataloader import mask_out, samples_of_beats, send
from ecg.arrays import Records
from model import GLOBAL_LENGTH, GLOBAL_START, compute_trend, restoration_errors
from scoring.passes import RECORDS_AT_ONCE, Block, Scorer, of_owners, smooth_maps

TERMS = ("global", "local", "trend")
LOCAL_AT_ONCE = 256                 # beats through the local decoder together


@torch.inference_mode()
def score_beats(scorer: Scorer, records: Records, r_peaks: list, rows) -> tuple:
    """Score the beats of windows (rows of records), each of which must have a valid one.

    scorer: of a protocol with the median beat; r_peaks: of every window, valid ones. Returns the errors (beats, 3)
    float32 by TERMS, means over samples, leads and passes, the beats in the order of rows and R peaks; and the smoothed
    maps (rows, 4800, leads) float32.
    """
    rows, terms = np.asarray(rows), []
    maps = np.empty((len(rows), GLOBAL_LENGTH, records.leads), np.float32)
    size = RECORDS_AT_ONCE[scorer.device.type]
    for start in tqdm(range(0, len(rows), size), desc=f"beats, {records.name}", leave=False):
        some = rows[start:start + size]
        block = scorer.prepare(records, r_peaks, some)
        of_windows, of_beats = restore_block(scorer, block, cut_beats(scorer, records, r_peaks, some))
        samples = (samples_of_beats(block.places) - GLOBAL_START).clip(0, GLOBAL_LENGTH - 1)        # (n, 480)
        owners = block.shown[:, None]                               # a window has one median beat
        errors = torch.stack([of_windows[0][owners, samples], of_beats, of_windows[1][owners, samples]], dim=1)
        terms.append(errors.mean(dim=(2, 3)).cpu().numpy())
        maps[start:start + size] = smooth_maps(of_windows.sum(dim=0) + scorer.lay_down(
            Block(block.ecg, of_beats, block.shown, block.places, torch.arange(len(of_beats), device=scorer.device)),
            of_beats)).cpu().numpy()
    return np.concatenate(terms), maps


def cut_beats(scorer: Scorer, records: Records, r_peaks: list, rows: np.ndarray) -> torch.Tensor:
    """Every beat of some windows, normalised: (n, 480, leads)."""
    signals = scorer.normalisation.read(records, rows)
    beats = np.concatenate([signal[samples_of_beats(r_peaks[row])] for signal, row in zip(signals, rows)])
    return scorer.normalisation.normalise(send(beats, scorer.device))


def restore_block(scorer: Scorer, block: Block, beats: torch.Tensor) -> tuple:
    """(the windows' errors (2, R, 4800, leads), global and trend; those of the beats (n, 480, leads)), means of passes.

    block: windows with one median beat each; beats: all of theirs, in the order of block.places.
    """
    network, passes = scorer.network, len(scorer.masks[0])
    trend_begun = network.begin_trend(network.encode_trend(compute_trend(block.ecg)))
    of_windows, of_beats = torch.zeros(2, *block.ecg.shape, device=scorer.device), torch.zeros_like(beats)
    for global_mask, local_mask in zip(*scorer.masks):
        global_tokens = network.encode_global(mask_out(block.ecg, global_mask))
        outputs = network.restore(global_tokens, network.encode_local(mask_out(block.beats, local_mask)), trend_begun)
        errors = restoration_errors(outputs, block.ecg, block.beats)
        of_windows += torch.stack([errors[0], errors[2]]) / passes
        for start in range(0, len(beats), LOCAL_AT_ONCE):
            some = slice(start, start + LOCAL_AT_ONCE)
            restored = network.restore_local(of_owners(global_tokens, block.shown[some]),
                                             network.encode_local(mask_out(beats[some], local_mask)))
            of_beats[some] += restoration_errors((None, restored, None), block.ecg[:1], beats[some])[1] / passes
    return of_windows, of_beats
