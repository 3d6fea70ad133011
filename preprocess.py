"""From PTB-XL and LUDB as PhysioNet lays them out to the arrays that train.py and test.py read.

    python preprocess.py --ptbxl_path ./ptb-xl                                     # records500, ~3 GB, to ./data/
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 100                 # the small download, nearly the same
    python preprocess.py --ptbxl_path ./ptb-xl --sampling_rate 500 --allow_missing # whatever part is there
    python preprocess.py --ludb_path ./ludb                                        # the localization benchmark
    python preprocess.py --mitdb_path ./mitdb                                      # beats of MIT-BIH
    python preprocess.py --lesions 1                                               # lesions, from the arrays in ./data/
    python preprocess.py --download ./ptb-xl --download_ludb ./ludb --sampling_rate 100     # from nothing, all of it

Every record is read, resampled to 500 Hz, filtered, and its R peaks are found, by worker processes; the rows stream
into the arrays that ecg/arrays.py describes. What became of every record is printed as an audit and kept, with all
parameters and versions, in manifest.json. With --ludb_path or --lesions alone, whatever the data folder holds besides
stays; a file that preprocess.py did not write is never replaced.
"""
import argparse
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ecg import arrays, download, ludb, mitbih, ptbxl, signals
from ecg.lesions import KINDS, implant_some
from ecg.r_peaks import find_r_peaks_by_heartpy, find_r_peaks_by_slope
from ecg.wfdb_files import read_record
from ecg.writing import RECORD_SHAPE, SplitWriter, Staging, is_ours, require_replaceable
from utils import UserError, git_commit, require_writable, run, unwritable, usable_cores, versions

MOST_WORKERS = 10                                      # by default: 0.12 GB each, less than 1.5 GB in all


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data, at least one of the first three or --lesions 1")
    data.add_argument("--ptbxl_path", help="folder with ptbxl_database.csv and records100 or records500")
    data.add_argument("--ludb_path", help="folder of LUDB, with RECORDS and data: makes the localization benchmark")
    data.add_argument("--mitdb_path", help="folder of the MIT-BIH arrhythmia database: makes beats, for --beats")
    data.add_argument("--data_path", default="./data/", help="folder for the arrays (default %(default)s)")
    data.add_argument("--sampling_rate", type=int, choices=sorted(ptbxl.FILE_COLUMN), default=500,
                      help="which of PTB-XL's two sets of files to read, in Hz (default %(default)s)")
    data.add_argument("--benchmark_truth", help="localization_truth.npz with ecg_id (M,) and label (M, 5000, 12): "
                      "makes the localization benchmark of its records in fold 10")
    data.add_argument("--lesions", type=int, choices=(0, 1), default=0, help="1: make the benchmark of implanted "
                      "lesions from the normals of val.npy and test.npy in --data_path")
    data.add_argument("--limit", type=int, help="only the first records of each data set, for a trial")
    data.add_argument("--allow_missing", action="store_true", help="go on without the files that the folder lacks")
    running = parser.add_argument_group("running")
    running.add_argument("--workers", type=int, default=min(usable_cores(), MOST_WORKERS),
                         help=f"processes (default: one a core, up to {MOST_WORKERS})")
    download.add_flags(parser)
    arguments = parser.parse_args()
    for name in ("limit", "workers", "connections"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    return arguments


def load_marked_points(path: str | None) -> dict:
    """Marked points by ecg_id: uint8 (5000, 12) each, 1 = anomalous; none where path is None. Raises UserError."""
    if path is None:
        return {}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as truth:
            ecg_ids, labels = truth["ecg_id"], truth["label"]
    except Exception as error:          # numpy and zipfile raise whatever a damaged file makes them trip over
        raise UserError(f"{path} given as --benchmark_truth cannot be read ({type(error).__name__}); it must be an "
                        ".npz with ecg_id and label") from error
    if labels.shape != (len(ecg_ids), *RECORD_SHAPE) or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path} given as --benchmark_truth holds labels of shape {labels.shape}; it must hold 0 and 1 "
                        f"of shape {(len(ecg_ids), *RECORD_SHAPE)}")
    return dict(zip(ecg_ids.tolist(), labels))


# ---- worker processes

def prepare_record(task: tuple) -> tuple:
    """(ecg_id, path, sampling rate) -> (ecg_id, filtered (5000, 12) float32 in mV, R peaks by detector, "").

    Where the record cannot be used: (ecg_id, None, {}, reason).
    """
    ecg_id, path, sampling_rate = task
    try:
        filtered = signals.filter_leads(read_record(path, sampling_rate))
    except signals.RecordError as error:
        return ecg_id, None, {}, str(error)
    r_peaks = {"heartpy": find_r_peaks_by_heartpy(filtered[:, signals.LEAD_II]),
               "slope": find_r_peaks_by_slope(filtered)}
    return ecg_id, filtered.astype(np.float32), r_peaks, ""


def implant_record(task: tuple) -> list:
    """(array, row, ecg_id, R peaks) of a normal ECG -> [(Implanted, its own R peaks by detector)]; empty where the
    record is refused."""
    path, row, ecg_id, r_peaks = task
    signal = np.array(arrays.load_npy(path)[row], dtype=np.float32)
    return [(one, {"slope": find_r_peaks_by_slope(one.signal)}) for one in implant_some(ecg_id, signal, r_peaks)]


def prepare_worker():
    """Set up a worker process: Ctrl-C is the parent's to answer, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    threadpool_limits(1)                                # a worker a core: more threads would wait for each other
    parent = os.getppid()

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def prepare_all(prepare, tasks: list, workers: int):
    """Yield prepare(task) for every task, in order; workers are at most a few records ahead of the reader.

    Raises UserError where a worker process dies; none is left behind, whatever ends the loop.
    """
    waiting = deque()
    with ProcessPoolExecutor(workers, initializer=prepare_worker) as pool:
        try:
            for task in tqdm(tasks, desc="preprocess", unit="record"):
                waiting.append(pool.submit(prepare, task))
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


# ---- arrays

def write_ptbxl(staging: Staging, records: pd.DataFrame, truth: dict, sampling_rate: int, workers: int) -> dict:
    """Stage the arrays of those of PTB-XL's records that are present; returns the manifest's entries.

    records: of ptbxl.load_ptbxl; truth: of load_marked_points.
    """
    writers = {split: SplitWriter(staging, split) for split in ("train", "val", "test", *["benchmark"][:len(truth)])}
    chosen = [record for record in records.itertuples() if record.present and ptbxl.destinations(record, truth)]
    tasks, outcome, lost = [(record.Index, record.path, sampling_rate) for record in chosen], {}, []
    for record, (ecg_id, filtered, r_peaks, reason) in zip(
            chosen, prepare_all(prepare_record, tasks, workers), strict=True):      # no name would outlive the loop
        outcome[ecg_id] = reason, {detector: len(positions) for detector, positions in r_peaks.items()}
        if reason:
            lost.append({"ecg_id": ecg_id, "split": ptbxl.split_of(record.fold), "reason": reason})
            continue
        for split in ptbxl.destinations(record, truth):
            writers[split].append(ptbxl.table_row(record), filtered, r_peaks, truth.get(ecg_id))
    source = records.attrs["source"]
    return {"source": source, "audit": ptbxl.audit_labels(records, outcome), "lost": lost,
            "arrays": {split: writer.finish() for split, writer in writers.items()},
            **({"benchmark": source | {"records_in_truth": len(truth)}} if truth else {})}


def write_ludb(staging: Staging, paths: dict, missing: int, workers: int) -> tuple:
    """Stage the benchmark of LUDB's records; returns what the manifest says of the data set, and of the array.

    paths: {number: path without extension} of the records that are present; missing: how many are not.
    """
    writer, audit, lost = SplitWriter(staging, "benchmark"), ludb.Audit(len(paths) + missing, missing), []
    tasks = [(number, path, ludb.SAMPLING_RATE) for number, path in paths.items()]
    for number, filtered, r_peaks, reason in prepare_all(prepare_record, tasks, workers):
        try:
            if reason:
                raise signals.RecordError(reason)
            comments, phases = ludb.read_comments(paths[number]), ludb.read_phases(paths[number])
            diagnoses = ludb.diagnoses_in(comments)
        except signals.RecordError as error:
            lost.append({"ecg_id": number, "reason": str(error)})
            continue
        labels = ludb.mark(phases, diagnoses)
        writer.append({"ecg_id": number, "patient_id": "", **ludb.person_in(comments),
                       "label": int((labels == 1).any()), "diagnoses": ludb.join_diagnoses(diagnoses)},
                      filtered, r_peaks, labels, phases)
        audit.add(phases, diagnoses, labels, r_peaks["heartpy"])
    if len(lost) == len(paths):
        raise UserError(f"no record of LUDB can be used (record {lost[0]['ecg_id']}: {lost[0]['reason']}); download it "
                        "again")
    audit.summary["lost"] = len(lost)
    return {"audit": audit.summary, "lost": lost}, writer.finish()


def write_lesions(staging: Staging, data_path: Path, splits: dict, limit: int | None, workers: int) -> dict:
    """Stage the lesions of the normals of these splits; returns the manifest's entries. splits: {split: its lesions'}.

    limit: only so many normals of each.
    """
    entries = {}
    for split, name in splits.items():
        records = arrays.open_records(data_path, split, len(signals.LEAD_NAMES))
        r_peaks = arrays.load_r_peaks(data_path, split, records, "slope")
        table = arrays.load_table(data_path, split, records) or {"ecg_id": np.arange(len(records))}
        normals = np.flatnonzero(arrays.open_labels(data_path, split, (len(records),)) == 0)[:limit]
        path = arrays.signal_path(data_path, split)
        tasks = [(path, row, int(table["ecg_id"][row]), r_peaks[row]) for row in normals]
        writer, kinds = SplitWriter(staging, name), Counter()
        for row, rows in zip(normals, prepare_all(implant_record, tasks, workers), strict=True):
            person = {column: table[column][row] for column in ("ecg_id", "patient_id", "age", "sex", "fold")
                      if column in table}
            for one, peaks in rows:
                writer.append({**person, "label": int(one.kind != "none"), "kind": one.kind,
                               "description": one.description}, one.signal, peaks, one.truth, one.phases)
                kinds[one.kind] += 1
        entries[name] = {**writer.finish(), "made_of": arrays.fingerprint(records.signals), "normals": len(normals),
                         "refused": len(normals) - kinds["none"], "kinds": {kind: kinds[kind] for kind in KINDS}}
    return {"arrays": entries}


def surviving(old: dict, data_path: Path, splits: list) -> dict:
    """What stays of a manifest when these splits are written: what it says of other arrays that are still its own."""
    manifest = {} if "train" in splits else {name: old[name] for name in old if name != "benchmark"}
    manifest["arrays"] = {split: entry for split, entry in old.get("arrays", {}).items()
                          if split not in splits and is_ours(arrays.signal_path(data_path, split), split, [old])}
    if "benchmark" in manifest["arrays"]:               # a manifest of PTB-XL alone describes it by its source
        manifest["benchmark"] = old.get("benchmark", old.get("source"))
    return manifest


def write_all(data_path: Path, manifest: dict, write) -> dict:
    """Let write(Staging) make new files in the data folder; returns the whole new manifest, which is put beside them.

    manifest: of surviving; write: returns the new entries.
    """
    staging = None
    try:
        staging = Staging(data_path)
        entries = write(staging)
        manifest = manifest | entries | {"arrays": entries["arrays"] | manifest["arrays"]}
        staging.publish(manifest)
    except OSError as error:
        raise unwritable(f"{data_path} given as --data_path", error) from error
    finally:
        if staging:
            staging.discard()
    return manifest


def open_ludb(ludb_path: Path, limit: int | None, allow_missing: bool) -> tuple:
    """({number: path} of LUDB's records that are present, how many are not, the manifest's entry). Raises UserError."""
    listed = ludb.list_records(ludb_path)
    chosen = dict(list(listed.items())[:limit])
    present = ludb.present_records(chosen, ludb_path, allow_missing)
    return present, len(chosen) - len(present), ludb.source_of(listed)


def print_manifest(manifest: dict, splits: list, records_in_truth: int):
    """Print the audits of the splits that were written, and the arrays."""
    if "train" in splits:
        ptbxl.print_audit(manifest["audit"], manifest["lost"])
    if "benchmark" in splits and not records_in_truth:
        ludb.print_audit(manifest["benchmark"]["audit"], manifest["benchmark"]["lost"])
    print("\narrays")
    for split, entry in manifest["arrays"].items():
        print(f"  {arrays.SIGNAL_FILES[split]:<20}{tuple(entry['shape'])}")
        if split in splits and "kinds" in entry:
            print(f"    of {entry['normals']} normals, {entry['refused']} of them refused (irregular, or waves not "
                  "found): " + ", ".join(f"{kind} {count}" for kind, count in entry["kinds"].items()))
    if records_in_truth:
        print(f"{manifest['arrays']['benchmark']['shape'][0]} of the {records_in_truth} records in --benchmark_truth "
              "are in the benchmark: those of fold 10 with a superclass")


def data_sets_writer(arguments: argparse.Namespace, ptbxl_path, ludb_path, truth: dict, about: dict):
    """A function that stages the arrays of the data sets and returns the manifest's entries, for write_all.

    The folders are checked before it is returned. truth: of load_marked_points; about: facts of this run.
    """
    rate, workers = arguments.sampling_rate, arguments.workers
    if ludb_path:
        of_ludb, missing, ludb_source = open_ludb(Path(ludb_path), arguments.limit, arguments.allow_missing)
    if ptbxl_path:
        records = ptbxl.load_ptbxl(Path(ptbxl_path), rate, arguments.limit)
        ptbxl.require_files(records, Path(ptbxl_path), arguments.allow_missing)

    def write(staging):
        entries = {"arrays": {}}
        if ptbxl_path:
            entries = write_ptbxl(staging, records, truth, rate, workers) | about | {"sampling_rate_read": rate}
        if ludb_path:
            of_data_set, of_array = write_ludb(staging, of_ludb, missing, workers)
            entries["benchmark"] = ludb_source | of_data_set | about
            entries["arrays"]["benchmark"] = of_array
        return entries
    return write


def main():
    commit, arguments = git_commit(), parse_arguments()
    data_path, rate, workers = Path(arguments.data_path), arguments.sampling_rate, arguments.workers
    ptbxl_path, ludb_path = arguments.ptbxl_path or arguments.download, arguments.ludb_path or arguments.download_ludb
    mitdb_path = arguments.mitdb_path or arguments.download_mitdb
    if not (ptbxl_path or ludb_path or mitdb_path or arguments.lesions):
        raise UserError("no data set is named; give --ptbxl_path, --ludb_path or --mitdb_path, --download, or "
                        "--lesions 1")
    if arguments.benchmark_truth and (ludb_path or not ptbxl_path):
        raise UserError("--benchmark_truth makes the benchmark from PTB-XL; give it with --ptbxl_path and without "
                        "--ludb_path")
    lesions = {split: name for split, name in arrays.LESIONS_OF.items() if arguments.lesions and (
        ptbxl_path or arrays.signal_path(data_path, split).exists())}
    if arguments.lesions and not lesions:
        raise UserError(f"{data_path} given as --data_path holds neither val.npy nor test.npy, whose normals "
                        "--lesions 1 needs; make them with --ptbxl_path, or name another folder")
    splits = ["train", "val", "test"] * bool(ptbxl_path) + ["benchmark"] * bool(ludb_path or arguments.benchmark_truth)
    require_writable(data_path)
    require_replaceable(data_path, [*splits, *lesions.values()])
    about = {"parameters": {
        "sampling_rate": signals.SAMPLING_RATE, "pass_band_hz": list(signals.PASS_BAND),
        "filter_order": signals.FILTER_ORDER, "leads": list(signals.LEAD_NAMES), "limit": arguments.limit,
        "allow_missing": arguments.allow_missing},
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "commit": commit}

    def publish(names, write):
        manifest = surviving(arrays.load_manifest(data_path) or {}, data_path, names)
        return write_all(data_path, manifest, write)
    manifest, truth = {}, load_marked_points(arguments.benchmark_truth)
    for name in ("download", "download_ludb", "download_mitdb"):
        if folder := getattr(arguments, name):
            download.fetch(name, Path(folder), rate, arguments.base_url, arguments.connections)
    if mitdb_path:
        mitbih.write(mitdb_path, data_path, arguments.limit)
    if splits:
        manifest = publish(splits, data_sets_writer(arguments, ptbxl_path, ludb_path, truth, about))
    if lesions:
        manifest = publish(list(lesions.values()), lambda staging: {**write_lesions(
            staging, data_path, lesions, arguments.limit, workers), "lesions": about})
    if manifest:
        print_manifest(manifest, [*splits, *lesions.values()], len(truth))
    if "train" in splits:
        print(f"\nnext: python test.py --data_path {data_path} (scores ckpt/mymodel.pt), or python train.py --help")


if __name__ == "__main__":
    run(main)
