"""Which records and points stand behind each number of the report."""
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ecg import ludb
from evaluation import detection, localization, numbers, provenance
from evaluation.metrics import Resamples


def make_split(name, number, rng):
    """A split of records, of which a third is normal, each of its own patient, and a score of them."""
    labels = (np.arange(number) % 3 > 0).astype(int)
    table = {"ecg_id": np.arange(number), "age": rng.integers(20, 90, number).astype(float),
             "superclasses": np.where(labels == 0, "NORM", np.where(np.arange(number) % 2, "MI", "CD HYP")),
             "statements": np.where(labels == 0, "NORM SR", np.where(np.arange(number) % 4, "IMI SR", "LAFB"))}
    return SimpleNamespace(name=name, labels=labels, table=table, patients=np.arange(number), records=labels)


@pytest.fixture
def splits():
    rng = np.random.default_rng(0)
    return {name: make_split(name, number, rng) for name, number in (("test", 90), ("val", 40))}


@pytest.fixture
def scores(splits):
    rng = np.random.default_rng(1)
    return {name: rng.normal(split.labels, 1) for name, split in splits.items()}


def test_detection_groups(splits, scores):
    """Superclasses and statements are held against all normals; statements with fewer than 20 records are left out."""
    found = detection.evaluate_detection(detection.open_cohort(splits), scores)
    labels, of_test, classes = splits["test"].labels, scores["test"], splits["test"].table["superclasses"]
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(labels, of_test))
    assert set(found["by_superclass"]) == {"MI", "CD", "HYP"} and set(found["by_statement"]) == {"IMI", "SR"}
    chosen = (labels == 0) | (classes == "MI")
    infarction = found["by_superclass"]["MI"]
    assert infarction["auroc"]["value"] == pytest.approx(roc_auc_score(labels[chosen], of_test[chosen]))
    assert infarction["records"] == (classes == "MI").sum()


def test_operating_points_come_from_fold_9_alone(splits, scores):
    """Other test scores move what is reported at a threshold, never the threshold; without fold 9 there is none."""
    cohort = detection.open_cohort(splits)
    before, after = (detection.evaluate_detection(cohort, {**scores, "test": of_test})["operating_points"]
                     for of_test in (scores["test"], scores["test"] - 1))
    for name in ("sensitivity_90", "youden"):
        assert after[name]["threshold"] == before[name]["threshold"]
        assert after[name]["sensitivity"]["value"] < before[name]["sensitivity"]["value"]
    alone = detection.open_cohort({"test": splits["test"]})
    assert detection.evaluate_detection(alone, {"test": scores["test"]})["operating_points"] is None


def test_combined_is_the_sum_of_z_scores_among_normals(splits, scores):
    """Each part counts in units of its spread among fold 9's normals, whatever its own scale and its abnormal ones."""
    labels, other = splits["val"].labels, {name: score ** 2 for name, score in scores.items()}
    scaled = {name: 1000 * score - 7 for name, score in other.items()}
    found = detection.combine([scores, other], labels)
    for split in ("test", "val"):
        assert found[split] == pytest.approx(detection.combine([scaled, scores], labels)[split])
    normal = labels == 0
    assert found["val"][normal].mean() == pytest.approx(0)
    alone = detection.combine([scores], labels)["val"]
    assert alone[normal].std() == pytest.approx(1) and (np.argsort(alone) == np.argsort(scores["val"])).all()


@pytest.fixture
def ludb_marks():
    """Twelve records of 300 points in twelve leads: six with hypertrophy, three of these with a scar, six without."""
    rng = np.random.default_rng(1)
    phases = rng.integers(0, 7, (12, 300, 12)).astype(np.uint8)
    diagnoses = [("Left ventricular hypertrophy.",) * (row < 6) + ("Scar formation: septal.",) * (row < 3)
                 for row in range(12)]
    labels = np.stack([ludb.mark(*pair) for pair in zip(phases, diagnoses)])
    return localization.Benchmark(labels, phases, diagnoses, list(range(12)), ("I", "II", "III") + ("x",) * 9,
                                  Resamples(np.arange(12)))


def test_localization_groups(ludb_marks):
    """A diagnosis is judged on its records alone: the points that its rule marks, against those that no rule marks."""
    maps = np.random.default_rng(2).normal(ludb_marks.labels == 1, 1).astype(np.float32)
    found = localization.evaluate_localization(ludb_marks, maps)
    assert set(found["by_diagnosis"]) == {"ventricular_hypertrophy", "scar"}
    assert [found["by_diagnosis"][key]["records"] for key in ("ventricular_hypertrophy", "scar")] == [6, 3]
    scored = ludb_marks.labels[:6] <= 1
    assert found["by_diagnosis"]["ventricular_hypertrophy"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(ludb_marks.labels[:6][scored], maps[:6][scored]), abs=2e-4)
    septal = np.zeros((3, 300, 12), bool)
    septal[:, :, [6, 7]] = ludb_marks.phases[:3, :, [6, 7]] == 1 + ludb.PHASES.index("QRS")
    chosen = septal | (ludb_marks.labels[:3] == 0)
    assert found["by_diagnosis"]["scar"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(septal[chosen], maps[:3][chosen]), abs=1e-3)
    assert found["per_record"]["records"] == 6 and found["within_record_and_lead"]["value"] > 0.6
    assert found["within_record_and_phase"] is None         # QRS is marked in all leads, so no phase holds both kinds


def test_examples_are_the_best_the_median_and_the_worst(ludb_marks):
    """Each diagnosis shows three records, by their own AUROC, not only the flattering ones."""
    quality = np.linspace(3, -3, 12)[:, None, None]
    maps = (np.random.default_rng(2).normal(0, 1, ludb_marks.labels.shape) + quality * (ludb_marks.labels == 1))
    chosen = {name: row for row, name, _ in localization.choose_examples(ludb_marks, maps.astype(np.float32), "clean")}
    assert chosen == {"ventricular_hypertrophy_best": 0, "ventricular_hypertrophy_median": 3,
                      "ventricular_hypertrophy_worst": 5, "scar_best": 0, "scar_median": 1, "scar_worst": 2}
    assert set(chosen) < set(localization.example_names())


def test_each_number_is_held_against_the_best_trivial_one(splits, scores):
    """Headline, bands and groups carry their paired difference to the best rival of the same records."""
    truth = numbers.Truth(splits, detection.open_cohort(splits), None)
    rng = np.random.default_rng(5)
    trivial = {"truth": {name: split.labels + 0.0 for name, split in splits.items()},
               "noise": {name: rng.normal(size=len(split.labels)) for name, split in splits.items()}}
    baselines = {"detection": {name: detection.evaluate_detection(truth.cohort, score)
                               for name, score in trivial.items()}}
    own = detection.evaluate_detection(truth.cohort, scores)
    beyond = numbers.beyond_trivial({"detection": own}, baselines)
    for number, value in (("detection", own["auroc"]), ("by_superclass: MI", own["by_superclass"]["MI"]["auroc"]),
                          ("within_age_bands: macro", own["within_age_bands"]["macro"]),
                          ("by_statement: IMI", own["by_statement"]["IMI"]["auroc"])):
        assert beyond[number]["rival"] == "truth" and beyond[number]["value"]["value"] == 1
        assert beyond[number]["difference"]["value"] == pytest.approx(value["value"] - 1)
    assert beyond["detection"]["difference"]["high"] < 0
    parts = numbers.beyond_parts(own, baselines["detection"])
    assert parts["truth"] == beyond["detection"]["difference"] and parts["noise"]["low"] > 0


def test_how_the_epoch_was_chosen():
    """Only the best epoch is called the best: last.pt beside it has the same config. A run that was stopped says so."""
    history = [{"epoch": epoch, "val_auroc": None, "test_auroc": auroc}
               for epoch, auroc in ((1, 0.7), (2, 0.9), (3, 0.8))]
    ended, best = {"protocol": "paper", "select": "test", "epochs": 3}, "the best on the test set, which is optimistic"
    for epoch, noted, changed, expected in (
            (2, history, {}, best), (3, history, {}, "the last one"), (1, history, {}, "not chosen by any score"),
            (2, history[:2], {}, f"{best} of a run that did not end"),
            (3, history, {"select": "last"}, "the last one"), (3, [], {"select": "last"}, "the last one"),
            (3, history, {"select": "last", "epochs": 9}, "the last one of a run that did not end"),
            (3, history, {"select": "val", "epochs": 9}, "the last one of a run that did not end"),
            (2, [], {}, best)):
        config = ended | changed
        told = provenance.tell_weights({"path": "x.pt", "config": config, "epoch": epoch, "history": noted},
                                       fold9_is_scored=True)
        assert f"epoch {epoch} of {config['epochs']}, {expected}; it saw fold 9's normals" in told
    assert "fold 9" not in provenance.tell_weights({"path": "x.pt", "config": ended, "epoch": 3, "history": history},
                                                   fold9_is_scored=False)
