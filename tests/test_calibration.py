"""The protocol "calibrated": what it gathers and learns from normals alone, and that it travels in a checkpoint."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script

import calibration
import reference
import scoring
from arrays import load_details, load_r_peaks, open_signals
from dataloader import crop_global, normalize_records, scoring_masks, to_millivolts, undo_scale
from model import MCF, compute_trend, load_checkpoint, save_checkpoint
from utils import UserError

CPU = torch.device("cpu")
LEADS = 12


def test_profiles_are_the_plain_loops(model, simulated):
    """Over beats and masks one at a time, with the plain network: the same residuals and errors at each place."""
    signals, r_peaks = open_signals(simulated, "test", 12), load_r_peaks(simulated, "test", open_signals(
        simulated, "test", 12))
    found = scoring.score_split(model, np.array(signals[:2]), r_peaks[:2], "clean", 30, CPU, "test", beats_per_record=2,
                                with_profiles=True)
    for row in range(2):
        record = normalize_records(torch.tensor(np.array(signals[row:row + 1])))
        ecg, beats = crop_global(record), scoring.thin_out(scoring.valid_beats(r_peaks[row])[0], 2)
        residual, error = np.zeros((480, 12)), np.zeros((480, 12))
        for r in beats:
            beat = normalize_records(record[:, r - 140:r + 340])
            for global_mask, local_mask in zip(*scoring_masks("clean", 30)):
                with torch.inference_mode():
                    _, (restored, log_variance), _ = model(ecg * ~global_mask[:, None], beat * ~local_mask[:, None],
                                                           compute_trend(ecg))
                difference = (restored - beat)[0].numpy()
                residual[local_mask] += difference[local_mask] / len(beats)
                error += (torch.exp(-log_variance)[0].numpy() * difference ** 2) / (3 * len(beats))
        for name, plain in (("local_residual", residual), ("local_error", error)):
            expected = np.stack([plain[20 * place:20 * place + 20].mean(axis=0) for place in range(scoring.BINS)])
            np.testing.assert_allclose(found.profiles[name][row], expected, rtol=1e-3, atol=1e-5)


def test_phases_follow_the_rhythm():
    """An R peak lies amid phase 0, half the way to the next is phase 12; intervals go on where there are no more."""
    phases = scoring.beat_phases([np.array([500, 900, 1700]), np.array([2000]), np.array([], int),
                                  np.array([700, 700])])
    assert phases.shape == (4, 4800) and phases.min() >= 0 and phases.max() == scoring.BINS - 1
    for sample in (500, 900, 1700, 2500):
        assert phases[0, sample - 100] == 0
    assert phases[0, 700 - 100] == phases[0, 1300 - 100] == phases[0, 2100 - 100] == 12
    assert (np.diff(phases[0][400:800]) != 0).sum() == scoring.BINS             # every phase once in an interval
    assert phases[1, 2000 - 100] == phases[1, 2480 - 100] == 0 and phases[2, 340 - 100] == 0


@pytest.fixture
def normals():
    """Features of 200 records of which nothing is unusual, and of 40 whose residual is, at one place in one lead."""
    rng = np.random.default_rng(0)
    sizes = {"residual": 24 * LEADS, "error": 12 * LEADS, "amplitude": 3 * LEADS}
    usual = {part: rng.normal(rng.normal(size=size), rng.uniform(0.5, 2, size), (200, size))
             for part, size in sizes.items()}
    odd = {part: values[:40].copy() for part, values in usual.items()}
    odd["residual"][:, :60] += 8
    return usual, odd


def test_fit_scores_what_is_unusual(normals):
    """Normals left out of a fit score 0 with spread 1 in each part, odd records more; both ways of calling agree."""
    usual, odd = normals
    fitted, held_out = calibration.fit(usual, calibration.UsualErrors(LEADS))
    assert abs(held_out.mean()) < 1e-9 and 0.3 < held_out.std() <= 1
    again = calibration.score_records(fitted, usual)
    assert again.mean() < held_out.mean()                   # seen records look more usual than they are
    assert calibration.score_records(fitted, odd).min() > held_out.max()
    part = fitted["parts"]["residual"]
    z = np.abs((odd["residual"] - usual["residual"].mean(0)) / usual["residual"].std(0)).mean(axis=1)
    np.testing.assert_allclose(calibration.distance(part, odd["residual"]), np.log(z), rtol=1e-3)


def test_few_normals_are_refused(normals):
    """What is usual cannot be said of a handful of records."""
    with pytest.raises(UserError, match="too few"):
        calibration.fit({part: values[:19] for part, values in normals[0].items()}, calibration.UsualErrors(LEADS))


def test_flat_leads_stay_finite():
    """A lead that is flat in every normal record, and any record then: finite."""
    rng = np.random.default_rng(0)
    signals = rng.normal(size=(30, 5000, LEADS))
    signals[:, :, 3] = 0
    profiles = {name: np.abs(rng.normal(size=(30, scoring.BINS, LEADS))) for name in scoring.PROFILES}
    for profile in profiles.values():
        profile[:, :, 3] = 0
    found = calibration.features(profiles, signals)
    fitted, held_out = calibration.fit(found, calibration.UsualErrors(LEADS))
    profiles["local_residual"][:, :, 3] = 1
    scores = calibration.score_records(fitted, calibration.features(profiles, signals))
    assert np.isfinite(held_out).all() and np.isfinite(scores).all() and (scores > held_out).all()


def test_maps_are_the_plain_formula():
    """A point's value from the mean and deviation of the log error of all normals' points of its phase and lead."""
    rng = np.random.default_rng(0)
    maps = rng.uniform(0.01, 1, (3, 4800, LEADS)).astype(np.float32)
    phases = scoring.beat_phases([np.arange(300, 4700, step) for step in (350, 400, 450)])
    usual = calibration.UsualErrors(LEADS)
    usual.add(maps[:1], phases[:1])
    usual.add(maps[1:], phases[1:])
    fitted = usual.summarise()
    found = calibration.unusual_maps(fitted, maps, phases, np.array([0.5, -1, 2]))
    for phase in (0, 7):
        logs = np.log(maps[phases == phase][:, 4] + calibration.LEAST_ERROR)
        sample = np.flatnonzero(phases[2] == phase)[3]
        z = (np.log(maps[2, sample, 4] + calibration.LEAST_ERROR) - logs.mean()) / logs.std()
        assert found[2, sample, 4] == pytest.approx(z + 2 * 2 + 2 * logs.mean(), rel=1e-3)


def test_scale_keeps_amplitude():
    """--normalization scale: a record twice as large looks larger, all stays inside (-1, 1), and can be undone."""
    record, scale = torch.randn(1, 5000, 12) * 2, torch.linspace(0.4, 1.2, 12)
    one, two = (normalize_records(factor * record, scale) for factor in (1, 2))
    assert (two.abs() >= one.abs()).all() and two.abs().max() < 1
    torch.testing.assert_close(undo_scale(one, scale), record, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(undo_scale(torch.ones(1, 1, 12), scale)).all()


@pytest.fixture(scope="module")
def place(simulated, tmp_path_factory):
    """Simulated arrays whose fold 9 is large enough: 30 of the training normals in mV, and its own abnormal records."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(simulated, folder / "data")
    train, data = open_signals(simulated, "train", 12), folder / "data"
    abnormal = np.load(simulated / "val.npy")[np.load(simulated / "val_label.npy") == 1]
    details = load_details(simulated, "train", train)
    normal = to_millivolts(train[:30], details, np.arange(30))
    np.save(data / "val.npy", np.concatenate([normal, abnormal]).astype(np.float32))
    np.save(data / "val_label.npy", np.repeat([0, 1], [30, len(abnormal)]).astype(np.uint8))
    torch.manual_seed(0)
    save_checkpoint(folder / "model.pt", MCF(hidden=4))
    finished = run_script("reference.py", "--data_path", data, "--load_path", folder / "model.pt", "--hidden", 4,
                          "--half", 1)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_calibration_travels_in_the_checkpoint(place, tmp_path):
    """reference.py adds it, in half precision; test.py reports it as a third protocol."""
    model, facts = load_checkpoint(place / "model.pt")
    assert len(facts["fold9_normals"]["calibrated"]) == 30 and all(
        value.dtype == torch.float16 for value in torch.load(place / "model.pt", weights_only=True)[
            "model_state_dict"].values() if value.is_floating_point())
    finished = run_script("test.py", "--data_path", place / "data", "--load_path", place / "model.pt", "--hidden", 4,
                          "--output_dir", tmp_path, "--save_maps", 1)
    assert finished.returncode == 0 and "skipped: no" not in finished.stdout, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    scores = pd.read_csv(tmp_path / "detection_scores.csv")
    assert {"paper", "clean", "calibrated"} <= set(results) and len(results["maps"]) == 3
    gains = results["calibrated"]["beyond_clean"]
    for name, number in (("detection", "detection_auroc"), ("localization_pooled", "localization_auroc_pooled")):
        assert gains[name]["value"] == pytest.approx(results["calibrated"][number] - results["clean"][number])
    of_fold9 = scores[(scores["split"] == "val") & (scores["label"] == 0)]
    assert sorted(of_fold9["calibrated"]) == pytest.approx(facts["fold9_normals"]["calibrated"])
    assert sorted(of_fold9["clean"]) == pytest.approx(facts["fold9_normals"]["clean"], rel=1e-5)


def test_a_calibration_of_anyone(place):
    """Damaged, of another mask ratio, or absent: named and skipped, never half used."""
    _, facts = load_checkpoint(place / "model.pt")
    assert reference.read_calibration("a.pt", facts, 30, 12, "all")
    parts = facts["calibration"]["parts"]
    negative = facts["calibration"] | {"parts": parts | {"error": parts["error"] | {
        "precision": -parts["error"]["precision"]}}}
    for held, ratio in ((None, 30), ({}, 30), (facts["calibration"], 20), ("x", 30),
                        (facts["calibration"] | {"map_mean": torch.zeros(3)}, 30),
                        (facts["calibration"] | {"map_deviation": torch.zeros(scoring.BINS, 12)}, 30),
                        (facts["calibration"] | {"parts": {"residual": 1}}, 30), (negative, 30)):
        assert reference.read_calibration("a.pt", {"calibration": held}, ratio, 12, "all") is None
    with pytest.raises(UserError, match="reference.py"):
        reference.choose_protocols("calibrated", MCF(hidden=2), None)


def test_scale_from_training_to_report(place, tmp_path):
    """A network of --normalization scale is trained, calibrated and scored; paper, which feeds mV, is left out."""
    flags = ("--data_path", place / "data", "--hidden", 4)
    finished = run_script("train.py", *flags, "--normalization", "scale", "--epochs", 2, "--lr", "1e-3", "--protocol",
                          "clean", "--select", "last", "--save_path", tmp_path / "m.pt")
    assert finished.returncode == 0, finished.stderr
    model, facts = load_checkpoint(tmp_path / "m.pt")
    assert len(model.lead_scale) == 12 and "paper" not in facts["fold9_normals"]
    finished = run_script("test.py", *flags, "--load_path", tmp_path / "m.pt", "--output_dir", tmp_path / "out",
                          "--fold9", 0)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "paper" not in results and results["calibrated"]["localization_auroc_pooled"] is not None
    (tmp_path / "data").mkdir()
    for name in ("train.npy", "test.npy", "label.npy"):
        (tmp_path / "data" / name).symlink_to(place / "data" / name)
    refused = run_script("train.py", "--data_path", tmp_path / "data", "--normalization", "scale", "--hidden", 4)
    assert refused.returncode == 2 and "--normalization minmax" in refused.stderr and "Traceback" not in refused.stderr
