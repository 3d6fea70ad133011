"""Score a checkpoint: detection on the test set, localization on the benchmark, under both protocols.

    python test.py --data_path ./data/ --load_model 1 --load_path ./ckpt/mymodel.pt           # as published
    python test.py --load_path ./ckpt/mymodel.pt --protocol paper --save_maps 1 --output_dir results/paper

Prints one table and writes results.json, detection_scores.csv and, with --save_maps 1, the localization maps.
"""
import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import scoring
from arrays import SIGNAL_FILES, load_manifest, load_r_peaks, load_records, open_labels, open_signals, signal_path
from dataloader import crop_global
from model import MCF, load_checkpoint
from utils import (UserError, add_published_flags, check_published_flags, choose_device, git_commit, run, save_json,
                   sha256_of, versions, write_atomically)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--load_model", type=int, choices=(0, 1), default=1, help="0: score an untrained network")
    published.add_argument("--load_path", default="./ckpt/mymodel.pt", help="checkpoint (default %(default)s)")
    report = parser.add_argument_group("report")
    report.add_argument("--protocol", choices=(*scoring.PROTOCOLS, "both"), default="both",
                        help="which evaluation (default %(default)s)")
    report.add_argument("--output_dir", default="results/", help="folder of the report (default %(default)s)")
    report.add_argument("--save_maps", type=int, choices=(0, 1), default=0,
                        help="write localization_maps_<protocol>.npy, (records, 4800, leads) float32")
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    return arguments


@dataclass
class Split:
    """A split to score: its name, signals, labels and R peaks."""
    name: str
    signals: np.ndarray
    labels: np.ndarray
    r_peaks: list


def load_split(arguments, name: str) -> Split:
    """Open and check a split. Labels are per record for the test set, per sample and lead for the benchmark."""
    signals = open_signals(arguments.data_path, name, arguments.dims)
    labels = open_labels(arguments.data_path, name, signals.shape if name == "benchmark" else signals.shape[:1])
    return Split(name, signals, labels, load_r_peaks(arguments.data_path, name, signals))


def load_model(arguments) -> tuple:
    """The network to score (on the CPU), and what the report says of it. Raises UserError."""
    if not arguments.load_model:
        print("--load_model 0: an untrained network is scored; its numbers only show that the pipeline runs.")
        torch.manual_seed(arguments.seed)
        return MCF(arguments.dims, arguments.hidden), {"path": None, "sha256": None, "epoch": None, "config": None}
    model, facts = load_checkpoint(arguments.load_path)
    for flag, held in (("dims", model.leads), ("hidden", model.hidden)):
        if getattr(arguments, flag) != held:
            raise UserError(f"{arguments.load_path} was trained with --{flag} {held}, not {getattr(arguments, flag)}; "
                            f"set --{flag} {held}, or name another checkpoint")
    return model, {"path": str(arguments.load_path), "sha256": sha256_of(arguments.load_path),
                   "epoch": facts.get("epoch"), "config": facts.get("config")}


def score_protocol(model: MCF, protocol: str, test: Split, benchmark: Split | None, arguments, device) -> tuple:
    """Run one protocol: (its entry of results.json, the records' scores, the benchmark's maps or None)."""
    started = time.perf_counter()
    detection = scoring.score_split(model, test.signals, test.r_peaks, protocol, arguments.mask_ratio, device, "test")
    entry = {"detection_auroc": scoring.detection_auroc(test.labels, detection.scores),
             "localization_auroc_pooled": None, "localization_auroc_per_record": None,
             "counts": {"records": len(test.labels), "normal": int(np.count_nonzero(test.labels == 0)),
                        "abnormal": int(np.count_nonzero(test.labels == 1)),
                        "without_r_peak": detection.without_r_peak, "without_valid_beat": detection.without_valid_beat,
                        "benchmark_records": 0, "benchmark_records_with_both_classes": 0,
                        "benchmark_without_valid_beat": 0},
             "seconds": {"detection": round(time.perf_counter() - started, 2), "localization": None}}
    if benchmark is None:
        return entry, detection.scores, None
    started = time.perf_counter()
    localization = scoring.score_split(model, benchmark.signals, benchmark.r_peaks, protocol, arguments.mask_ratio,
                                       device, "benchmark", with_maps=True)
    auroc = scoring.localization_auroc(crop_global(benchmark.labels), localization.maps)
    entry["localization_auroc_pooled"], entry["localization_auroc_per_record"] = auroc["pooled"], auroc["per_record"]
    entry["counts"].update(benchmark_records=len(benchmark.labels),
                           benchmark_records_with_both_classes=auroc["records"],
                           benchmark_without_valid_beat=localization.without_valid_beat)
    entry["seconds"]["localization"] = round(time.perf_counter() - started, 2)
    return entry, detection.scores, localization.maps


def print_table(entries: dict):
    """Print the AUROCs, a row a protocol, and what a reader must know of the records behind them."""
    def show(value):
        return f"{value:.4f}" if value is not None else "-"
    print(f"\n{'AUROC':<10}{'detection':>12}{'localization, pooled':>24}{'localization, per record':>28}"
          f"{'seconds':>10}")
    for protocol, entry in entries.items():
        seconds = sum(filter(None, entry["seconds"].values()))
        print(f"{protocol:<10}{show(entry['detection_auroc']):>12}{show(entry['localization_auroc_pooled']):>24}"
              f"{show(entry['localization_auroc_per_record']):>28}{seconds:>10.1f}")
    counts = next(iter(entries.values()))["counts"]
    print(f"detection: {counts['records']} records, {counts['normal']} normal and {counts['abnormal']} abnormal; "
          f"{counts['without_valid_beat']} without a valid beat are scored on evenly spaced windows")
    if counts["benchmark_records"]:
        print(f"localization: {counts['benchmark_records']} records, "
              f"{counts['benchmark_records_with_both_classes']} of them with points of both kinds; "
              f"{counts['benchmark_without_valid_beat']} without a valid beat")


def write_report(arguments, entries: dict, scores: dict, maps: dict, test: Split, about: dict):
    """Write detection_scores.csv, the maps, and results.json last, each atomically."""
    output = Path(arguments.output_dir)
    records = load_records(arguments.data_path, "test", test.signals)
    table = pd.DataFrame({"ecg_id": "" if records is None else records["ecg_id"],
                          "label": test.labels.astype(int), **scores}, index=range(len(test.labels)))
    text = table.to_csv(index=False)
    write_atomically(output / "detection_scores.csv", lambda file: file.write(text.encode()))
    for protocol, found in maps.items():
        write_atomically(output / f"localization_maps_{protocol}.npy", lambda file: np.save(file, found))
    save_json(output / "results.json", {**entries, **about})


def main():
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    model, checkpoint = load_model(arguments)
    model.to(device).eval()
    test, benchmark = load_split(arguments, "test"), None
    if signal_path(arguments.data_path, "benchmark").exists():
        benchmark = load_split(arguments, "benchmark")
    else:
        print(f"localization is skipped: {arguments.data_path} holds no {SIGNAL_FILES['benchmark']}; put the authors' "
              "two benchmark files there, or make them with preprocess.py --benchmark_truth.")
    entries, scores, maps = {}, {}, {}
    for protocol in scoring.PROTOCOLS if arguments.protocol == "both" else (arguments.protocol,):
        entries[protocol], scores[protocol], found = score_protocol(model, protocol, test, benchmark, arguments, device)
        if arguments.save_maps and found is not None:
            maps[protocol] = found
    about = {"checkpoint": checkpoint, "mask_ratio": arguments.mask_ratio, "data": load_manifest(arguments.data_path),
             "versions": versions(), "device": str(device), "commit": git_commit()}
    write_report(arguments, entries, scores, maps, test, about)
    print_table(entries)
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run(main)
