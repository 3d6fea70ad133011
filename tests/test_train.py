"""Training: reproducible, resumable, honest about how the epoch was chosen, and clear about what stops it."""
import csv
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import full_disk, run_script
from small import few_channels, make_data, make_model, read_all, shrink  # noqa: F401

import dataloader
import train
import utils
from dataloader import choose_rows
from model import PARTS, load_checkpoint, save_checkpoint
from scoring.protocols import CLEAN, PAPER

FLAGS = ("--epochs", 3, "--batch_size", 4, "--lr", "1e-2", "--val_beats", 1, "--device", "cpu", "--hidden", 2,
         "--reference", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("arrays") / "data")


@pytest.fixture
def train_in(data, tmp_path):
    """Calls train.py on the data; files go to tmp_path."""
    def call(*extra, name="model.pt"):
        return run_script("train.py", "--data_path", data, "--save_path", tmp_path / name, *FLAGS, *extra)
    return call


def contents(path):
    return torch.load(path, weights_only=True)


def leaves(content, name=""):
    """The leaves of nested dicts and lists by name, less the seconds, and the commit, which a developer may change."""
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {leaf: value for key, part in items for leaf, value in leaves(part, f"{name}.{key}").items()}
    return {} if name.endswith((".seconds", ".git_commit")) else {name: content}


def same_run(one, other, part=None):
    """Whether two checkpoints hold the same bit for bit: weights, optimizer, history, settings; or one part of them."""
    one, other = (leaves(contents(path)[part] if part else contents(path)) for path in (one, other))
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A folder with the files of one short run."""
    folder = tmp_path_factory.mktemp("trained")
    finished = run_script("train.py", "--data_path", data, "--save_path", folder / "model.pt", *FLAGS, "--protocol",
                          "clean", "--watch", "test", "--reference", 1)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_another_seed_other_weights(trained, train_in, tmp_path):
    train_in("--protocol", "clean", "--seed", 1, name="other/model.pt")
    assert not same_run(trained / "last.pt", tmp_path / "other" / "last.pt", "model_state_dict")


class Killed(BaseException):
    """The end of a process that was killed: nothing handles it."""


@pytest.mark.parametrize("at, end, kept", [(1, KeyboardInterrupt, "nothing of this run is kept"),
                                           (3, KeyboardInterrupt, "up to 1 are kept"), (3, Killed, "")])
def test_interrupted_run_resumes_bit_for_bit(trained, train_in, tmp_path, monkeypatch, at, end, kept):
    """Ctrl-C and SIGTERM say what is kept, exit 130; --resume ends as a run that never stopped, also if killed."""
    flags, step, steps = ("--protocol", "clean", "--watch", "test", "--reference", 1), train.TrainingStep.__call__, []

    def interrupt(self, batch, share):
        steps.append(1)
        if len(steps) == at:
            raise end
        return step(self, batch, share)
    monkeypatch.setattr(train.TrainingStep, "__call__", interrupt)
    try:
        stopped = train_in(*flags)
        assert stopped.returncode == 130 and kept in stopped.stdout
    except Killed:
        assert end == Killed
    monkeypatch.undo()
    shrink(monkeypatch)
    finished = train_in(*flags, *["--resume"] * (at > 1))
    assert finished.returncode == 0 and ("after 1 epochs" in finished.stdout) == (at > 1)
    assert all(same_run(trained / name, tmp_path / name) for name in ("last.pt", "model.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "last.pt", "model.pt"]


def test_history_and_checkpoint_say_what_was_done(trained):
    """history.csv has a line per epoch with all terms; the checkpoint carries config, epoch, metrics and versions."""
    rows = list(csv.DictReader((trained / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        terms = sum(float(row[f"loss_{term}"]) for term in ("global", "local", "trend"))
        assert abs(float(row["loss"]) - terms) < 1e-4
        assert 0 <= float(row["val_auroc"]) <= 1 and 0 <= float(row["test_auroc"]) <= 1 and float(row["seconds"]) > 0
    assert [float(row["lr"]) for row in rows] == pytest.approx([7.5e-3, 2.5e-3, 0])     # cosine, counted from 1
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])
    content = contents(trained / "model.pt")
    best = max(rows, key=lambda row: float(row["val_auroc"]))
    assert content["epoch"] == int(best["epoch"]) and content["metrics"]["val_auroc"] == float(best["val_auroc"])
    assert content["config"]["protocol"] == "clean" and content["config"]["select"] == "val"
    assert [row["epoch"] for row in content["history"]] == [1, 2, 3]         # also of the epochs after the selected one
    assert content["git_commit"] and content["versions"]["torch"] and "optimizer_state_dict" not in content
    assert {name: len(scores) for name, scores in content["fold9_normals"].items()} == {"paper": 4, "clean": 4}
    assert sorted(file.name for file in trained.iterdir()) == ["history.csv", "last.pt", "model.pt"]


@pytest.mark.parametrize("flags, records, words, columns", [
    ((), 8, "protocol paper, input minmax, epoch kept: last", ()),
    (("--protocol", "clean"), 7, "epoch kept: val", ("val",)),
    (("--select", "test", "--val_every", 2), 8, "optimistic", ("test",)),
    (("--input", "compand", "--uncertainty", "free"), 7, "protocol clean, input compand, epoch kept: val", ("val",)),
    (("--branches", "local", "--cross_attention", 0, "--mask_ratio", 0), 8, "protocol paper", ())])
def test_flags_choose_folds_input_and_epoch(data, train_in, tmp_path, flags, records, words, columns):
    """As published all normals and HeartPy's beats; fold 9 held back where it selects; the network knows its input."""
    finished = train_in(*flags, "--epochs", 2)
    assert finished.returncode == 0 and f"training on {records} normal" in finished.stdout and words in finished.stdout
    model, facts = load_checkpoint(tmp_path / "model.pt")
    row = facts["history"][-1]
    assert {split for split in ("val", "test") if row[f"{split}_auroc"] is not None} == set(columns)
    assert model.input["kind"] == ("compand" if "compand" in flags else "minmax")
    assert model.uncertainty == ("free" if "free" in flags else "log_variance")
    assert model.parts == (("local", "trend") if "local" in flags else PARTS)


def test_which_rows_are_trained_on():
    """clean leaves fold 9 out, paper nothing; arrays without a table can be trained on as published alone."""
    table = {"fold": np.array([1, 9, 8, 9])}
    held_back = CLEAN.fold_held_back
    assert choose_rows(held_back, table, 4).tolist() == [0, 2]
    assert choose_rows(PAPER.fold_held_back, table, 4).tolist() == choose_rows(None, None, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(utils.UserError, match="--protocol paper"):
        choose_rows(held_back, None, 4)


def test_bfloat16_trains_where_the_processor_can(train_in, tmp_path, monkeypatch):
    """--amp bf16 keeps float32 weights; on a processor without such instructions it is refused."""
    monkeypatch.setattr(utils, "cpu_computes_bfloat16", lambda: False)
    assert "use --amp off" in train_in("--amp", "bf16").refusal
    monkeypatch.setattr(utils, "cpu_computes_bfloat16", lambda: True)
    assert train_in("--amp", "bf16", "--epochs", 2).returncode == 0
    assert contents(tmp_path / "model.pt")["model_state_dict"]["norm.weight"].dtype == torch.float32


def test_every_output_is_checked_before_training(train_in, tmp_path):
    """A folder where last.pt or history.csv shall be is refused too."""
    for name in ("last.pt", "history.csv"):
        (tmp_path / name).mkdir()
        assert f"{name} is a folder" in train_in().refusal
        (tmp_path / name).rmdir()


def change_steps(monkeypatch, change):
    """Let change(number of the step, counted from 1, its losses, the model) follow every training step."""
    step, steps = train.TrainingStep.__call__, []

    def changed(self, batch, share):
        losses = step(self, batch, share)
        steps.append(1)
        return change(len(steps), losses, self.forward)
    monkeypatch.setattr(train.TrainingStep, "__call__", changed)


@pytest.mark.parametrize("value, known, every", [("nan", True, 50), ("inf", False, 50), ("nan", True, 2)])
def test_loss_that_is_not_finite(data, train_in, tmp_path, monkeypatch, value, known, every):
    """The run stops, soon, and names the first bad batch's records, by ecg_id where known; the last epoch is kept."""
    monkeypatch.setattr(train, "CHECK_EVERY", every)
    steps = []
    if not known:
        monkeypatch.setattr(dataloader, "load_table", lambda *_: None)
    change_steps(monkeypatch, lambda number, losses, _: steps.append(1) or [part * (float(value) if number >= 6 else 1)
                                                                            for part in losses])
    finished = train_in("--batch_size", 2)                      # steps 5 to 8 are epoch 2
    rows = {100 * known + row for row in range(8)}
    kind = "ecg_id" if known else "row"
    named = re.search(rf"epoch 2, batch 2 first: {kind} (\d+), (\d+) of train.npy", finished.refusal)
    assert {int(name) for name in named.groups()} < rows
    assert contents(tmp_path / "last.pt")["epoch"] == 1 and len(steps) == (6 if every == 2 else 8)


def test_weights_that_are_not_finite(train_in, tmp_path, monkeypatch):
    """A last update that spoils the weights after losses that were all finite leaves no checkpoint of them."""
    change_steps(monkeypatch, lambda number, losses, model: (
        torch.nn.init.constant_(model.norm.bias, float("nan")) if number == 4 else None, losses)[1])
    assert "weights are not finite after epoch 2" in train_in().refusal
    assert contents(tmp_path / "last.pt")["epoch"] == 1


def test_full_disk(train_in, tmp_path):
    """The files of an earlier run survive a disk that fills up; the run ends in a sentence."""
    assert train_in("--epochs", 1).returncode == 0
    before = read_all(tmp_path)
    with full_disk(50_000):
        assert "model.pt could not be written (File too large)" in train_in("--epochs", 1).refusal
    assert read_all(tmp_path) == before


def test_training_out_of_memory(train_in, monkeypatch):
    """A step that the GPU does not hold names --batch_size."""
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    change_steps(monkeypatch, fill)
    assert "--batch_size 4" in train_in().refusal


@pytest.fixture
def falling(train_in, tmp_path, monkeypatch):
    """train_in without steps, where the first of three epochs is the best on fold 9; and its model.pt."""
    monkeypatch.setattr(train, "train_one_epoch", lambda model, step, batches, epoch: (
        torch.nn.init.constant_(model.norm.bias, epoch), dict.fromkeys(train.TERMS, 0.5))[1])
    monkeypatch.setattr(train.Validation, "auroc", lambda _, model, *others: 1 / float(model.norm.bias.detach()[0]))
    monkeypatch.setattr(train, "score_normals", lambda *_, **options: {"fold9_normals": {"clean": [0.25]}})
    return partial(train_in, "--select", "val", "--reference", 1), tmp_path / "model.pt"


def test_kept_checkpoint_holds_the_whole_history(falling, monkeypatch):
    """The epoch that is kept was the first of three; its checkpoint tells of all three, also when resumed last."""
    run, path = falling
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run().returncode == 130
    before = contents(path)
    assert run("--resume").returncode == 0
    after, last = contents(path), contents(path.with_name("last.pt"))
    assert len(before["history"]) == 1 and before["epoch"] == after["epoch"] == 1
    assert [row["epoch"] for row in after["history"]] == [1, 2, 3] and after["history"] == last["history"]
    for name, value in before.pop("model_state_dict").items():
        assert torch.equal(value, after["model_state_dict"][name])
    assert after["fold9_normals"] and all(after[name] == value for name, value in before.items() if name != "history")
    whole = path.read_bytes()
    assert run("--resume").returncode == 0 and path.read_bytes() == whole


def test_checkpoint_of_another_run_stays_as_it_is(falling):
    """What stands at --save_path is not touched where it is of another run, or missing; the run is done anyway."""
    run, path = falling
    assert run().returncode == 0
    save_checkpoint(path, make_model(), config={"protocol": "clean"}, history=[])
    before = path.read_bytes()
    assert run("--save_model", 0).returncode == 0 and path.read_bytes() == before
    finished = run("--resume")
    assert finished.returncode == 0 and path.read_bytes() == before and "another run" in finished.stdout
    path.unlink()
    finished = run("--resume")
    assert finished.returncode == 0 and "model.pt is missing" in finished.stdout
    assert "another lr" in run("--resume", "--lr", 1).stderr
