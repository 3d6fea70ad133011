"""What a score is worth: its percentile among the normals of fold 9, whose scores a checkpoint carries.

train.py scores them with the epoch that it kept, under both protocols, all beats, in float32, and adds the scores to
that checkpoint; test.py --record reads them back.
"""
import math

import numpy as np

import parallel
import scoring
from arrays import SIGNAL_FILES, load_r_peaks, open_labels, open_signals, read_rows, signal_path
from model import load_checkpoint, save_checkpoint
from utils import UserError

KEY = "fold9_normals"               # in a checkpoint: {protocol: scores, ascending}
SPLIT = "val"                       # fold 9
RECORDS_AT_ONCE = 1024              # of it in memory, 250 MB
SKIPPED = "no percentiles for test.py --record:"


def open_normals(arguments) -> tuple | None:
    """What add_normals scores: (signals of fold 9, rows of its normals, R peaks of each record).

    None where it is not asked for, or, with a word why, cannot be.
    """
    if not (arguments.reference and arguments.save_model):
        return None
    if not signal_path(arguments.data_path, SPLIT).exists():
        print(f"{SKIPPED} {arguments.data_path} holds no {SIGNAL_FILES[SPLIT]}, fold 9; make it with preprocess.py")
        return None
    try:
        signals = open_signals(arguments.data_path, SPLIT, arguments.dims)
        labels = open_labels(arguments.data_path, SPLIT, signals.shape[:1])
        return signals, np.flatnonzero(labels == 0), load_r_peaks(arguments.data_path, SPLIT, signals)
    except UserError as error:
        print(f"{SKIPPED} {error}")
        return None


def add_normals(arguments, config: dict, normals: tuple | None, device):
    """Put the scores of fold 9's normals into the checkpoint that a finished run kept, arguments.save_path.

    config: of that run; normals: of open_normals. All processes score, the first one writes; all else in the file
    stays as it was. What is wrong is printed: the training is done, and nothing of it is lost.
    """
    if normals is None:
        return
    parallel.wait_for_all()                         # for the first one, which wrote the last epoch
    try:
        model, facts = load_checkpoint(arguments.save_path)
        if facts.get("config") != config:
            raise UserError(f"{arguments.save_path} was kept by another run; repeat this one without --resume")
        if KEY in facts:
            return
        print(f"scoring the {len(normals[1])} normals of fold 9, for the percentiles of test.py --record (--reference "
              "0 leaves them out)")
        scores = score_normals(model.to(device), normals, arguments.mask_ratio, device)
        if not parallel.RANK:
            save_checkpoint(arguments.save_path, model, **facts, **{KEY: scores})
    except UserError as error:
        print(f"{SKIPPED} {error}")


def score_normals(model, normals: tuple, mask_ratio: int, device) -> dict:
    """The scores {protocol: list, ascending} of the records that open_normals chose. Raises UserError."""
    signals, rows, r_peaks = normals
    found = {protocol: [] for protocol in scoring.PROTOCOLS}
    for start in range(0, len(rows), RECORDS_AT_ONCE):
        some = rows[start:start + RECORDS_AT_ONCE]
        block = read_rows(signals, some, SIGNAL_FILES[SPLIT])
        for protocol, scores in found.items():
            scores += scoring.score_split(model, block, [r_peaks[row] for row in some], protocol, mask_ratio, device,
                                          SPLIT).scores.tolist()
    return {protocol: sorted(scores) for protocol, scores in found.items()}


def read_normals(path, facts: dict, mask_ratio: int) -> tuple:
    """({protocol: scores of fold 9's normals, ascending}, a sentence on them or ""), or ({}, why there are none).

    path: the checkpoint; facts: what it holds beside the weights, which may come from anyone.
    """
    config, held = facts.get("config"), facts.get(KEY)
    config = config if isinstance(config, dict) else {}
    if held is None:
        return {}, (f"no percentiles: {path} holds no scores of fold 9's normals, which train.py adds where "
                    f"{SIGNAL_FILES[SPLIT]} is there")
    if not (isinstance(held, dict) and all(are_scores(held.get(protocol)) for protocol in scoring.PROTOCOLS)):
        return {}, f"no percentiles: what {path} holds as {KEY} are not lists of finite numbers; train it again"
    if config.get("mask_ratio") != mask_ratio:
        return {}, (f"no percentiles: the scores of fold 9's normals in {path} are of another --mask_ratio than "
                    f"{mask_ratio}")
    note = ""
    if config.get("protocol") != "clean":
        note = ("percentiles are optimistic: fold 9's normals were trained on, so a new normal ECG scores higher than "
                "they do")
    return {protocol: np.sort(np.array(held[protocol], dtype=np.float64)) for protocol in scoring.PROTOCOLS}, note


def are_scores(values) -> bool:
    """Whether something read from a file is a list of finite numbers, one at least."""
    try:
        return isinstance(values, list) and len(values) > 0 and all(
            type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:                           # an integer beyond floating point
        return False


def percentile(score: float, normals: np.ndarray) -> float:
    """The percentage of the normals' ascending scores that are lower, equal ones counted half."""
    lower, not_higher = (np.searchsorted(normals, score, side) for side in ("left", "right"))
    return float(50 * (lower + not_higher) / len(normals))
