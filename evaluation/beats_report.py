"""The report on MIT-BIH's beats: a network beside its rivals without one, by beats and by points."""
import time

import numpy as np

from ecg.beats import OTHER, Beats, patients_of
from evaluation import beats as numbers
from evaluation.files import write_report
from evaluation.metrics import difference
from evaluation.report import REPORT_FILE, percent, table
from evaluation.trivial import make_maps
from scoring.beats import TERMS, score_beats
from scoring.beats_without_network import score_earliness, score_shapes
from scoring.passes import Scorer
from utils import pack_csv

SCORES_FILE = "beats_scores.csv"
NETWORK, LOCAL, SHAPE, EARLY = "network", "its local branch", "shape (PCA)", "early (RR)"
USUAL, SUM = ", less the record's usual", f" + {EARLY}"
RIVALS = {network + more: SHAPE + more for network in (NETWORK, LOCAL) for more in ("", SUM)}    # of equal information
MARKED = {"S, V or F": numbers.CLASSES, "V": ("V",)}        # whose points are localized


def score_network(scorer: Scorer, beats: Beats, split: str) -> tuple:
    """({name: (beats,)}, rows, maps of rows): the logs of the sum of all terms, and of the local one beside others.

    NaN in windows without a beat to validate or test on.
    """
    of_beats, beat = beats.table, beats.table["class"] != OTHER
    rows = np.unique(of_beats["window"][np.isin(of_beats[split], ("val", "test"))])
    terms, maps = score_beats(scorer, beats.records, beats.r_peaks(beat), rows)
    whole, local = terms.sum(axis=1), terms[:, TERMS.index("local")]
    scores = {NETWORK: whole} | ({LOCAL: local} if (whole > local).all() and local.all() else {})
    scored = beat & np.isin(of_beats["window"], rows)
    return {name: spread(np.log(score), scored) for name, score in scores.items()}, rows, maps


def spread(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The values of chosen beats (beats,) bool at their places among all, NaN elsewhere."""
    whole = np.full(len(chosen), np.nan)
    whole[chosen] = values
    return whole


def score_all(beats: Beats, split: str, of_network: dict) -> dict:
    """{name: (beats,)}: the network, its rivals, both relative to the record's usual score, and sums of z."""
    of_beats = beats.table
    shape, early = score_shapes(beats.records, of_beats, of_beats[split] == "train"), score_earliness(of_beats)
    scores = {}
    for name, score in (of_network | {SHAPE: shape}).items():
        scores |= {name: score, name + USUAL: numbers.less_the_usual(of_beats, score),
                   name + SUM: numbers.sum_of_z(of_beats, split, [score, early])}
    return scores | {EARLY: early}


def localize(beats: Beats, split: str, scores: dict, rows: np.ndarray, maps: np.ndarray) -> dict:
    """{classes that are marked: numbers of evaluate_maps} of the windows with such test beats. maps: of rows."""
    of_beats, length, measured = beats.table, beats.records.signals.shape[1], {}
    peaks = beats.r_peaks(of_beats["class"] != OTHER)
    for name, classes in MARKED.items():
        windows = np.unique(of_beats["window"][(of_beats[split] == "test") & np.isin(of_beats["class"], classes)])
        of_windows = {NETWORK: maps[np.searchsorted(rows, windows)],
                      **{f"{rival}, painted": numbers.paint(of_beats, windows, scores[rival], length)
                         for rival in (NETWORK, LOCAL, SHAPE, EARLY) if rival in scores},
                      **make_maps(None, beats.records, peaks, windows)}
        patients = patients_of(of_beats["record"][np.searchsorted(of_beats["window"], windows)])
        labels = numbers.mark_points(of_beats, windows, length, beats.records.leads, classes)
        measured[name] = numbers.evaluate_maps(labels, of_windows, patients)
    return measured


def report_beats(scorer: Scorer, beats: Beats, split: str, folder, about: dict):
    """Score, evaluate, print, and write report.md, results.json and beats_scores.csv to a folder. Raises UserError.

    about: what results.json says of the checkpoint and the run.
    """
    started = time.perf_counter()
    of_network, rows, maps = score_network(scorer, beats, split)
    seconds, scores = time.perf_counter() - started, score_all(beats, split, of_network)
    detection = {name: numbers.evaluate_beats(beats.table, split, score) for name, score in scores.items()}
    for name in RIVALS.keys() & detection.keys():
        detection[name]["beyond_rival"] = difference(detection[name]["auroc"], detection[RIVALS[name]]["auroc"])
    localization = localize(beats, split, scores, rows, maps)
    text = "\n".join([f"# MIT-BIH, {split} patients\n", *tell_detection(detection), *tell_localization(localization)])
    chosen = np.isfinite(of_network[NETWORK]) & np.isin(beats.table[split], ("val", "test"))
    columns = {name: beats.table[name] for name in ("record", "window", "r_peak", "class", split)} | scores
    rows = pack_csv(list(columns), zip(*(column[chosen].tolist() for column in columns.values())))
    write_report(folder, {REPORT_FILE: (text + "\n").encode(), SCORES_FILE: rows},
                 {**about, "beats": split, "detection": detection, "localization": localization, "seconds": seconds})
    print(text)


def tell_detection(detection: dict) -> list:
    """The table of beats, as lines of text."""
    some = next(iter(detection.values()))["beats"]
    rows = [[name, percent(of_score["auroc"]), percent(of_score.get("beyond_rival"), "+"),
             *map(percent, (of_score["average_precision"], of_score["f1_best"]["f1"], of_score["f1"]["f1"])),
             *(percent(of_score["by_class"].get(kind, {}).get("auroc")) for kind in numbers.CLASSES)]
            for name, of_score in detection.items()]
    return [f"{some['normal']:,} normal and {some['abnormal']:,} abnormal test beats of {some['patients']} patients, "
            "in percent; intervals over patients. Best F1: at the best threshold on the test beats themselves, as "
            "published, so optimistic. F1: at the best threshold on the validation beats. S, V, F: AUROC. Less shape: "
            "the paired difference to the shape, or to the shape and RR.\n",
            table(["score", "AUROC", "less shape", "average precision", "best F1", "F1", *numbers.CLASSES], rows)]


def tell_localization(localization: dict) -> list:
    """The tables of points, as lines of text."""
    lines = []
    for marked, of_maps in localization.items():
        windows = next(iter(of_maps.values()))["windows"]
        rows = [[name, percent(of_map["per_window"]), percent(of_map["pooled"])] for name, of_map in of_maps.items()]
        lines += [f"\nPoints of beats that a cardiologist called {marked}, in {windows:,} windows of 10 s that hold "
                  "normal beats too; AUROC in percent\n", table(["map", "mean per window", "pooled"], rows)]
    return lines
