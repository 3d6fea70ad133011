"""The network: its size, its start, its loss, its checkpoints, and what it refuses to load."""
import numpy as np
import pytest
import torch
from small import make_model, shrink

from model import (MCF, PARTS, UNCERTAINTIES, compute_trend, forward_loss, load_checkpoint, save_checkpoint,
                   translate_published)
from scoring.fused import FusedMCF
from utils import UserError

COMPAND = {"kind": "compand", "exponent": 0.1, "linear_below": 0.005, "scale": [1.0] * 12}


@pytest.fixture
def few_channels(monkeypatch):
    shrink(monkeypatch)


def test_published_size():
    """The number of parameters is the published one."""
    assert sum(parameter.numel() for parameter in MCF().parameters()) == 7_085_779


def test_attention_starts_as_four_linear_layers():
    """Weights and biases uniform up to 1 / sqrt(50), as the published nn.Linear; no bias is 0."""
    torch.manual_seed(0)
    attention = MCF().attention.requires_grad_(False)
    for part in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        assert float(part.std()) == pytest.approx(0.082, abs=0.003) and part.abs().max() <= 50 ** -0.5
    for part in (*attention.in_proj_bias.chunk(3), attention.out_proj.bias):
        assert float(part.std()) == pytest.approx(0.082, abs=0.02)


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
def test_other_leads_widths_and_uncertainties(uncertainty):
    """Neither 12 leads nor 50 channels are hard-wired; the log-variance is shared, constant, or free for each lead."""
    network = MCF(enc_in=3, hidden=8, uncertainty=uncertainty).eval()
    ecg, beat = torch.rand(2, 4800, 3), torch.rand(2, 480, 3)
    (restored, logvar), (restored_beat, _), restored_trend = network(ecg, beat, compute_trend(ecg))
    assert restored.shape == restored_trend.shape == ecg.shape and restored_beat.shape == beat.shape
    assert logvar.shape == (2, 4800, 3 if uncertainty == "free" else 1)
    with torch.no_grad():
        network.global_decoder[-1].weight *= 1e4
    (restored, logvar), _, _ = network(ecg, beat, compute_trend(ecg))
    assert restored.abs().max() <= 1 and logvar.abs().max() == (10 if uncertainty == "free" else 1)
    assert uncertainty != "constant" or (logvar == -1).all()


@pytest.mark.usefixtures("few_channels")
def test_log_variance_keeps_its_digits_in_bfloat16():
    """The layer before its Tanh is float32 in training and in scoring: bfloat16 would round most of it to -1."""
    network = make_model()
    ecg, beat = torch.rand(1, 4800, 12), torch.rand(1, 480, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = network(ecg, beat, ecg)
    fused = FusedMCF(network, torch.bfloat16)
    with torch.inference_mode():
        scored = fused.restore(fused.encode_global(ecg), fused.encode_local(beat), fused.begin_trend(
            fused.encode_trend(ecg)))
    for (_, logvar), _, _ in (trained, scored):
        assert logvar.dtype == torch.float32 and (logvar != logvar.bfloat16().float()).float().mean() > 0.9


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


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("input_, uncertainty", [({"kind": "minmax"}, "log_variance"), (COMPAND, "free")])
def test_own_checkpoint_round_trip(tmp_path, input_, uncertainty):
    """Weights, input and facts come back as they were, from plain types alone, and no temporary file stays."""
    path, network = tmp_path / "deep" / "model.pt", make_model(uncertainty=uncertainty)
    network.input = input_
    save_checkpoint(path, network, epoch=4, config={"lr": 1e-4, "select": "val"}, metrics={"val_auroc": None})
    restored, facts = load_checkpoint(path)
    assert facts == {"epoch": 4, "config": {"lr": 1e-4, "select": "val"}, "metrics": {"val_auroc": None}}
    assert restored.input == input_ and restored.uncertainty == uncertainty
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in network.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_published_checkpoint_loads(tmp_path, published_state):
    """A checkpoint in the published names loads through the same door, with numpy scalars beside the weights."""
    expected = translate_published(published_state)
    path = tmp_path / "auc.pt"
    torch.save({"model_state_dict": published_state, "auc": np.float64(0.86), "epoch": np.int64(3)}, path)
    restored, facts = load_checkpoint(path)
    assert facts == {"auc": 0.86, "epoch": 3} and restored.input == {"kind": "minmax"}
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state, "epoch": 2},
    lambda state: {"model_state_dict": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {f"module.{name}": value.half() for name, value in state.items() if value.ndim}], ids=[
        "bare", "state_dict", "module", "bare half module, no counters"])
def test_other_ways_to_save_weights_load(tmp_path, wrap):
    """The weights alone, under another key, from DataParallel, in half precision."""
    state = make_model().state_dict()
    content = wrap(state)
    if len(content) > 3 and "norm.bias" not in content:         # the counters of BatchNorm must be there
        content |= {f"module.{name}": value for name, value in state.items() if not value.ndim}
    torch.save(content, tmp_path / "model.pt")
    restored, _ = load_checkpoint(tmp_path / "model.pt")
    for name, value in restored.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("change, words", [
    ({"lead_scale": [1.0] * 12}, "--input compand"), ({"input": {"kind": "scale"}}, "ValueError"),
    ({"input": COMPAND | {"scale": [1.0]}}, "ValueError"), ({"input": COMPAND | {"exponent": -1}}, "ValueError"),
    ({"input": {"kind": "compand"}}, "exponent is missing"), ({"uncertainty": "huge"}, "ValueError"),
    ({"model_state_dict": {}}, "norm.bias is missing")])
def test_unsound_content_is_refused(tmp_path, change, words):
    """What a checkpoint says of its input is checked, what is no more says so, and a missing weight is named."""
    state = make_model().state_dict()
    del (state if "model_state_dict" in change else dict(state))["norm.bias"]
    torch.save({**change, "model_state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("absent, zero", [(["global"], {"global"}), (["local"], {"local"}), (["trend"], {"trend"}),
                                          (["cross_attention"], set()),
                                          (["global", "cross_attention", "trend"], {"global", "trend"})])
def test_each_ablation_leaves_out_one_thing(tmp_path, absent, zero):
    """What is left out has no weights and no term; without attention between them the other terms stay as they were."""
    parts = [part for part in PARTS if part not in absent]
    torch.manual_seed(0)
    network, ecg, beat = make_model(parts=parts), torch.rand(2, 4800, 12), torch.rand(2, 480, 12)
    own = {name.split("_")[0] for name in network.state_dict()}
    assert not own & (set(absent) - {"cross_attention"})
    assert (network.attention is None) == ("cross_attention" in absent)
    save_checkpoint(tmp_path / "model.pt", network)
    network = load_checkpoint(tmp_path / "model.pt")[0].eval()
    assert network.parts == tuple(parts)
    fused = FusedMCF(network)
    with torch.inference_mode():
        trend = compute_trend(ecg)
        terms = forward_loss(network(ecg, beat, trend), ecg, beat)
        scored = forward_loss(fused.restore(fused.encode_global(ecg), fused.encode_local(beat), fused.begin_trend(
            fused.encode_trend(trend))), ecg, beat)
    assert {term for term in ("global", "local", "trend") if terms[term] == 0} == zero
    torch.testing.assert_close(scored, terms, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("few_channels")
def test_an_ablation_changes_no_other_branch():
    """Without cross-attention, a network without one branch restores the other as the whole network does."""
    ecg, beat = torch.rand(2, 4800, 12), torch.rand(2, 480, 12)
    whole, trend = make_model(parts=("global", "local", "trend")), compute_trend(ecg)
    with torch.inference_mode():
        expected = whole(ecg, beat, trend)
        for place, part in enumerate(("global", "local")):
            part_alone = make_model(parts=(part,))
            part_alone.load_state_dict({name: value for name, value in whole.state_dict().items()
                                        if name.startswith(part)})
            torch.testing.assert_close(part_alone(ecg, beat, trend)[place], expected[place])


@pytest.mark.parametrize("parts", [("trend",), ("global", "beat")])
def test_parts_that_make_no_network(parts):
    with pytest.raises(ValueError, match="parts"):
        MCF(hidden=2, parts=parts)
