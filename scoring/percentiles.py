"""What is usual among normal ECGs, kept in a checkpoint: the scores of fold 9's normals, and the calibration.

    python reference.py --data_path ./data/ --load_path ./ckpt/mymodel.pt                 # add both, or make them again
    python reference.py --load_path run/model.pt --save_path ckpt/mymodel.pt --half 1     # weights in half precision

train.py does the same at its end with the epoch that it kept: all normals of fold 9, all beats, float32. test.py
--record reads percentiles off the scores; the protocol "calibrated" (calibration.py) needs the calibration.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch

import calibration
import parallel
from scoring import passes
from ecg.arrays import SIGNAL_FILES, fingerprint, load_r_peaks, open_labels, open_signals, read_rows, signal_path
from model import load_checkpoint, read_checkpoint, save_checkpoint, write_checkpoint
from utils import UserError, add_published_flags, check_published_flags, choose_device, require_writable, run

KEY = "fold9_normals"               # in a checkpoint: {protocol: scores, ascending}
RATIO_KEY = "fold9_mask_ratio"      # in a checkpoint: the --mask_ratio of these scores; where absent, its config's
CALIBRATION_KEY = "calibration"     # in a checkpoint: what calibration.fit found, as tensors, and "fitted_to"
SPLIT = "val"                       # fold 9
RECORDS_AT_ONCE = 256               # of it in memory with their maps, 150 MB
SKIPPED = "no percentiles and no calibration:"


def open_normals(arguments) -> tuple:
    """What learn_normals sees: (signals of fold 9, rows of its normals, R peaks of each record). Raises UserError."""
    if not signal_path(arguments.data_path, SPLIT).exists():
        raise UserError(f"{arguments.data_path} holds no {SIGNAL_FILES[SPLIT]}, fold 9; make it with preprocess.py")
    signals = open_signals(arguments.data_path, SPLIT, arguments.dims)
    labels = open_labels(arguments.data_path, SPLIT, signals.shape[:1])
    return signals, np.flatnonzero(labels == 0), load_r_peaks(arguments.data_path, SPLIT, signals)


def open_normals_of_run(arguments) -> tuple | None:
    """open_normals for train.py; None where it is not asked for, or, with a word why, cannot be."""
    if not (arguments.reference and arguments.save_model):
        return None
    try:
        return open_normals(arguments)
    except UserError as error:
        print(f"{SKIPPED} {error}")
        return None


def add_normals(arguments, config: dict, normals: tuple | None, device):
    """Put what is usual among fold 9's normals into the checkpoint that a finished run kept, arguments.save_path.

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
        if KEY in facts and (CALIBRATION_KEY in facts or len(normals[1]) < calibration.LEAST_NORMALS):
            return
        learned = learn_normals(model.to(device), normals, arguments.mask_ratio, device)
        if not parallel.RANK:
            save_checkpoint(arguments.save_path, model, **(facts | learned))
    except UserError as error:
        print(f"{SKIPPED} {error}")


def learn_normals(model, normals: tuple, mask_ratio: int, device) -> dict:
    """What a checkpoint keeps of the records that open_normals chose: {KEY, RATIO_KEY, CALIBRATION_KEY: ...}.

    The latter is left out, with a word why, where the normals are too few. Raises UserError.
    """
    signals, rows, r_peaks = normals
    print(f"scoring the {len(rows)} normals of fold 9, for the percentiles of test.py --record and for the calibration")
    protocols = passes.protocols_for(model, ("paper", "clean"))
    scores = {protocol: [] for protocol in protocols}
    found, usual_errors = [], calibration.UsualErrors(signals.shape[2])
    for start in range(0, len(rows), RECORDS_AT_ONCE):
        some = rows[start:start + RECORDS_AT_ONCE]
        block, peaks = read_rows(signals, some, SIGNAL_FILES[SPLIT]), [r_peaks[row] for row in some]
        for protocol in protocols:                  # "clean" is the last one
            scored = passes.score_split(model, block, peaks, protocol, mask_ratio, device, SPLIT,
                                         with_maps=protocol == "clean", with_profiles=protocol == "clean")
            scores[protocol] += scored.scores.tolist()
        found.append(calibration.features(scored.profiles, block))
        usual_errors.add(scored.maps, passes.beat_phases(peaks))
    learned = {}
    try:
        fitted, held_out = calibration.fit({part: np.concatenate([one[part] for one in found])
                                            for part in calibration.PARTS}, usual_errors)
        fitted_to = {"fingerprint": fingerprint(signals), "rows": rows.tolist(), "scores": held_out.tolist()}
        learned[CALIBRATION_KEY] = to_tensors(fitted) | {"mask_ratio": mask_ratio, "fitted_to": fitted_to}
        scores["calibrated"] = held_out.tolist()
    except UserError as error:
        print(f"no calibration: {error}")
    in_order = {protocol: sorted(values) for protocol, values in scores.items()}
    return {KEY: in_order, RATIO_KEY: mask_ratio, **learned}


def to_tensors(content):
    """A nested dict of numpy arrays and numbers with tensors in their place, which a checkpoint may hold."""
    if isinstance(content, dict):
        return {name: to_tensors(value) for name, value in content.items()}
    return torch.tensor(np.asarray(content, dtype=np.float64))


def choose_protocols(wanted: str, model, fitted: dict | None) -> tuple:
    """The protocols to score a network under. wanted: --protocol; fitted: of read_calibration. Raises UserError."""
    names = {"all": passes.PROTOCOLS, "both": passes.PLAIN_PROTOCOLS}.get(wanted, (wanted,))
    found = passes.protocols_for(model, [name for name in names if name != "calibrated" or fitted])
    if not found:
        raise UserError(f"--protocol {wanted} is not possible with this checkpoint: paper needs one of --normalization "
                        "minmax, calibrated one with a calibration, which reference.py adds; choose --protocol clean")
    return found


def read_calibration(path, facts: dict, mask_ratio: int, leads: int, protocol: str) -> dict | None:
    """What calibration.fit made, from a checkpoint of anyone's; None, with a word why, where there is none.

    protocol: as asked for by --protocol; without a need for a calibration there is no word.
    """
    held, remedy = facts.get(CALIBRATION_KEY), f"add it with reference.py --load_path {path}"
    try:
        if held is None:
            raise ValueError(f"{path} holds no calibration")
        if held["mask_ratio"] != mask_ratio:
            raise ValueError(f"the calibration in {path} is of another --mask_ratio than {mask_ratio}")
        return unpack_calibration(held, leads)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        if protocol in ("all", "calibrated"):
            reason = str(error) if type(error) is ValueError else f"the calibration in {path} is not sound"
            print(f"the protocol calibrated is skipped: {reason}; {remedy}")
        return None


def unpack_calibration(held: dict, leads: int) -> dict:
    """The calibration as numpy arrays, checked. Raises ValueError, and whatever an unsound one makes Python raise."""
    sizes = {"residual": passes.BINS * leads, "error": calibration.PLACES * leads, "amplitude": 3 * leads}
    parts = {part: {name: to_array(held["parts"][part][name], shape) for name, shape in (
        ("mean", (size,)), ("deviation", (size,)), ("centre", ()), ("spread", ()),
        *([("precision", (size, size))] if part != "residual" else []))} for part, size in sizes.items()}
    bounds = {name: to_array(held[name], (passes.BINS, leads)) for name in ("map_mean", "map_deviation")}
    spreads = [usual[name] for usual in parts.values() for name in ("deviation", "spread")]
    if not all((values > 0).all() for values in (bounds["map_deviation"], *spreads)):
        raise ValueError("a deviation of the calibration is not positive")
    for usual in parts.values():
        if "precision" in usual:
            np.linalg.cholesky(usual["precision"])              # of a matrix that measures no distance: LinAlgError
    known = held["fitted_to"]
    rows, scores = np.array(known["rows"], dtype=np.int64), np.array(known["scores"], dtype=np.float64)
    if rows.shape != scores.shape or rows.ndim != 1 or not np.isfinite(scores).all() or (rows < 0).any():
        raise ValueError("the calibration does not say what it was fitted to")
    return {"parts": parts, **bounds, "fitted_to": {"fingerprint": str(known["fingerprint"]), "rows": rows,
                                                    "scores": scores}}


def to_array(tensor, shape: tuple) -> np.ndarray:
    """A tensor as a float64 array, checked. Raises ValueError, AttributeError."""
    values = tensor.numpy().astype(np.float64)
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError("an array of the calibration is of another shape, or not finite")
    return values


def hold_out(fitted: dict, split: str, signals: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Calibrated scores (records,) of a split, those of records that the calibration was fitted to cross-fitted.

    fitted: of read_calibration; signals: of the split. Scores of other records stay as they are.
    """
    known = fitted["fitted_to"]
    if known["fingerprint"] != fingerprint(signals) or (known["rows"] >= len(scores)).any():
        if split == SPLIT:
            print(f"the calibration was fitted to another {SIGNAL_FILES[SPLIT]} than this one: where they share "
                  "records, the operating points of calibrated are biased; reference.py fits it to this one")
        return scores
    scores = scores.copy()
    scores[known["rows"]] = known["scores"]
    return scores


def read_normals(path, facts: dict, mask_ratio: int) -> tuple:
    """({protocol: scores of fold 9's normals, ascending}, a sentence on them or ""), or ({}, why there are none).

    path: the checkpoint; facts: what it holds beside the weights, which may come from anyone.
    """
    config, held = facts.get("config"), facts.get(KEY)
    config = config if isinstance(config, dict) else {}
    if held is None:
        return {}, (f"no percentiles: {path} holds no scores of fold 9's normals, which train.py and reference.py add "
                    f"where {SIGNAL_FILES[SPLIT]} is there")
    if not (isinstance(held, dict) and held and all(are_scores(values) for values in held.values())):
        return {}, f"no percentiles: what {path} holds as {KEY} are not lists of finite numbers; train it again"
    if facts.get(RATIO_KEY, config.get("mask_ratio")) != mask_ratio:
        return {}, (f"no percentiles: the scores of fold 9's normals in {path} are of another --mask_ratio than "
                    f"{mask_ratio}")
    note = ""
    if config.get("protocol") != "clean":
        note = ("percentiles are optimistic: fold 9's normals were trained on, so a new normal ECG scores higher than "
                "they do")
    return {protocol: np.sort(np.array(values, dtype=np.float64)) for protocol, values in held.items()}, note


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--load_path", default="./ckpt/mymodel.pt", help="checkpoint (default %(default)s)")
    published.add_argument("--save_path", help="where the checkpoint is written (default: --load_path)")
    published.add_argument("--half", type=int, choices=(0, 1), default=0, help="1: write the weights in half precision")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    path = Path(arguments.save_path or arguments.load_path)
    require_writable(path.parent)
    device = choose_device(arguments.device)
    model, facts = load_checkpoint(arguments.load_path)
    arguments.dims = model.leads
    config = facts.get("config")
    if not (isinstance(config, dict) and config.get("protocol") == "clean"):
        print("the weights do not say that fold 9 was held back: what is learned from its normals is optimistic")
    content = read_checkpoint(arguments.load_path)
    if arguments.half:
        halved = {name: value.half() if value.is_floating_point() else value
                  for name, value in model.state_dict().items()}
        content["model_state_dict"] = halved
        model.load_state_dict(halved)               # score what is written
    content.pop(CALIBRATION_KEY, None)
    learned = learn_normals(model.to(device), open_normals(arguments), arguments.mask_ratio, device)
    write_checkpoint(path, content | learned)
    print(f"written to {path}")


if __name__ == "__main__":
    run(main)
