"""A small PTB-XL-shaped folder of simulated 12-lead ECGs: try the whole pipeline without any data.

    python -m tools.synthetic --out data/synthetic --records 600 --seed 0

The folder has the layout of PTB-XL 1.0.3, and localization_truth.npz: ecg_id (M,) int64 and label (M, 5000, 12)
uint8, 1 = anomalous sample of that lead, for the abnormal records of fold 10. No score on it speaks of real ECGs.

A heartbeat is a sum of Gaussians in time (McSharry et al. 2003, IEEE Trans Biomed Eng 50:289), each with a direction
in space, seen from the chest and limb leads (Sameni et al. 2007, EURASIP J Adv Signal Process 043407).
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb
from scipy.ndimage import binary_closing
from scipy.signal import butter, resample_poly, sosfilt
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from ecg.arrays import SIMULATED_MARKER
from ecg.leads import TO_TWELVE
from utils import UserError, run, write_atomically

RATE = 500  # Hz
SAMPLES = 10 * RATE
TIME = np.arange(SAMPLES) / RATE  # s
GAIN = 1000.0  # steps of the 16-bit files per mV
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
MEASURED = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")  # the other four follow from I and II

# The heart dipole (x left, y down, z back, in mV) on the leads of MEASURED: Dower, Machado & Osborne 1980,
# Clin Cardiol 3:87; also in Edenbrandt & Pahlm 1988, J Electrocardiol 21:361.
DOWER = np.array([[0.632, -0.235, 0.059], [0.235, 1.066, -0.132], [-0.515, 0.157, -0.917], [0.044, 0.164, -1.387],
                  [0.882, 0.098, -1.277], [1.213, 0.127, -0.601], [1.125, 0.127, -0.086], [0.831, 0.076, 0.230]])
MUSCLE_BAND = butter(2, (20, 150), "bandpass", fs=RATE, output="sos")
TRUTH_THRESHOLD = 0.05  # mV between the abnormal ECG and its own normal counterpart, half a small square of ECG paper
TRUTH_GAP = 0.040  # s; a shorter gap is a zero crossing of the difference, and is marked too

MARKER_START = "Simulated ECGs, not recordings of patients; written by synthetic.py"
MIN_RECORDS = 40  # fewer leave a fold without a normal to validate on, or fold 10 with a handful of abnormals


@dataclass
class Wave:
    """A Gaussian around `centre` s after the R peak: sigma `rise` s before it, `fall` s after it.

    dipole: (x, y, z) mV. local: mV on single leads of MEASURED, the part of a wall so near to one electrode that
    no dipole describes it (the chest leads; I and II carry the limb leads along).
    """
    centre: float
    rise: float
    fall: float
    dipole: tuple
    local: dict = None


@dataclass
class Person:
    """What differs from record to record, constant within it."""
    rr: float  # mean RR interval, s
    pr: float  # onset of P to onset of QRS, s
    qt: float  # onset of QRS to end of T, s
    qrs_width: float  # 1 is the standard
    wave_size: dict  # factor by wave: P, Q, R, S, T
    rotation: np.ndarray  # (3, 3), turns every dipole: the electrical axis
    lead_gain: np.ndarray  # (8,) build and electrode contact


@dataclass
class Record:
    """A simulated ECG: signal (5000, 12) mV at 500 Hz, R peaks in s, truth (5000, 12) uint8, and its row's content."""
    ecg_id: int
    kind: str  # code of the simulated abnormality, "NORM" where there is none
    scp_codes: dict
    fold: int
    age: int
    sex: int
    signal: np.ndarray
    r_times: np.ndarray
    truth: np.ndarray


def draw_person(rng) -> Person:
    """Draw a healthy person: 50 to 95 beats a minute, QTc by Bazett 0.38 to 0.42 s, axis around 60 degrees."""
    rr = 60 / rng.uniform(50, 95)
    axis = Rotation.from_euler("zy", rng.normal(0, (10, 7)).clip(-22, 22), degrees=True)
    lead_gain = np.r_[1, 1, rng.normal(1, 0.10, 6).clip(0.75, 1.25)] * rng.uniform(0.8, 1.25)
    return Person(rr=rr, pr=rng.uniform(0.13, 0.18), qt=rng.uniform(0.38, 0.42) * np.sqrt(rr),
                  qrs_width=rng.uniform(0.9, 1.12), rotation=axis.as_matrix(), lead_gain=lead_gain,
                  wave_size=dict(zip("PQRST", rng.normal(1, 0.12, 5).clip(0.7, 1.3))))


def normal_beat(person) -> dict:
    """The waves of a normal beat by name. QRS begins 40 ms before the R peak."""
    p_peak = -0.04 - person.pr + 0.045
    t_fall = 0.105 * person.qt
    w = person.qrs_width
    beat = {"P1": Wave(p_peak, 0.018, 0.018, (0.05, 0.10, -0.03)),  # right atrium, then left: V1 is biphasic
            "P2": Wave(p_peak + 0.028, 0.018, 0.018, (0.12, 0.07, 0.03)),
            "Q": Wave(-0.026 * w, 0.009 * w, 0.009 * w, (-0.22, -0.06, -0.28)),  # septum, to the right: r in V1
            "R": Wave(0.0, 0.0125 * w, 0.0125 * w, (1.10, 0.98, 0.42)),  # free wall of the left ventricle
            "S": Wave(0.027 * w, 0.011 * w, 0.011 * w, (-0.18, -0.12, 0.60)),  # base, to the back: S in V1 to V3
            "T": Wave(person.qt - 0.04 - 2.2 * t_fall, 0.165 * person.qt, t_fall, (0.40, 0.22, -0.17))}
    return {name: replace(wave, dipole=person.wave_size[name[0]] * np.array(wave.dipole))
            for name, wave in beat.items()}


@dataclass
class Abnormality:
    """A row of the table below. The truth is computed (see `mark`); `marked` and `spared` say what comes out of it."""
    name: str
    code: str
    superclass: str
    feature: str  # what a textbook looks for
    change: Callable  # waves of a normal beat -> those that replace or join them
    marked: str
    spared: tuple = ()  # leads without any mark
    every_beat: bool = True


LIMB, CHEST = LEADS[:6], LEADS[6:]
ABNORMALITIES = (
    Abnormality("complete left bundle branch block", "CLBBB", "CD",
        "no septal q, QRS of 150 ms: broad and notched in I, V5, V6, deep in V1; T opposite to it",
        lambda beat: {"Q": Wave(-0.030, 0.010, 0.010, (0.10, 0.05, 0.10)),
                      "R": Wave(0.000, 0.018, 0.018, (0.75, 0.85, 0.65)),
                      "S": Wave(0.048, 0.020, 0.020, (1.00, 0.45, 0.95)),
                      "T": replace(beat["T"], dipole=(-0.50, -0.14, -0.42))},
        marked="QRS, ST and T of all leads"),
    Abnormality("anteroseptal myocardial infarction", "ASMI", "MI",
        "r lost (QS) and ST elevation that runs into T, in V1 to V4 alone: the wall under them",
        lambda beat: {"Q": replace(beat["Q"], local={"V1": -0.40, "V2": -0.55, "V3": -0.45, "V4": -0.15}),
                      "ST": Wave(0.12, 0.035, 0.080, (0, 0, 0), {"V1": 0.15, "V2": 0.45, "V3": 0.50, "V4": 0.32})},
        marked="start of QRS, ST and T of V1 to V4", spared=LIMB + ("V5", "V6")),
    Abnormality("inferior myocardial infarction", "IMI", "MI",
        "broad Q and ST elevation in II, III, aVF, their mirror image in I and aVL",
        lambda beat: {"Q2": Wave(-0.036, 0.012, 0.012, (0, 0, 0), {"I": 0.05, "II": -0.32}),
                      "ST": Wave(0.12, 0.035, 0.080, (0, 0, 0), {"I": -0.15, "II": 0.30})},
        marked="Q, ST and T of the limb leads", spared=CHEST),
    Abnormality("ischemic in anterolateral leads", "ISCAL", "STTC",
        "deep symmetric T inversion in I, aVL, V4 to V6: the side wall repolarises backwards",
        lambda beat: {"T2": replace(beat["T"], rise=beat["T"].fall, dipole=(0, 0, 0),
                                    local={"I": -0.42, "II": -0.21, "V4": -0.80, "V5": -0.90, "V6": -0.65})},
        marked="T of I, II, III, aVR, aVL, V4 to V6", spared=("AVF", "V1", "V2", "V3")),
    Abnormality("left ventricular hypertrophy", "LVH", "HYP",
        "S in V1 + R in V5 over 3.5 mV (Sokolow-Lyon), late R; strain: ST sinks slowly into an inverted T in I, V5, V6",
        lambda beat: {"R": replace(beat["R"], fall=1.35 * beat["R"].fall, dipole=beat["R"].dipole * (1.9, 1.3, 2.2)),
                      "ST": Wave(0.12, 0.040, 0.060, (-0.18, -0.05, -0.08)),
                      "T": replace(beat["T"], fall=0.8 * beat["T"].fall, dipole=(-0.42, -0.06, -0.30))},
        marked="QRS, ST and T of all leads"),
    Abnormality("first degree AV block", "1AVB", "CD", "PR over 200 ms: 280 to 330 ms, in every beat",
        lambda beat: {name: replace(beat[name], centre=beat[name].centre - 0.150) for name in ("P1", "P2")},
        marked="where P is, and where it would be, of most leads"),
    Abnormality("non-specific intraventricular conduction disturbance (block)", "IVCD", "CD",
        "one beat of the record is 160 ms wide and turns to the right and front, its T opposite to it",
        lambda beat: {"Q": Wave(-0.030, 0.012, 0.012, (0.25, 0.20, 0.10)),
                      "R": Wave(0.000, 0.024, 0.024, (-0.35, 1.10, -0.45)),
                      "S": Wave(0.055, 0.024, 0.024, (-1.00, 0.10, -0.80)),
                      "T": replace(beat["T"], dipole=(0.60, -0.45, 0.45))},
        marked="QRS, ST and T of that beat, all leads", every_beat=False))


def draw_beats(rng, person) -> tuple:
    """R times (beats,) s, from one beat before the record to one after it, and the size (beats,) of each beat.

    Breathing changes both: RR by 1 to 4 % (respiratory sinus arrhythmia), the size by 3 %.
    """
    breath, phase, depth = rng.uniform(0.18, 0.30), rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.04)
    times = [rng.uniform(-1, 0) * person.rr]
    while times[-1] < SAMPLES / RATE + 0.5:
        swing = 1 + depth * np.sin(2 * np.pi * breath * times[-1] + phase) + rng.normal(0, 0.006)
        times.append(times[-1] + person.rr * swing)
    times = np.array(times)
    return times, 1 + 0.03 * np.sin(2 * np.pi * breath * times + phase + 1)


def clean_leads(person, beats, r_times, sizes) -> np.ndarray:
    """The noise-free leads of MEASURED (5000, 8), mV. beats: the waves of every beat, as `normal_beat` gives them."""
    shapes, amplitudes = [], []
    for beat, r_time, size in zip(beats, r_times, sizes):
        for wave in beat.values():
            delay = TIME - r_time - wave.centre
            shapes.append(np.exp(-0.5 * (delay / np.where(delay < 0, wave.rise, wave.fall)) ** 2))
            local = [(wave.local or {}).get(lead, 0) for lead in MEASURED]
            amplitudes.append(size * person.lead_gain * (DOWER @ person.rotation @ wave.dipole + local))
    return np.array(shapes).T @ np.array(amplitudes)


def draw_noise(rng) -> np.ndarray:
    """Baseline wander (slow, tenths of mV), muscle and amplifier noise (hundredths), (5000, 8), mV. No mains hum."""
    wander = np.zeros((SAMPLES, 8))
    for frequency in rng.uniform((0.05, 0.15, 0.25), (0.15, 0.25, 0.45)):
        wander += rng.normal(0, 0.04, 8) * np.sin(2 * np.pi * frequency * TIME[:, None] + rng.uniform(0, 2 * np.pi))
    muscle = rng.uniform(0.006, 0.022) * sosfilt(MUSCLE_BAND, rng.normal(0, 1, (SAMPLES, 8)), axis=0)
    return wander + muscle + rng.normal(0, 0.004, (SAMPLES, 8))


def mark(abnormal, normal) -> np.ndarray:
    """The samples where two noise-free ECGs (5000, 12) differ, without the short gaps: (5000, 12) uint8."""
    gap = round(TRUTH_GAP * RATE)
    differs = np.pad(np.abs(abnormal - normal) > TRUTH_THRESHOLD, ((gap, gap), (0, 0)))
    return binary_closing(differs, np.ones((gap, 1)))[gap:-gap].astype(np.uint8)


# N normal, A abnormal, X in turn abnormal that is also called normal (as 51 records of fold 10 of PTB-XL are) and
# normal without any diagnostic statement. Of 20 records 65 % are normal and 30 % abnormal.
PATTERN = "NNANNANNXANNNANNANNA"


def plan(ecg_id) -> tuple:
    """A record's abnormality (None: normal), scp_codes and fold. It depends on nothing but ecg_id.

    Normals go round the folds. Of five abnormals two go to fold 10 and two to fold 9, each of these two folds going
    round the kinds, and one to folds 1 to 8: there abnormals are never used, as models are trained on normals.
    """
    block, place = divmod(ecg_id - 1, len(PATTERN))
    role = PATTERN[place]
    nth = block * PATTERN.count(role) + PATTERN[:place].count(role)
    if role == "N":
        return None, {"NORM": 100.0, "SR": 0.0}, 1 + nth % 10
    if role == "X":
        fold, (nth, without_diagnosis) = 10 - nth // 2 % 10, divmod(nth, 2)
        if without_diagnosis:
            return None, {"SR": 0.0}, fold
        abnormality = ABNORMALITIES[nth % len(ABNORMALITIES)]
        return abnormality, {"NORM": 50.0, abnormality.code: 50.0, "SR": 0.0}, fold
    five, turn = divmod(nth, 5)
    fold = (10, 9, 1 + five % 8, 10, 9)[turn]
    abnormality = ABNORMALITIES[(2 * five, 2 * five, five, 2 * five + 1, 2 * five + 1)[turn] % len(ABNORMALITIES)]
    return abnormality, {abnormality.code: 100.0, "SR": 0.0}, fold


def simulate_record(seed, ecg_id) -> Record:
    """Simulate record ecg_id (1, 2, ...). The same seed and ecg_id always give the same record."""
    abnormality, scp_codes, fold = plan(ecg_id)
    rng = np.random.default_rng((seed, ecg_id))
    person = draw_person(rng)
    r_times, sizes = draw_beats(rng, person)
    age, sex = int(rng.integers(20, 86)), int(rng.integers(0, 2))
    noise = draw_noise(rng)
    normal = normal_beat(person)
    beats = [normal] * len(r_times)
    clean = counterpart = clean_leads(person, beats, r_times, sizes) @ TO_TWELVE.T
    if abnormality is not None:
        changed = normal | abnormality.change(normal)
        chosen = rng.choice(np.flatnonzero((r_times > 1) & (r_times < 8.5)))  # well inside, so the model sees all of it
        beats = [changed if abnormality.every_beat or place == chosen else normal for place in range(len(beats))]
        clean = clean_leads(person, beats, r_times, sizes) @ TO_TWELVE.T
    return Record(ecg_id, abnormality.code if abnormality else "NORM", scp_codes, fold, age, sex,
                  signal=clean + noise @ TO_TWELVE.T, r_times=r_times[(r_times >= 0) & (r_times < SAMPLES / RATE)],
                  truth=mark(clean, counterpart))


def write_record(out, record) -> dict:
    """Write the two WFDB records, 500 Hz and 100 Hz, and return their names relative to out, as PTB-XL names them."""
    names = {}
    for column, rate, suffix in (("filename_hr", RATE, "hr"), ("filename_lr", 100, "lr")):
        signal = record.signal if rate == RATE else resample_poly(record.signal, rate, RATE, padtype="line")
        folder = f"records{rate}/{record.ecg_id // 1000 * 1000:05d}"
        name = f"{record.ecg_id:05d}_{suffix}"
        (out / folder).mkdir(parents=True, exist_ok=True)
        wfdb.wrsamp(name, fs=rate, units=["mV"] * 12, sig_name=list(LEADS), d_signal=np.rint(GAIN * signal).astype(int),
                    fmt=["16"] * 12, adc_gain=[GAIN] * 12, baseline=[0] * 12, write_dir=str(out / folder))
        names[column] = f"{folder}/{name}"
    return names


def write_csv(path, rows):
    """Write dicts as a CSV file, atomically; what a row lacks stays empty."""
    write_atomically(path, lambda file: file.write(pd.DataFrame(rows).to_csv(index=False).encode()))


def prepare_folder(out, seed, records):
    """Make out an empty folder with the marker. What an earlier run left is removed; any other content is refused."""
    marker = out / SIMULATED_MARKER
    if out.exists() and any(out.iterdir()):
        if not (marker.is_file() and marker.read_text(errors="replace").startswith(MARKER_START)):
            raise UserError(f"--out {out} holds files that synthetic.py did not write; choose a new or empty folder")
        for name in ("ptbxl_database.csv", "scp_statements.csv", "localization_truth.npz"):
            (out / name).unlink(missing_ok=True)
        for path in out.glob("records[15]00/*/[0-9][0-9][0-9][0-9][0-9]_[hl]r.*"):
            path.unlink()
    text = f"{MARKER_START}: {records} records, --seed {seed}.\nNo score on them says anything about real ECGs.\n"
    write_atomically(marker, lambda file: file.write(text.encode()))


def write_dataset(out, records, seed):
    """Write the whole folder. ptbxl_database.csv comes last: a folder with it is complete.

    Raises UserError where records or seed is out of range, or out cannot be written or holds other files.
    """
    if records < MIN_RECORDS:
        raise UserError(f"--records {records} is too few to fill ten folds; ask for {MIN_RECORDS} or more")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; choose 0 or more")
    out = Path(out)
    rows, truths = [], {}
    try:
        prepare_folder(out, seed, records)
        for ecg_id in tqdm(range(1, records + 1), unit="record"):
            record = simulate_record(seed, ecg_id)
            rows.append({"ecg_id": ecg_id, "patient_id": f"{ecg_id}.0", "age": f"{record.age}.0", "sex": record.sex,
                         "report": f"simulated {record.kind}", "scp_codes": str(record.scp_codes),
                         "strat_fold": record.fold, **write_record(out, record)})
            if record.fold == 10 and record.kind != "NORM":
                truths[ecg_id] = record.truth
    except OSError as error:
        raise UserError(f"--out {out} could not be written ({error.strerror}); free some space or choose another folder"
                        ) from error
    write_atomically(out / "localization_truth.npz", lambda file: np.savez_compressed(
        file, ecg_id=np.array(list(truths), np.int64), label=np.array(list(truths.values()))))
    diagnoses = [("NORM", "normal ECG", "NORM")] + [(kind.code, kind.name, kind.superclass) for kind in ABNORMALITIES]
    statements = [{"": code, "description": name, "diagnostic": "1.0", "diagnostic_class": superclass}
                  for code, name, superclass in diagnoses]
    statements.append({"": "SR", "description": "sinus rhythm", "rhythm": "1.0"})
    write_csv(out / "scp_statements.csv", statements)
    write_csv(out / "ptbxl_database.csv", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write; new, empty, or written by synthetic.py before")
    parser.add_argument("--records", type=int, default=600, help="number of records, 40 or more (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default 0)")
    args = parser.parse_args()
    write_dataset(args.out, args.records, args.seed)
    print(f"{args.records} simulated records in {args.out}; they are made up, as {SIMULATED_MARKER} there says")


if __name__ == "__main__":
    run(main)
