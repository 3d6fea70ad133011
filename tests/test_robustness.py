"""What goes wrong on a user's machine, and what it gives: the names of these tests are the table of inputs tried.

Both scripts are called in this process. A refusal is one sentence that names the file and the remedy, exit code 2, and
nothing written.
"""
import importlib.util
import io
import os
import pickle
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from ecg import arrays
import train
import utils
from model import MCF, load_checkpoint, save_checkpoint

TIME = np.arange(5000) / 500
ROWS = 6


def load_script(name):
    """A script as a module; Python has a package named test of its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {"test.py": load_script("test"), "train.py": train}


def make_rows(seed, rows=ROWS):
    """(rows, 5000, 12) float32 with beats, and their R peaks."""
    rng = np.random.default_rng(seed)
    beats = [np.arange(0.4, 9.8, 0.7 + 0.05 * row) for row in range(rows)]
    wave = np.stack([np.exp(-0.5 * ((TIME - found[:, None]) / 0.02) ** 2).sum(axis=0) for found in beats])
    made = wave[..., None] * rng.uniform(0.5, 1.5, 12) + rng.normal(0, 0.01, (rows, 5000, 12))
    return made.astype(np.float32), [np.rint(found * 500).astype(np.int32) for found in beats]


def describe_train(data):
    """Let the manifest, the table and the R peaks be those of train.npy as it is now."""
    made, manifest = arrays.load_npy(data / "train.npy"), arrays.load_manifest(data)
    manifest["arrays"]["train"]["fingerprint"] = arrays.fingerprint(made)
    utils.save_json(data / arrays.MANIFEST, manifest)
    arrays.save_r_peaks(data / "train_r_peaks.npz", make_rows(0)[1], arrays.fingerprint(made))


@pytest.fixture(scope="module")
def whole_place(tmp_path_factory):
    """What place is a copy of, and last.pt of a short run."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "data"
    data.mkdir()
    manifest = {"arrays": {}, "source": {"data_set": "PTB-XL"}}
    for number, split in enumerate(("train", "val", "test")):
        made, r_peaks = make_rows(number)
        np.save(arrays.signal_path(data, split), made)
        arrays.save_r_peaks(arrays.r_peaks_path(data, split), r_peaks, arrays.fingerprint(made))
        manifest["arrays"][split] = {"fingerprint": arrays.fingerprint(made)}
        if split != "train":
            np.save(arrays.label_path(data, split), np.arange(ROWS) % 2)
    utils.save_json(data / arrays.MANIFEST, manifest)
    pd.DataFrame({"ecg_id": 100 + np.arange(ROWS), "fold": 1}).to_csv(data / "train_records.csv", index=False)
    torch.manual_seed(0)
    save_checkpoint(folder / "model.pt", MCF(hidden=2), epoch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train.py", patch, "--select", "last") == 0
    return folder


@pytest.fixture
def place(whole_place, tmp_path, monkeypatch):
    """A working folder with data/ (three splits, a table of train.npy) and model.pt, of the smallest network."""
    shutil.copytree(whole_place / "data", tmp_path / "data")
    os.link(whole_place / "model.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINES = {"test.py": ("--load_path", "model.pt", "--hidden", 2, "--device", "cpu"),
         "train.py": ("--save_path", "run/model.pt", "--hidden", 2, "--device", "cpu", "--epochs", 2, "--batch_size", 2,
                      "--protocol", "clean", "--val_beats", 1)}


def call(script, monkeypatch, *extra):
    """The exit code of a script on the folder, called in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, (*LINES[script], *extra))])
    try:
        utils.run(SCRIPTS[script].main)
    except SystemExit as stopped:
        return stopped.code
    return 0


def check_refused(code, capsys, *words):
    """Exit code 2, and one sentence with these words and a remedy after a semicolon."""
    captured = capsys.readouterr()
    sentence, = (line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("error: "))
    assert code == 2 and "Traceback" not in captured.err and ";" in sentence
    assert all(word in sentence for word in words), sentence


def files(folder):
    """All files of a folder and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- 1. arrays and checkpoints

class Payload:
    """What a malicious pickle would carry: it creates the file "executed"."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def change(edit):
    """Damage done by changing an array."""
    return lambda path: np.save(path, edit(np.load(path)))


def pickled(path):
    np.save(path, np.array([Payload()] * ROWS, dtype=object), allow_pickle=True)


def bare_pickle(path):
    path.write_bytes(pickle.dumps(Payload()))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def a_folder(path):
    path.unlink()
    path.mkdir()


def put(value, row=1):
    """An edit that puts a value into a row."""
    def edit(made):
        made = made.astype(np.float64)
        made[row, 17, 3] = value
        return made
    return edit


SIGNAL_DAMAGE = {
    "missing": lambda path: path.unlink(), "a folder": a_folder, "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("I,II,III\n"), "truncated": truncated, "pickled objects": pickled,
    "a bare pickle": bare_pickle, "two dimensions": change(lambda a: a[:, :, 0]), "no row": change(lambda a: a[:0]),
    "11 leads": change(lambda a: a[..., :11]), "4999 samples": change(lambda a: a[:, :4999]),
    "leads first": change(lambda a: a.transpose(0, 2, 1)), "int16": change(lambda a: a.astype(np.int16)),
    "complex": change(lambda a: a.astype(complex)), "text values": change(lambda a: a.astype("U4")),
    "NaN": change(put(np.nan)), "infinity": change(put(-np.inf)), "1e30 mV": change(put(1e30)),
    "beyond float32": change(put(1e300))}
FOUND_ON_READING = ("NaN", "infinity", "1e30 mV", "beyond float32")
LABEL_DAMAGE = {
    "missing": lambda path: path.unlink(), "truncated": truncated, "pickled objects": pickled,
    "one too few": change(lambda a: a[:-1]), "one too many": change(lambda a: np.append(a, 1)),
    "two columns": change(lambda a: np.stack([a, a], 1)), "a 2": change(lambda a: a + (np.arange(ROWS) == 1)),
    "a -1": change(lambda a: a - 2 * (np.arange(ROWS) == 1)), "one half": change(lambda a: a * 0.5),
    "NaN": change(lambda a: np.where(a, np.nan, 0)), "normals alone": change(lambda a: a * 0),
    "abnormals alone": change(lambda a: a * 0 + 1), "text values": change(lambda a: a.astype("U1")),
    "fields": change(lambda a: a.astype([("a", "i4")])), "dates": change(lambda a: a.astype("M8[D]"))}

def change_records(edit):
    """Damage done to the labels of the benchmark by changing the second record's."""
    def damage(labels):
        labels = labels.astype(np.float64)
        labels[1] = edit(labels[1])
        return labels
    return change(damage)


BENCHMARK_DAMAGE = {
    **{name: LABEL_DAMAGE[name] for name in ("missing", "truncated", "pickled objects", "one too few", "two columns",
                                             "one half", "normals alone", "abnormals alone", "text values", "fields",
                                             "dates")},
    "a label a record": change(lambda a: a[:, 0, 0]), "a 2": change_records(lambda a: 2 * a),
    "a -1": change_records(lambda a: a - 1), "NaN": change_records(lambda a: a * np.nan),
    "marked outside 100:4900 alone": change(lambda a: np.where(np.arange(5000)[:, None] < 100, 1, 0 * a))}
DAMAGE = {"label.npy": LABEL_DAMAGE, "val_label.npy": LABEL_DAMAGE, "benchmark_label.npy": BENCHMARK_DAMAGE}
ARRAY_TABLE = [(script, file, name) for script, file in (
    ("test.py", "test.npy"), ("test.py", "val.npy"), ("test.py", "benchmark_data.npy"), ("test.py", "label.npy"),
    ("test.py", "val_label.npy"), ("test.py", "benchmark_label.npy"), ("train.py", "train.npy"),
    ("train.py", "val.npy"), ("train.py", "val_label.npy")) for name in DAMAGE.get(file, SIGNAL_DAMAGE)
    if name != "missing" or file not in ("val.npy", "benchmark_data.npy")]     # fold 9 and the benchmark may be absent


@pytest.mark.parametrize("script, file, name", ARRAY_TABLE)
def test_array(place, monkeypatch, capsys, script, file, name):
    """Refused by name before anything is scored or trained, and no file is written, changed or removed.

    So no report, no checkpoint, no R peaks found in damaged signals, nothing that a pickle would do.
    """
    if file.startswith("benchmark"):
        np.save(place / "data" / "benchmark_data.npy", np.load(place / "data" / "train.npy"))
        np.save(place / "data" / "benchmark_label.npy",
                (np.arange(5000)[:, None] // 100 % 5 == 0) * np.ones((ROWS, 1, 12), np.uint8))
    DAMAGE.get(file, SIGNAL_DAMAGE)[name](place / "data" / file)
    if file == "train.npy" and name in FOUND_ON_READING:
        describe_train(place / "data")
    before = files(place)
    check_refused(call(script, monkeypatch), capsys, file)
    assert files(place) == before


STATE = MCF(hidden=2).state_dict()


def with_state(**changes):
    """A checkpoint's content with some weights replaced, or left out where the value is None."""
    state = {name: changes.get(name, value) for name, value in STATE.items()}
    return {"model_state_dict": {name: value for name, value in state.items() if value is not None}}


NAN_WEIGHT, INFINITE = torch.full((2,), torch.nan), torch.full((2,), torch.inf)
CHECKPOINTS = {
    "missing": None, "a folder": "folder", "empty": b"", "text": b"not a checkpoint", "junk": bytes(range(256)) * 50,
    "half": "half", "a list": [1, 2], "a tensor": torch.zeros(3), "no weights": {"epoch": 3},
    "weights of a list": {"model_state_dict": [1, 2]}, "weights of None": {"model_state_dict": None},
    "a weight missing": with_state(**{"norm.bias": None}), "a weight too wide": with_state(
        **{"norm.bias": torch.zeros(3)}), "a weight that is text": with_state(**{"norm.bias": "0"}),
    "another network": {"model_state_dict": {"layer.weight": torch.zeros(2)}},
    "malicious": {"model_state_dict": Payload()},
    "malicious beside the weights": with_state() | {"metrics": Payload()}, "a bare pickle": "pickle",
    "NaN weights": with_state(**{"norm.bias": NAN_WEIGHT}), "infinite weights": with_state(**{"norm.weight": INFINITE}),
    "half precision that overflowed": with_state(**{"norm.bias": torch.tensor([1e6, 0.0]).half()})}


def write_content(path, content):
    """One of CHECKPOINTS as a file."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content == "pickle":
        bare_pickle(path)
    elif content == "half":
        whole = io.BytesIO()
        torch.save(with_state(), whole)
        path.write_bytes(whole.getvalue()[:whole.tell() // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint(place, monkeypatch, capsys, script, name):
    """Refused by name by test.py --load_path and train.py --resume; nothing is unpickled that could act."""
    path = place / ("model.pt" if script == "test.py" else "run/last.pt")
    write_content(path, CHECKPOINTS[name])
    before = files(place)
    check_refused(call(script, monkeypatch, *["--resume"] * (script == "train.py")), capsys, path.name)
    assert files(place) == before and not (place / "executed").exists()


@pytest.mark.parametrize("missing", ["config", "history", "best", "epoch", "optimizer_state_dict"])
@pytest.mark.parametrize("value", ["absent", "text", "a list"])
def test_last_checkpoint_that_is_not_whole(whole_place, place, monkeypatch, capsys, missing, value):
    """last.pt without one of the facts that --resume needs, or with another type in its place, is refused by name."""
    content = torch.load(whole_place / "run" / "last.pt", weights_only=True)
    content[missing] = {"text": "x", "a list": [None]}.get(value)
    if value == "absent":
        del content[missing]
    (place / "run").mkdir()
    torch.save(content, "run/last.pt")
    before = files(place)
    check_refused(call("train.py", monkeypatch, "--select", "last", "--resume"), capsys, "last.pt")
    assert files(place) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("place")
def test_checkpoint_of_another_precision_loads(monkeypatch, published_state, dtype):
    """Weights are shipped in float16: they load, as float32 and rounded once, and score; the published names too."""
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in STATE.items()}
    torch.save({"model_state_dict": state}, "other.pt")
    loaded, _ = load_checkpoint("other.pt")
    for name, value in loaded.state_dict().items():
        assert value.dtype == STATE[name].dtype and torch.equal(value, state[name].to(value.dtype))
    assert call("test.py", monkeypatch, "--protocol", "clean", "--fold9", 0, "--load_path", "other.pt") == 0
    torch.save({"model_state_dict": {name: value.to(dtype) for name, value in published_state.items()}}, "published.pt")
    assert load_checkpoint("published.pt")[0].norm.bias.dtype == torch.float32


@pytest.mark.usefixtures("place")
def test_checkpoint_of_another_width_names_the_flag(monkeypatch, capsys):
    """A sound checkpoint that does not fit --hidden says which value does."""
    check_refused(call("test.py", monkeypatch, "--hidden", 4), capsys, "model.pt", "--hidden 2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_read_only_data(place, monkeypatch, capsys, script):
    """Where R peaks cannot be kept beside the arrays (a folder is in their place) they are found, used and not kept."""
    for split in ("train", "val", "test"):
        a_folder(arrays.r_peaks_path("data", split))
    before = files(place / "data")
    assert call(script, monkeypatch) == 0
    assert "are not kept" in capsys.readouterr().out and files(place / "data") == before
