"""Score a checkpoint: detection on the test set, localization on the benchmark, under both protocols.

    python test.py --data_path ./data/ --load_model 1 --load_path ./ckpt/mymodel.pt           # as published
    python test.py --load_path ./ckpt/mymodel.pt --protocol paper --save_maps 1 --output_dir results/paper

Prints one table and writes results.json, detection_scores.csv and, with --save_maps 1, the localization maps.
"""
import argparse
import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import parallel
import scoring
from arrays import (SIGNAL_FILES, describes, fingerprint, label_path, load_manifest, load_r_peaks, load_records,
                    open_labels, open_signals, signal_path)
from dataloader import crop_global
from model import MCF, load_checkpoint
from utils import (UserError, add_published_flags, check_published_flags, choose_device, git_commit,
                   require_writable, run, save_json, sha256_of, versions, write_atomically)


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
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16, "
                         "faster and less exact (default off: float32)")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    return arguments


@dataclass
class Split:
    """A split to score. ecg_ids: of its rows, or None where nothing tells them."""
    name: str
    signals: np.ndarray                 # (records, 5000, leads)
    labels: np.ndarray                  # (records,), of the benchmark (records, 4800, leads)
    r_peaks: list
    ecg_ids: np.ndarray | None


def load_split(arguments, name: str) -> Split:
    """Open and check a split. Raises UserError."""
    signals = open_signals(arguments.data_path, name, arguments.dims)
    labels = open_labels(arguments.data_path, name, signals.shape if name == "benchmark" else signals.shape[:1])
    if name == "benchmark":
        labels = crop_global(labels)
        if not 0 < np.count_nonzero(labels) < labels.size:
            raise UserError(f"{label_path(arguments.data_path, name)} marks none or all of the samples that are "
                            "scored, 100:4900; make it again, or remove the benchmark")
    records = load_records(arguments.data_path, name, signals)
    return Split(name, signals, labels, load_r_peaks(arguments.data_path, name, signals),
                 None if records is None else records["ecg_id"])


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
    detection = scoring.score_split(model, test.signals, test.r_peaks, protocol, arguments.mask_ratio, device, "test",
                                    amp=arguments.amp)
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
                                       device, "benchmark", with_maps=True, amp=arguments.amp)
    auroc = scoring.localization_auroc(benchmark.labels, localization.maps)
    entry["localization_auroc_pooled"], entry["localization_auroc_per_record"] = auroc["pooled"], auroc["per_record"]
    entry["counts"].update(benchmark_records=len(benchmark.labels),
                           benchmark_records_with_both_classes=auroc["records"],
                           benchmark_without_valid_beat=localization.without_valid_beat)
    entry["seconds"]["localization"] = round(time.perf_counter() - started, 2)
    return entry, detection.scores, localization.maps


def score_baselines(test: Split, benchmark: Split | None) -> dict:
    """AUROCs of trivial scores on the same records: {"detection": {name: AUROC}, "localization": {name: {...}}}."""
    found = {"detection": {name: scoring.detection_auroc(test.labels, scores)
                           for name, scores in scoring.detection_baselines(test.signals).items()}}
    if benchmark:
        maps = scoring.localization_baselines(benchmark.signals, benchmark.r_peaks)
        found["localization"] = {name: scoring.localization_auroc(benchmark.labels, of_name)
                                 for name, of_name in maps.items()}
    return found


def print_table(entries: dict, baselines: dict):
    """Print the AUROCs, a row a protocol and a row a trivial baseline, and what to know of the records behind them."""
    def line(name, detection, pooled, per_record, seconds):
        numbers = [f"{value:.4f}" if value is not None else "-" for value in (detection, pooled, per_record)]
        print(f"{name:<32}{numbers[0]:>12}{numbers[1]:>24}{numbers[2]:>28}{seconds:>10}")

    print(f"\n{'AUROC':<32}{'detection':>12}{'localization, pooled':>24}{'localization, per record':>28}"
          f"{'seconds':>10}")
    for protocol, entry in entries.items():
        line(protocol, entry["detection_auroc"], entry["localization_auroc_pooled"],
             entry["localization_auroc_per_record"], f"{sum(filter(None, entry['seconds'].values())):.1f}")
    for name, auroc in baselines["detection"].items():
        line(f"trivial: {name}", auroc, None, None, "")
    for name, auroc in baselines.get("localization", {}).items():
        line(f"trivial: {name}", None, auroc["pooled"], auroc["per_record"], "")
    counts = next(iter(entries.values()))["counts"]
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
        print("the weights do not say on which records they were trained, nor how their epoch was chosen")
        return
    optimistic = {"test": ", the test set: optimistic", "last": ""}.get(config["select"], ", fold 9")
    print(f"weights: trained under {config['protocol']}, epoch {checkpoint['epoch']} of {config['epochs']}, "
          f"chosen by {config['select']}{optimistic}")


def scores_table(test: Split, scores: dict) -> bytes:
    """detection_scores.csv: ecg_id (empty where unknown), label, and a column a protocol, in the order of the array."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ecg_id", "label", *scores])
    ecg_ids = [""] * len(test.labels) if test.ecg_ids is None else test.ecg_ids.tolist()
    writer.writerows(zip(ecg_ids, test.labels.astype(int).tolist(), *(found.tolist() for found in scores.values())))
    return text.getvalue().encode()


def write_report(output: Path, results: dict, maps: dict, scores: bytes):
    """Write detection_scores.csv, the maps, and results.json last, each atomically."""
    write_atomically(output / "detection_scores.csv", lambda file: file.write(scores))
    for protocol, found in maps.items():
        write_atomically(output / f"localization_maps_{protocol}.npy", lambda file: np.save(file, found))
    save_json(output / "results.json", results)


def describe_data(data_path, splits: list) -> dict:
    """Provenance for results.json: the manifest where it describes the arrays that were scored, and their identity."""
    manifest = load_manifest(data_path)
    described = all(describes(manifest, split.name, split.signals) for split in splits)
    if manifest and not described:
        print(f"the manifest in {data_path} does not describe all arrays that are scored, and is left out of the "
              "report; see that the labels belong to the same signals.")
    return {"data": manifest if described else None,
            "arrays": {split.name: {"shape": list(split.signals.shape), "fingerprint": fingerprint(split.signals)}
                       for split in splits}}


def report(arguments, test: Split, benchmark: Split | None, entries: dict, scores: dict, maps: dict, about: dict):
    """Write all files and print the table."""
    baselines = score_baselines(test, benchmark)
    write_report(Path(arguments.output_dir), {**entries, "baselines": baselines, "maps": sorted(maps), **about}, maps,
                 scores_table(test, scores))
    print_table(entries, baselines)
    print_checkpoint(about["checkpoint"])
    if about["data"] and about["data"]["source"]["data_set"] == "simulated":
        print("data: simulated ECGs; these numbers say nothing about patients")
    print(f"written to {arguments.output_dir}")


def main():
    git_commit()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    parallel.start(device)
    require_writable(arguments.output_dir)
    model, checkpoint = load_model(arguments)
    model.to(device).eval()
    with parallel.one_after_the_first():                            # R peaks are found once, if they have to be
        test, benchmark = load_split(arguments, "test"), None
        if signal_path(arguments.data_path, "benchmark").exists():
            benchmark = load_split(arguments, "benchmark")
    if benchmark is None:
        print(f"localization is skipped: {arguments.data_path} holds no {SIGNAL_FILES['benchmark']}; put the authors' "
              "two benchmark files there, or make them with preprocess.py --benchmark_truth.")
    about = {"checkpoint": checkpoint, "mask_ratio": arguments.mask_ratio,
             **describe_data(arguments.data_path, [test] + [benchmark] * (benchmark is not None)),
             "versions": versions(), "device": str(device), "amp": arguments.amp, "processes": parallel.PROCESSES,
             "commit": git_commit()}
    entries, scores, maps = {}, {}, {}
    for protocol in scoring.PROTOCOLS if arguments.protocol == "both" else (arguments.protocol,):
        entries[protocol], scores[protocol], found = score_protocol(model, protocol, test, benchmark, arguments, device)
        if arguments.save_maps and found is not None:
            maps[protocol] = found
    if parallel.RANK == 0:
        report(arguments, test, benchmark, entries, scores, maps, about)
    parallel.stop()


if __name__ == "__main__":
    run(main)
