"""Recordings of one's own: scores are test.py's, doubts are said, the bad is named, few of many windows are kept."""
import csv
import json

import numpy as np
import pytest
from conftest import run_script
from small import few_channels, make_model, read_all, write_wfdb  # noqa: F401
from test_recording_files import EIGHT, NAMES, make_ecg, write_csv

from ecg import arrays
from ecg.recording_files import open_recording, windows_of
from ecg.signals import LEAD_NAMES, filter_leads
from evaluation import recording_figures, recordings, rival
from evaluation.recordings import RecordingSettings, score_recordings
from model import load_checkpoint, save_checkpoint
from scoring import without_network
from scoring.passes import Scorer, Scores
from scoring.protocols import PROTOCOLS
from utils import UserError

NO_FIGURES = RecordingSettings(figures=0, device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network with made-up scores of fold 9's normals."""
    path = tmp_path_factory.mktemp("ckpt") / "model.pt"
    save_checkpoint(path, make_model(), config={"protocol": "clean", "mask_ratio": 30},
                    fold9_normals={"paper": [0.5, 1.0, 9.0], "clean": [0.5, 1.0, 9.0]})
    return path


@pytest.fixture
def quick(monkeypatch):
    """Scores that cost nothing: the height of the first lead; returns how many windows were scored at a time."""
    sizes = []

    def score(self, records, r_peaks, rows=None, with_maps=False):
        sizes.append(len(records))
        heights = np.ptp(records.signals[:, :, 0], axis=1).astype(float)
        return Scores(heights, np.ones((len(records), 4800, 12), np.float32) if with_maps else None)
    monkeypatch.setattr(Scorer, "score", score)
    return sizes


def read_rows(folder):
    with open(folder / "record_scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_arrays(simulated, checkpoint, tmp_path, capsys, monkeypatch):
    """A record that is scored from its file has the score that it has in test.npy; its percentile counts the normals.

    Its figures are drawn, in mV; without a truth.
    """
    records = arrays.open_records(simulated, "test", 12)
    table = arrays.load_table(simulated, "test", records)
    folder = simulated.parent / "ptb-xl" / "records500" / "00000"
    paths = [folder / f"{ecg_id:05d}_hr" for ecg_id in table["ecg_id"][:2]]
    model = load_checkpoint(checkpoint)[0].eval()
    monkeypatch.setattr(recording_figures.figures, "pack", lambda figure: {"png": b"png", "pdf": b"pdf"})
    score_recordings(paths, checkpoint, tmp_path, RecordingSettings(device="cpu"))
    printed, rows = capsys.readouterr().out, read_rows(tmp_path)
    assert [row["record"] for row in rows] == [str(path) for path in paths]
    for name, protocol in PROTOCOLS.items():
        r_peaks = arrays.load_r_peaks(simulated, "test", records, protocol.detector)
        expected = Scorer(model, protocol).score(records, r_peaks, [0, 1]).scores
        for row, score in zip(rows, expected):
            assert float(row[f"{name}_score"]) == pytest.approx(score, rel=1e-5)
            lower = 100 * np.mean(np.array([0.5, 1.0, 9.0]) < score)
            assert float(row[f"{name}_percentile"]) == pytest.approx(lower)
            assert f"{score:.4f}" in printed and f"{lower:.1f}" in printed
    fitted, normals = rival.load_rival(rival.FITTED_FILE)
    features = rival.describe(records, arrays.load_r_peaks(simulated, "test", records, "slope"), np.arange(2))
    for row, score in zip(rows, without_network.score(fitted, features)):
        assert float(row["no_network_score"]) == pytest.approx(score, rel=1e-3)
        assert float(row["no_network_percentile"]) == pytest.approx(100 * np.mean(normals < score), abs=0.2)
    with open(tmp_path / "record_unusual.csv", newline="") as file:
        unusual = list(csv.DictReader(file))
    first = without_network.unusual(fitted, features[0])[0]
    assert len(unusual) == 20 and (unusual[0]["lead"], unusual[0]["wave"]) == first[:2]
    assert float(unusual[0]["value"]) == pytest.approx(first[2], abs=1e-3) and rival.tell(first) in printed
    assert "Not for clinical use." in printed and "note:" not in printed
    assert sorted(read_all(tmp_path)) == sorted(["record_results.json", "record_scores.csv", "record_unusual.csv"] + [
        f"record_{number}-{path.name}_0s.{kind}" for number, path in enumerate(paths, 1) for kind in ("png", "pdf")])


def test_what_is_drawn_is_the_recording(tmp_path, checkpoint, monkeypatch):
    """The restoration lies within the ECG's range and beside it; times are the recording's, also in the 2nd window."""
    drawn = []
    monkeypatch.setattr(recording_figures.figures, "draw_record", lambda *drawing: drawn.append(drawing))
    monkeypatch.setattr(recording_figures.figures, "pack", lambda _: {})
    path = write_wfdb(tmp_path / "record", make_ecg(500, 12))
    score_recordings([path], checkpoint, tmp_path / "own", RecordingSettings(device="cpu", protocols=("clean",)))
    filtered = {start: filter_leads(window) for start, window in windows_of(open_recording(path))}
    assert len(drawn) == 2 and set(filtered) == {0, 1000}
    for example, (start, stop) in drawn:
        signal = filtered[round((example.start_seconds - 0.2) * 500)]
        np.testing.assert_allclose(example.signal, signal[100:4900], atol=1e-6)
        low, high = signal.min(axis=0) - 1e-5, signal.max(axis=0) + 1e-5
        assert ((example.restored >= low) & (example.restored <= high)).all() and example.unit == "mV"
        assert not np.allclose(example.restored, example.signal, atol=0.05) and (stop - start) == 1200
        assert not example.truth.any() and "no truth" in example.title


def test_one_bad_file_among_several(tmp_path, checkpoint, quick):
    """The others are scored, the bad one is named with its reason, and the exit code is 2 at the end."""
    good = [write_wfdb(tmp_path / f"good{number}", make_ecg()) for number in (1, 2)]
    bad = write_csv(tmp_path, make_ecg(), NAMES.replace("V6", "V7"), ("# fs: 500 Hz", "# unit: mV"), name="bad.csv")
    cut = write_wfdb(tmp_path / "cut", make_ecg(500, 30))           # found when some windows are scored already
    cut.with_suffix(".dat").write_bytes(cut.with_suffix(".dat").read_bytes()[:-2400])
    script, flags = "tools/score_recordings.py", ("--load_path", checkpoint, "--figures", 0, "--device", "cpu")
    done = run_script(script, good[0], bad, cut, good[1], *flags, "--output_dir", tmp_path / "own")
    assert done.returncode == 2 and "2 of 4 recordings were not scored" in done.stderr.splitlines()[-1]
    assert f"{bad} cannot be scored: no lead V6; all twelve" in done.stderr
    assert f"{cut} cannot be scored: unreadable samples" in done.stderr
    assert [row["record"] for row in read_rows(tmp_path / "own")] == [str(path) for path in good]
    assert set(json.loads((tmp_path / "own" / "record_results.json").read_text())["not_scored"]) == {str(bad), str(cut)}
    again = run_script("test.py", "--record", *good, "--load_path", checkpoint, "--figures", 0, "--output_dir",
                       tmp_path / "again", "--device", "cpu")
    assert again.returncode == 0 and read_rows(tmp_path / "again") == read_rows(tmp_path / "own")
    alone = run_script(script, bad, *flags, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 2 and alone.stderr.startswith(f"error: {bad} cannot")
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("change, words", [
    (lambda ecg: ecg * 1000, ("lead spans", "uV that are called mV")), (lambda ecg: ecg / 1000, ("called uV",)),
    (lambda ecg: ecg * ([1] * 6 + [0] + [1] * 5), ("flat leads", "V1 0-10")),
    (lambda ecg: ecg * (abs(np.arange(5000) - 3000) > 1000)[:, None], ("all leads 4-8",)),
    (lambda ecg: ecg * 0, ("no valid beat in 1 of 1 windows", "all leads 0-10")), (lambda ecg: ecg, ())])
def test_doubts_stand_beside_the_score(tmp_path, checkpoint, quick, capsys, change, words):
    """A wrong unit with both guesses, electrodes without contact with lead and seconds, no beats; a sound one: none."""
    path = write_csv(tmp_path, change(make_ecg()), NAMES, ("# fs: 500 Hz", "# unit: mV"))
    score_recordings([path], checkpoint, tmp_path / "own", NO_FIGURES)
    printed, row = capsys.readouterr().out, read_rows(tmp_path / "own")[0]
    assert all(word in printed for word in words) and ("note:" in printed or "flat" in printed) == bool(words)
    assert row["flat"] == next((word for word in words if word[-1].isdigit()), "")


def test_eight_leads_without_normals(tmp_path, quick, capsys):
    """What was derived is said; a checkpoint without normals gives "-" and the reason."""
    save_checkpoint(tmp_path / "bare.pt", make_model())
    path = write_wfdb(tmp_path / "record", make_ecg()[:, EIGHT], leads=np.array(LEAD_NAMES)[EIGHT])
    score_recordings([path], tmp_path / "bare.pt", tmp_path / "own", NO_FIGURES)
    printed = capsys.readouterr().out
    assert "note: III, aVR, aVL, aVF derived" in printed and "holds no scores of fold 9's normals" in printed
    assert " -" in printed and read_rows(tmp_path / "own")[0]["paper_percentile"] == ""


@pytest.mark.parametrize("windows, figures, drawn", [(8, 0, 0), (65, None, 10), (8, 2, 2)])
def test_long_recordings(tmp_path, checkpoint, quick, monkeypatch, capsys, windows, figures, drawn):
    """Every window is scored, few at a time; the most anomalous are printed and drawn, and the score over time."""
    height = 1 + np.arange(windows)[::-1] % 7 / 10                           # of each window, so what is drawn is known
    path = write_wfdb(tmp_path / "record", np.tile(make_ecg(125), (windows, 1)) * np.repeat(height, 1250)[:, None], 125)
    monkeypatch.setattr(Scorer, "restore", lambda self, records, *_: (records.signals[:, 100:4900],) * 2)
    monkeypatch.setattr(recording_figures.figures, "pack", lambda figure: {"png": b"drawn"})
    monkeypatch.setattr(recording_figures.figures, "draw_record", lambda *_: None)
    settings = RecordingSettings(device="cpu", figures=figures, protocols=("clean",))
    score_recordings([path], checkpoint, tmp_path / "own", settings)
    rows, printed = read_rows(tmp_path / "own"), capsys.readouterr().out
    assert [float(row["start_s"]) for row in rows] == [10.0 * number for number in range(windows)]
    assert max(quick) <= recordings.WINDOWS_AT_ONCE and printed.count("\n") < 25
    assert ("65 windows, the 10 most anomalous" in printed) == (windows == 65)
    best = sorted(rows, key=lambda row: -float(row["clean_score"]))[:drawn]
    tables = ["record_results.json", "record_scores.csv", "record_unusual.csv"]
    assert sorted(read_all(tmp_path / "own")) == sorted(tables + [
        f"record_1-record_{float(row['start_s']):g}s.png" for row in best]
        + ["record_1-record_scores.png"] * bool(drawn))


def test_the_score_over_time():
    """Time is told in the unit that fits; the curve is the scores."""
    for starts, unit in (([0, 10, 20], "s"), (np.arange(0, 1000, 10), "min"), (np.arange(0, 86400, 10), "h")):
        scores = np.random.default_rng(0).random(len(starts)) + 0.1
        axes, = recording_figures.draw_scores_over_time("title", list(starts), {"clean": scores}).axes
        assert f"({unit})" in axes.get_xlabel() and np.array_equal(axes.lines[0].get_ydata(), scores)
    scores = np.zeros((4800, 12))
    scores[3000:3100, 4] = 1
    start, stop = recording_figures.brightest(scores)
    assert (stop - start, start % 100) == (1200, 0) and start <= 3000 and stop >= 3100


def test_no_file_is_replaced_that_is_not_ours(tmp_path, checkpoint, quick):
    """A rerun replaces what the last one wrote, unless it was changed since; a stranger in the way is named."""
    path, out = write_wfdb(tmp_path / "record", make_ecg()), tmp_path / "own"
    for _ in range(2):
        score_recordings([path], checkpoint, out, NO_FIGURES)
    for name in ("record_1-notes.png", "record_scores.csv"):
        before = (out / "record_scores.csv").read_bytes()
        (out / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=f"{name} .*--output_dir"):
            score_recordings([path], checkpoint, out, NO_FIGURES)
        assert (out / name).read_bytes() == b"mine"
        (out / name).write_bytes(before) if name.endswith("csv") else (out / name).unlink()


def test_what_cannot_be_scored_with(tmp_path, quick):
    """A network of other leads, and a protocol that it cannot be scored under, end in a sentence."""
    save_checkpoint(tmp_path / "eight.pt", make_model(enc_in=8))
    (tmp_path / "file").touch()
    for folder, words in (("own", "8 leads"), ("file", "file")):
        with pytest.raises(UserError, match=words):
            score_recordings([tmp_path / "record"], tmp_path / "eight.pt", tmp_path / folder, NO_FIGURES)
    for flags in (("--load_model", 0), ("--load_path", "a.pt", "b.pt")):
        assert "one trained network" in run_script("test.py", "--record", tmp_path / "record", *flags).refusal
