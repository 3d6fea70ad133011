"""Numbers of the place of what is abnormal, against plain loops and scikit-learn; what a map cannot win them with."""
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation import lesions, places
from evaluation.metrics import Resamples


@pytest.fixture
def points():
    """Labels, phases and a map with ties of 12 records, 60 samples and 4 leads; record 11 has no anomalous point."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 255], (12, 60, 4), p=[0.7, 0.2, 0.1])
    labels[0, :, 2], labels[11][labels[11] == 1] = 0, 0
    phases = rng.integers(0, 4, (12, 60, 1))
    labels[1][(phases[1] == 2)[:, 0]] = 1                       # a phase that is anomalous throughout
    return labels, phases, np.round(rng.normal(labels == 1, 2), 1).astype(np.float32)


def pairs_won(labels, scores, groups):
    """The share of pairs of an anomalous and a normal point of the same group that are in order, a point at a time."""
    won = []
    for score, group in zip(scores[labels == 1], groups[labels == 1]):
        rivals = scores[(labels == 0) & (groups == group)]
        if len(rivals):
            won.append(np.mean((score > rivals) + (score == rivals) / 2))
    return np.mean(won) if won else np.nan


def test_places_are_those_of_plain_loops(points):
    """Within a record, within one of its phases, within one of its leads; points without a truth or phase are out."""
    labels, phases, maps = points
    own = places.rank_places(labels, phases, maps)
    assert np.isnan(own[11]).all() and np.isfinite(own[:11]).all()
    leads = np.broadcast_to(np.arange(4), labels.shape[1:])
    for label, phase, scores, (record, within_phase, within_lead) in zip(labels[:11], phases, maps, own):
        assert record == pytest.approx(roc_auc_score(label[label <= 1], scores[label <= 1]))
        assert within_lead == pytest.approx(pairs_won(label, scores, leads))
        known = np.where(phase == 0, 255, label)
        assert within_phase == pytest.approx(pairs_won(known, scores, np.broadcast_to(phase, label.shape)))
    assert np.isnan(places.rank_places(labels, None, maps)[:, 1]).all()


def test_a_constant_knows_no_place(points):
    """What is constant in a record has 0.5 everywhere; what tells the phase alone has it within a phase."""
    labels, phases, _ = points
    constant, phase_alone = (np.broadcast_to(values, labels.shape).astype(float)
                             for values in (np.arange(12)[:, None, None], -(phases - 2) ** 2))
    assert (places.rank_places(labels, phases, constant)[:11] == 0.5).all()
    own = places.rank_places(labels, phases, phase_alone)[:11]
    assert (own[:, 1] == 0.5).all() and (own[1, [0, 2]] > 0.6).all()


def test_kinds_count_alike():
    """The headline is the mean over kinds, not over records; its interval is over patients."""
    own = np.array([[0.9, 0.9, 0.9]] * 30 + [[0.5, 0.5, np.nan]] * 10)
    kinds = {"t_wave": np.arange(40) < 30, "p_loss": np.arange(40) >= 30}
    found = places.average_places(own, Resamples(np.arange(40)), kinds)
    assert found["per_record"]["value"] == pytest.approx(0.7)
    assert found["per_record"]["by_kind"]["t_wave"]["value"] == pytest.approx(0.9)
    assert found["within_record_and_lead"]["by_kind"]["p_loss"] is None
    own[:30] += np.repeat(np.random.default_rng(0).normal(0, 0.1, 6), 5)[:, None]       # five records a patient
    alone, together = (places.average_places(own, Resamples(patients), kinds)["per_record"]["by_kind"]["t_wave"]
                       for patients in (np.arange(40), np.arange(40) // 5))
    assert together["high"] - together["low"] > 1.5 * (alone["high"] - alone["low"])


def test_pooled_lesions(points):
    """All points of all rows together; a kind's against its own and those of the rows without a lesion."""
    labels, phases, maps = points
    kinds = np.array(["t_wave"] * 6 + ["p_loss"] * 5 + ["none"])
    of = lesions.Lesions(None, [], labels, phases[:, :, 0], kinds, kinds, kinds, Resamples(np.arange(12), 100))
    found = lesions.evaluate_lesions(of, maps)
    assert set(found) == {"pooled", *places.PLACES} and set(found["pooled"]["by_kind"]) == {"t_wave", "p_loss"}
    for value, rows in ((found["pooled"], kinds != ""), (found["pooled"]["by_kind"]["p_loss"], kinds != "t_wave")):
        scored = (labels <= 1) & rows[:, None, None]
        assert value["value"] == pytest.approx(roc_auc_score(labels[scored], maps[scored]), abs=1e-3)
        assert value["low"] < value["value"] < value["high"]


def test_maps_are_collected_in_blocks():
    """A map is asked for some rows at a time, in order, with the R peaks of all; every fifth sample is kept."""
    of, asked = lesions.Lesions(None, [7], np.zeros((600, 960, 1)), *[np.zeros(600)] * 4, None), []

    def maps_of(records, r_peaks, rows):
        asked.append(len(rows))
        assert r_peaks == [7]
        return np.arange(4800)[None, :, None] + 10_000 * rows[:, None, None]
    maps = of.collect(maps_of)
    assert max(asked) <= 256 and sum(asked) == 600
    assert maps[599, 3, 0] == 15 + 10_000 * 599 and maps.shape == (600, 960, 1)
