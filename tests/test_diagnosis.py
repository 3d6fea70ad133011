"""The diagnosis room: network, losses, stored H, arrays, training, report; small networks but where sizes matter."""
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from small import few_channels  # noqa: F401
from small import make_model, make_records

from diagnosis import arrays as statement_arrays
from diagnosis import calibration, features
from diagnosis import model as network_of
from diagnosis import train as training
from ecg import arrays
from evaluation.metrics import Resamples
from model import MCF, save_checkpoint
from utils import save_json, sha256_of, write_atomically


def run_module(name, *arguments):
    """python -m diagnosis.NAME in this process."""
    return run_script(f"diagnosis.{name}", *arguments)


@pytest.fixture
def paper_widths(monkeypatch):
    monkeypatch.setattr("model.WIDTHS", (32, 64, 128, 256, 512))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Arrays as diagnosis.prepare writes them: 40 records, folds in turn, four statements, one of them in the signal.
    """
    folder = tmp_path_factory.mktemp("statements")
    signals, r_peaks = make_records(0, 40)
    signals = signals.astype(np.float16)
    np.save(folder / statement_arrays.SIGNALS, signals)
    identity = arrays.fingerprint(signals)
    write_atomically(arrays.r_peaks_path(folder, "statements", "slope"),
                     lambda file: arrays.pack_r_peaks(file, r_peaks, "slope", identity))
    lines = [f"{row},{row // 2},{40 + row if row % 5 else ''},{'FM'[row % 2]},{1 + row // 2 % 10},"
             f"{'TURN' if row % 2 else 'NORM'}{' SR' * (row % 3 > 0)}{' RARE' * (row == 0)},{60 + row}"
             for row in range(40)]
    (folder / statement_arrays.TABLE).write_text(
        "ecg_id,patient_id,age,sex,fold,statements,heart_rate\n" + "\n".join(lines) + "\n")
    save_json(folder / statement_arrays.MANIFEST, {
        "fingerprint": identity, "attributes": {"age": [60, 10], "sex": [0.5, 0.5], "heart_rate": [80, 10]},
        "statements": [{"code": code, "description": code.lower(), "positives": count, "group": group}
                       for code, count, group in (("NORM", 1600, "common"), ("TURN", 160, "uncommon"),
                                                  ("SR", 1100, "common"), ("RARE", 1, "rare"))]})
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "model.pt"
    save_checkpoint(path, make_model())
    return path


def train(data, path, *flags):
    finished = run_module("train", "--data_path", data, "--save_path", path, "--batch_size", 8, "--device", "cpu",
                          *flags)
    assert finished.returncode == 0, finished.stderr
    return torch.load(path, weights_only=True)


# ---- network and losses

def test_the_network_has_the_published_number_of_parameters(paper_widths):
    network = network_of.Diagnoser(MCF(), classes=71, attributes=7)
    assert sum(parameter.numel() for parameter in network.parameters()) == 26_450_609
    assert sum(parameter.numel() for parameter in network.class_head.parameters()) == 681_415


@pytest.mark.parametrize("inputs, outputs, length, stride",
                         [(128, 128, 136, 1), (128, 128, 136, 2), (128, 256, 34, 1), (256, 256, 17, 1)])
def test_spectra_give_the_plain_convolution_and_its_gradients(inputs, outputs, length, stride):
    torch.manual_seed(0)
    layer, x = network_of.GroupedConv(inputs, outputs, stride), torch.randn(2, inputs, length, requires_grad=True)
    fast, plain = layer(x), layer.plain(x)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    weights, of = torch.randn_like(plain), (x, layer.weight, layer.bias)
    for one, other in zip(torch.autograd.grad(fast, of, weights), torch.autograd.grad(plain, of, weights)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_half_dropout_keeps_half_and_doubles_it():
    layer, x = network_of.HalfDropout(), torch.ones(1003)
    y = layer(x)
    assert set(y.tolist()) == {0.0, 2.0} and 400 < (y > 0).sum() < 600
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("gamma_pos", [0, 1, 10])
def test_asymmetric_loss_is_the_plain_loop(gamma_pos):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, requires_grad=True), (torch.rand(5, 7) < 0.3).to(torch.uint8)
    total = 0
    for row in range(5):
        for column in range(7):
            p = 1 / (1 + torch.exp(-logits[row, column]))
            if labels[row, column]:
                total = total - (1 - p.item()) ** gamma_pos * torch.log(p)
            else:
                right = torch.clamp(1 - p + 0.05, max=1)
                total = total - (1 - right.item()) ** 4 * torch.log(right)
    loss = network_of.asymmetric_loss(logits, labels, gamma_pos)
    torch.testing.assert_close(loss, total)
    for one, other in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(total, logits)):
        torch.testing.assert_close(one, other)


def test_unknown_attributes_count_nothing():
    predicted = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = network_of.attribute_loss(predicted, torch.tensor([[0.0, torch.nan], [torch.nan, 2.0]]))
    assert loss.item() == pytest.approx((1 + 4) / 2)
    assert torch.autograd.grad(loss, predicted)[0].tolist() == [[1, 0], [0, 2]]


# ---- arrays

def test_groups_begin_where_they_are_said_to():
    assert [statement_arrays.group_of(count) for count in (0, 99, 100, 999, 1000)] == [
        "rare", "rare", "uncommon", "uncommon", "common"]


def test_prepare_writes_all_records_with_their_statements(simulated, tmp_path):
    flags = ("--ptbxl_path", simulated.parent / "ptb-xl", "--data_path", tmp_path / "data", "--sampling_rate", 100)
    finished = run_module("prepare", *flags)
    assert finished.returncode == 0, finished.stderr
    statements = statement_arrays.load_statements(tmp_path / "data")
    assert statements.records.signals.shape == (60, 5000, 12) and statements.records.signals.dtype == np.float16
    texts = [set(text.split()) for text in statements.table["statements"]]
    assert [{code for code, present in zip(statements.codes, row) if present} for row in statements.labels] == texts
    assert {"SR", "NORM", "CLBBB"} <= set(statements.codes) and statements.labels[:, statements.codes.index("SR")].all()
    training = statements.attributes[statements.training_rows()]
    np.testing.assert_allclose(training.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(training.std(axis=0), 1, atol=1e-5)
    positives = [statement["positives"] for statement in statements.about["statements"]]
    assert run_module("prepare", *flags, "--training_share", 0.1).returncode == 0       # its own files may be replaced
    fewer = statement_arrays.load_statements(tmp_path / "data")
    assert np.array_equal(fewer.table["ecg_id"][fewer.rows_of(9, 10)],
                          statements.table["ecg_id"][statements.rows_of(9, 10)])
    assert 0 < len(fewer.training_rows()) < len(statements.training_rows()) // 3
    assert [statement["positives"] for statement in fewer.about["statements"]] == positives
    np.save(tmp_path / "data" / statement_arrays.SIGNALS, np.zeros((1, 5000, 12), np.float16))       # another one
    refused = run_module("prepare", *flags)
    assert refused.returncode == 2 and "would be overwritten" in refused.stderr
    (tmp_path / "data" / statement_arrays.MANIFEST).unlink()
    (tmp_path / "data" / statement_arrays.SIGNALS).unlink()
    assert "statements_records.csv did not come from" in run_module("prepare", *flags).stderr


def test_unknown_ages_are_masked(data):
    statements = statement_arrays.load_statements(data)
    assert np.array_equal(np.isnan(statements.attributes[:, 0]), np.arange(40) % 5 == 0)
    assert statements.attributes[1].tolist() == pytest.approx([(41 - 60) / 10, -1, (61 - 80) / 10])


# ---- training

def test_stored_tokens_give_the_logits_of_the_whole_network(data, tmp_path):
    statements = statement_arrays.load_statements(data)
    network, rows = network_of.Diagnoser(make_model(), 4, restores=False).eval(), np.arange(5)
    features.calibrate_norms(network.mcf, statements, np.arange(40))
    without = features.logits_of(network, statements, rows)
    features.store_features(tmp_path, network.mcf, statements)
    stored = features.logits_of(network, statements, rows, tmp_path)
    ecg, beat = features.beats_and_ecg(statements, rows, features.Normalisation())
    with torch.no_grad():
        whole = network(ecg, beat, features.compute_trend(ecg)).numpy()
    np.testing.assert_allclose(without, whole, atol=1e-5)
    np.testing.assert_allclose(stored, whole, atol=1e-3)
    assert np.abs(whole[0] - whole[1]).max() > 1e-2


def test_random_encoders_get_the_norms_of_training_records(data):
    statements = statement_arrays.load_statements(data)
    mcf = make_model()
    features.calibrate_norms(mcf, statements, statements.training_rows())
    ecg, beat = features.beats_and_ecg(statements, statements.training_rows(), features.Normalisation())
    with torch.no_grad():
        x = mcf.global_encoder[:3](ecg.transpose(1, 2).unsqueeze(2))            # after the first BatchNorm
        first = mcf.global_encoder[2](mcf.global_encoder[:2](ecg.transpose(1, 2).unsqueeze(2)))
        normed = mcf.global_encoder[3](first)
    assert x.shape == first.shape and not mcf.training
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(normed.std((0, 2, 3)), torch.ones(2), atol=2e-2, rtol=0)


@pytest.mark.parametrize("arm", ["ad-frozen", "random-joint"])
def test_resuming_gives_the_same_network(data, encoder, tmp_path, arm, monkeypatch):
    monkeypatch.setattr(network_of, "BLOCKS", 2)
    monkeypatch.setattr(network_of, "WIDENING", 1)
    monkeypatch.setattr("diagnosis.train.MCF", lambda: MCF(hidden=2))
    flags = ("--arm", arm, *(("--encoder", encoder) if arm.startswith("ad") else ()), "--lr", 1e-3, "--epochs", 2)
    whole = train(data, tmp_path / "whole.pt", *flags)
    saves, save = [], save_checkpoint

    def stop_after_first_epoch(path, *rest, **facts):
        save(path, *rest, **facts)
        saves.append(path)
        if len(saves) == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("diagnosis.train.save_checkpoint", stop_after_first_epoch)
        assert run_module("train", "--data_path", data, "--save_path", tmp_path / "parts.pt", "--batch_size", 8,
                          "--device", "cpu", *flags).returncode == 130
    parts = train(data, tmp_path / "parts.pt", *flags, "--resume")
    assert [row["epoch"] for row in parts["history"]] == [1, 2]
    for name, value in whole["model_state_dict"].items():
        assert torch.equal(value, parts["model_state_dict"][name]), name
    for name in ("attribute_head.5.bias", "mcf.trend_decoder.0.weight"):
        assert (name in whole["model_state_dict"]) == (arm == "random-joint")
    refused = run_module("train", "--data_path", data, "--save_path", tmp_path / "parts.pt", "--batch_size", 8, *flags,
                         "--loss", "bce", "--resume")
    assert refused.returncode == 2 and "another loss" in refused.stderr


def test_a_frozen_arm_leaves_the_encoders_as_they_were(data, encoder, tmp_path):
    trained = train(data, tmp_path / "frozen.pt", "--arm", "ad-frozen", "--encoder", encoder, "--head", "pooled",
                    "--epochs", 2)["model_state_dict"]
    before = torch.load(encoder, weights_only=True)["model_state_dict"]
    assert all(torch.equal(value, trained[f"mcf.{name}"]) for name, value in before.items() if "decoder" not in name)


@pytest.mark.parametrize("arm", ["random-frozen", "random-joint"])
@pytest.mark.parametrize("records, batches", [(3, [3, 3]), (9, [8, 8])])
def test_an_epoch_draws_as_many_records_as_it_is_told(data, tmp_path, arm, records, batches, monkeypatch):
    """A record that is left alone is left out: the pooled head's BatchNorm needs two."""
    monkeypatch.setattr("diagnosis.train.MCF", lambda: MCF(hidden=2))
    monkeypatch.setattr("diagnosis.train.statement_loss", lambda loss, logits, labels, gamma: seen.append(len(labels))
                        or logits.sum())
    seen = []
    train(data, tmp_path / "x.pt", "--arm", arm, "--head", "pooled", "--epochs", 2, "--epoch_records", records)
    assert seen == batches


def test_joint_batches_come_with_their_labels(data, monkeypatch):
    statements, seen = statement_arrays.load_statements(data), []
    flags = SimpleNamespace(batch_size=8, mask_ratio=30, seed=0, epoch_records=None, amp="off")
    network = network_of.Diagnoser(make_model(), 4, restores=False)
    epochs = training.JointEpochs(network, statements, flags, torch.device("cpu"))
    monkeypatch.setattr(epochs, "loss_of", lambda batch, *known: seen.append((batch[0], *known)))
    list(epochs.losses(1))
    ecg, labels, attributes = map(torch.cat, zip(*seen))
    rows = statements.training_rows()
    everything, _ = features.beats_and_ecg(statements, rows, features.Normalisation())
    places = [int((everything - one).abs().sum((1, 2)).argmin()) for one in ecg]
    assert sorted(places) == list(range(len(rows))) and places != sorted(places)
    assert torch.equal(labels, torch.from_numpy(statements.labels[rows[places]]))
    np.testing.assert_array_equal(attributes, statements.attributes[rows[places]])


@pytest.mark.parametrize("flags, message", [
    (("--arm", "ad-joint"), "name its checkpoint with --encoder"),
    (("--arm", "random-joint", "--encoder", "x.pt"), "leave --encoder out"),
    (("--arm", "random-frozen", "--epochs", 0), "--epochs 0 is out of range")])
def test_flags_that_no_run_can_use(data, tmp_path, flags, message):
    finished = run_module("train", "--data_path", data, "--save_path", tmp_path / "x.pt", *flags)
    assert finished.returncode == 2 and message in finished.stderr


# ---- report

def test_report_and_diagnosis_of_a_recording(data, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LEAST_POSITIVES", 1)
    monkeypatch.setattr("diagnosis.test.Resamples", partial(Resamples, draws=20))
    monkeypatch.setattr("diagnosis.train.MCF", lambda: MCF(hidden=2))
    for name, flags in (("one", ("--arm", "ad-frozen", "--encoder", encoder)), ("two", ("--arm", "random-frozen"))):
        train(data, tmp_path / f"{name}.pt", *flags, "--head", "pooled", "--epochs", 3, "--lr", 1e-2, "--loss", "bce")
    finished = run_module("test", "--data_path", data, "--load_path", tmp_path / "one.pt", tmp_path / "two.pt",
                          "--output_dir", tmp_path / "report", "--device", "cpu")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert set(results["groups"]) == {"rare", "uncommon", "common", "all"}
    auroc = results["groups"]["uncommon"]["folds9and10"]["auroc"]
    assert 0 <= auroc["value"] <= 1 and results["groups"]["rare"]["fold10"]["auroc"] is None    # nobody has RARE there
    assert results["records"] == {"fold10": 4, "folds9and10": 8}
    two = results["checkpoints"]["two"]["groups"]["uncommon"]["folds9and10"]["auroc"]["value"]
    paired = results["differences"]["two - one"]["uncommon"]["folds9and10"]["auroc"]
    assert paired["value"] == pytest.approx(two - auroc["value"])
    rival = results["rivals"]["measurements"]["groups"]["uncommon"]["folds9and10"]["auroc"]["value"]
    paired = results["differences"]["two - measurements"]["uncommon"]["folds9and10"]["auroc"]
    assert rival == 1 and paired["value"] == pytest.approx(two - rival)         # TURN turns the wave after R
    rows = (tmp_path / "report" / "statements.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 2 * 4 and (tmp_path / "report" / "long_tail.png").exists()
    record = make_records(0, 2)[0][1]
    np.savetxt(tmp_path / "my.csv", record, delimiter=",", comments="", header=",".join(
        ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")))
    shipped = run_module("ship", "--data_path", data, "--load_path", tmp_path / "one.pt", "--save_path",
                         tmp_path / "shipped.pt")
    assert shipped.returncode == 0, shipped.stderr
    network, facts = network_of.load_diagnoser(tmp_path / "shipped.pt")
    whole = network_of.load_diagnoser(tmp_path / "one.pt")[1]["calibration"]
    assert facts["calibration"]["youden"][1] == pytest.approx(whole["youden"][1], abs=0.02)
    assert facts["calibration"]["youden"] != whole["youden"]                    # measured again
    assert 2 * (tmp_path / "shipped.pt").stat().st_size < 1.5 * (tmp_path / "one.pt").stat().st_size
    finished = run_module("test", "--load_path", tmp_path / "shipped.pt", "--record", tmp_path / "my.csv",
                          "--record_rate", 500, "--record_unit", "mV", "--device", "cpu")
    assert finished.returncode == 0, finished.stderr
    assert "0 s: " in finished.stdout and "Not for clinical use" in finished.stdout


def test_the_shipped_weights_are_those_of_their_card(paper_widths):
    path = ROOT / "ckpt" / "diagnosis.pt"
    _, facts = network_of.load_diagnoser(path)
    card, naming = (path.parent / "README.md").read_text(), facts["calibration"]["naming"]
    assert sha256_of(path) in card and path.stat().st_size < 12e6 and len(naming) == 71
    assert f"{sum(threshold is not None for threshold in naming)} of the 71" in card
    assert all(f"--{name} {facts['config'][name]}" in card for name in ("arm", "head", "loss", "epochs", "seed"))
    assert f"{facts['training_records']:,} records" in card
