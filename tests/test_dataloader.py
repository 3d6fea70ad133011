"""Beats, masks and batches are what the method says, however they are fetched."""
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch

import dataloader
import parallel
from ecg.arrays import load_r_peaks, open_signals
from dataloader import (TrainingBatches, crop_global, cut_beats, draw_masks, make_batch, normalize_records,
                        scoring_masks, valid_beats)
from ecg.signals import normalize_leads


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
    beats = cut_beats(records, owners, r_peaks).numpy()
    for beat, owner, r in zip(beats, owners.tolist(), r_peaks.tolist()):
        np.testing.assert_allclose(beat, plain.normalize(records[owner].numpy()[r - 140:r + 340]), atol=1e-6)
    assert (beats[1, :, 4] == 0).all() and np.isfinite(beats).all()


def test_normalisation_has_one_meaning():
    """The arrays' normalisation (numpy) and the batches' (torch) agree, and normalising twice changes nothing."""
    record = np.random.default_rng(0).normal(size=(5000, 12))
    record[:, 7] = -2
    once = normalize_leads(record)
    in_torch = normalize_records(torch.tensor(record)[None])[0].numpy()
    np.testing.assert_allclose(in_torch, once, atol=1e-12)
    np.testing.assert_allclose(normalize_leads(once), once, atol=1e-12)


@pytest.mark.parametrize("ratio", [10, 30, 50])
def test_training_masks(ratio):
    """ratio percent of whole 48-sample patches, and one run of ratio percent of the beat; True is masked."""
    generator = torch.Generator().manual_seed(1)
    starts = set()
    for _ in range(50):
        global_mask, local_mask = draw_masks(ratio, generator)
        patches = global_mask.reshape(100, 48)
        assert (patches.all(1) == patches.any(1)).all() and int(patches.all(1).sum()) == ratio
        masked = np.flatnonzero(local_mask.numpy())
        assert len(masked) == 480 * ratio // 100 and masked[-1] - masked[0] == len(masked) - 1
        starts.add(int(masked[0]))
    assert len(starts) > 20


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_scoring_masks(protocol):
    """At the published ratio both protocols have three passes, masked where the plain reference masks."""
    global_masks, local_masks = scoring_masks(protocol, 30)
    assert len(global_masks) == len(local_masks) == 3
    for number in range(3):
        expected_global, expected_local = plain.pass_masks(protocol, number)
        assert np.flatnonzero(global_masks[number].numpy()).tolist() == expected_global
        assert np.flatnonzero(local_masks[number].numpy()).tolist() == expected_local


@pytest.mark.parametrize("ratio", [1, 10, 25, 30, 50, 75, 100])
def test_clean_masks_cover_every_sample_once(ratio):
    """Whatever the ratio, the clean passes mask every global and every beat sample exactly once."""
    for masks in scoring_masks("clean", ratio):
        assert (masks.sum(dim=0) == 1).all()
    for masks in scoring_masks("paper", ratio):
        assert masks.any(dim=1).all()


@pytest.fixture(scope="module")
def batches_of(simulated):
    """Makes TrainingBatches over the simulated training records."""
    signals = open_signals(simulated, "train", 12)
    r_peaks = load_r_peaks(simulated, "train", signals)

    def make(seed=0, workers=0, batch_size=8):
        arguments = SimpleNamespace(data_path=simulated, batch_size=batch_size, mask_ratio=30, seed=seed,
                                    workers=workers, amp="off")
        return TrainingBatches(signals, np.arange(len(signals)), r_peaks, arguments, torch.device("cpu"))
    return make


def test_epoch_follows_from_seed_and_number(batches_of, monkeypatch):
    """The same seed and epoch give the same batches, with or without workers, streamed or held on the device; another
    epoch or seed gives others."""
    def epoch(number, **options):
        return [torch.cat([part.flatten() for part in batch])
                for batch, _, _ in batches_of(**options).draw_epoch(number)]

    first = epoch(1)
    monkeypatch.setattr(dataloader, "fits", lambda *_: True)
    held = epoch(1)
    monkeypatch.undo()
    for again in (epoch(1), epoch(1, workers=2), held):
        assert len(again) == len(first) and all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], epoch(2)[0]) and not torch.equal(first[0], epoch(1, seed=1)[0])


def test_epoch_shows_every_record_once(batches_of, simulated):
    """No record is dropped or repeated, the last, smaller batch included."""
    batches = batches_of(batch_size=8)
    ecgs = torch.cat([batch[0] for batch, _, _ in batches.draw_epoch(3)])
    stored = crop_global(torch.from_numpy(np.load(simulated / "train.npy")))
    assert len(ecgs) == len(stored) and len(batches) == -(-len(stored) // 8)
    assert {tuple(ecg[1000].tolist()) for ecg in ecgs} == {tuple(ecg[1000].tolist()) for ecg in stored}


@pytest.mark.parametrize("batch_size", [8, 5])
def test_processes_share_every_batch(batches_of, batch_size, monkeypatch):
    """The shares of three processes make up each batch, and weigh so that their average is the mean over records."""
    monkeypatch.setattr(parallel, "PROCESSES", 1)
    whole = list(batches_of(batch_size=batch_size).draw_epoch(1))
    monkeypatch.setattr(parallel, "PROCESSES", 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        parts.append(list(batches_of(batch_size=batch_size).draw_epoch(1)))
    for (batch, share, records), *of_ranks in zip(whole, *parts):
        assert share == 1 and records == len(batch[0])
        mean = sum(part[0].mean() * of_rank for part, of_rank, _ in of_ranks) / 3
        torch.testing.assert_close(mean, batch[0].mean())
        assert sum(len(part[0]) for part, of_rank, _ in of_ranks if of_rank) == records


def test_batch_masks_the_input_alone():
    """Masked samples are 0 in the input of every lead; the target and the trend come from the unmasked record."""
    records = torch.rand(2, 5000, 12, generator=torch.Generator().manual_seed(2))
    global_mask, local_mask = draw_masks(30, torch.Generator().manual_seed(3))
    ecg, beat, masked_ecg, masked_beat, trend = make_batch(records, torch.tensor([500, 900]), global_mask, local_mask)
    assert (masked_ecg[:, global_mask] == 0).all() and torch.equal(masked_ecg[:, ~global_mask], ecg[:, ~global_mask])
    assert (masked_beat[:, local_mask] == 0).all() and torch.equal(masked_beat[:, ~local_mask], beat[:, ~local_mask])
    np.testing.assert_allclose(trend[1].numpy(), plain.trend_of(ecg[1].numpy()), atol=1e-6)
