"""How good the diagnosis of many statements is, by group: means over statements, with intervals over patients."""
import warnings

import numpy as np

from diagnosis.arrays import GROUPS
from evaluation.metrics import LEAST_PATIENTS, Estimate, Resamples, difference, estimate, operate, rank_records

MEASURES = ("auroc", "average_precision", "sensitivity", "specificity")
ALL = "all"


def measure_statement(labels: np.ndarray, scores: np.ndarray, threshold: float | None, resamples: Resamples) -> dict:
    """Estimates of MEASURES of one statement, None where not defined. labels, scores: (N,); threshold: of fold 9."""
    ranked = rank_records(labels, scores, resamples)
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
