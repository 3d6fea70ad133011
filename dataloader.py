"""From arrays to batches: records, beats, both kinds of masks, normalisation.

Records are (batch, 5000, leads), the network's input is their samples 100:4900; a beat is samples R-140 : R+340 of the
same record, normalised again by its own minimum and maximum. In every mask True means masked: set to 0, to be restored.
"""
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import parallel
from ecg.arrays import SIGNAL_FILES, load_npy, read_rows, signal_path
from model import BEAT_BEFORE, BEAT_LENGTH, GLOBAL_LENGTH, GLOBAL_START, compute_trend, scale_minmax
from utils import UserError

PATCH_LENGTH = 48                                   # samples of a global mask's patch, 100 patches a recording
FIRST_R, LAST_R = 200, 4400                         # a beat is valid where FIRST_R < R < LAST_R
PUBLISHED_BEAT_MASKS = ((20, 120), (70, 170), (120, 220))
SCALE_QUANTILE = 0.99                               # of |mV| in a lead becomes 1 under --normalization scale
SOFT_LIMIT = 0.999                                  # 22 times the scale, taken for no more when it is undone
SCALE_RECORDS, SCALE_THINNING = 1000, 10            # evenly chosen records and every 10th sample tell it
ROWS_AT_ONCE = 256                                  # while an array is copied to a device


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


def normalize_records(records: torch.Tensor, lead_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Records (B, samples, leads) as the network is trained on them, inside [-1, 1].

    lead_scale None: min-max of every lead, flat leads to 0 (paper); normalised records stay as they are. Else (leads,)
    in mV, the records in mV too: u / sqrt(1 + u^2) with u = x / lead_scale, which keeps amplitude and stays where the
    decoders' Tanh reaches.
    """
    if lead_scale is None:
        return scale_minmax(records, dim=1)
    ratio = records / lead_scale
    return ratio * torch.rsqrt(1 + ratio.square())


def undo_scale(normalised: torch.Tensor, lead_scale: torch.Tensor) -> torch.Tensor:
    """The mV (..., leads) that normalize_records with a lead_scale made these of; what Tanh drove to 1 stays finite."""
    inside = normalised.clamp(-SOFT_LIMIT, SOFT_LIMIT)
    return lead_scale * inside * torch.rsqrt(1 - inside.square())


def cut_beats(records: torch.Tensor, rows: torch.Tensor, r_peaks: torch.Tensor, minmax: bool = True) -> torch.Tensor:
    """The beats around R peaks (n,) of records[rows]: (n, 480, leads), with minmax each lead normalised again."""
    samples = r_peaks[:, None] + torch.arange(-BEAT_BEFORE, BEAT_LENGTH - BEAT_BEFORE, device=r_peaks.device)
    beats = records[rows[:, None], samples]
    return scale_minmax(beats, dim=1) if minmax else beats


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


def to_millivolts(normalised, details: dict, rows):
    """Undo the min-max of rows of a normalised array, (n, 5000, leads), torch or numpy.

    details: "low" and "high" (records, leads) as arrays.load_details gives them; rows: which of them.
    """
    low, high = (details[name][rows][:, None] for name in ("low", "high"))
    return (normalised + 1) / 2 * (high - low) + low


def measure_lead_scale(signals: np.ndarray, rows: np.ndarray, details: dict) -> list:
    """The mV of each lead that normalize_records takes for 1: a high quantile over rows of train.npy, (leads,) floats.

    details: of arrays.load_details. A lead that is flat in all of them gets 1 mV.
    """
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, SCALE_RECORDS).astype(int))]
    values = to_millivolts(read_rows(signals, rows, SIGNAL_FILES["train"])[:, ::SCALE_THINNING], details, rows)
    found = np.quantile(np.abs(values), SCALE_QUANTILE, axis=(0, 1))
    return [float(value) or 1.0 for value in found]


def send(block: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device; a GPU copies it while the program goes on."""
    tensor = torch.from_numpy(block)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def hold(signals: np.ndarray, rows: np.ndarray, name: str, device: torch.device, dtype: torch.dtype):
    """Rows of a memory-mapped array as one tensor on the device, or None where they do not fit.

    name: the file, for the message of UserError.
    """
    if not fits(signals, rows, device, dtype):
        return None
    held = torch.empty((len(rows), *signals.shape[1:]), dtype=dtype, device=device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        held[part] = send(read_rows(signals, rows[part], name), device)
    return held


def fits(signals: np.ndarray, rows: np.ndarray, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these rows may live on the device: on a GPU, where they take no more than half of its free memory."""
    if device.type != "cuda":
        return False
    return len(rows) * signals[0].size * dtype.itemsize <= torch.cuda.mem_get_info(device)[0] // 2


class TrainingRecords(Dataset):
    """The rows of train.npy, fetched a batch at a time; every worker process maps the file for itself."""

    def __init__(self, data_path):
        self.data_path, self.signals = data_path, None

    def __getitems__(self, rows: list) -> torch.Tensor:
        """Row numbers -> their records (B, 5000, leads) float32."""
        if self.signals is None:
            self.signals = load_npy(signal_path(self.data_path, "train"))
        return torch.from_numpy(read_rows(self.signals, np.asarray(rows), SIGNAL_FILES["train"]))


def as_it_is(batch):
    """A batch that __getitems__ has already put together (DataLoader would stack its parts)."""
    return batch


class TrainingBatches:
    """The batches of an epoch: shuffled records, one random valid beat of each, one pair of masks a batch.

    All that is random is drawn before an epoch starts and follows from (seed, epoch) alone: any epoch can be drawn
    again, by any number of workers, on any device, and no step waits for a random number. Of several processes each
    draws the same and takes its share of every batch. Where the records fit on the device they live there (float16
    with --amp bf16, else float32), otherwise they stream from the memory map.
    """

    def __init__(self, signals: np.ndarray, rows: np.ndarray, r_peaks: list, arguments, device: torch.device,
                 lead_scale: list | None = None, details: dict | None = None):
        """rows: the rows of the training array to train on; r_peaks: of every one of its rows.

        arguments: data_path, batch_size, mask_ratio, seed, workers and amp are used. lead_scale: of normalize_records,
        with details, of arrays.load_details, that lead back to mV; None for min-max.
        """
        self.rows, self.device, self.arguments = rows, device, arguments
        self.lead_scale = None if lead_scale is None else torch.tensor(lead_scale, device=device)
        self.bounds = None if lead_scale is None else {name: torch.from_numpy(details[name][rows]).to(device)
                                                       for name in ("low", "high")}
        beats = [valid_beats(r_peaks[row])[0] for row in rows]
        self.number_of_beats = torch.tensor([len(found) for found in beats])
        self.beats = torch.zeros(len(beats), int(self.number_of_beats.max()), dtype=torch.long)
        for row, found in zip(self.beats, beats):
            row[:len(found)] = torch.from_numpy(found)
        dtype = torch.float16 if arguments.amp == "bf16" else torch.float32
        self.held = hold(signals, rows, SIGNAL_FILES["train"], device, dtype)

    def __len__(self):
        return -(-len(self.rows) // self.arguments.batch_size)

    def shares(self) -> list:
        """Of every batch: (this process's places in the shuffled order, how many they are, how many the batch has).

        A process for which none is left gets the batch's first record, and counts 0.
        """
        size, found = self.arguments.batch_size, []
        for start in range(0, len(self.rows), size):
            end = min(start + size, len(self.rows))
            mine = range(start + parallel.RANK, end, parallel.PROCESSES)
            found.append((mine or range(start, start + 1), len(mine), end - start))
        return found

    def draw_order(self, epoch: int) -> tuple:
        """The order of an epoch's records, as places in self.rows, and the generator of what is drawn after it."""
        generator = torch.Generator().manual_seed(self.arguments.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator), generator

    def rows_of_batch(self, epoch: int, number: int) -> np.ndarray:
        """The rows of train.npy that are in a batch (counted from 0) of an epoch, in all processes."""
        size = self.arguments.batch_size
        return self.rows[self.draw_order(epoch)[0][number * size:(number + 1) * size].numpy()]

    def draw_epoch(self, epoch: int):
        """Yield (batch, share, records) for every batch of an epoch.

        batch: (ecg, beat, masked ecg, masked beat, trend) on the device; share: this process's part of the batch
        over an equal part, so 1 for a single process; records: in the batch, in all processes.
        """
        order, generator = self.draw_order(epoch)
        chance = torch.rand(len(order), generator=generator)
        r_peaks = self.beats[order, (chance * self.number_of_beats[order]).long()].to(self.device)
        masks = [draw_masks(self.arguments.mask_ratio, generator) for _ in range(len(self))]
        global_masks, local_masks = (torch.stack(kind).to(self.device) for kind in zip(*masks))
        shares = self.shares()
        for number, records in enumerate(self.fetch(order, [places for places, _, _ in shares])):
            places, mine, of_all = shares[number]
            chosen = slice(places.start, places.stop, places.step)
            if self.lead_scale is not None:
                records = to_millivolts(records, self.bounds, order[chosen].to(self.device))
            batch = make_batch(records, r_peaks[chosen], global_masks[number], local_masks[number], self.lead_scale)
            yield batch, mine * parallel.PROCESSES / of_all, of_all

    def fetch(self, order: torch.Tensor, batches: list):
        """Yield the records (B, 5000, leads) float32 at these places of the order, batch by batch, on the device."""
        if self.held is not None:
            order = order.to(self.device)
            for places in batches:
                yield self.held[order[places.start:places.stop:places.step]].float()
            return
        rows = self.rows[order.numpy()]
        loader = DataLoader(TrainingRecords(self.arguments.data_path),
                            batch_sampler=[rows[places.start:places.stop:places.step].tolist() for places in batches],
                            num_workers=self.arguments.workers, collate_fn=as_it_is,
                            pin_memory=self.device.type == "cuda")
        try:
            for records in loader:
                yield records.to(self.device, non_blocking=True)
        except UserError as error:                  # of a worker it arrives with a traceback before its sentence
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")) from error


def make_batch(records: torch.Tensor, r_peaks: torch.Tensor, global_mask: torch.Tensor, local_mask: torch.Tensor,
               lead_scale: torch.Tensor | None = None):
    """(B, 5000, leads), one R peak each (B,), and masks -> (ecg, beat, masked ecg, masked beat, trend).

    lead_scale: of normalize_records.
    """
    records = normalize_records(records, lead_scale)
    ecg = crop_global(records)
    beat = cut_beats(records, torch.arange(len(records), device=records.device), r_peaks, minmax=lead_scale is None)
    return ecg, beat, mask_out(ecg, global_mask), mask_out(beat, local_mask), compute_trend(ecg)
