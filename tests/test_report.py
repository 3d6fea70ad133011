"""test.py and train.py as their users call them: the authors' command lines, the report's files, the refusals."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from sklearn.metrics import roc_auc_score
from test_ludb import write_ludb

from evaluation.metrics import LEAST_RECORDS

TEST_LINE = ("--data_path", "./data/", "--load_model", "1", "--load_path", "./ckpt/mymodel.pt")
TRIVIAL = ("largest amplitude", "mean |slope|", "heart rate", "RR irregularity", "median beat, PCA")
TRAIN_LINE = ("--data_path", "./data/", "--save_model", "1", "--save_path", "./ckpt/mymodel_new.pt")


@pytest.fixture
def workplace(simulated, published_state, tmp_path):
    """A folder as a user has it: simulated arrays in data/, a published-format checkpoint in ckpt/."""
    shutil.copytree(simulated, tmp_path / "data")
    (tmp_path / "ckpt").mkdir()
    torch.save({"model_state_dict": published_state}, tmp_path / "ckpt" / "mymodel.pt")
    return tmp_path


@pytest.fixture
def authors_workplace(simulated, published_state, tmp_path):
    """The same in the authors' layout: a few float64 rows, no sidecars, no benchmark."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "ckpt").mkdir()
    torch.save({"model_state_dict": published_state}, tmp_path / "ckpt" / "mymodel.pt")
    labels = np.load(simulated / "label.npy")
    rows = np.r_[np.flatnonzero(labels == 0)[:3], np.flatnonzero(labels == 1)[:3]]
    np.save(data / "train.npy", np.load(simulated / "train.npy")[:12].astype(np.float64))
    np.save(data / "test.npy", np.load(simulated / "test.npy")[rows].astype(np.float64))
    np.save(data / "label.npy", labels[rows].astype(np.float64))
    return tmp_path


def test_report_is_complete_and_consistent(workplace):
    """results.json, the scores and the maps agree with each other and with the arrays, and hold the provenance."""
    finished = run_script("test.py", *TEST_LINE, "--save_maps", 1, cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((workplace / "results" / "results.json").read_text())
    scores = pd.read_csv(workplace / "results" / "detection_scores.csv")
    truth = np.load(workplace / "data" / "benchmark_label.npy")[:, 100:4900]
    assert list(scores.columns) == ["split", "ecg_id", "label", "superclasses", "statements", "paper", "clean",
                                    *("trivial: " + name for name in TRIVIAL)]
    assert scores["label"].tolist() == [*np.load(workplace / "data" / "label.npy"),
                                        *np.load(workplace / "data" / "val_label.npy")]
    fold9, scores = scores[scores["split"] == "val"], scores[scores["split"] == "test"]
    assert fold9["ecg_id"].tolist() == pd.read_csv(workplace / "data" / "val_records.csv")["ecg_id"].tolist()
    assert scores["ecg_id"].tolist() == pd.read_csv(workplace / "data" / "test_records.csv")["ecg_id"].tolist()
    for protocol in ("paper", "clean"):
        entry = results[protocol]
        maps = np.load(workplace / "results" / f"localization_maps_{protocol}.npy")
        assert maps.shape == truth.shape and maps.dtype == np.float32
        assert entry["detection_auroc"] == pytest.approx(roc_auc_score(scores["label"], scores[protocol]))
        assert entry["localization_auroc_pooled"] == pytest.approx(roc_auc_score(truth.ravel(), maps.ravel()))
        per_record = [roc_auc_score(label.ravel(), score.ravel()) for label, score in zip(truth, maps)]
        assert entry["localization_auroc_per_record"] == pytest.approx(np.mean(per_record))
        assert entry["counts"]["records"] == len(scores) and entry["seconds"]["detection"] > 0
        assert f"{protocol}" in finished.stdout and f"{entry['detection_auroc']:.4f}" in finished.stdout
        assert entry["detection"]["operating_points"]["youden"]["threshold"] in fold9[protocol].tolist()
        for estimate in (entry["localization"]["pooled"]["average_precision"],
                         entry["localization"]["by_lead"]["aVF"]):
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        normal, abnormal = (int((scores["label"] == label).sum()) for label in (0, 1))
        for group in ({"auroc": entry["detection"]["auroc"], "records": abnormal},
                      *entry["detection"]["by_superclass"].values()):
            assert 0 <= group["auroc"]["value"] <= 1
            assert (group["auroc"]["low"] is None) == (min(normal, group["records"]) < LEAST_RECORDS)
    assert len(results["checkpoint"]["sha256"]) == 64 and results["device"] and results["versions"]["torch"]
    for name, found in results["baselines"]["localization"].items():
        assert f"{found['per_record']['auroc']['value']:.4f}" in finished.stdout, name
    assert set(results["baselines"]["detection"]) == set(TRIVIAL)
    assert "NOT A RESULT" in finished.stdout                            # random weights do not beat an R peak
    assert results["clean"]["beyond_trivial"]["localization_pooled"]["difference"]["value"] < 0
    assert results["data"]["audit"]["test"]["normal"] == int((scores["label"] == 0).sum())


def test_authors_lines_run_on_the_authors_layout(authors_workplace):
    """Both published command lines, word for word, on float64 arrays without sidecars and with no benchmark."""
    finished = run_script("train.py", *TRAIN_LINE, "--epochs", 1, cwd=authors_workplace)
    assert finished.returncode == 0, finished.stderr
    assert "protocol paper, epoch kept: last" in finished.stdout
    assert (authors_workplace / "data" / "train_r_peaks.npz").exists()
    finished = run_script("test.py", *TEST_LINE[:-1], "./ckpt/mymodel_new.pt", cwd=authors_workplace)
    assert finished.returncode == 0, finished.stderr
    assert "localization is skipped" in finished.stdout and "benchmark_data.npy" in finished.stdout
    results = json.loads((authors_workplace / "results" / "results.json").read_text())
    assert results["paper"]["localization_auroc_pooled"] is None and results["data"] is None
    assert results["checkpoint"]["epoch"] == 1 and "chosen by last" in finished.stdout


def test_one_protocol(authors_workplace):
    """--protocol paper scores that protocol alone, and only its column is written."""
    finished = run_script("test.py", *TEST_LINE, "--protocol", "paper", "--output_dir", "out", cwd=authors_workplace)
    assert finished.returncode == 0, finished.stderr
    columns = list(pd.read_csv(authors_workplace / "out" / "detection_scores.csv"))
    assert "paper" in columns and "clean" not in columns and "trivial: median beat, PCA" not in columns
    assert "operating points are skipped" in finished.stdout and "median beat, PCA' is skipped" in finished.stdout
    assert "clean" not in json.loads((authors_workplace / "out" / "results.json").read_text())


def test_exchanged_arrays_do_not_inherit_provenance(workplace):
    """Arrays put in the place of ours get no ecg_id and no manifest of the arrays that were there before."""
    for name in ("test.npy", "label.npy"):
        break_array(workplace / "data" / name, lambda a: a[::-1])
    finished = run_script("test.py", *TEST_LINE, "--protocol", "paper", cwd=workplace)
    assert finished.returncode == 0 and "does not describe" in finished.stdout
    assert json.loads((workplace / "results" / "results.json").read_text())["data"] is None
    scores = pd.read_csv(workplace / "results" / "detection_scores.csv")
    assert scores.loc[scores["split"] == "test", "ecg_id"].isna().all()


def test_benchmark_marked_outside_the_scored_samples(workplace):
    """A benchmark whose only points lie where nothing is scored is refused before any work, and named."""
    break_array(workplace / "data" / "benchmark_label.npy", lambda a: np.where(np.arange(5000)[:, None] < 50, 1, 0 * a))
    assert_refused(workplace, TEST_LINE, "benchmark_label.npy")


def test_machines_with_torch_alone(workplace):
    """On prepared arrays both scripts run where neither pandas, wfdb nor heartpy is installed."""
    absent = workplace / "absent"
    absent.mkdir()
    for package in ("pandas", "wfdb", "heartpy"):
        (absent / f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r})")
    for script, line in (("train.py", (*TRAIN_LINE, "--epochs", "1", "--select", "last")),
                         ("test.py", (*TEST_LINE, "--protocol", "paper"))):
        finished = run_script(script, *line, cwd=workplace, PYTHONPATH=str(absent))
        assert finished.returncode == 0, finished.stderr


def break_array(path, change):
    np.save(path, change(np.load(path)))


@pytest.mark.parametrize("name, change, message", [
    ("test.npy", lambda a: a[:, :4000], "test.npy"), ("test.npy", lambda a: a[..., :8], "test.npy"),
    ("test.npy", lambda a: np.where(np.arange(len(a))[:, None, None] == 2, np.nan, a), "row 2"),
    ("test.npy", lambda a: a.astype(int), "test.npy"), ("label.npy", lambda a: a[:-1], "label.npy"),
    ("label.npy", lambda a: a + 1, "label.npy"), ("label.npy", lambda a: a * 0, "label.npy")])
def test_bad_arrays_are_refused(authors_workplace, name, change, message):
    """An array that cannot be scored ends in one sentence that names it, exit code 2, and no report."""
    break_array(authors_workplace / "data" / name, change)
    assert_refused(authors_workplace, TEST_LINE, message)


@pytest.mark.parametrize("flags, message", [
    (("--load_path", "absent.pt"), "absent.pt"), (("--hidden", "64"), "--hidden 50"), (("--dims", "8"), "--dims 12"),
    (("--mask_ratio", "0"), "--mask_ratio"), (("--output_dir", "data/test.npy/x"), "data/test.npy/x"),
    (("--data_path", "nowhere"), "nowhere"), (("--device", "cuda"), "cuda")])
def test_bad_flags_are_refused(authors_workplace, flags, message):
    """A flag that does not fit ends in one sentence that names it, or what it should have been."""
    if flags[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert_refused(authors_workplace, (*TEST_LINE, *flags), message)


def assert_refused(folder, line, message):
    finished = run_script("test.py", *line, cwd=folder)
    last = finished.stderr.rstrip("\n").split("\n")[-1]
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    assert last.split("\r")[-1].strip().startswith("error: ") and message in last
    assert not (folder / "results").exists()


def test_untrained_network_is_said_to_be_one(authors_workplace):
    """--load_model 0 scores an untrained network, as published, and says so."""
    finished = run_script("test.py", "--load_model", 0, "--protocol", "paper", cwd=authors_workplace)
    assert finished.returncode == 0 and "untrained" in finished.stdout


def test_saved_scores_make_the_same_report(workplace):
    """--from_results needs no checkpoint: tables, numbers and figures come out as they were."""
    finished = run_script("test.py", *TEST_LINE, "--save_maps", 1, "--figures", 1, cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    first = {path.name: path.read_bytes() for path in (workplace / "results").iterdir()}
    figures = {f"{name}.{kind}" for kind in ("png", "pdf") for name in (
        "detection_curves", "score_histograms", "auroc_by_superclass", "auroc_by_lead", "localization_all_best",
        "localization_all_median", "localization_all_worst")}
    assert figures < set(first) and "localization, pooled" in finished.stdout
    shutil.rmtree(workplace / "ckpt")
    again = run_script("test.py", "--from_results", "results", "--figures", 1, "--output_dir", "again",
                       cwd=workplace)
    assert again.returncode == 0, again.stderr
    printed = [text.split("AUROC", 1)[1] for text in (finished.stdout, again.stdout)]
    assert printed[0].replace("to results\n", "to again\n") == printed[1]
    second = {path.name: path.read_bytes() for path in (workplace / "again").iterdir()}
    assert second == first


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "results" / "detection_scores.csv").write_text("split\n"), "detection_scores.csv"),
    (lambda folder: (folder / "results" / "results.json").write_text("{"), "results.json"),
    (lambda folder: (folder / "results" / "results.json").write_text("{}"), "results"),
    (lambda folder: break_array(folder / "results" / "localization_maps_paper.npy", lambda a: a[:2]), "maps_paper.npy"),
    (lambda folder: break_array(folder / "results" / "localization_maps_paper.npy", lambda a: a + 1), "maps_paper.npy"),
    (lambda folder: (folder / "results" / "localization_maps_paper.npy").unlink(), "maps_paper.npy"),
    (lambda folder: (folder / "results" / "examples.npz").write_bytes(b"PK"), "examples.npz"),
    (lambda folder: (folder / "results" / "detection_scores.csv").open("a").write("1\n"), "detection_scores.csv"),
    (lambda folder: break_array(folder / "data" / "benchmark_data.npy", lambda a: a[::-1]), "benchmark"),
    (lambda folder: break_array(folder / "data" / "benchmark_label.npy", lambda a: 1 - a), "labels"),
    (lambda folder: shutil.rmtree(folder / "results"), "results")])
def test_damaged_results_are_refused(workplace, scored, damage, message):
    """What --from_results cannot read, or was scored on another benchmark, ends in one sentence that names it."""
    shutil.copytree(scored, workplace / "results")
    damage(workplace)
    finished = run_script("test.py", "--from_results", "results", "--output_dir", "again", cwd=workplace)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr and message in finished.stderr
    assert not (workplace / "again").exists()


@pytest.fixture(scope="module")
def scored(simulated, published_state, tmp_path_factory):
    """The report of one protocol with its maps, on the simulated arrays."""
    folder = tmp_path_factory.mktemp("scored")
    torch.save({"model_state_dict": published_state}, folder / "model.pt")
    finished = run_script("test.py", "--data_path", simulated, "--load_path", folder / "model.pt", "--protocol",
                          "paper", "--save_maps", 1, "--fold9", 0, "--output_dir", folder / "results")
    assert finished.returncode == 0, finished.stderr
    return folder / "results"


def test_several_checkpoints(authors_workplace, published_state):
    """Each checkpoint gets a report of its own; the mean and standard deviation are written and printed."""
    state = {name: value * 1.1 if name.startswith("attn") else value for name, value in published_state.items()}
    torch.save({"model_state_dict": state}, authors_workplace / "ckpt" / "other.pt")
    (authors_workplace / "results").mkdir()             # an earlier report on one checkpoint, and a file of the user's
    for name in ("detection_scores.csv", "localization_maps_clean.npy", "examples.npz", "learning_curves.pdf",
                 "own.txt"):
        (authors_workplace / "results" / name).write_text("")
    finished = run_script("test.py", "--load_path", "ckpt/mymodel.pt", "ckpt/other.pt", "--protocol", "clean",
                          cwd=authors_workplace)
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in (authors_workplace / "results").iterdir()} == {"1-mymodel", "2-other", "results.json",
                                                                                 "own.txt"}
    runs = [json.loads((authors_workplace / "results" / name / "results.json").read_text())["clean"]["detection_auroc"]
            for name in ("1-mymodel", "2-other")]
    summary = json.loads((authors_workplace / "results" / "results.json").read_text())
    found = summary["mean"]["clean"]["detection_auroc"]
    assert found == {"mean": pytest.approx(np.mean(runs)), "sd": pytest.approx(np.std(runs, ddof=1))}
    assert f"{found['mean']:.4f} ± {found['sd']:.4f}" in finished.stdout
    again = run_script("test.py", "--from_results", "results", "--output_dir", "again", cwd=authors_workplace)
    assert again.returncode == 0 and f"{found['mean']:.4f} ± {found['sd']:.4f}" in again.stdout
    assert json.loads((authors_workplace / "again" / "results.json").read_text()) == summary


def test_localization_numbers_outlive_their_maps(workplace):
    """Without --save_maps the report can be made again all the same: localization keeps the numbers that it had."""
    finished = run_script("test.py", *TEST_LINE, "--protocol", "clean", "--fold9", 0, cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    before = json.loads((workplace / "results" / "results.json").read_text())
    again = run_script("test.py", "--from_results", "results", "--figures", 1, cwd=workplace)
    assert again.returncode == 0 and "stay as they were" in again.stdout
    assert json.loads((workplace / "results" / "results.json").read_text()) == before


@pytest.fixture(scope="module")
def ludb_scored(simulated, published_state, tmp_path_factory):
    """(data folder, results folder, printed text) of simulated test records with a LUDB-shaped benchmark."""
    folder = tmp_path_factory.mktemp("ludb")
    write_ludb(folder / "ludb")
    shutil.copytree(simulated, folder / "data", ignore=shutil.ignore_patterns("benchmark*"))
    torch.save({"model_state_dict": published_state}, folder / "model.pt")
    made = run_script("preprocess.py", "--ludb_path", folder / "ludb", "--data_path", folder / "data", "--workers", 1)
    assert made.returncode == 0, made.stderr
    finished = run_script("test.py", "--data_path", folder / "data", "--load_path", folder / "model.pt", "--protocol",
                          "clean", "--save_maps", 1, "--fold9", 0, "--output_dir", folder / "results")
    assert finished.returncode == 0, finished.stderr
    return folder / "data", folder / "results", finished.stdout


def test_ludb_is_scored_by_phase_and_diagnosis(ludb_scored):
    """On LUDB the report has the phase-matched mean and the diagnoses, and points without a truth are in no number."""
    data, results, printed = ludb_scored
    found = json.loads((results / "results.json").read_text())["clean"]
    labels, maps = np.load(data / "benchmark_label.npy")[:, 100:4900], np.load(results / "localization_maps_clean.npy")
    scored = labels != 255
    assert 0 < scored.mean() < 1
    assert found["localization"]["pooled"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(labels[scored], maps[scored]))
    assert set(found["localization"]["by_diagnosis"]) == {"scar", "ischemia", "atrial_fibrillation"}
    phases = np.load(data / "benchmark_details.npz")["phases"][:, 100:4900]
    of_qrs = (phases == 3) & scored
    matched = found["localization"]["phase_matched"]
    assert matched["QRS"]["value"] == pytest.approx(roc_auc_score(labels[of_qrs], maps[of_qrs]))
    assert matched["P"] is None and found["localization_auroc_phase_matched"] == matched["mean"]["value"]
    assert f"{matched['mean']['value']:.4f}" in printed and "within QRS points" in printed


def test_ludb_is_drawn_in_millivolts(ludb_scored, monkeypatch, tmp_path):
    """The figures undo the normalisation of the benchmark, of the signal and of what was restored."""
    import test as script
    data, results, _ = ludb_scored
    drawn = []
    monkeypatch.setattr(script.report.figures, "draw_localization", lambda example, *_: drawn.append(example))
    monkeypatch.setattr("sys.argv", ["test.py", "--from_results", str(results), "--data_path", str(data), "--figures",
                                     "1", "--output_dir", str(tmp_path)])
    script.main()
    signals, details = np.load(data / "benchmark_data.npy"), np.load(data / "benchmark_details.npz")
    rows = np.load(results / "examples.npz")["rows"]
    assert len(drawn) == len(rows) > 0
    for example, row in zip(drawn, rows):
        expected = (signals[row] + 1) / 2 * (details["high"][row] - details["low"][row]) + details["low"][row]
        assert example.unit == "mV" and example.signal == pytest.approx(expected[100:4900], abs=1e-5)
