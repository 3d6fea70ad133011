"""How fast, against what, and how near to what this machine can do.

    python benchmark.py                          # all of it, some minutes on two cores
    python benchmark.py --quick                  # the same with fewer repeats: a check, not a measurement
    python benchmark.py --device cuda --output_dir results/

On generated arrays of real shape and random weights, all in one run, fast and plain in turns:
    training     forward, backward and update of a batch of 32, against the published layers (Conv1d), eager, float32
    detection    against one beat and one mask at a time (tests/plain.py); the scores must agree within 1e-4
    localization the same, with maps
    calibrated   detection and localization under that protocol, against clean: what judging the errors costs
    filter       of a record's twelve leads, against HeartPy's calls lead by lead
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

sys.path.append(str(Path(__file__).resolve().parent / "tests"))
import plain  # noqa: E402

import calibration  # noqa: E402
from scoring import passes  # noqa: E402
from dataloader import draw_masks, make_batch  # noqa: E402
from model import MCF  # noqa: E402
from ecg.signals import LEAD_NAMES, PASS_BAND, RECORD_LENGTH, SAMPLING_RATE, filter_leads  # noqa: E402
from train import TrainingStep  # noqa: E402
from utils import UserError, choose_device, git_commit, require_writable, run, save_json, usable_cores, versions  # noqa: E402

TOLERANCE = 1e-4                    # relative, of scores and maps against the plain loop, in float32
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16}
BATCH = 32


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
        output = decoder(tokens).transpose(1, 2)
        return output[..., :self.leads], output[..., self.leads:]


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
    state = {}
    for name, value in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part.endswith(("encoder", "decoder")):
            state[f"{part}.main.{rest}"] = value.squeeze(2) if value.ndim == 4 else value
        elif rest.startswith("in_proj"):
            for number, third in enumerate(value.chunk(3)):
                state[f"attn.linear_layers.{number}.{rest.removeprefix('in_proj_')}"] = third
        else:
            renamed = {"attention.out_proj": "attn.output_linear", "norm.weight": "layer_norm.a_2",
                       "norm.bias": "layer_norm.b_2"}
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
    return {name: {"median": float(np.median(taken)), "least": min(taken), "most": max(taken)}
            for name, taken in seconds.items()}


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


def benchmark_training(device: torch.device, repeats: int, peaks: dict) -> dict:
    """Seconds of a training step: the published layers, eager, and ours in either precision."""
    torch.manual_seed(0)
    model = MCF().to(device).train()
    records = torch.from_numpy(generate_records(BATCH)[0]).to(device)
    masks = [mask.to(device) for mask in draw_masks(30, torch.Generator().manual_seed(0))]
    batch = make_batch(records, torch.full((BATCH,), 1000, device=device), *masks)
    networks = {"plain": (PublishedLayers(model).to(device).train(), "off", False),
                "off": (copy.deepcopy(model), "off", False), "bf16": (copy.deepcopy(model), "bf16", False)}
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
    best = {"off": "off", "bf16": "bf16, compiled" if device.type == "cuda" else "bf16"}
    return {"seconds": seconds, "operations": operations,
            "speedup": {amp: seconds["plain"]["median"] / seconds[best[amp]]["median"] for amp in PRECISIONS},
            "peak_share": {amp: operations / seconds[best[amp]]["median"] / peaks[amp] for amp in PRECISIONS}}


def benchmark_scoring(device: torch.device, repeats: int, peaks: dict, with_maps: bool, quick: bool) -> dict:
    """Seconds a record of detection or localization, clean protocol: the plain loop, and ours in either precision."""
    torch.manual_seed(0)
    model = MCF().to(device).eval()
    state, few = published_names(model), 1 if quick else 8
    many = 512 if device.type == "cuda" else few
    signals, r_peaks = generate_records(many)

    @torch.inference_mode()
    def run_plain():
        found = [plain.score_record(state, signals[row].astype(np.float64), r_peaks[row], "clean", with_maps)
                 for row in range(few)]
        return [np.array([score for score, _ in found]), [found_map for _, found_map in found]]

    def run_fast(amp):
        return passes.score_split(model, signals, r_peaks, "clean", 30, device, "test", with_maps, amp=amp)

    slow, fast = run_plain(), run_fast("off")
    require_equal("scores", fast.scores[:few], slow[0])
    if with_maps:
        require_equal("maps", fast.maps[:few], np.stack(slow[1]))
    seconds = take_turns({"plain": run_plain, "off": lambda: run_fast("off"), "bf16": lambda: run_fast("bf16")},
                         repeats, device)
    seconds = {name: {kind: value / (few if name == "plain" else many) for kind, value in taken.items()}
               for name, taken in seconds.items()}
    operations = count_operations(lambda: run_fast("off")) / many
    deviation = np.abs(run_fast("bf16").scores / fast.scores - 1).max()
    return {"seconds_a_record": seconds, "operations_a_record": operations,
            "plain_operations_a_record": count_operations(run_plain) / few, "bf16_relative_deviation": deviation,
            "speedup": {amp: seconds["plain"]["median"] / seconds[amp]["median"] for amp in PRECISIONS},
            "peak_share": {amp: operations / seconds[amp]["median"] / peaks[amp] for amp in PRECISIONS}}


def benchmark_calibration(device: torch.device, repeats: int, quick: bool) -> dict:
    """Seconds a record, with maps, under clean and under calibrated, which shares its passes; "cost" is their ratio."""
    torch.manual_seed(0)
    model = MCF().to(device).eval()
    many = 512 if device.type == "cuda" else 2 if quick else 16
    signals, r_peaks = generate_records(many)
    rng = np.random.default_rng(0)
    sizes = {"residual": passes.BINS, "error": calibration.PLACES, "amplitude": 3}
    fitted, _ = calibration.fit({part: rng.normal(size=(400, size * model.leads)) for part, size in sizes.items()},
                                calibration.UsualErrors(model.leads))

    def run_clean(with_profiles=False):
        return passes.score_split(model, signals, r_peaks, "clean", 30, device, "test", True,
                                   with_profiles=with_profiles)

    def run_calibrated():
        found = run_clean(with_profiles=True)
        scores = calibration.score_records(fitted, calibration.features(found.profiles, signals))
        return calibration.unusual_maps(fitted, found.maps, passes.beat_phases(r_peaks), scores)

    seconds = take_turns({"clean": run_clean, "calibrated": run_calibrated}, repeats, device)
    return {"seconds": seconds, "records": many,
            "cost": seconds["calibrated"]["median"] / seconds["clean"]["median"]}


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
    seconds = take_turns({"plain": lambda: [filter_by_lead() for _ in range(20)],
                          "ours": lambda: [filter_leads(record) for _ in range(20)]}, repeats, torch.device("cpu"))
    return {"seconds_of_20_records": seconds, "speedup": seconds["plain"]["median"] / seconds["ours"]["median"]}


def require_equal(what: str, found: np.ndarray, expected: np.ndarray):
    """Stop where found differs from expected by more than TOLERANCE, relative to the largest expected value."""
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference <= TOLERANCE:
        raise UserError(f"benchmark.py: the {what} of the fast path differ by {difference:.1e} from the plain ones, "
                        "which no speed makes up for; please report it with the versions in requirements.txt")


def name_cpu() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_report(found: dict):
    """Print the table."""
    print(f"{found['machine']}, {found['device']}, {found['cores']} cores, torch {found['versions']['torch']}")
    print(f"{'':<44}{'plain':>12}{'float32':>12}{'bf16':>12}{'speedup':>10}{'of peak':>9}{'bf16':>10}{'of peak':>9}")
    for name, unit in (("training", "seconds"), ("detection", "seconds_a_record"),
                       ("localization", "seconds_a_record")):
        entry = found[name]
        best = "bf16, compiled" if "bf16, compiled" in entry[unit] else "bf16"
        times = "".join(f"{1e3 * entry[unit][kind]['median']:>10.1f}ms" for kind in ("plain", "off", best))
        print(f"{name + (', a step' if name == 'training' else ', a record'):<44}{times}"
              + "".join(f"{entry['speedup'][amp]:>9.2f}x{100 * entry['peak_share'][amp]:>8.0f}%" for amp in PRECISIONS))
    if found["filter"]:
        times = found["filter"]["seconds_of_20_records"]
        print(f"{'filter, a record (against HeartPy)':<44}"
              + "".join(f"{50 * times[kind]['median']:>10.1f}ms" for kind in ("plain", "ours"))
              + f"{found['preprocess_speedup']:>21.2f}x")
    else:
        print("filter: not measured, HeartPy is not installed")
    print(f"calibrated costs {found['calibrated']['cost']:.3f} times what clean costs")
    print(f"a large matrix product: {found['peak_gflops']['off']:.0f} GFLOP/s in float32, "
          f"{found['peak_gflops']['bf16']:.0f} in bf16; peak memory {found['peak_memory_gb']:.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and records: a check, not a measurement")
    parser.add_argument("--output_dir", default="results/", help="folder of benchmark.json (default %(default)s)")
    arguments = parser.parse_args()
    device, repeats = choose_device(arguments.device), 2 if arguments.quick else 7
    require_writable(arguments.output_dir)
    peaks = {amp: measure_peak(device, dtype, 10) for amp, dtype in PRECISIONS.items()}
    found = {"training": benchmark_training(device, repeats, peaks),
             "detection": benchmark_scoring(device, repeats, peaks, False, arguments.quick),
             "localization": benchmark_scoring(device, repeats, peaks, True, arguments.quick),
             "calibrated": benchmark_calibration(device, repeats, arguments.quick),
             "filter": benchmark_filter(repeats)}
    headline = "bf16" if device.type == "cuda" else "off"       # the precision that such a device is used with
    found |= {"train_speedup": found["training"]["speedup"][headline],
              "detection_speedup": found["detection"]["speedup"][headline],
              "localization_speedup": found["localization"]["speedup"][headline],
              "preprocess_speedup": found["filter"] and found["filter"]["speedup"],
              "train_peak_share": found["training"]["peak_share"][headline],
              "detection_peak_share": found["detection"]["peak_share"][headline], "headline_precision": headline,
              "peak_gflops": {amp: rate / 1e9 for amp, rate in peaks.items()},
              "peak_memory_gb": (torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else
                                 resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6),
              "quick": arguments.quick, "repeats": repeats, "device": str(device), "cores": usable_cores(),
              "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else name_cpu(),
              "versions": versions(), "commit": git_commit()}
    print_report(found)
    save_json(Path(arguments.output_dir) / "benchmark.json", found)


if __name__ == "__main__":
    run(main)
