"""Train the cross-restoration network on normal ECGs.

    python train.py --data_path ./data/ --save_model 1 --save_path ./ckpt/mymodel_new.pt      # as published
    python train.py --protocol clean --select val --save_path ./ckpt/clean/model.pt           # fold 9 held back
    python train.py --input compand --epochs 4 --epoch_records 400 --batch_size 8 --lr 1e-3 --save_path ./c/model.pt
    python train.py --beats between --dims 2 --input compand --epochs 4 --epoch_records 800 --save_path ./b/model.pt
    torchrun --nproc_per_node=4 train.py --save_path ./ckpt/mymodel_new.pt                    # four GPUs

As published: all of train.npy, the normals of folds 1-9, for 50 epochs. The last epoch is kept; the authors kept the
one that is best on the test set, which --select test does. Beside the checkpoint stand history.csv, a line per epoch,
and last.pt, from which --resume continues; so give each run a folder of its own.
"""
import argparse
import contextlib
import math
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dataloader import Normalisation, TrainingBatches, measure_companding, open_training
from ecg.arrays import fingerprint, signal_path
from ecg.beats import SPLITS
from evaluation.validation import Validation
from model import (HISTORY, MCF, UNCERTAINTIES, choose_parts, forward_loss, load_checkpoint, save_checkpoint,
                   weights_are_finite)
from scoring.percentiles import KEY, score_normals
from scoring.protocols import CLEAN, PAPER, PROTOCOLS
from utils import (PROCESSES, RANK, UserError, add_published_flags, add_up, check_published_flags, choose_device,
                   git_commit, one_after_the_first, pack_csv, require_writable, run, start_processes, stop_processes,
                   versions, wait_for_all, write_atomically)

WEIGHT_DECAY = 1e-5
LAST, TABLE = "last.pt", "history.csv"      # beside the checkpoint; --resume reads the first
TERMS = ("loss", "global", "local", "trend")
CHECK_EVERY = 50                            # batches, for a loss that is not finite, on a CPU
NOT_CONFIG = ("resume", "save_model", "save_path", "data_path", "device", "reference")     # may change on --resume


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.add_argument("--save_model", type=int, choices=(0, 1), default=1, help="write checkpoints (default 1)")
    published.add_argument("--save_path", default="./ckpt/mymodel_new.pt", help="checkpoint (default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--protocol", choices=PROTOCOLS, help="paper: train on the normals of folds 1-9, beats by "
                        "HeartPy; clean: of folds 1-8, beats by the slope of all leads (default: paper, with --input "
                        "compand clean)")
    method.add_argument("--input", choices=("minmax", "compand"), default="minmax", help="minmax: each lead and beat "
                        "by its own minimum and maximum, as published; compand: a power of the mV, by one scale a "
                        "lead (default %(default)s)")
    method.add_argument("--beats", choices=SPLITS, help="train on MIT-BIH's normal beats of this split, with --dims 2")
    method.add_argument("--epoch_records", type=int, help="records, or windows with --beats, that an epoch draws "
                        "(default: all)")
    method.add_argument("--select", choices=("val", "last", "test"), help="which epoch is kept: the best on fold 9, "
                        "the last, or the best on the test set as the authors did, which is optimistic (default: val "
                        "where fold 9 is held back, else last)")
    method.add_argument("--watch", nargs="+", choices=("val", "test"), default=[], help="splits whose AUROC is noted "
                        f"in {TABLE} besides that of --select")
    method.add_argument("--val_every", type=int, default=1, help="score after every so many epochs, and the last")
    method.add_argument("--val_beats", type=int, default=2, help="beats a record in this scoring under paper (default "
                        "%(default)s; 0: all, as in test.py); clean has the median beat")
    method.add_argument("--reference", type=int, choices=(0, 1), default=1, help="score fold 9's normals with the kept "
                        "epoch, for the percentiles of one's own recordings (default 1)")
    ablations = parser.add_argument_group("ablations: parts of the method to leave out; the checkpoint knows it")
    ablations.add_argument("--branches", choices=("both", "global", "local"), default="both", help="which of the "
                           "recording and the beat are restored (default %(default)s)")
    ablations.add_argument("--cross_attention", type=int, choices=(0, 1), default=1, help="0: their tokens do not "
                           "inform each other")
    ablations.add_argument("--trend", type=int, choices=(0, 1), default=1, help="0: nothing is restored from the trend")
    ablations.add_argument("--uncertainty", choices=UNCERTAINTIES, default="log_variance", help="log_variance: inside "
                           "Tanh and shared by the leads, as published; constant: none; free: one a lead, outside Tanh")
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: bfloat16 matrix products in "
                         "training and scoring (default off: float32)")
    running.add_argument("--resume", action="store_true", help="go on from last.pt beside --save_path")
    return check(parser.parse_args())


def check(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags with the defaults that depend on others filled in. Raises UserError for what no run can do."""
    check_published_flags(flags)
    for name, least in (("val_every", 1), ("val_beats", 0), ("epoch_records", 1)):
        if getattr(flags, name) is not None and getattr(flags, name) < least:
            raise UserError(f"--{name} must be {least} or more, not {getattr(flags, name)}")
    if flags.resume and not flags.save_model:
        raise UserError(f"--resume needs the {LAST} that --save_model 0 does not write; leave one of them out")
    path = Path(flags.save_path)
    if path.name in (LAST, TABLE):
        raise UserError(f"--save_path {path} is the name of a file that is written beside it; choose another name")
    for name in ("", LAST, TABLE) if flags.save_model else ():
        require_writable(path.with_name(name) if name else path, is_folder=False)
    if flags.input == "compand" and flags.protocol == PAPER.name:
        raise UserError("--input compand is not the paper's, which --protocol paper is; leave one of them out")
    if flags.beats and (flags.protocol == PAPER.name or flags.select in ("val", "test") or flags.watch):
        raise UserError("--beats is of protocol clean, the last epoch; leave out --protocol, --select and --watch")
    protocol = PROTOCOLS[flags.protocol or (PAPER if flags.input == "minmax" and not flags.beats else CLEAN).name]
    has_validation = protocol.fold_held_back is not None and signal_path(flags.data_path, "val").exists()
    select = flags.select or ("val" if has_validation and not flags.beats else "last")
    if flags.epochs == 1:
        print("--epochs 1 changes no weight: as published, the last epoch runs at rate 0.")
    if select == "test":
        print("--select test keeps the epoch that is best on the test set, as published: its number is optimistic.")
    if select == "val" and protocol.fold_held_back is None:
        print("under --protocol paper fold 9's normals are in the training set: its validation AUROC is optimistic.")
    return argparse.Namespace(**{**vars(flags), "protocol": protocol.name, "select": select,
                                 "reference": flags.reference and not flags.beats})


def learning_rate(initial: float, epoch: int, epochs: int) -> float:
    """Cosine decay by epoch, counted from 1: as published, the last epoch runs at rate 0."""
    return initial * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


class TrainingStep:
    """Forward, loss, backward, update: what is done with a batch, on any number of processes."""

    def __init__(self, model: MCF, optimizer, device: torch.device, amp: str = "off"):
        self.optimizer, self.device, self.amp, self.forward = optimizer, device, amp, model
        if PROCESSES > 1:           # averages gradients; BatchNorm sees the records of its own process
            self.forward = torch.nn.parallel.DistributedDataParallel(model, None if device.index is None else
                                                                     [device.index])

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


def train_one_epoch(model: MCF, step: TrainingStep, batches: TrainingBatches, epoch: int) -> dict:
    """One pass over the training records; returns the mean of the loss and of its terms.

    A loss that is not finite raises UserError: one process on a CPU looks for it now and then, else after the epoch.
    Nothing in here waits for a GPU: the bar shows a mean some batches old.
    """
    model.train()
    torch.backends.cudnn.benchmark = True           # all batches but one have one shape: a search for algorithms pays
    # dropout: an epoch can be run again from its start, and no two processes draw the same
    torch.manual_seed((batches.seed * 1_000_003 + epoch) * PROCESSES + RANK)
    totals = torch.zeros(len(TERMS) + 1, device=batches.device)             # of the terms over records, and records
    losses = []                                                             # of each batch, left on the device
    shown = torch.zeros(len(totals), pin_memory=batches.device.type == "cuda")      # copied while the GPU goes on
    checked = batches.device.type == "cpu" and PROCESSES == 1               # several would have to leave together
    progress = tqdm(batches.draw_epoch(epoch), desc=f"epoch {epoch}", total=len(batches), leave=False, disable=RANK > 0)
    for batch, share, records in progress:
        terms = step(batch, share)
        losses.append(terms[0])
        totals += torch.stack([*terms, totals.new_ones(())]) * (records * share / PROCESSES)
        shown.copy_(totals, non_blocking=True)
        if shown[-1] > 0:
            progress.set_postfix(mean_loss=f"{float(shown[0] / shown[-1]):.4f}", refresh=False)
        if checked and len(losses) % CHECK_EVERY == 0 and not torch.stack(losses[-CHECK_EVERY:]).isfinite().all():
            break                                                           # require_finite says which it was
    torch.backends.cudnn.benchmark = False          # scoring has batches of many shapes
    if PROCESSES > 1:                               # its running statistics are those that the checkpoint keeps
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    *sums, seen = add_up(totals).tolist()
    require_finite(model, torch.stack(losses), batches, epoch)
    return {term: total / seen for term, total in zip(TERMS, sums)}


def require_finite(model: MCF, losses: torch.Tensor, batches: TrainingBatches, epoch: int):
    """Raise UserError that names the records of an epoch's first batch whose loss (batches,) is not finite.

    And, after losses that all are, where the last update left weights that are not: neither becomes a checkpoint.
    """
    broken = torch.nonzero(add_up((~losses.isfinite()).float()))
    if not len(broken) and weights_are_finite(model):
        return
    what = f"the weights are not finite after epoch {epoch}"
    if len(broken):
        rows = batches.rows_of_batch(epoch, int(broken[0]))
        names = ["row", *rows] if batches.table is None else ["ecg_id", *batches.table["ecg_id"][rows]]
        what = (f"the loss is not finite in epoch {epoch}, batch {int(broken[0]) + 1} first: {names[0]} "
                f"{', '.join(map(str, names[1:]))} of {batches.records.name}")
    raise UserError(f"{what}; lower --lr, train with --amp off, or look at these records (checkpoints of the epochs "
                    "before are kept)")


class Run:
    """What a training run keeps between epochs, on disk and in memory."""

    def __init__(self, path: Path, config: dict, saves: bool):
        """config: what must be the same for --resume; saves: whether anything is written."""
        self.path, self.last_path, self.config, self.saves = path, path.with_name(LAST), config, saves and not RANK
        self.history, self.best, self.epoch = [], None, 0           # epoch: the last one in last.pt

    def resume(self, model: MCF, optimizer):
        """Continue from last.pt. Raises UserError where there is none, or the run was another one."""
        if not self.last_path.exists():
            raise UserError(f"{self.last_path} is missing, so there is nothing to resume; start without --resume")
        stored, facts = load_checkpoint(self.last_path)
        try:
            config = {"branches": "both", "cross_attention": 1, "trend": 1} | facts["config"]       # runs of before
            differing = [name for name in self.config if config.get(name) != self.config[name]]
            if not differing:
                model.load_state_dict(stored.state_dict())
                optimizer.load_state_dict(facts["optimizer_state_dict"])
                self.history, self.epoch = [dict(row) for row in facts["history"]], int(facts["epoch"])
                self.best = None if facts["best"] is None else float(facts["best"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.last_path} cannot be resumed, it is not whole ({type(error).__name__}); start "
                            "without --resume") from error
        if differing:
            raise UserError(f"{self.last_path} was trained with another {', '.join(differing)}; repeat its flags, "
                            "or start without --resume")

    def keep(self, model: MCF, optimizer, row: dict):
        """After an epoch: the selected checkpoint where this epoch is it, history.csv, and last.pt last of all."""
        self.history.append(row)
        auroc = row.get(f"{self.config['select']}_auroc")
        selected = self.config["select"] == "last" or (auroc is not None and (self.best is None or auroc > self.best))
        if selected:
            self.best = auroc
        if not self.saves:
            return
        facts = {"config": self.config, "epoch": row["epoch"], "metrics": row, "git_commit": git_commit(),
                 "versions": versions(), "history": self.history}
        if selected:
            save_checkpoint(self.path, model, **facts)
        table = pack_csv(HISTORY, [[one[name] for name in HISTORY] for one in self.history])
        write_atomically(self.path.with_name(TABLE), lambda file: file.write(table))
        save_checkpoint(self.last_path, model, **facts, best=self.best, optimizer_state_dict=optimizer.state_dict())
        self.epoch = row["epoch"]

    def finish(self, normals_of, device: torch.device):
        """After the last epoch: the whole history, and the scores of fold 9's normals, into the selected checkpoint.

        normals_of: model -> what percentiles.score_normals gives. All processes score. Nothing else in the file
        changes, and that of another run stays as it is; what is wrong is printed: nothing of the training is lost.
        """
        try:
            model, facts = load_checkpoint(self.path)
            if facts.get("config") != self.config:
                raise UserError(f"{self.path} was kept by another run; the history of this one is in {TABLE}")
            added = {"history": self.history}
            try:
                added |= {} if KEY in facts else normals_of(model.to(device))
            except UserError as error:
                print(f"no percentiles: {error}")
            if self.saves and any(facts.get(name) != value for name, value in added.items()):
                save_checkpoint(self.path, model, **(facts | added))
        except UserError as error:
            print(f"{self.path.name} is not completed: {error}")


def run_epochs(model: MCF, step: TrainingStep, batches: TrainingBatches, state: Run, validations: dict):
    """Train, score and keep one epoch after the other, after those that are done. validations: {split: Validation}."""
    config = state.config
    for epoch in range(state.epoch + 1, config["epochs"] + 1):
        started, rate = time.perf_counter(), learning_rate(config["lr"], epoch, config["epochs"])
        step.optimizer.param_groups[0]["lr"] = rate
        losses = train_one_epoch(model, step, batches, epoch)
        row = {**dict.fromkeys(HISTORY), "epoch": epoch, "loss": losses["loss"], "lr": rate,
               **{f"loss_{term}": losses[term] for term in TERMS[1:]}}
        if epoch % config["val_every"] == 0 or epoch == config["epochs"]:
            for split, validation in validations.items():
                row[f"{split}_auroc"] = validation.auroc(model, *(config[name] for name in
                                                                  ("mask_ratio", "amp", "val_beats")))
        row["seconds"] = round(time.perf_counter() - started, 2)
        state.keep(model, step.optimizer, row)
        aurocs = "".join(f"  {split} AUROC {row[f'{split}_auroc']:.4f}" for split in validations
                         if row[f"{split}_auroc"] is not None)
        tqdm.write(f"epoch {epoch:3d}  loss {row['loss']:.4f}{aurocs}  {row['seconds']:.0f} s")


@contextlib.contextmanager
def explained(state: Run, batch_size: int):
    """Tell what an interrupted run leaves, and turn what a machine cannot do into UserError."""
    try:
        yield
    except KeyboardInterrupt:
        if state.saves:
            print(f"\nthe epochs up to {state.epoch} are kept, the one that was running is lost; the same command with "
                  "--resume goes on after the last whole epoch" if state.epoch else
                  "\nno epoch was finished, so nothing of this run is kept")
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory does not hold a training step of --batch_size {batch_size}; lower it, or "
                        "end what else runs on the GPU") from error


def main():
    git_commit()
    flags = parse_arguments()
    device, protocol = choose_device(flags.device, flags.amp), PROTOCOLS[flags.protocol]
    start_processes(device)
    splits = sorted({flags.select, *flags.watch} - {"last"})
    with one_after_the_first():                             # R peaks are found once, if they have to be
        training = open_training(flags.data_path, flags.dims, protocol.detector, protocol.fold_held_back, flags.beats)
        validations = {split: Validation(flags.data_path, split, flags.dims, protocol) for split in splits}
    torch.manual_seed(flags.seed)
    model = MCF(flags.dims, flags.hidden, flags.uncertainty,
                choose_parts(flags.branches, flags.cross_attention, flags.trend))
    if flags.input == "compand":
        model.input = measure_companding(training.records, training.rows)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=WEIGHT_DECAY, fused=True)
    batches = TrainingBatches(training, Normalisation.of(model.input, device), flags.batch_size, flags.mask_ratio,
                              flags.seed, flags.epoch_records)
    config = {name: value for name, value in vars(flags).items() if name not in NOT_CONFIG}
    made_of = {"train_fingerprint": fingerprint(training.records.signals), "processes": PROCESSES}
    state = Run(Path(flags.save_path), made_of | config, bool(flags.save_model))
    if flags.resume:
        state.resume(model, optimizer)
    elif flags.save_model and (state.path.exists() or state.last_path.exists()):
        print(f"{state.path} or {LAST} beside it is of an earlier run, which this one replaces from its first epoch on")
    step = TrainingStep(model, optimizer, device, flags.amp)
    what = "windows" if flags.beats else "records"
    print(f"training on {len(training.rows)} normal {what}, protocol {protocol.name}, "
          f"input {flags.input}, epoch kept: {flags.select}, on {device}"
          + (f", {PROCESSES} processes" if PROCESSES > 1 else "")
          + (f", after {state.epoch} epochs" if state.epoch else ""))
    with explained(state, flags.batch_size):
        run_epochs(model, step, batches, state, validations)
        wait_for_all()                                      # for the first one, which writes the last epoch
        if flags.save_model:
            state.finish(partial(score_normals, data_path=flags.data_path, mask_ratio=flags.mask_ratio)
                         if flags.reference else lambda model: {}, device)
            others = "".join(f" --{name} {value}" for name, value, default in (
                ("dims", flags.dims, 12), ("hidden", flags.hidden, 50), ("beats", flags.beats, None))
                             if value != default)
            print(f"checkpoint: {flags.save_path}\nscore it with: python test.py --data_path {flags.data_path} "
                  f"--load_model 1 --load_path {flags.save_path}{others}")
    stop_processes()


if __name__ == "__main__":
    run(main, alone=False)
