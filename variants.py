"""What else was tried, measured on fold 9: prints the tables of RESULTS.md. Nothing in here is part of the product.

    python variants.py training --data_path ./data/         # an hour: short trainings, one a variant
    python variants.py scoring --load_path ./ckpt/mymodel.pt # minutes: scores from the same weights
    python variants.py maps --load_path ./ckpt/mymodel.pt    # minutes: maps, against a weak truth

Fold 9's abnormal records choose between variants here and teach none of them anything. All passes are in bfloat16.
"""
import argparse
import math
from types import SimpleNamespace

import numpy as np
import torch

import calibration
import metrics
import scoring
from arrays import (SIGNAL_FILES, VALIDATION_FOLD, load_details, load_r_peaks, load_records, open_labels, open_signals,
                    read_rows)
from dataloader import (TrainingBatches, crop_global, cut_beats, draw_masks, mask_out, measure_lead_scale,
                        normalize_records, scoring_masks, valid_beats)
from fused import FusedMCF
from model import MCF, build_decoder, compute_trend, load_checkpoint, restoration_errors
from signals import LEAD_NAMES
from train import WEIGHT_DECAY, TrainingStep
from utils import add_published_flags, run

CPU = torch.device("cpu")
RECORDS, EPOCHS, RATE = 960, 10, 3e-4       # of a short training: 300 steps
JUDGED, BEATS = 700, 2                      # records of fold 9 and beats of each that judge a training
BEATS_SCORED = 6                            # of each record, where all of fold 9 is scored


class MasksPerRecord(TrainingBatches):
    """Every record of a batch gets masks of its own."""

    def draw_epoch(self, epoch):
        generator = torch.Generator().manual_seed(77 * 1_000_003 + epoch)
        for (ecg, beat, _, _, trend), share, records in super().draw_epoch(epoch):
            masks = zip(*(draw_masks(30, generator) for _ in range(len(ecg))))
            global_masks, local_masks = (torch.stack(kind)[..., None] for kind in masks)
            yield (ecg, beat, ecg.masked_fill(global_masks, 0), beat.masked_fill(local_masks, 0), trend), share, records


class FreeVariance(MCF):
    """A log-variance for each lead, outside Tanh."""

    def __init__(self):
        super().__init__()
        self.global_decoder, self.local_decoder = (build_decoder(self.hidden, 2 * self.leads)[:-1] for _ in range(2))
        self.to(memory_format=torch.channels_last)

    def restore_signal(self, decoder, tokens):
        output = decoder(tokens.unsqueeze(2)).squeeze(2).transpose(1, 2)
        signal, log_variance = output[..., :self.leads], output[..., self.leads:]
        return (torch.tanh(signal) if log_variance.shape[-1] else signal), log_variance.clamp(-8, 8)


VARIANTS = {"as published": {}, "masks drawn for each record": {"batches": MasksPerRecord},
            "log-variance of each lead, outside Tanh": {"network": FreeVariance},
            "no epoch at rate 0": {"shift": 1}, "--normalization scale": {"scale": True}}


def auroc(labels, scores) -> float:
    """AUROC of records or points, higher = more anomalous."""
    return scoring.detection_auroc(np.asarray(labels), np.asarray(scores))


def train_variant(data_path, seed: int, network=MCF, batches=TrainingBatches, shift: int = 0, scale: bool = False):
    """A short training: (network, its lead scale or None)."""
    signals = open_signals(data_path, "train", 12)
    rows = np.flatnonzero(load_records(data_path, "train", signals)["fold"] != VALIDATION_FOLD)
    rows = rows[np.linspace(0, len(rows) - 1, RECORDS).astype(int)]
    details = load_details(data_path, "train", signals)
    lead_scale = measure_lead_scale(signals, rows, details) if scale else None
    settings = SimpleNamespace(data_path=data_path, batch_size=32, mask_ratio=30, seed=seed, workers=0, amp="bf16")
    drawn = batches(signals, rows, load_r_peaks(data_path, "train", signals), settings, CPU, lead_scale, details)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    step = TrainingStep(model, optimizer, CPU, "bf16")
    for epoch in range(1, EPOCHS + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * (epoch - shift) / EPOCHS))
        torch.manual_seed(seed * 1_000_003 + epoch)
        for batch, share, _ in drawn.draw_epoch(epoch):
            step(batch, share)
    return model.eval(), lead_scale


@torch.inference_mode()
def judge_training(model, lead_scale, data_path) -> tuple:
    """AUROC on fold 9 under clean, with the plain network: of the published sum, and of its masked part alone."""
    signals = open_signals(data_path, "val", 12)
    labels, r_peaks = open_labels(data_path, "val", (len(signals),)), load_r_peaks(data_path, "val", signals)
    rows = np.linspace(0, len(signals) - 1, JUDGED).astype(int)
    scale = None if lead_scale is None else torch.tensor(lead_scale)
    whole, masked = np.zeros((2, len(rows)))
    for place, row in enumerate(rows):
        record = normalize_records(torch.from_numpy(read_rows(signals, [row], SIGNAL_FILES["val"])), scale)
        beats = torch.from_numpy(scoring.thin_out(valid_beats(r_peaks[row])[0], BEATS))
        owner = torch.zeros_like(beats)
        ecg, beat = crop_global(record)[owner], cut_beats(record, owner, beats, minmax=scale is None)
        for global_mask, local_mask in zip(*scoring_masks("clean", 30)):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(mask_out(ecg, global_mask), mask_out(beat, local_mask), compute_trend(ecg))
            errors = [error.float() for error in restoration_errors(outputs, ecg, beat)]
            whole[place] += sum(float(error.mean()) for error in errors)
            masked[place] += sum(float(error[:, mask].mean()) for error, mask in
                                 zip(errors, (global_mask, local_mask, global_mask)))
    return auroc(labels[rows], whole), auroc(labels[rows], masked)


def compare_trainings(arguments):
    """Print a row a variant."""
    for name, options in VARIANTS.items():
        sums = judge_training(*train_variant(arguments.data_path, arguments.seed, **options), arguments.data_path)
        print(f"{name:<42} seed {arguments.seed}  sum {sums[0]:.4f}  masked part {sums[1]:.4f}", flush=True)


@torch.inference_mode()
def local_latents(model, signals, r_peaks) -> np.ndarray:
    """The local branch's token of the unmasked beats, mean over a record's beats: (records, hidden)."""
    fused, found = FusedMCF(model), []
    scale = fused.lead_scale
    for row, positions in enumerate(map(valid_beats, r_peaks)):
        record = normalize_records(torch.from_numpy(read_rows(signals, [row], SIGNAL_FILES["val"])), scale)
        beats = torch.from_numpy(scoring.thin_out(positions[0], BEATS_SCORED))
        tokens = fused.encode_local(cut_beats(record, torch.zeros_like(beats), beats, minmax=scale is None))
        found.append(tokens[:, :, 0].mean(dim=0).numpy())
    return np.stack(found)


def held_out_distance(part: str, values: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """calibration.distance of every record of fold 9 in units of the normals' spread, theirs cross-fitted: (N,)."""
    found = calibration.distance(calibration.fit_part(part, values[normal]), values)
    for rows in np.array_split(normal, calibration.CROSS_FITS):
        found[rows] = calibration.distance(calibration.fit_part(part, values[np.setdiff1d(normal, rows)]), values[rows])
    return (found - found[normal].mean()) / found[normal].std()


def compare_scores(arguments):
    """Print a row a score of the same weights."""
    model, _ = load_checkpoint(arguments.load_path)
    signals = open_signals(arguments.data_path, "val", 12)
    labels, r_peaks = open_labels(arguments.data_path, "val", (len(signals),)), load_r_peaks(
        arguments.data_path, "val", signals)
    normal = np.flatnonzero(labels == 0)
    for ratio in (15, 30):                          # 30 comes last and is what all else uses
        scored = scoring.score_split(model, signals, r_peaks, "clean", ratio, CPU, "val", amp="bf16",
                                     beats_per_record=BEATS_SCORED, with_profiles=True)
        print(f"published sum, {len(scoring_masks('clean', ratio)[0])} passes: {auroc(labels, scored.scores):.4f}",
              flush=True)
    found = calibration.features(scored.profiles, signals)
    by_lead = np.log(scored.profiles["local_error"].mean(axis=1) + calibration.LEAST_ERROR)
    usual = by_lead[normal]
    z_by_lead = (by_lead - usual.mean(axis=0)) / usual.std(axis=0)
    print(f"z of the log local error by lead, mean: {auroc(labels, z_by_lead.mean(axis=1)):.4f}")
    found["latent"] = local_latents(model, signals, r_peaks)
    z = {name: held_out_distance(name, values.astype(np.float64), normal) for name, values in found.items()}
    z["residual, Mahalanobis"] = held_out_distance("error", found["residual"], normal)
    for names in (*((name,) for name in z), ("residual", "amplitude"), ("residual", "error"), calibration.PARTS,
                  (*calibration.PARTS, "latent"), ("residual", "residual, Mahalanobis", "amplitude")):
        print(f"{' + '.join(names):<55}{auroc(labels, sum(z[name] for name in names)):.4f}")


# A weak truth for maps, from SCP statements: (phases, leads) that a statement makes suspect. ludb.RULES is its model.
WALLS = {"inferior": "II III aVF", "septal": "V1 V2", "anterior": "V2 V3 V4", "lateral": "I aVL V5 V6"}
SUSPECT = {**dict.fromkeys(("CLBBB", "CRBBB", "PACE"), (("QRS", "ST", "T"), "all")),
           **dict.fromkeys(("IRBBB", "ILBBB", "LAFB", "LPFB", "IVCD", "LVH", "RVH", "SEHYP"), (("QRS",), "all")),
           **dict.fromkeys(("LAO/LAE", "RAO/RAE", "1AVB"), (("P",), "all")),
           **dict.fromkeys(("AFIB", "AFLT"), (("P", "TP"), "all")),
           **dict.fromkeys(("ISC_", "STD_"), (("ST", "T"), "all")),
           **dict.fromkeys(("NDT", "NT_", "NST_"), (("T",), "all")), "ISCIN": (("ST", "T"), "inferior"),
           "ISCAL": (("ST", "T"), "anterior lateral"), "ISCAS": (("ST", "T"), "septal anterior"),
           "ISCLA": (("ST", "T"), "lateral"), "IMI": (("QRS",), "inferior"), "ILMI": (("QRS",), "inferior lateral"),
           "AMI": (("QRS",), "anterior"), "ASMI": (("QRS",), "septal anterior"), "LMI": (("QRS",), "lateral"),
           "ALMI": (("QRS",), "anterior lateral")}
CODES = {"P": 1, "QRS": 2, "ST": 3, "T": 4, "TP": 5}
SUSPECTS, HEALTHY = 320, 160                # records of fold 9 that the maps are judged on, and fitted to


def guess_phases(r_peaks: np.ndarray) -> np.ndarray:
    """The wave that each of samples 100:4900 is in by the R peaks alone, CODES, 0 where unknown: (4800,)."""
    found, peaks = np.zeros(5000, dtype=np.uint8), np.asarray(r_peaks)
    if len(peaks) < 3:
        return found[100:4900]
    found[peaks[0]:peaks[-1]] = CODES["TP"]
    intervals = np.diff(peaks)
    for r, before, after in zip(peaks, np.r_[intervals[0], intervals], np.r_[intervals, intervals[-1]]):
        end_of_t = r + min(0.52 * after, 60 + 0.33 * after)
        for name, start, stop in (("P", r - min(100, 0.25 * before), r - 30), ("ST", r + 30, r + 55),
                                  ("T", r + 55, end_of_t)):
            found[max(int(start), peaks[0]):max(min(int(stop), peaks[-1]), peaks[0])] = CODES[name]
    for r in peaks:
        found[max(0, r - 28):r + 30] = CODES["QRS"]
    return found[100:4900]


def suspect_points(phases: np.ndarray, statements: str) -> np.ndarray:
    """The weak truth of a record: uint8 (4800, 12), 1 suspect, 255 unknown."""
    labels = np.zeros((len(phases), 12), dtype=np.uint8)
    for names, walls in (SUSPECT[code] for code in statements.split() if code in SUSPECT):
        leads = LEAD_NAMES if walls == "all" else " ".join(WALLS[wall] for wall in walls.split()).split()
        labels |= np.outer(np.isin(phases, [CODES[name] for name in names]), [lead in leads for lead in LEAD_NAMES])
    labels[phases == 0] = 255
    return labels


def compare_maps(arguments):
    """Print a row a map: mean AUROC within a phase, pooled, mean per record, against the weak truth of fold 9."""
    model, _ = load_checkpoint(arguments.load_path)
    signals = open_signals(arguments.data_path, "val", 12)
    labels, r_peaks = open_labels(arguments.data_path, "val", (len(signals),)), load_r_peaks(
        arguments.data_path, "val", signals)
    statements = load_records(arguments.data_path, "val", signals)["statements"]
    suspect = np.array([any(code in SUSPECT for code in text.split()) for text in statements])
    rng = np.random.default_rng(0)
    rows = np.sort(np.r_[rng.permutation(np.flatnonzero(suspect & (labels == 1)))[:SUSPECTS],
                         rng.permutation(np.flatnonzero(~suspect & (labels == 0)))[:HEALTHY]])
    peaks, block = [r_peaks[row] for row in rows], read_rows(signals, rows, SIGNAL_FILES["val"])
    scored = scoring.score_split(model, block, peaks, "clean", 30, CPU, "val", with_maps=True, amp="bf16",
                                 with_profiles=True)
    healthy, phases = labels[rows] == 0, scoring.beat_phases(peaks)
    usual = calibration.UsualErrors(12)
    usual.add(scored.maps[healthy], phases[healthy])
    found = calibration.features(scored.profiles, block)
    fitted, held_out = calibration.fit({part: values[healthy] for part, values in found.items()}, usual)
    scores = calibration.score_records(fitted, found)
    scores[healthy] = held_out
    guessed = np.stack([guess_phases(positions) for positions in peaks])
    truth = np.stack([suspect_points(phase, text) for phase, text in zip(guessed, statements[rows])])
    judge_maps("clean", scored.maps, truth, guessed)
    for of_record, of_usual in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2)):
        maps = calibration.unusual_maps(fitted, scored.maps, phases, scores, of_record, of_usual)
        judge_maps(f"z + {of_record} record + {of_usual} usual error", maps, truth, guessed)


def judge_maps(name: str, maps: np.ndarray, truth: np.ndarray, guessed: np.ndarray):
    """Print a row of compare_maps."""
    ranking = metrics.PointRanking(truth, maps, metrics.draw_records(len(maps), 1))
    matched = [ranking.pool(guessed[:, :, None] == code)["auroc"]["value"] for code in CODES.values()]
    print(f"{name:<34} phase-matched {np.mean(matched):.4f}  pooled {ranking.pool()['auroc']['value']:.4f}  per record "
          f"{ranking.average_records()['auroc']['value']:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"training": compare_trainings, "scoring": compare_scores, "maps": compare_maps}
    parser.add_argument("what", choices=modes)
    add_published_flags(parser).add_argument("--load_path", default="./ckpt/mymodel.pt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)                        # so that two modes may run beside each other
    modes[arguments.what](arguments)


if __name__ == "__main__":
    run(main)
