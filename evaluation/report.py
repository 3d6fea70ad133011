"""What a reader sees of the numbers: a table on the screen, report.md with all of them, detection_scores.csv."""
import numpy as np

from evaluation.drawing import figure_names
from evaluation.numbers import GROUPINGS, HEADLINES, best_rival, group_titles, name_entries, name_rivals
from evaluation.provenance import tell_counts, tell_weights
from utils import pack_csv

SCORES_FILE, REPORT_FILE, UNUSUAL_FILE = "detection_scores.csv", "report.md", "unusual_measurements.csv"
FACTS = ("split", "ecg_id", "patient_id", "age", "sex", "label", "superclasses", "statements")  # beside the scores
TRIVIAL = "trivial: "                   # what the columns of scores without a network begin with
COLUMNS = {"detection": "detection", "within_age_bands: macro": "within age bands",
           "localization_pooled": "localization, pooled", "localization_per_record": "loc., per record"}
HOW_NAMED = ("without network: several maps together; network: of ckpt/restorer.pt, not the paper's; best without a "
             "network: the best single map")
OF_LESIONS = {"lesions_within_record_and_phase": "lead of wave", "lesions_within_record_and_lead": "moment of lead",
              "lesions_per_record": "per record", "lesions_pooled": "pooled"}
ON_BENCHMARK = {"localization_pooled": "pooled", "localization_per_record": "per record",
                "localization_within_record_and_phase": "lead of wave",
                "localization_within_record_and_lead": "moment of lead"}
COMBINATION = "without network"         # the map of several without a network, in results.json's "maps"
POINTS = {"sensitivity_90": "90 % sensitivity", "youden": "largest sensitivity + specificity"}
HOW_SURE = ("AUROC in percent. Intervals are of 2,000 resamples of the patients; each holds with 95 % for its number "
            "alone: where many are compared at once, about one in twenty misses. *less*: the paired difference to the "
            "best score without a network on the same records, which stands in the last column.")
HOW_PLACED = ("*Lesions* are implanted in normal ECGs, one in each, so the truth is exact (ecg/lesions.py). *Lead "
              "of wave* (within record and phase): a marked point is held against the points of the same record "
              "and wave in leads where this wave is not marked; where all are, it is not asked. *Moment of lead* "
              "(within record and lead): against those of the same record and lead. A map that is constant in a "
              "record has 50 % there. Both, and *per record*, are means over the kinds of lesion; *pooled* is over"
              " all points of all records, those without a lesion too. The rival is the best single map without a "
              f"network, one for the mean over kinds, another for each kind in the tables by kind. *{COMBINATION}* "
              "is several of them together; the maps with a network use one of their own (scoring/maps.py), not "
              "the checkpoint. Protocols that score every beat by itself leave the lesions out: it would take many"
              " times as long.")
RULES_MARK = ("The marks of LUDB's benchmark are rules: they mark whole waves, in many leads at once, from a "
              "diagnosis. So pooled and per record tell which record and which wave more than which place. *Lead "
              "of wave* asks for the place, and only records with a marked and an unmarked lead of a wave can "
              "answer. Maps of no protocol are ranked at every fifth sample.")


def maps_file(protocol: str) -> str:
    """The file of the localization maps of a protocol, (records, 4800, leads) float32."""
    return f"localization_maps_{protocol}.npy"


def file_names(protocols, with_figures: bool) -> list:
    """The name of every file that a report may have beside results.json. protocols: whose maps are written."""
    drawings = [f"{name}.{kind}" for name in figure_names() for kind in ("png", "pdf")] + [UNUSUAL_FILE]
    return [SCORES_FILE, REPORT_FILE, *map(maps_file, protocols), *drawings * with_figures]


def pack_scores(splits: dict, scores: dict) -> bytes:
    """detection_scores.csv: a row a record of test and fold 9, FACTS first. scores: {column: {split: (records,)}}."""
    rows = []
    for split in (splits[name] for name in ("test", "val") if name in splits):
        known = {**split.table, "split": [split.name] * len(split.labels), "label": split.labels.astype(int)}
        columns = [known.get(name, [""] * len(split.labels)) for name in FACTS]
        columns += [score[split.name] for score in scores.values()]
        rows += zip(*(np.asarray(column).tolist() for column in columns))
    return pack_csv((*FACTS, *scores), rows)


def percent(value: dict | None, sign: str = "") -> str:
    """An estimate as text, in percent. sign: "+" for a difference."""
    if value is None:
        return "-"
    numbers = [f"{100 * value[key]:{sign}.1f}" for key in ("value", "low", "high") if value[key] is not None]
    return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if numbers[1:] else "")


def print_report(entries: dict, baselines: dict, maps: dict, about: dict):
    """Print the tables and what stands behind them. baselines, maps, about: as results.json holds them."""
    tables = {"AUROC, % [95 % interval]": (entries, COLUMNS)}
    if "lesions" in baselines:
        tables["implanted lesions"] = having({**entries, **maps}, OF_LESIONS), OF_LESIONS
    for title, (rows, columns) in tables.items():
        best = [best_rival(name_rivals(baselines), number) for number in columns]
        lines = {title: columns.values()}
        lines |= {name: [percent(values.get(number)) for number in columns] for name, values in
                  name_entries(rows).items()}
        lines |= {"best without a network": [percent(value) for _, value in best], "": [name for name, _ in best]}
        print()
        for name, cells in lines.items():
            print(f"{name:<26}" + "".join(f"{cell:<22} " for cell in cells).rstrip())
    if "lesions" in baselines:
        print(HOW_NAMED)
    print("\n".join(tell_origin(entries, about)))


def tell_origin(entries: dict, about: dict) -> list:
    """Sentences on the records and the weights behind the numbers. about: as results.json holds it."""
    sentences = tell_counts(about["counts"])
    if entries:
        sentences.append(tell_weights(about["checkpoint"], fold9_is_scored="val" in about["arrays"]))
    if about["data"] and about["data"]["source"]["data_set"] == "simulated":
        sentences.append("data: simulated ECGs; these numbers say nothing about patients")
    return sentences


def having(entries: dict, numbers) -> dict:
    """Those of the entries that have one of these numbers, by names of name_aurocs."""
    values = name_entries(entries)
    return {name: entry for name, entry in entries.items() if any(values[name].get(number) for number in numbers)}


def table(header: list, rows: list) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_markdown(entries: dict, baselines: dict, maps: dict, about: dict, drawings: list) -> str:
    """report.md: every number, with its interval and its difference to the best score without a network.

    baselines, maps, about: as results.json holds them; drawings: names of the figures.
    """
    parts = ["# Report of test.py", number_table(entries, baselines, COLUMNS), HOW_SURE]
    parts += [f"{name} less {part}, detection: {percent(gap, '+')}" for name, entry in entries.items()
              for part, gap in entry.get("beyond_parts", {}).items()]
    parts += tell_origin(entries, about)
    if "lesions" in baselines:
        parts += ["## Implanted lesions", number_table({**entries, **maps}, baselines, OF_LESIONS), HOW_PLACED]
        parts += [f"{name} less {COMBINATION}, {OF_LESIONS[number]}: {percent(gap, '+')}"
                  for name, entry in maps.items()
                  for number, gap in entry.get("beyond_without_network", {}).items() if number in OF_LESIONS]
        parts += [rival_table(baselines, OF_LESIONS)]
    if "localization" in baselines:
        parts += ["## Localization in the benchmark", number_table({**entries, **maps}, baselines, ON_BENCHMARK)]
        parts += [HOW_NAMED] * bool(maps)
        parts += [RULES_MARK] * any(one["by_diagnosis"] for one in baselines["localization"].values())
        parts += [rival_table(baselines, ON_BENCHMARK)]
    parts += ["## Detection without a network", rival_table(baselines, {number: title for number, title in
                                                                        COLUMNS.items() if number not in ON_BENCHMARK})]
    if points := point_rows(entries, baselines):
        parts += ["## Operating points, chosen on fold 9",
                  table(["score", "point", "sensitivity", "specificity", "precision", "F1"], points)]
    for grouping, title in GROUPINGS.items():
        if groups := group_titles(entries, baselines, grouping):
            parts += [f"## {title}", number_table({**entries, **maps}, baselines, groups)]
    if drawings:
        parts += ["## Figures", *(f"[![{name}]({name}.png)]({name}.pdf)" for name in drawings)]
    facts = {name: about[name] for name in ("commit", "device", "amp", "mask_ratio")} | about["versions"]
    return "\n\n".join([*parts, "## Provenance", table(["", ""], facts.items())]) + "\n"


def number_table(entries: dict, baselines: dict, titles: dict) -> str:
    """A row a number of name_aurocs: what each entry has, and what that is above the best score without a network.

    titles: {number: what the row is called}; an entry that has none of these numbers is left out.
    """
    rivals, rows, entries = name_rivals(baselines), [], having(entries, titles)
    for number, title in titles.items():
        rival, value = best_rival(rivals, number)
        cells = [cell for name, values in name_entries(entries).items() for cell in (
            percent(values.get(number)),
            percent(entries[name]["beyond_trivial"].get(number, {}).get("difference"), "+"))]
        rows.append([title, *cells, f"{percent(value)} {rival}"])
    return table(["", *(cell for name in entries for cell in (name, "less")), "best without a network"], rows)


def rival_table(baselines: dict, titles: dict) -> str:
    """A row a score or map without a network that has one of the numbers. titles: {number: title of its column}."""
    return table(["without a network", *titles.values()], [
        [name, *(percent(values.get(number)) for number in titles)]
        for name, values in name_rivals(baselines).items() if any(values.get(number) for number in titles)])


def point_rows(entries: dict, baselines: dict) -> list:
    """A row an operating point of every protocol, and of the best score without a network."""
    best, _ = best_rival(name_rivals(baselines), "detection")
    scores = {name: entry["detection"] for name, entry in entries.items()}
    scores[TRIVIAL + best] = baselines["detection"][best]
    return [[name, POINTS[kind],
             *(percent(point[measure]) for measure in ("sensitivity", "specificity", "precision", "f1"))]
            for name, score in scores.items() for kind, point in (score["operating_points"] or {}).items()]


def average_table(averaged: dict, names: list) -> str:
    """The mean and standard deviation over several checkpoints, whose reports are in the folders names."""
    numbers = {number: title for number, title in COLUMNS.items() if number in HEADLINES}
    rows = [[protocol, *("{mean:.1%} ± {sd:.1%}".format(**values[HEADLINES[number]]).replace("%", "")
                         if HEADLINES[number] in values else "-" for number in numbers)]
            for protocol, values in averaged.items()]
    header = [f"AUROC, %, mean ± standard deviation of {len(names)} checkpoints", *numbers.values()]
    return table(header, rows) + "\n\n" + "\n".join(f"- [{name}]({name}/{REPORT_FILE})" for name in names) + "\n"
