"""How good the diagnosis of many statements is, by group: means over statements, with intervals over patients."""
import warnings

import numpy as np

from diagnosis.arrays import GROUPS
from evaluation.metrics import MEASURES as RANKED
from evaluation.metrics import LEAST_PATIENTS, Estimate, Resamples, count_by_score, difference, estimate, operate

MEASURES = ("auroc", "average_precision", "sensitivity", "specificity")
ALL = "all"
DRAWS_AT_ONCE = 100             # resamples, of thousands of records: they stay in the cache


def rank_statement(labels: np.ndarray, scores: np.ndarray, resamples: Resamples) -> dict:
    """What evaluation.metrics.rank_records gives, at a fifth of its time for thousands of records and few positives.

    Only where a record stands among the positives matters, so negatives between two of them share one score.
    """
    present = np.unique(scores[labels == 1])
    places = np.searchsorted(present, scores, "left") + np.searchsorted(present, scores, "right")
    rarer, ranked = resamples.rarer(labels, np.full(len(labels), True)), {}
    counts = count_by_score(labels, places)
    resampled = [count_by_score(labels, places, resamples.weights[start:start + DRAWS_AT_ONCE])
                 for start in range(0, len(resamples.weights), DRAWS_AT_ONCE)]
    for name, measure in RANKED.items():
        ranked[name] = estimate(measure(*counts), np.concatenate([measure(*some) for some in resampled]), rarer)
    return ranked


def measure_statement(labels: np.ndarray, scores: np.ndarray, threshold: float | None, resamples: Resamples) -> dict:
    """Estimates of MEASURES of one statement, None where not defined. labels, scores: (N,); threshold: of fold 9."""
    ranked = rank_statement(labels, scores, resamples)
    operated = operate(labels, scores, threshold, resamples) if threshold is not None else {}
    return {name: ranked.get(name) or operated.get(name) for name in MEASURES}


def macro(estimates: list) -> Estimate | None:
    """The mean over statements; in each resample, over those that have a positive in it."""
    defined = [one for one in estimates if one is not None]
    if not defined:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)             # a resample without any positive: NaN, left out
        draws = np.nanmean([one.draws for one in defined], axis=0)
    return estimate(np.mean([one["value"] for one in defined]), draws, LEAST_PATIENTS)


def by_group(statements: list, group_of: list) -> dict:
    """{group: {measure: Estimate or None}} of statements' measures. group_of: the group of each statement."""
    return {group: {name: macro([one[name] for one, own in zip(statements, group_of) if group in (own, ALL)])
                    for name in MEASURES} for group in (*GROUPS, ALL)}


def subtract(one: dict, other: dict) -> dict:
    """Paired differences of what by_group gives, one - other."""
    return {group: {name: difference(value, other[group][name]) if value and other[group][name] else None
                    for name, value in measures.items()} for group, measures in one.items()}
