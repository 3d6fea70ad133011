"""Anomaly scores, in one place: detection per record, localization per lead and sample, under every protocol.

    paper   the published evaluation, for comparing numbers: input as stored (test set in mV), three passes that mask
            90 % of the recording, the local maps of overlapping beats summed
    clean   what an unbiased reader would do: input normalised as in training, passes that mask every sample exactly
            once, overlapping beats averaged
    calibrated  the passes of clean, whose errors calibration.py judges by what is usual among normal ECGs

A higher score is more anomalous everywhere. Scores are pure functions of model and arrays; train.py calls them for
validation, test.py for the report. The encoders run once a record (and pass), only what depends on the beat runs for
each beat, the beats of many records share a batch, and the network runs in the form that fused.py gives it. Several
processes share the records.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluation import metrics
import parallel
from ecg.arrays import SIGNAL_FILES, read_rows
from dataloader import crop_global, cut_beats, mask_out, normalize_records, scoring_masks, send, undo_scale, valid_beats
from scoring.fused import FusedMCF
from model import BEAT_BEFORE, BEAT_LENGTH, GLOBAL_LENGTH, GLOBAL_START, MCF, compute_trend, restoration_errors
from ecg.signals import RECORD_LENGTH
from utils import UserError

PROTOCOLS = ("paper", "clean", "calibrated")
PASSES = {"paper": "paper", "clean": "clean", "calibrated": "clean"}    # whose passes through the network it needs
PLAIN_PROTOCOLS = ("paper", "clean")                    # those that score with the network alone
BINS = 24                           # places of a beat, or phases between two R peaks, at which errors are gathered
SMOOTHING = 15                      # samples, sigma of the Gaussian over a lead's score map
SMOOTHING_REACH = 4 * SMOOTHING     # samples on either side, where scipy's gaussian_filter1d ends too
RECORDS_AT_ONCE = {"cpu": 32, "mps": 32, "cuda": 128}   # whose tokens are held together
BEATS_AT_ONCE = {"cpu": 24, "mps": 64, "cuda": 256}     # in a pass through the decoders, a number that fills the device


def protocols_for(model: MCF, wanted) -> tuple:
    """Those of the wanted protocols that a network can be scored under.

    "paper" feeds what is stored, mV or min-max; to a network trained on --normalization scale that means nothing.
    """
    return tuple(name for name in wanted if name != "paper" or model.lead_scale is None)


@dataclass
class Scores:
    """What a protocol says of a split.

    scores: (records,); maps: (records, 4800, leads) or None; profiles: of BeatProfiles, (records, BINS, leads) each,
    empty where they were not asked for.
    """
    scores: np.ndarray
    maps: np.ndarray | None
    profiles: dict
    without_r_peak: int             # records in which no R peak was found
    without_valid_beat: int         # records scored on evenly spaced windows, those among them included


@torch.inference_mode()
def score_split(model: MCF, signals, r_peaks: list, protocol: str, mask_ratio: int, device: torch.device, split: str,
                with_maps: bool = False, beats_per_record: int | None = None, amp: str = "off",
                with_profiles: bool = False) -> Scores:
    """Score the records of a split under one of PLAIN_PROTOCOLS.

    signals: (records, 5000, leads), memory-mapped, or a tensor on the device; r_peaks: of every record;
    beats_per_record: only that many beats of each, evenly chosen (default all); amp: "bf16" lets the convolutions
    compute in bfloat16. The model is put in eval mode for the time, and back. Every process scores its share of the
    records and returns the scores of all. A GPU short of memory gets smaller batches, which does not change the
    scores. Raises UserError where a record or a score is not finite.
    """
    beats, real = zip(*map(valid_beats, r_peaks))
    beats = [thin_out(positions, beats_per_record) for positions in beats]
    masks = [mask.to(device) for mask in scoring_masks(protocol, mask_ratio)]
    scores = torch.zeros(len(signals), device=device)
    maps = np.zeros((len(signals), GLOBAL_LENGTH, signals.shape[2]), dtype=np.float32) if with_maps else None
    profiles = {name: torch.zeros(len(signals), BINS, signals.shape[2], device=device)
                for name in PROFILES * with_profiles}
    was_training = model.training
    torch.backends.cudnn.benchmark = False          # batches of many sizes: a search for algorithms would not pay
    fused = FusedMCF(model.eval(), torch.bfloat16 if amp == "bf16" else torch.float32)
    at_once = RECORDS_AT_ONCE[device.type]

    def score_rows(some: slice, beats_at_once: int):
        records = (signals[some] if torch.is_tensor(signals) else
                   send(read_rows(signals, np.arange(len(signals))[some], SIGNAL_FILES.get(split, split)), device))
        if protocol != "paper":
            records = normalize_records(records, fused.lead_scale)
        scores[some], found, of_beats = score_records(fused, records, beats[some], masks, protocol, with_maps,
                                                      beats_at_once, with_profiles)
        for name, profile in of_beats.items():
            profiles[name][some] = profile
        if with_maps:
            maps[some] = smooth_maps(found).cpu().numpy()

    blocks = range(parallel.RANK * at_once, len(signals), parallel.PROCESSES * at_once)
    size = BatchSize(at_once, BEATS_AT_ONCE[device.type])
    for start in tqdm(blocks, desc=f"{protocol}, {split}", unit="batch", leave=False, disable=parallel.RANK > 0):
        within_memory(score_rows, start, min(start + at_once, len(signals)), size)
    model.train(was_training)
    scores = parallel.add_up(scores).cpu().numpy().astype(np.float64)
    profiles = {name: parallel.add_up(profile).cpu().numpy() for name, profile in profiles.items()}
    if with_maps and parallel.PROCESSES > 1:
        maps = parallel.add_up(torch.from_numpy(maps).to(device)).cpu().numpy()
    if not np.isfinite(scores).all():
        raise UserError(f"the network gives row {np.flatnonzero(~np.isfinite(scores))[0]} of "
                        f"{SIGNAL_FILES.get(split, split)} no finite score; its weights are not sound, name another "
                        "checkpoint or train it again")
    return Scores(scores, maps, profiles, sum(not len(found) for found in r_peaks), len(signals) - sum(real))


@dataclass
class BatchSize:
    """How many records and beats are scored at once."""
    records: int
    beats: int


def within_memory(score_rows, start: int, end: int, size: BatchSize):
    """Call score_rows(rows as a slice, beats at once) over start:end, size.records rows a call.

    Where the GPU's memory does not hold them, size is halved, for later calls too, and the same rows are scored again.
    Raises UserError where not even one record fits.
    """
    while start < end:
        some = slice(start, min(start + size.records, end))
        try:
            score_rows(some, size.beats)
            start, full = some.stop, False
        except torch.OutOfMemoryError:
            full = True
        if full:            # after the except clause, which holds what the failed call had allocated
            if size.records == size.beats == 1:
                raise UserError("the GPU's free memory does not hold the scoring of one record; end what else runs on "
                                "it, or choose --device cpu")
            size.records, size.beats = max(1, size.records // 2), max(1, size.beats // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tqdm.write(f"out of GPU memory: going on with {size.records} records and {size.beats} beats at once")


def thin_out(positions: np.ndarray, count: int | None) -> np.ndarray:
    """At most count of the positions, the middles of as many equal parts; all of them where count is None."""
    if count is None or len(positions) <= count:
        return positions
    return positions[(2 * np.arange(count) + 1) * len(positions) // (2 * count)]


def score_records(model: FusedMCF, records: torch.Tensor, beats: list, masks: list, protocol: str,
                  with_maps: bool, beats_at_once: int, with_profiles: bool) -> tuple:
    """Score a handful of records: (scores (R,), unsmoothed maps (R, 4800, leads) or None, profiles), on the device.

    records: (R, 5000, leads) as the network shall see them; beats: R-peak positions of each; masks: global (P, 4800)
    and local (P, 480); beats_at_once: in a pass through the decoders.
    """
    device = records.device
    ecg = crop_global(records)
    trend_begun = model.begin_trend(model.encode_trend(compute_trend(ecg)))
    owners = send(np.repeat(np.arange(len(beats)), [len(found) for found in beats]), device)
    positions = send(np.concatenate(beats), device)
    chunks = -(-len(owners) // beats_at_once)
    number = send(np.array([len(found) for found in beats]), device)            # beats of each record
    scores = torch.zeros(len(beats), device=device)
    maps = RestorationMaps(records, len(masks[0]), protocol) if with_maps else None
    profiles = BeatProfiles(records) if with_profiles else None
    for global_mask, local_mask in zip(*masks):
        global_tokens = model.encode_global(mask_out(ecg, global_mask))
        for owner, position in zip(owners.tensor_split(chunks), positions.tensor_split(chunks)):
            beat = cut_beats(records, owner, position, minmax=model.lead_scale is None)
            outputs = model.restore(global_tokens[owner], model.encode_local(mask_out(beat, local_mask)),
                                    trend_begun[owner])
            errors = restoration_errors(outputs, ecg[owner], beat)
            scores.index_add_(0, owner, sum(error.mean(dim=(1, 2)) for error in errors))
            if with_profiles:
                profiles.add(outputs[1][0] - beat, local_mask, errors[1], owner)
            if with_maps:
                maps.add(errors, owner, position)
    return (scores / (number * len(masks[0])), maps.combine(number) if with_maps else None,
            profiles.combine(number, len(masks[0])) if with_profiles else {})


def smooth_maps(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian smoothing of (R, samples, leads) along the samples, as scipy's gaussian_filter1d with its defaults."""
    distance = torch.arange(-SMOOTHING_REACH, SMOOTHING_REACH + 1, device=maps.device) / SMOOTHING
    weight = torch.exp(-distance.square() / 2)
    records, samples, leads = maps.shape
    padded = torch.cat([maps[:, :SMOOTHING_REACH].flip(1), maps, maps[:, -SMOOTHING_REACH:].flip(1)], dim=1)
    lines = padded.transpose(1, 2).reshape(records * leads, 1, -1)              # ends mirrored, as scipy does
    return F.conv1d(lines, (weight / weight.sum())[None, None]).reshape(records, leads, samples).transpose(1, 2)


class RestorationMaps:
    """Gathers error maps beat by beat: the global and trend errors as they are, local ones at their beat's place."""

    def __init__(self, records: torch.Tensor, passes: int, protocol: str):
        self.passes, self.protocol = passes, protocol
        self.whole = torch.zeros_like(crop_global(records))
        self.local = torch.zeros_like(records)
        self.covered = torch.zeros(records.shape[:2], device=records.device)    # by how many beats and passes

    def add(self, errors: tuple, owner: torch.Tensor, position: torch.Tensor):
        """errors: of restoration_errors for n beats; owner, position: their records and R peaks (n,)."""
        error_global, error_local, error_trend = errors
        self.whole.index_add_(0, owner, error_global + error_trend)
        samples = position[:, None] + torch.arange(-BEAT_BEFORE, BEAT_LENGTH - BEAT_BEFORE, device=position.device)
        place = (owner[:, None] * self.local.shape[1] + samples).flatten()      # in all records, one after the other
        self.local.view(-1, self.local.shape[2]).index_add_(0, place, error_local.flatten(0, 1))
        self.covered.view(-1).index_add_(0, place, torch.ones_like(place, dtype=self.covered.dtype))

    def combine(self, beats_of: torch.Tensor) -> torch.Tensor:
        """The maps (R, 4800, leads). Local: mean over passes; over beats their sum (paper) or mean (clean)."""
        count = self.covered.clamp(min=1) if self.protocol == "clean" else torch.full_like(self.covered, self.passes)
        local = self.local / count[..., None]
        return self.whole / (beats_of * self.passes)[:, None, None] + crop_global(local)


PROFILES = ("local_residual", "local_error")


class BeatProfiles:
    """Gathers what the local branch does at each place of the beat, mean over a record's beats: (R, BINS, leads) each.

    local_residual: restored less true, where masked, so that errors which differ from beat to beat cancel;
    local_error: exp(-s) e, masked or not.
    """

    def __init__(self, records: torch.Tensor):
        self.residual, self.error = torch.zeros(2, len(records), BEAT_LENGTH, records.shape[2], device=records.device)

    def add(self, residual: torch.Tensor, mask: torch.Tensor, error: torch.Tensor, owner: torch.Tensor):
        """residual, error: (n, 480, leads) of n beats; mask: (480,) of the pass; owner: their records (n,)."""
        self.residual.index_add_(0, owner, residual * mask[:, None])
        self.error.index_add_(0, owner, error)

    def combine(self, beats_of: torch.Tensor, passes: int) -> dict:
        """The profiles by name. beats_of: (R,); passes: each masks other samples."""
        def mean(total):
            records, samples, leads = total.shape
            return total.reshape(records, BINS, samples // BINS, leads).mean(dim=2) / beats_of[:, None, None]
        return dict(zip(PROFILES, (mean(self.residual), mean(self.error) / passes)))


def beat_phases(r_peaks: list) -> np.ndarray:
    """The phase of each of samples 100:4900 between R peaks, 0 to BINS - 1, the R peak amid phase 0: (R, 4800).

    r_peaks: of each record. Before the first and after the last R peak the nearest interval goes on; around a single
    one it is the length of a beat. Without any, the evenly spaced windows stand for beats.
    """
    samples, found = np.arange(GLOBAL_START, GLOBAL_START + GLOBAL_LENGTH), []
    for positions in r_peaks:
        positions = np.unique(positions if len(positions) else valid_beats(positions)[0])
        intervals = np.diff(positions) if len(positions) > 1 else np.array([BEAT_LENGTH])
        before = positions[0] - intervals[0] * np.arange(RECORD_LENGTH // intervals[0] + 1, 0, -1)
        after = positions[-1] + intervals[-1] * np.arange(1, RECORD_LENGTH // intervals[-1] + 2)
        peaks = np.r_[before, positions, after]
        beats = np.interp(samples, peaks, np.arange(len(peaks)))
        found.append((beats * BINS + 0.5).astype(int) % BINS)
    return np.stack(found)


def detection_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUROC over records: labels (N,) with 1 = abnormal, scores (N,), higher = more anomalous."""
    return float(metrics.auroc(*metrics.count_by_score(labels, scores)))


@torch.inference_mode()
def restore_records(model: MCF, signals: np.ndarray, r_peaks: list, protocol: str, mask_ratio: int,
                    device: torch.device) -> np.ndarray:
    """The recordings as the global branch restores them, (records, 4800, leads), for figures.

    Each sample is the mean over beats, and over those passes that hide it (over all passes where none does).
    signals: (records, 5000, leads), in mV where the network was trained on --normalization scale, and so are then the
    restored ones; else in mV or normalised, and the restored ones normalised. r_peaks: of each.
    """
    masks = [mask.to(device) for mask in scoring_masks(PASSES[protocol], mask_ratio)]
    hidden = masks[0].float()
    weight = torch.where(hidden.sum(dim=0) > 0, hidden, torch.ones_like(hidden))            # (passes, 4800)
    fused, restored = FusedMCF(model.eval(), torch.float32), []
    for record, (positions, _) in zip(signals, map(valid_beats, r_peaks)):
        records = send(np.ascontiguousarray(record, dtype=np.float32)[None], device)
        records = normalize_records(records, fused.lead_scale)
        ecg, positions = crop_global(records), send(positions, device)
        owner = torch.zeros_like(positions)
        beat = cut_beats(records, owner, positions, minmax=fused.lead_scale is None)
        trend = fused.begin_trend(fused.encode_trend(compute_trend(ecg)))[owner]
        passes = [fused.restore(fused.encode_global(mask_out(ecg, global_mask))[owner],
                                fused.encode_local(mask_out(beat, local_mask)), trend)[0][0].mean(dim=0)
                  for global_mask, local_mask in zip(*masks)]
        mean = (torch.stack(passes) * weight[..., None]).sum(0) / weight.sum(0)[:, None]
        if fused.lead_scale is not None:
            mean = undo_scale(mean, fused.lead_scale)
        restored.append(mean.cpu().numpy())
    return np.stack(restored)
