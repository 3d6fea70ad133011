"""test.py as its users call it: the report's files and numbers, the authors' command line, what is refused.

A stand-in scores in place of the network wherever the network is not what is tested.
"""
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import full_disk, run_script
from sklearn.metrics import roc_auc_score
from small import TIME, read_all

import test as script
from ecg.arrays import fingerprint
from evaluation import figures, files, metrics, rival
from scoring import without_network
from scoring.beat_restorer import BeatRestorer
from scoring.passes import Scores
from utils import UserError, save_json

PROTOCOLS = ("paper", "clean", "combined")
RIVALS = ("largest amplitude", "mean |slope|", "heart rate", "RR irregularity", "age", "|age - mean|", "sex",
          "no network")
SIZES = {"train": 170, "test": 60, "val": 40, "benchmark": 4}
KINDS = ("none", "t_wave", "p_loss")


def draw_ecgs(rng, labels):
    """(records, 5000, 12) mV: a beat every 0.7 to 1 s; where the label is 1 its T wave is small."""
    rate, size = rng.uniform(0.7, 1, (len(labels), 1)), rng.normal(1, 0.2, (len(labels), 1, 12))
    time = TIME % rate - 0.3
    t_wave = np.where(labels == 1, 0.1, 0.3)[:, None] * np.exp(-((time - 0.25) / 0.05) ** 2)
    ecgs = (np.exp(-(time / 0.015) ** 2) + t_wave)[..., None] * size
    return (ecgs + rng.normal(0, 0.02, ecgs.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of arrays with tables, every patient with two records, and a benchmark with phases and diagnoses."""
    folder, rng, known = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0), {}
    for split, number in SIZES.items():
        labels = np.arange(number) % 2 * (split != "train")
        ecgs, name = draw_ecgs(rng, labels), {"benchmark": "benchmark_data"}.get(split, split)
        low, high = ecgs.min(axis=1), ecgs.max(axis=1)
        if split in ("train", "benchmark"):
            ecgs = (2 * (ecgs - low[:, None]) / (high - low)[:, None] - 1).astype(np.float32)
            phases = np.where((TIME % 0.9 < 0.3)[:, None], 3, 5) * np.ones(ecgs.shape, np.uint8)
            extra = {"phases": phases.astype(np.uint8)} if split == "benchmark" else {}
            np.savez(folder / f"{split}_details.npz", low=low, high=high, fingerprint=fingerprint(ecgs), **extra)
        np.save(folder / f"{name}.npy", ecgs)
        known[split] = {"fingerprint": fingerprint(ecgs)}
        table = pd.DataFrame({"ecg_id": np.arange(number), "patient_id": np.arange(number) // 2, "fold": 1,
                              "age": rng.integers(30, 90, number), "sex": rng.choice(["F", "M"], number),
                              "superclasses": np.where(labels, "MI", "NORM"), "statements": "SR"})
        table.loc[3, ["age", "sex"]] = [np.nan, ""]
        if split == "benchmark":
            labels = np.repeat((phases == 5)[..., :1] * labels[:, None, None], 12, axis=2).astype(np.uint8)
            table = table[["ecg_id"]].assign(diagnoses=np.where(labels.any(axis=(1, 2)), "Scar formation: septal.", ""))
        table.to_csv(folder / f"{split}_records.csv", index=False)
        if split != "train":
            np.save(folder / {"test": "label.npy"}.get(split, f"{split}_label.npy"), labels)
    known["test_lesions"] = {**draw_lesions(folder), "made_of": known["test"]["fingerprint"]}
    save_json(folder / "manifest.json", {"arrays": known, "source": {"data_set": "simulated"}})
    return folder


def draw_lesions(folder):
    """Lesions in six normals of the test set, a row of each kind: marked and higher by 0.3 mV is QRS, in five leads."""
    rows = np.repeat(np.arange(0, 12, 2), len(KINDS))
    kinds, ecgs = np.tile(KINDS, 6), np.load(folder / "test.npy")[rows]
    phases = np.repeat(np.where(TIME % 0.9 < 0.3, 3, 5).astype(np.uint8)[None], len(rows), axis=0)
    truth = ((phases == 3)[:, :, None] & (kinds != "none")[:, None, None] & (np.arange(12) < 5)).astype(np.uint8)
    ecgs += np.float32(0.3) * truth
    for name, array in (("", ecgs), ("_truth", truth), ("_phases", phases)):
        np.save(folder / f"test_lesions{name}.npy", array)
    pd.DataFrame({"ecg_id": rows, "patient_id": rows // 2, "kind": kinds, "description": "higher"}).to_csv(
        folder / "test_lesions_records.csv", index=False)
    return {"fingerprint": fingerprint(ecgs)}


class StandIn:
    """Scores without the network, as Scorer does with it; under paper the scores are worse."""

    def __init__(self, model, protocol, mask_ratio=30, amp="off"):
        self.protocol = protocol

    def score(self, records, r_peaks, rows=None, with_maps=False):
        ecgs = records.read(np.arange(len(records)) if rows is None else rows)
        noise = np.random.default_rng(len(ecgs)).normal(size=len(ecgs)) * 0.02 * (1 + self.protocol.as_stored)
        maps = np.abs(ecgs[:, 100:4900]) if with_maps else None
        return Scores(1 / ecgs.std(axis=(1, 2)) + noise, maps, 0, 0)

    def map_few(self, records, r_peaks, rows):
        return self.score(records, r_peaks, rows, with_maps=True).maps

    def restore(self, records, r_peaks, rows):
        ecgs = records.millivolts(rows)[:, 100:4900]
        return ecgs, ecgs - 0.25


def use_stand_in(patch):
    """StandIn in place of Scorer, a rival that is fitted quickly, no maps of median beats, figures of a few bytes."""
    patch.setattr(script, "Scorer", StandIn)
    patch.setattr(rival, "WEIGHTS", files.Path("absent.pt"))
    patch.setattr(rival, "LEAST_FOR_MAPS", 10 ** 6)
    patch.setattr(without_network, "CROSS_FITS", 2)
    patch.setattr(figures, "pack", lambda figure: {"png": b"png", "pdf": b"pdf"})


@pytest.fixture
def stand_in(monkeypatch):
    use_stand_in(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(published_state, tmp_path_factory):
    """A checkpoint in the published format."""
    path = tmp_path_factory.mktemp("ckpt") / "mymodel.pt"
    torch.save({"model_state_dict": published_state}, path)
    return path


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


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def hashes(folder):
    """The SHA-256 of every file but results.json."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in read_all(folder).items()
            if name != "results.json"}


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


# ---- files

def report_into(folder, arrays, checkpoint, *flags):
    return run_script("test.py", "--data_path", arrays, "--load_path", checkpoint, "--protocol", "clean", "--fold9", 0,
                      "--output_dir", folder, *flags)


@pytest.mark.parametrize("name", ["report.md", "results.json", "detection_curves.png", "localization_scar_best.pdf",
                                  "localization_maps_clean.npy", "auroc_by_lead.png/folder"])
def test_no_file_of_the_users_is_overwritten(arrays, checkpoint, tmp_path, monkeypatch, name):
    """A foreign file under a name of the report is refused before anything is scored, with the remedy."""
    monkeypatch.setattr(script, "Scorer", None)                         # it would fail
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    refusal = report_into(tmp_path, arrays, checkpoint, "--save_maps", 1).refusal
    assert name.split("/")[0] in refusal and "--output_dir" in refusal
    assert (tmp_path / name).read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("stand_in")
def test_a_later_report_replaces_what_the_earlier_one_wrote(arrays, checkpoint, tmp_path):
    """Of the earlier report goes what is unchanged; files of other names stay, and a changed one is not overwritten."""
    foreign = {"auroc_by_my_paper.pdf", "localization_maps_mine.npy", "report.md.tmp", "report.md.part"}
    for name in foreign:
        (tmp_path / name).write_text("mine")
    assert report_into(tmp_path, arrays, checkpoint).returncode == 0
    (tmp_path / "detection_curves.png").write_text("retouched")
    assert report_into(tmp_path, arrays, checkpoint).returncode == 2
    finished = report_into(tmp_path, arrays, checkpoint, "--figures", 0)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in tmp_path.iterdir()} == foreign | {"report.md", "results.json", "detection_scores.csv",
                                                                   "detection_curves.png"}
    assert (tmp_path / "detection_curves.png").read_text() == "retouched"
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)


@pytest.mark.usefixtures("stand_in")
def test_a_report_that_was_killed_is_replaced(arrays, checkpoint, tmp_path, monkeypatch):
    """Killed between two renames, what is left is of two reports, all ours: the next one replaces it."""
    assert report_into(tmp_path, arrays, checkpoint, "--figures", 0).returncode == 0
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda old, new: 1 / 0 if "csv" in new.name else replace(old, new))
        with pytest.raises(ZeroDivisionError):
            report_into(tmp_path, arrays, checkpoint, "--figures", 0, "--mask_ratio", 20)
    assert report_into(tmp_path, arrays, checkpoint, "--figures", 0, "--mask_ratio", 20).returncode == 0
    assert results_of(tmp_path)["files"] == hashes(tmp_path) and len(hashes(tmp_path)) == 2


@pytest.mark.parametrize("size", [10, 10 ** 6])
def test_full_disk_leaves_the_last_report_whole(tmp_path, size):
    """A disk that fills up while any file is written: all files of the earlier report stay as they were."""
    files.write_report(tmp_path, {"report.md": b"old", "gone.png": b"old"}, {"clean": 1})
    before = read_all(tmp_path)
    with full_disk(50_000), pytest.raises(UserError, match="could not be written .*; free some space"):
        files.write_report(tmp_path, {"report.md": b"new" * size, "a.csv": b"new"}, {"clean": "x" * 10 ** 6})
    assert read_all(tmp_path) == before


@pytest.mark.usefixtures("stand_in")
def test_several_checkpoints(arrays, checkpoint, tmp_path):
    """Each checkpoint gets a report of its own; their mean and standard deviation are written and printed."""
    shutil.copy(checkpoint, tmp_path / "other.pt")
    finished = run_script("test.py", "--data_path", arrays, "--load_path", checkpoint, tmp_path / "other.pt",
                          "--protocol", "clean", "--figures", 0, "--fold9", 0, "--output_dir", tmp_path / "results")
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {"1-mymodel", "2-other", "results.json", "report.md"}
    runs = [results_of(folder / name)["clean"]["detection_auroc"] for name in ("1-mymodel", "2-other")]
    mean = results_of(folder)["mean"]["clean"]["detection_auroc"]
    assert mean == {"mean": pytest.approx(np.mean(runs)), "sd": pytest.approx(np.std(runs, ddof=1))}
    assert f"{100 * mean['mean']:.1f} ± {100 * mean['sd']:.1f}" in finished.stdout


# ---- what is there and what is not

def test_without_a_network(arrays, tmp_path):
    """--protocol none needs no checkpoint: the rival and the trivial scores make the same report."""
    finished = run_script("test.py", "--data_path", arrays, "--protocol", "none", "--load_path", "absent.pt",
                          "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr
    results = results_of(tmp_path)
    assert set(results["baselines"]["detection"]) == set(RIVALS) and not set(PROTOCOLS) & set(results)
    assert "detection_curves.png" in results["files"] and "no network" in finished.stdout
