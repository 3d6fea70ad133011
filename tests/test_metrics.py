"""metrics.py and points.py against scikit-learn and against bootstraps written plainly."""
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score, roc_curve

from evaluation import metrics
from evaluation.metrics import Resamples
from evaluation.places import average_places, rank_places
from evaluation.points import PointRanking


@pytest.fixture
def records():
    """Labels and scores of 60 records, many of them tied."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 60)
    return labels, np.round(rng.normal(labels, 1.5), 1)


@pytest.fixture
def points():
    """Labels (9, 80, 3) with excluded points and one-sided records, and maps with ties."""
    rng = np.random.default_rng(4)
    labels = rng.choice(np.array([0, 1, 255], np.uint8), (9, 80, 3), p=(0.7, 0.2, 0.1))
    labels[7], labels[8] = 0, 255
    return labels, np.round(rng.normal(labels == 1, 1), 1).astype(np.float32)


def test_measures_are_scikit_learns(records):
    """AUROC and average precision are the known ones, with ties, and turn round with the scores."""
    labels, scores = records
    counts = metrics.count_by_score(labels, scores)
    assert metrics.auroc(*counts) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.average_precision(*counts) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert metrics.auroc(*metrics.count_by_score(labels, -scores)) == pytest.approx(1 - metrics.auroc(*counts))
    assert np.isnan(metrics.auroc(*metrics.count_by_score(labels * 0, scores)))
    assert np.isnan(metrics.average_precision(*metrics.count_by_score(labels * 0, scores)))


def test_record_intervals_are_those_of_a_plain_bootstrap(records):
    """Weights give each resample's own AUROC and average precision; the interval is their percentiles."""
    labels, scores = records
    resamples = Resamples(np.arange(60), 50)
    plain = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=50)
    np.testing.assert_array_equal(resamples.weights, plain)
    drawn = {"auroc": [], "average_precision": []}
    for row in plain:
        rows = np.repeat(np.arange(60), row)
        drawn["auroc"].append(roc_auc_score(labels[rows], scores[rows]))
        drawn["average_precision"].append(average_precision_score(labels[rows], scores[rows]))
    found = metrics.rank_records(labels, scores, resamples)
    for name, values in drawn.items():
        assert [found[name]["low"], found[name]["high"]] == pytest.approx(np.percentile(values, (2.5, 97.5)))
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_patients_are_resampled_and_not_records(records):
    """A patient's records stay together; each record twice over gives the same interval, not a narrower one."""
    labels, scores = records
    weights = Resamples(np.array(["p7", "p3", "p7", "p5", "p3"]), 40).weights
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, :2].sum(axis=1) + weights[:, 3] == 3).all() and (weights[:, 0] != weights[:, 1]).any()
    once = metrics.rank_records(labels, scores, Resamples(np.arange(60)))["auroc"]
    twice = metrics.rank_records(np.tile(labels, 2), np.tile(scores, 2), Resamples(np.tile(np.arange(60), 2)))["auroc"]
    assert list(twice.values()) == pytest.approx(list(once.values()))
    few = np.where(labels == 1, np.arange(60) % 4, 4 + np.arange(60))           # many abnormal records of four patients
    assert metrics.rank_records(labels, scores, Resamples(few))["auroc"]["low"] is None


def test_groups_are_held_against_all_normals(records):
    """A group's AUROC is that of its abnormal records and all normal ones, whatever the other groups do."""
    labels, scores = records
    members = {"third": np.arange(60) % 3 == 0, "half": np.arange(60) % 2 == 0, "none": np.zeros(60, bool)}
    resamples = Resamples(np.arange(60) // 2, 20)
    found = metrics.rank_groups(labels, scores, members, resamples)
    for name in ("third", "half"):
        chosen = (labels == 0) | members[name]
        assert found[name]["auroc"]["value"] == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]))
        drawn = [roc_auc_score(labels[chosen], scores[chosen], sample_weight=row) for row in
                 resamples.weights[:, chosen]]
        assert found[name]["auroc"].draws == pytest.approx(np.array(drawn))
        assert found[name]["records"] == (members[name] & (labels == 1)).sum()
    assert found["none"] == {"auroc": None, "records": 0}


def test_within_bands(records):
    """A band's normals are its own; the mean is over the bands with both kinds, and is drawn as their draws are."""
    labels, scores = records
    bands = {"low": np.arange(60) < 25, "high": np.arange(60) >= 25, "normal": labels == 0, "empty": np.zeros(60, bool)}
    found = metrics.rank_within(labels, scores, bands, Resamples(np.arange(60), 100))
    values = [roc_auc_score(labels[bands[name]], scores[bands[name]]) for name in ("low", "high")]
    assert [found["bands"][name]["value"] for name in ("low", "high")] == pytest.approx(values)
    assert found["bands"]["normal"] is None and found["bands"]["empty"] is None
    assert found["macro"]["value"] == pytest.approx(np.mean(values))
    assert found["macro"].draws == pytest.approx((found["bands"]["low"].draws + found["bands"]["high"].draws) / 2)


def test_points_pooled_and_per_record(points):
    """Pooled takes all annotated points, per record averages; excluded points and one-sided records are out."""
    labels, maps = points
    ranking = PointRanking(labels, maps, Resamples(np.arange(9), 40))
    scored = labels <= 1
    pooled = ranking.pool()
    assert pooled["auroc"]["value"] == pytest.approx(roc_auc_score(labels[scored], maps[scored]), abs=1e-12)
    assert pooled["average_precision"]["value"] == pytest.approx(
        average_precision_score(labels[scored], maps[scored]), abs=1e-12)
    own = [roc_auc_score(label[mask], score[mask]) for label, score, mask in zip(labels[:7], maps, scored)]
    averaged = rank_places(labels, None, maps)[:, 0]
    assert averaged[:7] == pytest.approx(own) and np.isnan(averaged[7:]).all()


def test_point_intervals_are_those_of_a_plain_bootstrap(points):
    """Resampling histograms of records is resampling the records: points of a record stay together."""
    labels, maps = points
    resamples = Resamples(np.arange(9), 40)
    plain = []
    for row in resamples.weights.astype(int):
        drawn = np.repeat(np.arange(9), row)
        mask = labels[drawn] <= 1
        truth, scores = labels[drawn][mask], maps[drawn][mask]
        plain.append((roc_auc_score(truth, scores), average_precision_score(truth, scores)))
    found = PointRanking(labels, maps, resamples).pool()
    for place, estimate in enumerate(found.values()):
        assert estimate.draws == pytest.approx(np.array(plain)[:, place], abs=(1e-4, 1e-2)[place])


def test_bins_move_no_number():
    """On continuous scores the bins move AUROC and its resamples by less than 1e-4, of one lead alone by 1e-3."""
    rng = np.random.default_rng(6)
    labels = (rng.random((24, 4800, 12)) < 0.1).astype(np.uint8)
    maps = rng.gamma(2 + labels).astype(np.float32)
    maps[..., 6] += 50                                                      # a lead with a scale of its own
    all_once = Resamples(np.arange(24), 1)
    all_once.weights = np.ones((1, 24), np.float32)
    ranking = PointRanking(labels, maps, all_once)
    exact, lead = ranking.pool()["auroc"], ranking.pool_part(np.arange(12) == 6)
    assert exact.draws == pytest.approx(exact["value"], abs=1e-4)
    assert lead["value"] == pytest.approx(lead.draws[0]) == pytest.approx(
        roc_auc_score(labels[..., 6].ravel(), maps[..., 6].ravel()), abs=1e-3)


def test_differences_are_paired(records):
    """A score less itself shifted by noise has a narrower interval than both; without an interval there is none."""
    labels, scores = records
    resamples = Resamples(np.arange(60))
    one, other = (metrics.rank_records(labels, scores + shift, resamples)["auroc"]
                  for shift in (0, np.random.default_rng(8).normal(0, 0.1, 60)))
    gap = metrics.difference(one, other)
    assert gap["value"] == pytest.approx(one["value"] - other["value"])
    assert gap["high"] - gap["low"] < 0.5 * (one["high"] - one["low"])
    assert metrics.difference(one, one) == {"value": 0, "low": 0, "high": 0}
    alone = metrics.Estimate(0.5, None, None, one.draws)
    assert metrics.difference(one, alone)["low"] is None


@pytest.mark.parametrize("number", [1, 4, 5])
def test_few_records_have_no_interval(points, number):
    """One or four records say nothing of how sure a number is: it is given alone, five get an interval."""
    labels, maps = points
    ranking = PointRanking(labels[:number], maps[:number], Resamples(np.arange(number), 40))
    averaged = average_places(rank_places(labels[:number], None, maps[:number]), ranking.resamples)["per_record"]
    for found in (averaged, ranking.pool()["auroc"]):
        assert (found["low"] is None) == (found["high"] is None) == (number < 5) and 0 < found["value"] < 1


@pytest.mark.parametrize("abnormal, normal, found, false_alarms, sure", [
    (4, 40, 4, 6, {"specificity", "precision"}), (40, 4, 30, 1, {"sensitivity", "precision", "f1"}),
    (40, 40, 3, 1, {"sensitivity", "specificity"}), (1, 1, 1, 0, set()),
    (9, 9, 5, 0, {"sensitivity", "specificity", "precision", "f1"})])
def test_operating_points_of_few_records(abnormal, normal, found, false_alarms, sure):
    """A share of fewer than five records has no interval: of abnormal, of normal ones, of those called abnormal."""
    labels = np.repeat([1, 0], (abnormal, normal))
    scores = np.zeros(len(labels))
    scores[:found] = scores[abnormal:abnormal + false_alarms] = 1
    applied = metrics.operate(labels, scores, 0.5, Resamples(np.arange(len(labels)), 50))
    assert {name for name in ("sensitivity", "specificity", "precision", "f1") if applied[name]["low"] is not None} \
        == sure


def test_operating_points(records):
    """The thresholds are the best of all there are, found by trying each, and stay the same on other records."""
    labels, scores = records
    found = metrics.choose_thresholds(labels, scores)
    tried = []
    for threshold in np.unique(scores):
        (quiet, false_alarm), (missed, true) = confusion_matrix(labels, scores >= threshold)
        tried.append((threshold, true / (true + missed), quiet / (quiet + false_alarm)))
    assert found["sensitivity_90"] == max(threshold for threshold, sensitivity, _ in tried if sensitivity >= 0.9)
    assert found["youden"] == max(tried, key=lambda entry: (round(entry[1] + entry[2], 9), entry[0]))[0]
    (quiet, false_alarm), (missed, true) = confusion_matrix(labels[:30], scores[:30] >= found["youden"])
    applied = metrics.operate(labels[:30], scores[:30], found["youden"], Resamples(np.arange(30), 50))
    expected = {"sensitivity": true / (true + missed), "specificity": quiet / (quiet + false_alarm),
                "precision": true / (true + false_alarm), "f1": 2 * true / (2 * true + false_alarm + missed)}
    assert {name: applied[name]["value"] for name in expected} == pytest.approx(expected)
    nothing = metrics.operate(labels, scores, scores.max() + 1, Resamples(np.arange(60), 5))
    assert nothing["precision"] is None and nothing["sensitivity"]["value"] == 0


def test_curves_are_scikit_learns(records):
    """ROC and precision-recall pass through the points that scikit-learn finds, inside their bands."""
    labels, scores = records
    found = metrics.curves(labels, scores, Resamples(np.arange(60), 100))
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    highest = {rate: tpr[fpr == rate].max() for rate in fpr}
    for rate in (0.0, 1.0):
        assert found["tpr"][np.searchsorted(found["fpr"], rate)] == pytest.approx(highest[rate])
    assert found["tpr"] == pytest.approx(np.interp(found["fpr"], list(highest), list(highest.values())))
    precision, recall, _ = precision_recall_curve(labels, scores)
    for at in (0.25, 0.5, 1.0):
        place = np.searchsorted(found["recall"], at - 1e-9)
        reached = np.flatnonzero(recall >= at - 1e-9)[-1]
        assert found["precision"][place] == pytest.approx(precision[reached])
    assert (found["tpr_low"] <= found["tpr_high"]).all() and (found["precision_low"] <= found["precision_high"]).all()
