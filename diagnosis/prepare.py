"""From PTB-XL as PhysioNet lays it out to the arrays of all its records with their 71 statements.

    python -m diagnosis.prepare --ptbxl_path ./ptb-xl --data_path ./data/ --sampling_rate 100

Every record is read, resampled to 500 Hz and filtered as preprocess.py does it; diagnosis/arrays.py describes the
files. 21,799 records take 2.6 GB of disk.
"""
import argparse
import io
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from diagnosis.arrays import (ATTRIBUTES, MANIFEST, SIGNALS, SPLIT, TABLE, attributes_in, group_of, heart_rate,
                              mark_statements)
from ecg import arrays, ptbxl
from ecg.r_peaks import find_r_peaks_by_slope
from ecg.signals import RecordError, filter_leads
from ecg.wfdb_files import read_record
from ecg.writing import RECORD_SHAPE, RowWriter, require_described
from utils import UserError, git_commit, require_writable, run, save_json, unwritable, versions, write_atomically


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptbxl_path", required=True, help="folder with ptbxl_database.csv and records100 or 500")
    parser.add_argument("--data_path", default="./data/", help="folder for the arrays (default %(default)s)")
    parser.add_argument("--sampling_rate", type=int, choices=sorted(ptbxl.FILE_COLUMN), default=500,
                        help="which of PTB-XL's two sets of files to read, in Hz (default %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first records, for a trial")
    parser.add_argument("--training_share", type=float, default=1.0, help="of the records of folds 1-8, chosen at "
                        "random, always the same ones; the groups are by all of them (default 1)")
    arguments = parser.parse_args()
    if not 0 < arguments.training_share <= 1:
        raise UserError(f"--training_share must be above 0 and at most 1, not {arguments.training_share}")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {arguments.limit}")
    return arguments


def write_records(folder: Path, records: pd.DataFrame, sampling_rate: int) -> tuple:
    """Stream the records into statements.npy; returns (rows of the table, R peaks of each, lost: [(ecg_id, reason)]).

    The array gets its name when it is whole; what stood there before loses its manifest first.
    """
    path = folder / f"{SIGNALS}.part"
    rows, r_peaks, lost = [], [], []
    writer = RowWriter(path, RECORD_SHAPE, np.float16)
    try:
        for record in tqdm(records.itertuples(), total=len(records), desc="prepare", unit="record"):
            try:
                filtered = filter_leads(read_record(record.path, sampling_rate))
            except RecordError as error:
                lost.append((record.Index, str(error)))
                continue
            writer.append(filtered)
            r_peaks.append(find_r_peaks_by_slope(filtered.astype(np.float32)))
            row = ptbxl.table_row(record)
            rows.append({name: row[name] for name in ("ecg_id", "patient_id", "age", "sex", "fold", "statements")}
                        | {"heart_rate": heart_rate(r_peaks[-1])})
        writer.finish()
        (folder / MANIFEST).unlink(missing_ok=True)
        os.replace(path, folder / SIGNALS)
    finally:
        with suppress(OSError):
            writer.file.close()
            path.unlink(missing_ok=True)
    return rows, r_peaks, lost


def choose(records: pd.DataFrame, training_share: float) -> pd.DataFrame:
    """All records of folds 9 and 10, and a fixed random share of the others. records: of ptbxl.load_ptbxl."""
    drawn = np.random.default_rng(0).random(len(records)) < training_share
    return records[(records["fold"] >= arrays.VALIDATION_FOLD).to_numpy() | drawn]


def describe(table: pd.DataFrame, records: pd.DataFrame, ptbxl_path: Path) -> dict:
    """The statements with their groups, and mean and deviation of the attributes, by folds 1-8; for the manifest.

    table: of what was written, which gives the attributes; records: of ptbxl.load_ptbxl, all of which give the groups.
    """
    of_code = ptbxl.read_table(ptbxl_path / "scp_statements.csv", {"description"})
    codes = of_code.iloc[:, 0].astype(str).tolist()
    training = table[table["fold"] < arrays.VALIDATION_FOLD]
    named = records.loc[records["fold"] < arrays.VALIDATION_FOLD, "statements"].map(" ".join)
    positives = mark_statements(named, codes).sum(axis=0)
    values = attributes_in({name: pd.to_numeric(training[name], errors="coerce").to_numpy() if name != "sex" else
                            training[name].to_numpy() for name in ATTRIBUTES})
    known = [column[np.isfinite(column)] for column in values.T]
    return {"statements": [{"code": code, "description": str(text), "positives": int(count), "group": group_of(count)}
                           for code, text, count in zip(codes, of_code["description"], positives)],
            "training_records": len(training), "training_records_of_groups": len(named),
            "attributes": {name: [float(column.mean()), float(column.std()) or 1.0] if len(column) else [0.0, 1.0]
                           for name, column in zip(ATTRIBUTES, known)}}


def main():
    commit, arguments = git_commit(), parse_arguments()
    folder, ptbxl_path = Path(arguments.data_path), Path(arguments.ptbxl_path)
    require_writable(folder)
    require_described(folder, SIGNALS, (TABLE,), MANIFEST, "diagnosis.prepare")
    records = ptbxl.load_ptbxl(ptbxl_path, arguments.sampling_rate, arguments.limit)
    ptbxl.require_files(records, ptbxl_path, allow_missing=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with threadpool_limits(1):
            rows, r_peaks, lost = write_records(folder, choose(records, arguments.training_share),
                                                arguments.sampling_rate)
    except OSError as error:
        raise unwritable(folder, error) from error
    table, identity = pd.DataFrame(rows), arrays.fingerprint(arrays.load_npy(folder / SIGNALS))
    text = io.StringIO()
    table.to_csv(text, index=False)
    write_atomically(folder / TABLE, lambda file: file.write(text.getvalue().encode()))
    write_atomically(arrays.r_peaks_path(folder, SPLIT, "slope"),
                     lambda file: arrays.pack_r_peaks(file, r_peaks, "slope", identity))
    about = describe(table, records, ptbxl_path)
    save_json(folder / MANIFEST, {
        "source": records.attrs["source"], "sampling_rate_read": arguments.sampling_rate, "fingerprint": identity,
        "lost": [{"ecg_id": int(ecg_id), "reason": reason} for ecg_id, reason in lost], **about,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "commit": commit})
    for ecg_id, reason in lost:
        print(f"lost: record {ecg_id}: {reason}")
    groups = [statement["group"] for statement in about["statements"]]
    print(f"{len(table)} records in {folder / SIGNALS}; {len(groups)} statements: "
          + ", ".join(f"{groups.count(name)} {name}" for name in sorted(set(groups))))


if __name__ == "__main__":
    run(main)
