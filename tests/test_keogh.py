"""Keogh's series: windows and the way back, the maps on a made-up discord, and the tool."""
import json

import numpy as np
import pytest
import torch
from conftest import run_script
from small import few_channels  # noqa: F401
from small import make_model

from dataloader import samples_of_beats
from ecg import keogh
from evaluation.metrics import detection_auroc
from model import choose_parts
from scoring.keogh import map_by_network, map_without_network, nearest_distances, open_windows, smooth, standardise
from tools import keogh as tool
from utils import UserError

RUN = slice(500, 600)                   # where the made-up series is anomalous


def make_part(length, anomalous):
    """Rows of a file: two waves with a period of 100 samples; in RUN one of them is turned round."""
    phase = np.arange(length) * 2 * np.pi / 100
    rows = np.stack([np.exp(3 * np.cos(phase)) / 20, 5 + np.sin(phase), np.zeros(length)], axis=1)
    rows[:, :2] += np.random.default_rng(length).normal(0, 0.01, (length, 2))
    if anomalous:
        rows[RUN] = rows[RUN] * [-1, 1, 0] + [0, 0, 1]
    return rows


@pytest.fixture
def folder(tmp_path):
    for name in keogh.SERIES:
        for part in ("train", "test"):
            np.savetxt(tmp_path / f"{name}_{part}.csv", make_part(1010, part == "test"), delimiter=",", fmt="%.5g")
    return tmp_path


@pytest.mark.parametrize("length", (320, 321, 1000, 1121))
def test_windows_cover_every_sample(length):
    starts = keogh.window_starts(length, keogh.TEST_STRIDE)
    assert starts[0] == 0 and starts[-1] == length - keogh.WINDOW and np.diff(starts).max(initial=0) <= 160
    signal = np.random.default_rng(0).normal(size=(length, 2))
    np.testing.assert_allclose(keogh.lay_down(keogh.cut_windows(signal, starts)[..., 1], starts, length), signal[:, 1])


def test_overlaps_are_averaged():
    points = keogh.lay_down(np.repeat([[1.0], [3.0]], keogh.WINDOW, axis=1), np.array([0, 160]), 480)
    assert points[[0, 159, 160, 319, 320, 479]].tolist() == [1, 1, 2, 2, 3, 3]


def test_shrinking_undoes_stretching():
    """What the network sees as the beat of a record is the window, 1.5 times as long."""
    time = np.arange(700)
    signal = np.stack([np.sin(time / 30), time], axis=1)
    records, r_peaks, starts = open_windows(signal, 40, "made up")
    beats = np.stack([record[samples_of_beats(places)[0]] for record, places in zip(records.signals, r_peaks)])
    assert records.signals.shape == (11, 5000, 2) and beats.shape == (11, 480, 2) and starts[-1] == 380
    np.testing.assert_array_equal(beats[1, ::3], signal[40:360:2].astype(np.float32))
    for channel in range(2):
        points = keogh.lay_down(keogh.shrink(beats[..., channel]), starts, len(signal))
        np.testing.assert_allclose(points[:-1], signal[:-1, channel], atol=2e-3)     # the last lies beyond the window
    assert (records.signals[0, :2260] == signal[0]).all()                   # before the series begins


def test_the_discord_is_the_anomalous_run(folder):
    series = keogh.read_series(folder, keogh.SERIES[0])
    aurocs = {name: detection_auroc(series.labels, points) for name, points in map_without_network(series).items()}
    assert aurocs["discord, every window"] > 0.95 and aurocs["PCA, every window"] > 0.9
    assert aurocs["discord"] > 0.8
    training, test = (standardise(keogh.cut_windows(signal, keogh.window_starts(1010, 90)))
                      for signal in (series.train, series.test))
    plain = [min(np.linalg.norm(one - other) for other in training) for one in test]
    np.testing.assert_allclose(nearest_distances(training, test), plain, atol=1e-5)
    flat = np.ones((1, keogh.WINDOW, 2))
    assert not standardise(flat).any()


def test_the_error_of_a_network_lies_at_its_place(folder):
    """An untrained network restores nearly 0: its error is that of the min-maxed windows, nearly their square."""
    series = keogh.read_series(folder, keogh.SERIES[0])
    model = make_model(enc_in=2, parts=choose_parts("local", 0, 0))
    with torch.no_grad():
        model.local_decoder[-1].weight.zero_()
    maps = map_by_network(model, series)
    starts = keogh.window_starts(1010, 160)
    windows = keogh.cut_windows(series.test, starts)
    low, high = windows.min(axis=1, keepdims=True), windows.max(axis=1, keepdims=True)
    squares = ((2 * (windows - low) / (high - low) - 1) ** 2).mean(axis=2)
    expected = smooth(keogh.lay_down(squares, starts, 1010))
    assert maps["network"].shape == (1010,) and np.corrcoef(maps["network"], expected)[0, 1] > 0.99
    assert maps["network, by window"].max() == pytest.approx(squares.mean(axis=1).max(), rel=0.05)


@pytest.mark.parametrize("branches", ("local", "both"))
def test_the_tool(folder, branches, monkeypatch):
    monkeypatch.setattr(tool, "SERIES", keogh.SERIES[:2])
    monkeypatch.setattr(tool, "BATCH", 4)
    out = folder / "report"
    arguments = ("--keogh_path", folder, "--output_dir", out, "--seeds", 1 + (branches == "local"), "--steps", 2,
                 "--branches", branches, "--device", "cpu")
    finished = run_script("tools/keogh.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((out / "results.json").read_text())
    assert (out / "report.md").read_text() in finished.stdout and results["points"][keogh.SERIES[0]] == [1010, 100]
    by_seed = [results["keogh"][name]["network"]["by_seed"] for name in keogh.SERIES[:2]]
    assert results["keogh"][tool.MEAN]["network"]["by_seed"] == pytest.approx(np.mean(by_seed, axis=0))
    assert (results["keogh"][tool.MEAN]["network"]["sd"] is None) == (branches == "both")
    (out / "report.md").write_text("mine")
    assert "report.md" in run_script("tools/keogh.py", *arguments).refusal


@pytest.mark.parametrize("content", ("", "1,2\n" * 400, "1,2,0\n" * 400, "1,2,x\n" * 400, "nan,2,0\n1,2,1\n" * 400,
                                     "1,2,0\n1,2,1\n" * 100, None))
def test_refusals(folder, content):
    path = folder / f"{keogh.SERIES[0]}_test.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=path.name):
        keogh.read_series(folder, keogh.SERIES[0])
    assert "--seeds" in run_script("tools/keogh.py", "--keogh_path", folder, "--seeds", 0).refusal
