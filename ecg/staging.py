"""How preprocess.py writes the files in data/."""
import contextlib
import json
import os
from pathlib import Path

import numpy as np

from ecg.arrays import MANIFEST, SIGNAL_FILES
from utils import sync_folder, unwritable


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
