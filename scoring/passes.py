"""The masked passes of a network over records: anomaly scores of records, maps of leads and samples, restorations.

The encoders run once a record (and pass), only what depends on the beat runs for each beat, the beats of many records
share a batch, and the network runs in the form that fused.py gives it. Several processes share the records.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataloader import Normalisation, crop_global, mask_out, median_beat, samples_of_beats, send, valid_beats
from ecg.arrays import Records
from ecg.signals import RECORD_LENGTH
from model import GLOBAL_LENGTH, MCF, compute_trend, restoration_errors
from scoring.fused import FusedMCF
from scoring.protocols import Protocol
from utils import PROCESSES, RANK, UserError, add_up

SMOOTHING = 15                      # samples, sigma of the Gaussian over a lead's score map
SMOOTHING_REACH = 4 * SMOOTHING     # samples on either side, where scipy's gaussian_filter1d ends too
RECORDS_AT_ONCE = {"cpu": 32, "mps": 32, "cuda": 128}   # whose tokens are held together
BEATS_AT_ONCE = {"cpu": 24, "mps": 64, "cuda": 256}     # in a pass through the decoders, a number that fills the device


@dataclass
class Scores:
    """What a protocol says of records, higher = more anomalous everywhere."""
    scores: np.ndarray              # (records,) float64
    maps: np.ndarray | None         # (records, 4800, leads) float32, smoothed


@dataclass
class Block:
    """Some records on the device as the network sees them, with their beats.

    ecg (R, 4800, leads); beats (n, 480, leads) with their records, owners (n,); places: the R peaks (m,) at which the
    errors of beats[shown] (m,) are laid down in a map, more than n where one median beat stands for all.
    """
    ecg: torch.Tensor
    beats: torch.Tensor
    owners: torch.Tensor
    places: torch.Tensor
    shown: torch.Tensor


class Scorer:
    """Scores records by a network under a protocol, on the network's device. It copies the weights.

    amp: "bf16" lets the convolutions compute in bfloat16. median: whether the local branch sees a record's median beat
    in place of every beat (default: as the protocol says).
    """

    def __init__(self, model: MCF, protocol: Protocol, mask_ratio: int = 30, amp: str = "off",
                 median: bool | None = None):
        self.device = next(model.parameters()).device
        self.protocol, self.masks = protocol, [mask.to(self.device) for mask in protocol.masks(mask_ratio)]
        self.network = FusedMCF(model, torch.bfloat16 if amp == "bf16" else torch.float32)
        self.normalisation = Normalisation.of(model.input, self.device)
        self.median = protocol.median_beat if median is None else median

    @torch.inference_mode()
    def score(self, records: Records, r_peaks: list, rows=None, with_maps: bool = False,
              beats_per_record: int | None = None) -> Scores:
        """Score rows (default: all) of records; with_maps: localize, else detect.

        r_peaks: of every record; beats_per_record: only that many beats of each, evenly chosen (default: all). Where
        the protocol says so detection sees the records as they are stored; maps always are of normalised ones. Every
        process scores its share of the records and returns the scores of all. Raises UserError where a record or a
        score is not finite, or the device's memory is too small.
        """
        rows = np.arange(len(records)) if rows is None else np.asarray(rows)
        scores = torch.zeros(len(rows), device=self.device)
        maps = torch.zeros(len(rows) if with_maps else 0, GLOBAL_LENGTH, records.leads)
        size = RECORDS_AT_ONCE[self.device.type]
        blocks = range(RANK * size, len(rows), PROCESSES * size)
        for start in tqdm(blocks, desc=f"{self.protocol.name}, {records.name}", leave=False, disable=RANK > 0):
            some = slice(start, start + size)
            try:
                block = self.prepare(records, r_peaks, rows[some], not with_maps and self.protocol.as_stored,
                                     beats_per_record)
                scores[some], of_block = self.score_block(block, with_maps)
                if with_maps:
                    maps[some] = smooth_maps(of_block).cpu()
            except torch.OutOfMemoryError as error:
                raise UserError("the GPU's free memory does not hold the scoring; end what else runs on it, or choose "
                                "--device cpu") from error
        scores = add_up(scores).cpu().numpy().astype(np.float64)
        if with_maps and PROCESSES > 1:
            maps = add_up(maps.to(self.device)).cpu()
        if not np.isfinite(scores).all():
            raise UserError(f"the network gives row {rows[~np.isfinite(scores)][0]} of {records.name} no finite score; "
                            "its weights are not sound, name another checkpoint or train it again")
        return Scores(scores, maps.numpy() if with_maps else None)

    def prepare(self, records: Records, r_peaks: list, rows: np.ndarray, as_stored: bool = False,
                beats_per_record: int | None = None) -> Block:
        """Read rows and cut their beats. as_stored: the recordings are not normalised, the beats always are."""
        signals = self.normalisation.read(records, rows)                                    # (R, 5000, leads)
        beats, owners, places, shown = [], [], [], []
        for number, (signal, row) in enumerate(zip(signals, rows)):
            positions, real = valid_beats(r_peaks[row])
            if self.median and real:
                beats.append(median_beat(signal, positions)[None])
                shown.append(np.full(len(positions), len(owners)))
            else:
                positions = thin_out(positions, beats_per_record)
                beats.append(signal[samples_of_beats(positions)])
                shown.append(len(owners) + np.arange(len(positions)))
            places.append(positions)
            owners += [number] * len(beats[-1])
        signals, beats = send(signals, self.device), send(np.concatenate(beats), self.device)
        ecg = signals if as_stored else self.normalisation.normalise(signals)
        return Block(crop_global(ecg), self.normalisation.normalise(beats), send(np.array(owners), self.device),
                     send(np.concatenate(places), self.device), send(np.concatenate(shown), self.device))

    def passes(self, block: Block):
        """Yield (number of the pass, beats as a slice, MCF's outputs for them) over all passes and beats."""
        trend_begun = self.network.begin_trend(self.network.encode_trend(compute_trend(block.ecg)))
        size = BEATS_AT_ONCE[self.device.type]
        for number, (global_mask, local_mask) in enumerate(zip(*self.masks)):
            global_tokens = self.network.encode_global(mask_out(block.ecg, global_mask))
            for start in range(0, len(block.beats), size):
                some = slice(start, start + size)
                local_tokens = self.network.encode_local(mask_out(block.beats[some], local_mask))
                owners = block.owners[some]
                yield number, some, self.network.restore(of_owners(global_tokens, owners), local_tokens,
                                                         of_owners(trend_begun, owners))

    def score_block(self, block: Block, with_maps: bool) -> tuple:
        """(scores (R,), unsmoothed maps (R, 4800, leads) or None) of a block, means over its beats and passes."""
        scores = torch.zeros(len(block.ecg), device=self.device)
        whole, local = torch.zeros_like(block.ecg), torch.zeros_like(block.beats)
        for _, some, outputs in self.passes(block):
            owners = block.owners[some]
            errors = restoration_errors(outputs, block.ecg[owners], block.beats[some])
            scores.index_add_(0, owners, sum(error.mean(dim=(1, 2)) for error in errors))
            if with_maps:
                error_global, error_local, error_trend = errors
                whole.index_add_(0, owners, error_global + error_trend)
                local[some] += error_local
        passes = len(self.masks[0])
        weight = passes * count_places(block.owners, len(scores))
        if not with_maps:
            return scores / weight, None
        return scores / weight, whole / weight[:, None, None] + self.lay_down(block, local / passes)

    @torch.inference_mode()
    def map_few(self, records: Records, r_peaks: list, rows: np.ndarray) -> np.ndarray:
        """The smoothed maps (n, 4800, leads) of a few rows, for figures: by this process alone, whatever others do."""
        return smooth_maps(self.score_block(self.prepare(records, r_peaks, rows), with_maps=True)[1]).cpu().numpy()

    def lay_down(self, block: Block, errors: torch.Tensor) -> torch.Tensor:
        """Errors of beats (n, 480, leads) at their places: (R, 4800, leads), overlapping ones summed or averaged."""
        records, _, leads = block.ecg.shape
        samples = block.owners[block.shown][:, None] * RECORD_LENGTH + samples_of_beats(block.places)   # (m, 480)
        sums = torch.zeros(records * RECORD_LENGTH, leads, device=self.device)
        sums.index_add_(0, samples.flatten(), errors[block.shown].flatten(0, 1))
        if not self.protocol.sum_overlaps:
            sums /= count_places(samples.flatten(), len(sums)).clamp(min=1)[:, None]
        return crop_global(sums.view(records, RECORD_LENGTH, leads))

    @torch.inference_mode()
    def restore(self, records: Records, r_peaks: list, rows) -> tuple:
        """Rows as they are and as the global branch restores them, for figures: two arrays (n, 4800, leads).

        In mV where the records tell it, else min-maxed. Each sample is the mean over beats, and over those passes that
        hide it (over all passes where none does); NaN, which no figure draws, where the network has no global branch.
        """
        rows, originals, restorations = np.asarray(rows), [], []
        hidden = self.masks[0].float()
        weight = torch.where(hidden.sum(dim=0) > 0, hidden, torch.ones_like(hidden))        # (passes, 4800)
        for row in rows[:, None]:
            block = self.prepare(records, r_peaks, row)
            restored = torch.zeros_like(block.ecg[0])
            for number, _, (of_global, _, _) in self.passes(block):
                restored += torch.nan if of_global is None else of_global[0].sum(dim=0) * weight[number][:, None]
            restored /= len(block.beats) * weight.sum(dim=0)[:, None]
            original = send(records.millivolts(row) if records.in_millivolts else records.read(row), self.device)
            originals.append(crop_global(original)[0].cpu().numpy())
            restorations.append(self.normalisation.undo(restored[None], original)[0].cpu().numpy())
        return np.stack(originals), np.stack(restorations)


def count_places(places: torch.Tensor, length: int) -> torch.Tensor:
    """How often each of 0 ... length - 1 is among places: (length,) float32. On a GPU bincount makes the CPU wait."""
    ones = torch.ones(len(places), device=places.device)
    return torch.zeros(length, device=places.device).index_add_(0, places, ones)


def of_owners(tokens: torch.Tensor | None, owners: torch.Tensor):
    """Tokens of the records that own some beats; None where the network has none."""
    return None if tokens is None else tokens[owners]


def thin_out(positions: np.ndarray, count: int | None) -> np.ndarray:
    """At most count of the positions, the middles of as many equal parts; all of them where count is None."""
    if count is None or len(positions) <= count:
        return positions
    return positions[(2 * np.arange(count) + 1) * len(positions) // (2 * count)]


def smooth_maps(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian smoothing of (R, samples, leads) along the samples, as scipy's gaussian_filter1d with its defaults."""
    distance = torch.arange(-SMOOTHING_REACH, SMOOTHING_REACH + 1, device=maps.device) / SMOOTHING
    weight = torch.exp(-distance.square() / 2)
    records, samples, leads = maps.shape
    padded = torch.cat([maps[:, :SMOOTHING_REACH].flip(1), maps, maps[:, -SMOOTHING_REACH:].flip(1)], dim=1)
    lines = padded.transpose(1, 2).reshape(records * leads, 1, -1)              # ends mirrored, as scipy does
    return F.conv1d(lines, (weight / weight.sum())[None, None]).reshape(records, leads, samples).transpose(1, 2)
