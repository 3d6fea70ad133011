"""Score a checkpoint: detection on the test set, localization on the benchmark, under every protocol.

    python test.py --data_path ./data/ --load_model 1 --load_path ./ckpt/mymodel.pt           # as published
    python test.py --load_path ./ckpt/mymodel.pt --figures 1 --save_maps 1 --output_dir results/mymodel
    python test.py --load_path ckpt/seed0/model.pt ckpt/seed1/model.pt ckpt/seed2/model.pt    # mean and deviation
    python test.py --from_results results/mymodel --figures 1                  # all again, from the saved scores alone
    python test.py --load_path ./ckpt/mymodel.pt --record one.hea two.csv      # recordings of one's own

Prints the AUROCs with their intervals and writes results.json, detection_scores.csv and, with --save_maps 1, the
localization maps. Where fold 9 is there it is scored too, and sets the operating points.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evaluation import trivial
import calibration
from evaluation import numbers
import parallel
from evaluation import recordings
from scoring import percentiles
from evaluation import report
from scoring import passes
from ecg.arrays import (SIGNAL_FILES, VALIDATION_FOLD, details_path, iterate_rows, load_details, load_r_peaks, load_records,
                    open_signals, read_rows, signal_path)
from dataloader import crop_global
from model import HISTORY, MCF, load_checkpoint
from numbers.splits import Split, describe_data, identity_of, load_split, load_splits, open_benchmark
from utils import (UserError, add_published_flags, check_published_flags, choose_device, git_commit,
                   require_writable, run, save_json, sha256_of, versions)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--load_model", type=int, choices=(0, 1), default=1, help="0: score an untrained network")
    published.add_argument("--load_path", nargs="+", default=["./ckpt/mymodel.pt"],
                           help="checkpoint, or several of them (default ./ckpt/mymodel.pt)")
    reporting = parser.add_argument_group("report")
    reporting.add_argument("--protocol", choices=(*passes.PROTOCOLS, "both", "all"), default="all", help="which "
                           "evaluation; both: paper and clean (default %(default)s)")
    reporting.add_argument("--output_dir", help="folder of the report (default results/, or that of --from_results)")
    reporting.add_argument("--save_maps", type=int, choices=(0, 1), default=0,
                           help="write localization_maps_<protocol>.npy, (records, 4800, leads) float32")
    reporting.add_argument("--figures", type=int, choices=(0, 1), default=0, help="draw the figures, PNG and PDF")
    reporting.add_argument("--fold9", type=int, choices=(0, 1), default=1, help="0: leave fold 9 out, and with it the "
                           "operating points; saves half the time")
    reporting.add_argument("--from_results", metavar="DIR", help="make the report again from the scores and maps saved "
                           "in DIR, with --figures and the benchmark of --data_path; no network is run, and no other "
                           "flag matters")
    recordings.add_flags(parser)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16, "
                         "faster and less exact (default off: float32)")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    arguments.output_dir = arguments.output_dir or arguments.from_results or "results/"
    return arguments


def load_model(arguments, path) -> tuple:
    """(the network to score, on the CPU; its calibration or None; what the report says of it). Raises UserError."""
    if not arguments.load_model:
        print("--load_model 0: an untrained network is scored; its numbers only show that the pipeline runs.")
        torch.manual_seed(arguments.seed)
        return MCF(arguments.dims, arguments.hidden), None, {"path": None, "sha256": None, **known_facts({})}
    model, facts = load_checkpoint(path)
    for flag, held in (("dims", model.leads), ("hidden", model.hidden)):
        if getattr(arguments, flag) != held:
            raise UserError(f"{path} was trained with --{flag} {held}, not {getattr(arguments, flag)}; "
                            f"set --{flag} {held}, or name another checkpoint")
    fitted = percentiles.read_calibration(path, facts, arguments.mask_ratio, model.leads, arguments.protocol)
    return model, fitted, {"path": str(path), "sha256": sha256_of(path), **known_facts(facts)}


def known_facts(facts: dict) -> dict:
    """Epoch, config and history of a checkpoint where train.py wrote them; of another origin they are unknown."""
    config, history = facts.get("config"), facts.get("history")
    try:
        json.dumps([facts.get("epoch"), config, history], allow_nan=False)
    except (TypeError, ValueError):
        return {"epoch": None, "config": None, "history": []}
    if not (isinstance(config, dict) and {"protocol", "epochs", "select"} <= set(config)):
        config = None
    if not (isinstance(history, list) and all(isinstance(row, dict) and set(HISTORY) <= set(row) for row in history)):
        history = []
    return {"epoch": facts.get("epoch"), "config": config, "history": history}


def run_passes(model: MCF, passes: str, splits: dict, with_profiles: bool, arguments, device) -> tuple:
    """What a protocol's passes say of each split, {name: passes.Scores}, and their seconds, {name: seconds}."""
    found, seconds = {}, {}
    for name, split in splits.items():
        started = time.perf_counter()
        signals = split.signals if model.lead_scale is None else split.require_millivolts()
        found[name] = passes.score_split(model, signals, split.r_peaks, passes, arguments.mask_ratio, device, name,
                                          with_maps=name == "benchmark", amp=arguments.amp,
                                          with_profiles=with_profiles)
        seconds[name] = time.perf_counter() - started
    return found, seconds


def calibrate(fitted: dict, found: dict, seconds: dict, splits: dict) -> tuple:
    """run_passes' two dicts under "calibrated", from what clean's passes found."""
    judged, taken = {}, {}
    for name, split in splits.items():
        started, signals = time.perf_counter(), split.millivolts()
        if signals is None:
            print(f"calibrated leaves amplitude out on {SIGNAL_FILES[name]}: nothing beside it tells the mV")
        scores = calibration.score_records(fitted, calibration.features(found[name].profiles, signals))
        maps = found[name].maps
        if maps is not None:
            maps = calibration.unusual_maps(fitted, maps, passes.beat_phases(split.r_peaks), scores)
        judged[name] = replace(found[name], scores=percentiles.hold_out(fitted, name, split.signals, scores), maps=maps)
        taken[name] = seconds[name] + time.perf_counter() - started
    return judged, taken


def describe_scores(found: dict, seconds: dict, splits: dict) -> dict:
    """The counts and seconds that results.json says of a protocol."""
    labels = splits["test"].labels
    counts = {"records": len(labels), "normal": int(np.count_nonzero(labels == 0)),
              "abnormal": int(np.count_nonzero(labels == 1)), "without_r_peak": found["test"].without_r_peak,
              "without_valid_beat": found["test"].without_valid_beat, "benchmark_records": 0,
              "benchmark_records_with_both_classes": 0, "benchmark_without_valid_beat": 0}
    if "benchmark" in splits:
        truth = crop_global(splits["benchmark"].labels)
        counts.update(benchmark_records=len(truth),
                      benchmark_without_valid_beat=found["benchmark"].without_valid_beat,
                      benchmark_records_with_both_classes=sum(bool((row == 1).any() and (row == 0).any())
                                                              for row in truth))
    taken = {name: round(value, 2) for name, value in seconds.items()}
    return {"counts": counts, "seconds": {"detection": taken["test"], "fold9": taken.get("val"),
                                          "localization": taken.get("benchmark")}}


def score_baselines(arguments, splits: dict) -> dict:
    """The columns of the trivial scores, {name: one array a split of records}."""
    of_records = [split for split in splits.values() if split.name != "benchmark"]
    found = [trivial.detection_baselines(split.rows(), split.r_peaks) for split in of_records]
    columns = {name: [part[name] for part in found] for name in found[0]}
    if (fitted := fit_median_beats(arguments)) is not None:
        columns[trivial.MEDIAN_BEAT] = [trivial.score_median_beats(fitted, split.rows(), split.r_peaks)
                                          for split in of_records]
    return {numbers.TRIVIAL + name: parts for name, parts in columns.items()}


def fit_median_beats(arguments):
    """The median beat baseline, fitted to the normals of folds 1-8; None, with a word why, where that cannot be."""
    reason = f"no {SIGNAL_FILES['train']}"
    if signal_path(arguments.data_path, "train").exists():
        normals = open_signals(arguments.data_path, "train", arguments.dims)
        scale = load_details(arguments.data_path, "train", normals)
        records = load_records(arguments.data_path, "train", normals)
        rows = np.arange(len(normals)) if records is None else np.flatnonzero(records["fold"] != VALIDATION_FOLD)
        if scale is not None and len(rows) > trivial.COMPONENTS:
            r_peaks = load_r_peaks(arguments.data_path, "train", normals)
            return trivial.fit_median_beats(iterate_rows(normals, SIGNAL_FILES["train"], rows), scale, r_peaks, rows)
        reason = (f"no {details_path('', 'train')}, their scale in mV," if scale is None else
                  f"too few records in {SIGNAL_FILES['train']}")
    print(f"the baseline '{trivial.MEDIAN_BEAT}' is skipped: {reason} in {arguments.data_path}; make the arrays with "
          "preprocess.py.")
    return None


def score_checkpoint(arguments, loaded: tuple, splits: dict, benchmark, trivial: dict, about: dict, device):
    """Score what load_model gave, report into arguments.output_dir; returns the entries (the first process alone)."""
    model, fitted, checkpoint = loaded
    model.to(device).eval()
    entries, columns, maps, passed = {}, {}, {}, {}
    protocols = percentiles.choose_protocols(arguments.protocol, model, fitted)
    for protocol in protocols:
        passes = passes.PASSES[protocol]
        if passes not in passed:                    # clean and calibrated share theirs
            with_profiles = passes == "clean" and "calibrated" in protocols
            passed[passes] = run_passes(model, passes, splits, with_profiles, arguments, device)
        found, seconds = passed[passes]
        if protocol == "calibrated":
            found, seconds = calibrate(fitted, found, seconds, splits)
        columns[protocol] = [found[name].scores for name in splits if name != "benchmark"]
        entries[protocol] = describe_scores(found, seconds, splits)
        if "benchmark" in found:
            maps[protocol] = found["benchmark"].maps
    if parallel.RANK:
        return None
    table = report.detection_table([split for split in splits.values() if split.name != "benchmark"],
                                   {**columns, **trivial})
    examples = None
    if maps and (arguments.save_maps or arguments.figures):
        protocol = list(maps)[-1]
        if rows := numbers.choose_examples(benchmark, maps[protocol]):
            places = [row for row, *_ in rows]
            examples = {"protocol": protocol, "rows": rows, "maps": maps[protocol][places], "restored":
                        restore_examples(model, splits["benchmark"], places, protocol, arguments, device)}
    return make_report(arguments, table, entries, splits.get("benchmark"), benchmark, maps, examples,
                       {**about, "checkpoint": checkpoint})


def restore_examples(model: MCF, split: Split, rows: list, protocol: str, arguments, device) -> np.ndarray:
    """The rows of the benchmark that are drawn, as the network restores them: (rows, 4800, leads)."""
    signals = split.signals if model.lead_scale is None else split.require_millivolts()
    restored = passes.restore_records(model, read_rows(signals, np.array(rows), SIGNAL_FILES[split.name]),
                                       [split.r_peaks[row] for row in rows], protocol, arguments.mask_ratio, device)
    if model.lead_scale is not None:                # to the unit of benchmark_data.npy: the figures undo it
        low, high = (split.details[name][rows][:, None] for name in ("low", "high"))
        restored = 2 * (restored - low) / np.maximum(high - low, 1e-9) - 1
    return restored


def make_report(arguments, table: dict, entries: dict, split: Split | None, benchmark, maps: dict, examples,
                about: dict, earlier: dict | None = None) -> dict:
    """Evaluate, print, write and draw, from fresh scores or saved ones; returns the entries of results.json.

    entries: {protocol: its counts and seconds}; maps: {protocol: (records, 4800, leads)}; examples: of write_report;
    earlier: results.json whose localization numbers are kept, as no maps tell them any more.
    """
    rivals = trivial.localization_baselines(split.rows(), split.r_peaks) if maps else {}
    found, of_baselines = numbers.evaluate(table, list(entries), benchmark if maps else None, maps, rivals)
    if earlier:
        numbers.keep_localization(found, of_baselines, earlier)
    entries = {protocol: {**found[protocol], **facts} for protocol, facts in entries.items()}
    output = Path(arguments.output_dir)
    report.write_report(output, {**entries, "baselines": of_baselines, **about}, table,
                        maps if arguments.save_maps else {}, examples)
    report.print_report(entries, of_baselines, about)
    if arguments.figures:
        report.draw_report(output, table, entries, about["checkpoint"]["history"])
        if examples:
            report.draw_examples(output, benchmark, split.signals, examples)
    print(f"written to {output}")
    return entries


def report_again(arguments, folder: Path) -> dict:
    """--from_results: the report of one checkpoint's saved scores, as it would be made today. Raises UserError."""
    results = report.read_results(folder)
    table = report.read_table(folder, results.get("scores"))
    protocols = [name for name in passes.PROTOCOLS if name in results]
    split, benchmark, maps = None, None, {}
    if results["maps"] or (arguments.figures and results["examples"]):
        split = load_split(arguments, "benchmark")
        benchmark = open_benchmark(arguments, split)
        if identity_of(split) != results["arrays"]["benchmark"]:
            raise UserError(f"the benchmark in {arguments.data_path} or its labels are not those that {folder} was "
                            "scored on; name their folder with --data_path, or score the checkpoint again")
        maps = report.read_maps(folder, results["maps"], benchmark.labels.shape)
    examples = report.read_examples(folder) if results["examples"] else None
    if "benchmark" in results["arrays"] and not maps:
        print(f"{folder} keeps no maps (--save_maps 1): its localization numbers stay as they were")
    known = (*protocols, "baselines", "maps", "scores", "examples")
    arguments.save_maps = 1
    return make_report(arguments, table, {name: {part: results[name][part] for part in ("counts", "seconds")}
                                          for name in protocols}, split, benchmark, maps, examples,
                       {name: value for name, value in results.items() if name not in known},
                       None if maps else results)


def report_all_again(arguments):
    """--from_results on the report of one checkpoint, or of several."""
    folder, output = Path(arguments.from_results), Path(arguments.output_dir)
    results = report.read_results(folder)
    if "runs" not in results:
        return report_again(arguments, folder)
    runs = []
    for name in results["runs"]:
        arguments.output_dir = output / name
        print(f"\n{folder / name}")
        runs.append(report_again(arguments, folder / name))
    return report_average(output, results["runs"], runs, {name: value for name, value in results.items()
                                                          if name not in ("runs", "mean")})


def report_average(output: Path, names: list, runs: list, about: dict):
    """Print and write the mean and standard deviation over several checkpoints, in place of any earlier report."""
    averaged = numbers.average_runs(runs)
    report.print_average(averaged, len(runs))
    save_json(output / report.RESULTS_FILE, {"runs": names, "mean": averaged, **about})
    report.remove_stale(output, {output / report.RESULTS_FILE})


def main():
    git_commit()
    arguments = parse_arguments()
    require_writable(arguments.output_dir)
    if arguments.from_results:
        return None if parallel.RANK else report_all_again(arguments)
    if arguments.record:
        return recordings.score_recordings(arguments)
    device = choose_device(arguments.device)
    parallel.start(device)
    loaded = [load_model(arguments, path) for path in arguments.load_path]
    splits = load_splits(arguments)
    benchmark = open_benchmark(arguments, splits["benchmark"]) if "benchmark" in splits else None
    trivial = score_baselines(arguments, splits) if parallel.RANK == 0 else {}
    about = {"mask_ratio": arguments.mask_ratio, **describe_data(arguments.data_path, list(splits.values())),
             "versions": versions(), "device": str(device), "amp": arguments.amp, "processes": parallel.PROCESSES,
             "commit": git_commit()}
    names, runs, output = [], [], Path(arguments.output_dir)
    for number, (path, one) in enumerate(zip(arguments.load_path, loaded), 1):
        if len(loaded) > 1:
            names.append(f"{number}-{Path(path).stem}")
            arguments.output_dir = output / names[-1]
            print(f"\n{path}")
        runs.append(score_checkpoint(arguments, one, splits, benchmark, trivial, about, device))
    if len(runs) > 1 and parallel.RANK == 0:
        report_average(output, names, runs, about)
    parallel.stop()
    return None


if __name__ == "__main__":
    run(main)
