"""The benchmark compares equals, refuses to compare what is not equal, and measures the way to an accuracy."""
import json

import numpy as np
import pytest
import torch
from conftest import run_script
from small import make_data, make_model, make_records, shrink

from model import MCF, translate_published
from tools import benchmark
from utils import UserError


def test_published_names_lead_back_to_the_weights(monkeypatch):
    """What the plain loop reads are the network's own weights."""
    shrink(monkeypatch)
    model, again = make_model(), MCF(hidden=2)
    again.load_state_dict(translate_published(benchmark.published_names(model)))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_unequal_results_are_refused():
    """A fast path that computes something else, or NaN, ends the benchmark."""
    benchmark.require_equal("scores", np.array([1.00001, 2.0]), np.array([1.0, 2.0]))
    for wrong in (1.01, np.nan):
        with pytest.raises(UserError, match="scores"):
            benchmark.require_equal("scores", np.array([wrong, 2.0]), np.array([1.0, 2.0]))


@pytest.fixture
def quick(monkeypatch):
    """A small network, small batches, few beats."""
    shrink(monkeypatch)
    for name, value in (("EPOCHS", 2), ("BATCH", 4), ("generate_records", lambda count: (
            make_records(0, count)[0], [np.array([700, 1400])] * count))):
        monkeypatch.setattr(benchmark, name, value)


@pytest.mark.usefixtures("quick")
def test_quick_run_writes_the_report(tmp_path, monkeypatch):
    """tools/benchmark.py --quick measures everything and writes benchmark.json; an accuracy may not be reached."""
    monkeypatch.setattr(benchmark, "ACCURACY", 1.1)
    finished = run_script("tools/benchmark.py", "--quick", "--device", "cpu", "--output_dir", tmp_path, "--data_path",
                          make_data(tmp_path / "data"))
    assert finished.returncode == 0, finished.stderr
    measured = json.loads((tmp_path / "benchmark.json").read_text())
    for part in ("training", "detection"):
        times = measured[part]["off"]
        assert 0 < times["least"] <= times["median"] <= times["most"]
    for kind in ("minmax", "compand"):
        assert measured["accuracy"][kind]["seconds"] is None and len(measured["accuracy"][kind]["aurocs"]) == 2
    assert finished.stdout.count("not reached, 2 epochs") == 2


@pytest.mark.usefixtures("quick")
def test_training_stops_at_the_accuracy(tmp_path, monkeypatch):
    """The seconds of the epochs until then, and no more epochs."""
    monkeypatch.setattr(benchmark, "ACCURACY", 0.0)
    one = benchmark.time_to_accuracy(make_data(tmp_path / "data"), torch.device("cpu"), "compand")
    assert one["seconds"] > 0 and len(one["aurocs"]) == 1
