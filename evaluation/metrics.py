"""How good scores are, and how sure one can be: AUROC and average precision with bootstrap intervals over records.

Pure functions. Everywhere a higher score is more anomalous and label 1 is anomalous. Whatever is estimated is an
Estimate with the 95 % percentile interval of 2,000 resamples of the records, points of a record staying together (Efron
& Tibshirani 1993, chapter 13), or None where it is not defined. All scores of a split see the same resamples, so that
differences are paired.
"""
import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)              # percent
POINT_BINS = 1024                   # of equally many points, for the resamples of maps alone; moves an AUROC by < 1e-4
BINNING_SAMPLE = 1_000_000          # points that the bins are drawn from
LEAST_RECORDS = 5                   # of the rarer kind, for an interval: resampling fewer cannot say how sure one is
CURVE = np.linspace(0, 1, 201)      # false positive rates and recalls at which curves are drawn
SENSITIVITY = 0.9                   # that the first operating point asks for


def draw_records(records: int, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap weights (draws, records) float32: how often each resample holds each record; always the same."""
    rng = np.random.default_rng(0)
    return rng.multinomial(records, np.full(records, 1 / records), size=draws).astype(np.float32)


def count_by_score(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> tuple:
    """(positives, negatives) at each distinct score, ascending: (distinct,), or (draws, distinct) under weights.

    labels, scores: (N,); weights: (draws, N), how often each counts.
    """
    order = np.argsort(scores)
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
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
    found = true + np.cumsum(negative[..., ::-1], axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore"):
        return (positive * true / np.maximum(found, 1)).sum(axis=-1) / positive.sum(axis=-1)


MEASURES = {"auroc": auroc, "average_precision": average_precision}


class Estimate(dict):
    """{"value", "low", "high"}, as results.json holds it. draws: (draws,) the resamples behind it."""

    def __init__(self, value: float, low: float | None, high: float | None, draws: np.ndarray):
        super().__init__(value=value, low=low, high=high)
        self.draws = draws


def estimate(value, draws: np.ndarray, records: int) -> Estimate | None:
    """The Estimate of a value and its resamples (draws,), of which those without a class (NaN) are left out.

    records: how many there are of the rarer kind; below LEAST_RECORDS there is no interval (None).
    """
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return None
    if records < LEAST_RECORDS or not len(defined):
        return Estimate(float(value), None, None, draws)
    low, high = np.percentile(defined, INTERVAL)
    return Estimate(float(value), float(low), float(high), draws)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, paired: both must come from the same resamples."""
    sure = one["low"] is not None and other["low"] is not None
    return estimate(one["value"] - other["value"], one.draws - other.draws, LEAST_RECORDS if sure else 0)


def rank_records(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict:
    """AUROC and average precision of records: labels and scores (N,), weights (draws, N) of draw_records."""
    counts, drawn = count_by_score(labels, scores), count_by_score(labels, scores, weights)
    rarer = min(np.count_nonzero(labels == kind) for kind in (0, 1))
    return {name: estimate(measure(*counts), measure(*drawn), rarer) for name, measure in MEASURES.items()}


def rank_groups(labels: np.ndarray, scores: np.ndarray, members: dict, weights: np.ndarray) -> dict:
    """AUROC of each group of abnormal records against all normal ones: {group: {"auroc", "records"}}.

    members: {group: (N,) bool}; a normal record (label 0) is in no group.
    """
    found = {}
    for name, chosen in members.items():
        rows = np.flatnonzero((labels == 0) | (chosen & (labels == 1)))
        ranked = rank_records(labels[rows], scores[rows], weights[:, rows])
        found[name] = {"auroc": ranked["auroc"], "records": int((chosen & (labels == 1)).sum())}
    return found


class PointRanking:
    """The ranking of the points of an anomaly map, for any part of them.

    labels: (records, samples, leads), 1 anomalous, 0 normal, anything else not scored; maps: the same shape;
    weights: (draws, records) of draw_records.
    """

    def __init__(self, labels: np.ndarray, maps: np.ndarray, weights: np.ndarray):
        self.labels, self.maps, self.weights = labels, maps, weights.astype(np.float64)
        self.scored = labels <= 1
        sample = maps.reshape(-1)[np.random.default_rng(0).integers(0, maps.size, BINNING_SAMPLE)]
        edges = np.unique(np.quantile(sample, np.linspace(0, 1, POINT_BINS + 1)[1:-1]))
        self.bins = np.searchsorted(edges, maps.reshape(len(maps), -1), side="right").astype(np.uint16)
        self.number_of_bins = len(edges) + 1

    def _histograms(self, chosen: np.ndarray) -> np.ndarray:
        """Counts (records, bins) of the chosen points (records, samples, leads)."""
        chosen = np.broadcast_to(chosen, self.labels.shape).reshape(len(self.labels), -1)
        return np.stack([np.bincount(bins[mask], minlength=self.number_of_bins)
                         for bins, mask in zip(self.bins, chosen)]).astype(np.float64)

    def _resample_auroc(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """The resamples' AUROC (draws,) from histograms (records, bins).

        An AUROC counts pairs of points; the pairs of every two records are counted once, and each resample weighs them.
        """
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive @ below.T                                                  # (records, records)
        with np.errstate(invalid="ignore"):
            return ((self.weights @ pairs * self.weights).sum(axis=1)
                    / ((self.weights @ positive.sum(axis=1)) * (self.weights @ negative.sum(axis=1))))

    def pool(self, chosen=True, positive=None, measures=("auroc",)) -> dict:
        """AUROC, or all of measures, over all chosen points of all records together.

        chosen: mask that broadcasts to the maps; positive: which of them count as anomalous (default: as labelled).
        """
        chosen = self.scored & chosen
        positive = self.labels == 1 if positive is None else positive
        counts = tuple(self._histograms(chosen & kind) for kind in (positive, ~positive))
        values = count_by_score(positive[chosen], self.maps[chosen])
        contributing = min(np.count_nonzero(count.any(axis=1)) for count in counts)
        drawn = {"auroc": self._resample_auroc(*counts)}
        if "average_precision" in measures:
            drawn["average_precision"] = average_precision(*(self.weights @ count for count in counts))
        return {name: estimate(MEASURES[name](*values), drawn[name], contributing) for name in measures}

    def each_record(self) -> np.ndarray:
        """AUROC and average precision of each record's own points, (records, 2); NaN where they are of one kind."""
        return np.array([[measure(*count_by_score(label[scored], scores[scored])) for measure in MEASURES.values()]
                         if 0 < np.count_nonzero(label[scored] == 1) < scored.sum() else [np.nan, np.nan]
                         for label, scores, scored in zip(self.labels, self.maps, self.scored)])

    def average_records(self) -> dict:
        """Mean over records of their own AUROC and average precision, and the "records" with points of both kinds."""
        found = self.each_record()
        both = np.isfinite(found).all(axis=1)
        found, weights = found[both], self.weights[:, both]
        if not len(found):
            return {**dict.fromkeys(MEASURES), "records": 0}
        with np.errstate(invalid="ignore"):
            drawn = weights @ found / weights.sum(axis=1, keepdims=True)
        return {**{name: estimate(found[:, column].mean(), drawn[:, column], len(found))
                   for column, name in enumerate(MEASURES)}, "records": len(found)}

    def match_phases(self, phases: np.ndarray, names: dict) -> dict:
        """AUROC within one phase of the beat at a time, and their "mean" over the phases that have both kinds.

        phases: (records, samples, leads); names: {phase: its value}. The place in the beat is worth nothing here; which
        record and which lead is abnormal still is. The mean has an interval where each of its phases has one.
        """
        found = {name: self.pool(phases == code)["auroc"] for name, code in names.items()}
        defined = [value for value in found.values() if value]
        sure = all(value["low"] is not None for value in defined)
        found["mean"] = estimate(np.mean([value["value"] for value in defined]),
                                 np.mean([value.draws for value in defined], axis=0),
                                 LEAST_RECORDS if sure else 0) if defined else None
        return found


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


def operate(labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray) -> dict:
    """Sensitivity, specificity, precision and F1 of "abnormal where score >= threshold", and the threshold.

    Each has an interval where it is a share of enough records; F1 where precision and sensitivity have one.
    """
    called = scores >= threshold
    kinds = np.stack([called & (labels == 1), called & (labels == 0), ~called & (labels == 1), ~called & (labels == 0)])

    def measures(counts):
        true, false_alarm, missed, quiet = counts
        with np.errstate(invalid="ignore"):
            return {"sensitivity": true / (true + missed), "specificity": quiet / (quiet + false_alarm),
                    "precision": true / (true + false_alarm), "f1": 2 * true / (2 * true + false_alarm + missed)}
    values = measures(kinds.sum(axis=1).astype(np.float64))
    drawn = measures(kinds.astype(np.float64) @ weights.T)
    abnormal, normal, positive = (np.count_nonzero(kind) for kind in (labels == 1, labels == 0, called))
    records = {"sensitivity": abnormal, "specificity": normal, "precision": positive, "f1": min(abnormal, positive)}
    return {"threshold": threshold, **{name: estimate(values[name], drawn[name], records[name]) for name in values}}


def curves(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict:
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

    drawn = np.array([trace(*counts) for counts in zip(*count_by_score(labels, scores, weights))])
    (tpr, precision), (low, high) = trace(*count_by_score(labels, scores)), np.percentile(drawn, INTERVAL, axis=0)
    return {"fpr": CURVE, "tpr": tpr, "tpr_low": low[0], "tpr_high": high[0],
            "recall": CURVE, "precision": precision, "precision_low": low[1], "precision_high": high[1]}
