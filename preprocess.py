"""From PTB-XL and LUDB as PhysioNet lays them out to the arrays that train.py and test.py read.

    python preprocess.py --ptbxl_path ./ptb-xl                                     # records500, ~3 GB, to ./data/
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 100                 # the small download, nearly the same
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 500 --allow_missing # whatever part is there
    python preprocess.py --ludb_path ./ludb                                        # the localization benchmark
    python preprocess.py --download ./ptb-xl --download_ludb ./ludb --sampling_rate 100     # from nothing, all of it

Every record is read, resampled to 500 Hz, filtered, and its R peaks are found, by worker processes; the rows stream
into the arrays that arrays.py describes. What became of every record is printed as an audit and kept, with all
parameters and versions, in manifest.json. With --ludb_path alone, whatever the data folder holds besides stays.
"""
import argparse
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ecg import arrays
from ecg import download
from ecg import ludb
from ecg import ptbxl
from ecg import signals
from ecg.r_peaks import find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.staging import RowWriter, Staging
from utils import UserError, git_commit, run, unwritable, usable_cores, versions

MOST_WORKERS = 10                                      # by default: 0.12 GB each, less than 1.5 GB in all


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data, one of the first two or both")
    data.add_argument("--ptbxl_path", help="folder with ptbxl_database.csv and records100 or records500")
    data.add_argument("--ludb_path", help="folder of LUDB, with RECORDS and data: makes the localization benchmark")
    data.add_argument("--data_path", default="./data/", help="folder for the arrays (default %(default)s)")
    data.add_argument("--sampling_rate", type=int, choices=sorted(ptbxl.FILE_COLUMN), default=500,
                      help="which of PTB-XL's two sets of files to read, in Hz (default %(default)s)")
    data.add_argument("--benchmark_truth", help="localization_truth.npz with ecg_id (M,) and label (M, 5000, 12): "
                      "makes the localization benchmark of its records in fold 10")
    data.add_argument("--limit", type=int, help="only the first records of each data set, for a trial")
    data.add_argument("--allow_missing", action="store_true", help="go on without the files that the folder lacks")
    running = parser.add_argument_group("running")
    running.add_argument("--workers", type=int, default=min(usable_cores(), MOST_WORKERS),
                         help=f"processes (default: one a core, up to {MOST_WORKERS})")
    download.add_flags(parser)
    arguments = download.name_paths(parser.parse_args())
    for name in ("limit", "workers", "connections"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    if not (arguments.ptbxl_path or arguments.ludb_path):
        raise UserError("no data set is named; give --ptbxl_path, --ludb_path or both, or --download")
    if arguments.benchmark_truth and (arguments.ludb_path or not arguments.ptbxl_path):
        raise UserError("--benchmark_truth makes the benchmark from PTB-XL; give it with --ptbxl_path and without "
                        "--ludb_path")
    return arguments


def earlier_manifest(data_path: Path, needed: bool) -> dict:
    """What the data folder's manifest says, {} where there is none. Raises UserError if a needed one is damaged."""
    try:
        return arrays.load_manifest(data_path) or {}
    except UserError:
        if needed:
            raise
        return {}


def own_benchmark(data_path: Path, manifest: dict) -> bool:
    """Whether the benchmark in the data folder is the one that its manifest describes."""
    try:
        return arrays.describes(manifest, "benchmark", arrays.load_npy(arrays.signal_path(data_path, "benchmark")))
    except UserError:                                  # missing or unreadable
        return False


def require_replaceable_benchmark(data_path: Path, manifest: dict):
    """Raise UserError where the data folder holds benchmark files from elsewhere, such as the authors' own."""
    found = [path for path in (arrays.signal_path(data_path, "benchmark"), arrays.label_path(data_path, "benchmark"))
             if path.exists()]
    if found and not own_benchmark(data_path, manifest):
        raise UserError(f"{' and '.join(map(str, found))} did not come from preprocess.py and would be overwritten, "
                        "while test.py scores such files as they are; move them away, or name another --data_path")


def load_marked_points(path: str | None) -> dict:
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
    """(ecg_id, path, sampling rate) -> (ecg_id, filtered (5000, 12) float32 in mV, R peaks by detector, "").

    Where the record cannot be used: (ecg_id, None, None, reason).
    """
    ecg_id, path, sampling_rate = task
    try:
        filtered = signals.filter_leads(signals.read_record(path, sampling_rate))
    except signals.RecordError as error:
        return ecg_id, None, None, str(error)
    r_peaks = {"heartpy": find_r_peaks_by_heartpy(filtered[:, signals.LEAD_II]),
               "slope": find_r_peaks_by_slope(filtered)}
    return ecg_id, filtered.astype(np.float32), r_peaks, ""


class SplitWriter:
    """The array of one split with everything that stands beside it."""

    def __init__(self, staging: Staging, split: str):
        self.staging, self.split, self.points = staging, split, None
        self.normalised = split in arrays.NORMALISED_SPLITS
        self.path = arrays.signal_path(staging.data_path, split)
        self.label_path = arrays.label_path(staging.data_path, split) if split in arrays.LABEL_FILES else None
        record_shape = (signals.RECORD_LENGTH, len(signals.LEAD_NAMES))
        self.signals = RowWriter(staging.stage(self.path), record_shape, np.float32)
        if split == "benchmark":
            self.points = RowWriter(staging.stage(self.label_path), record_shape, np.uint8)
        self.r_peaks, self.records, self.low, self.high, self.phases = [], [], [], [], []

    def append(self, record: dict, filtered, r_peaks, points=None, phases=None):
        """Add one row. The training set and the benchmark are stored normalised, as published.

        record: its row of the table; points: of the benchmark, labels (5000, 12), and phases where they are known.
        """
        self.signals.append(signals.normalize_leads(filtered) if self.normalised else filtered)
        if self.points:
            self.points.append(points)
        if self.normalised:
            self.low.append(filtered.min(axis=0))
            self.high.append(filtered.max(axis=0))
        if phases is not None:
            self.phases.append(phases)
        self.r_peaks.append(r_peaks)
        self.records.append(record | {"r_peaks": len(r_peaks["heartpy"])})

    def finish(self) -> dict:
        """Complete the array and stage its sidecars; returns the manifest's entry."""
        if not self.records:
            raise UserError(f"no record for {self.path} is left; use more of the data set (--limit, --benchmark_truth)")
        self.signals.finish()
        table, data_path = pd.DataFrame(self.records), self.staging.data_path
        written = arrays.load_npy(self.signals.path)
        identity = arrays.fingerprint(written)
        if self.normalised:
            self.staging.write(arrays.details_path(data_path, self.split),
                               lambda file: arrays.pack_details(file, self.low, self.high, self.phases, identity))
        if self.points:
            self.points.finish()
        elif self.label_path:
            self.staging.write(self.label_path, lambda file: np.save(file, table["label"].to_numpy(np.uint8)))
        self.staging.write(arrays.table_path(data_path, self.split),
                           lambda file: file.write(table.to_csv(index=False).encode()))
        for detector in arrays.R_PEAKS_FILES:
            of_detector = [peaks[detector] for peaks in self.r_peaks]
            self.staging.write(arrays.r_peaks_path(data_path, self.split, detector),
                               lambda file: arrays.pack_r_peaks(file, of_detector, detector, identity))
        return {"shape": list(written.shape), "fingerprint": identity}


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


def stream_ptbxl(records: pd.DataFrame, truth: dict, writers: dict, arguments) -> pd.DataFrame:
    """Prepare the wanted records in worker processes and append them in table order.

    Returns what became of them: index ecg_id, columns reason ("" if it was written) and r_peaks (their number).
    """
    wanted = [record for record in records.itertuples() if ptbxl.destinations(record, truth)]
    tasks = [(record.Index, Path(arguments.ptbxl_path) / record.file, arguments.sampling_rate) for record in wanted]
    outcome = {}
    progress = tqdm(prepare_all(tasks, arguments.workers), total=len(tasks), desc="preprocess", unit="record")
    for record, (ecg_id, filtered, r_peaks, reason) in zip(wanted, progress, strict=True):
        outcome[ecg_id] = (reason, 0 if reason else len(r_peaks["heartpy"]))
        if not reason:
            for split in ptbxl.destinations(record, truth):
                writers[split].append(ptbxl.table_row(record), filtered, r_peaks, truth.get(ecg_id))
    return pd.DataFrame.from_dict(outcome, orient="index", columns=["reason", "r_peaks"])


def write_ptbxl(staging: Staging, records: pd.DataFrame, present: pd.Series, truth: dict, arguments) -> dict:
    """Stage the arrays of PTB-XL's records that are present; returns the manifest."""
    writers = {split: SplitWriter(staging, split) for split in
               ("train", "val", "test", *(["benchmark"] if truth else []))}
    outcome = stream_ptbxl(records[present], truth, writers, arguments)
    source = ptbxl.source_of(Path(arguments.ptbxl_path), records)
    lost = [{"ecg_id": ecg_id, "split": ptbxl.split_of(records.at[ecg_id, "fold"]), "reason": row.reason}
            for ecg_id, row in outcome[outcome["reason"] != ""].iterrows()]
    return {"source": source,
            "parameters": parameters(arguments, arguments.sampling_rate) | {"benchmark_truth": bool(truth)},
            "audit": ptbxl.audit_labels(records, present, outcome), "lost": lost,
            "arrays": {split: writer.finish() for split, writer in writers.items()}, **provenance(),
            **({"benchmark": source | {"records_in_truth": len(truth)}} if truth else {})}


def write_ludb(staging: Staging, source: dict, present: dict, missing: int, arguments) -> tuple:
    """Stage the benchmark of LUDB's records that are present; returns the manifest's entries of data set and array.

    source: of ludb.source_of; missing: how many of the wanted records are not present.
    """
    writer, audit, lost = SplitWriter(staging, "benchmark"), ludb.Audit(len(present) + missing, missing), []
    tasks = [(number, path, ludb.SAMPLING_RATE) for number, path in present.items()]
    progress = tqdm(prepare_all(tasks, arguments.workers), total=len(tasks), desc="preprocess: LUDB", unit="record")
    for number, filtered, r_peaks, reason in progress:
        try:
            if reason:
                raise signals.RecordError(reason)
            comments, phases = ludb.read_comments(present[number]), ludb.read_phases(present[number])
            diagnoses = ludb.diagnoses_in(comments)
        except signals.RecordError as error:
            lost.append({"ecg_id": number, "reason": str(error)})
            continue
        labels = ludb.mark(phases, diagnoses)
        writer.append({"ecg_id": number, "patient_id": "", **ludb.person_in(comments),
                       "label": int((labels == 1).any()), "diagnoses": ludb.join_diagnoses(diagnoses)}, filtered, r_peaks, labels, phases)
        audit.add(phases, diagnoses, labels, r_peaks["heartpy"])
    if len(lost) == len(present):
        raise UserError(f"no record in {arguments.ludb_path} can be used (record {lost[0]['ecg_id']}: "
                        f"{lost[0]['reason']}); download it again")
    audit.summary["lost"] = len(lost)
    return source | {"parameters": parameters(arguments, ludb.SAMPLING_RATE), "audit": audit.summary, "lost": lost,
                     **provenance()}, writer.finish()


def parameters(arguments, sampling_rate_read: int) -> dict:
    """What the manifest says of how signals were made."""
    return {"sampling_rate_read": sampling_rate_read, "sampling_rate": signals.SAMPLING_RATE,
            "pass_band_hz": list(signals.PASS_BAND), "filter_order": signals.FILTER_ORDER,
            "leads": list(signals.LEAD_NAMES), "limit": arguments.limit, "allow_missing": arguments.allow_missing}


def provenance() -> dict:
    """What the manifest says of when and by which code arrays were made."""
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
            "commit": git_commit()}


def with_benchmark(manifest: dict, entry: dict, of_array: dict) -> dict:
    """A manifest with these entries of the benchmark in place of what it said of one."""
    return manifest | {"benchmark": entry, "arrays": manifest.get("arrays", {}) | {"benchmark": of_array}}


def write_all(old: dict, ptbxl_inputs: tuple | None, ludb_inputs: tuple | None, arguments) -> dict:
    """Write the arrays of both data sets and their manifest, which is returned.

    old: the manifest until now. Of it stays what it says of arrays that this run does not write.
    """
    data_path, staging = Path(arguments.data_path), None
    try:
        staging = Staging(data_path)
        manifest = write_ptbxl(staging, *ptbxl_inputs, arguments) if ptbxl_inputs else old
        if ludb_inputs:
            manifest = with_benchmark(manifest, *write_ludb(staging, *ludb_inputs, arguments))
        elif "benchmark" not in manifest and own_benchmark(data_path, old):
            entry = old.get("benchmark", old.get("source"))     # manifests without the first are of one data set
            manifest = with_benchmark(manifest, entry, old["arrays"]["benchmark"])
        staging.publish(manifest)
    except OSError as error:
        raise unwritable(f"{data_path} given as --data_path", error) from error
    finally:
        if staging:
            staging.discard()
    return manifest


def main():
    git_commit()
    arguments = parse_arguments()
    data_path, allow_missing = Path(arguments.data_path), arguments.allow_missing
    old, ptbxl_inputs, ludb_inputs, truth = earlier_manifest(data_path, not arguments.ptbxl_path), None, None, {}
    if arguments.ludb_path or arguments.benchmark_truth:
        require_replaceable_benchmark(data_path, old)
    download.fetch(arguments)
    if arguments.ludb_path:
        paths = ludb.list_records(Path(arguments.ludb_path))
        wanted = dict(list(paths.items())[:arguments.limit])
        there = ludb.present_records(wanted, Path(arguments.ludb_path), allow_missing)
        ludb_inputs = ludb.source_of(paths), there, len(wanted) - len(there)
    if arguments.ptbxl_path:
        ptbxl_path = Path(arguments.ptbxl_path)
        records = ptbxl.load_ptbxl(ptbxl_path, arguments.sampling_rate, arguments.limit)
        truth = load_marked_points(arguments.benchmark_truth)
        present = ptbxl.files_of(records, ptbxl_path)
        ptbxl.require_files(present, records, ptbxl_path, allow_missing)
        ptbxl_inputs = records, present, truth

    manifest = write_all(old, ptbxl_inputs, ludb_inputs, arguments)

    if ptbxl_inputs:
        ptbxl.print_audit(manifest["audit"], manifest["lost"])
    if ludb_inputs:
        ludb.print_audit(manifest["benchmark"]["audit"], manifest["benchmark"]["lost"])
    print("\narrays")
    for split, entry in manifest["arrays"].items():
        print(f"  {arrays.SIGNAL_FILES[split]:<20}{tuple(entry['shape'])}")
    if truth:
        print(f"{manifest['arrays']['benchmark']['shape'][0]} of the {len(truth)} records in --benchmark_truth are in "
              "the benchmark: those of fold 10 with a superclass")


if __name__ == "__main__":
    run(main)
