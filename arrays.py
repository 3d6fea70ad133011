"""The files in data/: their names, how they are written, opened and tied to their sidecars.

    train.npy          (N, 5000, 12) float32, normalised to [-1, 1]: the normals of folds 1-9
    val.npy            (V, 5000, 12) float32, mV: fold 9, normals and abnormals; val_label.npy (V,)
    test.npy           (T, 5000, 12) float32, mV: fold 10;                       label.npy (T,)
    benchmark_data.npy (M, 5000, 12) float32, normalised to [-1, 1];             benchmark_label.npy (M, 5000, 12)
    *_r_peaks.npz      R peaks of each record, made on first use where missing
    *_records.csv      ecg_id, fold, superclasses and statements of each row
    manifest.json      where the arrays come from

Train, test, label and the two benchmark files are the published implementation's; its float64 arrays load too.
"""
import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from signals import LEAD_II, RECORD_LENGTH, find_r_peaks
from utils import UserError, unwritable, write_atomically

SIGNAL_FILES = {"train": "train.npy", "val": "val.npy", "test": "test.npy", "benchmark": "benchmark_data.npy"}
LABEL_FILES = {"val": "val_label.npy", "test": "label.npy", "benchmark": "benchmark_label.npy"}
MANIFEST = "manifest.json"
SIMULATED_MARKER = "SYNTHETIC.txt"          # stands in a PTB-XL-shaped folder whose ECGs are simulated
VALIDATION_FOLD, TEST_FOLD = 9, 10
RECORD_COLUMNS = {"ecg_id": int, "fold": int, "label": int, "superclasses": str, "statements": str, "r_peaks": int}
FINGERPRINT_ROWS = 32


def signal_path(data_path, split: str) -> Path:
    """The array of a split ("train", "val", "test" or "benchmark")."""
    return Path(data_path) / SIGNAL_FILES[split]


def label_path(data_path, split: str) -> Path:
    """The labels of a split: per record for "val" and "test", per sample and lead for "benchmark"."""
    return Path(data_path) / LABEL_FILES[split]


def r_peaks_path(data_path, split: str) -> Path:
    """The R peaks sidecar of a split."""
    return Path(data_path) / f"{split}_r_peaks.npz"


def records_path(data_path, split: str) -> Path:
    """The table that says which record each row of a split is."""
    return Path(data_path) / f"{split}_records.csv"


def load_npy(path) -> np.ndarray:
    """Map an .npy file into memory, read only. Pickled objects are refused. Raises UserError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with preprocess.py, or name its folder with --data_path") from None
    except Exception as error:          # numpy evaluates the header: a damaged one raises whatever its parser meets
        raise UserError(f"{path} is not a readable .npy array ({type(error).__name__}); make it again") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive, not an .npy array; make it again")
    return array


def open_signals(data_path, split: str, leads: int) -> np.ndarray:
    """The memory-mapped signals of a split, (records, 5000, leads). Raises UserError for any other shape or type."""
    path = signal_path(data_path, split)
    signals = load_npy(path)
    if signals.ndim != 3 or signals.shape[1:] != (RECORD_LENGTH, leads) or not len(signals):
        raise UserError(f"{path} has shape {signals.shape}, expected (records, {RECORD_LENGTH}, {leads}); "
                        "make it again with preprocess.py, or set --dims")
    if signals.dtype.kind != "f":
        raise UserError(f"{path} holds {signals.dtype}, expected floating point; make it again with preprocess.py")
    return signals


def open_labels(data_path, split: str, shape: tuple) -> np.ndarray:
    """The labels of a split, checked to have this shape and to be 0 or 1 with both present. Raises UserError."""
    path = label_path(data_path, split)
    labels = load_npy(path)
    if labels.shape != shape:
        raise UserError(f"{path} has shape {labels.shape}, but {SIGNAL_FILES[split]} asks for {shape}; "
                        "make both again with preprocess.py")
    positive = sum(np.count_nonzero(row == 1) for row in labels)
    negative = sum(np.count_nonzero(row == 0) for row in labels)
    if positive + negative != labels.size or not positive or not negative:
        raise UserError(f"{path} holds {negative} labels 0, {positive} labels 1 and "
                        f"{labels.size - positive - negative} others, expected 0 (normal) and 1 (abnormal) only, and "
                        "both; make it again with preprocess.py")
    return labels


def read_rows(signals: np.ndarray, rows, name: str) -> np.ndarray:
    """Rows of a memory-mapped array as float32, checked to be finite. name: the file, for the message of UserError."""
    block = np.ascontiguousarray(signals[rows], dtype=np.float32)
    finite = np.isfinite(block).all(axis=(1, 2))
    if not finite.all():
        broken = np.arange(len(signals))[rows][~finite]
        raise UserError(f"{name} holds NaN or infinity in row {broken[0]}; make it again with preprocess.py")
    return block


def fingerprint(signals: np.ndarray) -> str:
    """What ties sidecars to their array: a SHA-256 over shape, type and 32 evenly spaced rows."""
    digest = hashlib.sha256(repr((signals.shape, signals.dtype.str)).encode())
    for row in np.unique(np.linspace(0, len(signals) - 1, FINGERPRINT_ROWS).astype(int)):
        digest.update(np.ascontiguousarray(signals[row]).tobytes())
    return digest.hexdigest()


def pack_r_peaks(file, r_peaks: list, signals_fingerprint: str):
    """Write the R peaks of each record to a binary file as one (records, most peaks) int32 array, padded with -1."""
    padded = np.full((len(r_peaks), max(map(len, r_peaks), default=0)), -1, dtype=np.int32)
    for row, found in zip(padded, r_peaks):
        row[:len(found)] = found
    np.savez_compressed(file, peaks=padded, fingerprint=signals_fingerprint)


def save_r_peaks(path, r_peaks: list, signals_fingerprint: str):
    """Write the sidecar of R peaks, atomically. Raises UserError."""
    write_atomically(path, lambda file: pack_r_peaks(file, r_peaks, signals_fingerprint))


def load_r_peaks(data_path, split: str, signals: np.ndarray) -> list:
    """The R peaks of each record of a split: a list of int32 arrays.

    They come from the sidecar. Where it is missing, or belongs to other signals, they are found once and kept;
    a folder that cannot be written costs only the keeping.
    """
    path, wanted = r_peaks_path(data_path, split), fingerprint(signals)
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) == wanted and len(stored["peaks"]) == len(signals):
                    return [row[row >= 0].astype(np.int32) for row in stored["peaks"]]
        except Exception as error:      # whatever is wrong with it, a sidecar can be made again
            print(f"{path} is not readable ({type(error).__name__}); finding the R peaks again")
        else:
            print(f"{path} belongs to other signals; finding the R peaks again")
    lead = min(LEAD_II, signals.shape[2] - 1)
    r_peaks = [find_r_peaks(record[:, lead]) for record in tqdm(signals, desc=f"R peaks of {split}", unit="record")]
    try:
        save_r_peaks(path, r_peaks, wanted)
    except UserError as error:
        print(f"the R peaks are not kept: {error}")
    return r_peaks


def load_manifest(data_path) -> dict | None:
    """The manifest, or None where there is none (the published implementation's own arrays)."""
    path = Path(data_path) / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({str(error)[:80]}); make it again with preprocess.py, "
                        "or delete it") from error


def load_records(data_path, split: str, signals: np.ndarray) -> dict | None:
    """The table of a split's records by column, in row order, or None where none belongs to these signals.

    The manifest says which signals the table was written for, so arrays that were exchanged do not inherit ids.
    Raises UserError where the table is damaged.
    """
    path = records_path(data_path, split)
    if not path.exists() or not describes(load_manifest(data_path), split, signals):
        return None
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        names = [name for name in RECORD_COLUMNS if not rows or name in rows[0]]
        table = {name: np.array([RECORD_COLUMNS[name](row[name]) for row in rows]) for name in names}
        if not rows or "ecg_id" not in table or any(None in row for row in rows):
            raise ValueError("rows or columns are missing")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a readable table ({str(error)[:80]}); make it again with preprocess.py, or "
                        "delete it") from error
    return table if len(rows) == len(signals) else None


def describes(manifest: dict | None, split: str, signals: np.ndarray) -> bool:
    """Whether a manifest was written for these very signals."""
    try:
        return manifest["arrays"][split]["fingerprint"] == fingerprint(signals)
    except (KeyError, TypeError):
        return False


class RowWriter:
    """Streams rows into an .npy file whose number of rows is known at the end only."""

    def __init__(self, path: Path, row_shape: tuple, dtype):
        self.path, self.row_shape, self.dtype, self.rows = path, row_shape, np.dtype(dtype), 0
        self.file = open(path, "wb")
        self._write_header()

    def _write_header(self):
        # numpy pads headers so that the number of rows may grow in place
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
            "shape": (self.rows, *self.row_shape)})

    def append(self, row: np.ndarray):
        """Add a row of row_shape."""
        self.file.write(np.ascontiguousarray(row, dtype=self.dtype).tobytes())
        self.rows += 1

    def finish(self):
        """Put the number of rows into the header and the file on the disk."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class Staging:
    """New files for a data folder, each NAME.part until publish() gives all of them their names at once.

    So an interrupted run leaves nothing that looks finished, and no old file beside new ones.
    """

    def __init__(self, data_path: Path):
        self.data_path, self.paths = data_path, []
        data_path.mkdir(parents=True, exist_ok=True)

    def stage(self, path: Path) -> Path:
        """The name under which the content of path is written until it is published."""
        self.paths.append(path)
        return path.with_name(path.name + ".part")

    def write(self, path: Path, write):
        """Let write(binary file) fill the staged file of path."""
        with open(self.stage(path), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    def publish(self):
        """Rename everything. The old manifest goes first, so nothing is taken for what it described."""
        (self.data_path / MANIFEST).unlink(missing_ok=True)
        for path in self.paths:
            try:
                os.replace(path.with_name(path.name + ".part"), path)
            except OSError as error:
                raise unwritable(path, error) from error

    def discard(self):
        """Remove what was not published."""
        for path in self.paths:
            path.with_name(path.name + ".part").unlink(missing_ok=True)
