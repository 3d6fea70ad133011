"""The files in data/: their names, how they are opened and checked, and how sidecars are tied to their array.

    train.npy          (N, 5000, 12) float32, normalised to [-1, 1]: the normals of folds 1-9
    val.npy            (V, 5000, 12) float32, mV: fold 9, normals and abnormals; val_label.npy (V,)
    test.npy           (T, 5000, 12) float32, mV: fold 10;                       label.npy (T,)
    benchmark_data.npy (M, 5000, 12) float32, normalised to [-1, 1];             benchmark_label.npy (M, 5000, 12)
    val_lesions.npy, test_lesions.npy
                       (L, 5000, 12) float32, mV: the normals of val and test, each as it is and with lesions implanted
                       (lesions.py); *_lesions_truth.npy (L, 5000, 12); *_lesions_phases.npy (L, 5000) uint8
    train_details.npz, benchmark_details.npz
                       low, high (N, 12) float32: the mV that became -1 and 1; of LUDB's benchmark also
                       phases (M, 5000, 12) uint8: the wave that each point is in (ludb.PHASES)
    *_r_peaks.npz, *_r_peaks_slope.npz
                       R peaks of each record, by HeartPy and by the slope of all leads; made on first use where missing
    *_records.csv      ecg_id, patient_id, age, sex, fold, superclasses and statements of each row; of LUDB's also
                       the diagnoses, of lesions their kind and description. An empty cell is unknown; an age of 90
                       is 90 or older
    manifest.json      where the arrays come from, and which files preprocess.py wrote

Train, test, label and the two benchmark files are the published implementation's; its float64 arrays load too.
A label is 1 for abnormal and 0 for normal; a point without a truth is EXCLUDED.
"""
import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ecg.r_peaks import find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.signals import LARGEST_MILLIVOLTS, LEAD_II, RECORD_LENGTH, doubt_height, median_height
from utils import UserError, undo_minmax, write_atomically

NORMALISED_SPLITS = ("train", "benchmark")     # stored in [-1, 1], as published
SIGNAL_FILES = {"train": "train.npy", "val": "val.npy", "test": "test.npy", "benchmark": "benchmark_data.npy",
                "val_lesions": "val_lesions.npy", "test_lesions": "test_lesions.npy"}
LABEL_FILES = {"val": "val_label.npy", "test": "label.npy", "benchmark": "benchmark_label.npy",
               "val_lesions": "val_lesions_truth.npy", "test_lesions": "test_lesions_truth.npy"}
LESIONS_OF = {"val": "val_lesions", "test": "test_lesions"}     # made of these splits' normals
POINT_SPLITS = ("benchmark", *LESIONS_OF.values())              # whose labels are of points, not of records
R_PEAKS_FILES = {"heartpy": "{}_r_peaks.npz", "slope": "{}_r_peaks_slope.npz"}      # by detector
MANIFEST = "manifest.json"
UNFINISHED = "preprocess_unfinished"        # folder in data/ of a run of preprocess.py that has not ended
SIMULATED_MARKER = "SYNTHETIC.txt"          # stands in a PTB-XL-shaped folder whose ECGs are simulated
VALIDATION_FOLD, TEST_FOLD = 9, 10
EXCLUDED = 255                              # a point without a truth: outside the annotated span, or unclear
OLDEST = 90                                 # years, stands for all that is older; PTB-XL writes 300
TABLE_COLUMNS = {"ecg_id": int, "patient_id": str, "age": lambda cell: float(cell or "nan"), "sex": str, "fold": int,
                 "label": int, "superclasses": str, "statements": str, "diagnoses": str, "r_peaks": int,
                 "kind": str, "description": str}
FINGERPRINT_ROWS = 32
ROWS_AT_ONCE = 64                           # while an array is read record by record


def signal_path(data_path, split: str) -> Path:
    """The array of a split, a name of SIGNAL_FILES."""
    return Path(data_path) / SIGNAL_FILES[split]


def label_path(data_path, split: str) -> Path:
    """The labels of a split: per record for "val" and "test", per sample and lead for POINT_SPLITS."""
    return Path(data_path) / LABEL_FILES[split]


def r_peaks_path(data_path, split: str, detector: str) -> Path:
    """The R peaks of a split by a detector of R_PEAKS_FILES."""
    return Path(data_path) / R_PEAKS_FILES[detector].format(split)


def table_path(data_path, split: str) -> Path:
    """The table that says which record each row of a split is."""
    return Path(data_path) / f"{split}_records.csv"


def phases_path(data_path, split: str) -> Path:
    """The phase of the beat that each sample of a split of lesions is in, (L, 5000) uint8."""
    return Path(data_path) / f"{split}_phases.npy"


def details_path(data_path, split: str) -> Path:
    """What a normalised split does not hold itself, see load_details."""
    return Path(data_path) / f"{split}_details.npz"


def load_npy(path) -> np.ndarray:
    """Map an .npy file into memory, read only. Pickled objects are refused. Raises UserError."""
    try:
        with open(path, "rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise ValueError("not an .npy file")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with preprocess.py, or name its folder with --data_path") from None
    except Exception as error:          # numpy evaluates the header: a damaged one raises whatever its parser meets
        raise UserError(f"{path} is not a readable .npy array ({type(error).__name__}); make it again") from error


@dataclass
class Records:
    """The records of a split as they are stored, and the way back to mV.

    signals: (records, 5000, leads), memory-mapped or in memory; name: the file, for messages;
    bounds: (low, high), each (records, leads) float32, the mV that became -1 and 1 of a split that is stored min-maxed;
    in_millivolts: False where a split is stored min-maxed and nobody knows these.
    """
    signals: np.ndarray
    name: str
    bounds: tuple | None = None
    in_millivolts: bool = True

    def __len__(self):
        return len(self.signals)

    @property
    def leads(self) -> int:
        return self.signals.shape[2]

    def read(self, rows) -> np.ndarray:
        """Rows as they are stored, (n, 5000, leads) float32. Raises UserError unless they are finite, an ECG's size."""
        with np.errstate(over="ignore"):            # float64 beyond float32 becomes infinite, and is refused as such
            records = np.ascontiguousarray(self.signals[rows], dtype=np.float32)
        sound = np.maximum(records.max(axis=(1, 2)), -records.min(axis=(1, 2))) <= LARGEST_MILLIVOLTS   # NaN is not
        if not sound.all():
            raise UserError(f"{self.name} holds NaN or infinity, or more than {LARGEST_MILLIVOLTS:g} mV, in row "
                            f"{np.arange(len(self))[rows][~sound][0]}; make it again with preprocess.py")
        return records

    def millivolts(self, rows) -> np.ndarray:
        """Rows in mV, (n, 5000, leads) float32. Raises UserError where nobody knows their amplitude."""
        if not self.in_millivolts:
            raise UserError(f"{self.name} is normalised, and no file beside it tells its mV; make it with "
                            "preprocess.py")
        records = self.read(rows)
        if self.bounds is None:
            return records
        low, high = (bound[rows][:, None] for bound in self.bounds)                             # (n, 1, leads)
        return undo_minmax(records, low, high).astype(np.float32)

    def iterate(self, rows=None):
        """Yield records (default: all) one by one as they are stored, (5000, leads) float32, checked as by read."""
        rows = np.arange(len(self)) if rows is None else rows
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield from self.read(rows[start:start + ROWS_AT_ONCE])

    def require_sound(self):
        """Raise UserError where a row is not finite: some seconds, before hours of work on them."""
        for _ in self.iterate():
            pass


def open_records(data_path, split: str, leads: int) -> Records:
    """The memory-mapped records of a split. Raises UserError for any other shape or type than (records, 5000, leads).

    An amplitude that no ECG has is printed as a warning.
    """
    path = signal_path(data_path, split)
    if (Path(data_path) / UNFINISHED / MANIFEST).exists() and not (Path(data_path) / MANIFEST).exists():
        raise UserError(f"{data_path} holds files of two runs, as {UNFINISHED}/{MANIFEST} in it tells: preprocess.py "
                        "was stopped at its end; run it again")
    signals = load_npy(path)
    if signals.ndim != 3 or signals.shape[1:] != (RECORD_LENGTH, leads) or not len(signals):
        raise UserError(f"{path} has shape {signals.shape}, expected (records, {RECORD_LENGTH}, {leads}); "
                        "make it again with preprocess.py, or set --dims")
    if signals.dtype.kind != "f":
        raise UserError(f"{path} holds {signals.dtype}, expected floating point; make it again with preprocess.py")
    if split in NORMALISED_SPLITS:
        details = load_details(data_path, split, signals)
        bounds = details and (details["low"], details["high"])
        return Records(signals, SIGNAL_FILES[split], bounds, in_millivolts=bool(bounds))
    records = Records(signals, SIGNAL_FILES[split])
    doubt = doubt_height(median_height(records.read(sample_rows(signals))))
    if doubt:
        print(f"warning: {path}: {doubt}")
    return records


def open_labels(data_path, split: str, shape: tuple) -> np.ndarray:
    """The labels of a split, checked to have this shape and to be 0 or 1 with both present. Raises UserError.

    A point may be EXCLUDED as well.
    """
    path, allowed = label_path(data_path, split), (0, 1, EXCLUDED) if split in POINT_SPLITS else (0, 1)
    labels = load_npy(path)
    if labels.shape != shape:
        raise UserError(f"{path} has shape {labels.shape}, but {SIGNAL_FILES[split]} asks for {shape}; "
                        "make both again with preprocess.py")
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{path} holds {labels.dtype}, expected numbers; make it again with preprocess.py")
    counts = [sum(np.count_nonzero(row == value) for row in labels) for value in allowed]
    if sum(counts) != labels.size or 0 in counts[:2]:
        raise UserError(f"{path} holds {counts[0]} labels 0, {counts[1]} labels 1 and {labels.size - sum(counts)} "
                        f"that are none of {allowed}, expected 0 (normal) and 1 (abnormal)"
                        f"{f', and {EXCLUDED} (excluded)' * (split in POINT_SPLITS)} only, and both of the first two; "
                        "make it again with preprocess.py")
    return labels


def sample_rows(signals: np.ndarray) -> np.ndarray:
    """Evenly spaced rows that stand for all, FINGERPRINT_ROWS of them at most."""
    return np.unique(np.linspace(0, len(signals) - 1, FINGERPRINT_ROWS).astype(int))


def fingerprint(signals: np.ndarray) -> str:
    """What ties sidecars to their array: a SHA-256 over shape, type and 32 evenly spaced rows."""
    digest = hashlib.sha256(repr((signals.shape, signals.dtype.str)).encode())
    for row in sample_rows(signals):
        digest.update(np.ascontiguousarray(signals[row]).tobytes())
    return digest.hexdigest()


def pack_r_peaks(file, r_peaks: list, detector: str, signals_fingerprint: str):
    """Write the R peaks of each record to a binary file as one (records, most peaks) int32 array, padded with -1."""
    padded = np.full((len(r_peaks), max(map(len, r_peaks), default=0)), -1, dtype=np.int32)
    for row, positions in zip(padded, r_peaks):
        row[:len(positions)] = positions
    np.savez_compressed(file, peaks=padded, detector=detector, fingerprint=signals_fingerprint)


def load_r_peaks(data_path, split: str, records: Records, detector: str) -> list:
    """The R peaks of each record of a split by a detector of R_PEAKS_FILES: a list of int32 arrays.

    They come from the sidecar. Where it is missing, or belongs to other signals, they are made once and kept;
    a folder that cannot be written costs only the keeping. Raises UserError for signals that are not finite.
    """
    path, identity, ours = r_peaks_path(data_path, split, detector), fingerprint(records.signals), True
    if path.exists():
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                same_detector = str(stored.get("detector", detector)) == detector       # early sidecars do not say it
                if same_detector and str(stored["fingerprint"]) == identity and len(stored["peaks"]) == len(records):
                    return [row[row >= 0].astype(np.int32) for row in stored["peaks"]]
            print(f"{path} belongs to other signals; finding the R peaks again")
        except Exception as error:      # numpy and zipfile raise whatever a damaged file makes them trip over
            ours = False
            print(f"{path} is not readable ({type(error).__name__}); finding the R peaks for this run alone. Delete "
                  "the file, and the next run keeps them")
    r_peaks = make_r_peaks(records, detector, f"R peaks of {split}, {detector}")
    try:
        if ours:
            write_atomically(path, lambda file: pack_r_peaks(file, r_peaks, detector, identity))
    except UserError as error:
        print(f"the R peaks are not kept: {error}")
    return r_peaks


def make_r_peaks(records: Records, detector: str, title: str) -> list:
    """The R peaks of every record by a detector of R_PEAKS_FILES. title: of the progress bar."""
    records.require_sound()
    lead = min(LEAD_II, records.leads - 1)
    with threadpool_limits(1):              # small matrix products: more threads would wait for each other
        return [find_r_peaks_by_slope(record) if detector == "slope" else find_r_peaks_by_heartpy(record[:, lead])
                for record in tqdm(records.iterate(), desc=title, total=len(records), unit="record")]


def pack_details(file, low: list, high: list, phases: list, signals_fingerprint: str):
    """Write a split's details to a binary file: a row a record, as load_details gives them; phases may be empty."""
    np.savez_compressed(file, low=np.array(low, np.float32), high=np.array(high, np.float32),
                        fingerprint=signals_fingerprint, **({"phases": np.stack(phases)} if phases else {}))


def load_details(data_path, split: str, signals: np.ndarray) -> dict | None:
    """What is known of a normalised split besides its arrays, or None where no file belongs to these signals.

    "low", "high": (M, 12) float32, the mV that the normalised signals have at -1 and 1. "phases": (M, 5000, 12) uint8,
    1 + the index into ludb.PHASES, 0 = none or unclear; None where nobody delineated the waves.
    Raises UserError where the file is damaged.
    """
    path = details_path(data_path, split)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) != fingerprint(signals):
                return None
            details = {name: stored.get(name) for name in ("phases", "low", "high")}
        bounds = (len(signals), signals.shape[2])
        if details["low"].shape != bounds or details["high"].shape != bounds or (
                details["phases"] is not None and details["phases"].shape != signals.shape):
            raise ValueError("the shapes are not the signals'")
        if not (np.isfinite(details["low"]).all() and np.isfinite(details["high"]).all()):
            raise ValueError("the mV are not finite")
    except FileNotFoundError:
        return None
    except Exception as error:          # numpy and zipfile raise whatever a damaged file makes them trip over
        raise UserError(f"{path} is not readable ({type(error).__name__}); make it again with preprocess.py, or delete "
                        "it") from error
    return details


def load_manifest(data_path, name: str = MANIFEST) -> dict | None:
    """The manifest, or None where there is none (the published implementation's own arrays). Raises UserError."""
    path = Path(data_path) / name
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("arrays"), dict):
            raise ValueError("not a manifest of preprocess.py")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of preprocess.py ({str(error)[:80]}); move it away") from error


def describes(manifest: dict | None, split: str, signals: np.ndarray) -> bool:
    """Whether a manifest was written for these very signals."""
    try:
        return manifest["arrays"][split]["fingerprint"] == fingerprint(signals)
    except (KeyError, TypeError):
        return False


def load_table(data_path, split: str, records: Records) -> dict | None:
    """The table of a split's records by column, in row order, or None where none belongs to these records.

    Columns: those of TABLE_COLUMNS that the file has, ecg_id always; patient_id always too, as text: where it is
    unknown, a record is its own patient. age: in years, NaN where unknown, 90 for 90 or older; sex: "F", "M" or "".
    The manifest says which signals the table was written for, so arrays that were exchanged do not inherit ids.
    Raises UserError where the table is damaged.
    """
    path = table_path(data_path, split)
    if not path.exists() or not describes(load_manifest(data_path), split, records.signals):
        return None
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        names = [name for name in TABLE_COLUMNS if not rows or name in rows[0]]
        table = {name: np.array([TABLE_COLUMNS[name](row[name]) for row in rows]) for name in names}
        if len(rows) != len(records) or "ecg_id" not in table or any(None in row for row in rows):
            raise ValueError("rows or columns are missing")
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} is not a readable table ({str(error)[:80]}); make it again with preprocess.py, or "
                        "delete it") from error
    own = np.array([f"record {ecg_id}" for ecg_id in table["ecg_id"]])
    patients = table.get("patient_id", np.full(len(rows), ""))
    return table | {"patient_id": np.where(patients == "", own, patients)}
