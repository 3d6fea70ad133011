"""All numbers of a report: each score's own, and what it is worth beside the best score without a network."""
from dataclasses import dataclass

import numpy as np

from dataloader import valid_beats
from evaluation import metrics
from evaluation.detection import Cohort, evaluate_detection, open_cohort
from evaluation.localization import Benchmark, evaluate_localization, open_benchmark

# The AUROCs of the headline, and how results.json names their values.
HEADLINES = {"detection": "detection_auroc", "localization_pooled": "localization_auroc_pooled",
             "localization_per_record": "localization_auroc_per_record",
             "localization_phase_matched": "localization_auroc_phase_matched"}
GROUPINGS = {"within_age_bands": "Detection within age bands (years)",
             "by_superclass": "Detection by superclass, against all normals",
             "by_statement": "Detection by SCP statement, against all normals",
             "by_diagnosis": "Localization by diagnosis", "by_lead": "Localization by lead",
             "phase_matched": "Localization by phase of the beat, points of all records"}


@dataclass
class Truth:
    """What scores are held against. splits: {name: Split}; benchmark: None where there is none."""
    splits: dict
    cohort: Cohort
    benchmark: Benchmark | None


@dataclass
class Scored:
    """What one protocol says. scores: {"test": (records,), "val": ...}; maps: (records, 4800, leads) or None.

    detector: of its R peaks; seconds: {split: how long it took}.
    """
    scores: dict
    maps: np.ndarray | None
    detector: str
    seconds: dict


def open_truth(data_path, splits: dict) -> Truth:
    """The Truth of load_splits' splits."""
    return Truth(splits, open_cohort(splits), open_benchmark(data_path, splits["benchmark"]) if "benchmark" in splits
                 else None)


def evaluate_baselines(truth: Truth, scores: dict, maps: dict) -> dict:
    """{"detection": {name: numbers}, "localization": {name: numbers}} of scores and maps without a network, by name."""
    detection = {name: evaluate_detection(truth.cohort, score) for name, score in scores.items()}
    localization = {name: evaluate_localization(truth.benchmark, one) for name, one in maps.items()}
    return {"detection": detection, **({"localization": localization} if maps else {})}


def evaluate(truth: Truth, scored: Scored, baselines: dict) -> dict:
    """The numbers of one protocol as results.json holds them."""
    detection = evaluate_detection(truth.cohort, scored.scores)
    localization = None if scored.maps is None else evaluate_localization(truth.benchmark, scored.maps)
    headline = headline_estimates(detection, localization)
    return {**{HEADLINES[number]: value and value["value"] for number, value in headline.items()},
            "detection": detection, "localization": localization,
            "beyond_trivial": beyond_trivial(detection, localization, baselines),
            "counts": count_records(truth, scored.detector), "seconds": {
                name: round(scored.seconds[split], 2) if split in scored.seconds else None
                for name, split in (("detection", "test"), ("fold9", "val"), ("localization", "benchmark"))}}


def count_records(truth: Truth, detector: str) -> dict:
    """The records behind the numbers. detector: of the R peaks that they are scored with."""
    test, benchmark = truth.splits["test"], truth.splits.get("benchmark")
    peaks = test.r_peaks[detector]
    counts = {"records": len(test.labels), "patients": len(np.unique(test.patients)),
              "normal": int(np.count_nonzero(test.labels == 0)), "abnormal": int(np.count_nonzero(test.labels == 1)),
              "without_r_peak": sum(not len(positions) for positions in peaks),
              "without_valid_beat": without_valid_beat(peaks),
              "without_age": int(np.count_nonzero(np.isnan(test.table.get("age", np.zeros(0))))),
              "benchmark_records": 0, "benchmark_records_with_both_classes": 0, "benchmark_without_valid_beat": 0}
    if benchmark is None:
        return counts
    both = [bool((labels == 1).any() and (labels == 0).any()) for labels in truth.benchmark.labels]
    return {**counts, "benchmark_records": len(both), "benchmark_records_with_both_classes": sum(both),
            "benchmark_without_valid_beat": without_valid_beat(benchmark.r_peaks[detector])}


def without_valid_beat(r_peaks: list) -> int:
    """How many records are scored on evenly spaced windows, as no beat of theirs is valid."""
    return sum(not valid_beats(positions)[1] for positions in r_peaks)


def beyond_trivial(detection: dict, localization: dict | None, baselines: dict) -> dict:
    """Each AUROC less the best trivial score's on the same records, paired.

    Returns {number: {"rival", "value": the rival's, "difference"}}, number a name of name_aurocs.
    """
    rivals, compared = name_rivals(baselines), {}
    for number, value in name_aurocs(detection, localization).items():
        rival, best = best_rival(rivals, number)
        if value and best:
            compared[number] = {"rival": rival, "value": best, "difference": metrics.difference(value, best)}
    return compared


def name_rivals(baselines: dict) -> dict:
    """{name of a score without a network: its AUROCs by name} of evaluate_baselines."""
    return ({name: name_aurocs(score, None) for name, score in baselines["detection"].items()}
            | {name: name_aurocs(None, score) for name, score in baselines.get("localization", {}).items()})


def best_rival(rivals: dict, number: str) -> tuple:
    """(name, Estimate) of the best of name_rivals for a number; ("", None) where none has it."""
    known = {name: values[number] for name, values in rivals.items() if values.get(number)}
    best = max(known, key=lambda name: known[name]["value"], default="")
    return best, known.get(best)


def beyond_parts(combined: dict, parts: dict) -> dict:
    """What a combined score's AUROC is above each part's, paired: {name: Estimate}. All: of evaluate_detection."""
    return {name: metrics.difference(combined["auroc"], part["auroc"]) for name, part in parts.items()}


def name_aurocs(detection: dict | None, localization: dict | None) -> dict:
    """Every AUROC of one score by name: "detection", "by_superclass: MI", "within_age_bands: macro", ..."""
    named = headline_estimates(detection, localization)
    for grouping in GROUPINGS:
        for name, value in (groups_of(detection, grouping) | groups_of(localization, grouping)).items():
            named[f"{grouping}: {name}"] = value and value.get("auroc", value)
    return named


def groups_of(numbers: dict | None, grouping: str) -> dict:
    """{group: its Estimate, or {"auroc", "records"}, or None} of a score's detection or localization."""
    groups = (numbers or {}).get(grouping) or {}
    return {"macro": groups["macro"], **groups["bands"]} if "bands" in groups else groups


def name_entries(entries: dict) -> dict:
    """{protocol: its AUROCs by name}. entries: as results.json holds them."""
    return {name: name_aurocs(entry["detection"], entry["localization"]) for name, entry in entries.items()}


def group_titles(entries: dict, baselines: dict, grouping: str) -> dict:
    """{name of name_aurocs: title, with the records where they are known} of the groups of a grouping."""
    scores = [entry[part] for entry in entries.values() for part in ("detection", "localization")]
    scores += [score for part in baselines.values() for score in part.values()]
    groups = next(filter(None, (groups_of(score, grouping) for score in scores)), {})
    return {f"{grouping}: {name}": f"{group.get('title', name)} ({group['records']} records)"
            if group and "records" in group else name for name, group in groups.items()}


def headline_estimates(detection: dict | None, localization: dict | None) -> dict:
    """{key of HEADLINES: Estimate or None} of one score."""
    of_maps = localization or {"pooled": {}, "per_record": {}, "phase_matched": None}
    return {"detection": detection and detection["auroc"], "localization_pooled": of_maps["pooled"].get("auroc"),
            "localization_per_record": of_maps["per_record"].get("auroc"),
            "localization_phase_matched": (of_maps["phase_matched"] or {}).get("mean")}


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
