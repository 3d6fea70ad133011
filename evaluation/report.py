"""From scores to the report: results.json, detection_scores.csv, localization maps, the printed table.

Everything here comes from the scores and the truth, never from the model, so that saved scores make the same report
again (test.py --from_results). The numbers are evaluation.py's, the drawing is figures.py's.
"""
import csv
import functools
import hashlib
import io
import json
import operator
from pathlib import Path

import numpy as np

from evaluation import figures
from evaluation import metrics
from ecg.arrays import EXCLUDED, fingerprint, load_npy
from evaluation.trivial import MEDIAN_BEAT
from dataloader import crop_global
from evaluation.numbers import TRIVIAL, Benchmark, headline_estimates
from utils import UserError, pack_json, sha256_of, write_together

SCORES_FILE, RESULTS_FILE, EXAMPLES_FILE = "detection_scores.csv", "results.json", "examples.npz"
FACTS = {"split": str, "ecg_id": str, "label": int, "superclasses": str, "statements": str}  # columns beside the scores
TITLES = {"detection": "detection", "localization_pooled": "localization, pooled",
          "localization_per_record": "loc., per record", "localization_phase_matched": "loc., phase-matched"}
POINTS = {"sensitivity_90": "90 % sensitivity", "youden": "largest sensitivity + specificity"}


def maps_path(folder, protocol: str) -> Path:
    """Where the localization maps of a protocol are kept, (records, 4800, leads) float32."""
    return Path(folder) / f"localization_maps_{protocol}.npy"


def detection_table(splits: list, scores: dict) -> dict:
    """The columns of detection_scores.csv: FACTS of every record of the splits, then a column a score.

    splits: each with name, labels (N,) and records (columns of its table, or None); scores: {column: list of (N,)}.
    """
    table = {name: [] for name in FACTS}
    for split in splits:
        known, unknown = split.records or {}, [""] * len(split.labels)
        table["split"] += [split.name] * len(split.labels)
        table["label"] += split.labels.astype(int).tolist()
        for name in ("ecg_id", "superclasses", "statements"):
            table[name] += [str(value) for value in known.get(name, unknown)]
    return {**{name: np.array(column) for name, column in table.items()},
            **{name: np.concatenate(parts) for name, parts in scores.items()}}


def pack_table(table: dict) -> bytes:
    """detection_scores.csv: a row a record, the first columns FACTS; scores in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(column.tolist() for column in table.values())))
    return text.getvalue().encode()


def read_table(folder, sha256: str) -> dict:
    """Read detection_scores.csv back. Raises UserError where it is not the one that results.json was written with."""
    path = Path(folder) / SCORES_FILE
    try:
        if sha256_of(path) != sha256:
            raise ValueError("not the one of results.json")
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        table = {name: np.array([FACTS.get(name, float)(row[name]) for row in rows]) for name in rows[0]}
        scores = [column for name, column in table.items() if name not in FACTS]
        if not set(FACTS) < set(table) or not all(np.isfinite(column).all() for column in scores):
            raise ValueError("columns are missing, or scores not finite")
        of_test = table["label"][table["split"] == "test"]
        if set(of_test.tolist()) != {0, 1}:
            raise ValueError("the test records are not normal and abnormal ones")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name a folder that test.py wrote with --from_results") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
        raise UserError(f"{path} is not a readable table of scores ({str(error)[:80]}); make it again with test.py"
                        ) from error
    return table


def read_results(folder) -> dict:
    """Read results.json back. Raises UserError where it is not a report of one checkpoint, or of several ("runs")."""
    path = Path(folder) / RESULTS_FILE
    try:
        results = json.loads(path.read_text())
        if "runs" not in results and not {"scores", "maps", "examples", "arrays", "checkpoint"} <= set(results):
            raise ValueError("not a report of test.py")
        return results
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name a folder that test.py wrote with --from_results") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable report ({str(error)[:80]}); make it again with test.py") from error


def show(value: dict | None) -> str:
    """An estimate as text."""
    if value is None:
        return "-"
    return f"{value['value']:.4f}" + (f" [{value['low']:.3f}, {value['high']:.3f}]" if value["low"] is not None else "")


def is_result(beyond: dict | None) -> bool:
    """Whether a number is a result: the paired interval of its difference to the best trivial score is above 0."""
    return bool(beyond) and beyond["difference"]["low"] is not None and beyond["difference"]["low"] > 0


def judge(beyond: dict | None) -> str:
    """A comparison with the best trivial score as text."""
    if beyond is None:
        return ""
    gap = beyond["difference"]
    if gap["low"] is None:
        verdict, interval = "too few records to say", ""
    else:
        verdict = ("better" if is_result(beyond) else "WORSE: NOT A RESULT" if gap["high"] < 0 else
                   "not shown to be better: NOT A RESULT")
        interval = f" [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    return f"{gap['value']:+.4f}{interval} beyond {beyond['rival']} ({beyond['value']['value']:.4f}), {verdict}"


def print_table(entries: dict, baselines: dict):
    """Print the AUROCs with their intervals, a row a protocol and a trivial score, and what is beyond the trivial.

    A star marks those that are results.
    """
    lines = {name: headline_estimates(entry["detection"], entry["localization"]) for name, entry in entries.items()}
    lines |= {f"{TRIVIAL}{name}": headline_estimates(found, None) for name, found in baselines["detection"].items()}
    lines |= {f"{TRIVIAL}{name}": headline_estimates(None, found)
              for name, found in baselines.get("localization", {}).items()}
    print(f"\n{'AUROC [95 % interval]':<32}" + "".join(f"{title:>24}" for title in TITLES.values()))
    for name, values in lines.items():
        beyond = entries[name]["beyond_trivial"] if name in entries else {}
        print(f"{name:<32}" + "".join(f"{show(values[number]) + '*' * is_result(beyond.get(number)):>24}"
                                      for number in TITLES))
    print("* a result: the interval of the paired difference to the best trivial score is above 0\n"
          "published numbers compare with detection and with localization, pooled, under paper\n\n"
          "less the best trivial score on the same records [95 % interval of the paired difference]")
    for name, entry in entries.items():
        for number, title in TITLES.items():
            if number in entry["beyond_trivial"]:
                print(f"  {name}, {title}: {judge(entry['beyond_trivial'][number])}")


def print_gains(beyond: dict):
    """Print what calibration gains and loses. beyond: "beyond_clean" of its entry."""
    print("\ncalibrated less clean, the same weights and records [95 % interval of the paired difference]")
    for number, gap in beyond.items():
        interval = "" if gap["low"] is None else f" [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        verdict = "" if gap["low"] is None else " gain" * (gap["low"] > 0) + " LOSS" * (gap["high"] < 0)
        print(f"  {TITLES.get(number, number)}: {gap['value']:+.4f}{interval}{verdict}")


def print_details(entries: dict):
    """Print what stands behind the headline: operating points, superclasses, statements, diagnoses, phases, leads."""
    for protocol, entry in entries.items():
        detection, localization, beyond = entry["detection"], entry["localization"] or {}, entry["beyond_trivial"]
        print(f"\n{protocol}: detection")
        for name, point in (detection["operating_points"] or {}).items():
            print(f"  threshold of fold 9, {POINTS[name]}: " + ", ".join(
                f"{measure} {show(point[measure])}" for measure in ("sensitivity", "specificity", "precision", "f1")))
        print_groups(detection["by_superclass"], beyond, "by_superclass")
        print_groups(detection["by_statement"], beyond, "by_statement")
        if localization:
            print(f"{protocol}: localization")
        print_groups(localization.get("by_diagnosis", {}), beyond, "by_diagnosis")
        print_groups(localization.get("phase_matched") or {}, beyond, "phase_matched", "within {} points")
        print_groups(localization.get("by_lead", {}), beyond, "by_lead", "within {}")
    if not any(entry["detection"]["by_superclass"] for entry in entries.values()):
        print("superclasses and statements are skipped: no table beside test.npy tells them")


def print_groups(groups: dict, beyond: dict, kind: str, title: str = "{}"):
    """Print a line a group: its AUROC, and what that is beyond the best trivial score.

    groups: {name: estimate, or {"auroc", "records"}, or None}; beyond: "beyond_trivial"; kind: of the keys in there.
    """
    for name, found in groups.items():
        found = found or {}
        named = "mean over phases" if (kind, name) == ("phase_matched", "mean") else title.format(name)
        text = found.get("title", named) + (f" ({found['records']} records)" if "records" in found else "")
        print(f"  {text}: {show(found.get('auroc', found or None))}; {judge(beyond.get(f'{kind}: {name}'))}")


def print_counts(counts: dict):
    """Say which records stand behind the numbers. counts: of one protocol's entry."""
    print(f"detection: {counts['records']} records, {counts['normal']} normal and {counts['abnormal']} abnormal; "
          f"{counts['without_valid_beat']} without a valid beat are scored on evenly spaced windows")
    if counts["benchmark_records"]:
        print(f"localization: {counts['benchmark_records']} records, "
              f"{counts['benchmark_records_with_both_classes']} of them with points of both kinds; "
              f"{counts['benchmark_without_valid_beat']} without a valid beat")


def print_checkpoint(checkpoint: dict):
    """Say how the weights came about: the protocol's name in the table covers the scoring alone."""
    config = checkpoint["config"]
    if checkpoint["path"] is None:
        print("weights: none, the network is untrained")
        return
    if config is None:
        print("the weights do not say on which records they were trained, nor how their epoch was chosen; operating "
              "points are biased where fold 9 was among them")
        return
    optimistic = {"test": ", the test set: optimistic", "last": ""}.get(config["select"], ", fold 9")
    print(f"weights: trained under {config['protocol']}, epoch {checkpoint['epoch']} of {config['epochs']}, "
          f"chosen by {config['select']}{optimistic}")
    if config["protocol"] == "paper":
        print("fold 9's normals were trained on: operating points chosen there are biased, and so is calibrated, which "
              "was fitted to them")


def print_report(entries: dict, baselines: dict, about: dict):
    """Print the whole report. about: the facts of results.json beside the numbers."""
    print_table(entries, baselines)
    if "beyond_clean" in entries.get("calibrated", {}):
        print_gains(entries["calibrated"]["beyond_clean"])
    print_details(entries)
    print_counts(next(iter(entries.values()))["counts"])
    print_checkpoint(about["checkpoint"])
    if about["data"] and about["data"]["source"]["data_set"] == "simulated":
        print("data: simulated ECGs; these numbers say nothing about patients")


def write_report(output: Path, results: dict, table: dict, maps: dict, examples: dict | None):
    """Write all files of a report, so that a full disk leaves the last one whole: none is renamed before all are there.

    results.json, which names the others, is renamed last; a mixture that a kill leaves does not fit its checksums. A
    file that is already there as it shall be is not written. What else an earlier report left there is removed, its
    figures too. examples: {"protocol", "rows": of choose_examples, "restored", "maps": (n, 4800, leads)}, or None.
    """
    scores = pack_table(table)
    results = {**results, "scores": hashlib.sha256(scores).hexdigest(), "examples": bool(examples),
               "maps": {protocol: fingerprint(found) for protocol, found in maps.items()}}
    if (output / RESULTS_FILE).exists():
        print(f"the earlier report in {output} is replaced")
    contents = {SCORES_FILE: scores, **({EXAMPLES_FILE: pack_examples(examples)} if examples else {}),
                RESULTS_FILE: pack_json(results)}
    changed = {output / name: operator.methodcaller("write", content) for name, content in contents.items()
               if not holds(output / name, content)}
    of_maps = {maps_path(output, protocol): found for protocol, found in maps.items()}
    write_together({path: functools.partial(np.save, arr=found) for path, found in of_maps.items()
                    if not is_of(path, found)} | changed)
    remove_stale(output, {*of_maps, *(output / name for name in contents)})


def holds(path: Path, content: bytes) -> bool:
    """Whether a file is there with this content."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def is_of(path: Path, found: np.ndarray) -> bool:
    """Whether an array is mapped from this very file."""
    return isinstance(found, np.memmap) and path.exists() and path.samefile(found.filename)


def remove_stale(output: Path, kept: set):
    """Remove the files of earlier reports in a folder but for those that are kept."""
    for pattern in (SCORES_FILE, EXAMPLES_FILE, maps_path("", "*").name, *figures.PATTERNS):
        for path in set(output.glob(pattern)) - kept:
            path.unlink()


def pack_examples(examples: dict) -> bytes:
    """examples.npz of write_report's examples."""
    rows, names, titles = zip(*examples["rows"])
    packed = io.BytesIO()
    np.savez_compressed(packed, protocol=examples["protocol"], rows=rows, names=names, titles=titles,
                        restored=examples["restored"], maps=examples["maps"])
    return packed.getvalue()


def read_maps(folder, saved: dict, shape: tuple) -> dict:
    """The localization maps {protocol: (records, 4800, leads)} that results.json names. Raises UserError."""
    maps = {}
    for protocol, identity in saved.items():
        path = maps_path(folder, protocol)
        maps[protocol] = load_npy(path)
        if maps[protocol].shape != shape or fingerprint(maps[protocol]) != identity:
            raise UserError(f"{path} does not hold the maps that {RESULTS_FILE} beside it was written with; score the "
                            "checkpoint again with --save_maps 1")
    return maps


def read_examples(folder) -> dict:
    """The restored examples that write_report kept. Raises UserError."""
    path = Path(folder) / EXAMPLES_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            rows = list(zip(stored["rows"].tolist(), stored["names"].tolist(), stored["titles"].tolist()))
            return {"protocol": str(stored["protocol"]), "rows": rows, "restored": stored["restored"],
                    "maps": stored["maps"]}
    except Exception as error:          # numpy and zipfile raise whatever a damaged file makes them trip over
        raise UserError(f"{path} is not readable ({type(error).__name__}); score the checkpoint again with "
                        "--save_maps 1") from error


def draw_report(output: Path, table: dict, entries: dict, history: list):
    """Draw all but the examples. entries: {protocol: its numbers}; history: rows of history.csv."""
    rows = table["split"] == "test"
    labels, weights = table["label"][rows], metrics.draw_records(int(rows.sum()))
    series = [*entries, *(name for name in table if name.endswith(MEDIAN_BEAT))]
    curves = {name: {**metrics.curves(labels, table[name][rows], weights),
                     **metrics.rank_records(labels, table[name][rows], weights)} for name in series}
    figures.draw_detection_curves(curves, output, float(labels.mean()))
    figures.draw_score_histograms(
        {name: table[name][rows] for name in entries}, labels, output,
        {name: {point: found["threshold"] for point, found in (entry["detection"]["operating_points"] or {}).items()}
         for name, entry in entries.items()})
    for kind, part, title in (("superclass", "detection", "Detection by superclass, against the normals"),
                              ("statement", "detection", "Detection by SCP statement, against the normals"),
                              ("diagnosis", "localization", "Localization by diagnosis"),
                              ("lead", "localization", "Localization by lead")):
        groups, rivals = {}, {}
        for protocol, entry in entries.items():
            for name, found in ((entry[part] or {}).get(f"by_{kind}") or {}).items():
                found = found or {}             # a lead may have points of one kind alone
                label = f"{found.get('title', name)} (n={found['records']})" if "records" in found else name
                groups.setdefault(label, {})[protocol] = found.get("auroc", found or None)
                beyond = entry["beyond_trivial"].get(f"by_{kind}: {name}")
                rivals.setdefault(label, {"best trivial score": beyond["value"]} if beyond else {})
        if groups:
            groups = {label: {**group, **rivals[label]} for label, group in groups.items()}
            figures.draw_group_aurocs(groups, output, f"auroc_by_{kind}", title)
    if history:
        figures.draw_learning_curves(history, output)


def draw_examples(output: Path, benchmark: Benchmark, signals: np.ndarray, examples: dict):
    """Draw the restored examples. signals: the benchmark's (records, 5000, leads)."""
    scale = benchmark.scale
    for (row, name, title), restored, scores in zip(examples["rows"], examples["restored"], examples["maps"]):
        signal = crop_global(signals[row:row + 1])[0]
        if scale is not None:
            low, high = scale["low"][row], scale["high"][row]
            signal, restored = ((values + 1) / 2 * (high - low) + low for values in (signal, restored))
        truth = np.where(benchmark.labels[row] <= 1, benchmark.labels[row], EXCLUDED).astype(np.uint8)
        title = title.replace(";", f", {examples['protocol']} protocol;", 1)
        figures.draw_localization(figures.Example(
            title, "normalised" if scale is None else "mV", benchmark.lead_names, signal, restored, truth, scores),
            output, f"localization_{name}")


def print_average(averaged: dict, number: int):
    """Print the mean and standard deviation over several checkpoints."""
    print(f"\nmean ± standard deviation of {number} checkpoints")
    for protocol, numbers in averaged.items():
        print(f"{protocol:<12}" + ", ".join(f"{name.replace('_', ' ')} {value['mean']:.4f} ± {value['sd']:.4f}"
                                           for name, value in numbers.items()))
