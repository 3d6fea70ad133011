"""Where the numbers of a report come from: the checkpoint and the arrays, as results.json names them."""
import hashlib
import json

import numpy as np

from ecg.arrays import describes, fingerprint, load_manifest
from model import HISTORY
from utils import sha256_of

UNKNOWN = {"path": None, "sha256": None, "epoch": None, "config": None, "history": []}


def describe_checkpoint(path, facts: dict) -> dict:
    """Epoch, config and history of a checkpoint where train.py wrote them; of another origin they are unknown.

    facts: what the file holds beside the weights, which may come from anyone.
    """
    config, history = facts.get("config"), facts.get("history")
    known = {**UNKNOWN, "path": str(path), "sha256": sha256_of(path)}
    try:
        json.dumps([facts.get("epoch"), config, history], allow_nan=False)
    except (TypeError, ValueError):
        return known
    if (isinstance(config, dict) and {"protocol", "epochs", "select"} <= set(config)
            and isinstance(config["epochs"], int) and isinstance(config["select"], str)):
        known["config"] = config
    if isinstance(history, list) and all(map(is_row, history)):
        known["history"] = history
    return {**known, "epoch": facts.get("epoch")}


def is_row(row) -> bool:
    """Whether this is a line of a history as train.py notes it."""
    return (isinstance(row, dict) and set(HISTORY) <= set(row) and isinstance(row["epoch"], int)
            and all(row[name] is None or isinstance(row[name], float) for name in ("val_auroc", "test_auroc")))


def describe_data(data_path, splits: list) -> dict:
    """The manifest where it describes the arrays that are scored, and the identity of each split."""
    manifest = load_manifest(data_path)
    described = all(describes(manifest, split.name, split.records.signals) for split in splits)
    if manifest and not described:
        print(f"the manifest in {data_path} does not describe all arrays that are scored, and is left out of the "
              "report; see that the labels belong to the same signals.")
    return {"data": manifest if described else None, "arrays": {split.name: {
        "shape": list(split.records.signals.shape), "fingerprint": fingerprint(split.records.signals),
        "labels": hashlib.sha256(np.ascontiguousarray(split.labels, np.uint8)).hexdigest()} for split in splits}}


def tell_weights(checkpoint: dict, fold9_is_scored: bool) -> str:
    """How the weights came about, in a sentence: the protocol's name in the table covers the scoring alone."""
    config = checkpoint["config"]
    if checkpoint["path"] is None:
        return "weights: none, the network is untrained"
    if config is None:
        return (f"weights: {checkpoint['path']} does not say which records it was trained on, nor how its epoch was "
                "chosen" + "; operating points and combined are biased where fold 9 was among them" * fold9_is_scored)
    seen = ("; it saw fold 9's normals, so operating points and combined are biased"
            if config["protocol"] == "paper" and fold9_is_scored else "")
    return (f"weights: {checkpoint['path']}, trained under {config['protocol']}, epoch {checkpoint['epoch']} of "
            f"{config['epochs']}, {tell_choice(checkpoint)}{seen}")


def tell_choice(checkpoint: dict) -> str:
    """How a checkpoint's epoch was chosen. last.pt is of the last epoch, whichever --select keeps."""
    config, epoch, history = checkpoint["config"], checkpoint["epoch"], checkpoint["history"]
    aurocs = {row["epoch"]: row.get(f"{config['select']}_auroc") for row in history}
    scored = [one for one, auroc in aurocs.items() if auroc is not None]
    best = {"test": "the best on the test set, which is optimistic", "val": "the best on fold 9"}
    choice = best.get(config["select"])
    if choice is None or (history and (not scored or max(scored, key=aurocs.get) != epoch)):
        choice = "the last one" if not history or epoch == max(aurocs) else "not chosen by any score"
    return choice + (" of a run that did not end" if history and max(aurocs) < config["epochs"] else "")


def tell_counts(counts: dict) -> list:
    """Sentences on the records behind the numbers. counts: of numbers.count_records."""
    sentences = [f"detection: {counts['records']} records of {counts['patients']} patients, {counts['normal']} normal "
                 f"and {counts['abnormal']} abnormal; {counts['without_valid_beat']} without a valid beat are scored "
                 "on evenly spaced windows"]
    if counts["without_age"]:
        sentences.append(f"age: {counts['without_age']} records without one are in no age band, and score as the mean")
    if counts["benchmark_records"]:
        sentences.append(f"localization: {counts['benchmark_records']} records, "
                         f"{counts['benchmark_records_with_both_classes']} of them with points of both kinds; "
                         f"{counts['benchmark_without_valid_beat']} without a valid beat")
    if counts["lesions"]:
        sentences.append(f"lesions: {sum(counts['lesions'].values())} records made of {counts['lesions']['none']} "
                         "normal ones: each of these as it is, and with one lesion at a time")
    return sentences
