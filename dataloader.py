"""From arrays to batches: records, beats, training masks, and how both become the network's input.

Records are (batch, 5000, leads), the network sees their samples 100:4900; a beat is samples R-140 : R+340 of the same
record. In every mask True means masked: set to 0, to be restored.
"""
from dataclasses import dataclass

import numpy as np
import torch

from ecg.arrays import Records, load_r_peaks, load_table, open_records
from ecg.beats import open_beats
from ecg.signals import companding_scale
from model import BEAT_BEFORE, BEAT_LENGTH, GLOBAL_LENGTH, GLOBAL_START, compute_trend
from utils import PROCESSES, RANK, UserError, scale_minmax, undo_minmax

PATCH_LENGTH = 48                                   # samples of a global mask's patch, 100 patches a recording
FIRST_R, LAST_R = 200, 4400                         # a beat is valid where FIRST_R < R < LAST_R
EXPONENT, LINEAR_BELOW = 0.1, 0.005                 # of --input compand; in mV, the size of the noise
SCALE_RECORDS, SCALE_THINNING = 1000, 10            # evenly chosen records and every 10th sample tell it
ROWS_AT_ONCE = 256                                  # while an array is copied to a device


def choose_rows(fold_held_back: int | None, table: dict | None, records: int) -> np.ndarray:
    """The rows of train.npy to train on. table: of its records, None where unknown. Raises UserError."""
    if fold_held_back is None:
        return np.arange(records)
    if table is None or "fold" not in table:
        raise UserError("fold 9 is held back, but no train_records.csv tells the folds of train.npy; make the arrays "
                        "with preprocess.py, or train.py's network with --protocol paper")
    return np.flatnonzero(table["fold"] != fold_held_back)


@dataclass
class TrainingSet:
    """What is trained on: rows of records. r_peaks: of every row of the array; table: of its records, where known."""
    records: Records
    rows: np.ndarray
    r_peaks: list
    table: dict | None = None


def open_training(data_path, leads: int, detector: str, fold_held_back: int | None, beats: str | None = None):
    """The TrainingSet of train.npy, less a fold; with beats, a split of beats.SPLITS, of MIT-BIH's windows, where R
    peaks are annotated. Raises UserError.
    """
    if beats:
        of_mitbih = open_beats(data_path, leads)
        return TrainingSet(of_mitbih.records, *of_mitbih.training_windows(beats))
    records = open_records(data_path, "train", leads)
    table = load_table(data_path, "train", records)
    rows = choose_rows(fold_held_back, table, len(records))
    return TrainingSet(records, rows, load_r_peaks(data_path, "train", records, detector), table)


def valid_beats(r_peaks: np.ndarray) -> tuple:
    """The R peaks whose beats lie inside the recording, and whether they are real.

    Where there is none, the published code divides by zero; here the recording is covered by evenly spaced windows
    instead, so that it is scored like any other: (positions (n,) int64, False).
    """
    positions = np.asarray(r_peaks, dtype=np.int64)
    positions = positions[(positions > FIRST_R) & (positions < LAST_R)]
    if len(positions):
        return positions, True
    return np.arange(FIRST_R + BEAT_BEFORE, LAST_R, BEAT_LENGTH), False


def crop_global(records):
    """(B, 5000, leads), torch or numpy, -> what the network sees of them, (B, 4800, leads)."""
    return records[:, GLOBAL_START:GLOBAL_START + GLOBAL_LENGTH]


def samples_of_beats(r_peaks):
    """The samples of the beats around R peaks (n,), torch or numpy: (n, 480)."""
    first, end = -BEAT_BEFORE, BEAT_LENGTH - BEAT_BEFORE
    return r_peaks[:, None] + (torch.arange(first, end, device=r_peaks.device) if torch.is_tensor(r_peaks) else
                               np.arange(first, end))


def median_beat(record: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """The median of a record's beats, (480, leads), sample by sample and lead by lead.

    record: (5000, leads), mV or min-maxed; r_peaks: valid ones.
    """
    return np.median(record[samples_of_beats(r_peaks)], axis=0).astype(record.dtype)


@dataclass
class Normalisation:
    """How records and beats become the network's input: what MCF.input says, ready for a device.

    Min-max: every lead between its own minimum and maximum in the record, and again in the beat (paper).
    Companding: c(x) = sign(x) min(1, |x| / scale)^exponent of x in mV, a straight line through 0 below linear_below, so
    that no slope is infinite; a beat is cut from that, and not normalised again.
    """
    scale: torch.Tensor | None = None       # (leads,) mV that become 1; None: min-max
    exponent: float = 1.0
    linear_below: float = 0.0               # mV
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, stated: dict, device=torch.device("cpu")) -> "Normalisation":
        """stated: MCF.input."""
        if stated["kind"] == "minmax":
            return cls(device=device)
        return cls(torch.tensor(stated["scale"], device=device), stated["exponent"], stated["linear_below"], device)

    @property
    def needs_millivolts(self) -> bool:
        return self.scale is not None

    def read(self, records: Records, rows) -> np.ndarray:
        """Rows as normalise() wants them, (n, 5000, leads) float32. Raises UserError where no mV are known."""
        return records.millivolts(rows) if self.needs_millivolts else records.read(rows)

    def normalise(self, signals: torch.Tensor) -> torch.Tensor:
        """Records or beats (B, samples, leads) -> the same inside [-1, 1]; a flat lead becomes 0."""
        if not self.needs_millivolts:
            return scale_minmax(signals, signals.amin(1, keepdim=True), signals.amax(1, keepdim=True))
        size = (signals.abs().clamp(min=self.linear_below) / self.scale).clamp(max=1) ** self.exponent
        return size * (signals / self.linear_below).clamp(-1, 1)

    def beats(self, records: torch.Tensor, rows: torch.Tensor, r_peaks: torch.Tensor) -> torch.Tensor:
        """The beats around R peaks (n,) of records[rows], which are not normalised: (n, 480, leads) inside [-1, 1]."""
        return self.normalise(records[rows[:, None], samples_of_beats(r_peaks)])

    def undo(self, normalised: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Normalised records (B, samples, leads) in the unit of the records (B, 5000, leads) that they were made of."""
        if not self.needs_millivolts:
            return undo_minmax(normalised, records.amin(1, keepdim=True), records.amax(1, keepdim=True))
        size = self.scale * normalised.abs() ** (1 / self.exponent)
        knee = (self.linear_below / self.scale).clamp(max=1) ** self.exponent       # what linear_below becomes
        return torch.where(normalised.abs() < knee, normalised / knee * self.linear_below, size * normalised.sign())


def measure_companding(records: Records, rows: np.ndarray, exponent=EXPONENT, linear_below=LINEAR_BELOW) -> dict:
    """MCF.input of a network trained on companded rows of the training records. A lead that is always flat gets 1 mV.

    Raises UserError where nothing tells the records' mV.
    """
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, SCALE_RECORDS).astype(int))]
    values = np.concatenate([records.millivolts(rows[start:start + ROWS_AT_ONCE])[:, ::SCALE_THINNING]
                             for start in range(0, len(rows), ROWS_AT_ONCE)])
    scale = [float(value) or 1.0 for value in companding_scale(values)]
    return {"kind": "compand", "exponent": exponent, "linear_below": linear_below, "scale": scale}


def mask_out(signals: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, samples, leads) with the samples where mask (samples,) is True set to 0, in every lead."""
    return signals.masked_fill(mask[:, None], 0)


def draw_masks(mask_ratio: int, generator: torch.Generator) -> tuple:
    """One random pair of training masks: global (4800,) and local (480,), True = masked.

    mask_ratio percent of the 100 global patches, and one run of mask_ratio percent of the beat, which as published
    starts after the beat's first sample and ends before its last two: at 30, 1 to 334.
    """
    patches = torch.zeros(GLOBAL_LENGTH // PATCH_LENGTH, dtype=torch.bool)
    patches[torch.randperm(len(patches), generator=generator)[:len(patches) * mask_ratio // 100]] = True
    run = BEAT_LENGTH * mask_ratio // 100
    start = int(torch.randint(1, max(2, BEAT_LENGTH - run - 1), (1,), generator=generator))
    local_mask = torch.zeros(BEAT_LENGTH, dtype=torch.bool)
    local_mask[start:start + run] = True
    return patches.repeat_interleave(PATCH_LENGTH), local_mask


def send(block: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device; a GPU copies it while the program goes on."""
    tensor = torch.from_numpy(block)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fits(records: Records, rows: np.ndarray, device: torch.device) -> bool:
    """Whether these rows may live on the device: on a GPU, where they take no more than half of its free memory."""
    if device.type != "cuda":
        return False
    return len(rows) * records.signals[0].size * 4 <= torch.cuda.mem_get_info(device)[0] // 2


class TrainingBatches:
    """The batches of an epoch: shuffled records, one random valid beat of each, one pair of masks a batch.

    All that is random is drawn before an epoch starts and follows from (seed, epoch) alone: any epoch can be drawn
    again, on any device, and no step waits for a random number. Of several processes each draws the same and takes its
    share of every batch. Where the records fit on a GPU they live there, otherwise they stream from the memory map.
    """

    def __init__(self, training: TrainingSet, normalisation: Normalisation, batch_size: int = 32, mask_ratio: int = 30,
                 seed: int = 0, epoch_records: int | None = None):
        """epoch_records: how many of the rows an epoch draws (default: all)."""
        self.records, self.rows, self.table = training.records, training.rows, training.table
        self.normalisation, self.device = normalisation, normalisation.device
        self.batch_size, self.mask_ratio, self.seed = batch_size, mask_ratio, seed
        self.epoch_records = min(len(self.rows), epoch_records or len(self.rows))
        self.rank, self.processes = RANK, PROCESSES
        beats = [valid_beats(training.r_peaks[row])[0] for row in self.rows]
        self.number_of_beats = torch.tensor([len(positions) for positions in beats])
        self.beats = torch.zeros(len(beats), int(self.number_of_beats.max()), dtype=torch.long)
        for row, positions in zip(self.beats, beats):
            row[:len(positions)] = torch.from_numpy(positions)
        self.on_device = self.load_all() if fits(self.records, self.rows, self.device) else None

    def __len__(self):
        return -(-self.epoch_records // self.batch_size)

    def load_all(self) -> torch.Tensor:
        """The rows to train on as one tensor on the device."""
        whole = torch.empty((len(self.rows), *self.records.signals.shape[1:]), device=self.device)
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            whole[part] = send(self.normalisation.read(self.records, self.rows[part]), self.device)
        return whole

    def draw_order(self, epoch: int) -> tuple:
        """The order of an epoch's records, as places in self.rows, and the generator of what is drawn after it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator)[:self.epoch_records], generator

    def rows_of_batch(self, epoch: int, number: int) -> np.ndarray:
        """The rows of train.npy that are in a batch (counted from 0) of an epoch, in all processes."""
        return self.rows_of_epoch(epoch)[number * self.batch_size:][:self.batch_size]

    def rows_of_epoch(self, epoch: int) -> np.ndarray:
        """The rows of train.npy that an epoch draws, in its order."""
        return self.rows[self.draw_order(epoch)[0].numpy()]

    def draw_epoch(self, epoch: int):
        """Yield (batch, share, number of records) for every batch of an epoch.

        batch: (ecg, beat, masked ecg, masked beat, trend) on the device; share: this process's part of the batch over
        an equal part, so 1 for a single process; the records are counted in all processes.
        """
        order, generator = self.draw_order(epoch)
        places = order if self.on_device is None else order.to(self.device)
        chance = torch.rand(len(order), generator=generator)
        r_peaks = self.beats[order, (chance * self.number_of_beats[order]).long()].to(self.device)
        masks = [draw_masks(self.mask_ratio, generator) for _ in range(len(self))]
        global_masks, local_masks = (torch.stack(kind).to(self.device) for kind in zip(*masks))
        for number in range(len(self)):
            start, end = number * self.batch_size, min((number + 1) * self.batch_size, len(order))
            mine = range(start + self.rank, end, self.processes)
            share = len(mine) * self.processes / (end - start)
            mine = mine or range(start, start + 1)      # a process for which none is left: one that counts 0
            some = slice(mine.start, mine.stop, mine.step)
            batch = make_batch(self.fetch(places[some]), r_peaks[some], global_masks[number], local_masks[number],
                               self.normalisation)
            yield batch, share, end - start

    def fetch(self, places: torch.Tensor) -> torch.Tensor:
        """The records at these places in self.rows, (B, 5000, leads) float32 on the device. places: where they lie."""
        if self.on_device is not None:
            return self.on_device[places]
        return send(self.normalisation.read(self.records, self.rows[places.numpy()]), self.device)


def make_batch(records: torch.Tensor, r_peaks: torch.Tensor, global_mask: torch.Tensor, local_mask: torch.Tensor,
               normalisation: Normalisation) -> tuple:
    """(B, 5000, leads), one R peak each (B,), and masks -> (ecg, beat, masked ecg, masked beat, trend)."""
    ecg = crop_global(normalisation.normalise(records))                                   # (B, 4800, leads)
    beat = normalisation.beats(records, torch.arange(len(records), device=records.device), r_peaks)
    return ecg, beat, mask_out(ecg, global_mask), mask_out(beat, local_mask), compute_trend(ecg)
