"""From arrays to batches: records, beats, both kinds of masks, normalisation.

Records are (batch, 5000, leads), the network's input is their samples 100:4900; a beat is samples R-140 : R+340 of the
same record, normalised again by its own minimum and maximum. In every mask True means masked: set to 0, to be restored.
"""
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from arrays import SIGNAL_FILES, load_npy, read_rows, signal_path
from model import BEAT_BEFORE, BEAT_LENGTH, GLOBAL_LENGTH, GLOBAL_START, compute_trend, scale_minmax

PATCH_LENGTH = 48                                   # samples of a global mask's patch, 100 patches a recording
FIRST_R, LAST_R = 200, 4400                         # a beat is valid where FIRST_R < R < LAST_R
PUBLISHED_BEAT_MASKS = ((20, 120), (70, 170), (120, 220))


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


def normalize_records(records: torch.Tensor) -> torch.Tensor:
    """Min-max every lead of (B, samples, leads) to [-1, 1], flat leads to 0; normalised records stay as they are."""
    return scale_minmax(records, dim=1)


def cut_beats(records: torch.Tensor, rows: torch.Tensor, r_peaks: torch.Tensor) -> torch.Tensor:
    """The beats around R peaks (n,) of records[rows]: (n, 480, leads), each lead min-max normalised."""
    samples = r_peaks[:, None] + torch.arange(-BEAT_BEFORE, BEAT_LENGTH - BEAT_BEFORE, device=r_peaks.device)
    return scale_minmax(records[rows[:, None], samples], dim=1)


def mask_out(signals: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, samples, leads) with the samples where mask (samples,) is True set to 0, in every lead."""
    return signals.masked_fill(mask[:, None], 0)


def draw_masks(mask_ratio: int, generator: torch.Generator) -> tuple:
    """One random pair of training masks: global (4800,) and local (480,), True = masked.

    mask_ratio percent of the 100 global patches, and one run of mask_ratio percent of the beat.
    """
    patches = torch.zeros(GLOBAL_LENGTH // PATCH_LENGTH, dtype=torch.bool)
    patches[torch.randperm(len(patches), generator=generator)[:len(patches) * mask_ratio // 100]] = True
    run = BEAT_LENGTH * mask_ratio // 100
    start = int(torch.randint(BEAT_LENGTH - run + 1, (1,), generator=generator))
    local_mask = torch.zeros(BEAT_LENGTH, dtype=torch.bool)
    local_mask[start:start + run] = True
    return patches.repeat_interleave(PATCH_LENGTH), local_mask


def scoring_masks(protocol: str, mask_ratio: int) -> tuple:
    """The fixed masks of a protocol's passes: global (P, 4800) and local (P, 480), True = masked.

    paper: pass j masks mask_ratio global patches at 48 j + k * 4800 / mask_ratio, and 100 samples of the beat; at the
    published ratio of 30, three passes cover 90 % of the recording and never the last 260 samples of the beat.
    clean: 100 / mask_ratio passes (rounded, two at least) that together mask every global and every beat sample
    exactly once.
    """
    if protocol == "clean":
        passes = max(2, round(100 / mask_ratio))
        global_pass = torch.arange(GLOBAL_LENGTH) // PATCH_LENGTH % passes
        local_pass = torch.arange(BEAT_LENGTH) * passes // BEAT_LENGTH
        number = torch.arange(passes)[:, None]
        return global_pass == number, local_pass == number
    stride = GLOBAL_LENGTH // mask_ratio
    passes = min(len(PUBLISHED_BEAT_MASKS), max(1, stride // PATCH_LENGTH))
    global_masks = torch.zeros(passes, GLOBAL_LENGTH, dtype=torch.bool)
    local_masks = torch.zeros(passes, BEAT_LENGTH, dtype=torch.bool)
    for j, (start, end) in enumerate(PUBLISHED_BEAT_MASKS[:passes]):
        for patch in range(mask_ratio):
            first = PATCH_LENGTH * j + stride * patch
            global_masks[j, first:first + PATCH_LENGTH] = True
        local_masks[j, start:end] = True
    return global_masks, local_masks


class TrainingRecords(Dataset):
    """The rows of train.npy, fetched a batch at a time; every worker process maps the file for itself."""

    def __init__(self, data_path):
        self.data_path, self.signals = data_path, None

    def __getitems__(self, rows: list) -> tuple:
        """Row numbers -> (the numbers (B,), their records (B, 5000, leads) float32)."""
        if self.signals is None:
            self.signals = load_npy(signal_path(self.data_path, "train"))
        order = np.asarray(rows)
        return torch.from_numpy(order), torch.from_numpy(read_rows(self.signals, order, SIGNAL_FILES["train"]))


def as_it_is(batch):
    """A batch that __getitems__ has already put together (DataLoader would stack its parts)."""
    return batch


class TrainingBatches:
    """The batches of an epoch: shuffled records, one random valid beat of each, one pair of masks a batch.

    All that is random follows from (seed, epoch), whatever the number of workers, so any epoch can be drawn again.
    """

    def __init__(self, rows: np.ndarray, r_peaks: list, arguments, device: torch.device):
        """rows: the rows of train.npy to train on; r_peaks: of every one of its rows.

        arguments: data_path, batch_size, mask_ratio, seed and workers are used.
        """
        self.dataset, self.rows, self.device = TrainingRecords(arguments.data_path), rows, device
        self.beats = {int(row): valid_beats(r_peaks[row])[0] for row in rows}
        self.batch_size, self.mask_ratio = arguments.batch_size, arguments.mask_ratio
        self.seed, self.workers = arguments.seed, arguments.workers

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def draw_epoch(self, epoch: int):
        """Yield (ecg, beat, masked ecg, masked beat, trend) on the device for every batch of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = self.rows[torch.randperm(len(self.rows), generator=generator).numpy()]
        batches = [order[start:start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]
        loader = DataLoader(self.dataset, batch_sampler=batches, num_workers=self.workers,
                            collate_fn=as_it_is, pin_memory=self.device.type == "cuda")
        for rows, records in loader:
            chance = torch.rand(len(rows), generator=generator)
            chosen = [self.beats[row][int(part * len(self.beats[row]))]
                      for row, part in zip(rows.tolist(), chance.tolist())]
            global_mask, local_mask = (mask.to(self.device) for mask in draw_masks(self.mask_ratio, generator))
            yield make_batch(records.to(self.device, non_blocking=True), torch.tensor(chosen, device=self.device),
                             global_mask, local_mask)


def make_batch(records: torch.Tensor, r_peaks: torch.Tensor, global_mask: torch.Tensor, local_mask: torch.Tensor):
    """(B, 5000, leads), one R peak each (B,), and masks -> (ecg, beat, masked ecg, masked beat, trend)."""
    records = normalize_records(records)
    ecg = crop_global(records)
    beat = cut_beats(records, torch.arange(len(records), device=records.device), r_peaks)
    return ecg, beat, mask_out(ecg, global_mask), mask_out(beat, local_mask), compute_trend(ecg)
