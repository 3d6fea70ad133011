"""PTB-XL's tables: which records there are, their folds and labels, the splits they go to, and the label audit."""
import ast
from pathlib import Path

import pandas as pd

from ecg.arrays import OLDEST, SIMULATED_MARKER, TEST_FOLD, VALIDATION_FOLD
from ecg.r_peaks import disagree
from utils import UserError

FILE_COLUMN = {100: "filename_lr", 500: "filename_hr"}
VERSIONS = {21837: "1.0.1", 21799: "1.0.3"}            # by number of records
AUDIT_COLUMNS = ("normal", "abnormal", "mixed", "unlabelled", "missing", "lost", "no R peak",
                 "unsure")


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
    superclass_of = dict(zip(diagnostic.iloc[:, 0], diagnostic["diagnostic_class"]))
    without = [code for code, superclass in superclass_of.items() if not isinstance(superclass, str)]
    if without or not superclass_of:
        raise UserError(f"{path} names no diagnostic_class for {', '.join(map(str, without)) or 'any statement'}; "
                        "download it again")
    return superclass_of


def load_ptbxl(ptbxl_path: Path, sampling_rate: int, limit: int | None) -> pd.DataFrame:
    """PTB-XL's records: index ecg_id; columns fold, statements, superclasses, kind, patient_id, age, sex, and file and
    path (without extension) with present, whether both of a record's files are there. attrs["source"]: of the manifest.

    The superclasses of a record are the sorted set of diagnostic_class over its diagnostic statements.
    """
    if ptbxl_path.is_file():
        raise UserError(f"{ptbxl_path} given as --ptbxl_path is a file; name its folder, {ptbxl_path.parent}")
    table_path = ptbxl_path / "ptbxl_database.csv"
    table = read_table(table_path, {"ecg_id", "scp_codes", "strat_fold", FILE_COLUMN[sampling_rate]})
    diagnostic_class = load_superclasses(ptbxl_path / "scp_statements.csv")
    rows = []
    for row in table.sort_values("ecg_id").iloc[:limit].to_dict("records"):
        try:
            ecg_id, fold = int(row["ecg_id"]), int(row["strat_fold"])
            codes = tuple(ast.literal_eval(row["scp_codes"]).keys())
            if not 1 <= fold <= TEST_FOLD or not all(isinstance(code, str) for code in codes):
                raise ValueError(f"fold {fold}, statements {codes}")
        except (ValueError, SyntaxError, TypeError, AttributeError, ArithmeticError, MemoryError, RecursionError
                ) as error:         # literal_eval raises the last two on deep nesting
            raise UserError(f"{table_path}: record {row['ecg_id']} has an unreadable ecg_id, scp_codes or strat_fold; "
                            "download it again") from error
        superclasses = tuple(sorted({diagnostic_class[code] for code in codes if code in diagnostic_class}))
        rows.append((ecg_id, fold, str(row[FILE_COLUMN[sampling_rate]]), codes, superclasses, classify(superclasses),
                     *person_in(row)))
    records = pd.DataFrame(rows, columns=["ecg_id", "fold", "file", "statements", "superclasses", "kind",
                                          "patient_id", "age", "sex"])
    if not len(records) or records["ecg_id"].duplicated().any():
        raise UserError(f"{table_path} holds no record, or an ecg_id twice; download it again")
    records["path"] = [ptbxl_path / file for file in records["file"]]
    records["present"] = [all(Path(f"{path}{end}").is_file() for end in (".hea", ".dat")) for path in records["path"]]
    records.attrs["source"] = {
        "data_set": "simulated" if (ptbxl_path / SIMULATED_MARKER).exists() else "PTB-XL",
        "records_in_table": len(table), "version": VERSIONS.get(len(table), "unknown")}
    return records.set_index("ecg_id")


def person_in(row: dict) -> tuple:
    """(patient_id, age, sex) of a row of the table, as arrays.load_table has them; "" where unknown."""
    patient, age, sex = (pd.to_numeric(row.get(name), errors="coerce") for name in ("patient_id", "age", "sex"))
    return ("" if pd.isna(patient) else f"{patient:.0f}", "" if pd.isna(age) else int(min(age, OLDEST)),
            {0: "M", 1: "F"}.get(sex, ""))


def split_of(fold: int) -> str:
    """The split that a fold is held for. Fold 9's normals are in train.npy as well, for the paper protocol."""
    return {VALIDATION_FOLD: "val", TEST_FOLD: "test"}.get(fold, "train")


def require_files(records: pd.DataFrame, ptbxl_path: Path, allow_missing: bool):
    """Raise UserError for a partial download, unless it is allowed; and for one without a single file in any case."""
    absent = records.loc[~records["present"], "file"]
    if not len(absent) or (allow_missing and records["present"].any()):
        return
    remedy = "complete the download" if allow_missing else "complete the download, or go on with --allow_missing"
    raise UserError(f"{len(absent)} of the {len(records)} records that the table names are not in {ptbxl_path} "
                    f"(first: {', '.join(absent[:3])}); {remedy}, or choose the other --sampling_rate")


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


def table_row(record) -> dict:
    """What the tables of records say of one of load_ptbxl's rows (a named tuple)."""
    return {"ecg_id": record.Index, "patient_id": record.patient_id, "age": record.age, "sex": record.sex,
            "fold": record.fold, "label": int(record.kind != "normal"),
            "superclasses": " ".join(record.superclasses), "statements": " ".join(record.statements)}


def audit_labels(records: pd.DataFrame, outcome: dict) -> dict:
    """Count, per split and for all, what became of the records: {split: {column of AUDIT_COLUMNS: count}}.

    outcome: {ecg_id: (reason why it is lost or "", {detector: number of R peaks})} of the records that were read.
    Normal, abnormal, mixed and unlabelled divide the records of the table.
    """
    counts = {split: dict.fromkeys(AUDIT_COLUMNS, 0) for split in ("train", "val", "test", "all")}
    for record in records.itertuples():
        reason, beats = outcome.get(record.Index, ("", {}))
        columns = {record.kind: True, "missing": not record.present, "lost": bool(reason),
                   "no R peak": beats.get("heartpy") == 0, "unsure": disagree(**beats) if beats else False}
        for split in (split_of(record.fold), "all"):
            for column, applies in columns.items():
                counts[split][column] += applies
    return counts


def print_audit(counts: dict, lost: list):
    """Print the label audit and the lost records by name."""
    titles = {"train": "train, folds 1-8", "val": "val, fold 9", "test": "test, fold 10", "all": "all"}
    print("\nlabel audit" + " " * 9 + "".join(f"{column:>12}" for column in AUDIT_COLUMNS))
    for split, row in counts.items():
        print(f"{titles[split]:<20}" + "".join(f"{row[column]:>12,}" for column in AUDIT_COLUMNS))
    print("normal: the superclasses are exactly {NORM}; mixed (NORM and another) are scored as abnormal; unlabelled "
          "have no superclass\nand are left out; abnormal records of folds 1-8 are not read. The others are counted "
          "among the first four: missing (no file),\nlost (unusable), no R peak (HeartPy finds none; kept), unsure "
          "(HeartPy, which paper uses, and the slope of all leads differ\nby more than a quarter in the number of "
          "beats; kept).")
    for loss in lost:
        print(f"lost: record {loss['ecg_id']} ({loss['split']}): {loss['reason']}")
