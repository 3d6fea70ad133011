"""Beats of the MIT-BIH arrhythmia database: what cardiologists called each, both splits, and windows around them.

Moody & Mark 2001 (IEEE Eng Med Biol 20:45); 48 records of 30 minutes, two leads, 360 Hz. The protocol "within" is
BeatGAN's (Zhou et al., IJCAI 2019), which the paper follows: beats of one patient stand on both sides. "between" trains
on patients of DS1 and tests on DS2 (de Chazal et al. 2004, IEEE Trans Biomed Eng 51:1196).

Windows overlap so that each beat is a valid one (dataloader.valid_beats) of exactly one window. A record begins and
ends with zeros, so that its first and last beats are whole.
"""
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ecg.arrays import fingerprint
from ecg.beats import BEATS, MANIFEST, OTHER, PARTS, SPLITS, WINDOWS
from ecg.r_peaks import find_r_peaks_by_slope
from ecg.signals import RECORD_LENGTH, SAMPLING_RATE, RecordError, filter_leads, resample
from ecg.writing import require_described
from utils import UserError, git_commit, pack_json, versions, write_together

SOURCE = "MIT-BIH arrhythmia database"
RATE, LEAD = 360, "MLII"                                # Hz, of the files; the lead that stands first
DS1 = ("101", "106", "108", "109", "112", "114", "115", "116", "118", "119", "122", "124", "201", "203", "205", "207",
       "208", "209", "215", "220", "223", "230")
DS2 = ("100", "103", "105", "111", "113", "117", "121", "123", "200", "202", "210", "212", "213", "214", "219", "221",
       "222", "228", "231", "232", "233", "234")
HELD_BACK = DS1[4::5]                                   # of DS1, for thresholds: every fifth patient
CLASSES = {"N": "NLR", "S": "aJASje", "V": "VE", "F": "F", "Q": "/fQ"}         # by annotation
CLASS_OF = {symbol: name for name, symbols in CLASSES.items() for symbol in symbols}
BEFORE, AFTER, NEAR = 140, 180, 10                      # samples at 360 Hz: a beat's ends, and its peak's place
FIRST, STEP = 201, 4199                                 # in a window: the first valid R, and how many there are
PAD = 500                                               # samples of zeros before a record
BEATGAN = {"normal training": 62_436, "normal test": 17_343, "abnormal test": 9_764}   # as Zhou et al. count them
SEED = 0                                                # of the split within patients


def read_recording(path) -> tuple:
    """A record (path without extension) as (mV (samples, 2) at 360 Hz, annotated samples (n,), their symbols (n,)).

    MLII stands first. Raises RecordError.
    """
    import wfdb
    try:
        record, annotation = wfdb.rdrecord(str(path), physical=False), wfdb.rdann(str(path), "atr")
        signal, totals = record.dac(), record.calc_checksum()
    except Exception as error:      # wfdb raises whatever it trips over
        raise RecordError(f"unreadable ({type(error).__name__}: {error})", "download it again") from error
    if record.fs != RATE or record.n_sig != 2 or LEAD not in record.sig_name or set(record.units) != {"mV"}:
        raise RecordError(f"not two leads in mV at {RATE} Hz, with {LEAD} among them")
    if any((int(total) - stated) % 2 ** 16 for total, stated in zip(totals, record.checksum)):
        raise RecordError("its samples do not add up to their checksum", "download it again")
    first = record.sig_name.index(LEAD)
    return signal[:, [first, 1 - first]], np.asarray(annotation.sample), np.array(annotation.symbol)


def list_beats(samples: np.ndarray, symbols: np.ndarray, length: int, r_peaks: np.ndarray) -> pd.DataFrame:
    """The beats of a record that lie whole inside it, with what is no class of beat as OTHER.

    samples: annotated, at 360 Hz, of length; r_peaks: by our detector, at 500 Hz. "counts": whether BeatGAN would take
    it: a normal beat only where a peak was found near. Ours is the tallest deflection of both leads, whose usual
    distance from the annotation, which bundle branch block makes long, is taken off.
    """
    chosen = np.isin(symbols, [*CLASS_OF, OTHER]) & (samples >= BEFORE) & (samples + AFTER <= length)
    samples, classes = samples[chosen], np.array([CLASS_OF.get(symbol, OTHER) for symbol in symbols[chosen]])
    places = np.rint(samples * SAMPLING_RATE / RATE).astype(int)
    nearest = r_peaks[np.abs(places[:, None] - r_peaks).argmin(axis=1)] - places
    distance = np.abs(nearest - np.median(nearest)) * RATE / SAMPLING_RATE
    window = (places + PAD - FIRST) // STEP
    return pd.DataFrame({"window": window, "r_peak": places + PAD - window * STEP, "sample": samples, "class": classes,
                         "counts": (classes != OTHER) & ((classes != "N") | (distance <= NEAR))})


def cut_windows(signal: np.ndarray) -> np.ndarray:
    """(samples, 2) at 500 Hz -> (windows, 5000, 2) float32, every STEP samples, zeros before and after."""
    count = -(-(len(signal) + PAD - FIRST) // STEP)
    padded = np.zeros(((count - 1) * STEP + RECORD_LENGTH, signal.shape[1]), np.float32)
    padded[PAD:PAD + len(signal)] = signal
    return np.stack([padded[start:start + RECORD_LENGTH] for start in range(0, count * STEP, STEP)])


def split_within(classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """BeatGAN's parts of beats (n,): a fifth of the normals is test, a tenth of the rest validation, the others train.

    A tenth of each abnormal class is validation, rounded up, the others test. "": a beat that does not count.
    """
    parts, random = np.full(len(classes), "", dtype="<U5"), np.random.default_rng(SEED)
    for name in CLASSES:
        beats = random.permutation(np.flatnonzero((classes == name) & counts))
        tested = -(-len(beats) // 5) if name == "N" else len(beats) - -(-len(beats) // 10)
        validated = -(-(len(beats) - tested) // 10) if name == "N" else len(beats) - tested
        parts[beats] = "train"
        parts[beats[:tested]], parts[beats[tested:tested + validated]] = "test", "val"
    return parts


def split_between(records: np.ndarray, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Parts of beats (n,) by patient: DS2 is test, HELD_BACK validation, the normals of the others train."""
    parts = np.where(np.isin(records, DS2), "test", np.where(np.isin(records, HELD_BACK), "val", "train"))
    return np.where(counts & ((parts != "train") | (classes == "N")), parts, "")


def read_all(folder: Path, limit: int | None) -> tuple:
    """(windows (W, 5000, 2), the table of beats) of all records but the paced ones. Raises UserError."""
    windows, tables, first = [], [], 0
    for name in tqdm(sorted(DS1 + DS2)[:limit], desc="MIT-BIH", unit="record"):
        try:
            signal, samples, symbols = read_recording(folder / name)
        except RecordError as error:
            raise UserError(f"record {name} in {folder} given as --mitdb_path: {error}; {error.remedy}") from error
        filtered = filter_leads(resample(signal, RATE))
        windows.append(cut_windows(filtered))
        beats = list_beats(samples, symbols, len(signal), find_r_peaks_by_slope(filtered))
        tables.append(beats.assign(window=beats["window"] + first, record=name))
        first += len(windows[-1])
    table = pd.concat(tables, ignore_index=True)
    classes, counts = table["class"].to_numpy(), table["counts"].to_numpy()
    table["within"] = split_within(classes, counts)
    table["between"] = split_between(table["record"].to_numpy(), classes, counts)
    return np.concatenate(windows), table


def count(table: pd.DataFrame) -> dict:
    """The audit: beats by class, all and by part of each split."""
    parts = {"all": Counter(table["class"][table["class"] != OTHER])}
    for split in SPLITS:
        parts |= {f"{split} {part}": Counter(table["class"][table[split] == part]) for part in PARTS}
    return {name: {kind: beats[kind] for kind in CLASSES} for name, beats in parts.items()}


def write(mitdb_path, data_path, limit: int | None = None):
    """Make the files in data_path from the folder of the database, and print the audit. Raises UserError."""
    folder, data_path = Path(mitdb_path), Path(data_path)
    require_described(data_path, WINDOWS, (BEATS,), MANIFEST, "preprocess.py", SOURCE)
    windows, table = read_all(folder, limit)
    audit, array = count(table), io.BytesIO()
    np.save(array, windows)
    rows = table.drop(columns="counts").to_csv(index=False).encode()
    about = {"source": SOURCE, "audit": audit, "fingerprint": fingerprint(windows),
             "versions": versions(), "commit": git_commit()}
    write_together({data_path / WINDOWS: lambda file: file.write(array.getbuffer()),
                    data_path / BEATS: lambda file: file.write(rows),
                    data_path / MANIFEST: lambda file: file.write(pack_json(about))})
    print_audit(audit, windows.shape)


def print_audit(audit: dict, shape: tuple):
    """Print the counts by class and part, beside BeatGAN's."""
    print("\nMIT-BIH, beats            " + "".join(f"{name:>8}" for name in CLASSES))
    for part, counts in audit.items():
        print(f"  {part:<24}" + "".join(f"{number:>8,}" for number in counts.values()))
    abnormal = sum(number for kind, number in audit["within test"].items() if kind != "N")
    for name, ours in (("normal training", audit["within train"]["N"]), ("normal test", audit["within test"]["N"]),
                       ("abnormal test", abnormal)):
        print(f"  {name}: {ours:,}, BeatGAN {BEATGAN[name]:,}")
    print(f"  {WINDOWS:<20}{shape}")
