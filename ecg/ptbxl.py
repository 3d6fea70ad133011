"""PTB-XL's tables: which records there are, their folds and labels, the splits they go to, and the label audit."""
import ast
from collections import Counter
from pathlib import Path

import pandas as pd

from ecg.arrays import OLDEST, SIMULATED_MARKER, TEST_FOLD, VALIDATION_FOLD
from utils import UserError

FILE_COLUMN = {100: "filename_lr", 500: "filename_hr"}
VERSIONS = {21837: "1.0.1", 21799: "1.0.3"}            # by number of records
AUDIT_COLUMNS = ("normal", "abnormal", "mixed", "unlabelled", "missing", "lost", "no R peak")


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
    """PTB-XL's records: index ecg_id; columns fold, file (without extension), statements, superclasses, kind,
    patient_id, age, sex.

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
    records.attrs["records_in_table"] = len(table)
    return records.set_index("ecg_id")


def person_in(row: dict) -> tuple:
    """(patient_id, age, sex) of a row of the table, as arrays.load_table has them; "" where unknown."""
    patient, age, sex = (pd.to_numeric(row.get(name), errors="coerce") for name in ("patient_id", "age", "sex"))
    return ("" if pd.isna(patient) else f"{patient:.0f}", "" if pd.isna(age) else int(min(age, OLDEST)),
            {0: "M", 1: "F"}.get(sex, ""))


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


def source_of(ptbxl_path: Path, records: pd.DataFrame) -> dict:
    """What the manifest says of the folder."""
    in_table = records.attrs["records_in_table"]
    return {"data_set": "simulated" if (ptbxl_path / SIMULATED_MARKER).exists() else "PTB-XL",
            "records_in_table": in_table, "version": VERSIONS.get(in_table, "unknown")}


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


def print_audit(counts: dict, lost: list):
    """Print the label audit and the lost records by name."""
    titles = {"train": "train, folds 1-8", "val": "val, fold 9", "test": "test, fold 10", "all": "all"}
    print("\nlabel audit" + " " * 9 + "".join(f"{column:>12}" for column in AUDIT_COLUMNS))
    for split, row in counts.items():
        print(f"{titles[split]:<20}" + "".join(f"{row[column]:>12,}" for column in AUDIT_COLUMNS))
    print("normal: the superclasses are exactly {NORM}; mixed (NORM and another) are scored as abnormal; unlabelled "
          "have no superclass\nand are left out; abnormal records of folds 1-8 are not read. Missing (no file), lost "
          "(unusable) and without an R peak\n(kept) are counted among the first four.")
    for loss in lost:
        print(f"lost: record {loss['ecg_id']} ({loss['split']}): {loss['reason']}")
