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
    labels[:, :, 1:3][(labels[:, :, 1:3] == 1) & (phases != 3)] = 0     # there, two leads have no anomalous point
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
    assert np.isnan(own[11]).all() and np.isfinite(own[:11, [0, 2]]).all() and np.isfinite(own[2:11, 1]).all()
    leads = np.broadcast_to(np.arange(4), labels.shape[1:])
    for label, phase, scores, (record, within_phase, within_lead) in zip(labels[:11], phases, maps, own):
        assert record == pytest.approx(roc_auc_score(label[label <= 1], scores[label <= 1]))
        assert within_lead == pytest.approx(pairs_won(label, scores, leads))
        won = []
        for code in (1, 2, 3):                                  # every pair of points in two leads
            in_phase = (phase == code)[:, 0]
            for lead in range(4):
                others = [other for other in range(4) if not (label[in_phase, other] == 1).any()]
                rivals = scores[in_phase][:, others][label[in_phase][:, others] == 0]
                won += [np.mean((score > rivals) + (score == rivals) / 2) for score in scores[in_phase, lead][
                    label[in_phase, lead] == 1] if len(rivals)]
        assert within_phase == pytest.approx(np.mean(won), nan_ok=True) if won else np.isnan(within_phase)
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


@pytest.fixture
def some_lesions(points):
    """Lesions of two kinds and a row without one; its records are the rows' numbers."""
    labels, phases, _ = points
    kinds = np.array(["t_wave"] * 6 + ["p_loss"] * 5 + ["none"])
    return lesions.Lesions("records", ["peaks"] * 12, labels, phases[:, :, 0], kinds, kinds, kinds,
                           Resamples(np.arange(12), 100))


def test_maps_are_ranked_in_blocks(points, some_lesions, monkeypatch):
    """Made for some rows at a time, every fifth sample is ranked: the same as all at once; reversed, the contrary."""
    labels, phases, maps = points
    monkeypatch.setattr(lesions, "ROWS_AT_ONCE", 5)
    whole = np.random.default_rng(1).normal(size=(12, 300, 4))
    whole[:, ::5], asked = maps, []

    def maps_of(records, r_peaks, rows):
        assert records == "records" and len(r_peaks) == 12
        asked.append(rows.tolist())
        return {"map": whole[rows], "constant": np.zeros((len(rows), 300, 4))}
    ranks = lesions.rank_lesions(some_lesions, maps_of)
    assert asked == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]] and set(ranks) == {"map", "constant"}
    np.testing.assert_array_equal(ranks["map"].own, places.rank_places(labels, phases, maps))
    assert (ranks["constant"].own[:11] == 0.5).all()
    found, contrary = (lesions.evaluate_lesions(some_lesions, one) for one in (ranks["map"], ranks["map"].reversed()))
    for measure in ("pooled", *places.PLACES):
        for kind in ("t_wave", "p_loss"):
            assert found[measure]["by_kind"][kind]["value"] == pytest.approx(
                1 - contrary[measure]["by_kind"][kind]["value"])
    minus = places.rank_places(labels, phases, -maps)
    np.testing.assert_allclose(ranks["map"].reversed().own, minus)


def test_pooled_lesions(points, some_lesions):
    """All points of all rows together; a kind's against its own and those of the rows without a lesion."""
    labels, _, maps = points
    ranks = lesions.rank_lesions(some_lesions, lambda records, r_peaks, rows: {"map": np.repeat(maps[rows], 5, axis=1)})
    found, kinds = lesions.evaluate_lesions(some_lesions, ranks["map"])["pooled"], some_lesions.kinds
    assert set(found) == {"value", "low", "high", "by_kind"} and set(found["by_kind"]) == {"t_wave", "p_loss"}
    for value, rows in ((found, kinds != ""), (found["by_kind"]["p_loss"], kinds != "t_wave")):
        scored = (labels <= 1) & rows[:, None, None]
        assert value["value"] == pytest.approx(roc_auc_score(labels[scored], maps[scored]), abs=1e-3)
        assert value["low"] < value["value"] < value["high"]
