"""Train the cross-restoration network on normal ECGs.

    python train.py --data_path ./data/ --save_model 1 --save_path ./ckpt/mymodel_new.pt      # as published
    python train.py --protocol clean --epochs 50 --seed 1 --save_path ./ckpt/seed1/model.pt   # fold 9 held back
    python train.py --protocol clean --epochs 50 --seed 1 --save_path ./ckpt/seed1/model.pt --resume
    torchrun --nproc_per_node=4 train.py --save_path ./ckpt/mymodel_new.pt                    # four GPUs

Beside the checkpoint stand history.csv, a line per epoch, and last.pt, from which --resume continues; so give each run
a folder of its own.
"""
import argparse
import contextlib
import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
from scoring import percentiles
from scoring import passes
from ecg.arrays import (SIGNAL_FILES, VALIDATION_FOLD, details_path, fingerprint, load_details, load_r_peaks, load_records,
                    open_labels, open_signals, signal_path)
from dataloader import TrainingBatches, hold, measure_lead_scale
from model import HISTORY, MCF, forward_loss, load_checkpoint, save_checkpoint, weights_are_finite
from utils import (UserError, add_published_flags, check_published_flags, choose_device, git_commit,
                   require_writable, run, versions, write_atomically)

WEIGHT_DECAY = 1e-5
LAST = "last.pt"                    # what --resume reads, beside the checkpoint
TERMS = ("loss", "global", "local", "trend")
CHECK_EVERY = 50                    # batches, for a loss that is not finite, on a CPU
SELECTION_SPLIT = {"val": "val", "test": "test"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--save_model", type=int, choices=(0, 1), default=1, help="write checkpoints (default 1)")
    published.add_argument("--save_path", default="./ckpt/mymodel_new.pt", help="checkpoint (default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--protocol", choices=passes.PLAIN_PROTOCOLS, help="paper: train on the normals of folds "
                        "1-9; clean: of folds 1-8 (default: clean where the folds are known, else paper)")
    method.add_argument("--select", choices=("val", "last", "test"), help="which epoch is kept: the best on fold 9, "
                        "the last, or the best on the test set as the authors did, which is optimistic (default: val "
                        "where fold 9 is held back, else last)")
    method.add_argument("--val_every", type=int, default=1, help="validate after every so many epochs, and the last")
    method.add_argument("--val_beats", type=int, default=2, help="beats a record in validation (default %(default)s; "
                        "0: all, as in test.py)")
    method.add_argument("--reference", type=int, choices=(0, 1), default=1, help="score fold 9's normals with the kept "
                        "epoch, minutes on a CPU, for the protocol calibrated and the percentiles of test.py --record "
                        "(default 1)")
    method.add_argument("--normalization", choices=("minmax", "scale"), default="minmax", help="minmax: each lead and "
                        "beat by its own minimum and maximum, as published; scale: by one scale a lead, from the "
                        "training set, which keeps amplitude (default %(default)s)")
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: bfloat16 matrix products in "
                         "training and validation (default off: float32)")
    running.add_argument("--compile", action="store_true", help="let torch.compile make the training step: some "
                         "minutes at the start; needs a C++ compiler, or Triton on a GPU")
    running.add_argument("--workers", type=int, default=0, help="processes that read records (default: none)")
    running.add_argument("--resume", action="store_true", help="go on from last.pt beside --save_path")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    for name, least in (("val_every", 1), ("val_beats", 0), ("workers", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be {least} or more, not {getattr(arguments, name)}")
    if arguments.resume and not arguments.save_model:
        raise UserError(f"--resume needs the {LAST} that --save_model 0 does not write; leave one of them out")
    if Path(arguments.save_path).name == LAST:
        raise UserError(f"--save_path {arguments.save_path} is the name of what --resume reads; choose another name")
    if arguments.epochs == 1:
        print("--epochs 1: the published schedule ends at rate 0, so the only epoch learns nothing.")
    return arguments


def choose_rows(signals: np.ndarray, arguments) -> np.ndarray:
    """The rows of train.npy to train on. Settles arguments.protocol and arguments.select where they were left open."""
    records = load_records(arguments.data_path, "train", signals)
    if arguments.protocol is None:
        arguments.protocol = "paper" if records is None else "clean"
        if records is None:
            print(f"no table in {arguments.data_path} tells the folds of train.npy: training under --protocol paper")
    has_validation = signal_path(arguments.data_path, "val").exists()
    if arguments.select is None:
        arguments.select = "val" if has_validation and arguments.protocol == "clean" else "last"
    if arguments.select == "test":
        print("--select test keeps the epoch that is best on the test set, as published: its number is optimistic.")
    if arguments.select == "val" and arguments.protocol == "paper":
        print("under --protocol paper fold 9's normals are in the training set: its validation AUROC is optimistic.")
    if arguments.protocol == "paper":
        return np.arange(len(signals))
    if records is None:
        raise UserError(f"--protocol clean holds fold 9 back, but no train_records.csv in {arguments.data_path} tells "
                        "the folds; make the arrays with preprocess.py, or choose --protocol paper")
    rows = np.flatnonzero(records["fold"] != VALIDATION_FOLD)
    if not len(rows):
        raise UserError(f"{signal_path(arguments.data_path, 'train')} holds fold 9 alone, which --protocol clean holds "
                        "back; make it again from more of the data set")
    return rows


def choose_lead_scale(signals: np.ndarray, rows: np.ndarray, arguments) -> tuple:
    """What --normalization asks for: (lead scale in mV, details of train.npy), or (None, None) for min-max.

    Raises UserError where nothing tells the amplitude of the training records.
    """
    if arguments.normalization == "minmax":
        return None, None
    details = load_details(arguments.data_path, "train", signals)
    if details is None:
        path = details_path(arguments.data_path, "train")
        raise UserError(f"--normalization scale needs the mV of train.npy, but {path} is missing or of other signals; "
                        "make the arrays with preprocess.py, or choose --normalization minmax")
    return measure_lead_scale(signals, rows, details), details


def learning_rate(arguments, epoch: int) -> float:
    """Cosine decay by epoch, counted from 1: as published, the last epoch runs at rate 0."""
    return arguments.lr * 0.5 * (1 + math.cos(math.pi * epoch / arguments.epochs))


def train_epoch(model: MCF, step, batches: TrainingBatches, epoch: int, arguments) -> dict:
    """One pass over the training records; returns the mean of the loss and of its terms.

    step: a TrainingStep. Nothing in here waits for a GPU: the bar shows a mean that may be some batches old. Raises
    UserError for a loss that is not finite: one process on a CPU looks for it now and then, else after the epoch.
    """
    model.train()
    torch.backends.cudnn.benchmark = True           # all batches but one have one shape: a search for algorithms pays
    # dropout: an epoch can be run again from its start, and no two processes draw the same
    torch.manual_seed((arguments.seed * 1_000_003 + epoch) * parallel.PROCESSES + parallel.RANK)
    totals = torch.zeros(len(TERMS) + 1, device=batches.device)             # of the terms over records, and records
    losses = []                                                             # of each batch, left on the device
    shown = torch.zeros(len(totals), pin_memory=batches.device.type == "cuda")
    checked = batches.device.type == "cpu" and parallel.PROCESSES == 1      # several would have to leave together
    progress = tqdm(batches.draw_epoch(epoch), total=len(batches), desc=f"epoch {epoch}/{arguments.epochs}",
                    unit="batch", leave=False, disable=parallel.RANK > 0)
    for batch, share, records in progress:
        mine = records * share / parallel.PROCESSES
        found = step(batch, share)
        losses.append(found[0])
        totals += torch.stack([*found, totals.new_ones(())]) * mine
        shown.copy_(totals, non_blocking=True)
        if shown[-1] > 0:
            progress.set_postfix(mean_loss=f"{float(shown[0] / shown[-1]):.4f}", refresh=False)
        if checked and len(losses) % CHECK_EVERY == 0 and not torch.stack(losses[-CHECK_EVERY:]).isfinite().all():
            break                                                       # require_finite says which it was
    parallel.share_buffers(model)
    *sums, seen = parallel.add_up(totals).tolist()
    require_finite(model, torch.stack(losses), batches, epoch, arguments)
    return {term: total / seen for term, total in zip(TERMS, sums)}


def require_finite(model: MCF, losses: torch.Tensor, batches: TrainingBatches, epoch: int, arguments):
    """Raise UserError that names the records of an epoch's first batch whose loss (batches,) is not finite.

    And, after losses that all are, where the last update left weights that are not: neither becomes a checkpoint.
    """
    broken = torch.nonzero(parallel.add_up((~losses.isfinite()).float()))
    if not len(broken) and weights_are_finite(model):
        return
    what = f"the weights are not finite after epoch {epoch}"
    if len(broken):
        number = int(broken[0])
        rows = batches.rows_of_batch(epoch, number)
        records = load_records(arguments.data_path, "train", open_signals(arguments.data_path, "train", arguments.dims))
        names = ["row", *rows] if records is None else ["ecg_id", *records["ecg_id"][rows]]
        what = (f"the loss is not finite in epoch {epoch}, batch {number + 1} first: {names[0]} "
                f"{', '.join(map(str, names[1:]))} of {SIGNAL_FILES['train']}")
    raise UserError(f"{what}; lower --lr, train with --amp off, or look at these records (checkpoints of the epochs "
                    "before are kept)")


class TrainingStep:
    """Forward, loss, backward, update: what is done with a batch, on any number of processes."""

    def __init__(self, model: MCF, optimizer, device: torch.device, amp: str, compiled: bool = False):
        self.optimizer, self.device, self.amp = optimizer, device, amp
        self.forward = parallel.replicate(model, device)
        if compiled:
            self.forward = torch.compile(self.forward, dynamic=False)

    def __call__(self, batch: tuple, share: float) -> list:
        """batch, share: of TrainingBatches.draw_epoch. Returns the loss and its terms, as TERMS names them."""
        ecg, beat, masked_ecg, masked_beat, trend = batch
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp == "bf16" else contextlib.nullcontext():
            outputs = self.forward(masked_ecg, masked_beat, trend)
        losses = forward_loss(outputs, ecg, beat)
        self.optimizer.zero_grad(set_to_none=True)
        (losses["loss"] * share).backward()         # averaged over processes, gradients weigh every record the same
        self.optimizer.step()
        return [losses[term].detach() for term in TERMS]


class Validation:
    """Detection AUROC of the split that selects the epoch; None where that is not asked for."""

    def __init__(self, arguments, device):
        self.arguments, self.device, self.split = arguments, device, SELECTION_SPLIT.get(arguments.select)
        if self.split:
            self.signals = open_signals(arguments.data_path, self.split, arguments.dims)
            self.labels = open_labels(arguments.data_path, self.split, (len(self.signals),))
            self.r_peaks = load_r_peaks(arguments.data_path, self.split, self.signals)
            held = hold(self.signals, np.arange(len(self.signals)), SIGNAL_FILES[self.split], device, torch.float32)
            self.signals = self.signals if held is None else held

    def auroc(self, model: MCF, epoch: int) -> float | None:
        due = epoch % self.arguments.val_every == 0 or epoch == self.arguments.epochs
        if not (self.split and due):
            return None
        protocol = passes.protocols_for(model, (self.arguments.protocol, "clean"))[0]
        found = passes.score_split(model, self.signals, self.r_peaks, protocol, self.arguments.mask_ratio, self.device,
                                    self.split,
                                    beats_per_record=self.arguments.val_beats or None, amp=self.arguments.amp)
        return passes.detection_auroc(self.labels, found.scores)


def complete(config: dict) -> dict:
    """A checkpoint's config with the flags that it is older than. Raises TypeError where it is not a dict."""
    return {"normalization": "minmax", **config}


class Run:
    """What a training run keeps between epochs, on disk and in memory."""

    def __init__(self, arguments, data_fingerprint: str):
        self.arguments, self.path = arguments, Path(arguments.save_path)
        self.last_path = self.path.with_name(LAST)
        self.config = {name: value for name, value in vars(arguments).items()
                       if name not in ("resume", "save_model", "save_path", "data_path", "workers", "device",
                                        "reference")}
        self.config["train_fingerprint"], self.config["processes"] = data_fingerprint, parallel.PROCESSES
        self.history, self.best, self.kept = [], None, 0            # kept: epochs in last.pt

    def resume(self, model: MCF, optimizer) -> int:
        """Continue from last.pt: returns the epochs that are done. Raises UserError where the run was another one."""
        if not self.last_path.exists():
            raise UserError(f"{self.last_path} is missing, so there is nothing to resume; start without --resume")
        stored, facts = load_checkpoint(self.last_path)
        if "optimizer_state_dict" not in facts:
            raise UserError(f"{self.last_path} cannot be resumed, it holds no optimizer; start without --resume")
        try:
            config = complete(facts["config"])
            differing = [name for name in self.config if config.get(name) != self.config[name]]
            if not differing:
                model.load_state_dict(stored.state_dict())
                optimizer.load_state_dict(facts["optimizer_state_dict"])
                self.history, self.kept = [dict(row) for row in facts["history"]], int(facts["epoch"])
                self.best = None if facts["best"] is None else float(facts["best"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.last_path} cannot be resumed, it is not whole ({type(error).__name__}); start "
                            "without --resume") from error
        if differing:
            raise UserError(f"{self.last_path} was trained with another {', '.join(differing)}; repeat its flags, "
                            "or start without --resume")
        return self.kept

    def keep(self, model: MCF, optimizer, row: dict):
        """After an epoch: the selected checkpoint where this epoch is it, history.csv, and last.pt last of all."""
        self.history.append(row)
        auroc = row[f"{self.arguments.select}_auroc"] if self.arguments.select in SELECTION_SPLIT else None
        selected = self.arguments.select == "last" or (auroc is not None and (self.best is None or auroc > self.best))
        if selected:
            self.best = auroc
        if parallel.RANK or not self.arguments.save_model:
            return
        facts = {"config": self.config, "epoch": row["epoch"], "metrics": row, "git_commit": git_commit(),
                 "versions": versions(), "history": self.history}
        if selected:
            save_checkpoint(self.path, model, **facts)
        table = io.StringIO()
        writer = csv.DictWriter(table, HISTORY)
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.path.with_name("history.csv"), lambda file: file.write(table.getvalue().encode()))
        save_checkpoint(self.last_path, model, **facts, best=self.best,
                        optimizer_state_dict=optimizer.state_dict())
        self.kept = row["epoch"]

    def finish(self):
        """After the last epoch: the whole history into the selected checkpoint, which knows it up to its own epoch.

        Nothing else in the file changes but a config that is older than a flag; the file of another run stays as it is.
        """
        if parallel.RANK or not self.arguments.save_model:
            return
        try:
            model, facts = load_checkpoint(self.path)
            config = facts.get("config")
            now = {**facts, "config": self.config, "history": self.history}
            if isinstance(config, dict) and complete(config) == self.config and now != facts:
                save_checkpoint(self.path, model, **now)
        except UserError as error:                  # the training is done, and nothing of it is lost
            print(f"the history of all epochs is in {LAST} and history.csv alone: {error}")

    def farewell(self) -> str:
        """What an interrupted run leaves, and how to go on."""
        if not self.kept:
            return "no epoch was finished, so nothing of this run is kept"
        return (f"the epochs up to {self.kept} are kept, the one that was running is lost; the same command with "
                "--resume goes on after the last whole epoch")


def train(arguments):
    """Train from the arguments alone; everything random follows from --seed."""
    device = choose_device(arguments.device)
    parallel.start(device)
    signals = open_signals(arguments.data_path, "train", arguments.dims)
    rows = choose_rows(signals, arguments)
    if arguments.save_model:
        require_writable(Path(arguments.save_path).parent)
    with parallel.one_after_the_first():                            # R peaks are found once, if they have to be
        r_peaks = load_r_peaks(arguments.data_path, "train", signals)
        validation = Validation(arguments, device)
        normals = percentiles.open_normals_of_run(arguments)
    lead_scale, details = choose_lead_scale(signals, rows, arguments)
    batches = TrainingBatches(signals, rows, r_peaks, arguments, device, lead_scale, details)
    torch.manual_seed(arguments.seed)
    model = MCF(arguments.dims, arguments.hidden).to(device)
    model.lead_scale = lead_scale
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=WEIGHT_DECAY, fused=True)
    state = Run(arguments, fingerprint(signals))
    done = state.resume(model, optimizer) if arguments.resume else 0
    step = TrainingStep(model, optimizer, device, arguments.amp, arguments.compile)
    if arguments.save_model and not arguments.resume and state.last_path.exists():
        print(f"{state.last_path} and its checkpoint are of an earlier run, which this one replaces from its first "
              "epoch on; --resume would continue it.")
    elif arguments.save_model and not arguments.resume and state.path.exists():
        print(f"{state.path} is there already, and is replaced when the first epoch to keep is done")
    print(f"training on {len(rows)} normal records, protocol {arguments.protocol}, epoch kept: {arguments.select}, "
          f"on {device}" + (f", {parallel.PROCESSES} processes" if parallel.PROCESSES > 1 else "")
          + (f", after {done} epochs" if done else ""))
    try:
        run_epochs(model, step, batches, validation, state, done)
    except KeyboardInterrupt:
        if arguments.save_model:
            print(f"\n{state.farewell()}")
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory does not hold a training step of --batch_size {arguments.batch_size}; lower "
                        "it, or end what else runs on the GPU") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--compile does not work here ({str(error).splitlines()[0][:80]}); train without it, or "
                        "install a C++ compiler (CPU) or Triton (GPU)") from error
    state.finish()
    if arguments.save_model:
        print(f"checkpoint: {arguments.save_path}\nscore it with: python test.py --data_path {arguments.data_path} "
              f"--load_model 1 --load_path {arguments.save_path}")
    percentiles.add_normals(arguments, state.config, normals, device)


def run_epochs(model: MCF, step: TrainingStep, batches: TrainingBatches, validation: Validation, state: Run, done: int):
    """Train, validate and keep one epoch after the other, after those that are done."""
    arguments = state.arguments
    for epoch in range(done + 1, arguments.epochs + 1):
        started = time.perf_counter()
        for group in step.optimizer.param_groups:
            group["lr"] = learning_rate(arguments, epoch)
        losses = train_epoch(model, step, batches, epoch, arguments)
        row = {"epoch": epoch, "loss": losses["loss"], **{f"loss_{term}": losses[term]
                                                          for term in ("global", "local", "trend")},
               "lr": step.optimizer.param_groups[0]["lr"], "val_auroc": None, "test_auroc": None}
        auroc = validation.auroc(model, epoch)
        if validation.split:
            row[f"{validation.split}_auroc"] = auroc
        row["seconds"] = round(time.perf_counter() - started, 2)
        state.keep(model, step.optimizer, row)
        tqdm.write(f"epoch {epoch:3d}  loss {row['loss']:.4f}"
                   + (f"  {validation.split} AUROC {auroc:.4f}" if auroc is not None else "")
                   + f"  {row['seconds']:.0f} s")


def main():
    git_commit()
    train(parse_arguments())
    parallel.stop()


if __name__ == "__main__":
    run(main)
