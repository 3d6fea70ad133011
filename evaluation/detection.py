"""Which records are abnormal: every number of detection, from scores and labels alone.

A score is a dict {"test": (records,), "val": (records,)}, fold 9 only where it is there.
"""
from collections import Counter
from dataclasses import dataclass

import numpy as np

from evaluation import metrics
from evaluation.splits import Split

SUPERCLASSES = ("MI", "STTC", "CD", "HYP")
LEAST_RECORDS = 20                      # of a statement, to be reported
BAND_EDGES = (0, 40, 55, 65, 75)        # years; a band holds its lower edge, and not its upper one


@dataclass
class Cohort:
    """Who stands behind the numbers of detection: the test records, and the labels of fold 9 where it is there.

    superclasses, statements, age_bands: {name: (records,) bool}, empty where no table tells them.
    """
    labels: np.ndarray
    resamples: metrics.Resamples
    superclasses: dict
    statements: dict
    age_bands: dict
    fold9_labels: np.ndarray | None


def open_cohort(splits: dict) -> Cohort:
    """The Cohort of the splits "test" and, where it is there, "val"."""
    test, fold9 = splits["test"], splits.get("val")
    return Cohort(np.asarray(test.labels), metrics.Resamples(test.patients), *group_members(test),
                  split_ages(test.table.get("age")), None if fold9 is None else np.asarray(fold9.labels))


def group_members(split: Split) -> tuple:
    """({superclass: (N,) bool}, {statement: (N,) bool}), statements with enough abnormal records only."""
    nothing = [""] * len(split.records)
    superclasses, statements = ([str(text).split() for text in split.table.get(name, nothing)]
                                for name in ("superclasses", "statements"))
    counted = Counter(code for codes, label in zip(statements, split.labels) if label == 1 for code in set(codes))

    def members(entries, codes):
        return {code: np.array([code in entry for entry in entries]) for code in codes}
    return (members(superclasses, [name for name in SUPERCLASSES if any(name in entry for entry in superclasses)]),
            members(statements, sorted(code for code, number in counted.items() if number >= LEAST_RECORDS)))


def split_ages(ages: np.ndarray | None) -> dict:
    """{"0-40": (N,) bool, ...} of ages (N,) in years; NaN is in no band. Empty where no age is known."""
    if ages is None or not np.isfinite(ages).any():
        return {}
    return {f"{low}-{high if high < np.inf else ''}": (ages >= low) & (ages < high)
            for low, high in zip(BAND_EDGES, (*BAND_EDGES[1:], np.inf))}


def evaluate_detection(cohort: Cohort, scores: dict) -> dict:
    """All of detection for one score: AUROC, average precision, within age bands, both groupings, and the operating
    points that fold 9 sets, where it was scored."""
    of_test = np.asarray(scores["test"])
    numbers = metrics.rank_records(cohort.labels, of_test, cohort.resamples)
    numbers["within_age_bands"] = metrics.rank_within(cohort.labels, of_test, cohort.age_bands, cohort.resamples)
    for name, members in (("by_superclass", cohort.superclasses), ("by_statement", cohort.statements)):
        numbers[name] = metrics.rank_groups(cohort.labels, of_test, members, cohort.resamples)
    numbers["operating_points"] = None
    if cohort.fold9_labels is not None:
        thresholds = metrics.choose_thresholds(cohort.fold9_labels, scores["val"])
        numbers["operating_points"] = {name: metrics.operate(cohort.labels, of_test, threshold, cohort.resamples)
                                     for name, threshold in thresholds.items()}
    return numbers


def combine(parts: list, fold9_labels: np.ndarray) -> dict:
    """The score "combined": the sum of scores, each as its z-score among the normals of fold 9.

    parts: scores of both splits, fitted to other records than fold 9's normals.
    """
    normal = np.concatenate([fold9_labels == 0, np.zeros(len(parts[0]["test"]), dtype=bool)])
    combined = metrics.add_z([np.concatenate([part["val"], part["test"]]) for part in parts], normal)
    return {"val": combined[:len(fold9_labels)], "test": combined[len(fold9_labels):]}
