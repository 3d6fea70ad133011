"""How fast, against what, and how near to what this machine can do.

    python -m tools.benchmark                    # training, scoring and filter, some minutes on two cores
    python -m tools.benchmark --quick            # the same with fewer repeats: a check, not a measurement
    python -m tools.benchmark --data_path data   # and the time of training until the published accuracy

On generated arrays of real shape and random weights, all in one run, fast and plain in turns:
    training     forward, backward and update of a batch of 32, against the published layers (Conv1d), eager, float32
    detection    against one beat and one mask at a time (tests/plain.py); the scores must agree within 1e-4
    localization the same, with maps
    filter       of a record's twelve leads, against HeartPy's calls lead by lead
On real arrays:
    accuracy     seconds of training from random weights until the detection AUROC of fold 9 under clean is 0.86, the
                 published number, by input; scoring is not counted
Prints a table and writes benchmark.json: medians, least and most of the repeats, ratios of medians, and arithmetic
(counted by torch) per second over that of a large matrix product on the same device.
"""
import argparse
import copy
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain  # noqa: E402

from dataloader import Normalisation, TrainingBatches, draw_masks, make_batch, measure_companding  # noqa: E402
from ecg.arrays import Records, load_r_peaks, load_table, open_records  # noqa: E402
from ecg.signals import LEAD_NAMES, PASS_BAND, RECORD_LENGTH, SAMPLING_RATE, filter_leads  # noqa: E402
from evaluation.metrics import detection_auroc  # noqa: E402
from model import MCF  # noqa: E402
from scoring.passes import Scorer  # noqa: E402
from scoring.protocols import CLEAN  # noqa: E402
from train import TrainingStep, Validation, choose_rows, learning_rate, train_one_epoch  # noqa: E402
from utils import (UserError, choose_device, cpu_computes_bfloat16, git_commit, require_writable, run, save_json,  # noqa: E402
                   usable_cores, versions)

TOLERANCE = 1e-4                    # relative, of scores and maps against the plain loop, in float32
BATCH = 32
ACCURACY = 0.86                     # detection AUROC that the paper prints
RECORDS, EPOCHS, RATE = 960, 10, 3e-4       # of the training until then
THINNING, BEATS = 3, 2                      # every third record of fold 9 and two of its beats tell the accuracy


class PublishedLayers(MCF):
    """MCF in the published form: one-dimensional convolutions over (batch, channels, samples)."""

    def __init__(self, model: MCF):
        super().__init__(model.leads, model.hidden)
        self.load_state_dict(model.state_dict())
        for name, part in self.named_children():
            if name.endswith(("encoder", "decoder")):
                setattr(self, name, nn.Sequential(*map(one_dimensional, part)))

    def encode_signal(self, encoder, signal):
        return encoder(signal.transpose(1, 2))

    def restore_signal(self, decoder, tokens):
        return self.read_output(decoder(tokens).transpose(1, 2))


def one_dimensional(layer: nn.Module) -> nn.Module:
    """A layer over (batch, channels, 1, samples) as the same over (batch, channels, samples)."""
    if isinstance(layer, nn.BatchNorm2d):
        new = nn.BatchNorm1d(layer.num_features)
        new.load_state_dict(layer.state_dict())
        return new
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return layer
    kind = nn.Conv1d if isinstance(layer, nn.Conv2d) else nn.ConvTranspose1d
    new = kind(layer.in_channels, layer.out_channels, layer.kernel_size[1], layer.stride[1], layer.padding[1],
               bias=False)
    new.weight.data = layer.weight.detach().squeeze(2).contiguous()
    return new


def published_names(model: MCF) -> dict:
    """MCF's weights under the published names, which the plain loop reads."""
    renamed = {"attention.out_proj": "attn.output_linear", "norm.weight": "layer_norm.a_2", "norm.bias": "layer_norm.b_2"}
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
    """Noise in the pass band, (count, 5000, 12) float32, and R peaks at 60 to 90 a minute: the shapes of real input."""
    rng = np.random.default_rng(0)
    noise = lfilter([1], [1, -0.95], rng.normal(size=(count, RECORD_LENGTH, len(LEAD_NAMES))), axis=1)
    records = np.stack([filter_leads(record) for record in noise]).astype(np.float32)
    intervals = SAMPLING_RATE * 60 / rng.uniform(60, 90, count)
    return records, [np.arange(interval / 2, RECORD_LENGTH, interval).astype(np.int32) for interval in intervals]


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


def count_operations(function) -> float:
    """Floating-point operations of a call, counted by torch from the shapes of its products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure_peak(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of a large matrix product: what this device attains at best."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / take_turns({"product": lambda: matrix @ matrix}, repeats, device)["product"]["least"]


def compare(seconds: dict, operations: float, peaks: dict) -> dict:
    """Speed-up over "plain" and share of the device's peak, by precision. seconds: of take_turns; peaks: by precision."""
    medians = {name: times["median"] for name, times in seconds.items()}
    best = {amp: min(value for name, value in medians.items() if name.startswith(amp)) for amp in peaks}
    return {"seconds": seconds, "operations": operations,
            "speedup": {amp: medians["plain"] / value for amp, value in best.items()},
            "peak_share": {amp: operations / value / peaks[amp] for amp, value in best.items()}}


def benchmark_training(device: torch.device, repeats: int, peaks: dict) -> dict:
    """Seconds of a training step: the published layers, eager, and ours in every precision of peaks."""
    torch.manual_seed(0)
    model = MCF().to(device).train()
    records = torch.from_numpy(generate_records(BATCH)[0]).to(device)
    masks = [mask.to(device) for mask in draw_masks(30, torch.Generator().manual_seed(0))]
    batch = make_batch(records, torch.full((BATCH,), 1000, device=device), *masks, Normalisation())
    networks = {"plain": (PublishedLayers(model).to(device).train(), "off", False),
                **{amp: (copy.deepcopy(model), amp, False) for amp in peaks}}
    if device.type == "cuda":
        networks["bf16, compiled"] = copy.deepcopy(model), "bf16", True
    operations = 3 * count_operations(lambda: networks["plain"][0](*batch[2:]))     # backward: of input and of weight
    steps = {name: TrainingStep(network, torch.optim.AdamW(network.parameters(), 1e-4, fused=name != "plain"), device,
                                amp, compiled) for name, (network, amp, compiled) in networks.items()}
    losses = {}
    for name in ("plain", "off"):
        torch.manual_seed(1)                                                        # dropout
        losses[name] = float(steps[name](batch, 1.0)[0])
    require_equal("training loss", np.array([losses["off"]]), np.array([losses["plain"]]))
    seconds = take_turns({name: lambda step=step: step(batch, 1.0) for name, step in steps.items()}, repeats, device)
    return compare(seconds, operations, peaks)


def benchmark_scoring(device: torch.device, repeats: int, peaks: dict, with_maps: bool, quick: bool) -> dict:
    """Seconds a record of detection or localization, clean protocol: the plain loop, and ours in every precision."""
    torch.manual_seed(0)
    model = MCF().to(device).eval()
    state, few = published_names(model), 1 if quick else 8
    many = 512 if device.type == "cuda" else few
    signals, r_peaks = generate_records(many)
    scorers = {amp: Scorer(model, CLEAN, amp=amp) for amp in peaks}

    @torch.inference_mode()
    def run_plain():
        scored = [plain.score_record(state, signals[row].astype(np.float64), r_peaks[row], "clean", with_maps)
                  for row in range(few)]
        return [np.array([score for score, _ in scored]), [of_record for _, of_record in scored]]

    def run_fast(amp):
        return scorers[amp].score(Records(signals, "generated"), r_peaks, with_maps=with_maps)

    slow, fast = run_plain(), run_fast("off")
    require_equal("scores", fast.scores[:few], slow[0])
    if with_maps:
        require_equal("maps", fast.maps[:few], np.stack(slow[1]))
    seconds = take_turns({"plain": run_plain, **{amp: lambda amp=amp: run_fast(amp) for amp in peaks}}, repeats, device)
    seconds = {name: {kind: value / (few if name == "plain" else many) for kind, value in times.items()}
               for name, times in seconds.items()}
    return compare(seconds, count_operations(lambda: run_fast("off")) / many, peaks)


def benchmark_filter(repeats: int) -> dict | None:
    """Seconds of filtering a record, against HeartPy's calls for every lead; None where HeartPy is not installed."""
    try:
        import heartpy
    except ImportError:
        return None
    record = generate_records(1)[0][0].astype(np.float64)

    def filter_by_lead():
        leads = []
        for lead in record.T:
            for cutoff, kind in zip(PASS_BAND, ("highpass", "lowpass")):
                lead = heartpy.filter_signal(lead, cutoff, SAMPLING_RATE, order=2, filtertype=kind)
            leads.append(heartpy.filter_signal(lead, 35, SAMPLING_RATE, filtertype="notch"))
        return np.stack(leads, axis=1)

    require_equal("filtered leads", filter_leads(record), filter_by_lead())
    seconds = take_turns({"plain": filter_by_lead, "off": lambda: filter_leads(record)}, 5 * repeats, torch.device("cpu"))
    return {"seconds": seconds, "speedup": {"off": seconds["plain"]["median"] / seconds["off"]["median"]}}


def time_to_accuracy(data_path, device: torch.device, kind: str, epochs: int = EPOCHS) -> dict:
    """Train with an input, "minmax" or "compand", until fold 9 says ACCURACY, for so many epochs at most.

    Returns the seconds of training, None where it was not reached, and the AUROC after each epoch.
    """
    records = open_records(data_path, "train", len(LEAD_NAMES))
    rows = choose_rows(CLEAN, load_table(data_path, "train", records), len(records))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, RECORDS).astype(int))]
    validation, r_peaks = Validation(data_path, "val", records.leads, CLEAN), load_r_peaks(data_path, "train", records,
                                                                                             CLEAN.detector)
    torch.manual_seed(0)
    model = MCF(records.leads)
    model.input = measure_companding(records, rows) if kind == "compand" else model.input
    batches = TrainingBatches(records, rows, r_peaks, Normalisation.of(model.input, device), device, BATCH)
    step = TrainingStep(model, torch.optim.AdamW(model.to(device).parameters(), RATE, fused=True), device)
    some, seconds, aurocs = np.arange(0, len(validation.records), THINNING), 0.0, []
    for epoch in range(1, epochs + 1):
        step.optimizer.param_groups[0]["lr"] = learning_rate(RATE, epoch, epochs)
        started = time.perf_counter()
        train_one_epoch(model, step, batches, epoch, None)              # reads the losses, so it waits for the device
        seconds += time.perf_counter() - started
        scored = Scorer(model, CLEAN).score(validation.records, validation.r_peaks, some, beats_per_record=BEATS)
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
    """Print the table: milliseconds, speed-up, and share of what a large matrix product attains."""
    print(f"{measured['machine']}, {measured['device']}, {measured['cores']} cores, torch "
          f"{measured['versions']['torch']}\n{'':<16}" + "".join(f"{name:>16}" for name in ("ms", "speed-up", "of peak")))
    for part in ("training", "detection", "localization", "filter"):
        for name, times in (measured[part] or {"seconds": {}})["seconds"].items():
            ratios = [f"{measured[part].get(kind, {}).get(name, float('nan')):.2f}" for kind in ("speedup", "peak_share")]
            print(f"{part:<16}{name:<16}{1e3 * times['median']:>8.1f}" + "".join(f"{ratio:>16}" for ratio in ratios))
    print("a large matrix product: " + ", ".join(f"{rate:.0f} GFLOP/s ({amp})" for amp, rate in
                                                 measured["peak_gflops"].items())
          + f"; peak memory {measured['peak_memory_gb']:.2f} GB")
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
    precisions = {"off": torch.float32}
    if device.type != "cpu" or cpu_computes_bfloat16():
        precisions["bf16"] = torch.bfloat16
    peaks = {amp: measure_peak(device, dtype, 10) for amp, dtype in precisions.items()}
    measured = {"training": benchmark_training(device, repeats, peaks),
                "detection": benchmark_scoring(device, repeats, peaks, False, flags.quick),
                "localization": benchmark_scoring(device, repeats, peaks, True, flags.quick),
                "filter": benchmark_filter(repeats),
                "accuracy": {kind: time_to_accuracy(flags.data_path, device, kind) for kind in ("minmax", "compand")
                             if flags.data_path},
                "peak_gflops": {amp: rate / 1e9 for amp, rate in peaks.items()},
                "peak_memory_gb": (torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else
                                   resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6),
                "quick": flags.quick, "repeats": repeats, "device": str(device), "cores": usable_cores(),
                "machine": name_machine(device), "versions": versions(), "commit": git_commit()}
    print_report(measured)
    save_json(Path(flags.output_dir) / "benchmark.json", measured)


if __name__ == "__main__":
    run(main)
