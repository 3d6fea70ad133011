"""How fast, and against what.

    python -m tools.benchmark                    # training and scoring, some minutes on two cores
    python -m tools.benchmark --quick            # the same with fewer repeats: a check, not a measurement
    python -m tools.benchmark --data_path data   # and the time of training until the published accuracy

On generated arrays of real shape and random weights:
    training     forward, backward and update of a batch of 32
    detection    a record, all beats, against one beat and one mask at a time (tests/plain.py), whose scores must agree
                 within 1e-4; and a record by its median beat
On real arrays:
    accuracy     seconds of training from random weights until the detection AUROC of fold 9 under clean is 0.86, the
                 published number, by input; scoring is not counted
Prints a table and writes benchmark.json: medians, least and most of the repeats.
"""
import argparse
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain  # noqa: E402

from dataloader import Normalisation, TrainingBatches, draw_masks, make_batch  # noqa: E402
from dataloader import measure_companding, open_training  # noqa: E402
from ecg.arrays import Records  # noqa: E402
from ecg.signals import LEAD_NAMES, RECORD_LENGTH, SAMPLING_RATE  # noqa: E402
from evaluation.metrics import detection_auroc  # noqa: E402
from evaluation.validation import Validation  # noqa: E402
from model import MCF  # noqa: E402
from scoring.passes import Scorer  # noqa: E402
from scoring.protocols import CLEAN  # noqa: E402
from train import WEIGHT_DECAY, TrainingStep, learning_rate, train_one_epoch  # noqa: E402
from utils import UserError, choose_device, cpu_computes_bfloat16, git_commit, require_writable, run  # noqa: E402
from utils import save_json, usable_cores, versions  # noqa: E402

TOLERANCE = 1e-4                    # relative, of scores against the plain loop, in float32
BATCH = 32
ACCURACY = 0.86                     # detection AUROC that the paper prints
# Records an epoch and a step, epochs, and rate of the training until then: those of ckpt/companded.pt in short epochs
EPOCH_RECORDS, STEP_RECORDS, EPOCHS, RATE = 80, 8, 20, 1e-3
THINNING = 3                        # every third record of fold 9 tells the accuracy


def published_names(model: MCF) -> dict:
    """MCF's weights under the published names, which the plain loop reads."""
    renamed = {"attention.out_proj": "attn.output_linear", "norm.weight": "layer_norm.a_2",
               "norm.bias": "layer_norm.b_2"}
    state = {}
    for name, value in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part.endswith(("encoder", "decoder")):
            state[f"{part}.main.{rest}"] = value.squeeze(2) if value.ndim == 4 else value
        elif rest.startswith("in_proj"):
            for number, third in enumerate(value.chunk(3)):
                state[f"attn.linear_layers.{number}.{rest.removeprefix('in_proj_')}"] = third
        else:
            for old, new in renamed.items():
                name = name.replace(old, new)
            state[name] = value
    return state


def generate_records(count: int) -> tuple:
    """Noise, (count, 5000, 12) float32, and R peaks at 60 to 90 a minute: the shapes of real input."""
    rng = np.random.default_rng(0)
    intervals = SAMPLING_RATE * 60 / rng.uniform(60, 90, count)
    return (rng.normal(0, 0.3, (count, RECORD_LENGTH, len(LEAD_NAMES))).astype(np.float32),
            [np.arange(interval / 2, RECORD_LENGTH, interval).astype(np.int32) for interval in intervals])


def take_turns(functions: dict, repeats: int, device: torch.device) -> dict:
    """Seconds of each function, called in turns so that a slow moment of the machine meets all of them."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            wait_for(device)
            started = time.perf_counter()
            function()
            wait_for(device)
            if turn:                                                # the first call of each warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: {"median": float(np.median(times)), "least": min(times), "most": max(times)}
            for name, times in seconds.items()}


def wait_for(device: torch.device):
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def benchmark_training(device: torch.device, repeats: int, precisions: list) -> dict:
    """Seconds of a training step in every precision of --amp."""
    torch.manual_seed(0)
    model, records = MCF().to(device).train(), torch.from_numpy(generate_records(BATCH)[0]).to(device)
    masks = [mask.to(device) for mask in draw_masks(30, torch.Generator().manual_seed(0))]
    batch = make_batch(records, torch.full((BATCH,), 1000, device=device), *masks, Normalisation())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    steps = {amp: TrainingStep(model, optimizer, device, amp) for amp in precisions}
    return take_turns({amp: lambda step=step: step(batch, 1.0) for amp, step in steps.items()}, repeats, device)


def benchmark_detection(device: torch.device, repeats: int, precisions: list, few: int) -> dict:
    """Seconds a record of detection under clean: the plain loop, ours in every precision, and by the median beat.

    few: records of the plain loop.
    """
    torch.manual_seed(0)
    model = MCF().to(device).eval()
    state, (signals, r_peaks) = published_names(model), generate_records(512 if device.type == "cuda" else few)
    scorers = {amp: Scorer(model, CLEAN, amp=amp, median=False) for amp in precisions}
    scorers["median"] = Scorer(model, CLEAN)

    @torch.inference_mode()
    def run_plain():
        return np.array([plain.score_record(state, signals[row].astype(np.float64), r_peaks[row], "clean", False)[0]
                         for row in range(few)])

    def run_fast(name):
        return scorers[name].score(Records(signals, "generated"), r_peaks).scores

    require_equal("scores", run_fast("off")[:few], run_plain())
    seconds = take_turns({"plain": run_plain, **{name: lambda name=name: run_fast(name) for name in scorers}}, repeats,
                         device)
    return {name: {kind: value / (few if name == "plain" else len(signals)) for kind, value in times.items()}
            for name, times in seconds.items()}


def time_to_accuracy(data_path, device: torch.device, kind: str) -> dict:
    """Train with an input, "minmax" or "compand", until fold 9 says ACCURACY, for EPOCHS at most.

    Returns the seconds of training, None where it was not reached, and the AUROC after each epoch.
    """
    training = open_training(data_path, len(LEAD_NAMES), CLEAN.detector, CLEAN.fold_held_back)
    validation = Validation(data_path, "val", training.records.leads, CLEAN)
    torch.manual_seed(0)
    model = MCF(training.records.leads)
    model.input = measure_companding(training.records, training.rows) if kind == "compand" else model.input
    batches = TrainingBatches(training, Normalisation.of(model.input, device), STEP_RECORDS,
                              epoch_records=EPOCH_RECORDS)
    optimizer = torch.optim.AdamW(model.to(device).parameters(), RATE, weight_decay=WEIGHT_DECAY, fused=True)
    step = TrainingStep(model, optimizer, device)
    some, seconds, aurocs = np.arange(0, len(validation.records), THINNING), 0.0, []
    for epoch in range(1, EPOCHS + 1):
        step.optimizer.param_groups[0]["lr"] = learning_rate(RATE, epoch, EPOCHS)
        started = time.perf_counter()
        train_one_epoch(model, step, batches, epoch)              # reads the losses, so it waits for the device
        seconds += time.perf_counter() - started
        scored = Scorer(model, CLEAN).score(validation.records, validation.r_peaks, some)
        aurocs.append(detection_auroc(validation.labels[some], scored.scores))
        print(f"{kind}: AUROC {aurocs[-1]:.3f} on fold 9 after {seconds:.0f} s")
        if aurocs[-1] >= ACCURACY:
            return {"seconds": seconds, "aurocs": aurocs}
    return {"seconds": None, "aurocs": aurocs}


def require_equal(what: str, ours: np.ndarray, expected: np.ndarray):
    """Stop where ours differs from expected by more than TOLERANCE, relative to the largest expected value."""
    difference = np.abs(ours - expected).max() / np.abs(expected).max()
    if not difference <= TOLERANCE:
        raise UserError(f"benchmark.py: the {what} of the fast path differ by {difference:.1e} from the plain ones, "
                        "which no speed makes up for; please report it with the versions in requirements.txt")


def name_machine(device: torch.device) -> str:
    """What the GPU or the processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_report(measured: dict):
    """Print the table, in milliseconds."""
    print(f"{measured['machine']}, {measured['device']}, {measured['cores']} cores, torch "
          f"{measured['versions']['torch']}\n{'':<32}{'ms':>10}")
    for part in ("training", "detection"):
        for name, times in measured[part].items():
            print(f"{part:<16}{name:<16}{1e3 * times['median']:>10.1f}")
    print(f"peak memory {measured['peak_memory_gb']:.2f} GB")
    for kind, one in measured["accuracy"].items():
        reached = f"after {one['seconds']:.0f} s" if one["seconds"] is not None else "not reached"
        print(f"AUROC {ACCURACY} on fold 9, input {kind}: {reached}, {len(one['aurocs'])} epochs, best "
              f"{max(one['aurocs']):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and records: a check, not a measurement")
    parser.add_argument("--data_path", help="folder of the arrays, for the time to the published accuracy")
    parser.add_argument("--output_dir", default="results/", help="folder of benchmark.json (default %(default)s)")
    flags = parser.parse_args()
    device, repeats = choose_device(flags.device), 2 if flags.quick else 7
    require_writable(flags.output_dir)
    precisions = ["off", *(["bf16"] if device.type != "cpu" or cpu_computes_bfloat16() else [])]
    measured = {"training": benchmark_training(device, repeats, precisions),
                "detection": benchmark_detection(device, repeats, precisions, 1 if flags.quick else 8),
                "accuracy": {kind: time_to_accuracy(flags.data_path, device, kind) for kind in ("minmax", "compand")
                             if flags.data_path},
                "peak_memory_gb": (torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else
                                   resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6),
                "quick": flags.quick, "repeats": repeats, "device": str(device), "cores": usable_cores(),
                "machine": name_machine(device), "versions": versions(), "commit": git_commit()}
    print_report(measured)
    save_json(Path(flags.output_dir) / "benchmark.json", measured)


if __name__ == "__main__":
    run(main)
