"""The weights that come along are those that their card describes."""
import numpy as np
import pytest
import torch
from conftest import ROOT

from scoring import passes
from ecg.arrays import load_r_peaks, open_signals
from model import HISTORY, load_checkpoint
from utils import sha256_of

SHIPPED, CARD = ROOT / "ckpt" / "mymodel.pt", ROOT / "ckpt" / "README.md"


def test_card_belongs_to_the_weights():
    """The card names the file's hash, commit, epoch and seed; the checkpoint carries its config and learning curve."""
    model, facts = load_checkpoint(SHIPPED)
    card, config = CARD.read_text(), facts["config"]
    assert sha256_of(SHIPPED) in card and facts["git_commit"] in card
    assert config["protocol"] == "clean" and config["select"] == "val"
    assert f"epoch {facts['epoch']} of {config['epochs']}" in card and f"seed {config['seed']}" in card
    assert [row["epoch"] for row in facts["history"]] == list(range(1, config["epochs"] + 1))
    assert set(facts["history"][0]) == set(HISTORY)
    validated = {row["epoch"]: row["val_auroc"] for row in facts["history"] if row["val_auroc"] is not None}
    assert facts["epoch"] == max(validated, key=validated.get) and f"{validated[facts['epoch']]:.4f}" in card
    assert all(value.dtype == torch.float32 for value in model.parameters()) and SHIPPED.stat().st_size < 16e6


@pytest.mark.parametrize("protocol", passes.PLAIN_PROTOCOLS)
def test_shipped_weights_find_simulated_blocks(simulated, protocol):
    """A network that knows real ECGs finds a simulated bundle branch block odd among simulated normals."""
    model, _ = load_checkpoint(SHIPPED)
    signals = open_signals(simulated, "test", 12)
    found = passes.score_split(model, signals, load_r_peaks(simulated, "test", signals), protocol, 30,
                                torch.device("cpu"), "test", beats_per_record=2)
    assert np.isfinite(found.scores).all()
    assert passes.detection_auroc(np.load(simulated / "label.npy"), found.scores) > 0.5
