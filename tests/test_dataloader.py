"""Beats, masks, normalisations and batches are what the method says."""
import numpy as np
import plain
import pytest
import torch
from small import make_data, make_records

import dataloader
from dataloader import (Normalisation, TrainingBatches, TrainingSet, draw_masks, make_batch, measure_companding,
                        median_beat, valid_beats)
from ecg.arrays import Records, load_r_peaks, open_records
from ecg.signals import normalize_leads
from scoring.protocols import CLEAN, PAPER

MINMAX = {"kind": "minmax"}
COMPAND = {"kind": "compand", "exponent": 0.2, "linear_below": 0.005, "scale": [0.5 + 0.1 * lead for lead in range(12)]}


def test_valid_beats():
    """A beat is valid where 200 < R < 4400; a record without one is covered by windows that lie inside it."""
    positions, real = valid_beats(np.array([10, 200, 201, 2000, 4399, 4400, 4990]))
    assert positions.tolist() == [201, 2000, 4399] and real
    for without in (np.array([], int), np.array([100, 4500])):
        positions, real = valid_beats(without)
        assert not real and len(positions) > 5
        assert positions.min() - 140 >= 0 and positions.max() + 340 <= 5000 and (np.diff(positions) == 480).all()


def test_beats_are_cut_from_their_own_record():
    """Beats of several records in one batch equal the plain slices, normalised lead by lead."""
    records = torch.rand(3, 5000, 12, generator=torch.Generator().manual_seed(0))
    records[1, :, 4] = 0.5                                                          # a flat lead stays 0
    owners, r_peaks = torch.tensor([0, 1, 1, 2]), torch.tensor([300, 201, 4399, 2500])
    beats = Normalisation().beats(records, owners, r_peaks).numpy()
    for beat, owner, r in zip(beats, owners.tolist(), r_peaks.tolist()):
        np.testing.assert_allclose(beat, plain.normalize(records[owner].numpy()[r - 140:r + 340]), atol=1e-6)
    assert (beats[1, :, 4] == 0).all() and np.isfinite(beats).all()


@pytest.mark.parametrize("number", [3, 4])
def test_median_beat_is_the_plain_one(number):
    """Sample by sample and lead by lead, of an odd and an even number of beats, in its place around the R peak."""
    (record,), (r_peaks,) = make_records(0, 1)
    r_peaks = valid_beats(r_peaks)[0][:number]
    found = median_beat(record, r_peaks)
    np.testing.assert_allclose(found, plain.median_beat(record, r_peaks), atol=1e-6)
    assert abs(int(found[:, 0].argmax()) - 140) <= 2                                # the R peak


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minmax_has_one_meaning(dtype):
    """The arrays' normalisation (numpy) and the batches' (torch) are the plain one; twice is once; and the way back."""
    record = np.random.default_rng(0).normal(size=(5000, 12)).astype(dtype)
    record[:, 4], record[:, 7] = 0, -2
    once, minmax, near = normalize_leads(record), Normalisation.of(MINMAX), 10 * np.finfo(dtype).eps
    assert once.dtype == dtype
    np.testing.assert_allclose(once, plain.normalize(record), atol=near)
    np.testing.assert_allclose(minmax.normalise(torch.tensor(record)[None])[0].numpy(), once, atol=near)
    np.testing.assert_allclose(normalize_leads(once), once, atol=near)
    again = minmax.undo(torch.tensor(once)[None], torch.tensor(record)[None])[0].numpy()
    np.testing.assert_allclose(again[:, :7], record[:, :7], atol=10 * near)


def test_companding_is_the_plain_one():
    """An odd power of the mV, a straight line below the noise, at most 1; and the way back."""
    record = np.random.default_rng(0).normal(0, 0.3, (500, 12)) ** 3
    compand = Normalisation.of(COMPAND)
    found = compand.normalise(torch.tensor(record, dtype=torch.float32)[None])
    expected = plain.compand(record, 0.2, 0.005, COMPAND["scale"])
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
    assert (np.abs(record) < 0.005).mean() > 0.1 and np.abs(expected).max() == 1
    inside = np.abs(record) < COMPAND["scale"]
    again = compand.undo(found, torch.zeros(1, 5000, 12))[0].numpy()
    np.testing.assert_allclose(again[inside], record[inside], atol=1e-4)


def test_companding_is_measured_on_the_training_normals():
    """Twice the 0.99 quantile of |mV| in each lead becomes 1; a lead that is always flat has 1 mV."""
    records, _ = make_records(0, 3)
    records[..., 5] = 0
    found = measure_companding(Records(records, "train.npy"), np.array([0, 2]))
    expected = 2 * np.quantile(np.abs(records[[0, 2]]), 0.99, axis=(0, 1))
    np.testing.assert_allclose(np.delete(found["scale"], 5), np.delete(expected, 5), rtol=0.1)
    assert found["scale"][5] == 1 and found["kind"] == "compand"


@pytest.mark.parametrize("ratio", [10, 30, 50, 100])
def test_training_masks(ratio):
    """ratio percent of whole 48-sample patches, and one run of ratio percent of the beat, at 30 from 1 to 334."""
    generator, starts = torch.Generator().manual_seed(1), set()
    for _ in range(3000 if ratio == 30 else 50):
        global_mask, local_mask = draw_masks(ratio, generator)
        patches = global_mask.reshape(100, 48)
        assert (patches.all(1) == patches.any(1)).all() and int(patches.all(1).sum()) == ratio
        masked = np.flatnonzero(local_mask.numpy())
        assert len(masked) == min(479, 480 * ratio // 100) and masked[-1] - masked[0] == len(masked) - 1
        starts.add(int(masked[0]))
    if ratio == 30:
        assert min(starts) == 1 and max(starts) == 334 and len(starts) > 300


def test_scoring_masks():
    """Masked where the published loop masks, at any ratio; the clean passes mask every sample exactly once.

    Ratio 0 is one pass without a mask, in training too.
    """
    for masks in (PAPER.masks(0), CLEAN.masks(0), [mask[None] for mask in draw_masks(0, torch.Generator())]):
        assert [(len(mask), int(mask.sum())) for mask in masks] == [(1, 0)] * 2
    for ratio in range(1, 101):
        for protocol, passes in ((PAPER, 100 // ratio), (CLEAN, max(2, round(100 / ratio)))):
            masks = protocol.masks(ratio)
            assert len(masks[0]) == len(masks[1]) == passes and all(mask.any(dim=1).all() for mask in masks)
            for number in range(passes):
                for mask, expected in zip(masks, plain.pass_masks(protocol.name, number, ratio)):
                    assert np.flatnonzero(mask[number].numpy()).tolist() == sorted(expected)
        assert all((mask.sum(dim=0) == 1).all() for mask in masks)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("arrays") / "data", rows=13)


@pytest.fixture
def batches_of(data):
    """Makes TrainingBatches over the training records."""
    records = open_records(data, "train", 12)
    r_peaks = load_r_peaks(data, "train", records, "slope")

    def make(batch_size=5, input_=MINMAX, **options):
        training = TrainingSet(records, np.arange(len(records)), r_peaks)
        return TrainingBatches(training, Normalisation.of(input_), batch_size, **options)
    return make


def test_an_epoch_draws_as_many_records_as_it_is_asked_for(batches_of):
    """Fewer than there are, none twice, others in the next epoch; more than there are means all."""
    batches = batches_of(batch_size=2, epoch_records=3)
    assert [len(batch[0]) for batch, *_ in batches.draw_epoch(1)] == [2, 1] and len(batches) == 2
    rows = [np.concatenate([batches.rows_of_batch(epoch, number) for number in range(2)]) for epoch in (1, 2)]
    assert all(len(set(drawn.tolist())) == 3 for drawn in rows) and set(rows[0].tolist()) != set(rows[1].tolist())
    everything = batches_of(batch_size=2, epoch_records=10 ** 6)
    assert sum(count for *_, count in everything.draw_epoch(1)) == len(everything.rows) == 13
    rows = np.concatenate([everything.rows_of_batch(1, number) for number in range(len(everything))])
    assert sorted(rows.tolist()) == list(range(13))


@pytest.mark.parametrize("input_", [MINMAX, COMPAND], ids=["minmax", "compand"])
def test_epoch_follows_from_seed_and_number(batches_of, monkeypatch, input_):
    """The same seed and epoch give the same batches, streamed or held on the device; another epoch or seed others."""
    def epoch(number, **options):
        return [torch.cat([part.flatten() for part in batch])
                for batch, _, _ in batches_of(input_=input_, **options).draw_epoch(number)]

    first = epoch(1)
    monkeypatch.setattr(dataloader, "fits", lambda *_: True)
    held = epoch(1)
    monkeypatch.undo()
    for again in (epoch(1), held):
        assert len(again) == len(first) and all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], epoch(2)[0]) and not torch.equal(first[0], epoch(1, seed=1)[0])


@pytest.mark.parametrize("batch_size", [6, 5])
def test_processes_share_every_batch(batches_of, batch_size):
    """The shares of three processes make up each batch, and weigh so that their average is the mean over records."""
    whole, parts = list(batches_of(batch_size=batch_size).draw_epoch(1)), []
    for rank in range(3):
        batches = batches_of(batch_size=batch_size)
        batches.rank, batches.processes = rank, 3
        parts.append(list(batches.draw_epoch(1)))
    for (batch, share, records), *of_ranks in zip(whole, *parts):
        assert share == 1 and records == len(batch[0])
        mean = sum(part[0].mean() * of_rank for part, of_rank, _ in of_ranks) / 3
        torch.testing.assert_close(mean, batch[0].mean())
        assert sum(len(part[0]) for part, of_rank, _ in of_ranks if of_rank) == records


@pytest.mark.parametrize("input_", [MINMAX, COMPAND], ids=["minmax", "compand"])
def test_batch_masks_the_input_alone(input_):
    """Masked samples are 0 in every lead; target and trend come from the unmasked record; beats by their own rule."""
    records = torch.from_numpy(make_records(0, 2)[0])
    global_mask, local_mask = draw_masks(30, torch.Generator().manual_seed(3))
    ecg, beat, masked_ecg, masked_beat, trend = make_batch(records, torch.tensor([500, 900]), global_mask, local_mask,
                                                           Normalisation.of(input_))
    assert (masked_ecg[:, global_mask] == 0).all() and torch.equal(masked_ecg[:, ~global_mask], ecg[:, ~global_mask])
    assert (masked_beat[:, local_mask] == 0).all() and torch.equal(masked_beat[:, ~local_mask], beat[:, ~local_mask])
    np.testing.assert_allclose(trend[1].numpy(), plain.trend_of(ecg[1].numpy()), atol=1e-6)
    if input_["kind"] == "compand":
        assert torch.equal(beat[1], ecg[1, 900 - 240:900 + 240])                    # cut, not normalised again
    else:
        np.testing.assert_allclose(beat[1].numpy(), plain.normalize(records[1, 760:1240].numpy()), atol=1e-6)
