"""The network: its size, its loss, its checkpoints, and what it refuses to load."""
import numpy as np
import pytest
import torch

from model import MCF, compute_trend, forward_loss, load_checkpoint, save_checkpoint, translate_published
from utils import UserError


def test_published_size():
    """The number of parameters is the published one."""
    assert sum(parameter.numel() for parameter in MCF().parameters()) == 7_085_779


def test_other_leads_and_widths():
    """Neither 12 leads nor 50 channels are hard-wired."""
    network = MCF(enc_in=2, hidden=8).eval()
    ecg, beat = torch.rand(3, 4800, 2), torch.rand(3, 480, 2)
    (restored, logvar), (restored_beat, _), restored_trend = network(ecg, beat, compute_trend(ecg))
    assert restored.shape == restored_trend.shape == ecg.shape
    assert logvar.shape == (3, 4800, 1) and restored_beat.shape == beat.shape
    with pytest.raises(ValueError, match="even"):
        MCF(hidden=7)


def test_loss_is_the_formula():
    """exp(-s) (x' - x)^2 + s for the record and the beat, the plain square for the trend, each a mean."""
    rng = np.random.default_rng(0)
    ecg, beat = rng.normal(size=(2, 4800, 12)), rng.normal(size=(2, 480, 12))
    x_g, s_g = rng.normal(size=ecg.shape), rng.normal(size=(2, 4800, 1))
    x_l, s_l, x_t = rng.normal(size=beat.shape), rng.normal(size=(2, 480, 1)), rng.normal(size=ecg.shape)
    expected = (np.mean(np.exp(-s_g) * (x_g - ecg) ** 2) + s_g.mean() + np.mean(np.exp(-s_l) * (x_l - beat) ** 2)
                + s_l.mean() + np.mean((x_t - ecg) ** 2))
    outputs = ((torch.tensor(x_g), torch.tensor(s_g)), (torch.tensor(x_l), torch.tensor(s_l)), torch.tensor(x_t))
    losses = forward_loss(outputs, torch.tensor(ecg), torch.tensor(beat))
    assert abs(float(losses["loss"]) - expected) < 1e-9
    assert abs(float(losses["global"] + losses["local"] + losses["trend"]) - expected) < 1e-9


def test_trend_of_a_flat_record_is_zero():
    """A constant record gives 0, not 0 / 0, and does not disturb its neighbours in the batch."""
    ecg = torch.cat([torch.full((1, 4800, 12), 3.0), torch.rand(1, 4800, 12)])
    trend = compute_trend(ecg)
    assert (trend[0] == 0).all() and trend[1].min() == -1 and trend[1].max() == 1


def test_own_checkpoint_round_trip(tmp_path):
    """Weights and facts come back as they were, from plain types alone, and no temporary file stays."""
    path = tmp_path / "deep" / "model.pt"
    network = MCF(enc_in=3, hidden=6)
    save_checkpoint(path, network, epoch=4, config={"lr": 1e-4, "select": "val"}, metrics={"val_auroc": None})
    restored, facts = load_checkpoint(path)
    assert facts == {"epoch": 4, "config": {"lr": 1e-4, "select": "val"}, "metrics": {"val_auroc": None}}
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in network.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_published_checkpoint_loads(tmp_path, published_state):
    """A checkpoint in the published names loads through the same door."""
    torch.save({"model_state_dict": published_state}, tmp_path / "mymodel.pt")
    restored, facts = load_checkpoint(tmp_path / "mymodel.pt")
    expected = translate_published(published_state)
    numpy_scalars = {"auc": np.float64(0.86), "epoch": np.int64(3)}
    torch.save({"model_state_dict": published_state, **numpy_scalars}, tmp_path / "auc.pt")
    assert load_checkpoint(tmp_path / "auc.pt")[1] == {"auc": 0.86, "epoch": 3}
    assert facts == {} and all(torch.equal(restored.state_dict()[name], value) for name, value in expected.items())


class Payload:
    """What a malicious checkpoint would carry."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_bad_checkpoints_are_refused(tmp_path, published_state, monkeypatch):
    """Missing, junk, truncated, foreign, incomplete and malicious files end in a sentence that names the file."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": published_state}, "whole.pt")
    contents = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(contents[:len(contents) // 2])
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model_state_dict": {"layer.weight": torch.zeros(2)}}, "foreign.pt")
    torch.save([1, 2, 3], "list.pt")
    incomplete = {name: value for name, value in published_state.items() if not name.startswith("attn")}
    torch.save({"model_state_dict": incomplete}, "incomplete.pt")
    torch.save({"model_state_dict": Payload()}, "malicious.pt")
    for name in ("absent.pt", "truncated.pt", "junk.pt", "empty.pt", "foreign.pt", "list.pt", "incomplete.pt",
                 "malicious.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(name)
    assert not (tmp_path / "executed").exists()
