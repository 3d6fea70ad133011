"""SIGKILL at random moments: a run that was killed and resumed again and again ends as one that was left alone.

KILLS=20 pytest tests/test_kills.py -s     the long form, some minutes; without KILLS there are two kills
"""
import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from conftest import ROOT

KILLS = int(os.environ.get("KILLS", "2"))
EPOCHS = 2 * KILLS + 1              # more than the kills let pass
START = "training on"               # what train.py prints before its first epoch


def start(data, save_path, *extra):
    """train.py as a process; its output is to be read line by line."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--data_path", str(data), "--save_path", str(save_path), "--epochs",
         str(EPOCHS), "--hidden", "16", "--batch_size", "16", "--lr", "1e-3", "--val_beats", "1", "--device", "cpu",
         *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"})


def wait_for_start(process):
    """Read until the training begins."""
    lines = iter(process.stdout.readline, "")
    read = next((line for line in lines if line.startswith(START)), None)
    assert read, "train.py ended before it began"
    return read


def writes(folder, since):
    """Whether a file that was begun after a time is half-written; an earlier kill leaves such files as well."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime >= since for path in folder.glob("*.tmp"))
    return False


def kill(process, folder, delay, in_a_write):
    """SIGKILL after so many seconds, or then at the next write; returns whether it left a half-written file."""
    since = time.time()
    time.sleep(delay)
    deadline = time.monotonic() + 60
    while in_a_write and process.poll() is None and not writes(folder, since) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    return writes(folder, since)


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


def test_kills_leave_no_trace(simulated, tmp_path):
    """Killed at random moments, every other time in the middle of a write: weights, optimizer and history are equal."""
    rng = np.random.default_rng(int(os.environ.get("KILLS_SEED", "0")))
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = start(simulated, alone / "model.pt")
    wait_for_start(process)
    started = time.monotonic()
    assert process.communicate() and process.returncode == 0
    an_epoch = (time.monotonic() - started) / EPOCHS
    halves = 0
    for number in range(KILLS):
        process = start(simulated, killed / "model.pt", *["--resume"] * (killed / "last.pt").exists())
        wait_for_start(process)
        halves += kill(process, killed, rng.uniform(0, 1.2 * an_epoch), in_a_write=number % 2)
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed often enough"
    process = start(simulated, killed / "model.pt", *["--resume"] * (killed / "last.pt").exists())
    output = process.communicate()[0]
    assert process.returncode == 0, output
    found = [name for file in ("last.pt", "model.pt") for name in differences(alone / file, killed / file)]
    print(f"\n{KILLS} kills, {len(found)} differences; {halves} left a half-written file")
    assert found == []
    assert sorted(path.name for path in killed.iterdir()) == ["history.csv", "last.pt", "model.pt"]
