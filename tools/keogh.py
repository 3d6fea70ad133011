"""Train and score the network on Keogh's seven series, beside rivals without a network: the AUROC of points.

    python -m tools.keogh --keogh_path ./keogh --output_dir results/keogh           # 17 minutes of a core

One network a series and seed, on windows of its training series. Nothing is chosen on the labels: every run takes the
same number of steps. By default the local branch alone: a step costs a tenth of what both branches cost, or less.
"""
import argparse

import numpy as np
import torch

from dataloader import Normalisation, TrainingBatches, TrainingSet
from ecg.keogh import CHANNELS, SERIES, TRAINING_STRIDE, Series, read_series
from evaluation.files import RESULTS_FILE, require_ours, write_report
from evaluation.metrics import detection_auroc
from evaluation.report import REPORT_FILE, table
from model import MCF, choose_parts
from scoring.keogh import map_by_network, map_without_network, open_windows
from train import WEIGHT_DECAY, TrainingStep, train_one_epoch
from utils import UserError, choose_device, git_commit, require_writable, run, versions

BATCH, RATE = 32, 1e-3
MEAN = "mean of the series"


def train(series: Series, branches: str, steps: int, seed: int, device: torch.device) -> MCF:
    """A network trained on the windows of a training series. branches: "local" (no trend either) or "both"."""
    torch.manual_seed(seed)
    model = MCF(CHANNELS, parts=choose_parts(branches, branches == "both", branches == "both")).to(device)
    records, r_peaks, _ = open_windows(series.train, TRAINING_STRIDE, f"{series.name}_train.csv")
    rows = np.resize(np.arange(len(records)), steps * BATCH)            # again and again: an epoch of so many steps
    batches = TrainingBatches(TrainingSet(records, rows, r_peaks), Normalisation.of(model.input, device), BATCH,
                              seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY, fused=True)
    train_one_epoch(model, TrainingStep(model, optimizer, device), batches, 1)
    return model


def measure(series: Series, networks) -> dict:
    """{name of a map: AUROCs of the points}, of each network by seed, of a rival one. networks: trained MCFs."""
    runs = [map_by_network(model, series) for model in networks]
    maps = {name: [maps[name] for maps in runs] for name in runs[0]}
    maps |= {name: [points] for name, points in map_without_network(series).items()}
    return {name: [float(detection_auroc(series.labels, points)) for points in drawn] for name, drawn in maps.items()}


def summarise(aurocs: list) -> dict:
    """AUROCs by seed with their mean and, of several, standard deviation."""
    return {"mean": float(np.mean(aurocs)), "sd": float(np.std(aurocs, ddof=1)) if len(aurocs) > 1 else None,
            "by_seed": aurocs}


def tell(measured: dict, flags: argparse.Namespace) -> str:
    """report.md. measured: {series: {map: summary}}."""
    rows = [[name, *(f"{100 * one['mean']:.1f}" + (f" ± {100 * one['sd']:.1f}" if one["sd"] is not None else "")
                     for one in of_maps.values())] for name, of_maps in measured.items()]
    return "\n".join([
        "# Keogh's series\n", table(["AUROC of points, %", *measured[MEAN]], rows),
        f"\nNetwork: {flags.branches}, {flags.steps} steps of {BATCH} windows at a rate of {RATE:g}, min-max input; "
        f"mean ± standard deviation of {flags.seeds} trainings with other seeds. Each series has one anomalous run, so "
        "an AUROC of a series has no interval.", "*discord*: distance to the nearest training window. *PCA*: what the "
        "components of the training windows do not tell. *every window*: both at stride 1.\n"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keogh_path", required=True, help="folder of the series, NAME_train.csv and NAME_test.csv")
    parser.add_argument("--output_dir", default="results/keogh", help="folder of the report (default %(default)s)")
    parser.add_argument("--branches", choices=("local", "both"), default="local", help="local: the window alone; both: "
                        "with what is around it (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each series (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH} windows (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flags = parser.parse_args()
    if flags.seeds < 1 or flags.steps < 1:
        raise UserError(f"--seeds and --steps must be 1 or more, not {flags.seeds} and {flags.steps}")
    return flags


def main():
    commit, flags = git_commit(), parse_arguments()
    require_writable(flags.output_dir)
    require_ours(flags.output_dir, [REPORT_FILE])
    device = choose_device(flags.device)
    all_series, aurocs = [read_series(flags.keogh_path, name) for name in SERIES], {}
    for series in all_series:
        aurocs[series.name] = measure(series, [train(series, flags.branches, flags.steps, seed, device)
                                               for seed in range(flags.seeds)])
        print(series.name, *(f"{name} {np.mean(values):.3f}" for name, values in aurocs[series.name].items()), sep="  ",
              flush=True)
    aurocs[MEAN] = {name: np.mean([aurocs[series][name] for series in SERIES], axis=0).tolist()
                    for name in aurocs[SERIES[0]]}
    measured = {name: {of: summarise(values) for of, values in of_maps.items()} for name, of_maps in aurocs.items()}
    text = tell(measured, flags)
    write_report(flags.output_dir, {REPORT_FILE: text.encode()}, {
        "keogh": measured,
        "points": {series.name: [len(series.test), int(series.labels.sum())] for series in all_series},
        "config": {name: value for name, value in vars(flags).items() if name not in ("keogh_path", "output_dir")},
        "versions": versions(), "git_commit": commit})
    print(f"{text}\nwritten to {flags.output_dir}: {REPORT_FILE}, {RESULTS_FILE}")


if __name__ == "__main__":
    run(main)
