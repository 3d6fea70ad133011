"""Training: reproducible, resumable, honest about how the epoch was chosen."""
import csv
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script

from ecg.arrays import open_signals
from model import MCF
from train import TrainingStep, choose_rows

FLAGS = ("--epochs", 3, "--batch_size", 16, "--lr", "1e-3", "--val_beats", 1, "--device", "cpu")


def train(data, save_path, *extra, **environment):
    finished = run_script("train.py", "--data_path", data, "--save_path", save_path, *FLAGS, *extra, **environment)
    assert finished.returncode == 0, finished.stderr
    return finished


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


@pytest.fixture(scope="module")
def trained(simulated, tmp_path_factory):
    """A folder with the files of one short run."""
    folder = tmp_path_factory.mktemp("trained")
    train(simulated, folder / "model.pt")
    return folder


def test_same_seed_same_weights(trained, simulated, tmp_path):
    """Two CPU runs with one seed give the same weights bit for bit, whatever loads the records; another seed others."""
    train(simulated, tmp_path / "again" / "model.pt", "--workers", 1)
    first, again = weights(trained / "last.pt"), weights(tmp_path / "again" / "last.pt")
    assert all(torch.equal(first[name], again[name]) for name in first)
    train(simulated, tmp_path / "other" / "model.pt", "--seed", 1, "--select", "last")
    assert not torch.equal(first["norm.weight"], weights(tmp_path / "other" / "last.pt")["norm.weight"])


def test_resume_is_bit_for_bit(trained, simulated, tmp_path):
    """A run killed during the second of three epochs and resumed ends with the weights of one that never stopped."""
    flags = ["--data_path", simulated, "--save_path", tmp_path / "model.pt", *FLAGS]
    early = run_script("tests/kill_in_epoch.py", *flags, KILL_IN="1", KILL_WITH="SIGINT")
    assert early.returncode == 130 and "nothing of this run is kept" in early.stdout
    killed = run_script("tests/kill_in_epoch.py", *flags, KILL_IN="2", KILL_WITH="SIGKILL")
    assert killed.returncode == -9
    stopped = run_script("tests/kill_in_epoch.py", *flags, "--resume", KILL_IN="2", KILL_WITH="SIGTERM")
    assert stopped.returncode == 130 and "--resume goes on" in stopped.stdout
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    finished = train(simulated, tmp_path / "model.pt", "--resume")
    assert "after 1 epochs" in finished.stdout
    for name, value in weights(trained / "last.pt").items():
        assert torch.equal(value, weights(tmp_path / "last.pt")[name]), name
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]


def test_history_and_checkpoint_say_what_was_done(trained):
    """history.csv has a line per epoch with all terms; the checkpoint carries config, epoch, metrics and versions."""
    rows = list(csv.DictReader((trained / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        terms = sum(float(row[f"loss_{term}"]) for term in ("global", "local", "trend"))
        assert abs(float(row["loss"]) - terms) < 1e-4
        assert 0 <= float(row["val_auroc"]) <= 1 and row["test_auroc"] == "" and float(row["seconds"]) > 0
    assert [float(row["lr"]) for row in rows] == pytest.approx([7.5e-4, 2.5e-4, 0])     # cosine, counted from 1
    losses = [float(row["loss"]) for row in rows]
    assert losses[1] < losses[0] - 0.2 and abs(losses[2] - losses[1]) < 0.3         # it learns, and at rate 0 no more
    content = torch.load(trained / "model.pt", weights_only=True)
    best = max(rows, key=lambda row: float(row["val_auroc"]))
    assert content["epoch"] == int(best["epoch"]) and content["metrics"]["val_auroc"] == float(best["val_auroc"])
    assert content["config"]["protocol"] == "clean" and content["config"]["select"] == "val"
    assert [row["epoch"] for row in content["history"]] == [1, 2, 3]         # also of the epochs after the selected one
    assert content["git_commit"] and content["versions"]["torch"] and "optimizer_state_dict" not in content
    assert sorted(file.name for file in trained.iterdir()) == ["history.csv", "last.pt", "model.pt"]


def test_bfloat16_trains(trained, simulated, tmp_path):
    """--amp bf16 follows the float32 run closely, and its weights stay float32."""
    train(simulated, tmp_path / "model.pt", "--amp", "bf16", "--select", "last")
    for one, other in zip(csv.DictReader((trained / "history.csv").open()),
                          csv.DictReader((tmp_path / "history.csv").open())):
        assert abs(float(one["loss"]) - float(other["loss"])) < 0.05
    assert weights(tmp_path / "model.pt")["norm.weight"].dtype == torch.float32


def test_compiled_step_is_the_plain_step(monkeypatch):
    """--compile traces the step as it is, the smaller last batch too. (Generating its code would take minutes.)"""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MCF(hidden=2).train()
        step = TrainingStep(model, torch.optim.AdamW(model.parameters(), 1e-3), torch.device("cpu"), "bf16", compiled)
        for size in (3, 3, 2):
            batch = [torch.rand(size, samples, 12) for samples in (4800, 480, 4800, 480, 4800)]
            torch.manual_seed(size)
            losses.append(float(step(batch, 1.0)[0]))
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-3)


def test_protocols_choose_their_folds(simulated, trained, tmp_path):
    """clean holds fold 9 back, paper trains on it; choosing the epoch on the test set is said to be optimistic."""
    clean = train(simulated, tmp_path / "clean.pt", "--protocol", "clean", "--epochs", 1, "--select", "last")
    paper = train(simulated, tmp_path / "paper.pt", "--protocol", "paper", "--epochs", 1, "--select", "test")
    counts = [int(run.stdout.split("training on ")[1].split()[0]) for run in (clean, paper)]
    folds = [int(row["fold"]) for row in csv.DictReader((simulated / "train_records.csv").open())]
    assert counts == [len(folds) - folds.count(9), len(folds)] and folds.count(9) > 0
    signals = open_signals(simulated, "train", 12)
    for protocol, held_back in (("clean", {9}), ("paper", set())):
        rows = choose_rows(signals, SimpleNamespace(data_path=simulated, protocol=protocol, select="last"))
        assert rows.tolist() == [row for row, fold in enumerate(folds) if fold not in held_back]
    assert "optimistic" in paper.stdout and "optimistic" not in clean.stdout


@pytest.mark.parametrize("change, message", [
    (("--protocol", "clean"), "train_records.csv"), (("--resume",), "last.pt"), (("--dims", 8), "train.npy"),
    (("--hidden", 7), "--hidden"), (("--mask_ratio", 0), "--mask_ratio"), (("--batch_size", 0), "--batch_size"),
    (("--epochs", 0), "--epochs"), (("--select", "val"), "val.npy"), (("--lr", "nan"), "--lr"),
    (("--save_path", "last.pt"), "--save_path"), (("--save_path", "/dev/null/model.pt"), "/dev/null")])
def test_user_errors(simulated, tmp_path, change, message):
    """On the published layout (no sidecars) what cannot be done ends in a sentence, exit code 2, and no checkpoint."""
    (tmp_path / "data").mkdir()
    for name in ("train.npy", "test.npy", "label.npy"):
        shutil.copy(simulated / name, tmp_path / "data")
    shutil.copy(simulated / "train_r_peaks.npz", tmp_path / "data")
    finished = run_script("train.py", "--data_path", tmp_path / "data", "--save_path", tmp_path / "model.pt", *change)
    assert finished.returncode == 2 and finished.stderr.startswith("error: ")
    assert message in finished.stderr and "Traceback" not in finished.stderr and finished.stderr.count("\n") == 1
    assert not (tmp_path / "model.pt").exists()
