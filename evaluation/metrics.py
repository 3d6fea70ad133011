"""How good the scores of records are, and how sure one can be: AUROC and more, with bootstrap intervals over patients.

Pure functions. Everywhere a higher score is more anomalous and label 1 is abnormal. Whatever is estimated is an
Estimate with the 95 % percentile interval of 2,000 resamples of the patients (Efron & Tibshirani 1993, chapter 13), or
None where it is not defined. All scores of a split see the same resamples, so that differences are paired.
"""
import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)              # percent
LEAST_PATIENTS = 5                  # of the rarer kind, for an interval: resampling fewer cannot say how sure one is
CURVE = np.linspace(0, 1, 201)      # false positive rates and recalls at which curves are drawn
SENSITIVITY = 0.9                   # that the first operating point asks for


class Resamples:
    """Bootstrap resamples of patients, always the same; the records and points of a patient stay together.

    patients: (records,) a name or number of whose record it is; weights: (draws, records) float32, how often each
    resample holds each record.
    """

    def __init__(self, patients: np.ndarray, draws: int = DRAWS):
        _, first, self.patients = np.unique(patients, return_index=True, return_inverse=True)
        self.patients = np.argsort(np.argsort(first))[self.patients]        # numbered as they come
        number = len(first)
        counts = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=draws)
        self.weights = counts.astype(np.float32)[:, self.patients]

    def count(self, rows: np.ndarray) -> int:
        """How many patients these records are of. rows: (records,) bool."""
        return len(np.unique(self.patients[rows]))

    def rarer(self, labels: np.ndarray, rows: np.ndarray) -> int:
        """How many patients the rarer class has among these records. labels: (records,); rows: (records,) bool."""
        return min(self.count(rows & (labels == kind)) for kind in (0, 1))


class Estimate(dict):
    """{"value", "low", "high"}, as results.json holds it. draws: (draws,) the resamples behind it."""

    def __init__(self, value: float, low: float | None, high: float | None, draws: np.ndarray):
        super().__init__(value=value, low=low, high=high)
        self.draws = draws


def estimate(value, draws: np.ndarray, patients: int) -> Estimate | None:
    """The Estimate of a value and its resamples (draws,), of which those without a class (NaN) are left out.

    patients: how many there are of the rarer kind; below LEAST_PATIENTS there is no interval (None).
    """
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return None
    if patients < LEAST_PATIENTS or not len(defined):
        return Estimate(float(value), None, None, draws)
    low, high = np.percentile(defined, INTERVAL)
    return Estimate(float(value), float(low), float(high), draws)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, paired: both must come from the same resamples."""
    sure = one["low"] is not None and other["low"] is not None
    return estimate(one["value"] - other["value"], one.draws - other.draws, LEAST_PATIENTS if sure else 0)


def average(estimates: list) -> Estimate | None:
    """The mean of those that are defined, with an interval where each of these has one."""
    defined = [one for one in estimates if one is not None]
    if not defined:
        return None
    sure = all(one["low"] is not None for one in defined)
    return estimate(np.mean([one["value"] for one in defined]), np.mean([one.draws for one in defined], axis=0),
                    LEAST_PATIENTS if sure else 0)


def count_by_score(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> tuple:
    """(positives, negatives) at each distinct score, ascending: (distinct,), or (draws, distinct) under weights.

    labels, scores: (N,); weights: (draws, N), how often each counts.
    """
    order = np.argsort(scores)
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][:len(order)])
    positive = labels[order] == 1
    counted = np.ones(len(order)) if weights is None else weights[:, order]
    return tuple(np.add.reduceat(counted * kind, starts, axis=-1, dtype=np.float64) for kind in (positive, ~positive))


def auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """AUROC from counts (..., distinct scores), ascending; ties count half. NaN where a class is empty."""
    below = np.cumsum(negative, axis=-1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=-1) / (positive.sum(axis=-1) * negative.sum(axis=-1))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Average precision from counts (..., distinct scores), ascending: the precision at each threshold, weighted by
    the recall that it adds, without interpolation. NaN where nothing is positive."""
    true = np.cumsum(positive[..., ::-1], axis=-1)[..., ::-1]
    called = true + np.cumsum(negative[..., ::-1], axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore"):
        return (positive * true / np.maximum(called, 1)).sum(axis=-1) / positive.sum(axis=-1)


MEASURES = {"auroc": auroc, "average_precision": average_precision}


def detection_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """AUROC over records: labels (N,) with 1 = abnormal, scores (N,), higher = more anomalous."""
    return float(auroc(*count_by_score(labels, scores)))


def rank_records(labels: np.ndarray, scores: np.ndarray, resamples: Resamples) -> dict:
    """AUROC and average precision of records: labels and scores (N,)."""
    counts, resampled = count_by_score(labels, scores), count_by_score(labels, scores, resamples.weights)
    rarer = resamples.rarer(labels, np.full(len(labels), True))
    return {name: estimate(measure(*counts), measure(*resampled), rarer) for name, measure in MEASURES.items()}


def normals_below(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How many normal records score lower than each abnormal one, equal ones counted half: (draws, abnormal)."""
    normal = np.flatnonzero(labels == 0)
    normal = normal[np.argsort(scores[normal])]
    counted = np.cumsum(np.pad(weights[:, normal], ((0, 0), (1, 0))), axis=1, dtype=np.float64)
    lower, not_higher = (np.searchsorted(scores[normal], scores[labels == 1], side) for side in ("left", "right"))
    return (counted[:, lower] + counted[:, not_higher]) / 2


def rank_groups(labels: np.ndarray, scores: np.ndarray, members: dict, resamples: Resamples) -> dict:
    """AUROC of each group of abnormal records against all normal ones: {group: {"auroc", "records"}}.

    members: {group: (N,) bool}; a normal record (label 0) is in no group.
    """
    if not members:
        return {}
    groups = np.stack([chosen[labels == 1] for chosen in members.values()], axis=1).astype(np.float64)  # (abnormal, G)

    def aurocs(weights):
        abnormal, normals = weights[:, labels == 1], weights[:, labels == 0].sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return (normals_below(labels, scores, weights) * abnormal) @ groups / ((abnormal @ groups) * normals)
    values, resampled = aurocs(np.ones((1, len(labels))))[0], aurocs(resamples.weights)
    return {name: {"auroc": estimate(values[place], resampled[:, place],
                                     resamples.rarer(labels, chosen | (labels == 0))),
                   "records": int(groups[:, place].sum())} for place, (name, chosen) in enumerate(members.items())}


def rank_within(labels: np.ndarray, scores: np.ndarray, bands: dict, resamples: Resamples) -> dict:
    """AUROC among the records of one band at a time, and the mean over those that have both kinds.

    bands: {name: (N,) bool}. Returns {"macro": Estimate or None, "bands": {name: Estimate or None}}.
    """
    aurocs = {}
    for name, rows in bands.items():
        counts = (count_by_score(labels[rows], scores[rows], weights)
                  for weights in (None, resamples.weights[:, rows])) if rows.any() else ()
        ranked = [auroc(*pair) for pair in counts]
        aurocs[name] = estimate(*ranked, resamples.rarer(labels, rows)) if ranked else None
    return {"macro": average(list(aurocs.values())), "bands": aurocs}


def best_threshold(labels: np.ndarray, scores: np.ndarray, least_precision: float = 0.0) -> float | None:
    """The highest threshold with the best F1 of "abnormal where score >= threshold", of those with the precision.

    labels, scores: (records,). None where no threshold has it.
    """
    true, false = (np.cumsum(count[::-1])[::-1] for count in count_by_score(labels, scores))
    f1 = np.where(true >= least_precision * (true + false), 2 * true / (true + false + (labels == 1).sum()), 0)
    return float(np.unique(scores)[f1 >= f1.max() - 1e-12].max()) if f1.any() else None


def add_z(scores: list, normal: np.ndarray) -> np.ndarray:
    """Scores (records,) added, each as its z-score among the normals (records,) bool."""
    return sum((score - score[normal].mean()) / max(score[normal].std(), 1e-12) for score in scores)


def choose_thresholds(labels: np.ndarray, scores: np.ndarray) -> dict:
    """Operating points of records (N,) to hold against scores >= threshold.

    "sensitivity_90": the highest threshold that finds 90 % of the abnormal ones; "youden": the highest that maximises
    sensitivity + specificity - 1 (Youden 1950, Cancer 3:32).
    """
    positive, negative = count_by_score(labels, scores)
    thresholds = np.unique(scores)
    sensitivity = np.cumsum(positive[::-1])[::-1] / positive.sum()
    specificity = 1 - np.cumsum(negative[::-1])[::-1] / negative.sum()
    best = (sensitivity + specificity).max()
    return {"sensitivity_90": float(thresholds[sensitivity >= SENSITIVITY].max()),
            "youden": float(thresholds[sensitivity + specificity >= best - 1e-12].max())}


def operate(labels: np.ndarray, scores: np.ndarray, threshold: float, resamples: Resamples) -> dict:
    """Sensitivity, specificity, precision and F1 of "abnormal where score >= threshold", and the threshold.

    Each has an interval where it is a share of enough patients; F1 where precision and sensitivity have one.
    """
    called = scores >= threshold
    kinds = np.stack([called & (labels == 1), called & (labels == 0), ~called & (labels == 1), ~called & (labels == 0)])

    def measures(counts):
        true, false_alarm, missed, quiet = counts
        with np.errstate(invalid="ignore"):
            return {"sensitivity": true / (true + missed), "specificity": quiet / (quiet + false_alarm),
                    "precision": true / (true + false_alarm), "f1": 2 * true / (2 * true + false_alarm + missed)}
    values = measures(kinds.sum(axis=1).astype(np.float64))
    resampled = measures(kinds.astype(np.float64) @ resamples.weights.T)
    abnormal, normal, positive = (resamples.count(kind) for kind in (labels == 1, labels == 0, called))
    patients = {"sensitivity": abnormal, "specificity": normal, "precision": positive, "f1": min(abnormal, positive)}
    estimates = {name: estimate(values[name], resampled[name], patients[name]) for name in values}
    return {"threshold": threshold, **estimates}


def curves(labels: np.ndarray, scores: np.ndarray, resamples: Resamples) -> dict:
    """ROC and precision-recall curves of records (N,) with pointwise intervals, each array (201,).

    Keys: fpr, tpr, tpr_low, tpr_high (linear between thresholds), recall, precision, precision_low, precision_high (at
    the highest threshold that reaches the recall).
    """
    def trace(positive, negative):
        true, false_alarm = (np.r_[0, np.cumsum(count[::-1])] for count in (positive, negative))
        tpr, fpr = true / max(true[-1], 1), false_alarm / max(false_alarm[-1], 1)
        last = np.r_[np.flatnonzero(np.diff(fpr)), len(fpr) - 1]        # the highest point of each vertical step
        reached = np.minimum(np.searchsorted(tpr, CURVE - 1e-12), len(tpr) - 1)
        reached = np.maximum(reached, np.flatnonzero(true)[0] if true[-1] else 0)
        return np.interp(CURVE, fpr[last], tpr[last]), true[reached] / np.maximum((true + false_alarm)[reached], 1)

    resampled = np.array([trace(*counts) for counts in zip(*count_by_score(labels, scores, resamples.weights))])
    (tpr, precision), (low, high) = trace(*count_by_score(labels, scores)), np.percentile(resampled, INTERVAL, axis=0)
    return {"fpr": CURVE, "tpr": tpr, "tpr_low": low[0], "tpr_high": high[0],
            "recall": CURVE, "precision": precision, "precision_low": low[1], "precision_high": high[1]}
