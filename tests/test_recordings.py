"""Recordings of one's own: what is read is what was written, what is unclear is refused, scores are test.py's."""
import csv
import sys

import numpy as np
import pytest
import torch
import wfdb
from conftest import run_script

from evaluation import recordings
from scoring import percentiles
from scoring import passes
from ecg import signals
from tools import synthetic
import test as script
import train
import utils
from model import MCF, load_checkpoint, save_checkpoint
from ecg.recording_files import read_recording
from ecg.signals import LEAD_NAMES
from utils import UserError

BEATS = np.arange(0.5, 60, 0.8) + 0.02 * np.sin(np.arange(75))
NAMES, ROW = ",".join(LEAD_NAMES), ",".join(["0.1"] * 12)
TRAIN = ("--hidden", "4", "--epochs", "2", "--batch_size", "16", "--lr", "1e-3", "--device", "cpu", "--val_beats", "1")


def make_ecg(rate=500, duration=10):
    """(samples, 12) mV, of another amplitude in every lead; the same signal at every rate."""
    time = np.arange(round(duration * rate)) / rate
    wave = sum(height * np.exp(-0.5 * ((time - BEATS[:, None] - centre) / width) ** 2).sum(axis=0)
               for height, centre, width in ((0.1, -0.16, 0.025), (1.0, 0, 0.015), (0.2, 0.25, 0.05)))
    return wave[:, None] * np.linspace(0.5, 1.6, 12)


def write_wfdb(folder, signal, rate, leads=LEAD_NAMES, unit="mV", gain=1000.0, name="record"):
    """A WFDB record of values in this unit; returns its path without extension."""
    number = signal.shape[1]
    wfdb.wrsamp(name, fs=rate, units=[unit] * number, sig_name=list(leads), p_signal=signal, fmt=["16"] * number,
                adc_gain=[gain] * number, baseline=[0] * number, write_dir=str(folder))
    return folder / name


def write_csv(folder, signal, header=NAMES, comments=(), times=None):
    """A CSV file; times is a first column of text."""
    lines = [",".join(f"{value:.6g}" for value in row) for row in signal]
    if times is not None:
        lines = [f"{time},{line}" for time, line in zip(times, lines)]
    path = folder / "own.csv"
    path.write_text("\n".join((*comments, header, *lines)) + "\n", encoding="utf-8")
    return path


# ---- WFDB

@pytest.mark.parametrize("rate", [250, 257, 333.5, 500, 1000])
def test_any_rate(tmp_path, rate):
    """Whatever the rate, also one that shares no factor with 500, the signal lies at the same times."""
    read = read_recording(write_wfdb(tmp_path, make_ecg(rate), rate), None)
    np.testing.assert_allclose(read, make_ecg(), atol=0.005)            # of shape (5000, 12)


@pytest.mark.parametrize("unit, factor", [("mV", 1), ("uV", 1000), ("µV", 1000), ("μV", 1000)])
@pytest.mark.parametrize("extension", ["", ".hea", ".dat"])
def test_leads_units_and_gain(tmp_path, unit, factor, extension):
    """Leads in another order and case, another unit (micro sign and Greek letter too) and gain; more signals."""
    order = [7, 3, 1, 0, 2, 11, 10, 9, 8, 6, 5, 4]
    signal = np.column_stack([make_ecg()[:, order] * factor, np.zeros(5000)])
    names = [LEAD_NAMES[place].lower() for place in order] + ["vx"]
    path = write_wfdb(tmp_path, signal, 500, names, "uV", 613 / factor)
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace("/uV", f"/{unit}"), encoding="utf-8")
    read = read_recording(f"{path}{extension}", None)
    np.testing.assert_allclose(read, make_ecg(), atol=0.002)
    header.write_bytes(header.read_bytes().replace("µ".encode(), b"\xb5"))              # in Latin-1
    np.testing.assert_array_equal(read_recording(path, None), read)


@pytest.mark.parametrize("old, new, message", [
    ("record 12 500 5000", "record 12", "does not state its sampling rate"),
    ("record 12 500 5000", "record 12 50 5000", "50 Hz, not 100"),
    ("record 12 500 5000", "record 12 500 900000000", "900,000,000 samples"),
    ("(0)/mV", "", "unit of lead I"), ("1000.0(0)/mV", "0/mV", "gain and unit of lead I"),
    ("/mV", "/V", "lead I in 'V'"), ("/mV", "/mmHg", "lead I in 'mmHg'"),
    ("0 aVR", "0 V7", "no lead aVR"), ("0 aVR", "0 avl", "no lead aVR"), ("record.dat", "other.dat", "unreadable"),
    ("record 12", "no header", "unreadable")])
def test_wfdb_refusals(tmp_path, old, new, message):
    """What a header does not state (wfdb fills in 250 Hz, a gain of 200 and mV) or the program does not know."""
    path = write_wfdb(tmp_path, make_ecg(), 500)
    header = path.with_suffix(".hea")
    assert old in header.read_text()
    header.write_text(header.read_text().replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        read_recording(path, None)
    assert str(path) in str(caught.value) and "; " in str(caught.value)


def test_more_refusals(tmp_path):
    """No such file, a record shorter than 10 s, a lead twice, missing samples, two rates: each by name."""
    signal = make_ecg()
    short = write_wfdb(tmp_path, signal[:4900], 500, name="short")
    twice = write_wfdb(tmp_path, signal[:, [*range(12), 3]], 500, [*LEAD_NAMES, "AVR"], name="twice")
    signal[7, 3] = np.nan
    for path, rate, message in ((short, None, "short.* 9.8 s long"), (tmp_path, None, "neither"),
                                (tmp_path / "none.hea", None, "none.hea is missing"),
                                (tmp_path / "none.csv", None, "none.csv .* is missing"),
                                (twice, None, "more than one lead aVR"),
                                (write_wfdb(tmp_path, signal, 500), None, "missing samples in lead aVR"),
                                (short, 250, "500 Hz by its header and 250 Hz by --record_rate")):
        with pytest.raises(UserError, match=message):
            read_recording(path, rate)


# ---- CSV

def test_csv_forms(tmp_path):
    """Rate and unit from comments, from names, from a flag, from a column of times; leads in any order and case."""
    units = ",".join(f" {lead.upper()} [µV]" if place % 2 else f"{lead}(mv)" for place, lead in enumerate(LEAD_NAMES))
    path = write_csv(tmp_path, make_ecg(250), NAMES, ("# rate: 250 Hz", "# unit: mV", "# by us"))
    expected = read_recording(path, None)
    np.testing.assert_allclose(expected, make_ecg(), atol=0.005)
    path = write_csv(tmp_path, make_ecg(250) * np.tile([1, 1000], 6), units)
    np.testing.assert_allclose(read_recording(path, 250), expected, atol=1e-4)
    path = write_csv(tmp_path, make_ecg(250)[:, ::-1], ",".join(LEAD_NAMES[::-1]), ("#UNIT:mV", "# Rate: 250.0hz"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    np.testing.assert_array_equal(read_recording(path, 250), expected)
    for rate, digits in ((250, 3), (257, 3), (257, 6), (128.5, 5)):
        times = [f"{5 + sample / rate:.{digits}f}" for sample in range(round(12 * rate))]
        path = write_csv(tmp_path, make_ecg(rate, 12), f"Time [s],{NAMES}", ("# unit: mV",), times)
        read = read_recording(path, None)
        assert len(read) == 6000
        np.testing.assert_allclose(read[:5900], make_ecg(duration=12)[:5900], atol=0.01)


GOOD = ["# rate: 250 Hz", "# unit: mV", NAMES, ROW, ROW, ROW]


def changed(place, line):
    """GOOD with another line, or without it."""
    return [*GOOD[:place], *([] if line is None else [line]), *GOOD[place + 1:]]


@pytest.mark.parametrize("lines, message", [
    (GOOD, "0.012 s long"), (changed(0, None), "does not state its sampling rate.*--record_rate"),
    (changed(0, "# rate: 250"), "rate as '250'"), (changed(0, "# rate: 0.25 kHz"), "rate as '0.25 kHz'"),
    (changed(0, "# rate: 30 Hz"), "30 Hz, not 100"), (["# rate: 500 Hz", *GOOD], "its rate again in line 2"),
    (changed(1, None), "unit of lead I; name the column 'I .mV.'"), (changed(1, "# unit: V"), "lead I in 'V'"),
    (changed(2, NAMES.replace("V6", "V6 [uV]")), "lead V6 in uV by its name and in mV by its comment"),
    (changed(2, NAMES.replace("V6", "V6 []")), "lead V6 in ''"),
    (changed(2, NAMES.replace("V6", "V7")), "column 12 named 'V7' in line 3"),
    (changed(2, NAMES.replace(",", ";")), "column 1 named .* separated by commas"),
    (changed(2, NAMES.replace("V6", "v5")), "names v5 a second time, column 12 of line 3"),
    (changed(2, NAMES.replace(",V6", "")), "no column V6 in line 3"), ([], "no column I, II"),
    (changed(2, ROW), "column 1 named '0.1' in line 3"), (GOOD[:3], "no samples"),
    (changed(2, f"t [ms],{NAMES}"), "times in 'ms', column 1 of line 3"),
    (changed(4, ROW + ",1"), "13 values in line 5 for 12 columns"), (changed(4, ""), "nothing in line 5"),
    (changed(4, ROW[:-3] + "nan"), "'nan' in line 5, column v6"), (changed(4, ROW[:-3] + "1,2"), "13 values in line 5"),
    (changed(4, "," + ROW[4:]), "'' in line 5, column i,"), (changed(4, "lead" + ROW[3:]), "'lead' in line 5"),
    (changed(4, ROW[:-3] + "1e9"), "lead V6 reaches 1e.09 mV"), (changed(4, '"0.1' + ROW[3:]), "not readable as CSV"),
    ([*GOOD[:2], f"time,{NAMES}", *(f"{time},{ROW}" for time in (0, 0.004, 0.012))], "line 6 is off by 1 samples"),
    ([*GOOD[:2], f"time,{NAMES}", *(f"{time},{ROW}" for time in (0, 0.002, 0.004))], "250 Hz, line 5 is off by"),
    ([GOOD[1], f"time,{NAMES}", *(f"{time},{ROW}" for time in (0, 4, 8))], "0.25 Hz, not 100 .* times in seconds"),
    ([GOOD[1], f"t,{NAMES}", *(f"{time},{ROW}" for time in (1, 1, 1))], "times that do not increase"),
    ([GOOD[1], f"t,time,{NAMES}"], "names time a second time")])
def test_csv_refusals(tmp_path, lines, message):
    """One sentence names the file, the line or column, and the remedy; nothing is guessed."""
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message) as caught:
        read_recording(path, None)
    assert str(caught.value).startswith(f"{path} given as --record ") and "; " in str(caught.value)


def test_csv_that_is_no_text(tmp_path):
    """Another encoding and a folder are refused in a sentence; a rate flag that is no number too."""
    (tmp_path / "own.csv").write_bytes(NAMES.replace("I,", "I [\xb5V],").encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    for name in ("own.csv", "folder.csv"):
        with pytest.raises(UserError, match=f"{name} .* not readable as CSV in UTF-8"):
            read_recording(tmp_path / name, None)
    with pytest.raises(UserError, match="nan Hz"):
        read_recording(write_csv(tmp_path, make_ecg(), comments=("# unit: mV",)), float("nan"))


# ---- windows

def test_windows(tmp_path):
    """25 s become three windows, the last one at the end; each is filtered and searched by itself, as a record is."""
    signal = make_ecg(250, 25)
    windows = recordings.cut_windows(1, write_wfdb(tmp_path, signal, 250), None)
    assert [window.span() for window in windows] == ["0-10", "10-20", "15-25"]
    whole = read_recording(tmp_path / "record", None)
    for window, start in zip(windows, (0, 5000, 7500)):
        filtered = signals.filter_leads(whole[start:start + 5000])
        np.testing.assert_array_equal(window.signal, filtered.astype(np.float32))
        np.testing.assert_array_equal(window.r_peaks, signals.find_r_peaks(filtered[:, 1]))
        assert window.beats() > 8
    assert recordings.window_starts(5000) == [0] and len({window.name for window in windows}) == 3


# ---- scores

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with simulated recordings (ptb-xl), their arrays (data) and a network trained on them (model.pt)."""
    folder = tmp_path_factory.mktemp("own")
    synthetic.write_dataset(folder / "ptb-xl", 40, 0)
    paths = ("--ptbxl_path", folder / "ptb-xl", "--data_path", folder / "data")
    assert run_script("preprocess.py", *paths, "--workers", 1).returncode == 0
    call(train, folder, *TRAIN)
    return folder


def call(module, folder, *flags):
    """A script's main() with these flags, in the folder of the fixture."""
    paths = ("--data_path", folder / "data", "--save_path" if module is train else "--load_path", folder / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, (*paths, *flags))])
        module.main()


def read_rows(path):
    """The rows of a table as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_arrays(trained, tmp_path, capsys):
    """A record scored from its file has the score that it has in test.npy; fold 9's normals are those of val.npy.

    And its percentile counts them; each window has its figures; a run that is resumed keeps what it has.
    """
    call(script, trained, "--hidden", 4, "--output_dir", tmp_path / "arrays", "--device", "cpu")
    table = read_rows(tmp_path / "arrays" / "detection_scores.csv")
    of_test = [row for row in table if row["split"] == "test"][:2]
    paths = [trained / "ptb-xl" / "records500" / "00000" / f"{int(row['ecg_id']):05d}_hr" for row in of_test]
    capsys.readouterr()
    call(script, trained, "--record", *paths, "--output_dir", tmp_path / "own", "--device", "cpu")
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path / "own" / "record_scores.csv")
    facts = load_checkpoint(trained / "model.pt")[1]
    assert [row["record"] for row in rows] == [str(path) for path in paths]
    for protocol in passes.PLAIN_PROTOCOLS:
        normals = sorted(float(row[protocol]) for row in table if row["split"] == "val" and row["label"] == "0")
        assert facts["fold9_normals"][protocol] == pytest.approx(normals, rel=1e-5) and len(normals) > 1
        for row, expected in zip(rows, of_test):
            score = float(row[f"{protocol}_score"])
            assert score == pytest.approx(float(expected[protocol]), rel=1e-5)
            lower = np.mean(np.array(facts["fold9_normals"][protocol]) < score) * 100
            assert float(row[f"{protocol}_percentile"]) == pytest.approx(lower)
            assert f"{score:.4f}" in printed and f"{lower:.1f}" in printed
    assert "Not for clinical use." in printed and "optimistic" not in printed
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == sorted(
        ["record_scores.csv"] + [f"record_{number}-{path.name}_0s.{kind}" for number, path in enumerate(paths, 1)
                                 for kind in ("png", "pdf")])


def test_resume_makes_up_for_a_reference(trained, tmp_path, capsys):
    """A finished run without percentiles gets them by --resume, one that has them keeps its file; weights stay."""
    for name in ("model.pt", "last.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    flags = (*TRAIN, "--save_path", tmp_path / "model.pt", "--resume")
    call(train, trained, *flags)
    assert (tmp_path / "model.pt").read_bytes() == (trained / "model.pt").read_bytes()
    model, facts = load_checkpoint(trained / "model.pt")
    held = facts.pop("fold9_normals")
    save_checkpoint(tmp_path / "model.pt", model, **facts)
    call(train, trained, *flags, "--reference", 0)
    assert "fold9_normals" not in load_checkpoint(tmp_path / "model.pt")[1]
    call(train, trained, *flags)
    again, found = load_checkpoint(tmp_path / "model.pt")
    assert found.pop("fold9_normals") == held and found == facts
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    save_checkpoint(tmp_path / "model.pt", model, **facts | {"config": {}})
    capsys.readouterr()
    call(train, trained, *flags)
    assert "another run" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["paper", "both"])
def test_without_beats_or_percentiles(tmp_path, capsys, monkeypatch, protocol):
    """A flat recording and one without a rhythm are scored and named, never NaN; without a reference there is a "-"."""
    drawn = []
    monkeypatch.setattr(recordings.figures, "draw_localization", lambda example, *_: drawn.append(example))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model.pt", MCF(hidden=2))
    noise = np.random.default_rng(0).normal(size=(6000, 12)) / 50
    made = {"flat": np.zeros((5000, 12)), "noise": noise}
    paths = [write_wfdb(tmp_path, signal, 500, name=name) for name, signal in made.items()]
    call(script, tmp_path, "--record", *paths, "--protocol", protocol, "--output_dir", tmp_path / "own")
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path / "own" / "record_scores.csv")
    assert [(row["start_s"], row["end_s"]) for row in rows] == [("0.0", "10.0"), ("0.0", "10.0"), ("2.0", "12.0")]
    protocols = passes.PLAIN_PROTOCOLS if protocol == "both" else (protocol,)
    for row in rows:
        assert all(np.isfinite(float(row[f"{name}_score"])) and row[f"{name}_percentile"] == "" for name in protocols)
    assert rows[0]["beats"] == "0" and f"{paths[0]} 0-10 s" in printed and "no valid beat in" in printed
    assert "holds no scores of fold 9's normals" in printed and " -" in printed
    assert len(drawn) == 3
    for example, (start, path) in zip(drawn, ((0, paths[0]), (0, paths[1]), (1000, paths[1]))):
        filtered = signals.filter_leads(read_recording(path, None)[start:start + 5000])
        np.testing.assert_allclose(example.signal, filtered[100:4900], atol=1e-6)
        assert example.start_seconds == start / 500 + 0.2 and example.unit == "mV" and "no truth" in example.title
        low, high = filtered.min(axis=0) - 1e-5, filtered.max(axis=0) + 1e-5
        assert ((example.restored >= low) & (example.restored <= high)).all() and np.isfinite(example.scores).all()


def test_brightest_window():
    """Drawn are the 2.4 s with the highest scores."""
    scores = np.zeros((4800, 12))
    scores[3000:3100, 4] = 1
    start, stop = recordings.brightest(scores)
    assert (stop - start, start % 100) == (1200, 0) and start <= 3000 and stop >= 3100
    assert recordings.brightest(np.zeros((4800, 12))) == (0, 1200)


@pytest.mark.parametrize("held, config, message", [
    (None, {}, "holds no scores"), ([1.0], {}, "not lists"), ({}, {}, "not lists"),
    ({"paper": [1.0], "clean": []}, {}, "not lists"), ({"paper": [1.0], "clean": [float("nan")]}, {}, "not lists"),
    ({"paper": [1.0], "clean": [10 ** 400]}, {}, "not lists"), ({"paper": [1.0], "clean": ["1"]}, {}, "not lists"),
    ({"paper": [1.0], "clean": [True]}, {}, "not lists"), ({"paper": [1.0], "clean": torch.ones(1)}, {}, "not lists"),
    ({"paper": [1.0], "clean": [1.0]}, {"mask_ratio": 20}, "mask_ratio"),
    ({"paper": [1.0], "clean": [1.0]}, 7, "mask_ratio")])
def test_percentiles_of_others(held, config, message):
    """A checkpoint may come from anyone: what is no list of finite numbers gives no percentile, and is said."""
    normals, note = percentiles.read_normals("other.pt", {"fold9_normals": held, "config": config}, 30)
    assert normals == {} and "other.pt" in note and message in note


def test_percentile():
    """Lower scores count, equal ones half; trained on fold 9 they are said to be optimistic."""
    held = {"paper": [3, 1.0, 2.0, 2.0], "clean": [1.0]}
    config = {"mask_ratio": 30, "protocol": "paper"}
    normals, note = percentiles.read_normals("own.pt", {"fold9_normals": held, "config": config}, 30)
    assert [percentiles.percentile(score, normals["paper"]) for score in (0, 1, 2, 2.5, 9)] == [0, 12.5, 50, 75, 100]
    assert "optimistic" in note


def test_one_trained_network(tmp_path, monkeypatch, capsys):
    """Several checkpoints, an untrained network and one of other leads end in a sentence."""
    save_checkpoint(tmp_path / "model.pt", MCF(enc_in=8, hidden=2))
    path = write_wfdb(tmp_path, make_ecg(), 500)
    for flags, message in ((("--load_model", 0), "--load_model"), (("--load_path", "a.pt", "b.pt"), "one checkpoint"),
                           ((), "8 leads")):
        monkeypatch.setattr(sys, "argv", ["test.py", "--load_path", str(tmp_path / "model.pt"), "--record", str(path),
                                          "--output_dir", str(tmp_path / "own"), *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            utils.run(script.main)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
