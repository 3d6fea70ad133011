"""The open localization benchmark: LUDB's waves, the rules' points, and how its files live beside PTB-XL's arrays."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import wfdb
from conftest import run_script
from small import beats_at, read_all, write_wfdb
from test_preprocess import expected_row as ptbxl_row
from test_preprocess import load, write_ptbxl

from ecg import arrays, ludb, signals

LEADS = signals.LEAD_NAMES
STARTS = range(300, 4600, 400)                  # onsets of P, the last beat ends at 4580
BEAT = {"P": (0, 40), "PQ": (41, 69), "QRS": (70, 120), "ST": (121, 179), "T": (180, 280), "TP": (281, 399)}
LETTERS = {"P": "p", "QRS": "N", "T": "t"}
SEPTAL, LATERAL, POSTERIOR = ("V1", "V2"), ("I", "aVL", "V5", "V6"), ("V1", "V2", "V3")
# what is marked, where, and by which diagnoses, written by hand
MARKED = [
    (("QRS", "ST", "T"), LEADS, ("Complete right bundle branch block.", "Complete left bundle branch block.",
                                 "UNIpolar ventricular pacing.", "BIpolar ventricular pacing.",
                                 "Biventricular pacing.")),
    (("QRS",), LEADS, ("Incomplete right bundle branch block.", "Incomplete left bundle branch block.",
                       "Left anterior hemiblock.", "Non-specific intravintricular conduction delay.",
                       "Left ventricular hypertrophy.", "Right ventricular hypertrophy.")),
    (("ST", "T"), LATERAL, ("Left ventricular overload.", "Undefined ischemia/scar/supp.NSTEMI: lateral wall.")),
    (("P",), LEADS, ("Left atrial hypertrophy.", "Right atrial hypertrophy.", "Left atrial overload.",
                     "Right atrial overload.")),
    (("P", "PQ", "TP"), LEADS, ("Rhythm: Atrial fibrillation.", "Rhythm: Atrial flutter, typical.")),
    (("P", "PQ"), LEADS, ("I degree AV block.",)), (("ST", "T"), SEPTAL, ("STEMI: septal.",)),
    (("ST", "T"), ("II", "III", "aVF"), ("STEMI: inferior wall.",)),
    (("ST", "T"), ("V4", "V5"), ("Ischemia: apical.",)), (("ST", "T"), POSTERIOR, ("Ischemia: posterior wall.",)),
    (("QRS",), ("V2", "V3", "V4"), ("Scar formation: anterior wall.",)),
    (("T",), POSTERIOR, ("Non-specific repolarization abnormalities: posterior wall.",))]
PLACED = {diagnosis: (phases, leads) for phases, leads, diagnoses in MARKED for diagnosis in diagnoses}
NOTHING = ["Rhythm: Sinus rhythm.", "Electric axis of the heart: normal.", "STEMI: basal.", "STEMI.",
           "Early repolarization syndrome.", "Left ventricular hypertrophy: septal.", ""]
UNPLACED = ["III degree AV-block.", "Ventricular extrasystole, localisation: RVOT, anterior wall.",
            "UNIpolar atrial pacing.", "Atrial extrasystole: SA-nodal extrasystole.", "Sinoatrial blockade, undefined."]


def annotate(skip=(), stray=()):
    """(samples, symbols) of a lead: all waves of all beats, without those of skip and with the stray annotations.

    skip: (number of the beat, wave) each; stray: (sample, symbol) each.
    """
    found = list(stray)
    for number, start in enumerate(STARTS):
        for wave, letter in LETTERS.items():
            first, last = BEAT[wave]
            if (number, wave) not in skip:
                found += [(start + first, "("), (start + (first + last) // 2, letter), (start + last, ")")]
    return zip(*sorted(found), strict=True)


def plain_phases():
    """The phase of each sample, (5000,), of a lead with all waves, one beat after the other."""
    phases = np.zeros(5000, int)
    for number, start in enumerate(STARTS):
        for code, (phase, (first, last)) in enumerate(BEAT.items(), 1):
            if number < len(STARTS) - 1 or phase != "TP":
                phases[start + first:start + last + 1] = code
    return phases


def plain_labels(phases, leads):
    """Labels (5000, 12) of a record with the same waves in all leads: 1 in these phases of these leads."""
    marked = np.isin(plain_phases(), [1 + list(BEAT).index(phase) for phase in phases])[:, None] & np.isin(LEADS, leads)
    return np.where(plain_phases()[:, None] == 0, 255, marked)


# ---- waves and rules

def test_boundaries_belong_to_their_waves():
    """A wave reaches from its onset to its offset inclusive, gaps fill the rest, nothing is known outside the span."""
    phases = ludb.delineate(*annotate())
    assert phases.dtype == np.uint8 and np.array_equal(phases, plain_phases())
    assert not ludb.delineate([], []).any()


@pytest.mark.parametrize("missing, around, gap", [
    ("P", (281 - 400, 69), "TP"), ("QRS", (41, 179), None), ("T", (121, 399), None)])
def test_gaps_around_a_missing_wave(missing, around, gap):
    """Without P, as in atrial fibrillation, T to QRS is TP; any other pair of neighbours says nothing of its gap."""
    expected = plain_phases()
    expected[STARTS[4] + around[0]:STARTS[4] + around[1] + 1] = 1 + list(BEAT).index(gap) if gap else 0
    assert np.array_equal(ludb.delineate(*annotate(skip=[(4, missing)])), expected)


@pytest.mark.parametrize("stray", ["N)", "N()", "()", "(N", "(((NNN)))", "N", "(?)"])
def test_incomplete_waves_are_no_waves(stray):
    """LUDB has sequences such as 'N)' and '(((tttt)))': such a wave and the gaps beside it stay without a truth."""
    placed = [(STARTS[4] + 80 + 3 * place, symbol) for place, symbol in enumerate(stray)]
    expected = plain_phases()
    expected[STARTS[4] + 41:STARTS[4] + 180] = 0
    assert np.array_equal(ludb.delineate(*annotate(skip=[(4, "QRS")], stray=placed)), expected)


@pytest.mark.parametrize("diagnosis", PLACED)
def test_each_diagnosis_marks_its_points(diagnosis):
    """What is marked equals a plain list per diagnosis, cropped or not; what has no phase is excluded."""
    record = np.repeat(plain_phases()[:, None], 12, axis=1).astype(np.uint8)
    expected = plain_labels(*PLACED[diagnosis])
    labels = ludb.mark(record, ("Rhythm: Sinus rhythm.", diagnosis))
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected)
    rule, = ludb.rules_of([diagnosis])
    marks = ludb.rule_marks(rule, record[100:4900], [diagnosis])
    assert marks.dtype == bool and np.array_equal(marks, expected[100:4900] == 1)


def test_the_table_is_covered_and_diagnoses_add_up():
    """Every line of the table is tried above; several diagnoses mark the union, unplaced ones and none mark nothing."""
    tried = {diagnosis.rstrip(".") for diagnosis in PLACED}
    lines = [(rule, line) for rule in ludb.RULES for line in rule.lines]
    assert all(any(text == line or text.startswith(f"{line}: ") for text in tried) for _, line in lines)
    assert len({line for _, line in lines}) == len(lines) and len({rule.key for rule in ludb.RULES}) == len(ludb.RULES)
    record = np.repeat(plain_phases()[:, None], 12, axis=1).astype(np.uint8)
    some = ["Left ventricular overload.", "Left atrial overload.", "STEMI: septal.", "Scar formation: anterior wall."]
    union = np.maximum.reduce([plain_labels(*PLACED[diagnosis]) for diagnosis in some])
    assert np.array_equal(ludb.mark(record, some), union)
    assert ludb.rules_of(NOTHING + UNPLACED) == [] and set(np.unique(ludb.mark(record, NOTHING))) == {0, 255}
    for diagnosis in UNPLACED:                      # somewhere in the record: what no rule marks has no truth
        assert (ludb.mark(record, [diagnosis]) == 255).all()
        scar = ludb.mark(record, [diagnosis, "Scar formation: septal."])
        assert np.array_equal(scar == 1, plain_labels(("QRS",), SEPTAL) == 1) and set(np.unique(scar)) == {1, 255}
    assert not ludb.rule_marks(ludb.RULES[0], record, ["Scar formation: septal."]).any()
    for diagnoses in ((), ("STEMI: septal.",), ("Rhythm: Atrial flutter, typical.", "Scar formation: septal.")):
        assert ludb.split_diagnoses(ludb.join_diagnoses(diagnoses)) == diagnoses


# ---- files

RECORDS = {3: ("Scar formation: septal.",), 1: (), 12: ("Rhythm: Atrial fibrillation.",), 2: ("STEMI: lateral wall.",)}
NO_P = [(number, "P") for number in range(len(STARTS))]
SKIPPED = {(12, lead): NO_P for lead in LEADS} | {(2, "V6"): [(5, "T")]}        # of record and lead


def make_ecg(number):
    """(5000, 12) mV, beats where the annotations have them."""
    beats = np.array([start + 95 for start in STARTS]) + 4 * np.sin(number + np.arange(len(STARTS)))
    return np.round(beats_at(beats / 500, width=9 / 500) * (1 + number / 20), 3)


def write_ludb(folder):
    """RECORDS, headers with diagnoses, signals with lower-case leads, and an annotation file a lead."""
    (folder / "data").mkdir(parents=True)
    (folder / "RECORDS").write_text("".join(f"data/{number}\n" for number in RECORDS))
    for number, diagnoses in RECORDS.items():
        write_wfdb(folder / "data" / str(number), make_ecg(number), leads=[lead.lower() for lead in LEADS],
                   comments=[f"<age>: {40 + number}", f"<sex>: {'FM'[number % 2]}", "<diagnoses>:",
                             "Rhythm: Sinus rhythm.", *diagnoses])
        for lead in LEADS:
            samples, symbols = annotate(SKIPPED.get((number, lead), ()))
            wfdb.wrann(str(number), "x", np.array(samples), symbol=list(symbols), write_dir=str(folder / "data"))
            (folder / "data" / f"{number}.x").rename(folder / "data" / f"{number}.{lead.lower()}")
    return folder


def preprocess(*flags):
    """Run to the end; returns the printed audit."""
    done = run_script("preprocess.py", "--workers", 1, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(monkeypatch, *flags):
    """The sentence with which preprocess.py refuses these flags before any work."""
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.prepare_all", lambda *_: pytest.fail("work was begun"))
        return run_script("preprocess.py", "--workers", 1, *flags).refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ludb(tmp_path_factory.mktemp("data sets") / "ludb")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """(data folder, stdout) of --ludb_path alone, where nothing was before."""
    data_path = tmp_path_factory.mktemp("alone") / "data"
    return data_path, preprocess("--ludb_path", folder, "--data_path", data_path)


def test_benchmark_alone(made):
    """Records in the order of RECORDS, normalised, with labels, phases, bounds, diagnoses and R peaks in their rows."""
    data_path, records = made[0], load(made[0], "benchmark")
    stored = records.signals
    filtered = [signals.filter_leads(make_ecg(number)) for number in RECORDS]
    np.testing.assert_allclose(stored, [signals.normalize_leads(record) for record in filtered], atol=1e-5)
    truth = arrays.load_details(data_path, "benchmark", stored)
    labels = arrays.open_labels(data_path, "benchmark", stored.shape)
    np.testing.assert_allclose(truth["low"], np.min(filtered, axis=1), atol=1e-5)
    np.testing.assert_allclose(truth["high"], np.max(filtered, axis=1), atol=1e-5)
    table = arrays.load_table(data_path, "benchmark", records)
    r_peaks = arrays.load_r_peaks(data_path, "benchmark", records, "heartpy")
    assert list(table) == ["ecg_id", "patient_id", "age", "sex", "label", "diagnoses", "r_peaks"]
    assert table["ecg_id"].tolist() == list(RECORDS) and len(set(table["patient_id"])) == 4
    assert table["age"].tolist() == [40 + number for number in RECORDS]
    assert table["sex"].tolist() == ["M", "M", "F", "F"]
    assert table["label"].tolist() == [1, 0, 1, 1]
    assert table["r_peaks"].tolist() == [len(found) for found in r_peaks] == [len(STARTS)] * 4
    assert [ludb.split_diagnoses(text)[1:] for text in table["diagnoses"]] == list(RECORDS.values())
    for row, number in enumerate(RECORDS):
        assert np.array_equal(labels[row], ludb.mark(truth["phases"][row], RECORDS[number]))
        assert all(abs(np.array([start + 95 for start in STARTS]) - r_peaks[row]) < 10)
    whole = np.repeat(plain_phases()[:, None], 12, axis=1)
    assert np.array_equal(truth["phases"][:2], [whole, whole])
    assert np.array_equal(labels[0], plain_labels(("QRS",), SEPTAL))
    fibrillating = plain_phases()
    fibrillating[np.isin(fibrillating, (1, 2))] = 6                                 # no P: T to QRS is one gap
    fibrillating[:STARTS[0] + 70] = 0                                               # the span begins with a QRS
    assert np.array_equal(truth["phases"][2], np.repeat(fibrillating[:, None], 12, axis=1))
    assert set(np.unique(labels[2][fibrillating == 6])) == {1} and set(np.unique(labels[2][fibrillating == 5])) == {0}
    unclear = slice(STARTS[5] + 121, STARTS[5] + 400)                               # QRS to P without T, in V6
    assert (labels[3, unclear, 11] == 255).all() and (labels[3, unclear, 10] != 255).all()


def test_audit_is_a_count_by_hand(made):
    """What is printed and kept in the manifest of records, points, rules and diagnoses equals the arrays."""
    data_path, stored = made[0], load(made[0], "benchmark").signals
    manifest, labels = arrays.load_manifest(data_path), np.load(data_path / "benchmark_label.npy")
    entry = manifest["benchmark"]
    audit = entry["audit"]
    assert set(manifest) == {"benchmark", "arrays"} and arrays.describes(manifest, "benchmark", stored)
    assert (entry["data_set"], entry["version"], entry["records_in_table"], entry["lost"]) == ("LUDB", "unknown", 4, [])
    assert [audit[name] for name in ("records", "missing", "lost", "no R peak", "with marks")] == [4, 0, 0, 0, 3]
    assert (audit["points"], audit["annotated"], audit["marked"]) == (
        labels.size, np.count_nonzero(labels != 255), np.count_nonzero(labels == 1))
    assert sum(of["points"] for of in audit["phases"].values()) == audit["annotated"]
    assert sum(of["marked"] for of in audit["phases"].values()) == audit["marked"]
    assert {key: of["records"] for key, of in audit["rules"].items() if of["records"]} == {
        "scar": 1, "atrial_fibrillation": 1, "ischemia": 1}
    assert audit["rules"]["scar"]["points"] == np.count_nonzero(labels[0] == 1) == len(STARTS) * 51 * 2
    assert audit["unplaced"] == {"Rhythm: Sinus rhythm.": 4}
    assert "LUDB: 4 records, 0 missing, 0 lost; 4 in the benchmark, 3 of them with marked points" in made[1]


def test_lost_and_missing_records_are_counted(folder, made, tmp_path, monkeypatch):
    """A lead's annotation that is absent or cut, or no signals: refused or counted, and named with the reason."""
    partial, data_path = Path(shutil.copytree(folder, tmp_path / "ludb")), tmp_path / "data"
    (partial / "data" / "1.dat").unlink()
    assert "1 of the 4 records" in (said := refuse(monkeypatch, "--ludb_path", partial, "--data_path", data_path))
    assert "data/1)" in said and "--allow_missing" in said and not data_path.exists()
    (partial / "data" / "12.avl").unlink()
    os.truncate(partial / "data" / "2.dat", 70000)
    stdout = preprocess("--ludb_path", partial, "--data_path", data_path, "--allow_missing")
    entry = arrays.load_manifest(data_path)["benchmark"]
    assert [loss["ecg_id"] for loss in entry["lost"]] == [12, 2] and "lead aVL" in entry["lost"][0]["reason"]
    assert [entry["audit"][name] for name in ("records", "missing", "lost")] == [4, 1, 2]
    assert all(f"lost: record {loss['ecg_id']} (benchmark): {loss['reason']}\n" in stdout for loss in entry["lost"])
    records = load(data_path, "benchmark")
    assert arrays.load_table(data_path, "benchmark", records)["ecg_id"].tolist() == [3]
    assert np.array_equal(records.read([0]), load(made[0], "benchmark").read([0]))
    for path in (partial / "data").glob("*.v1"):
        path.unlink()
    done = run_script("preprocess.py", "--ludb_path", partial, "--data_path", data_path, "--allow_missing")
    assert "record 3: unreadable annotation of lead V1" in done.refusal


@pytest.mark.parametrize("content", [None, "", "data/1\ndata/1\n", "data/one\n", "<html>404</html>"])
def test_a_folder_that_is_not_ludb_is_refused(tmp_path, monkeypatch, content):
    """No list of records, or one that cannot be LUDB's, is named."""
    if content is not None:
        (tmp_path / "RECORDS").write_text(content)
    assert str(tmp_path / "RECORDS") in refuse(monkeypatch, "--ludb_path", tmp_path, "--data_path", tmp_path / "data")


def test_flags_that_do_not_fit_are_refused(folder, tmp_path, monkeypatch):
    """No data set at all, or two sources of one benchmark."""
    assert "--ptbxl_path" in refuse(monkeypatch) and "--ludb_path" in refuse(monkeypatch)
    for flags in (("--ludb_path", folder), ("--ludb_path", folder, "--ptbxl_path", tmp_path)):
        assert "--benchmark_truth" in refuse(monkeypatch, *flags, "--benchmark_truth", "truth.npz")


def test_benchmark_and_ptbxl_live_together(folder, made, tmp_path_factory):
    """One after the other or at once, each keeps the other's arrays and manifest entries; ours can be made again."""
    ptbxl, data_path = (tmp_path_factory.mktemp(name) for name in ("ptb-xl", "data"))
    from_ptbxl = ("--ptbxl_path", write_ptbxl(ptbxl), "--limit", 20, "--data_path", data_path)
    shutil.copytree(made[0], data_path, dirs_exist_ok=True)
    alone, alone_files = arrays.load_manifest(data_path), read_all(data_path)

    preprocess(*from_ptbxl)
    first, first_files = arrays.load_manifest(data_path), read_all(data_path)
    assert first["benchmark"] == alone["benchmark"] and list(first["arrays"]) == ["train", "val", "test", "benchmark"]
    assert first["arrays"]["benchmark"] == alone["arrays"]["benchmark"] and first["source"]["data_set"] == "PTB-XL"
    assert all(first_files[name] == content for name, content in alone_files.items() if name != "manifest.json")
    np.testing.assert_allclose(load(data_path, "val").signals[0], ptbxl_row(34, "val"), atol=1e-5)

    preprocess(*from_ptbxl, "--ludb_path", folder)
    second, second_files = arrays.load_manifest(data_path), read_all(data_path)
    assert second["arrays"] == first["arrays"] and second["benchmark"]["audit"] == first["benchmark"]["audit"]
    assert second_files == first_files | {"manifest.json": second_files["manifest.json"]}

    np.save(data_path / "benchmark_data.npy", np.zeros((4, 5000, 12)))              # the authors' in the place of ours
    preprocess(*from_ptbxl)
    assert "benchmark" not in (third := arrays.load_manifest(data_path)) and "benchmark" not in third["arrays"]
