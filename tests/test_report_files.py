"""test.py as its users call it: the files of its report, whose they are, several checkpoints, and none.

A stand-in scores in place of the network.
"""
import os
import shutil

import numpy as np
import pytest
from conftest import full_disk, run_script
from report_data import PROTOCOLS, RIVALS, arrays, checkpoint, hashes, report_into, results_of, stand_in
from small import read_all

import test as script
from evaluation import files
from utils import UserError


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
    assert "detection_curves.png" in results["files"] and "best without a network" in finished.stdout
