"""What a reader sees of the numbers: a table on the screen, report.md with all of them, detection_scores.csv."""
import csv
import io

import numpy as np

from evaluation.numbers import best_rival, name_aurocs, name_rivals
from evaluation.provenance import tell_weights

SCORES_FILE, REPORT_FILE, UNUSUAL_FILE = "detection_scores.csv", "report.md", "unusual_measurements.csv"
FACTS = ("split", "ecg_id", "patient_id", "age", "sex", "label", "superclasses", "statements")  # beside the scores
TRIVIAL = "trivial: "                   # what the columns of scores without a network begin with
COLUMNS = {"detection": "detection", "localization_pooled": "localization, pooled",
           "localization_per_record": "loc., per record"}
POINTS = {"sensitivity_90": "90 % sensitivity", "youden": "largest sensitivity + specificity"}
GROUP_TITLES = {"by_superclass": "Detection by superclass, against all normals",
                "by_statement": "Detection by SCP statement, against all normals",
                "within_age_bands": "Detection within age bands (years)",
                "by_diagnosis": "Localization by diagnosis", "by_lead": "Localization by lead",
                "phase_matched": "Localization by phase of the beat, points of all records"}
EACH_ALONE = ("Intervals are of 2,000 resamples of the patients. Each holds with 95 % for its number alone: where many "
              "are compared at once, about one in twenty misses.")
LESS = ("*less* is the paired difference to the best score without a network on the same records, in points of "
        "percent; that score is named.")


def maps_file(protocol: str) -> str:
    """Where the localization maps of a protocol are kept, (records, 4800, leads) float32."""
    return f"localization_maps_{protocol}.npy"


def pack_csv(header, rows) -> bytes:
    """A CSV file; numbers in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def pack_scores(splits: list, scores: dict) -> bytes:
    """detection_scores.csv: a row a record of the splits, FACTS first. scores: {column: {split: (records,)}}."""
    rows = []
    for split in splits:
        known = {**split.table, "split": [split.name] * len(split.labels), "label": split.labels.astype(int)}
        facts = [known.get(name, [""] * len(split.labels)) for name in FACTS]
        rows += zip(*(np.asarray(column).tolist() for column in
                      (*facts, *(score[split.name] for score in scores.values()))))
    return pack_csv((*FACTS, *scores), rows)


def percent(value: dict | None, sign: str = "") -> str:
    """An estimate as text, in percent. sign: "+" for a difference."""
    if value is None:
        return "-"
    low, high = value["low"], value["high"]
    return (f"{100 * value['value']:{sign}.1f}"
            + (f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]" if low is not None else ""))


def print_report(entries: dict, baselines: dict, about: dict):
    """Print the table and what stands behind it. entries, baselines, about: as results.json holds them."""
    print(f"\n{'AUROC, % [95 % interval]':<26}" + "".join(f"{title:<26}" for title in COLUMNS.values()).rstrip())
    for name, entry in entries.items():
        values = name_aurocs(entry["detection"], entry["localization"])
        print(f"{name:<26}" + "".join(f"{percent(values[number]):<26}" for number in COLUMNS).rstrip())
    rivals = name_rivals(baselines)
    best = [best_rival(rivals, number) for number in COLUMNS]
    print(f"{'best without a network':<26}" + "".join(f"{percent(value):<26}" for _, value in best).rstrip())
    print(f"{'':<26}" + "".join(f"{name:<26}" for name, _ in best).rstrip())
    for sentence in tell_counts(about["counts"]) + [tell_weights(about["checkpoint"])] * bool(entries):
        print(sentence)
    if about["data"] and about["data"]["source"]["data_set"] == "simulated":
        print("data: simulated ECGs; these numbers say nothing about patients")


def tell_counts(counts: dict) -> list:
    """Sentences on the records behind the numbers. counts: of results.json."""
    sentences = [f"detection: {counts['records']} records of {counts['patients']} patients, {counts['normal']} normal "
                 f"and {counts['abnormal']} abnormal; {counts['without_valid_beat']} without a valid beat are scored "
                 "on evenly spaced windows"]
    if counts["without_age"]:
        sentences.append(f"age: {counts['without_age']} records without one are in no age band, and score as the mean")
    if counts["benchmark_records"]:
        sentences.append(f"localization: {counts['benchmark_records']} records, "
                         f"{counts['benchmark_records_with_both_classes']} of them with points of both kinds; "
                         f"{counts['benchmark_without_valid_beat']} without a valid beat")
    return sentences


def table(header: list, rows: list) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_markdown(entries: dict, baselines: dict, about: dict, drawn: list) -> str:
    """report.md: every number, with its interval and its difference to the best score without a network.

    entries, baselines, about: as results.json holds them; drawn: names of the figures.
    """
    parts = ["# Report of test.py", headline_table(entries, baselines), EACH_ALONE + " " + LESS,
             "\n".join(f"- {sentence}" for sentence in tell_counts(about["counts"]))]
    if entries:
        parts += [tell_weights(about["checkpoint"]), "## Less the best score without a network", beyond_table(entries)]
    if points := point_rows(entries, baselines):
        parts += ["## Operating points, chosen on fold 9", table(
            ["score", "point", "sensitivity", "specificity", "precision", "F1"], points)]
    for grouping, title in GROUP_TITLES.items():
        if rows := group_rows(entries, baselines, grouping):
            header = [cell for name in entries for cell in (name, "less")]
            parts += [f"## {title}", table(["", "records", *header, "best without a network"], rows)]
    if drawn:
        parts += ["## Figures", "\n\n".join(f"![{name}]({name}.png)\n\n[{name}.pdf]({name}.pdf)" for name in drawn)]
    parts += ["## Provenance", table(["", ""], [[name, about[name]] for name in
                                                ("commit", "device", "amp", "mask_ratio")]
                                     + [[name, version] for name, version in about["versions"].items()])]
    return "\n\n".join(parts) + "\n"


def headline_table(entries: dict, baselines: dict) -> str:
    """The headline AUROCs, average precision and age bands of every protocol and every score without a network."""
    scores = [(name, entry["detection"], entry["localization"]) for name, entry in entries.items()]
    scores += [(TRIVIAL + name, found, None) for name, found in baselines["detection"].items()]
    scores += [(TRIVIAL + name, None, found) for name, found in baselines.get("localization", {}).items()]
    rows = []
    for name, detection, localization in scores:
        values = name_aurocs(detection, localization)
        rows.append([name, percent(values["detection"]), percent(values.get("within_age_bands: macro")),
                     percent(detection and detection["average_precision"]),
                     percent(values["localization_pooled"]), percent(values["localization_per_record"])])
    return table(["AUROC, %", "detection", "within age bands, mean", "average precision", "localization, pooled",
                  "localization, mean per record"], rows)


def beyond_table(entries: dict) -> str:
    """What each protocol's headline numbers are above the best score without a network; and combined above its parts."""
    rows = []
    for name, entry in entries.items():
        for number, title in (*COLUMNS.items(), ("within_age_bands: macro", "detection within age bands, mean")):
            if found := entry["beyond_trivial"].get(number):
                rows.append([name, title, percent(found["difference"], "+"), found["rival"], percent(found["value"])])
        rows += [[name, "detection", percent(gap, "+"), part, ""]
                 for part, gap in entry.get("beyond_parts", {}).items()]
    return table(["protocol", "number", "less", "than", "which has"], rows)


def point_rows(entries: dict, baselines: dict) -> list:
    """A row an operating point of every protocol, and of the best score without a network."""
    best, _ = best_rival(name_rivals(baselines), "detection")
    scores = {name: entry["detection"] for name, entry in entries.items()} | {TRIVIAL + best:
                                                                              baselines["detection"][best]}
    return [[name, POINTS[kind], *(percent(point[measure]) for measure in ("sensitivity", "specificity", "precision",
                                                                           "f1"))]
            for name, found in scores.items() for kind, point in (found["operating_points"] or {}).items()]


def group_rows(entries: dict, baselines: dict, grouping: str) -> list:
    """A row a group: its records, each protocol's AUROC and what that is above the best score without a network."""
    rivals = name_rivals(baselines)
    values = {name: name_aurocs(entry["detection"], entry["localization"]) for name, entry in entries.items()}
    scores = [score for entry in entries.values() for score in (entry["detection"], entry["localization"])]
    scores += [score for part in baselines.values() for score in part.values()]
    groups = next((score[grouping] for score in scores if score and score.get(grouping)), {})
    rows = []
    for number in dict.fromkeys(number for of in (*values.values(), *rivals.values()) for number in of):
        kind, _, name = number.partition(": ")
        if kind == grouping:
            facts = groups.get(name) or {}
            cells = [cell for protocol, of in values.items() for cell in (percent(of.get(number)), percent(
                entries[protocol]["beyond_trivial"].get(number, {}).get("difference"), "+"))]
            rival, value = best_rival(rivals, number)
            rows.append([facts.get("title", name), facts.get("records", ""), *cells, f"{percent(value)} {rival}"])
    return rows
