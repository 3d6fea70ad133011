"""Implanted lesions on simulated normal beats: what each kind does, where it is marked, and what must not change."""
import functools

import numpy as np
import pytest
from conftest import run_script

from ecg import arrays
from ecg.arrays import EXCLUDED
from ecg.lesions import KINDS, MAKERS, TERRITORIES, VISIBLE, implant, implant_some, rng_of
from ecg.ludb import PHASES
from ecg.r_peaks import find_r_peaks_by_slope
from ecg.signals import filter_leads
from ecg.leads import INDEPENDENT, TO_TWELVE
from ecg.waveforms import read_ecg
from ecg.waves import find_waves
from evaluation.lesions import open_lesions
from utils import UserError, save_json

RR, R_PEAKS = 450, np.arange(300, 5000, 450, dtype=np.int32)    # samples at 500 Hz: 67 beats a minute
# (after R, width) s, and mV in I, II, V1 ... V6: P, r or q, R, S, T of a healthy heart
WAVES = ((-0.150, 0.022, (0.08, 0.14, 0.06, 0.07, 0.07, 0.07, 0.07, 0.06)),
         (-0.030, 0.008, (-0.05, -0.05, 0.15, 0.20, 0.20, 0.10, -0.10, -0.10)),
         (0.000, 0.011, (0.70, 1.00, 0.05, 0.40, 0.80, 1.40, 1.30, 1.10)),
         (0.030, 0.010, (-0.10, -0.10, -0.90, -1.20, -0.80, -0.40, -0.20, -0.05)),
         (0.280, 0.045, (0.25, 0.35, 0.20, 0.50, 0.50, 0.45, 0.35, 0.30)))
SEEDS = range(2)


def simulate(seed=0, waves=WAVES, r_peaks=R_PEAKS):
    """(5000, 12) mV: these waves at every R peak, with 5 uV of noise, filtered."""
    time = np.arange(5000) / 500
    noise = np.random.default_rng(seed).normal(0, 0.005, (5000, 8))
    beats = sum(np.exp(-((time - r / 500 - centre) / width) ** 2 / 2)[:, None] * size
                for r in [r_peaks[0] - RR, *r_peaks, r_peaks[-1] + RR] for centre, width, size in waves)
    return filter_leads((beats + noise) @ TO_TWELVE.T)


NORMAL = simulate()
ECG = read_ecg(NORMAL, R_PEAKS)


@functools.cache
def lesion(kind, seed):
    """(changed ECG, marks (5000, 12) bool, description, phases, truth) of a lesion in a simulated normal."""
    row = implant(ECG, kind, np.random.default_rng(seed))
    return row.signal, row.truth == 1, row.description, row.phases, row.truth


def beat_of(signal):
    """The median beat, (440, 12), 200 samples before R; level between T and P at 0."""
    beat = np.median([signal[r - 200:r + 240] for r in R_PEAKS[1:-1]], axis=0)
    return beat - beat[:60].mean(axis=0)


def places(description):
    """Territory of a description: (indices of the independent ones among the twelve leads, name)."""
    name = description.split(", ")[-1]
    return [INDEPENDENT[column] for column in TERRITORIES[name]], name


def second_difference(signal):
    """The 99.9th percentile of its size."""
    return np.percentile(np.abs(np.diff(signal, 2, axis=0)), 99.9)


@pytest.mark.parametrize("kind", MAKERS)
def test_laws_and_smoothness(kind):
    """Einthoven's and Goldberger's laws hold, no step stands out, and only a part of the record is marked."""
    for seed in SEEDS:
        changed, marked, description, phases, truth = lesion(kind, seed)
        assert changed.dtype == np.float32 and truth.dtype == phases.dtype == np.uint8
        assert set(np.unique(truth)) <= {0, 1, EXCLUDED} and phases.max() <= len(PHASES) and description
        one, two, three, right, left, foot = changed.astype(np.float64).T[:6]
        for residual in (one + three - two, right + (one + two) / 2, left - one + two / 2, foot - two + one / 2):
            assert np.abs(residual).max() < 2e-6                # of float32
        assert second_difference(changed - NORMAL) <= 1.1 * second_difference(NORMAL)
        assert 0.002 < marked.mean() < 0.5


@pytest.mark.parametrize("kind", MAKERS)
def test_truth_is_where_it_changed(kind):
    """Marked is what changed visibly and short gaps in it; what changed beside it, or has no phase, is not scored."""
    for seed in SEEDS:
        changed, marked, _, phases, truth = lesion(kind, seed)
        visible = np.abs(changed - NORMAL) > VISIBLE
        assert visible[marked].mean() > 0.8                     # the others are short gaps
        for lead in np.flatnonzero(marked.any(axis=0)):
            edges = np.flatnonzero(np.diff(np.r_[0, marked[:, lead], 0].astype(int))).reshape(-1, 2)
            assert all(visible[start:stop, lead].any() for start, stop in edges)
            assert (edges[1:, 0] - edges[:-1, 1] >= 18).all()   # shorter gaps are marked
        assert not marked[:, ~visible.any(axis=0)].any()
        beside = np.abs(changed.astype(np.float64) - NORMAL) - VISIBLE
        aside = ~marked & (np.abs(beside) > 1e-6)               # of float32
        assert ((truth == EXCLUDED) == ((beside > 0) | (phases == 0)[:, None]))[aside].all()
        if kind in ("p_loss", "long_pr"):                       # too small for an undershoot above 20 uV
            assert not (visible & (truth == 0)).any()


def test_none_is_the_record_itself():
    changed, marked, _, phases, truth = lesion("none", 0)
    assert np.array_equal(changed, NORMAL.astype(np.float32)) and not marked.any()
    assert [phases[2100 + offset] for offset in (-75, -35, 0, 45, 135, 220)] == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(truth == EXCLUDED, np.repeat((phases == 0)[:, None], 12, axis=1))


def test_t_changes_sign_in_its_territory_alone():
    found = set()
    for seed in range(12):
        changed, marked, description, *_ = lesion("t_wave", seed)
        leads, name = places(description)
        before, after = (beat_of(signal)[340] for signal in (NORMAL, changed))
        found.add(name)
        assert (before[leads] > 0.08).all()
        if "inverted" in description:
            assert after[leads].min() < -0.1 and (after[leads] < 0).all()
        else:
            assert (np.abs(after[leads]) < 0.1).all()
        others = [lead for lead in range(12) if lead not in leads and (lead > 5 or leads[0] > 5)]
        others += [1] if name == "lateral" else [0] if name == "inferior" else []
        assert np.abs(changed - NORMAL)[:, others].max() < 1e-6 and not marked[:, others].any()
        assert not marked[R_PEAKS[3] - 100:R_PEAKS[3] + 30].any()            # neither P nor QRS
    assert found == set(TERRITORIES)


def test_st_moves_by_what_it_says():
    for seed in range(8):
        changed, _, description, *_ = lesion("st_segment", seed)
        leads, name = places(description)
        size = float(description.split()[1])
        change = beat_of(changed)[270, leads] - beat_of(NORMAL)[270, leads]  # 140 ms after R, against TP
        assert (change / size > 0.45).all() and (change / size < 1).all()   # the high-pass takes a third
        assert 0.1 < abs(size) <= 0.3 and (abs(size) > 0.2 or size < 0 or name in ("lateral", "inferior"))


def test_q_is_deep_and_wide():
    for seed in range(6):
        changed, _, description, *_ = lesion("q_wave", seed)
        for lead in places(description)[0]:
            beat = beat_of(changed)[:, lead]
            q = beat[165:200] - beat[150]
            longest = 2 * np.diff(np.flatnonzero(np.r_[True, q > -0.02, True])).max()
            assert q.min() < -0.1 and longest >= (20 if lead in (6, 7, 8) else 30)      # ms; V2 and V3: 20


def test_r_is_lost_in_its_territory():
    found = set()
    for seed in range(6):
        changed, _, description, *_ = lesion("r_loss", seed)
        before, after = (beat_of(signal)[175:225, places(description)[0]].max(axis=0) for signal in (NORMAL, changed))
        found.add(description.split()[0])
        assert (after < 0.5 * before).all()
        if description.startswith("QS"):
            assert (after < 0.1).all()
    assert found == {"QS", "R"}


def test_wide_qrs_is_wide():
    found = set()
    for seed in range(8):
        changed, _, description, *_ = lesion("wide_qrs", seed)
        width = float(description.split()[1])
        onset, end = find_waves(changed, R_PEAKS).qrs
        assert width >= 130 and 2 * (end - onset) >= 115
        late = beat_of(changed)[235]                            # 70 ms after R
        right = "right" in description
        found.add(right)
        assert late[6] > 0.2 and late[11] < -0.1 if right else late[6] < -0.2 and late[11] > 0.2
        t = beat_of(changed)[330] - beat_of(NORMAL)[330]
        assert t[6] * (1 if right else -1) < -0.1               # against the late forces
    assert found == {True, False}


def test_p_is_gone():
    changed = lesion("p_loss", 0)[0]
    parts = [beat_of(signal)[95:155][:, INDEPENDENT] for signal in (NORMAL, changed)]
    before, after = (((part - np.linspace(part[0], part[-1], len(part))) ** 2).sum(axis=0) for part in parts)
    assert (after < 0.06 * before).all()
    assert np.abs(beat_of(changed)[180:] - beat_of(NORMAL)[180:]).max() < 0.01


def test_pr_is_as_long_as_it_says():
    for seed in SEEDS:
        changed, marks, description, phase, _ = lesion("long_pr", seed)
        drawn, present = int(description.split()[1]), int(description.split()[4])
        moved = np.argmax(beat_of(changed)[20:160, 1]) - np.argmax(beat_of(NORMAL)[20:160, 1])
        assert drawn >= 220 and abs(2 * moved + drawn - present) <= 8
        p = R_PEAKS[4] - 75
        assert marks[p, 1] and marks[p - (drawn - present) // 2, 1]         # the old place and the new
        assert phase[p - (drawn - present) // 2] == 1


def test_ventricular_beat_is_wide_and_early_with_a_pause():
    for seed in range(4):
        changed, marks, description, phase, _ = lesion("ventricular_beat", seed)
        early = int(description.split(", ")[1].split()[0])
        marked = np.flatnonzero(marks.any(axis=1))
        onset = marked[0]
        missing = R_PEAKS[np.searchsorted(R_PEAKS, onset)]      # the sinus beat that it takes the place of
        assert early >= 100 and abs((missing - 20 - onset) * 2 - early) <= 24
        assert marked[-1] - onset > 150 and marks.any(axis=0).all()
        qrs = np.flatnonzero((phase == 3) & (np.abs(np.arange(5000) - onset) < 100))
        assert len(qrs) * 2 >= 130
        steep = np.abs(np.gradient(changed[missing - 30:missing + 30], axis=0)).max()
        assert steep < 0.6 * np.abs(np.gradient(NORMAL[missing - 30:missing + 30], axis=0)).max()   # no sinus QRS
        assert missing + RR - onset > RR                        # the pause
        near = np.zeros(5000, dtype=bool)
        near[max(0, onset - 500):marked[-1] + 500] = True
        assert np.abs(changed - NORMAL)[~near].max() < 0.05     # no other beat has moved
        assert (phase[marked[-1] + 10:missing + 150] == 0).all()


def test_atrial_beat_is_an_early_normal_qrs_with_another_p():
    for seed in range(4):
        changed, marks, description, phase, _ = lesion("atrial_beat", seed)
        early = int(description.split(", ")[1].split()[0]) // 2
        marked = np.flatnonzero(marks.any(axis=1))
        missing = R_PEAKS[np.argmin(np.abs(R_PEAKS - early + 20 - marked.mean()))]
        r = missing - early
        assert 0.15 * RR <= early <= 0.36 * RR
        parts = [signal[centre - 25:centre + 30] for signal, centre in ((changed, r), (NORMAL, missing))]
        flat = [(part - part.mean(axis=0)).ravel() for part in parts]
        assert np.corrcoef(*flat)[0, 1] > 0.99
        p = changed[r - 110:r - 45, 1]
        assert (p - np.linspace(p[0], p[-1], len(p))).min() < -0.05         # negative in II
        gone = changed[missing - 25:missing + 30]
        assert np.abs(np.gradient(gone, axis=0)).max() < 0.3 * np.abs(np.gradient(parts[1], axis=0)).max()
        for other in R_PEAKS[np.abs(R_PEAKS - missing) > 900]:
            assert np.abs(changed - NORMAL)[other - 20:other + 20].max() < 0.05
        assert (phase[r + 200:missing + 150] == 0).all() and phase[r] == 3


def test_voltage_reaches_its_criterion():
    found = set()
    for seed in range(9):
        changed, marked, description, *_ = lesion("voltage", seed)
        name = description.removeprefix("QRS voltage ").rsplit(", ", 1)[0]
        found.add(name)
        qrs = beat_of(changed)[170:240]
        if name == "low, limb":
            assert np.ptp(qrs[:, :6], axis=0).max() < 0.5 and not marked[:, 6:].any()
        elif name == "low, chest":
            assert np.ptp(qrs[:, 6:], axis=0).max() < 1.0 and not marked[:, :6].any()
        else:
            assert qrs[:, 10:].max() - qrs[:, 6].min() > 2.9 and not marked[:, :6].any()
    assert found == {"low, limb", "low, chest", "high, chest"}


def test_no_room():
    """What a record lacks cannot be changed, and one with irregular beats takes no lesion at all."""
    def possible(kind, signal):
        return implant(read_ecg(signal, R_PEAKS), kind, np.random.default_rng(0)) is not None
    without_p, flat_t = simulate(waves=WAVES[1:]), simulate(waves=WAVES[:-1] + ((0.28, 0.045, (0.05,) * 8),))
    assert [possible(kind, without_p) for kind in ("p_loss", "long_pr", "atrial_beat", "st_segment")] == [False] * 3 + [
        True]
    assert not possible("t_wave", flat_t)
    assert read_ecg(NORMAL, R_PEAKS[:3]) is None
    assert read_ecg(NORMAL, np.sort(np.r_[R_PEAKS, R_PEAKS[4] + 200])) is None      # a T counted as a beat
    assert read_ecg(lesion("ventricular_beat", 0)[0], R_PEAKS) is None              # a beat is not where it should be


def test_a_record_gives_the_same_rows_always():
    """Its lesions follow from its ecg_id alone: not from other records, nor from how many it gets."""
    rows, all_kinds = implant_some(12, NORMAL, R_PEAKS), implant_some(12, NORMAL, R_PEAKS, lesions=len(MAKERS))
    assert len(rows) == 4 and rows[0].kind == "none" and sorted(row.kind for row in all_kinds) == sorted(KINDS)
    by_kind = {row.kind: row for row in all_kinds}
    for row in rows:
        twin = by_kind[row.kind]
        assert row.description == twin.description
        assert all(np.array_equal(getattr(row, part), getattr(twin, part)) for part in ("signal", "truth", "phases"))
    assert [row.kind for row in implant_some(13, NORMAL, R_PEAKS)] != [row.kind for row in rows]
    assert implant_some(14, NORMAL, R_PEAKS[:2]) == []
    assert len({rng_of(ecg_id, kind).random() for ecg_id in (11, 12) for kind in ("t_wave", "voltage")}) == 4


@pytest.fixture
def data_path(tmp_path):
    """A folder with three records of fold 9, the last one abnormal, as preprocess.py writes them."""
    signals = np.stack([simulate(seed) for seed in range(3)]).astype(np.float32)
    np.save(tmp_path / "val.npy", signals)
    np.save(tmp_path / "val_label.npy", np.array([0, 0, 1], np.uint8))
    (tmp_path / "val_records.csv").write_text("ecg_id,patient_id,age,sex,fold\n7,3,50,F,9\n8,4,,,9\n9,5,60,M,9\n")
    save_json(tmp_path / "manifest.json", {"arrays": {"val": {"shape": list(signals.shape),
                                                              "fingerprint": arrays.fingerprint(signals)}}})
    return tmp_path


def test_preprocess_writes_the_lesions_of_the_normals(data_path):
    """From the arrays alone: rows, truth, phases, table and R peaks side by side; the same again; all else stays."""
    before = {path.name: path.read_bytes() for path in data_path.iterdir() if path.name != "manifest.json"}
    line = "preprocess.py", "--data_path", data_path, "--lesions", 1, "--workers", 1
    finished = run_script(*line)
    assert finished.returncode == 0, finished.stderr
    assert "2 normals, 0 of them refused" in finished.stdout and "none 2" in finished.stdout
    records = arrays.open_records(data_path, "val_lesions", 12)
    truth, phases = np.load(data_path / "val_lesions_truth.npy"), np.load(data_path / "val_lesions_phases.npy")
    table, r_peaks = (arrays.load_table(data_path, "val_lesions", records),
                      arrays.load_r_peaks(data_path, "val_lesions", records, "slope"))
    assert table["ecg_id"].tolist() == [7] * 4 + [8] * 4 and table["patient_id"].tolist() == ["3"] * 4 + ["4"] * 4
    source = np.load(data_path / "val.npy")
    rows = [row for number, ecg_id in enumerate((7, 8)) for row in implant_some(
        ecg_id, source[number], find_r_peaks_by_slope(source[number]))]
    for place, row in enumerate(rows):
        assert (table["kind"][place], table["description"][place]) == (row.kind, row.description)
        for found, expected in ((records.signals, row.signal), (truth, row.truth), (phases, row.phases)):
            np.testing.assert_array_equal(found[place], expected)
        np.testing.assert_array_equal(r_peaks[place], find_r_peaks_by_slope(row.signal))
    assert {name: (data_path / name).read_bytes() for name in before} == before
    assert "val" in arrays.load_manifest(data_path)["arrays"]
    written = {path.name: path.read_bytes() for path in data_path.glob("val_lesions*.np*")}
    assert run_script(*line).returncode == 0
    assert {path.name: path.read_bytes() for path in data_path.glob("val_lesions*.np*")} == written


def test_lesions_belong_to_the_records_that_they_were_made_of(data_path):
    """Beside other records than their own they are refused, with the remedy; without a source there is nothing."""
    run_script("preprocess.py", "--data_path", data_path, "--lesions", 1, "--workers", 1, "--limit", 1)
    source = arrays.open_records(data_path, "val", 12)
    assert open_lesions(data_path, "val", source).kinds[0] == "none"
    assert open_lesions(data_path, "test", source) is None
    source.signals = source.signals[::-1]
    with pytest.raises(UserError, match="preprocess.py --lesions 1"):
        open_lesions(data_path, "val", source)
    (data_path / "val.npy").unlink()
    finished = run_script("preprocess.py", "--data_path", data_path, "--lesions", 1)
    assert finished.returncode == 2 and "neither val.npy nor test.npy" in finished.stderr
