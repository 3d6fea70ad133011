"""All numbers of a report: each score's own, and what it is worth beside the best score without a network."""
from collections import Counter
from dataclasses import dataclass

import numpy as np

from dataloader import valid_beats
from ecg.lesions import KINDS
from evaluation import metrics
from evaluation.detection import Cohort, evaluate_detection, open_cohort
from evaluation.lesions import Lesions, Ranks, evaluate_lesions, open_lesions
from evaluation.localization import Benchmark, evaluate_localization, open_benchmark
from evaluation.places import PLACES

PARTS = ("detection", "localization", "lesions")        # of a score's numbers, each None where it has none
# The AUROCs of the headline, and how results.json names their values.
HEADLINES = {"detection": "detection_auroc", **{f"{part}_{measure}": f"{part}_auroc_{measure}" for part in PARTS[1:]
                                                for measure in ("pooled", *PLACES)}}
BY_KIND = "lesions_"                                    # what the groupings of lesions by kind begin with
GROUPINGS = {"within_age_bands": "Detection within age bands (years)",
             "by_superclass": "Detection by superclass, against all normals",
             "by_statement": "Detection by SCP statement, against all normals",
             f"{BY_KIND}within_record_and_phase": "Lesions by kind: which lead of this wave (within record and phase)",
             f"{BY_KIND}within_record_and_lead": "Lesions by kind: which moment of this lead (within record and lead)",
             f"{BY_KIND}per_record": "Lesions by kind: all points of a record, mean over records",
             f"{BY_KIND}pooled": "Lesions by kind: points of all records",
             "by_diagnosis": "Localization by diagnosis", "by_lead": "Localization by lead"}


@dataclass
class Truth:
    """What scores are held against. splits: {name: Split}; benchmark, lesions: None where there is none."""
    splits: dict
    cohort: Cohort
    benchmark: Benchmark | None
    lesions: Lesions | None = None


@dataclass
class Scored:
    """What one protocol says. scores: {"test": (records,), "val": ...}; maps: (records, 4800, leads) or None.

    detector: of its R peaks; seconds: {split: how long it took}; lesions: its maps of them, ranked, or None.
    """
    scores: dict
    maps: np.ndarray | None
    detector: str
    seconds: dict
    lesions: Ranks | None = None


def open_truth(data_path, splits: dict) -> Truth:
    """The Truth of load_splits' splits, and of the lesions in the normals of the test set."""
    return Truth(splits, open_cohort(splits), open_benchmark(data_path, splits["benchmark"]) if "benchmark" in splits
                 else None, open_lesions(data_path, "test", splits["test"].records))


def evaluate_maps(localized: dict, lesions: dict, baselines: dict) -> dict:
    """{name: its numbers} of maps that belong to no protocol, each None where it has none.

    localized, lesions: {name: numbers} of the benchmark and of the lesions; baselines: of what knows no network.
    """
    entries = {}
    for name in localized | lesions:
        parts = {"localization": localized.get(name), "lesions": lesions.get(name)}
        entries[name] = {**{HEADLINES[number]: value["value"] for number, value in headline_estimates(parts).items()
                            if value}, **parts, "beyond_trivial": beyond_trivial(parts, baselines)}
    return entries


def evaluate(truth: Truth, scored: Scored, baselines: dict) -> dict:
    """The numbers of one protocol as results.json holds them."""
    parts = {"detection": evaluate_detection(truth.cohort, scored.scores),
             "localization": None if scored.maps is None else evaluate_localization(truth.benchmark, scored.maps),
             "lesions": None if scored.lesions is None else evaluate_lesions(truth.lesions, scored.lesions)}
    return {**{HEADLINES[number]: value and value["value"] for number, value in headline_estimates(parts).items()},
            **parts, "beyond_trivial": beyond_trivial(parts, baselines),
            "counts": count_records(truth, scored.detector), "seconds": {
                name: round(scored.seconds[split], 2) if split in scored.seconds else None
                for name, split in (("detection", "test"), ("fold9", "val"), ("localization", "benchmark"),
                                    ("lesions", "lesions"))}}


def count_records(truth: Truth, detector: str) -> dict:
    """The records behind the numbers. detector: of the R peaks that they are scored with."""
    test, benchmark = truth.splits["test"], truth.splits.get("benchmark")
    peaks = test.r_peaks[detector]
    counts = {"records": len(test.labels), "patients": len(np.unique(test.patients)),
              "normal": int(np.count_nonzero(test.labels == 0)), "abnormal": int(np.count_nonzero(test.labels == 1)),
              "without_r_peak": sum(not len(positions) for positions in peaks),
              "without_valid_beat": without_valid_beat(peaks),
              "without_age": int(np.count_nonzero(np.isnan(test.table.get("age", np.zeros(0))))),
              "benchmark_records": 0, "benchmark_records_with_both_classes": 0, "benchmark_without_valid_beat": 0,
              "lesions": {} if truth.lesions is None else dict(Counter(truth.lesions.kinds.tolist()))}
    if benchmark is None:
        return counts
    both = [bool((labels == 1).any() and (labels == 0).any()) for labels in truth.benchmark.labels]
    return {**counts, "benchmark_records": len(both), "benchmark_records_with_both_classes": sum(both),
            "benchmark_without_valid_beat": without_valid_beat(benchmark.r_peaks[detector])}


def without_valid_beat(r_peaks: list) -> int:
    """How many records are scored on evenly spaced windows, as no beat of theirs is valid."""
    return sum(not valid_beats(positions)[1] for positions in r_peaks)


def beyond_trivial(parts: dict, baselines: dict) -> dict:
    """Each AUROC less the best trivial score's on the same records, paired.

    Returns {number: {"rival", "value": the rival's, "difference"}}, number a name of name_aurocs.
    """
    rivals, compared = name_rivals(baselines), {}
    for number, value in name_aurocs(parts).items():
        rival, best = best_rival(rivals, number)
        if value and best:
            compared[number] = {"rival": rival, "value": best, "difference": metrics.difference(value, best)}
    return compared


def name_rivals(baselines: dict) -> dict:
    """{name of a score without a network: its AUROCs by name} of evaluate_baselines."""
    named = {}
    for part, scores in baselines.items():
        for name, numbers in scores.items():
            named.setdefault(name, {}).update({number: value for number, value in name_aurocs({part: numbers}).items()
                                               if value is not None})
    return named


def best_rival(rivals: dict, number: str) -> tuple:
    """(name, Estimate) of the best of name_rivals for a number; ("", None) where none has it."""
    known = {name: values[number] for name, values in rivals.items() if values.get(number)}
    best = max(known, key=lambda name: known[name]["value"], default="")
    return best, known.get(best)


def beyond_map(entry: dict, other: dict) -> dict:
    """{number: Estimate}: what a map's headline numbers are above another's, paired. Both: of evaluate_maps."""
    pairs = {number: (value, headline_estimates(other)[number]) for number, value in headline_estimates(entry).items()}
    return {number: metrics.difference(*pair) for number, pair in pairs.items() if all(pair)}


def beyond_parts(combined: dict, parts: dict) -> dict:
    """What a combined score's AUROC is above each part's, paired: {name: Estimate}. All: of evaluate_detection."""
    return {name: metrics.difference(combined["auroc"], part["auroc"]) for name, part in parts.items()}


def name_aurocs(parts: dict) -> dict:
    """Every AUROC of one score by name: "detection", "by_superclass: MI", "lesions_per_record: t_wave", ...

    parts: {name of PARTS: numbers or None}, others are ignored.
    """
    named = headline_estimates(parts)
    for grouping in GROUPINGS:
        for name, value in groups_of(parts, grouping).items():
            named[f"{grouping}: {name}"] = value and value.get("auroc", value)
    return named


def groups_of(parts: dict, grouping: str) -> dict:
    """{group: its Estimate, or {"auroc", "records"}, or None} of a score's parts."""
    detection, localization, lesions = (parts.get(name) or {} for name in PARTS)
    if grouping.startswith(BY_KIND):
        return (lesions.get(grouping.removeprefix(BY_KIND)) or {}).get("by_kind", {})
    groups = detection.get(grouping) or localization.get(grouping) or {}
    return {"macro": groups["macro"], **groups["bands"]} if "bands" in groups else groups


def name_entries(entries: dict) -> dict:
    """{protocol: its AUROCs by name}. entries: as results.json holds them."""
    return {name: name_aurocs(entry) for name, entry in entries.items()}


def group_titles(entries: dict, baselines: dict, grouping: str) -> dict:
    """{name of name_aurocs: title, with the records where they are known} of the groups of a grouping."""
    scores = [*entries.values(), *({part: score} for part, named in baselines.items() for score in named.values())]
    groups = next(filter(None, (groups_of(score, grouping) for score in scores)), {})
    return {f"{grouping}: {name}": f"{group.get('title', name)} ({group['records']} records)"
            if group and "records" in group else KINDS.get(name, name) for name, group in groups.items()}


def headline_estimates(parts: dict) -> dict:
    """{key of HEADLINES: Estimate or None} of one score."""
    named = {"detection": (parts.get("detection") or {}).get("auroc")}
    for part in PARTS[1:]:
        for measure in ("pooled", *PLACES):
            value = (parts.get(part) or {}).get(measure)
            named[f"{part}_{measure}"] = value and value.get("auroc", value)
    return named


def average_runs(runs: list) -> dict:
    """Mean and standard deviation (n - 1) of each headline number over runs: {protocol: {number: {"mean", "sd"}}}.

    runs: a dict {protocol: of evaluate} a checkpoint; counted are the protocols that all of them have.
    """
    averaged = {}
    for protocol in [name for name in runs[0] if all(name in run for run in runs)]:
        values = {number: [run[protocol][number] for run in runs] for number in HEADLINES.values()}
        averaged[protocol] = {number: {"mean": float(np.mean(of_runs)), "sd": float(np.std(of_runs, ddof=1))}
                              for number, of_runs in values.items() if None not in of_runs}
    return averaged
