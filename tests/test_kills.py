"""SIGKILL, which no program can catch: a run that was killed and resumed ends as one that was left alone."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from small import make_data, shrink

import utils

FLAGS = ("--epochs", "3", "--batch_size", "4", "--hidden", "2", "--lr", "1e-2", "--val_beats", "1", "--device", "cpu",
         "--protocol", "clean", "--reference", "0")


def flatten(content, name=""):
    """The leaves of nested dicts and lists by name."""
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {leaf: value for key, part in items for leaf, value in flatten(part, f"{name}.{key}").items()}
    return {name: content}


def differences(one, other):
    """The names of what two checkpoints do not share bit for bit: weights, optimizer, history, settings.

    Less the seconds, and the commit, which a developer may change meanwhile.
    """
    one, other = (flatten(torch.load(path, weights_only=True)) for path in (one, other))
    names = [name for name in sorted(one.keys() | other.keys()) if not name.endswith((".seconds", ".git_commit"))]
    return [name for name in names if not (name in one and name in other and (
        torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name]))]


def test_kill_leaves_no_trace(tmp_path, monkeypatch):
    """Killed in its second epoch and resumed: weights, optimizer and history are equal bit for bit."""
    data, alone, killed = make_data(tmp_path / "data"), tmp_path / "alone", tmp_path / "killed"
    shrink(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # another number of threads sums in another order
    torch.set_num_threads(1)                                # run_script sets it back
    flags = ("--data_path", str(data), *FLAGS, "--save_path")
    process = subprocess.run([sys.executable, ROOT / "tests" / "kill_in_epoch.py", *flags, str(killed / "model.pt")],
                             env=os.environ | {"KILL_IN": "2"}, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    assert torch.load(killed / "last.pt", weights_only=True)["epoch"] == 1
    for folder, extra in ((alone, ()), (killed, ("--resume",))):
        finished = run_script("train.py", *flags, folder / "model.pt", *extra)
        assert finished.returncode == 0, finished.stderr
    assert [name for file in ("last.pt", "model.pt") for name in differences(alone / file, killed / file)] == []
    assert sorted(path.name for path in killed.iterdir()) == ["history.csv", "last.pt", "model.pt"]


def test_kill_in_a_write_leaves_the_old_file(tmp_path):
    """A file that was being written is the old one or the new one, never a part."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import utils\n"
            "utils.write_atomically(sys.argv[2], lambda file: (file.write(b'new'), file.flush(), os.kill(os.getpid(), 9)))")
    process = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)])
    assert process.returncode == -9 and path.read_bytes() == b"old"
    utils.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_signals_end_a_script_in_a_word(signal):
    """Exit code 130 and no traceback, also where the caller ignores the signal's kin."""
    code = ("import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); import utils\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "utils.run(lambda: (os.kill(os.getpid(), signal.Signals[sys.argv[2]]), time.sleep(60)))")
    process = subprocess.run([sys.executable, "-c", code, str(ROOT), signal], capture_output=True, text=True)
    assert process.returncode == 130 and process.stderr == "interrupted\n"
