"""Score a checkpoint: detection on the test set, localization on the benchmark, under every protocol.

    python test.py --data_path ./data/ --load_model 1 --load_path ./ckpt/mymodel.pt           # as published
    python test.py --load_path ./ckpt/mymodel.pt --save_maps 1 --output_dir results/mymodel
    python test.py --load_path ckpt/seed0/model.pt ckpt/seed1/model.pt ckpt/seed2/model.pt    # mean and deviation
    python test.py --protocol none                                             # the scores without a network alone
    python test.py --load_path ./ckpt/mymodel.pt --record one.hea two.csv      # recordings of one's own

Prints the AUROCs with their intervals, and writes report.md, results.json, detection_scores.csv and the figures; with
--save_maps 1 the localization maps too. Where fold 9 is there it is scored too, and sets the operating points.
"""
import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch

from evaluation import drawing, figures, files, numbers, provenance, recordings, report, rival
from evaluation.localization import choose_examples
from evaluation.splits import load_splits
from evaluation.trivial import make_maps
from model import MCF, load_checkpoint
from scoring.passes import Scorer
from scoring.protocols import PROTOCOLS, protocols_for
from utils import (PROCESSES, RANK, UserError, add_published_flags, check_published_flags, choose_device, git_commit,
                   require_writable, run, start_processes, stop_processes, versions)

CHOICES = {"all": tuple(PROTOCOLS), **{name: (name,) for name in PROTOCOLS}, "none": ()}    # of --protocol
DETECTOR = "slope"                  # of the R peaks, for all that is scored without a network


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--load_model", type=int, choices=(0, 1), default=1, help="0: score an untrained network")
    published.add_argument("--load_path", nargs="+", default=["./ckpt/mymodel.pt"],
                           help="checkpoint, or several of them (default ./ckpt/mymodel.pt)")
    reporting = parser.add_argument_group("report")
    reporting.add_argument("--protocol", choices=CHOICES, default="all", help="which evaluation; none: no network, only "
                           "the scores that need none (default %(default)s)")
    reporting.add_argument("--output_dir", default="results/", help="folder of the report (default %(default)s)")
    reporting.add_argument("--save_maps", type=int, choices=(0, 1), default=0,
                           help="write localization_maps_<protocol>.npy, (records, 4800, leads) float32")
    reporting.add_argument("--figures", type=int, choices=(0, 1), default=1, help="0: leave the figures out")
    reporting.add_argument("--fold9", type=int, choices=(0, 1), default=1, help="0: leave fold 9 out, and with it the "
                           "operating points and combined; saves half the time")
    recordings.add_flags(parser)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16, "
                         "faster and less exact (default off: float32)")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    return arguments


def load_networks(paths: list, leads: int, hidden: int, seed: int) -> list:
    """[(a network on the CPU, what the report says of it)] of the checkpoints, or of none: [an untrained one].

    leads, hidden: as the flags say. Raises UserError where a checkpoint has others.
    """
    if not paths:
        print("--load_model 0: an untrained network is scored; its numbers only show that the pipeline runs.")
        torch.manual_seed(seed)
        return [(MCF(leads, hidden), provenance.UNKNOWN)]
    networks = []
    for path in paths:
        model, facts = load_checkpoint(path)
        for flag, own, asked in (("dims", model.leads, leads), ("hidden", model.hidden, hidden)):
            if own != asked:
                raise UserError(f"{path} was trained with --{flag} {own}, not {asked}; set --{flag} {own}, or name "
                                "another checkpoint")
        networks.append((model, provenance.describe_checkpoint(path, facts)))
    return networks


def score_splits(scorer: Scorer, splits: dict) -> numbers.Scored:
    """Score the records of every split, and localize in the benchmark."""
    detector, seconds, scores, maps = scorer.protocol.detector, {}, {}, None
    for name, split in splits.items():
        started = time.perf_counter()
        scored = scorer.score(split.records, split.r_peaks[detector], with_maps=name == "benchmark")
        seconds[name] = time.perf_counter() - started
        if name == "benchmark":
            maps = scored.maps
        else:
            scores[name] = scored.scores
    return numbers.Scored(scores, maps, detector, seconds)



def pack_tables(truth: numbers.Truth, scored: dict, scores: dict, with_maps: bool) -> dict:
    """{name: bytes} of the scores' table and, with_maps, of the protocols' localization maps.

    scored: {protocol: Scored}; scores: {column: {split: (records,)}}.
    """
    of_records = [split for split in truth.splits.values() if split.name != "benchmark"]
    contents = {report.SCORES_FILE: report.pack_scores(of_records, scores)}
    for name, one in scored.items():
        if with_maps and one.maps is not None:
            file = io.BytesIO()
            np.save(file, one.maps)
            contents[report.maps_file(name)] = file.getvalue()
    return contents


def draw_benchmark(truth: numbers.Truth, scored: dict, scorers: dict, fitted: dict | None) -> tuple:
    """({name: Figure} of the benchmark's examples, {name: bytes} of what is unusual in them) under the last protocol.

    scored, scorers: {protocol: Scored or Scorer}; fitted: the rival without a network, None where there is none.
    """
    if truth.benchmark is None or not scored:
        return {}, {}
    protocol, split = list(scored)[-1], truth.splits["benchmark"]
    maps, scorer = scored[protocol].maps, scorers[protocol]
    examples = choose_examples(truth.benchmark, maps, protocol)
    rows = np.array([row for row, *_ in examples], dtype=int)
    if not len(rows):
        return {}, {}
    restorations = scorer.restore(split.records, split.r_peaks[scorer.protocol.detector], rows)
    unit = "mV" if split.records.in_millivolts else "normalised"
    drawn = drawing.draw_examples(truth.benchmark, examples, unit, restorations, maps[rows])
    return drawn, rival.pack_unusual(fitted, split, rows, truth.benchmark.names) if fitted else {}


def report_average(folder: Path, names: list, runs: list, about: dict):
    """Print and write the mean and standard deviation over several checkpoints, whose reports stand in folder/names."""
    averaged = numbers.average_runs(runs)
    text = report.average_table(averaged, names)
    files.write_report(folder, {report.REPORT_FILE: text.encode()}, {"runs": names, "mean": averaged, **about})
    print(f"\n{text}\nwritten to {folder}")


def main():
    git_commit()
    arguments = parse_arguments()
    if arguments.record:
        return recordings.score_recordings(arguments)
    wanted, output = CHOICES[arguments.protocol], Path(arguments.output_dir)
    paths = arguments.load_path if arguments.load_model and wanted else []
    names = [f"{number}-{Path(path).stem}" for number, path in enumerate(paths, 1)] if len(paths) > 1 else ["."]
    for folder in (output, *(output / name for name in names)):
        require_writable(folder)
        files.require_ours(folder, report.file_names(wanted * arguments.save_maps, arguments.figures))
    device = choose_device(arguments.device, arguments.amp)
    start_processes(device)
    networks = load_networks(paths, arguments.dims, arguments.hidden, arguments.seed) if wanted else [
        (None, provenance.UNKNOWN)]
    protocols = [protocols_for(model, wanted) if wanted else () for model, _ in networks]
    splits = load_splits(arguments.data_path, arguments.dims,
                         {DETECTOR, *(protocol.detector for some in protocols for protocol in some)}, arguments.fold9)
    truth = numbers.open_truth(arguments.data_path, splits)
    rivals = rival.score_rivals(arguments.data_path, truth) if RANK == 0 else None
    about = {"mask_ratio": arguments.mask_ratio, **provenance.describe_data(arguments.data_path, list(splits.values())),
             "counts": numbers.count_records(truth, DETECTOR), "versions": versions(), "device": str(device),
             "amp": arguments.amp, "processes": PROCESSES, "commit": git_commit()}
    runs = []
    for name, (model, checkpoint), some in zip(names, networks, protocols):
        scorers = {protocol.name: Scorer(model.to(device).eval(), protocol, arguments.mask_ratio, arguments.amp)
                   for protocol in some}
        scored = {protocol: score_splits(scorer, splits) for protocol, scorer in scorers.items()}
        if RANK == 0:
            runs.append(report_network(output / name, truth, rivals, (scored, scorers), {
                **about, "checkpoint": checkpoint}, arguments.save_maps, arguments.figures))
    if len(runs) > 1:
        report_average(output, names, runs, about)
    stop_processes()
    return None


if __name__ == "__main__":
    run(main)
