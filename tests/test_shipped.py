"""The weights that come along are those that their card describes; the tool that makes them ready."""
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED, run_script
from small import make_data, make_model, shrink

from ecg.arrays import load_r_peaks, open_records
from evaluation.metrics import detection_auroc
from model import HISTORY, load_checkpoint, save_checkpoint
from scoring.passes import Scorer
from scoring.percentiles import percentile, read_normals
from scoring.protocols import PROTOCOLS
from utils import sha256_of

SHIPPED, CARD = ROOT / "ckpt" / "mymodel.pt", ROOT / "ckpt" / "README.md"


@pytest.mark.parametrize("name", ["mymodel.pt", "paper_run.pt"])
def test_card_belongs_to_the_weights(name):
    """The card names the file's hash, commit, epoch and seed; the checkpoint carries its config and learning curve."""
    path = SHIPPED.with_name(name)
    model, facts = load_checkpoint(path)
    card, config = CARD.read_text().split(f"## {name}")[1].split("\n## ")[0], facts["config"]
    assert sha256_of(path) in card and facts["git_commit"] in card
    assert f"epoch {facts['epoch']} of {config['epochs']}" in card and f"seed {config['seed']}" in card
    assert [row["epoch"] for row in facts["history"]] == list(range(1, config["epochs"] + 1))
    assert set(facts["history"][0]) == set(HISTORY)
    assert all(value.dtype == torch.float32 for value in model.parameters()) and path.stat().st_size < 16e6


def test_the_epoch_of_the_default_weights_is_the_best_on_fold_9():
    _, facts = load_checkpoint(SHIPPED)
    aurocs = {row["epoch"]: row["val_auroc"] for row in facts["history"] if row["val_auroc"] is not None}
    assert facts["config"]["select"] == "val" and facts["epoch"] == max(aurocs, key=aurocs.get)
    assert f"{aurocs[facts['epoch']]:.4f}" in CARD.read_text()


def test_the_curve_of_the_papers_run():
    """paper_run.csv is the history of paper_run.pt; the card names the epoch that is best on the test set."""
    curve = pd.read_csv(SHIPPED.with_name("paper_run.csv"))
    _, facts = load_checkpoint(SHIPPED.with_name("paper_run.pt"))
    for name in ("epoch", "loss", "lr", "test_auroc", "seconds"):
        np.testing.assert_allclose(curve[name], [row[name] for row in facts["history"]], err_msg=name)
    assert facts["config"]["protocol"] == "paper" and "fold9_normals" not in facts
    best = curve["epoch"][curve["test_auroc"].idxmax()]
    assert f"the best on the test set was epoch {best}," in CARD.read_text()


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_shipped_weights_find_simulated_blocks(simulated, protocol):
    """A network that knows real ECGs finds a simulated bundle branch block odd among simulated normals."""
    model, _ = load_checkpoint(SHIPPED)
    records = open_records(simulated, "test", 12)
    r_peaks = load_r_peaks(simulated, "test", records, protocol.detector)
    scores = Scorer(model, protocol).score(records, r_peaks, beats_per_record=1).scores
    assert detection_auroc(np.load(simulated / "label.npy"), scores) > 0.5


@pytest.mark.skipif(not SHARED.joinpath("cases").is_dir(), reason="no ../shared/cases here")
def test_shipped_weights_score_recordings_of_ones_own(tmp_path):
    """29 beats are 8, and the doubt is said; a header without a unit scores as one with mV."""
    cases = SHARED / "cases"
    (tmp_path / "I01.dat").write_bytes((cases / "header_without_unit" / "I01.dat").read_bytes())
    header = (cases / "header_without_unit" / "I01.hea").read_text()
    (tmp_path / "I01.hea").write_text(header.replace(" 306 ", " 306/mV "))
    done = run_script("tools/score_recordings.py", cases / "doubled_beats" / "ptbxl60", cases / "header_without_unit" /
                      "I01", tmp_path / "I01", "--load_path", SHIPPED, "--output_dir", tmp_path / "out", "--figures", 0)
    assert done.returncode == 0, done.stderr
    assert "differ by more than a quarter in 1 of 1 windows (at 0 s 29 against 8 beats)" in done.stdout
    rows = pd.read_csv(tmp_path / "out" / "record_scores.csv")
    assert rows.loc[0, ["beats", "heartpy_beats"]].tolist() == [8, 29]
    for name in PROTOCOLS:
        assert abs(rows[f"{name}_percentile"][2] - rows[f"{name}_percentile"][5]) <= 0.5


def test_ship_weights(tmp_path, monkeypatch):
    """Half precision, the scores of fold 9's normals by the very weights that are written, all else as it was."""
    shrink(monkeypatch)
    data, path = make_data(tmp_path / "data"), tmp_path / "out" / "model.pt"
    save_checkpoint(tmp_path / "model.pt", make_model(), epoch=3, config={"protocol": "clean"})
    finished = run_script("tools/ship_weights.py", "--data_path", data, "--load_path", tmp_path / "model.pt",
                          "--save_path", path, "--half", 1, "--device", "cpu")
    assert finished.returncode == 0, finished.stderr
    stored = torch.load(path, weights_only=True)
    assert stored["epoch"] == 3
    assert stored["model_state_dict"]["norm.bias"].dtype == torch.float16
    model, facts = load_checkpoint(path)
    normals, note = read_normals(path, facts, 30)
    records = open_records(data, "val", 12)
    for name, protocol in PROTOCOLS.items():
        scores = Scorer(model, protocol).score(records, load_r_peaks(data, "val", records, protocol.detector)).scores
        np.testing.assert_allclose(normals[name], sorted(scores[::2]), rtol=1e-6)      # rows 0, 2, 4, 6 are normal
    assert note == "" and percentile(normals["clean"][1], normals["clean"]) == 37.5


def test_ship_the_last_epoch(tmp_path):
    """Of a last.pt the optimizer stays behind; --reference 0 needs no data; a last.pt is never overwritten."""
    last, path = tmp_path / "last.pt", tmp_path / "out" / "model.pt"
    save_checkpoint(last, make_model(), epoch=3, config={"protocol": "paper"}, optimizer_state_dict={"state": {}},
                    fold9_normals={"clean": [1.0]})
    content = last.read_bytes()
    command = ("tools/ship_weights.py", "--data_path", tmp_path, "--load_path", last, "--half", 1, "--reference", 0)
    finished = run_script(*command, "--save_path", path)
    assert finished.returncode == 0, finished.stderr
    stored = torch.load(path, weights_only=True)
    assert stored["epoch"] == 3 and not {"optimizer_state_dict", "fold9_normals"} & stored.keys()
    for load_path in (last, path):
        refused = run_script(*command, "--load_path", load_path, "--save_path", last)
        assert refused.returncode == 2 and "name another file with --save_path" in refused.stderr
        assert last.read_bytes() == content


@pytest.mark.parametrize("facts, ratio, words", [
    ({}, 30, "holds no scores"), ({"config": {"protocol": "paper"}}, 30, "was trained on fold 9's normals"),
    ({"fold9_normals": {"clean": [float("nan")]}}, 30, "not lists of finite numbers"),
    ({"fold9_normals": [1.0]}, 30, "not lists"), ({"fold9_normals": {"clean": [10 ** 400]}}, 30, "not lists"),
    ({"fold9_normals": {"clean": [1.0]}, "fold9_mask_ratio": 30}, 10, "another --mask_ratio"),
    ({"fold9_normals": {"clean": [1.0]}, "config": {"mask_ratio": 30, "protocol": "paper"}}, 30, "optimistic")])
def test_what_a_checkpoint_says_of_normals(facts, ratio, words):
    """Scores that are not there, not sound or of another mask ratio are not used; those trained on are optimistic."""
    normals, note = read_normals("model.pt", facts, ratio)
    assert words in note and bool(normals) == (words == "optimistic")


def test_the_card_names_every_file():
    """Each file that comes along stands in the card with its hash."""
    names = re.findall(r"^!/ckpt/(.+\.(?:pt|npz))$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert {"mymodel.pt", "companded.pt", "restorer.pt", "no_network.npz", "diagnosis.pt", "paper_run.pt"} <= set(names)
    for name in names:
        assert f"## {name}" in CARD.read_text() and sha256_of(SHIPPED.with_name(name)) in CARD.read_text(), name
