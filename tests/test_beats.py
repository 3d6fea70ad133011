"""MIT-BIH's beats: classes, splits and windows; their scores against a plain loop; both scripts on made-up records."""
import json

import numpy as np
import pytest
import torch
import wfdb
from conftest import SHARED, run_script
from small import make_model
from small import few_channels  # noqa: F401

from dataloader import crop_global, mask_out, median_beat, samples_of_beats, valid_beats
from ecg import mitbih
from ecg.arrays import EXCLUDED, Records
from ecg.beats import Beats, open_beats, patients_of
from evaluation import beats as numbers
from model import compute_trend, load_checkpoint, restoration_errors
from scoring.beats import score_beats
from scoring.beats_without_network import score_earliness, score_shapes
from scoring.passes import Scorer, smooth_maps
from scoring.protocols import CLEAN
from utils import UserError

SECONDS = 60


def write_record(folder, name, seed, leads):
    """A record of 60 s as PhysioNet has them: a beat every 0.8 s, each 7th early, wide and V; an S, and a "!"."""
    random = np.random.default_rng(seed)
    times = np.arange(0.8, SECONDS - 1, 0.8)
    symbols = np.where(np.arange(len(times)) % 7 == 6, "V", "N")
    times[symbols == "V"] -= 0.3
    symbols[[2, 3]] = "A", "!"
    after = np.arange(SECONDS * 360) / 360 - times[:, None]
    width = np.where(symbols == "V", 0.05, 0.015)[:, None]
    wave = np.exp(-0.5 * (after / width) ** 2).sum(axis=0)[:, None] * [1.0, 0.6]
    wfdb.wrsamp(name, 360, ["mV", "mV"], leads, wave + random.normal(0, 0.01, wave.shape), fmt=["212", "212"],
                adc_gain=[200, 200], baseline=[1024, 1024], write_dir=str(folder))
    wfdb.wrann(name, "atr", np.rint(times * 360).astype(int), symbols, write_dir=str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The arrays of six made-up patients: three of DS1, one of them held back, and three of DS2."""
    folder = tmp_path_factory.mktemp("mitbih")
    (folder / "mitdb").mkdir()
    for seed, name in enumerate(("100", "101", "103", "106", "108", "111")):
        write_record(folder / "mitdb", name, seed, ["V1", "MLII"] if name == "101" else ["MLII", "V1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mitbih, "DS1", ("101", "106", "108"))
        patch.setattr(mitbih, "DS2", ("100", "103", "111"))
        patch.setattr(mitbih, "HELD_BACK", ("108",))
        finished = run_script("preprocess.py", "--mitdb_path", folder / "mitdb", "--data_path", folder / "data")
    assert finished.returncode == 0, finished.stderr
    assert "normal test" in finished.stdout and "BeatGAN 9,764" in finished.stdout
    return folder / "data"


def test_beatgan_s_counts():
    """The annotations as PhysioNet has them give the 9,764 abnormal test beats that BeatGAN and the paper report."""
    if not (SHARED / "data" / "mitdb").is_dir():
        pytest.skip("no ../shared/data/mitdb here: the made-up records of this file stand for it")
    tables = []
    for name in sorted(mitbih.DS1 + mitbih.DS2):
        annotation = wfdb.rdann(str(SHARED / "data" / "mitdb" / name), "atr")
        places = np.rint(annotation.sample * 500 / 360).astype(int)                 # as if every peak were found
        tables.append(mitbih.list_beats(annotation.sample, np.array(annotation.symbol), 650_000, places))
    classes = np.concatenate([table["class"] for table in tables])
    parts = mitbih.split_within(classes, np.concatenate([table["counts"] for table in tables]))
    assert [np.count_nonzero(classes == name) for name in mitbih.CLASSES] == [89_836, 3_026, 7_008, 802, 15]
    assert np.count_nonzero((parts == "test") & (classes != "N") & (classes != "!")) == 9_764
    assert not set(mitbih.DS1) & set(mitbih.DS2) and len(mitbih.DS1) == len(mitbih.DS2) == 22


def test_classes_and_parts():
    """Bundle branch block is normal, atrial escape is S; a normal without a peak nearby does not count."""
    samples, symbols = np.arange(1, 9) * 500, np.array(list("NLReEF/!"))
    table = mitbih.list_beats(samples, symbols, 4600, np.rint(samples[1:] * 500 / 360).astype(int))
    assert "".join(table["class"]) == "NNNSVFQ!" and table["counts"].tolist() == [False] + [True] * 6 + [False]
    parts = mitbih.split_between(np.array(["101", "101", "112", "112", "100", "100"]), np.array(list("NVNVNV")),
                                 np.array([True] * 5 + [False]))
    assert parts.tolist() == ["train", "", "val", "val", "test", ""]
    within = mitbih.split_within(np.array(list("N" * 100 + "V" * 11)), np.ones(111, bool))
    assert [(within[:100] == part).sum() for part in ("test", "val", "train")] == [20, 8, 72]
    assert [(within[100:] == part).sum() for part in ("test", "val", "train")] == [9, 2, 0]


def test_every_beat_is_valid_in_its_window(data):
    """Where the table says is the filtered R peak of lead MLII, whichever column it was; training windows are pure."""
    beats = open_beats(data, 2)
    table, peaks = beats.table, beats.r_peaks(beats.table["class"] != "x")
    assert sum(map(len, peaks)) == len(table["window"]) and all(
        len(of_window) == 0 or (valid_beats(of_window)[0] == of_window).all() for of_window in peaks)
    for beat in np.flatnonzero(table["class"] == "N"):
        around = beats.records.signals[table["window"][beat], table["r_peak"][beat] - 30:table["r_peak"][beat] + 31, 0]
        assert abs(np.argmax(around) - 30) <= 3
    rows, training = beats.training_windows("between")
    assert set(table["record"][np.isin(table["window"], rows)]) <= {"101", "106"}
    assert set(table["class"][np.isin(table["window"], rows)]) == {"N"} and all(len(training[row]) for row in rows)


def test_beats_are_scored_as_by_a_plain_loop(data):
    """Window by window, pass by pass, beat by beat through the plain network."""
    beats, model = open_beats(data, 2), make_model(enc_in=2)
    peaks, rows = [of_window[:3] for of_window in beats.r_peaks(beats.table["class"] != "!")], [4, 1]
    scorer = Scorer(model, CLEAN)
    terms, maps = score_beats(scorer, beats.records, peaks, rows)
    expected, of_maps = [], []
    for row in rows:
        signal = torch.from_numpy(np.array(beats.records.signals[row]))
        ecg = crop_global(scorer.normalisation.normalise(signal[None]))
        cut = scorer.normalisation.normalise(signal[samples_of_beats(torch.from_numpy(peaks[row].astype(int)))])
        median = torch.from_numpy(median_beat(signal.numpy(), peaks[row].astype(int)))[None]
        median = scorer.normalisation.normalise(median)
        whole, local = torch.zeros(2, 4800, 2), torch.zeros(len(cut), 480, 2)
        with torch.inference_mode():
            for global_mask, local_mask in zip(*CLEAN.masks(30)):
                masked, trend = mask_out(ecg, global_mask), compute_trend(ecg)
                restored = model(masked, mask_out(median, local_mask), trend)
                of_global, _, of_trend = restoration_errors(restored, ecg, median)
                whole += torch.cat([of_global, of_trend]) / len(CLEAN.masks(30)[0])
                for number, beat in enumerate(cut[:, None]):
                    errors = restoration_errors(model(masked, mask_out(beat, local_mask), trend), ecg, beat)
                    local[number] += errors[1][0] / len(CLEAN.masks(30)[0])
        laid, count = torch.zeros(5000, 2), torch.zeros(5000, 1)
        for place, error in zip(peaks[row], local):
            laid[place - 140:place + 340] += error
            count[place - 140:place + 340] += 1
            at = np.clip(np.arange(place - 240, place + 240), 0, 4799)
            expected.append(torch.stack([whole[0][at], error, whole[1][at]]).mean(dim=(1, 2)))
        of_maps.append(smooth_maps((whole.sum(dim=0) + crop_global((laid / count.clamp(min=1))[None])[0])[None])[0])
    np.testing.assert_allclose(terms, torch.stack(expected), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(maps, torch.stack(of_maps), rtol=1e-3, atol=1e-5)


def test_rivals_know_early_and_wide_beats(data):
    """Without a network: an early beat comes early, a wide beat looks unusual among training beats."""
    beats = open_beats(data, 2)
    table = beats.table
    wide, normal = table["class"] == "V", table["class"] == "N"
    assert score_earliness(table)[wide].min() > 0.3
    shapes = score_shapes(beats.records, table, table["between"] == "train")
    assert shapes[wide].min() > np.quantile(shapes[normal], 0.9)


def test_numbers_of_beats():
    """AUROC by class and over patients, F1 by the threshold of the validation beats, all by hand."""
    table = {"record": np.repeat(["1", "2"], 6), "class": np.array(list("NNSVNN" * 2)),
             "between": np.array((["test"] * 5 + ["val"]) * 2)}
    table["between"][[2 + 6, 3]] = "val", "test"
    score = np.array([0, 1, 2, 9, 3, 0, 5, 6, 7, 12, 4, 6.5])
    numbers_ = numbers.evaluate_beats(table, "between", score)
    assert numbers_["beats"] == {"normal": 6, "abnormal": 3, "patients": 2}
    assert numbers_["by_class"]["V"]["auroc"]["value"] == 1 and numbers_["by_class"]["S"]["auroc"]["value"] == 2 / 6
    assert numbers_["auroc"]["value"] == pytest.approx((6 + 6 + 2) / 18) and numbers_["auroc"]["low"] is None
    assert numbers_["f1_best"]["f1"]["value"] == pytest.approx(0.8) and numbers_["f1_best"]["threshold"] == 9
    assert numbers_["f1"]["threshold"] == 7 and numbers_["f1"]["f1"]["value"] == pytest.approx(0.8)
    relative = numbers.less_the_usual(table, score)
    assert np.median(relative[:6]) == np.median(relative[6:]) == 0 and relative[3] == 9 - np.median(score[:6])


def test_points_of_beats():
    """A point in an abnormal beat is anomalous, also where a normal one overlaps; what is in no beat has no truth."""
    table = {"window": np.array([0, 0, 0, 1]), "r_peak": np.array([1000, 1400, 3000, 900]),
             "class": np.array(list("NVSN"))}
    labels = numbers.mark_points(table, np.array([0, 1]), 5000, 2, ("V",))
    places = np.array([805, 806, 1205, 1206, 1649, 1650, 2806, 4000]) - 100
    assert labels[0, places, 1].tolist() == [EXCLUDED, 0, 0, 1, 1, EXCLUDED, EXCLUDED, EXCLUDED]
    painted = numbers.paint(table, np.array([0]), np.array([1.0, 2, np.nan, 0]), 5000)
    assert painted[0, places, 0].tolist() == [0, 1, 1, 2, 2, 0, 0, 0]


def test_both_scripts_on_beats(data, tmp_path):
    """train.py and test.py go the same way as with records; a network of the other split is refused."""
    trained = run_script("train.py", "--data_path", data, "--beats", "between", "--dims", 2, "--hidden", 2, "--input",
                         "compand", "--epochs", 2, "--batch_size", 2, "--save_path", tmp_path / "model.pt")
    assert trained.returncode == 0 and "--dims 2 --hidden 2 --beats between" in trained.stdout, trained.stderr
    model, facts = load_checkpoint(tmp_path / "model.pt")
    assert facts["config"]["beats"] == "between" and model.leads == 2 and model.input["kind"] == "compand"
    flags = ("--data_path", data, "--load_path", tmp_path / "model.pt", "--dims", 2, "--hidden", 2, "--output_dir",
             tmp_path / "results")
    tested = run_script("test.py", *flags, "--beats", "between")
    assert tested.returncode == 0, tested.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    for name, rival in (("network", "shape (PCA)"), ("network + early (RR)", "shape (PCA) + early (RR)")):
        gap = results["detection"][name]["auroc"]["value"] - results["detection"][rival]["auroc"]["value"]
        assert results["detection"][name]["beyond_rival"]["value"] == pytest.approx(gap)
    assert results["detection"]["early (RR)"]["by_class"]["V"]["auroc"]["value"] > 0.95
    assert {"S, V or F", "V"} == set(results["localization"]) and "shape (PCA)" in tested.stdout
    refused = run_script("test.py", *flags, "--beats", "within")
    assert refused.returncode == 2 and "--beats between" in refused.stderr
    for change in (("--watch", "test"), ("--protocol", "paper"), ("--select", "val")):
        refused = run_script("train.py", "--data_path", data, "--beats", "between", "--dims", 2, *change)
        assert refused.returncode == 2 and "--beats" in refused.stderr


def test_files_that_do_not_belong_together(data, tmp_path):
    """Absent files, and windows of another run, end in a sentence."""
    assert run_script("train.py", "--data_path", tmp_path, "--beats", "within", "--dims", 2).returncode == 2
    for name in ("mitbih_beats.csv", "mitbih.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    np.save(tmp_path / "mitbih.npy", np.zeros((3, 5000, 2), np.float32))
    refused = run_script("train.py", "--data_path", tmp_path, "--beats", "within", "--dims", 2)
    assert refused.returncode == 2 and "--mitdb_path" in refused.stderr


def test_a_trial_without_a_part_of_a_split_is_refused(data):
    beats = open_beats(data, 2)
    rows = beats.table["between"] != "val"
    with pytest.raises(UserError, match="no val beat of the split between"):
        Beats(beats.records, {name: column[rows] for name, column in beats.table.items()}).training_windows("between")


def test_one_man_gave_two_records():
    assert patients_of(np.array(["201", "202", "203"])).tolist() == ["201", "201", "203"]


def test_a_flutter_wave_is_no_normal_point():
    """Where a normal beat and a flutter wave overlap nobody says what is normal."""
    table = {"window": np.zeros(2, int), "class": np.array(["N", "!"]), "r_peak": np.array([1000, 1150])}
    labels = numbers.mark_points(table, np.array([0]), 5000, 1)[0, :, 0]
    assert labels[850] == 0 and labels[1050] == labels[1100] == EXCLUDED


def test_a_file_of_the_user_s_is_not_overwritten(data, tmp_path):
    """One of the three names without the others, or windows that are not those of the manifest."""
    with pytest.raises(UserError, match="given as --mitdb_path"):
        mitbih.write(tmp_path / "none", data)                       # its own files may be replaced
    (tmp_path / "mitbih_beats.csv").write_text("mine")
    with pytest.raises(UserError, match="mitbih_beats.csv did not come from preprocess.py"):
        mitbih.write(tmp_path / "none", tmp_path)
    (tmp_path / "mitbih.json").write_text((data / "mitbih.json").read_text())
    with pytest.raises(UserError, match="given as --mitdb_path"):
        mitbih.write(tmp_path / "none", tmp_path)
    (tmp_path / "mitbih.json").write_text((data / "mitbih.json").read_text().replace(mitbih.SOURCE, "mine"))
    with pytest.raises(UserError, match="mitbih_beats.csv did not come from preprocess.py"):
        mitbih.write(tmp_path / "none", tmp_path)
    (tmp_path / "mitbih.json").write_text((data / "mitbih.json").read_text())
    np.save(tmp_path / "mitbih.npy", np.zeros((1, 5000, 2), np.float32))
    with pytest.raises(UserError, match="mitbih.npy did not come from preprocess.py"):
        mitbih.write(tmp_path / "none", tmp_path)
