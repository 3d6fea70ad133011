"""Train the diagnosis of 71 statements, with or without anomaly-detection pretraining.

    python -m diagnosis.train --arm ad-frozen --encoder ckpt/mymodel.pt --epochs 8 --lr 1e-3 --save_path runs/ad.pt
    python -m diagnosis.train --arm random-frozen --epochs 8 --lr 1e-3 --save_path runs/random.pt       # its control
    python -m diagnosis.train --arm ad-joint --encoder ckpt/companded.pt --save_path runs/joint.pt

A frozen arm trains the class head alone on stored H (unmasked input), as nothing else would learn; a joint arm trains
all, on masked input. Folds 1-8 are for training. The last epoch is kept. At the end fold 9 gives the thresholds and
the calibration of the probabilities; nothing else is chosen there. NAME.last.pt beside the checkpoint is for --resume.
"""
import argparse
import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataloader import Normalisation, TrainingBatches, TrainingSet, measure_companding
from diagnosis.arrays import ATTRIBUTES, Statements, load_statements
from diagnosis.calibration import calibrate
from diagnosis.features import calibrate_norms, logits_of, store_features
from diagnosis.model import HEADS, Diagnoser, attribute_loss, load_diagnoser, statement_loss
from ecg.arrays import VALIDATION_FOLD
from model import MCF, PARTS, forward_loss, load_checkpoint, save_checkpoint, weights_are_finite
from train import WEIGHT_DECAY, learning_rate
from utils import UserError, choose_device, git_commit, require_writable, run, sha256_of, versions

ARMS = ("random-joint", "ad-joint", "ad-frozen", "random-frozen")
LOSSES = ("asymmetric", "bce")
NOT_CONFIG = ("resume", "save_path", "data_path", "device", "encoder")      # may change on --resume


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data/", help="folder of the arrays (default %(default)s)")
    parser.add_argument("--save_path", default="./ckpt/diagnosis_new.pt", help="checkpoint (default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--arm", choices=ARMS, required=True, help="where the encoders come from, and what is trained")
    method.add_argument("--encoder", help="checkpoint of the anomaly network, for the arms ad-*")
    method.add_argument("--input", choices=("minmax", "compand"), help="of random encoders (default minmax); those of "
                        "--encoder have theirs")
    method.add_argument("--head", choices=HEADS, default="resnet", help="resnet: the paper's; pooled: a perceptron on "
                        "mean, deviation, maximum and minimum of H (default %(default)s)")
    method.add_argument("--loss", choices=LOSSES, default="asymmetric", help="(default %(default)s)")
    method.add_argument("--gamma_pos", type=float, default=10, help="of the asymmetric loss (default %(default)s)")
    method.add_argument("--mask_ratio", type=int, default=30, help="percent masked in a joint arm (default "
                        "%(default)s; 0: nothing)")
    method.add_argument("--restore", type=int, choices=(0, 1), default=1, help="0: a joint arm without the decoders "
                        "and their loss, in half the time (default 1, as published)")
    method.add_argument("--epochs", type=int, default=50, help="fixed beforehand (default %(default)s)")
    method.add_argument("--epoch_records", type=int, help="records that an epoch draws (default: all of folds 1-8)")
    method.add_argument("--batch_size", type=int, default=32, help="records (default %(default)s)")
    method.add_argument("--lr", type=float, default=1e-4, help="initial learning rate (default %(default)s)")
    method.add_argument("--seed", type=int, default=0, help="of all that is random (default %(default)s)")
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: bfloat16 in a joint arm")
    running.add_argument("--resume", action="store_true", help="go on after the last whole epoch")
    return check(parser.parse_args())


def check(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, or UserError for what no run can do."""
    for name, least, most in (("mask_ratio", 0, 99), ("epochs", 1, 10**6), ("batch_size", 2, 10**6),
                              ("epoch_records", 2, 10**9), ("lr", 1e-12, 1e6), ("seed", 0, 2**31),
                              ("gamma_pos", 0, 100)):
        if getattr(flags, name) is not None and not least <= getattr(flags, name) <= most:
            raise UserError(f"--{name} {getattr(flags, name)} is out of range; choose {least} to {most}")
    if flags.arm.startswith("ad") != bool(flags.encoder):
        raise UserError(f"--arm {flags.arm} " + ("has random encoders; leave --encoder out" if flags.encoder else
                        "starts from an anomaly network; name its checkpoint with --encoder"))
    if flags.arm.startswith("ad") and flags.input:
        raise UserError("the input is that of --encoder; leave --input out")
    for path in (flags.save_path, last_path(flags.save_path)):
        require_writable(path, is_folder=False)
    return flags


def last_path(path) -> Path:
    """Where the last whole epoch stands, for --resume."""
    return Path(path).with_suffix(".last.pt")


def make_network(flags: argparse.Namespace, statements: Statements) -> Diagnoser:
    """The network of an arm before training; the heads of all arms start from the same weights."""
    joint, rows = flags.arm.endswith("joint"), statements.training_rows()
    torch.manual_seed(flags.seed)
    if flags.encoder:
        mcf, _ = load_checkpoint(flags.encoder)
        if set(mcf.parts) != set(PARTS):
            raise UserError(f"{flags.encoder} was trained without some part of the method; name another --encoder")
    else:
        mcf = MCF()
        if flags.input == "compand":
            mcf.input = measure_companding(statements.records, rows)
    if mcf.leads != statements.records.leads:
        raise UserError(f"{flags.encoder} is of {mcf.leads} leads, the arrays of {statements.records.leads}; name "
                        "another --encoder")
    if flags.arm == "random-frozen":
        calibrate_norms(mcf, statements, rows)
    torch.manual_seed(flags.seed + 1)
    return Diagnoser(mcf, len(statements.codes), len(ATTRIBUTES) if joint else 0, flags.head,
                     restores=joint and bool(flags.restore))


class FrozenEpochs:
    """Batches of stored H, and the loss of the class head on them."""

    def __init__(self, network: Diagnoser, statements: Statements, flags: argparse.Namespace, device):
        self.network, self.device, self.flags, self.rows = network, device, flags, statements.training_rows()
        self.features = store_features(flags.data_path, network.mcf, statements)
        self.labels, self.trained = torch.from_numpy(statements.labels), network.class_head
        self.head = network.class_head
        if flags.head == "pooled":                      # once for all epochs: (N, 4 channels)
            self.features = np.concatenate([self.head.pool(torch.tensor(block).float()).numpy() for block in
                                            np.array_split(self.features, -(-len(self.features) // 256))])
            self.head = self.head.layers

    def __len__(self):
        return -(-(min(len(self.rows), self.flags.epoch_records or len(self.rows)) - 1) // self.flags.batch_size)

    def losses(self, epoch: int):
        """Yield (loss, records) for every batch of an epoch."""
        generator = torch.Generator().manual_seed(self.flags.seed * 1_000_003 + epoch)
        order = self.rows[torch.randperm(len(self.rows), generator=generator).numpy()][:self.flags.epoch_records]
        for start in range(0, len(order) - 1, self.flags.batch_size):       # BatchNorm needs two records: never one
            rows = order[start:start + self.flags.batch_size]
            logits = self.head(torch.from_numpy(self.features[rows]).to(self.device).float())
            labels = self.labels[rows].to(self.device)
            yield statement_loss(self.flags.loss, logits, labels, self.flags.gamma_pos), len(rows)


class JointEpochs:
    """Batches of masked recordings, and the sum of all losses on them: restoration, attributes, statements."""

    def __init__(self, network: Diagnoser, statements: Statements, flags: argparse.Namespace, device):
        self.network, self.device, self.flags = network, device, flags
        self.labels, self.attributes = torch.from_numpy(statements.labels), torch.from_numpy(statements.attributes)
        training = TrainingSet(statements.records, statements.training_rows(), statements.beats)
        self.batches = TrainingBatches(training, Normalisation.of(network.input, device), flags.batch_size,
                                       flags.mask_ratio, flags.seed, flags.epoch_records)
        self.trained = network

    def __len__(self):
        return len(self.batches)

    def losses(self, epoch: int):
        """Yield (loss, records) for every batch of an epoch."""
        rows = self.batches.rows_of_epoch(epoch)
        labels, attributes = (of_all[rows].to(self.device) for of_all in (self.labels, self.attributes))
        for start, (batch, _, records) in zip(range(0, len(rows), self.flags.batch_size),
                                              self.batches.draw_epoch(epoch)):
            if records < 2:                             # the pooled head's BatchNorm needs two
                break
            some, autocast = slice(start, start + records), torch.autocast(self.device.type, torch.bfloat16)
            with autocast if self.flags.amp == "bf16" else contextlib.nullcontext():
                loss = self.loss_of(batch, labels[some], attributes[some])
            yield loss, records

    def loss_of(self, batch: tuple, labels, attributes):
        """batch: of TrainingBatches; labels (B, classes); attributes (B, attributes)."""
        ecg, beat, masked_ecg, masked_beat, trend = batch
        tokens = self.network.encode(masked_ecg, masked_beat, trend)
        joined = torch.cat([tokens[0], tokens[2]], dim=1)
        loss = statement_loss(self.flags.loss, self.network.class_head(joined), labels, self.flags.gamma_pos)
        loss = loss + attribute_loss(self.network.attribute_head(joined).float(), attributes)
        if self.network.restores:
            loss = loss + forward_loss(self.network.restore(*tokens), ecg, beat)["loss"]
        return loss


def train_one_epoch(epochs, optimizer, epoch: int, progress) -> float:
    """One pass over the training records; returns the mean loss of a record. Raises UserError where it is not finite.
    """
    epochs.trained.train()
    torch.manual_seed(epochs.flags.seed * 1_000_003 + epoch)        # dropout: an epoch can be run again from its start
    total = records = 0
    for loss, number in epochs.losses(epoch):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, records = total + loss.detach(), records + number
        progress.update()
    mean = float(total) / records
    if not math.isfinite(mean) or not weights_are_finite(epochs.network):
        raise UserError(f"the loss is not finite in epoch {epoch}; lower --lr, or train with --amp off (the epochs "
                        "before are kept)")
    return mean


def resume(path: Path, config: dict, network: Diagnoser, optimizer) -> list:
    """Load the last whole epoch into network and optimizer; returns the history. Raises UserError."""
    stored, facts = load_diagnoser(path)
    if differing := [name for name in config if facts["config"].get(name) != config[name]]:
        raise UserError(f"{path} was trained with another {', '.join(differing)}; repeat its flags, or start without "
                        "--resume")
    try:
        network.load_state_dict(stored.state_dict())
        optimizer.load_state_dict(facts["optimizer_state_dict"])
        return [dict(row) for row in facts["history"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be resumed ({type(error).__name__}); start without --resume") from error


def run_epochs(epochs, optimizer, history: list, facts: dict):
    """Train epoch after epoch, after those in history, which grows; each is kept for --resume."""
    flags, size = epochs.flags, len(epochs)
    with tqdm(total=flags.epochs * size, initial=len(history) * size, unit="batch", desc=flags.arm,
              mininterval=5) as progress:
        for epoch in range(len(history) + 1, flags.epochs + 1):
            started = time.perf_counter()
            rate = learning_rate(flags.lr, epoch, flags.epochs)
            optimizer.param_groups[0]["lr"] = rate
            loss = train_one_epoch(epochs, optimizer, epoch, progress)
            history.append({"epoch": epoch, "loss": loss, "lr": rate,
                            "seconds": round(time.perf_counter() - started, 1)})
            save_checkpoint(last_path(flags.save_path), epochs.network, **facts, history=history,
                            optimizer_state_dict=optimizer.state_dict())
            progress.write(f"epoch {epoch:3d}  loss {loss:.4f}  {history[-1]['seconds']:.0f} s")


def main():
    commit, flags = git_commit(), parse_arguments()
    device = choose_device(flags.device, flags.amp)
    statements = load_statements(flags.data_path)
    network = make_network(flags, statements).to(device)
    epochs = (JointEpochs if flags.arm.endswith("joint") else FrozenEpochs)(network, statements, flags, device)
    optimizer = torch.optim.AdamW(epochs.trained.parameters(), lr=flags.lr, weight_decay=WEIGHT_DECAY, fused=True)
    config = {name: value for name, value in vars(flags).items() if name not in NOT_CONFIG}
    config |= {"fingerprint": statements.about["fingerprint"],
               "encoder_sha256": sha256_of(flags.encoder) if flags.encoder else ""}
    facts = {"config": config, "statements": statements.about["statements"], "git_commit": commit,
             "versions": versions(), "training_records": len(statements.training_rows())}
    history = resume(last_path(flags.save_path), config, network, optimizer) if flags.resume else []
    print(f"{flags.arm}: {facts['training_records']} records, {len(statements.codes)} statements, on {device}"
          + (f", after {len(history)} epochs" if history else ""))
    run_epochs(epochs, optimizer, history, facts)
    rows = statements.rows_of(VALIDATION_FOLD)
    if not len(rows):
        raise UserError("no record of fold 9 is in the arrays, which gives the thresholds; make them of more records")
    logits = logits_of(network, statements, rows, flags.data_path)
    prevalence = statements.labels[statements.training_rows()].mean(axis=0, dtype=np.float64)
    save_checkpoint(flags.save_path, network, **facts, history=history,
                    calibration=calibrate(statements.labels[rows], logits, prevalence))
    print(f"checkpoint: {flags.save_path}\ntest it with: python -m diagnosis.test --data_path {flags.data_path} "
          f"--load_path {flags.save_path} --output_dir results/diagnosis")


if __name__ == "__main__":
    run(main)
