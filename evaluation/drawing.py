"""Which figures a report has: charts of all scores, and records of the benchmark. Each is named as its file is."""
import numpy as np

from ecg.arrays import EXCLUDED
from ecg.lesions import MAKERS
from evaluation import charts, figures, metrics
from evaluation.detection import Cohort
from evaluation.lesions import figure_name
from evaluation.localization import example_names
from evaluation.numbers import GROUPINGS, best_rival, group_titles, name_entries, name_rivals

GROUP_CHARTS = ("by_superclass", "by_statement", "by_diagnosis", "by_lead",
                "lesions_within_record_and_phase", "lesions_within_record_and_lead")
CHARTS = ("detection_curves", "score_histograms", *(f"auroc_{grouping}" for grouping in GROUP_CHARTS),
          "learning_curves")


def figure_names() -> list:
    """The name of every figure that a report may have."""
    return [*CHARTS, *(f"localization_{name}" for name in example_names()), *map(figure_name, MAKERS)]


def draw_detection(cohort: Cohort, scores: dict, entries: dict) -> dict:
    """{name: Figure}: the curves of scores {name: {"test": (records,), ...}}, and histograms of the protocols'."""
    if not scores:
        return {}
    of_test = {name: np.asarray(score["test"]) for name, score in scores.items()}
    curves = {name: {**metrics.curves(cohort.labels, score, cohort.resamples),
                     **metrics.rank_records(cohort.labels, score, cohort.resamples)} for name, score in of_test.items()}
    drawings = {"detection_curves": charts.draw_detection_curves(curves, float(cohort.labels.mean()))}
    if entries:
        thresholds = {name: {kind: point["threshold"] for kind, point in
                             (entry["detection"]["operating_points"] or {}).items()} for name, entry in entries.items()}
        drawings["score_histograms"] = charts.draw_score_histograms({name: of_test[name] for name in entries},
                                                                    cohort.labels, thresholds)
    return drawings


def draw_groups(entries: dict, baselines: dict) -> dict:
    """{name: Figure}: AUROCs by group, those of every protocol and of the best score without a network."""
    rivals, values, drawings = name_rivals(baselines), name_entries(entries), {}
    for grouping in GROUP_CHARTS:
        groups = {title: {**{name: of[number] for name, of in values.items() if number in of},
                          "best without a network": best_rival(rivals, number)[1]}
                  for number, title in group_titles(entries, baselines, grouping).items()}
        if groups:
            drawings[f"auroc_{grouping}"] = charts.draw_group_aurocs(groups, GROUPINGS[grouping])
    return drawings


def draw_examples(titles: dict, lead_names: tuple, unit: str, labels: np.ndarray, restorations: tuple,
                  rare: bool = False) -> dict:
    """{name: Figure} of records that were chosen.

    titles: {name: title}, a record each; labels: (n, 4800, leads); restorations: (ECGs, restored, maps), as labels
    each; unit: of the first two; rare: whether maps are rarities, see figures.Example.
    """
    truth = np.where(labels <= 1, labels, EXCLUDED).astype(np.uint8)
    return {name: figures.draw_record(figures.Example(title, unit, lead_names, ecg, restored, marks, scores, rare=rare))
            for (name, title), marks, ecg, restored, scores in zip(titles.items(), truth, *restorations)}


def draw_training(history: list) -> dict:
    """{name: Figure}: the learning curves, where the checkpoint holds its history. history: rows of history.csv."""
    return {"learning_curves": charts.draw_learning_curves(history)} if history else {}
