"""evaluation.py: which records and points stand behind each number of the report."""
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation import numbers
from ecg import ludb
from numbers.report import detection_table, print_details, print_table


@pytest.fixture
def table():
    """A table of 90 test records and 40 of fold 9, as test.py makes it."""
    rng = np.random.default_rng(0)
    splits, scores = [], []
    for name, number in (("test", 90), ("val", 40)):
        labels = (np.arange(number) % 3 > 0).astype(int)
        classes = np.where(labels == 0, "NORM", np.where(np.arange(number) % 2, "MI", "CD HYP"))
        statements = np.where(labels == 0, "NORM SR", np.where(np.arange(number) % 4, "IMI SR", "LAFB"))
        splits.append(SimpleNamespace(name=name, labels=labels, records={
            "ecg_id": np.arange(number), "superclasses": classes, "statements": statements}))
        scores.append(rng.normal(labels, 1))
    return detection_table(splits, {"clean": scores})


def test_detection_groups(table):
    """Superclasses and statements are held against all normals; statements with fewer than 20 records are left out."""
    found = numbers.evaluate_detection(table, "clean")
    rows = table["split"] == "test"
    labels, scores, classes = (table[name][rows] for name in ("label", "clean", "superclasses"))
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert set(found["by_superclass"]) == {"MI", "CD", "HYP"} and set(found["by_statement"]) == {"IMI", "SR"}
    chosen = (labels == 0) | (classes == "MI")
    infarction = found["by_superclass"]["MI"]["auroc"]["value"]
    assert infarction == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]))
    assert found["by_superclass"]["MI"]["records"] == (classes == "MI").sum()


def test_operating_points_come_from_fold_9_alone(table):
    """Other test scores move what is reported at a threshold, never the threshold; without fold 9 there is none."""
    before = numbers.evaluate_detection(table, "clean")["operating_points"]
    changed = {**table, "clean": np.where(table["split"] == "test", table["clean"] - 1, table["clean"])}
    after = numbers.evaluate_detection(changed, "clean")["operating_points"]
    for name in ("sensitivity_90", "youden"):
        assert after[name]["threshold"] == before[name]["threshold"]
        assert after[name]["sensitivity"]["value"] < before[name]["sensitivity"]["value"]
    rows = table["split"] == "test"
    alone = {name: column[rows] for name, column in table.items()}
    assert numbers.evaluate_detection(alone, "clean")["operating_points"] is None


@pytest.fixture
def benchmark():
    """Twelve records of 300 points in twelve leads: six with hypertrophy, three of these with a scar, six without."""
    rng = np.random.default_rng(1)
    phases = rng.integers(0, 7, (12, 300, 12)).astype(np.uint8)
    diagnoses = [("Left ventricular hypertrophy.",) * (row < 6) + ("Scar formation: septal.",) * (row < 3)
                 for row in range(12)]
    labels = np.stack([ludb.mark(*pair) for pair in zip(phases, diagnoses)])
    return numbers.Benchmark(labels, phases, diagnoses, None, list(range(12)),
                                ("I", "II", "III") + ("x",) * 9)


def test_localization_groups(benchmark):
    """A diagnosis is judged on its records alone: the points that its rule marks, against those that no rule marks."""
    maps = np.random.default_rng(2).normal(benchmark.labels == 1, 1).astype(np.float32)
    found = numbers.evaluate_localization(benchmark, maps)
    assert set(found["by_diagnosis"]) == {"ventricular_hypertrophy", "scar"}
    assert [found["by_diagnosis"][key]["records"] for key in ("ventricular_hypertrophy", "scar")] == [6, 3]
    scored = benchmark.labels[:6] <= 1
    assert found["by_diagnosis"]["ventricular_hypertrophy"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(benchmark.labels[:6][scored], maps[:6][scored]), abs=2e-4)
    septal = np.zeros((3, 300, 12), bool)
    septal[:, :, [6, 7]] = benchmark.phases[:3, :, [6, 7]] == 1 + ludb.PHASES.index("QRS")
    chosen = septal | (benchmark.labels[:3] == 0)
    assert found["by_diagnosis"]["scar"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(septal[chosen], maps[:3][chosen]), abs=1e-3)
    assert set(found["phase_matched"]) == {"P", "QRS", "ST", "T", "TP", "mean"}
    assert found["phase_matched"]["P"] is None and found["phase_matched"]["QRS"] is not None    # QRS alone is marked
    assert found["phase_matched"]["mean"]["value"] == found["phase_matched"]["QRS"]["value"]


def test_examples_are_the_best_the_median_and_the_worst(benchmark):
    """Each diagnosis shows three records, by their own AUROC, not only the flattering ones."""
    quality = np.linspace(3, -3, 12)[:, None, None]
    maps = (np.random.default_rng(2).normal(0, 1, benchmark.labels.shape) + quality * (benchmark.labels == 1))
    chosen = {name: row for row, name, _ in numbers.choose_examples(benchmark, maps.astype(np.float32))}
    assert chosen == {"ventricular_hypertrophy_best": 0, "ventricular_hypertrophy_median": 3,
                      "ventricular_hypertrophy_worst": 5, "scar_best": 0, "scar_median": 1, "scar_worst": 2}


def test_mean_of_runs():
    """Mean and sample standard deviation of the headline numbers; what no run measured is not in it."""
    def run(value):
        return {"clean": {"detection": {"auroc": {"value": value}}, "localization": None}}
    found = numbers.average_runs([run(0.7), run(0.8), run(0.9)])
    assert found["clean"] == {"detection_auroc": {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1)}}


def test_each_number_is_held_against_the_best_trivial_one(table):
    """Headline and groups carry their paired difference to the best rival of the same records."""
    rows = table["split"] == "test"
    perfect, noise = table["label"] + 0.0, np.random.default_rng(5).normal(size=len(rows))
    columns = {**table, "trivial: truth": perfect, "trivial: noise": noise}
    entries, rivals = numbers.evaluate(columns, ["clean"], None, {}, {})
    assert set(rivals["detection"]) == {"truth", "noise"} and "localization" not in rivals
    beyond = entries["clean"]["beyond_trivial"]
    assert {"detection", "by_superclass: MI", "by_statement: IMI"} <= set(beyond)
    for number, own in (("detection", entries["clean"]["detection"]["auroc"]),
                        ("by_superclass: MI", entries["clean"]["detection"]["by_superclass"]["MI"]["auroc"])):
        assert beyond[number]["rival"] == "truth" and beyond[number]["value"]["value"] == 1
        assert beyond[number]["difference"]["value"] == pytest.approx(own["value"] - 1)
        assert beyond[number]["difference"]["high"] < 0


def test_what_is_printed(table, benchmark, capsys):
    """A star where a headline number is a result and nowhere else, and a line with its verdict for each group."""
    rng = np.random.default_rng(6)
    columns = {**table, "paper": rng.normal(size=len(table["label"])),
               "trivial: noise": rng.normal(size=len(table["label"]))}
    maps = {name: rng.normal(benchmark.labels * (name == "clean"), 1).astype(np.float32) for name in ("paper", "clean")}
    maps["clean"][3:] = -maps["clean"][3:]              # good in three records: pooled it is not shown to be better
    noise = {"noise of points": rng.normal(size=benchmark.labels.shape).astype(np.float32)}
    entries, baselines = numbers.evaluate(columns, ["paper", "clean"], benchmark, maps, noise)
    print_table(entries, baselines)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "[" in line and ";" not in line}
    assert rows["clean"].count("*") == 1 and "*" not in rows["paper"] and "*" not in rows["trivial:"]
    assert f"{entries['clean']['detection_auroc']:.4f}" in rows["clean"].split("*")[0]
    print_details(entries)
    lines = [line.strip() for line in capsys.readouterr().out.split("clean: detection")[1].splitlines()]
    for name, value in (("MI (30 records)", entries["clean"]["detection"]["by_superclass"]["MI"]["auroc"]),
                        ("SR (45 records)", entries["clean"]["detection"]["by_statement"]["SR"]["auroc"]),
                        ("within III", entries["clean"]["localization"]["by_lead"]["III"]),
                        ("within QRS points", entries["clean"]["localization"]["phase_matched"]["QRS"]),
                        ("mean over phases", entries["clean"]["localization"]["phase_matched"]["mean"])):
        line, = (line for line in lines if line.startswith(f"{name}: {value['value']:.4f}"))
        assert " beyond noise" in line and line.endswith(("better", "NOT A RESULT", "too few records to say"))
    assert "within P points: -;" in lines


def test_average_of_runs_with_different_protocols():
    """Of checkpoints of which one has no calibration, what all have is averaged."""
    def run(value, *protocols):
        estimate = {"value": value, "low": None, "high": None}
        return {name: {"detection": {"auroc": estimate}, "localization": None} for name in protocols}
    for runs in ([run(0.7, "clean", "calibrated"), run(0.9, "clean")], [run(0.9, "clean"), run(0.7, "clean", "paper")]):
        averaged = numbers.average_runs(runs)
        assert set(averaged) == {"clean"} and averaged["clean"]["detection_auroc"]["mean"] == pytest.approx(0.8)
