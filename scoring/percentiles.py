"""Where a score lies among those of normal ECGs: a checkpoint keeps the scores of fold 9's normals.

train.py adds them to the epoch that it kept, tools/ship_weights.py to any checkpoint; recordings of one's own are
compared with them. All normals of fold 9, the beats that each protocol scores, float32.
"""
import math

import numpy as np

from ecg.arrays import SIGNAL_FILES, load_r_peaks, open_labels, open_records
from model import MCF
from scoring.passes import Scorer
from scoring.protocols import PROTOCOLS, protocols_for

KEY = "fold9_normals"               # in a checkpoint: {name of a protocol: scores, ascending}
RATIO_KEY = "fold9_mask_ratio"      # in a checkpoint: the --mask_ratio of these scores; where absent, its config's
SPLIT = "val"                       # fold 9


def score_normals(model: MCF, data_path, mask_ratio: int) -> dict:
    """What a checkpoint keeps of fold 9's normals: {KEY: ..., RATIO_KEY: ...}. Raises UserError without fold 9."""
    records = open_records(data_path, SPLIT, model.leads)
    rows = np.flatnonzero(open_labels(data_path, SPLIT, (len(records),)) == 0)
    print(f"scoring the {len(rows)} normals of fold 9, with which recordings of one's own are compared")
    scores = {}
    for protocol in protocols_for(model, PROTOCOLS):
        r_peaks = load_r_peaks(data_path, SPLIT, records, protocol.detector)
        scored = Scorer(model, protocol, mask_ratio).score(records, r_peaks, rows)
        scores[protocol.name] = sorted(scored.scores.tolist())
    return {KEY: scores, RATIO_KEY: mask_ratio}


def read_normals(path, facts: dict, mask_ratio: int) -> tuple:
    """({protocol name: scores of fold 9's normals, ascending}, a sentence on them or ""), or ({}, why there are none).

    path: the checkpoint; facts: what it holds beside the weights, which may come from anyone.
    """
    config, stored = facts.get("config"), facts.get(KEY)
    config = config if isinstance(config, dict) else {}
    if stored is None and config.get("protocol") == "paper":
        return {}, (f"no percentiles of the network: {path} was trained on fold 9's normals, and has no others to "
                    "compare with; use weights of train.py --protocol clean, as ckpt/mymodel.pt")
    if stored is None:
        return {}, (f"no percentiles of the network: {path} holds no scores of fold 9's normals, which train.py and "
                    f"tools/ship_weights.py add where {SIGNAL_FILES[SPLIT]} is there")
    if not (isinstance(stored, dict) and stored and all(are_scores(values) for values in stored.values())):
        return {}, f"no percentiles: what {path} holds as {KEY} are not lists of finite numbers; train it again"
    if facts.get(RATIO_KEY, config.get("mask_ratio")) != mask_ratio:
        return {}, (f"no percentiles: the scores of fold 9's normals in {path} are of another --mask_ratio than "
                    f"{mask_ratio}")
    note = ""
    if config.get("protocol") != "clean":
        note = ("percentiles are optimistic: fold 9's normals were trained on, so a new normal ECG scores higher than "
                "they do")
    return {name: np.sort(np.array(values, dtype=np.float64)) for name, values in stored.items()}, note


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
