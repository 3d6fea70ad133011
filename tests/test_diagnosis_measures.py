"""The diagnosis room: AUROC of statements and their means, probabilities, and which statements are named."""
import numpy as np
import pytest

from diagnosis import calibration, measures
from diagnosis.test import count_named
from evaluation.metrics import Resamples, rank_records


def test_macro_leaves_out_what_a_resample_lacks():
    labels, rng = np.zeros((60, 2), np.uint8), np.random.default_rng(0)
    labels[:30, 0], labels[0, 1] = 1, 1
    scores, resamples = rng.normal(size=(60, 2)) + labels, Resamples(np.arange(60), draws=50)
    one, two = (measures.measure_statement(labels[:, column], scores[:, column], 0.5, resamples) for column in (0, 1))
    mean = measures.macro([one["auroc"], two["auroc"], None])
    without = resamples.weights[:, 0] == 0
    assert without.any() and not without.all()
    np.testing.assert_allclose(mean.draws[without], one["auroc"].draws[without])
    np.testing.assert_allclose(mean.draws[~without], (one["auroc"].draws + two["auroc"].draws)[~without] / 2)
    assert mean["value"] == pytest.approx((one["auroc"]["value"] + two["auroc"]["value"]) / 2)


def test_ranking_a_statement_is_ranking_records():
    rng = np.random.default_rng(2)
    labels, scores = (rng.random(90) < 0.2).astype(np.uint8), rng.integers(0, 20, 90) / 4       # with ties
    resamples = Resamples(rng.integers(0, 60, 90), draws=150)
    for name, expected in rank_records(labels, scores, resamples).items():
        found = measures.rank_statement(labels, scores, resamples)[name]
        np.testing.assert_allclose(found.draws, expected.draws)
        assert found == pytest.approx(expected)


def test_naming_counts_what_is_named_and_right():
    labels, logits = np.array([[1, 0, 1], [0, 0, 1]], np.uint8), np.array([[2.0, 2.0, 9.0], [0.0, 0.0, 9.0]])
    assert count_named(labels, logits, [1.0, 1.0, None]) == {
        "named_a_record": 1.0, "present_a_record": 1.5, "precision": 0.5, "recall": pytest.approx(1 / 3),
        "records_without": 0.5}


def test_calibrated_probabilities_mean_what_they_say():
    rng = np.random.default_rng(0)
    truth = rng.normal(-1, 1.5, (4000, 3))
    labels = (rng.random(truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    found = calibration.calibrate(labels, ((truth - 2) / 5).astype(np.float32), labels.mean(axis=0))
    assert found["slope"] == pytest.approx(5, rel=0.1)
    likely = calibration.probabilities((truth - 2) / 5, found)
    np.testing.assert_allclose(likely.mean(axis=0), labels.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(likely, 1 / (1 + np.exp(-truth)), atol=0.06)


def test_a_statement_is_named_at_the_best_f1_that_is_right_half_of_the_time():
    rng = np.random.default_rng(1)
    labels = (rng.random(200) < 0.2).astype(np.uint8)
    scores = (rng.normal(size=200) + labels).round(1)

    def precision_and_f1(threshold):
        called, right = (scores >= threshold).sum(), (scores[labels == 1] >= threshold).sum()
        return right / called, 2 * right / (called + labels.sum())
    measured = {threshold: precision_and_f1(threshold) for threshold in scores}
    best = max(f1 for precision, f1 in measured.values() if precision >= 0.5)
    assert measured[calibration.naming_threshold(labels, scores)][1] == pytest.approx(best)
    assert best < max(f1 for _, f1 in measured.values())
    assert calibration.naming_threshold(labels, -np.abs(scores) - 9 * labels) is None
