"""Arbitrary R peaks, records and mask ratios: beats lie inside, masks hide something but not all, scores are finite."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader import valid_beats
from ecg.arrays import Records
from model import MCF
from scoring.passes import Scorer
from scoring.protocols import PROTOCOLS

properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def scorers():
    """Of the smallest network, one a protocol."""
    torch.manual_seed(0)
    return [Scorer(MCF(hidden=2).eval(), protocol) for protocol in PROTOCOLS.values()]


@settings(properties, max_examples=3)
@given(st.integers(0, 2 ** 32 - 1), st.floats(-40, 6), st.lists(st.integers(-10 ** 6, 10 ** 6), max_size=30))
def test_any_record_gets_a_finite_score(scorers, seed, power, r_peaks):
    """Any accepted record with R peaks anywhere, even outside it, gets finite scores and maps."""
    signals = np.random.default_rng(seed).normal(size=(1, 5000, 12)) * 10.0 ** power
    records = Records(np.clip(signals, -1e6, 1e6).astype(np.float32), "record")
    for scorer in scorers:
        scored = scorer.score(records, [np.array(r_peaks, np.int64)], with_maps=True, beats_per_record=2)
        assert np.isfinite(scored.scores).all() and np.isfinite(scored.maps).all()


@properties
@given(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1), max_size=40))
def test_any_r_peaks_give_beats_inside(r_peaks):
    """Whatever the R peaks, there is at least one beat, and every beat lies inside the recording."""
    positions, real = valid_beats(np.array(r_peaks, dtype=np.int64))
    assert len(positions) and (positions >= 140).all() and (positions + 340 <= 5000).all()
    assert real == any(200 < peak < 4400 for peak in r_peaks)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_any_mask_ratio_hides_something_but_not_all(name):
    """clean hides every sample exactly once. Ratio 0 hides nothing, in one pass."""
    for mask_ratio in range(1, 101):
        for masks in PROTOCOLS[name].masks(mask_ratio):
            assert masks.any(dim=1).all()
            assert name != "clean" or ((masks.sum(dim=0) == 1).all() and not masks.all(dim=1).any())
    assert [(len(masks), int(masks.sum())) for masks in PROTOCOLS[name].masks(0)] == [(1, 0)] * 2
