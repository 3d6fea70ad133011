"""The benchmark runs, compares equals, and refuses to compare what is not equal."""
import json

import numpy as np
import pytest
import torch
from conftest import run_script

from tools.benchmark import PublishedLayers, published_names, require_equal
from model import MCF, translate_published
from utils import UserError


def test_published_layers_are_the_same_network(model):
    """The baseline of the training step computes what the network computes, and its names lead back to the weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(2, samples, 12, generator=generator) for samples in (4800, 480, 4800)]
    with torch.inference_mode():
        ours, published = model(*inputs), PublishedLayers(model).eval()(*inputs)
    for one, other in zip((*ours[0], *ours[1], ours[2]), (*published[0], *published[1], published[2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    again = MCF()
    again.load_state_dict(translate_published(published_names(model)))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_unequal_results_are_refused():
    """A fast path that computes something else, or NaN, ends the benchmark."""
    require_equal("scores", np.array([1.00001, 2.0]), np.array([1.0, 2.0]))
    for wrong in (1.01, np.nan):
        with pytest.raises(UserError, match="scores"):
            require_equal("scores", np.array([wrong, 2.0]), np.array([1.0, 2.0]))


def test_quick_run_writes_the_report(tmp_path):
    """benchmark.py --quick measures everything and writes benchmark.json."""
    finished = run_script("benchmark.py", "--quick", "--device", "cpu", "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    for name in ("detection_speedup", "localization_speedup", "train_speedup", "preprocess_speedup",
                 "detection_peak_share", "train_peak_share"):
        assert 0 < found[name] < 1000, name
    for kind in ("plain", "off", "bf16"):
        times = found["training"]["seconds"][kind]
        assert 0 < times["least"] <= times["median"] <= times["most"]
    assert "detection" in finished.stdout and "GFLOP/s" in finished.stdout
