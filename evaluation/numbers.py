"""What scores are worth: every number of the report, from scores and truth alone.

Detection is read off the table of scores (report.py keeps it as detection_scores.csv), localization off maps and the
truth of the benchmark. The measures are those of metrics.py, what is marked in LUDB is ludb.py's to say.
"""
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ecg import ludb
from evaluation import metrics
from dataloader import crop_global

TRIVIAL = "trivial: "                   # what the columns of the baselines' scores begin with
SUPERCLASSES = ("MI", "STTC", "CD", "HYP")
LEAST_RECORDS = 20                      # of a statement, to be reported
PHASES = {name: 1 + place for place, name in enumerate(ludb.PHASES) if name != "PQ"}    # those that are matched
HEADLINES = {"detection": "detection_auroc", "localization_pooled": "localization_auroc_pooled",
             "localization_per_record": "localization_auroc_per_record",
             "localization_phase_matched": "localization_auroc_phase_matched"}      # as results.json names the values
EXAMPLE_DIAGNOSES = 4                   # whose records are drawn, the most frequent ones


@dataclass
class Benchmark:
    """Truth of the localization benchmark, (records, 4800, leads): labels, and phases or None; diagnoses or None.

    scale: "low" and "high" (records, leads), the mV at -1 and 1, or None; names: of the records.
    """
    labels: np.ndarray
    phases: np.ndarray | None
    diagnoses: list | None
    scale: dict | None
    names: list
    lead_names: tuple


def crop_benchmark(labels, details: dict | None, diagnoses, names: list, lead_names) -> Benchmark:
    """The scored part of a benchmark given over all 5000 samples. details: of arrays.load_details, or None."""
    phases = details and details["phases"]
    return Benchmark(np.asarray(crop_global(labels)), None if phases is None else np.asarray(crop_global(phases)),
                     diagnoses, details, names, lead_names)


def group_members(table: dict, rows: np.ndarray) -> tuple:
    """({superclass: (N,) bool}, {statement: (N,) bool}) of the rows, statements with enough abnormal records only."""
    superclasses = [entry.split() for entry in table["superclasses"][rows].tolist()]
    statements = [entry.split() for entry in table["statements"][rows].tolist()]
    abnormal = table["label"][rows] == 1
    counted = Counter(code for codes, counts in zip(statements, abnormal) if counts for code in set(codes))

    def members(entries, codes):
        return {code: np.array([code in held for held in entries]) for code in codes}
    return (members(superclasses, [name for name in SUPERCLASSES if any(name in held for held in superclasses)]),
            members(statements, sorted(code for code, number in counted.items() if number >= LEAST_RECORDS)))


def evaluate_detection(table: dict, column: str) -> dict:
    """All of detection for one score: AUROC, average precision, both groupings, and the operating points that fold 9
    sets, where it was scored."""
    rows, of_validation = table["split"] == "test", table["split"] == "val"
    labels, scores = table["label"][rows], table[column][rows]
    weights = metrics.draw_records(len(labels))
    found = metrics.rank_records(labels, scores, weights)
    for name, members in zip(("by_superclass", "by_statement"), group_members(table, rows)):
        found[name] = metrics.rank_groups(labels, scores, members, weights)
    found["operating_points"] = None
    if len(set(table["label"][of_validation].tolist())) == 2:
        thresholds = metrics.choose_thresholds(table["label"][of_validation], table[column][of_validation])
        found["operating_points"] = {name: metrics.operate(labels, scores, threshold, weights)
                                     for name, threshold in thresholds.items()}
    return found


def evaluate_localization(benchmark: Benchmark, maps: np.ndarray) -> dict:
    """All of localization for one map: pooled, per record, phase-matched, by lead and by diagnosis."""
    ranking = metrics.PointRanking(benchmark.labels, maps, metrics.draw_records(len(maps)))
    found = {"pooled": ranking.pool(measures=tuple(metrics.MEASURES)), "per_record": ranking.average_records(),
             "phase_matched": None}
    if benchmark.phases is not None:
        found["phase_matched"] = ranking.match_phases(benchmark.phases, PHASES)
    found["by_lead"] = {lead: ranking.pool(np.arange(maps.shape[2]) == place)["auroc"]
                        for place, lead in enumerate(benchmark.lead_names)}
    found["by_diagnosis"] = {}
    for rule in ludb.RULES if benchmark.phases is not None and benchmark.diagnoses else ():
        members = np.array([rule in ludb.rules_of(diagnoses) for diagnoses in benchmark.diagnoses])
        if members.any():
            marked = np.stack([ludb.rule_marks(rule, phases, diagnoses)
                               for phases, diagnoses in zip(benchmark.phases, benchmark.diagnoses)])
            chosen = members[:, None, None] & (marked | (benchmark.labels == 0))
            found["by_diagnosis"][rule.key] = {"auroc": ranking.pool(chosen, marked)["auroc"],
                                               "records": int(members.sum()), "title": rule.title}
    return found


def evaluate(table: dict, protocols: list, benchmark: Benchmark | None, maps: dict, baseline_maps: dict) -> tuple:
    """({protocol: its numbers}, {"detection": {baseline: numbers}, "localization": ...}) of saved or fresh scores."""
    entries = {}
    for protocol in protocols:
        found = {"detection": evaluate_detection(table, protocol), "localization": None}
        if benchmark is not None and protocol in maps:
            found["localization"] = evaluate_localization(benchmark, maps[protocol])
        entries[protocol] = {**headline(found), **found}
    baselines = {"detection": {name.removeprefix(TRIVIAL): evaluate_detection(table, name)
                               for name in table if name.startswith(TRIVIAL)}}
    if benchmark is not None:
        baselines["localization"] = {name: evaluate_localization(benchmark, of_name)
                                     for name, of_name in baseline_maps.items()}
    compare(entries, baselines)
    return entries, baselines


def keep_localization(entries: dict, baselines: dict, earlier: dict):
    """Take the localization numbers of an earlier results.json over, where no maps are left to compute them from."""
    for protocol, entry in entries.items():
        kept = earlier[protocol]
        entry["localization"] = kept["localization"]
        entry.update(headline(entry))
        for beyond in ("beyond_trivial", "beyond_clean"):
            if beyond in entry:
                entry[beyond] |= {number: found for number, found in kept.get(beyond, {}).items()
                                  if number not in entry[beyond]}
    if "localization" in earlier["baselines"]:
        baselines["localization"] = earlier["baselines"]["localization"]


def compare(entries: dict, rivals: dict):
    """Add to each protocol "beyond_trivial": each of its AUROCs less the best trivial score's, paired.

    entries: {protocol: its numbers}; rivals: what evaluate() says of the baselines. {number: {"rival", "difference"}},
    number a key of HEADLINES, or a group as in "by_superclass: MI". To calibrated also "beyond_clean".
    """
    trivial = {name: name_aurocs(found, None) for name, found in rivals["detection"].items()}
    trivial |= {name: name_aurocs(None, found) for name, found in rivals.get("localization", {}).items()}
    for entry in entries.values():
        entry["beyond_trivial"] = {}
        for number, value in name_aurocs(entry["detection"], entry["localization"]).items():
            held = {name: found[number] for name, found in trivial.items() if found.get(number)}
            if value and held:
                best = max(held, key=lambda name: held[name]["value"])
                entry["beyond_trivial"][number] = {"rival": best, "value": held[best],
                                                   "difference": metrics.difference(value, held[best])}
    if {"clean", "calibrated"} <= set(entries):
        clean, other = (name_aurocs(entries[name]["detection"], entries[name]["localization"])
                        for name in ("clean", "calibrated"))
        entries["calibrated"]["beyond_clean"] = {number: metrics.difference(value, clean[number])
                                                 for number, value in other.items() if value and clean.get(number)}


def name_aurocs(detection: dict | None, localization: dict | None) -> dict:
    """Every AUROC of one score under the names of compare()."""
    found = headline_estimates(detection, localization)
    for part, grouping in ((detection, "by_superclass"), (detection, "by_statement"), (localization, "by_diagnosis"),
                           (localization, "by_lead"), (localization, "phase_matched")):
        for name, value in ((part or {}).get(grouping) or {}).items():
            found[f"{grouping}: {name}"] = value and value.get("auroc", value)
    return found


def headline(found: dict) -> dict:
    """The AUROCs that the table shows, as plain numbers: {"detection_auroc": ..., "localization_auroc_pooled": ...}."""
    numbers = headline_estimates(found["detection"], found["localization"])
    return {HEADLINES[number]: value and value["value"] for number, value in numbers.items()}


def headline_estimates(detection: dict | None, localization: dict | None) -> dict:
    """{key of HEADLINES: estimate or None} of one score."""
    localization = localization or {"pooled": {"auroc": None}, "per_record": {"auroc": None}, "phase_matched": None}
    return {"detection": detection and detection["auroc"], "localization_pooled": localization["pooled"]["auroc"],
            "localization_per_record": localization["per_record"]["auroc"],
            "localization_phase_matched": (localization["phase_matched"] or {}).get("mean")}


def average_runs(runs: list) -> dict:
    """Mean and standard deviation (n - 1) of each headline number over runs: {protocol: {number: {"mean", "sd"}}}.

    Of the protocols that all runs have.
    """
    averaged = {}
    for protocol in [name for name in runs[0] if all(name in run for run in runs)]:
        averaged[protocol] = {}
        for number, value in headline(runs[0][protocol]).items():
            if value is not None:
                values = [headline(run[protocol])[number] for run in runs]
                averaged[protocol][number] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return averaged


def choose_examples(benchmark: Benchmark, maps: np.ndarray) -> list:
    """The records to draw: the best, the median and the worst of several diagnoses by their own AUROC.

    Returns [(row, name for files, title)]. Without diagnoses all records with points of both kinds are one group.
    """
    own = metrics.PointRanking(benchmark.labels, maps, metrics.draw_records(len(maps), 1)).each_record()[:, 0]
    groups = {"all": ("all records", np.isfinite(own))}
    if benchmark.diagnoses:
        groups = {rule.key: (rule.title, np.isfinite(own) & [rule in ludb.rules_of(held)
                                                             for held in benchmark.diagnoses]) for rule in ludb.RULES}
    frequent = sorted(groups, key=lambda key: -groups[key][1].sum())[:EXAMPLE_DIAGNOSES]
    chosen = []
    for key in frequent:
        title, members = groups[key]
        rows = np.flatnonzero(members)
        rows = rows[np.argsort(-own[rows], kind="stable")]
        for rank, place in (("best", 0), ("median", len(rows) // 2), ("worst", len(rows) - 1)) if len(rows) else ():
            row = int(rows[place])
            others = [rule.title for rule in ludb.rules_of(benchmark.diagnoses[row]) if rule.key != key
                      ] if benchmark.diagnoses else []
            chosen.append((row, f"{key}_{rank}", f"Record {benchmark.names[row]}, {rank} of {len(rows)} with {title}; "
                           f"AUROC of all its marks {own[row]:.2f}"
                           + (f"\nAlso marked: {'; '.join(others)}." if others else "")))
    return chosen
