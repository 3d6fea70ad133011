"""The benchmark compares equals, refuses to compare what is not equal, and measures the way to an accuracy."""
import json

import numpy as np
import pytest
import torch
from conftest import run_script
from small import make_data, make_model, shrink

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


@pytest.mark.parametrize("accuracy, reached", [(0.0, True), (1.1, False)])
def test_quick_run_writes_the_report(tmp_path, monkeypatch, accuracy, reached):
    """tools/benchmark.py --quick measures everything and writes benchmark.json."""
    shrink(monkeypatch)
    monkeypatch.setattr(benchmark, "ACCURACY", accuracy)
    monkeypatch.setattr(benchmark, "measure_peak", lambda *_: 1e11)
    monkeypatch.setattr(benchmark, "EPOCHS", 2)
    finished = run_script("tools/benchmark.py", "--quick", "--device", "cpu", "--output_dir", tmp_path, "--data_path",
                          make_data(tmp_path / "data"))
    assert finished.returncode == 0, finished.stderr
    measured = json.loads((tmp_path / "benchmark.json").read_text())
    for part in ("training", "detection"):
        times = measured[part]["seconds"]["off"]
        assert 0 < times["least"] <= times["median"] <= times["most"] and measured[part]["peak_share"]["off"] > 0
    for kind in ("minmax", "compand"):
        assert (measured["accuracy"][kind]["seconds"] is not None) == reached
    assert ("not reached" in finished.stdout) != reached and "GFLOP/s" in finished.stdout
