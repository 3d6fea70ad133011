"""From PTB-XL as PhysioNet lays it out to the arrays that train.py and test.py read.

    python preprocess.py --ptbxl_path ./ptb-xl                                     # records500, ~3 GB, to ./data/
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 100                 # the small download, nearly the same
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 500 --allow_missing # whatever part is there

Every record is read, resampled to 500 Hz, filtered, and its R peaks are found, by worker processes; the rows stream
into the arrays that arrays.py describes. What became of every record is printed as a label audit and kept, with all
parameters and versions, in manifest.json.
"""
import argparse
import ast
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import arrays
import signals
from arrays import TEST_FOLD, VALIDATION_FOLD
from utils import UserError, git_commit, run, save_json, unwritable, usable_cores, versions

FILE_COLUMN = {100: "filename_lr", 500: "filename_hr"}
PTBXL_VERSIONS = {21837: "1.0.1", 21799: "1.0.3"}      # by number of records
MOST_WORKERS = 10                                      # by default: 0.12 GB each, less than 1.5 GB in all
AUDIT_COLUMNS = ("normal", "abnormal", "mixed", "unlabelled", "missing", "lost", "no R peak")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--ptbxl_path", required=True, help="folder with ptbxl_database.csv and records100 or records500")
    data.add_argument("--data_path", default="./data/", help="folder for the arrays (default %(default)s)")
    data.add_argument("--sampling_rate", type=int, choices=sorted(FILE_COLUMN), default=500,
                      help="which of PTB-XL's two sets of files to read, in Hz (default %(default)s)")
    data.add_argument("--benchmark_truth", help="localization_truth.npz with ecg_id (M,) and label (M, 5000, 12): "
                      "makes the localization benchmark of its records in fold 10")
    data.add_argument("--limit", type=int, help="only the first records of the table, for a trial")
    data.add_argument("--allow_missing", action="store_true", help="go on without the files that the folder lacks")
    running = parser.add_argument_group("running")
    running.add_argument("--workers", type=int, default=min(usable_cores(), MOST_WORKERS),
                         help=f"processes (default: one a core, up to {MOST_WORKERS})")
    arguments = parser.parse_args()
    for name in ("limit", "workers"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    return arguments


def read_table(path: Path, columns: set) -> pd.DataFrame:
    """One of PTB-XL's two tables. Raises UserError where it is missing, malformed or lacks one of the columns."""
    try:
        table = pd.read_csv(path, low_memory=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; --ptbxl_path must name PTB-XL's folder as PhysioNet lays it out") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable table ({' '.join(str(error).split())[:100]}); download it again"
                        ) from error
    absent = columns - set(table.columns)
    if absent:
        raise UserError(f"{path} has no column {', '.join(sorted(absent))}; download it again")
    return table


def classify(superclasses: tuple) -> str:
    """The label of a record: normal is exactly {NORM}, as the paper counts; mixed records are abnormal ones too."""
    if not superclasses:
        return "unlabelled"
    if superclasses == ("NORM",):
        return "normal"
    return "mixed" if "NORM" in superclasses else "abnormal"


def load_superclasses(path: Path) -> dict:
    """The superclass of every diagnostic statement, by its code. Raises UserError where one has none."""
    statements = read_table(path, {"diagnostic", "diagnostic_class"})
    diagnostic = statements[statements["diagnostic"] == 1]
    found = dict(zip(diagnostic.iloc[:, 0], diagnostic["diagnostic_class"]))
    without = [code for code, superclass in found.items() if not isinstance(superclass, str)]
    if without or not found:
        raise UserError(f"{path} names no diagnostic_class for {', '.join(map(str, without)) or 'any statement'}; "
                        "download it again")
    return found


def load_ptbxl(ptbxl_path: Path, sampling_rate: int, limit: int | None) -> pd.DataFrame:
    """PTB-XL's records: index ecg_id; columns fold, file (without extension), statements, superclasses, kind.

    The superclasses of a record are the sorted set of diagnostic_class over its diagnostic statements.
    """
    table_path = ptbxl_path / "ptbxl_database.csv"
    table = read_table(table_path, {"ecg_id", "scp_codes", "strat_fold", FILE_COLUMN[sampling_rate]})
    diagnostic_class = load_superclasses(ptbxl_path / "scp_statements.csv")
    rows = []
    for row in table.sort_values("ecg_id").iloc[:limit].to_dict("records"):
        try:
            ecg_id, fold = int(row["ecg_id"]), int(row["strat_fold"])
            codes = tuple(ast.literal_eval(row["scp_codes"]).keys())
            if not 1 <= fold <= TEST_FOLD:
                raise ValueError(f"fold {fold}")
        except (ValueError, SyntaxError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{table_path}: record {row['ecg_id']} has an unreadable ecg_id, scp_codes or strat_fold; "
                            "download it again") from error
        superclasses = tuple(sorted({diagnostic_class[code] for code in codes if code in diagnostic_class}))
        rows.append((ecg_id, fold, str(row[FILE_COLUMN[sampling_rate]]), codes, superclasses, classify(superclasses)))
    records = pd.DataFrame(rows, columns=["ecg_id", "fold", "file", "statements", "superclasses", "kind"])
    if not len(records) or records["ecg_id"].duplicated().any():
        raise UserError(f"{table_path} holds no record, or an ecg_id twice; download it again")
    records.attrs["records_in_table"] = len(table)
    return records.set_index("ecg_id")


def split_of(fold: int) -> str:
    """The split that a fold is held for. Fold 9's normals are in train.npy as well, for the paper protocol."""
    return {VALIDATION_FOLD: "val", TEST_FOLD: "test"}.get(fold, "train")


def files_of(records: pd.DataFrame, ptbxl_path: Path) -> pd.Series:
    """Whether each record's two files are there."""
    return records["file"].map(lambda file: all((ptbxl_path / f"{file}{end}").is_file() for end in (".hea", ".dat")))


def require_files(present: pd.Series, records: pd.DataFrame, ptbxl_path: Path, allow_missing: bool):
    """Raise UserError for a partial download, unless it is allowed; and for one without a single file in any case."""
    absent = records.index[~present]
    if not len(absent) or (allow_missing and present.any()):
        return
    first = ", ".join(records.loc[absent[:3], "file"])
    remedy = "complete the download" if allow_missing else "complete the download, or go on with --allow_missing"
    raise UserError(f"{len(absent)} of the {len(records)} records that the table names are not in {ptbxl_path} "
                    f"(first: {first}); {remedy}, or choose the other --sampling_rate")


def load_truth(path: str | None) -> dict:
    """Marked points by ecg_id: uint8 (5000, 12) each, 1 = anomalous. Raises UserError."""
    if path is None:
        return {}
    shape = (signals.RECORD_LENGTH, len(signals.LEAD_NAMES))
    try:
        with np.load(path, allow_pickle=False) as truth:
            ecg_ids, labels = truth["ecg_id"], truth["label"]
    except Exception as error:          # numpy and zipfile raise whatever a damaged file makes them trip over
        raise UserError(f"{path} given as --benchmark_truth cannot be read ({type(error).__name__}); it must be an "
                        ".npz with ecg_id and label") from error
    if labels.shape != (len(ecg_ids), *shape) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path} given as --benchmark_truth must hold labels 0 or 1 of shape {(len(ecg_ids), *shape)}")
    return dict(zip(ecg_ids.tolist(), labels))


def prepare_record(task: tuple) -> tuple:
    """(ecg_id, path, sampling rate) -> (ecg_id, filtered (5000, 12) float32 in mV, R peaks, "").

    Where the record cannot be used: (ecg_id, None, None, reason).
    """
    ecg_id, path, sampling_rate = task
    try:
        filtered = signals.filter_leads(signals.read_record(path, sampling_rate))
    except signals.RecordError as error:
        return ecg_id, None, None, str(error)
    return ecg_id, filtered.astype(np.float32), signals.find_r_peaks(filtered[:, signals.LEAD_II]), ""


class SplitWriter:
    """The array of one split with everything that stands beside it."""

    def __init__(self, staging: arrays.Staging, split: str):
        self.staging, self.split, self.truth = staging, split, None
        self.path = arrays.signal_path(staging.data_path, split)
        self.label_path = arrays.label_path(staging.data_path, split) if split in arrays.LABEL_FILES else None
        record_shape = (signals.RECORD_LENGTH, len(signals.LEAD_NAMES))
        self.signals = arrays.RowWriter(staging.stage(self.path), record_shape, np.float32)
        if split == "benchmark":
            self.truth = arrays.RowWriter(staging.stage(self.label_path), record_shape, np.uint8)
        self.r_peaks, self.records = [], []

    def append(self, record, filtered, r_peaks, truth=None):
        """Add one row. The training set and the benchmark are stored normalised, as published."""
        normalised = self.split in ("train", "benchmark")
        self.signals.append(signals.normalize_leads(filtered) if normalised else filtered)
        if self.truth:
            self.truth.append(truth)
        self.r_peaks.append(r_peaks)
        self.records.append({"ecg_id": record.Index, "fold": record.fold, "label": int(record.kind != "normal"),
                             "superclasses": " ".join(record.superclasses), "statements": " ".join(record.statements),
                             "r_peaks": len(r_peaks)})

    def finish(self) -> dict:
        """Complete the array and stage its sidecars; returns the manifest's entry."""
        if not self.records:
            raise UserError(f"no record for {self.path} is left; use more of the data set (--limit, --benchmark_truth)")
        self.signals.finish()
        table, data_path = pd.DataFrame(self.records, columns=list(arrays.RECORD_COLUMNS)), self.staging.data_path
        if self.truth:
            self.truth.finish()
        elif self.label_path:
            self.staging.write(self.label_path, lambda file: np.save(file, table["label"].to_numpy(np.uint8)))
        self.staging.write(arrays.records_path(data_path, self.split),
                           lambda file: file.write(table.to_csv(index=False).encode()))
        written = arrays.load_npy(self.signals.path)
        identity = arrays.fingerprint(written)
        self.staging.write(arrays.r_peaks_path(data_path, self.split),
                           lambda file: arrays.pack_r_peaks(file, self.r_peaks, identity))
        return {"shape": list(written.shape), "fingerprint": identity}


def destinations(record, truth: dict) -> list:
    """The splits that a record goes to; none for abnormal records of folds 1-8 and records without a superclass."""
    if record.kind == "unlabelled":
        return []
    splits = [split_of(record.fold)] if record.fold in (VALIDATION_FOLD, TEST_FOLD) else []
    if record.fold != TEST_FOLD and record.kind == "normal":
        splits.append("train")
    if record.fold == TEST_FOLD and record.Index in truth:
        splits.append("benchmark")
    return splits


def prepare_worker():
    """Set up a worker process: Ctrl-C is the parent's to answer, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    parent = os.getppid()

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def prepare_all(tasks: list, workers: int):
    """Yield prepare_record(task) for every task, in order; workers are at most a few records ahead of the reader.

    Raises UserError where a worker process dies; none is left behind, whatever ends the loop.
    """
    waiting = deque()
    with ProcessPoolExecutor(workers, initializer=prepare_worker) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(prepare_record, task))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def stream_records(records: pd.DataFrame, truth: dict, writers: dict, arguments) -> pd.DataFrame:
    """Prepare the wanted records in worker processes and append them in table order.

    Returns what became of them: index ecg_id, columns reason ("" if it was written) and r_peaks (their number).
    """
    wanted = [record for record in records.itertuples() if destinations(record, truth)]
    tasks = [(record.Index, Path(arguments.ptbxl_path) / record.file, arguments.sampling_rate) for record in wanted]
    outcome = {}
    progress = tqdm(prepare_all(tasks, arguments.workers), total=len(tasks), desc="preprocess", unit="record")
    for record, (ecg_id, filtered, r_peaks, reason) in zip(wanted, progress, strict=True):
        outcome[ecg_id] = (reason, 0 if reason else len(r_peaks))
        if not reason:
            for split in destinations(record, truth):
                writers[split].append(record, filtered, r_peaks, truth.get(ecg_id))
    return pd.DataFrame.from_dict(outcome, orient="index", columns=["reason", "r_peaks"])


def audit_labels(records: pd.DataFrame, present: pd.Series, outcome: pd.DataFrame) -> dict:
    """Count, per split and for all, what became of the records: {split: {column of AUDIT_COLUMNS: count}}.

    Normal, abnormal, mixed and unlabelled divide the records of the table; mixed ones (NORM and another superclass)
    are labelled abnormal. Missing are not in the folder, lost could not be used, and no R peak was found in some.
    """
    reasons = outcome["reason"].reindex(records.index)
    peaks = outcome["r_peaks"].reindex(records.index)
    counts = {}
    for split in ("train", "val", "test", "all"):
        chosen = records["fold"].map(split_of).eq(split) | (split == "all")
        kinds = Counter(records.loc[chosen, "kind"])
        counts[split] = {column: kinds[column] for column in AUDIT_COLUMNS[:4]}
        counts[split]["missing"] = int((chosen & ~present).sum())
        counts[split]["lost"] = int((chosen & reasons.fillna("").ne("")).sum())
        counts[split]["no R peak"] = int((chosen & reasons.eq("") & peaks.eq(0)).sum())
    return counts


def print_audit(counts: dict, lost: list, described: dict):
    """Print the label audit, the lost records by name, and the arrays that were written."""
    titles = {"train": "train, folds 1-8", "val": "val, fold 9", "test": "test, fold 10", "all": "all"}
    print("\nlabel audit" + " " * 9 + "".join(f"{column:>12}" for column in AUDIT_COLUMNS))
    for split, row in counts.items():
        print(f"{titles[split]:<20}" + "".join(f"{row[column]:>12,}" for column in AUDIT_COLUMNS))
    print("normal: the superclasses are exactly {NORM}; mixed (NORM and another) are scored as abnormal; unlabelled "
          "have no superclass\nand are left out; abnormal records of folds 1-8 are not read. Missing (no file), lost "
          "(unusable) and without an R peak\n(kept) are counted among the first four.")
    for loss in lost:
        print(f"lost: record {loss['ecg_id']} ({loss['split']}): {loss['reason']}")
    print("\narrays")
    for split, entry in described.items():
        print(f"  {arrays.SIGNAL_FILES[split]:<20}{tuple(entry['shape'])}")


def write_arrays(records: pd.DataFrame, truth: dict, arguments) -> tuple:
    """Stream all records into arrays; returns (what became of them, the manifest's entries of the arrays)."""
    data_path, staging = Path(arguments.data_path), None
    try:
        staging = arrays.Staging(data_path)
        writers = {split: SplitWriter(staging, split) for split in
                   ("train", "val", "test", *(["benchmark"] if truth else []))}
        outcome = stream_records(records, truth, writers, arguments)
        described = {split: writer.finish() for split, writer in writers.items()}
        staging.publish()
    except OSError as error:
        raise unwritable(f"{data_path} given as --data_path", error) from error
    finally:
        if staging:
            staging.discard()
    return outcome, described


def main():
    git_commit()
    arguments = parse_arguments()
    ptbxl_path = Path(arguments.ptbxl_path)
    records = load_ptbxl(ptbxl_path, arguments.sampling_rate, arguments.limit)
    truth = load_truth(arguments.benchmark_truth)
    present = files_of(records, ptbxl_path)
    require_files(present, records, ptbxl_path, arguments.allow_missing)

    outcome, described = write_arrays(records[present], truth, arguments)

    counts = audit_labels(records, present, outcome)
    lost = [{"ecg_id": ecg_id, "split": split_of(records.at[ecg_id, "fold"]), "reason": row.reason}
            for ecg_id, row in outcome[outcome["reason"] != ""].iterrows()]
    in_table = records.attrs["records_in_table"]
    save_json(Path(arguments.data_path) / arrays.MANIFEST, {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": {"data_set": "simulated" if (ptbxl_path / arrays.SIMULATED_MARKER).exists() else "PTB-XL",
                   "records_in_table": in_table,
                   "version": PTBXL_VERSIONS.get(in_table, "unknown")},
        "parameters": {"sampling_rate_read": arguments.sampling_rate, "sampling_rate": signals.SAMPLING_RATE,
                       "pass_band_hz": list(signals.PASS_BAND), "filter_order": signals.FILTER_ORDER,
                       "leads": list(signals.LEAD_NAMES), "limit": arguments.limit,
                       "allow_missing": arguments.allow_missing, "benchmark_truth": bool(truth)},
        "audit": counts, "lost": lost, "arrays": described, "versions": versions(), "commit": git_commit()})
    print_audit(counts, lost, described)
    if truth:
        print(f"{described['benchmark']['shape'][0]} of the {len(truth)} records in --benchmark_truth are in the "
              "benchmark: those of fold 10 with a superclass")


if __name__ == "__main__":
    run(main)
