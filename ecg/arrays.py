"""The files in data/: their names, how they are written, opened and tied to their sidecars.

    train.npy          (N, 5000, 12) float32, normalised to [-1, 1]: the normals of folds 1-9
    val.npy            (V, 5000, 12) float32, mV: fold 9, normals and abnormals; val_label.npy (V,)
    test.npy           (T, 5000, 12) float32, mV: fold 10;                       label.npy (T,)
    benchmark_data.npy (M, 5000, 12) float32, normalised to [-1, 1];             benchmark_label.npy (M, 5000, 12)
    train_details.npz, benchmark_details.npz
                       low, high (N, 12) float32: the mV that became -1 and 1; of LUDB's benchmark also
                       phases (M, 5000, 12) uint8: the wave that each point is in (ludb.PHASES)
    *_r_peaks.npz      R peaks of each record, made on first use where missing
    *_records.csv      ecg_id, fold, superclasses and statements of each row; of LUDB's ecg_id and diagnoses
    manifest.json      where the arrays come from

Train, test, label and the two benchmark files are the published implementation's; its float64 arrays load too.
A label is 1 for abnormal and 0 for normal; a benchmark point without a truth is EXCLUDED.
"""
import contextlib
import csv
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ecg.signals import LARGEST_MILLIVOLTS, LEAD_II, RECORD_LENGTH, find_r_peaks
from utils import UserError, sync_folder, undo_minmax, unwritable, write_atomically

NORMALISED_SPLITS = ("train", "benchmark")     # stored in [-1, 1], as published
SIGNAL_FILES = {"train": "train.npy", "val": "val.npy", "test": "test.npy", "benchmark": "benchmark_data.npy"}
LABEL_FILES = {"val": "val_label.npy", "test": "label.npy", "benchmark": "benchmark_label.npy"}
MANIFEST = "manifest.json"
SIMULATED_MARKER = "SYNTHETIC.txt"          # stands in a PTB-XL-shaped folder whose ECGs are simulated
VALIDATION_FOLD, TEST_FOLD = 9, 10
EXCLUDED = 255                              # a benchmark point without a truth: outside the annotated span, or unclear
RECORD_COLUMNS = {"ecg_id": int, "fold": int, "label": int, "superclasses": str, "statements": str, "diagnoses": str,
                  "r_peaks": int}
FINGERPRINT_ROWS = 32
ROWS_AT_ONCE = 64                   # while an array is read record by record


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


def details_path(data_path, split: str) -> Path:
    """What a normalised split does not hold itself, see load_details."""
    return Path(data_path) / f"{split}_details.npz"


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
    require_published(data_path)
    signals = load_npy(path)
    if signals.ndim != 3 or signals.shape[1:] != (RECORD_LENGTH, leads) or not len(signals):
        raise UserError(f"{path} has shape {signals.shape}, expected (records, {RECORD_LENGTH}, {leads}); "
                        "make it again with preprocess.py, or set --dims")
    if signals.dtype.kind != "f":
        raise UserError(f"{path} holds {signals.dtype}, expected floating point; make it again with preprocess.py")
    return signals


def open_labels(data_path, split: str, shape: tuple) -> np.ndarray:
    """The labels of a split, checked to have this shape and to be 0 or 1 with both present. Raises UserError.

    A point of the benchmark may be EXCLUDED as well.
    """
    path, allowed = label_path(data_path, split), (0, 1, EXCLUDED) if split == "benchmark" else (0, 1)
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
                        f"{f', and {EXCLUDED} (excluded)' * (split == 'benchmark')} only, and both of the first two; "
                        "make it again with preprocess.py")
    return labels


def read_rows(signals: np.ndarray, rows, name: str) -> np.ndarray:
    """Rows of a memory-mapped array as float32, checked to be finite and an ECG's size.

    name: the file, for the message of UserError.
    """
    with np.errstate(over="ignore"):                # float64 beyond float32 becomes infinite, and is refused as such
        block = np.ascontiguousarray(signals[rows], dtype=np.float32)
    sound = np.maximum(block.max(axis=(1, 2)), -block.min(axis=(1, 2))) <= LARGEST_MILLIVOLTS       # NaN is not
    if not sound.all():
        broken = np.arange(len(signals))[rows][~sound]
        raise UserError(f"{name} holds NaN or infinity, or more than {LARGEST_MILLIVOLTS:g} mV, in row {broken[0]}; "
                        "make it again with preprocess.py")
    return block


@dataclass
class Records:
    """The records of a split as they are stored, and the way back to mV.

    signals: (records, 5000, leads), memory-mapped or in memory, in mV where bounds is None and nothing else is known;
    name: the file, for messages; bounds: (low, high), each (records, leads) float32, the mV that became -1 and 1 of a
    split that is stored min-maxed.
    """
    signals: np.ndarray
    name: str
    bounds: tuple | None = None
    in_millivolts: bool = True      # False: stored min-maxed, and nobody knows the mV

    def __len__(self):
        return len(self.signals)

    @property
    def leads(self) -> int:
        return self.signals.shape[2]

    def read(self, rows) -> np.ndarray:
        """Rows as they are stored, (n, 5000, leads) float32, checked to be finite and an ECG's size."""
        return read_rows(self.signals, rows, self.name)

    def millivolts(self, rows) -> np.ndarray:
        """Rows in mV, (n, 5000, leads) float32. Raises UserError where nobody knows their amplitude."""
        if not self.in_millivolts:
            raise UserError(f"{self.name} is normalised, and no file beside it tells its mV; make it with preprocess.py")
        records = self.read(rows)
        if self.bounds is None:
            return records
        low, high = (bound[rows][:, None] for bound in self.bounds)
        return undo_minmax(records, low, high).astype(np.float32)


def require_sound(signals: np.ndarray, split: str):
    """Raise UserError where a row of a split's signals is not finite: some seconds, before hours of work on them."""
    for start in range(0, len(signals), ROWS_AT_ONCE):
        read_rows(signals, slice(start, start + ROWS_AT_ONCE), SIGNAL_FILES[split])


def iterate_rows(signals: np.ndarray, name: str, rows=None):
    """Yield rows (default: all) of a memory-mapped array one by one, as read_rows reads and checks them."""
    rows = np.arange(len(signals)) if rows is None else rows
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield from read_rows(signals, rows[start:start + ROWS_AT_ONCE], name)


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
    a folder that cannot be written costs only the keeping. Raises UserError for signals that are not finite.
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
    require_sound(signals, split)
    lead = min(LEAD_II, signals.shape[2] - 1)
    r_peaks = [find_r_peaks(record[:, lead]) for record in tqdm(signals, desc=f"R peaks of {split}", unit="record")]
    try:
        save_r_peaks(path, r_peaks, wanted)
    except UserError as error:
        print(f"the R peaks are not kept: {error}")
    return r_peaks


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
        with np.load(path, allow_pickle=False) as stored:
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


def load_manifest(data_path) -> dict | None:
    """The manifest, or None where there is none (the published implementation's own arrays)."""
    path = Path(data_path) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("arrays", {}), dict):
            raise ValueError("not a manifest")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
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
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
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


def part_of(path: Path) -> Path:
    """The name of a file that is not whole yet."""
    return path.with_name(path.name + ".part")


def require_published(data_path):
    """Raise UserError where a run of preprocess.py was killed while it gave its files their names: some are older."""
    manifest = Path(data_path) / MANIFEST
    if part_of(manifest).exists() and not manifest.exists():
        raise UserError(f"{data_path} holds files of two runs, as {part_of(manifest).name} tells: preprocess.py was "
                        "stopped at its end; run it again")


class Staging:
    """New files for a data folder, each NAME.part until publish() gives all of them their names, with a manifest.

    So an interrupted run leaves nothing that looks finished, and no old file beside new ones.
    """

    def __init__(self, data_path: Path):
        self.data_path, self.paths = data_path, []
        data_path.mkdir(parents=True, exist_ok=True)
        if any(part_of(data_path / name).exists() for name in (*SIGNAL_FILES.values(), MANIFEST)):
            print(f"an earlier run was stopped before {data_path} was complete: nothing of it is used, this run starts "
                  "over")

    def stage(self, path: Path) -> Path:
        """The name under which the content of path is written until it is published."""
        self.paths.append(path)
        return part_of(path)

    def write(self, path: Path, write):
        """Let write(binary file) fill the staged file of path."""
        with open(self.stage(path), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, manifest: dict):
        """Rename everything, the manifest last. The old one goes first, so nothing is taken for what it described.

        From then on nothing is discarded: the new manifest's temporary name is what require_published looks for.
        """
        text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
        self.write(self.data_path / MANIFEST, lambda file: file.write(text.encode()))
        (self.data_path / MANIFEST).unlink(missing_ok=True)
        pending, self.paths = self.paths, []
        for path in pending:
            try:
                os.replace(part_of(path), path)
            except OSError as error:
                raise unwritable(path, error) from error
        sync_folder(self.data_path)

    def discard(self):
        """Remove what was staged, unless publish() had begun to rename it."""
        for path in self.paths:
            with contextlib.suppress(OSError):          # a folder that cannot be written holds nothing to remove
                part_of(path).unlink()
