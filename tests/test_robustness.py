"""What goes wrong with arrays and checkpoints on a user's machine, and what it gives: the table of inputs tried.

A refusal is one sentence that names the file and the remedy, exit code 2, and nothing written, changed or executed.
"""
import io
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script
from small import describe, few_channels, make_data, make_model  # noqa: F401

from ecg import arrays
from model import save_checkpoint

LINES = {"test.py": ("--load_path", "model.pt", "--hidden", 2, "--device", "cpu", "--protocol", "clean", "--figures",
                     0),
         "train.py": ("--save_path", "run/model.pt", "--hidden", 2, "--device", "cpu", "--epochs", 2, "--batch_size", 4,
                      "--protocol", "clean", "--select", "last", "--watch", "val", "--reference", 0)}


@pytest.fixture(scope="module")
def whole_place(tmp_path_factory):
    """What place is a copy of: data, a checkpoint, and last.pt of a short run."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder / "data", rows=6)
    save_checkpoint(folder / "model.pt", make_model(), epoch=1)
    finished = run_script("train.py", *LINES["train.py"], "--epochs", 1, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def place(whole_place, tmp_path):
    """A working folder with data/ and model.pt, of the smallest network."""
    shutil.copytree(whole_place / "data", tmp_path / "data")
    shutil.copy(whole_place / "model.pt", tmp_path)
    return tmp_path


def check_refused(place, script, *words, extra=()):
    """Exit code 2, one sentence with these words and a remedy after a semicolon, and all files as they were."""
    def times():
        return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    before, sentence = times(), run_script(script, *LINES[script], *extra, cwd=place).refusal
    assert ";" in sentence and all(word in sentence for word in words), sentence
    assert times() == before


class Payload:
    """What a malicious pickle would carry: it creates the file "executed"."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def change(edit):
    """Damage done by changing an array."""
    return lambda path: np.save(path, edit(np.load(path)))


def put(value):
    """Damage done by putting a value into a row."""
    def edit(records):
        records = records.astype(np.float64)
        records[1, 17, 3] = value
        return records
    return change(edit)


DAMAGE = {
    "missing": lambda path: path.unlink(), "text": lambda path: path.write_text("I,II,III\n"),
    "pickled objects": lambda path: np.save(path, np.array([Payload()] * 6, dtype=object), allow_pickle=True),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Payload())), "no row": change(lambda a: a[:0]),
    "11 leads": change(lambda a: a[..., :11]), "NaN": put(np.nan), "1e30 mV": put(1e30),
    "one too few": change(lambda a: a[:-1]), "a 2": change(lambda a: a * 2),
    "text values": change(lambda a: a.astype("U1")),
    "one class in 100:4900": change(lambda a: np.where(np.arange(5000)[:, None] < 100, a, 0))}
ARRAY_TABLE = [
    *(("train.py", "train.npy", name) for name in ("missing", "text", "pickled objects", "a bare pickle", "no row",
                                                   "11 leads", "NaN", "1e30 mV")),
    *((script, file, name) for script, file in (("test.py", "test.npy"), ("train.py", "val.npy"))
      for name in ("a bare pickle", "11 leads", "NaN")),
    *((script, file, name) for script, file in (("test.py", "label.npy"), ("train.py", "val_label.npy"))
      for name in ("missing", "one too few", "a 2", "text values")),
    ("test.py", "benchmark_label.npy", "one class in 100:4900")]


@pytest.mark.parametrize("script, file, name", ARRAY_TABLE)
def test_array(place, script, file, name):
    """Refused by name before anything is scored or trained."""
    DAMAGE[name](place / "data" / file)
    if file == "train.npy" and name in ("NaN", "1e30 mV"):
        describe(place / "data")                            # nothing but the values is wrong with it
    check_refused(place, script, file)
    assert not (place / "executed").exists()


def with_state(**changes):
    """A checkpoint's content with some weights replaced, or left out where the value is None."""
    state = make_model().state_dict() | changes
    return {"model_state_dict": {name: value for name, value in state.items() if value is not None}}


CHECKPOINTS = {
    "missing": lambda: None, "a folder": lambda: "folder", "empty": lambda: b"", "junk": lambda: bytes(range(256)) * 50,
    "half": lambda: "half", "a list": lambda: [1, 2], "a tensor": lambda: torch.zeros(3),
    "no weights": lambda: {"epoch": 3},
    "weights of a list": lambda: {"model_state_dict": [1, 2]}, "weights of None": lambda: {"model_state_dict": None},
    "a weight missing": lambda: with_state(**{"norm.bias": None}),
    "a weight too wide": lambda: with_state(**{"norm.bias": torch.zeros(3)}),
    "a weight that is text": lambda: with_state(**{"norm.bias": "0"}),
    "another network": lambda: {"model_state_dict": {"layer.weight": torch.zeros(2)}},
    "malicious": lambda: {"model_state_dict": Payload()}, "malicious beside the weights": lambda: with_state() | {
        "metrics": Payload()}, "a bare pickle": lambda: pickle.dumps(Payload()),
    "NaN weights": lambda: with_state(**{"norm.bias": torch.full((2,), torch.nan)}),
    "half precision that overflowed": lambda: with_state(**{"norm.bias": torch.tensor([1e6, 0.0]).half()})}


def write_content(path, content):
    """One of CHECKPOINTS as a file."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str) and content == "folder":
        path.mkdir()
    elif isinstance(content, str):
        whole = io.BytesIO()
        torch.save(with_state(), whole)
        path.write_bytes(whole.getvalue()[:whole.tell() // 2])
    elif content is not None:
        torch.save(content, path)


@pytest.mark.parametrize("script, name", [*(("test.py", name) for name in CHECKPOINTS), *(
    ("train.py", name) for name in ("missing", "a list", "a weight missing", "malicious", "NaN weights"))])
def test_checkpoint(place, script, name):
    """Refused by name by test.py --load_path and train.py --resume; nothing is unpickled that could act."""
    path = place / ("model.pt" if script == "test.py" else "run/last.pt")
    write_content(path, CHECKPOINTS[name]())
    check_refused(place, script, path.name, extra=["--resume"] * (script == "train.py"))
    assert not (place / "executed").exists()


@pytest.mark.parametrize("missing, value", [("config", "text"), ("history", "absent"), ("best", "text"),
                                            ("epoch", "absent"), ("optimizer_state_dict", "absent")])
def test_last_checkpoint_that_is_not_whole(whole_place, place, missing, value):
    """last.pt without one of the facts that --resume needs, or with another type in its place, is refused by name."""
    content = torch.load(whole_place / "run" / "last.pt", weights_only=True)
    content[missing] = "x"
    if value == "absent":
        del content[missing]
    (place / "run").mkdir()
    torch.save(content, place / "run" / "last.pt")
    check_refused(place, "train.py", "last.pt", extra=("--epochs", 1, "--resume"))


@pytest.mark.parametrize("script, flags, word", [
    ("test.py", ("--load_path", "absent.pt"), "absent.pt"), ("test.py", ("--hidden", 4), "--hidden 2"),
    ("test.py", ("--dims", 8), "--dims 12"), ("test.py", ("--mask_ratio", -1), "--mask_ratio"),
    ("test.py", ("--beats", "within", "--save_maps", 1), "--beats scores"),
    ("test.py", ("--output_dir", "data/test.npy/x"), "data/test.npy/x"), ("test.py", ("--data_path", "none"), "none"),
    ("train.py", ("--resume",), "last.pt"), ("train.py", ("--dims", 8), "train.npy"),
    ("train.py", ("--hidden", 7), "--hidden"), ("train.py", ("--mask_ratio", -1), "--mask_ratio"),
    ("train.py", ("--batch_size", 0), "--batch_size"), ("train.py", ("--epochs", 0), "--epochs"),
    ("train.py", ("--lr", "nan"), "--lr"), ("train.py", ("--data_path", "none"), "none"),
    ("train.py", ("--input", "compand", "--protocol", "paper"), "--protocol paper"),
    ("train.py", ("--save_path", "last.pt"), "--save_path"), ("train.py", ("--save_path", "."), "is a folder"),
    ("train.py", ("--save_path", "/dev/null/x.pt"), "/dev/null")])
def test_flags(place, script, flags, word):
    """A flag that does not fit is named, or what it should have been."""
    check_refused(place, script, word, extra=flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(place):
    check_refused(place, "test.py", "cuda", extra=("--device", "cuda"))


def test_read_only_data(place):
    """Where R peaks cannot be kept beside the arrays (a folder is in their place) they are found, used and not kept."""
    for split in ("train", "val"):
        path = arrays.r_peaks_path(place / "data", split, "slope")
        path.unlink()
        path.mkdir()
    before = sorted((place / "data").rglob("*"))
    finished = run_script("train.py", *LINES["train.py"], cwd=place)
    assert finished.returncode == 0 and sorted((place / "data").rglob("*")) == before
