"""Train the network of scoring/beat_restorer.py on the median beats of normals, of which random parts are changed.

    python -m tools.train_restorer --data_path ./data/ --save_path ./ckpt/restorer.pt      # some minutes on one core

A change knows no disease: in a random window of 30 to 450 ms and random leads, what stands above the line between the
window's ends is multiplied, another normal's wave, moved in time, or a bump is added. It passes the high-pass of
preprocessing, as what happens in a heart does. Normals of folds 1-8 alone.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from dataloader import choose_rows
from ecg.arrays import fingerprint, load_r_peaks, load_table, open_records
from ecg.leads import INDEPENDENT, TO_TWELVE
from ecg.signals import companding_scale
from model import LEADS
from scoring.beat_frame import TIMES, typical_beats
from scoring.beat_restorer import HELD_BACK, WEIGHTS, BeatRestorer
from scoring.protocols import CLEAN
from utils import UserError, git_commit, require_writable, run, write_atomically

BATCH, RATE, WEIGHT_DECAY, WARM_UP = 128, 1e-3, 1e-3, 100
SHORTEST, LONGEST = 3, 45                   # places of a window, 10 ms each
SIZES = (0.04, 0.8)                         # mV of a bump
VISIBLE = 0.02                              # mV: what changed by more is to be found
NUMBERS = (0, 1, 1, 1, 2)                   # of changes in a beat, equally likely
JITTER, JITTERED = 3, 0.3                   # places by which R is misplaced at most, and in how many beats
PLACES = np.arange(len(TIMES))


def windows(number: int, rng) -> tuple:
    """Smooth windows (number, 103) in 0 ... 1, and the places of their two ends (2, number)."""
    centre = rng.uniform(0, len(PLACES), number)
    half = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), number)) / 2
    ramp = np.minimum(rng.uniform(1.5, 6, number), half)
    share = np.clip((half[:, None] - np.abs(PLACES - centre[:, None])) / ramp[:, None] + 0.5, 0, 1)
    ends = np.clip([centre - half, centre + half], 0, len(PLACES) - 1).astype(int)
    return ((1 - np.cos(np.pi * share)) / 2).astype(np.float32), ends


def some_leads(number: int, rng) -> np.ndarray:
    """Which of the eight leads change, (number, 8): all, the limb or the chest leads, or neighbours among these."""
    column = np.arange(len(INDEPENDENT))
    limb, kind = column < 2, rng.choice(4, number, p=(0.2, 0.1, 0.1, 0.6))[:, None]
    length = rng.integers(1, 5, (number, 1))
    first = 2 + rng.integers(0, 7 - length)
    run_of = (column >= first) & (column < first + length) & (rng.random((number, 1)) < 0.65)
    single = (column == rng.integers(0, 2, (number, 1))) & ((rng.random((number, 1)) < 0.25) | ~run_of.any(1)[:, None])
    return np.select([kind == 0, kind == 1, kind == 2], [True, limb, ~limb], run_of | single)


def moved(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, 103, leads) later by places (n,), the end coming in again at the start."""
    return np.take_along_axis(values, ((PLACES - places[:, None]) % len(PLACES))[..., None], axis=1)


def draw_changes(beats: np.ndarray, others: np.ndarray, rng) -> np.ndarray:
    """One change of each of beats (n, 103, 8), mV, others being as many of other normals: what is to be added."""
    n, each = len(beats), np.arange(len(beats))
    window, (first, last) = windows(n, rng)
    slope = ((PLACES - first[:, None]) / np.maximum(last - first, 1)[:, None])[..., None].astype(np.float32)
    window = window[..., None]
    wave, other = (x - x[each, first][:, None] - slope * (x[each, last] - x[each, first])[:, None]
                   for x in (beats, others))
    factor = np.where(rng.random(n) < 0.75, rng.uniform(-2.2, 0, n), rng.uniform(0.3, 1.2, n)).astype(np.float32)
    size = np.exp(rng.uniform(*np.log(SIZES), n))[:, None] * rng.uniform(0.5, 1, (n, len(INDEPENDENT)))
    one_sign, signs = rng.choice([-1, 1], (n, 1)), rng.choice([-1, 1], size.shape)
    bump = (size * np.where(rng.random((n, 1)) < 0.6, one_sign, signs))[:, None].astype(np.float32)
    later = moved(wave * window, rng.integers(3, 13, n) * rng.choice([-1, 1], n)) - wave * window
    kind = rng.choice(4, n, p=(0.4, 0.3, 0.15, 0.15))[:, None, None]
    change = np.select([kind == 0, kind == 1, kind == 2], [wave * factor[:, None, None] * window, bump * window,
                                                           (other - wave) * window], later)
    return change * some_leads(n, rng)[:, None]


def pass_high(changes: np.ndarray, rr: np.ndarray) -> np.ndarray:
    """The 1 Hz high-pass, there and back, of changes (n, 103, leads) that every beat repeats, RR interval rr (n,)."""
    spectrum = np.fft.rfft(changes, axis=1)
    hertz = np.arange(spectrum.shape[1]) / (len(PLACES) / 100 * np.clip(rr, 0.5, 1.6)[:, None])
    gain = (hertz ** 4 / (1 + hertz ** 4)).astype(np.float32)
    return np.fft.irfft(spectrum * gain[..., None], n=len(PLACES), axis=1)


def draw_batch(beats: np.ndarray, rr: np.ndarray, rng) -> tuple:
    """(changed beats, the same unchanged (n, 103, 8), RR (n,), which points changed (n, 103, 12)), float32 tensors."""
    rows = rng.integers(0, len(beats), BATCH)
    normal, intervals, number = beats[rows], rr[rows], rng.choice(NUMBERS, BATCH)
    before = np.zeros_like(normal)
    for drawn in range(1, max(NUMBERS) + 1):
        change = draw_changes(normal + before, beats[rng.integers(0, len(beats), BATCH)], rng)
        before = before + change * (number >= drawn)[:, None, None]
    after = pass_high(before, intervals)
    of_leads = before @ TO_TWELVE.T.astype(np.float32), after @ TO_TWELVE.T.astype(np.float32)
    visible = (np.minimum(*of_leads) > VISIBLE) | (np.maximum(*of_leads) < -VISIBLE)
    jitter = rng.integers(-JITTER, JITTER + 1, BATCH) * (rng.random(BATCH) < JITTERED)
    arrays = moved(normal + after, jitter), moved(normal, jitter), intervals, moved(visible, jitter)
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays)


def train(beats: np.ndarray, rr: np.ndarray, steps: int, seed: int = 0) -> BeatRestorer:
    """A BeatRestorer trained on normals' beats (N, 103, 8), mV, with RR intervals (N,), s."""
    torch.manual_seed(seed)
    rng, started = np.random.default_rng(seed), time.process_time()
    model = BeatRestorer(beats.mean(axis=0), beats.std(axis=0) + 0.01, companding_scale(beats))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + np.cos(np.pi * step / steps)) / 2)
    losses = []
    for step in range(1, steps + 1):
        changed, normal, intervals, visible = draw_batch(beats, rr, rng)
        restored, odds = model(changed, intervals)
        terms = (F.smooth_l1_loss(restored, model.standardise(normal), beta=0.3),
                 F.binary_cross_entropy_with_logits(odds, visible))
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
        cosine.step()
        losses.append([term.item() for term in terms])
        if step % 250 == 0:
            means = np.mean(losses[-250:], axis=0)
            print(f"step {step}  restoration {means[0]:.4f}  changes {means[1]:.4f}  "
                  f"{time.process_time() - started:.0f} s", flush=True)
    return model.eval()


def main():
    commit = git_commit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data/", help="folder of the arrays (default %(default)s)")
    parser.add_argument("--save_path", default=str(WEIGHTS), help="where the weights go (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH} beats (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.steps < 1 or flags.seed < 0:
        raise UserError(f"--steps must be 1 or more, and --seed 0 or more, not {flags.steps} and {flags.seed}")
    require_writable(flags.save_path, is_folder=False)
    records = open_records(flags.data_path, "train", LEADS)
    rows = choose_rows(CLEAN.fold_held_back, load_table(flags.data_path, "train", records), len(records))
    r_peaks = load_r_peaks(flags.data_path, "train", records, CLEAN.detector)
    trained_on = rows[np.arange(len(rows)) % HELD_BACK > 0]
    beats, rr = typical_beats(records, r_peaks, trained_on)
    model = train(beats[..., INDEPENDENT], rr, flags.steps, flags.seed)
    facts = {"train_fingerprint": fingerprint(records.signals), "records": len(trained_on), "git_commit": commit,
             "config": {"steps": flags.steps, "seed": flags.seed, "batch": BATCH, "rate": RATE}}
    weights = {name: value.half() for name, value in model.state_dict().items()}         # a hundredth of a percent off
    write_atomically(flags.save_path, lambda file: torch.save({"model_state_dict": weights, **facts}, file))
    print(f"weights: {flags.save_path}")


if __name__ == "__main__":
    run(main)
