"""How preprocess.py writes the files in data/: rows stream into arrays, and all files get their names together.

What stands in data/ already is replaced only where preprocess.py wrote it, as its manifest tells.
"""
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from ecg import arrays
from ecg.signals import LEAD_NAMES, RECORD_LENGTH, normalize_leads
from utils import UserError, pack_json, sha256_of, sync_folder

RECORD_SHAPE = (RECORD_LENGTH, len(LEAD_NAMES))
REPLACED = "replaced.json"                  # the manifest of before, while a run gives its files their names


# ---- what may be replaced

def files_of(split: str) -> list:
    """The names of the files that preprocess.py writes of a split."""
    return [arrays.SIGNAL_FILES[split], *([arrays.LABEL_FILES[split]] if split in arrays.LABEL_FILES else []),
            *([arrays.details_path("", split).name] if split in arrays.NORMALISED_SPLITS else []),
            *([arrays.phases_path("", split).name] if split in arrays.LESIONS_OF.values() else []),
            arrays.table_path("", split).name, *(arrays.r_peaks_path("", split, name).name
                                                 for name in arrays.R_PEAKS_FILES)]


def is_ours(path: Path, split: str, manifests: list) -> bool:
    """Whether preprocess.py wrote a file of a split, with this very content. manifests: those of the folder."""
    if path.name == arrays.SIGNAL_FILES[split]:
        with contextlib.suppress(UserError):
            signals = arrays.load_npy(path)
            return any(arrays.describes(manifest, split, signals) for manifest in manifests)
        return False
    if path.name.startswith(f"{split}_r_peaks"):            # made again on first use, so no manifest knows them
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                return "fingerprint" in stored
        except Exception:               # numpy and zipfile raise whatever a foreign file makes them trip over
            return False
    return path.is_file() and sha256_of(path) in [manifest["arrays"].get(split, {}).get("files", {}).get(path.name)
                                                  for manifest in manifests]


def require_replaceable(data_path: Path, splits):
    """Raise UserError where a file that would be written stands there and preprocess.py did not write it."""
    folders = (data_path, data_path / arrays.UNFINISHED)
    manifests = [manifest for manifest in (*map(arrays.load_manifest, folders),
                                           arrays.load_manifest(folders[1], REPLACED)) if manifest]
    strangers = [data_path / name for split in splits for name in files_of(split)
                 if (data_path / name).exists() and not is_ours(data_path / name, split, manifests)]
    if strangers:
        raise UserError(f"{', '.join(map(str, strangers))} did not come from preprocess.py and would be overwritten; "
                        f"move {'them' if strangers[1:] else 'it'} away, or name another --data_path")


def require_described(folder: Path, signals: str, others: tuple, manifest: str, script: str, source: str | None = None):
    """Raise UserError where one of these files is there without the manifest of an earlier run, or with other signals.

    signals: the array whose fingerprint the manifest holds; script: that writes them; source: that it names, if given.
    """
    present = [folder / name for name in (signals, *others, manifest) if (folder / name).exists()]
    try:
        about = json.loads((folder / manifest).read_text()) if present else {"fingerprint": None, "source": source}
        ours = source in (None, about["source"]) and (folder / signals not in present or about["fingerprint"]
                                                      == arrays.fingerprint(arrays.load_npy(folder / signals)))
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise UserError(f"{present[0]} did not come from {script} and would be overwritten; move it away, or name "
                        "another --data_path")


# ---- writing

class RowWriter:
    """Streams rows into an .npy file whose number of rows is known at the end only."""

    def __init__(self, path: Path, row_shape: tuple, dtype):
        self.row_shape, self.dtype, self.rows = row_shape, np.dtype(dtype), 0
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
    """New files for a data folder, in a folder of their own until publish() gives all of them their places.

    So an interrupted run leaves nothing that looks finished, and no old file beside new ones.
    """

    def __init__(self, data_path: Path):
        self.data_path, self.folder = data_path, data_path / arrays.UNFINISHED
        self.names, self.writers = [], []
        self.folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str) -> Path:
        """Where the file of this name is written until it is published."""
        self.names.append(name)
        return self.folder / name

    def stage_rows(self, name: str, dtype, row_shape: tuple = RECORD_SHAPE) -> RowWriter:
        """The writer of an .npy file of this name."""
        self.writers.append(RowWriter(self.stage(name), row_shape, dtype))
        return self.writers[-1]

    def write(self, name: str, write):
        """Let write(binary file) fill the staged file of this name."""
        with open(self.stage(name), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    def publish(self, manifest: dict):
        """Move everything to its place, the manifest last. The old one goes first, so it describes nothing new.

        A kill in between leaves the new manifest in the folder, which is what arrays.open_records looks for.
        """
        self.write(arrays.MANIFEST, lambda file: file.write(pack_json(manifest)))
        if (self.data_path / arrays.MANIFEST).exists():
            os.replace(self.data_path / arrays.MANIFEST, self.folder / REPLACED)
        names, self.names = self.names, [REPLACED]
        for name in names:
            os.replace(self.folder / name, self.data_path / name)
        sync_folder(self.data_path)
        self.names += [name for split in arrays.SIGNAL_FILES for name in files_of(split)]     # of runs that were killed

    def discard(self):
        """Remove what is staged, unless publish() was stopped in the middle."""
        for writer in self.writers:
            with contextlib.suppress(OSError):      # of a full disk, told before
                writer.file.close()
        for name in self.names if (self.data_path / arrays.MANIFEST).exists() or REPLACED not in self.names else []:
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):          # a run that was stopped earlier left something there
            self.folder.rmdir()


class SplitWriter:
    """The array of one split with everything that stands beside it."""

    def __init__(self, staging: Staging, split: str):
        self.staging, self.split, self.normalised = staging, split, split in arrays.NORMALISED_SPLITS
        self.signals = staging.stage_rows(arrays.SIGNAL_FILES[split], np.float32)
        self.points = staging.stage_rows(arrays.LABEL_FILES[split], np.uint8) if split in arrays.POINT_SPLITS else None
        self.phases_file = staging.stage_rows(arrays.phases_path("", split).name, np.uint8, RECORD_SHAPE[:1]
                                              ) if split in arrays.LESIONS_OF.values() else None
        self.rows, self.r_peaks, self.low, self.high, self.phases = [], [], [], [], []

    def append(self, row: dict, filtered, r_peaks: dict, points=None, phases=None):
        """Add a record. The training set and the benchmark are stored normalised, as published.

        row: of the table of records; filtered: (5000, 12) mV; r_peaks: by detector, the same ones for every record;
        points: of arrays.POINT_SPLITS, labels (5000, 12), and phases where they are known: (5000, 12), of lesions
        (5000,).
        """
        self.signals.append(normalize_leads(filtered) if self.normalised else filtered)
        if self.points:
            self.points.append(points)
        self.low.append(filtered.min(axis=0))
        self.high.append(filtered.max(axis=0))
        if self.phases_file:
            self.phases_file.append(phases)
        elif phases is not None:
            self.phases.append(phases)
        self.r_peaks.append(r_peaks)
        self.rows.append(row | {"r_peaks": len(next(iter(r_peaks.values())))})

    def finish(self) -> dict:
        """Complete the array and stage its sidecars; returns the manifest's entry."""
        if not self.rows:
            raise UserError(f"no record for {arrays.SIGNAL_FILES[self.split]} is left; use more of the data set "
                            "(--limit, --benchmark_truth)")
        for writer in filter(None, (self.signals, self.points, self.phases_file)):
            writer.finish()
        written = arrays.load_npy(self.staging.folder / arrays.SIGNAL_FILES[self.split])
        identity, table = arrays.fingerprint(written), pd.DataFrame(self.rows)
        contents = {arrays.table_path("", self.split): lambda file: file.write(table.to_csv(index=False).encode())}
        if self.normalised:
            contents[arrays.details_path("", self.split)] = lambda file: arrays.pack_details(
                file, self.low, self.high, self.phases, identity)
        elif self.split in arrays.LABEL_FILES and not self.points:
            contents[arrays.label_path("", self.split)] = lambda file: np.save(file, table["label"].to_numpy(np.uint8))
        for detector in self.r_peaks[0]:
            contents[arrays.r_peaks_path("", self.split, detector)] = lambda file, detector=detector: (
                arrays.pack_r_peaks(file, [peaks[detector] for peaks in self.r_peaks], detector, identity))
        for path, write in contents.items():
            self.staging.write(path.name, write)
        return {"shape": list(written.shape), "fingerprint": identity,
                "files": {name: sha256_of(self.staging.folder / name) for name in files_of(self.split)[1:]
                          if name in self.staging.names}}
