"""The diagnosis without a network: what it is fitted to, what it is asked for, and which way is up."""
import numpy as np
import pytest
from small import make_records

from diagnosis import rival
from diagnosis.arrays import Statements
from diagnosis.test import names_of
from ecg.arrays import Records
from evaluation.metrics import detection_auroc
from scoring import without_network
from utils import UserError

TRAINING, ROWS = np.arange(0, 90, 3), np.setdiff1d(np.arange(90), np.arange(0, 90, 3))     # no row before all others


@pytest.fixture
def numbers():
    return np.random.default_rng(0).normal(size=(90, 3))


def test_the_rival_learns_from_the_training_records_alone(numbers):
    labels = np.stack([numbers[:, 0] > 0, numbers[:, 1] > 0, np.ones(90)], axis=1).astype(np.uint8)
    logits = rival.fit_and_score(numbers, labels, TRAINING, ROWS)
    assert min(detection_auroc(labels[ROWS, column], logits[:, column]) for column in (0, 1)) > 0.97
    other = labels.copy()
    other[ROWS] = 1 - other[ROWS]
    np.testing.assert_array_equal(rival.fit_and_score(numbers, other, TRAINING, ROWS), logits)
    assert not logits[:, 2].any()                               # nothing can be learned where all have it


def test_a_record_is_scored_by_its_own_numbers(numbers):
    labels = (numbers[:, :1] > 0).astype(np.uint8)
    logits = rival.fit_and_score(numbers, labels, TRAINING, ROWS)
    np.testing.assert_array_equal(rival.fit_and_score(numbers, labels, TRAINING, ROWS[::-1]), logits[::-1])
    far = numbers.copy()
    far[ROWS[1:]] += 100                                        # the scale comes from the training records
    changed = rival.fit_and_score(far, labels, TRAINING, ROWS)
    assert changed[0] == logits[0] and changed[1] != logits[1]


def test_the_components_come_from_the_training_records():
    features = np.random.default_rng(1).normal(size=(90, without_network.NAMED.start + len(without_network.NAMES)))
    features = np.abs(features).astype(np.float32)
    one = rival.beat_numbers(features, TRAINING)
    features[ROWS] *= 3
    other = rival.beat_numbers(features, TRAINING)
    np.testing.assert_array_equal(other[TRAINING], one[TRAINING])
    assert (other[ROWS] != one[ROWS]).any(axis=1).all() and np.isfinite(one).all()


def test_folds_9_and_10_are_asked_for_and_not_learned_from(monkeypatch):
    signals, r_peaks = make_records(0, 40)
    monkeypatch.setattr(rival, "load_r_peaks", lambda *_: r_peaks)
    turned, folds = np.arange(40) % 2, 1 + np.arange(40) // 2 % 10
    labels, attributes = np.stack([turned, 1 - turned], axis=1).astype(np.uint8), turned[:, None].astype(np.float32)

    def diagnose(labels):
        statements = Statements(Records(signals, "statements.npy"), {"fold": folds}, labels, attributes, [], {})
        return rival.diagnose_without_network(statements, "", statements.rows_of(9, 10))
    tested = folds > 8
    logits, other = diagnose(labels), diagnose(np.where(tested[:, None], 1 - labels, labels))
    assert set(logits) == {rival.PEOPLE, rival.MEASUREMENTS}
    for name, one in logits.items():
        assert [detection_auroc(labels[tested][:, column], one[:, column]) for column in (0, 1)] == [1, 1]
        np.testing.assert_array_equal(other[name], one)


def test_unknown_attributes_are_marked():
    assert rival.people_numbers(np.array([[2.0, np.nan]])).tolist() == [[2, 0, 4, 0, 0, 1]]


@pytest.mark.parametrize("paths", [("a/one.pt", "a/measurements.pt"), ("a/one.pt", "a/one.pt")])
def test_no_two_rows_of_the_report_have_one_name(paths):
    with pytest.raises(UserError, match="rename"):
        names_of(paths)
