"""What stops or starves a run: too little memory, a full disk, signals, a loss that is not finite."""
import contextlib
import resource
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ecg import arrays
from scoring import passes
import train
import utils
from model import MCF, save_checkpoint
from utils import UserError

CPU = torch.device("cpu")
TIME = np.arange(5000) / 500


# ---- memory

@pytest.mark.parametrize("protocol", passes.PLAIN_PROTOCOLS)
@pytest.mark.parametrize("records, beats", [(3, 5), (32, 1), (1, 1)])
def test_scoring_with_little_memory(monkeypatch, capsys, protocol, records, beats):
    """Where a batch does not fit, half of it is tried; nothing is scored twice or left out, and it is said."""
    torch.manual_seed(0)
    model = MCF(hidden=2).eval()
    made = np.random.default_rng(0).normal(size=(5, 5000, 12)).astype(np.float32)
    r_peaks = [np.arange(300, 4300, 900 + 300 * row) for row in range(5)]

    def score():
        return passes.score_split(model, made, r_peaks, protocol, 30, CPU, "test", with_maps=True)
    whole, original = score(), passes.score_records

    def short_of_memory(*arguments):
        if len(arguments[2]) > records or arguments[6] > beats:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)
    monkeypatch.setattr(scoring, "score_records", short_of_memory)
    found = score()
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-5)
    np.testing.assert_allclose(found.maps, whole.maps, rtol=1e-4, atol=1e-6)
    assert "out of GPU memory: going on with" in capsys.readouterr().out
    monkeypatch.setattr(scoring, "score_records", lambda *arguments: short_of_memory(*arguments[:6], 99, False))
    with pytest.raises(UserError, match="--device cpu"):
        score()


# ---- training

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with six training records in data/, with their ecg_ids."""
    waves = [np.exp(-0.5 * ((TIME % (0.6 + 0.1 * row) - 0.3) / 0.02) ** 2) for row in range(6)]
    made = np.stack(waves, dtype=np.float32)[..., None].repeat(12, axis=2)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "train.npy", made)
    arrays.save_r_peaks(tmp_path / "data" / "train_r_peaks.npz", [np.arange(300, 4300, 400)] * 6,
                        arrays.fingerprint(made))
    manifest = {"arrays": {"train": {"fingerprint": arrays.fingerprint(made)}}}
    utils.save_json(tmp_path / "data" / arrays.MANIFEST, manifest)
    pd.DataFrame({"ecg_id": 100 + np.arange(6), "fold": 1}).to_csv(tmp_path / "data" / "train_records.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_train(monkeypatch, capsys, *extra) -> tuple:
    """train.py in this process on the folder: (exit code, what it printed, its sentence of error)."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--save_path", "run/model.pt", "--hidden", "2", "--device", "cpu",
                                      "--epochs", "3", "--batch_size", "2", "--select", "last", *map(str, extra)])
    code = 0
    try:
        utils.run(train.main)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    errors = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return code, captured.out, "".join(errors)


def change_steps(monkeypatch, change):
    """Let change(number of the step, counted from 1, its losses, the model) follow every training step."""
    step, steps = train.TrainingStep.__call__, []

    def changed(self, batch, share):
        losses = step(self, batch, share)
        steps.append(1)
        return change(len(steps), losses, self.forward)
    monkeypatch.setattr(train.TrainingStep, "__call__", changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("known", [True, False])
def test_loss_that_is_not_finite(place, monkeypatch, capsys, value, known):
    """The run stops and names the first bad batch's records, by ecg_id where it is known; the last epoch is kept."""
    if not known:
        (place / "data" / "train_records.csv").unlink()
    drawn, make_batch = [], train.TrainingBatches.fetch

    def watch(self, order, batches):
        drawn.extend(order[list(places)].tolist() for places in batches)
        return make_batch(self, order, batches)
    monkeypatch.setattr(train.TrainingBatches, "fetch", watch)
    change_steps(monkeypatch, lambda number, losses, _: [part * (value if number >= 5 else 1) for part in losses])
    code, _, error = run_train(monkeypatch, capsys)         # steps 4, 5, 6 are epoch 2
    names = ", ".join(str(row + 100 * known) for row in drawn[4])
    assert code == 2 and f"epoch 2, batch 2 first: {'ecg_id' if known else 'row'} {names} of train.npy" in error
    assert torch.load("run/last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("every, steps", [(1, 2), (2, 2), (50, 3)])
def test_loss_that_is_not_finite_stops_soon(monkeypatch, capsys, every, steps):
    """The run does not go on to the end of its epoch, of three steps here, and its sentence is the same."""
    done = []
    monkeypatch.setattr(train, "CHECK_EVERY", every)
    change_steps(monkeypatch, lambda number, losses, _: done.append(number) or [
        part * (float("nan") if number == 2 else 1) for part in losses])
    code, _, error = run_train(monkeypatch, capsys)
    assert code == 2 and "epoch 1, batch 2 first: ecg_id" in error and len(done) == steps


def test_weights_that_are_not_finite(place, monkeypatch, capsys):
    """A last update that spoils the weights after losses that were all finite leaves no checkpoint of them."""
    def spoil(number, losses, model):
        if number == 6:
            torch.nn.init.constant_(model.norm.bias, float("nan"))
        return losses
    change_steps(monkeypatch, spoil)
    code, _, error = run_train(monkeypatch, capsys)
    assert code == 2 and "weights are not finite after epoch 2" in error
    assert torch.load(place / "run" / "last.pt", weights_only=True)["epoch"] == 1


@pytest.fixture
def falling(place, monkeypatch):
    """The same with fold 9, on which the first of three epochs is the best; their steps are left out. Its model.pt."""
    def epoch_without_steps(model, *others):
        torch.nn.init.constant_(model.norm.bias, others[2])
        return dict.fromkeys(train.TERMS, 0.5)
    made = np.load(place / "data" / "train.npy")
    np.save(place / "data" / "val.npy", made)
    np.save(place / "data" / "val_label.npy", np.arange(6) % 2)
    arrays.save_r_peaks(place / "data" / "val_r_peaks.npz", [np.arange(300, 4300, 400)] * 6, arrays.fingerprint(made))
    monkeypatch.setattr(train, "train_epoch", epoch_without_steps)
    monkeypatch.setattr(train.Validation, "auroc", lambda _, model, epoch: 1 / epoch)
    monkeypatch.setattr(train.reference, "learn_normals", lambda *_: {
        "fold9_normals": {"paper": [0.5], "clean": [0.25]}})
    return place / "run" / "model.pt"


@pytest.mark.parametrize("reference", [0, 1])
def test_kept_checkpoint_holds_the_whole_history(falling, monkeypatch, capsys, reference):
    """The epoch that is kept was the first of three; its checkpoint tells of all three, and nothing else changes.

    So too where the run was stopped after its last epoch and resumed.
    """
    finish = train.Run.finish

    def stop(_):
        raise KeyboardInterrupt
    flags = ("--select", "val", "--reference", reference)
    monkeypatch.setattr(train.Run, "finish", stop)
    assert run_train(monkeypatch, capsys, *flags)[0] == 130
    before = torch.load(falling, weights_only=True)
    monkeypatch.setattr(train.Run, "finish", finish)
    assert run_train(monkeypatch, capsys, *flags, "--resume")[0] == 0
    after, last = torch.load(falling, weights_only=True), torch.load(falling.with_name("last.pt"), weights_only=True)
    assert len(before["history"]) == 1 and before["epoch"] == after["epoch"] == 1
    assert [row["epoch"] for row in after["history"]] == [1, 2, 3] and after["history"] == last["history"]
    for name, value in before.pop("model_state_dict").items():
        assert torch.equal(value, after["model_state_dict"][name])
    assert ("fold9_normals" in after) == bool(reference)
    assert all(after[name] == value for name, value in before.items() if name != "history")
    whole = falling.read_bytes()
    assert run_train(monkeypatch, capsys, *flags, "--resume")[0] == 0 and falling.read_bytes() == whole


def test_checkpoint_of_another_run_keeps_its_history(falling, monkeypatch, capsys):
    """What stands at --save_path is not touched where it is of another run; without it the run is done all the same."""
    flags = ("--select", "val", "--reference", 0)
    assert run_train(monkeypatch, capsys, *flags)[0] == 0
    save_checkpoint(falling, MCF(hidden=2), config={"protocol": "clean"}, history=[])
    before = falling.read_bytes()
    assert run_train(monkeypatch, capsys, *flags, "--save_model", 0)[0] == 0 and falling.read_bytes() == before
    assert run_train(monkeypatch, capsys, *flags, "--resume")[0] == 0 and falling.read_bytes() == before
    falling.unlink()
    code, printed, _ = run_train(monkeypatch, capsys, *flags, "--resume")
    assert code == 0 and "model.pt is missing" in printed


def test_resuming_a_run_from_before_a_flag(falling, monkeypatch, capsys):
    """A last.pt without --normalization was trained under minmax, the only one there was: it can be resumed."""
    flags = ("--select", "val")
    assert run_train(monkeypatch, capsys, *flags)[0] == 0
    for path in (falling, falling.with_name("last.pt")):
        content = torch.load(path, weights_only=True)
        assert content["config"].pop("normalization") == "minmax" and (path != falling or content.pop("fold9_normals"))
        torch.save(content, path)
    assert run_train(monkeypatch, capsys, *flags, "--normalization", "scale", "--resume")[0] == 2
    assert run_train(monkeypatch, capsys, *flags, "--resume")[0] == 0
    content = torch.load(falling, weights_only=True)
    assert content["config"]["normalization"] == "minmax" and content["fold9_normals"]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("at, kept", [(2, "nothing of this run is kept"), (5, "up to 1 are kept")])
def test_interrupt(monkeypatch, capsys, at, kept):
    """Ctrl-C and SIGTERM, which both become KeyboardInterrupt: what is kept and lost, how to go on; exit code 130."""
    def interrupt(number, losses, _):
        if number == at:
            raise KeyboardInterrupt
        return losses
    change_steps(monkeypatch, interrupt)
    code, printed, _ = run_train(monkeypatch, capsys)
    assert code == 130 and kept in printed and (at == 2 or "is lost; the same command with --resume" in printed)


@pytest.mark.usefixtures("place")
def test_training_out_of_memory(monkeypatch, capsys):
    """A step that the GPU does not hold names --batch_size."""
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    change_steps(monkeypatch, fill)
    code, _, error = run_train(monkeypatch, capsys)
    assert code == 2 and "--batch_size 2" in error


# ---- disk

@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes: the system refuses the write as on a full disk, also to root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name, write_file", [
    ("checkpoint", lambda path: save_checkpoint(path, MCF(hidden=2))),
    ("array", lambda path: utils.write_atomically(path, lambda file: np.save(file, np.zeros(10 ** 6)))),
    ("R peaks", lambda path: arrays.save_r_peaks(path, list(np.random.default_rng(0).integers(0, 5000, (999, 99))),
                                                 "")),
    ("JSON", lambda path: utils.save_json(path, {"a": "b" * 10 ** 6})),
    ("table", lambda path: utils.write_atomically(path, lambda file: file.write(b"1,2\n" * 10 ** 6)))])
def test_full_disk(tmp_path, name, write_file):
    """The last good file stays as it was, nothing half-written beside it, and one sentence says which file and why."""
    path = tmp_path / "file"
    path.write_bytes(b"good")
    with full_disk(50_000), pytest.raises(UserError, match="file could not be written .*; free some space") as caught:
        write_file(path)
    assert "None" not in str(caught.value), name
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_full_disk_in_training(place, monkeypatch, capsys):
    """The checkpoint of an earlier run survives a disk that fills up; the run ends in a sentence."""
    assert run_train(monkeypatch, capsys, "--epochs", "1")[0] == 0
    before = {path: path.read_bytes() for path in (place / "run").iterdir()}
    with full_disk(10 ** 6):
        code, _, error = run_train(monkeypatch, capsys)
    assert code == 2 and "run/model.pt could not be written (File too large)" in error
    assert {path: path.read_bytes() for path in (place / "run").iterdir()} == before
