"""test.py's report: its numbers, what is printed, and what is drawn.

A stand-in scores in place of the network wherever the network is not what is tested.
"""
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from report_data import (KINDS, PROTOCOLS, RIVALS, arrays, checkpoint, hashes, report_into, results_of, stand_in,
                         use_stand_in)
from sklearn.metrics import roc_auc_score

from evaluation import figures, metrics, rival
from scoring.beat_restorer import BeatRestorer


@pytest.fixture(scope="module")
def reported(arrays, checkpoint, tmp_path_factory):
    """(folder of a whole report, what was printed, the Examples that were drawn)."""
    folder, drawn, draw = tmp_path_factory.mktemp("reported") / "results", [], figures.draw_record
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch)
        patch.setattr(rival, "LEAST_FOR_MAPS", 100)
        patch.setattr(figures, "draw_record", lambda example: drawn.append(example) or draw(example))
        finished = run_script("test.py", "--data_path", arrays, "--load_path", checkpoint, "--save_maps", 1,
                              "--output_dir", folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout, drawn


def test_numbers_are_those_of_the_scores(reported, arrays):
    """AUROCs of results.json follow from the table and the maps, which are as the stand-in gave them."""
    folder, printed, _ = reported
    results, table = results_of(folder), pd.read_csv(folder / "detection_scores.csv")
    assert list(table) == ["split", "ecg_id", "patient_id", "age", "sex", "label", "superclasses", "statements",
                           *PROTOCOLS, *(f"trivial: {name}" for name in RIVALS)]
    test, fold9 = table[table["split"] == "test"], table[table["split"] == "val"]
    assert test["label"].tolist() == np.load(arrays / "label.npy").tolist()
    assert fold9["label"].tolist() == np.load(arrays / "val_label.npy").tolist()
    ecgs, normal = np.load(arrays / "test.npy"), fold9["label"] == 0
    noise = np.random.default_rng(len(ecgs)).normal(size=len(ecgs)) * 0.02
    assert test["clean"].tolist() == pytest.approx(1 / ecgs.std(axis=(1, 2)) + noise)
    parts = [(test[name] - fold9[name][normal].mean()) / fold9[name][normal].std(ddof=0)
             for name in ("clean", "trivial: no network")]
    assert test["combined"].tolist() == pytest.approx((parts[0] + parts[1]).tolist())
    for name in (*PROTOCOLS, *(f"trivial: {name}" for name in RIVALS)):
        found = results[name]["detection"] if name in PROTOCOLS else results["baselines"]["detection"][name[9:]]
        assert found["auroc"]["value"] == pytest.approx(roc_auc_score(test["label"], test[name]))
        assert found["operating_points"]["youden"]["threshold"] in fold9[name].tolist()
    truth = np.load(arrays / "benchmark_label.npy")[:, 100:4900]
    for name in ("paper", "clean"):
        maps = np.load(folder / f"localization_maps_{name}.npy")
        np.testing.assert_array_equal(maps, np.abs(np.load(arrays / "benchmark_data.npy")[:, 100:4900]))
        assert results[name]["localization_auroc_pooled"] == pytest.approx(roc_auc_score(truth.ravel(), maps.ravel()))
        assert results[name]["detection_auroc"] == results[name]["detection"]["auroc"]["value"]
        assert set(results[name]["localization"]["by_diagnosis"]) == {"scar"}
        assert results[name]["localization"]["within_record_and_phase"] is None     # marked in all leads or none
        assert results[name]["localization"]["within_record_and_lead"]["value"] == pytest.approx(
            results[name]["localization_auroc_within_record_and_lead"])
    assert results["combined"]["localization"] is None and results["combined"]["localization_auroc_pooled"] is None


def test_lesions(reported):
    """Each measure, by kind, under clean alone, beside the best map without a network of this measure and kind."""
    folder, printed, _ = reported
    results, text = results_of(folder), (folder / "report.md").read_text()
    found, rivals = results["clean"]["lesions"], results["baselines"]["lesions"]
    assert results["paper"]["lesions"] is None and results["combined"]["lesions"] is None
    assert results["clean"]["counts"]["lesions"] == dict.fromkeys(KINDS, 6)
    for measure in ("pooled", "per_record", "within_record_and_phase", "within_record_and_lead"):
        assert found[measure]["value"] == results["clean"][f"lesions_auroc_{measure}"] > 0.5
        assert set(found[measure]) == {"value", "low", "high", "by_kind"}
        for name, of in [(f"lesions_{measure}", lambda one: one)] + [
                (f"lesions_{measure}: {kind}", lambda one, kind=kind: one["by_kind"][kind]) for kind in KINDS[1:]]:
            beyond = results["clean"]["beyond_trivial"][name]
            best = max(rivals, key=lambda rival: of(rivals[rival][measure])["value"])
            assert beyond["rival"] == best and of(found[measure])["value"] - of(rivals[best][measure])["value"] \
                == pytest.approx(beyond["difference"]["value"])
    assert rivals["record's score"]["within_record_and_lead"]["value"] == 0.5
    for part in ("lesions", "localization"):
        near, far = (results["baselines"][part][f"{name} an R peak"]["within_record_and_lead"]["value"]
                     for name in ("nearness to", "distance to"))
        assert near == pytest.approx(1 - far)
    assert set(results["maps"]) == {"without network"}
    gap = results["maps"]["without network"]["beyond_trivial"]["lesions_within_record_and_lead"]
    assert gap["rival"] in rivals and "beat to beat" in rivals and "| without network | less |" in text
    assert "| P wave removed |" in text and "implanted lesions" in printed and "record's score" in rivals
    assert "lesion_p_loss.png" in results["files"] and "lesion_none.png" not in results["files"]


def test_network_of_the_maps(arrays, checkpoint, tmp_path, monkeypatch, stand_in):
    """With its weights its maps are held against the best single one and the combination without it, and figures show
    what it expects and how rare the difference is."""
    drawn, draw = [], figures.draw_record
    monkeypatch.setattr(figures, "draw_record", lambda example: drawn.append(example) or draw(example))
    monkeypatch.setattr(rival, "WEIGHTS", tmp_path / "restorer.pt")
    monkeypatch.setattr(rival, "LEAST_FOR_MAPS", 100)
    torch.manual_seed(0)
    restorer = BeatRestorer(np.zeros((103, 8)), np.ones((103, 8)), np.ones(8))
    torch.save({"model_state_dict": restorer.state_dict()}, tmp_path / "restorer.pt")
    finished = report_into(tmp_path / "results", arrays, checkpoint)
    assert finished.returncode == 0, finished.stderr
    maps = results_of(tmp_path / "results")["maps"]
    assert set(maps) == {"without network", "network", "network and beat to beat"}
    chosen, combination = (maps[name]["lesions"]["within_record_and_phase"]["value"] for name in (
        "network and beat to beat", "without network"))
    gap = maps["network and beat to beat"]["beyond_without_network"]["lesions_within_record_and_phase"]
    assert gap["value"] == pytest.approx(chosen - combination)
    assert len(drawn) == 5 and all(example.rare and "restorer of beats" in example.title for example in drawn)
    assert all(0 <= example.scores.min() and example.scores.max() <= 3.001 for example in drawn)


def test_age_bands_and_people(reported, arrays):
    """Detection within each age band, its lower edge inside; an unknown age scores as the mean of the others."""
    folder, _, _ = reported
    table = pd.read_csv(folder / "detection_scores.csv").query("split == 'test'")
    found = results_of(folder)["clean"]["detection"]["within_age_bands"]
    bands = pd.cut(table["age"], [0, 40, 55, 65, 75, 999], right=False,
                   labels=["0-40", "40-55", "55-65", "65-75", "75-"])
    values = {name: roc_auc_score(rows["label"], rows["clean"]) for name, rows in table.groupby(bands, observed=True)}
    assert {name: of["value"] for name, of in found["bands"].items()} == pytest.approx(values)
    assert found["macro"]["value"] == pytest.approx(np.mean(list(values.values())))
    age = table["age"].fillna(table["age"].mean())
    assert table["age"].isna().sum() == 1 and table["trivial: age"].tolist() == pytest.approx(age.tolist())
    usual = pd.read_csv(arrays / "train_records.csv")["age"].mean()
    assert table["trivial: |age - mean|"].tolist() == pytest.approx((age - usual).abs().tolist())
    known = table["sex"].notna()
    assert table["trivial: sex"][known].tolist() == (table["sex"][known] == "M").astype(float).tolist()


def test_intervals_are_over_patients(reported, arrays):
    """Two records of a patient are resampled together, in detection, its differences and nowhere else."""
    folder, printed, _ = reported
    results, table = results_of(folder), pd.read_csv(folder / "detection_scores.csv").query("split == 'test'")
    labels, patients = table["label"].to_numpy(), table["patient_id"].to_numpy()
    ranked = {name: metrics.rank_records(labels, table[column].to_numpy(), metrics.Resamples(patients))["auroc"]
              for name, column in (("combined", "combined"), ("clean", "clean"), ("no network", "trivial: no network"))}
    assert results["clean"]["detection"]["auroc"] == pytest.approx(ranked["clean"])
    for name in ("clean", "no network"):
        gap = metrics.difference(ranked["combined"], ranked[name])
        assert results["combined"]["beyond_parts"][name] == pytest.approx(gap)
    assert f"{len(labels)} records of {len(labels) // 2} patients" in printed
    assert results["clean"]["counts"]["patients"] == len(labels) // 2


def test_what_is_printed(reported):
    """At most 25 lines: a row a protocol and the best without a network, with their intervals; no word in capitals."""
    folder, printed, _ = reported
    results, lines = results_of(folder), printed.strip().splitlines()
    assert len(lines) <= 25
    for name in PROTOCOLS:
        auroc = {key: 100 * value for key, value in results[name]["detection"]["auroc"].items()}
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert line[26:].startswith("{value:.1f} [{low:.1f}, {high:.1f}]".format(**auroc))
    best = max(found["auroc"]["value"] for found in results["baselines"]["detection"].values())
    line = next(line for line in lines if line.startswith("best without a network"))
    assert f" {100 * best:.1f}" in line and "simulated ECGs" in printed


def test_report_is_readable_on_any_forge(reported):
    """report.md links every figure, holds every group with its difference, and says what many intervals mean.

    results.json names all other files of the folder, and their SHA-256.
    """
    folder, _, _ = reported
    results, text = results_of(folder), (folder / "report.md").read_text()
    assert results["files"] == hashes(folder)
    drawn = {name for name in results["files"] if name.endswith((".png", ".pdf"))}
    assert drawn == set(re.findall(r"\(([\w-]+\.(?:png|pdf))\)", text)) and "auroc_by_diagnosis.png" in drawn
    assert {f"localization_scar_{rank}.png" for rank in ("best", "median", "worst")} < drawn
    row, = (line for line in text.splitlines() if line.startswith("| MI (30 records)"))
    gap = results["combined"]["beyond_trivial"]["by_superclass: MI"]
    assert f"{100 * gap['difference']['value']:+.1f} [" in row and row.endswith(f" {gap['rival']} |")
    assert "one in twenty" in text and "NOT" not in text and "WORSE" not in text
    assert all(f"| {name.replace('|', chr(92) + '|')} |" in text for name in RIVALS)
    unusual = pd.read_csv(folder / "unusual_measurements.csv")
    assert (unusual.groupby("record").size() == 10).all() and set(unusual["record"]) <= set(range(4))


def test_ecg_and_restoration_are_drawn_as_what_they_are(reported, arrays):
    """Record, restoration, truth and scores of an example are those of its row, in mV."""
    drawn = [example for example in reported[2] if example.title.startswith("Record")]
    details, ecgs = np.load(arrays / "benchmark_details.npz"), np.load(arrays / "benchmark_data.npy")
    truth = np.load(arrays / "benchmark_label.npy")
    assert len(drawn) == 3
    for example in drawn:
        row = int(re.match(r"Record (\d+),", example.title)[1])
        low, high = details["low"][row], details["high"][row]
        millivolts = ((ecgs[row] + 1) / 2 * (high - low) + low)[100:4900]
        assert example.unit == "mV" and example.signal == pytest.approx(millivolts, abs=1e-5)
        assert example.restored == pytest.approx(millivolts - 0.25, abs=1e-5)
        np.testing.assert_array_equal(example.truth, truth[row, 100:4900])
        np.testing.assert_array_equal(example.scores, np.abs(ecgs[row, 100:4900]))
