"""All numbers of a report: each score's own, and what it is worth beside the best score that is trivial."""
import numpy as np

from evaluation import metrics
from evaluation.detection import Cohort, evaluate_detection
from evaluation.localization import Benchmark, evaluate_localization

# The AUROCs of the headline, and how results.json names their values.
HEADLINES = {"detection": "detection_auroc", "localization_pooled": "localization_auroc_pooled",
             "localization_per_record": "localization_auroc_per_record",
             "localization_phase_matched": "localization_auroc_phase_matched"}
GROUPINGS = {"detection": ("by_superclass", "by_statement"),
             "localization": ("by_diagnosis", "by_lead", "phase_matched")}


def evaluate_baselines(cohort: Cohort, scores: dict, benchmark: Benchmark | None, maps: dict) -> dict:
    """{"detection": {name: numbers}, "localization": {name: numbers}} of trivial scores and maps, both by name."""
    found = {"detection": {name: evaluate_detection(cohort, score) for name, score in scores.items()}}
    if benchmark is not None:
        found["localization"] = {name: evaluate_localization(benchmark, one) for name, one in maps.items()}
    return found


def evaluate(cohort: Cohort, scores: dict, benchmark: Benchmark | None, maps: np.ndarray | None, baselines: dict
             ) -> dict:
    """The numbers of one protocol as results.json holds them. maps: (records, 4800, leads), None without any."""
    detection = evaluate_detection(cohort, scores)
    localization = None if maps is None else evaluate_localization(benchmark, maps)
    headline = headline_estimates(detection, localization)
    return {**{HEADLINES[number]: value and value["value"] for number, value in headline.items()},
            "detection": detection, "localization": localization,
            "beyond_trivial": beyond_trivial(detection, localization, baselines)}


def beyond_trivial(detection: dict, localization: dict | None, baselines: dict) -> dict:
    """Each AUROC less the best trivial score's on the same records, paired.

    Returns {number: {"rival", "value": the rival's, "difference"}}, number a name of name_aurocs.
    """
    trivial = {name: name_aurocs(found, None) for name, found in baselines["detection"].items()}
    trivial |= {name: name_aurocs(None, found) for name, found in baselines.get("localization", {}).items()}
    compared = {}
    for number, value in name_aurocs(detection, localization).items():
        rivals = {name: found[number] for name, found in trivial.items() if found.get(number)}
        if value and rivals:
            best = max(rivals, key=lambda name: rivals[name]["value"])
            compared[number] = {"rival": best, "value": rivals[best],
                                "difference": metrics.difference(value, rivals[best])}
    return compared


def beyond_parts(combined: dict, parts: dict) -> dict:
    """What a combined score's AUROC is above each part's, paired: {name: Estimate}. All: of evaluate_detection."""
    return {name: metrics.difference(combined["auroc"], part["auroc"]) for name, part in parts.items()}


def name_aurocs(detection: dict | None, localization: dict | None) -> dict:
    """Every AUROC of one score by name: "detection", "by_superclass: MI", "within_age_bands: macro", ..."""
    found = headline_estimates(detection, localization)
    of_ages = (detection or {}).get("within_age_bands")
    if of_ages:
        found |= {f"within_age_bands: {name}": value for name, value in {"macro": of_ages["macro"],
                                                                         **of_ages["bands"]}.items()}
    for part, groupings in ((detection, GROUPINGS["detection"]), (localization, GROUPINGS["localization"])):
        for grouping in groupings:
            for name, value in ((part or {}).get(grouping) or {}).items():
                found[f"{grouping}: {name}"] = value and value.get("auroc", value)
    return found


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
