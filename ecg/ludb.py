"""An open localization benchmark from LUDB: cardiologists' wave boundaries, and rules that turn diagnoses into points.

LUDB 1.0.1 (Kalyakulina et al. 2020, IEEE Access 8:186181; PhysioNet) holds 200 twelve-lead ECGs of 10 s at 500 Hz.
Cardiologists marked onset and offset of every P, QRS and T in every lead, and wrote diagnoses, many of them by wall.
Neither says which points are abnormal: RULES does, a row an abnormality, each with its reason. A point that no wave
and no gap between two waves holds has no truth and is arrays.EXCLUDED, and so is what UNPLACED leaves open.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg.arrays import EXCLUDED, OLDEST
from ecg.signals import LEAD_NAMES, RECORD_LENGTH, RecordError
from utils import UserError

SAMPLING_RATE = 500                                             # Hz, of the files
VERSIONS = {200: "1.0.0 or 1.0.1"}                              # by number of records, which these share
PHASES = ("P", "PQ", "QRS", "ST", "T", "TP")                    # a beat; its code is 1 + the index
WAVES = {"p": "P", "N": "QRS", "t": "T"}                        # as the annotation files write them
GAPS = {("P", "QRS"): "PQ", ("QRS", "T"): "ST", ("T", "P"): "TP", ("T", "QRS"): "TP"}      # between two waves
HEADING = "<diagnoses>:"                                        # the header's comments after it are the diagnoses
# The leads that look at each wall, by the usual convention; neighbouring walls share leads.
WALLS = {"inferior": ("II", "III", "aVF"), "septal": ("V1", "V2"), "anterior": ("V2", "V3", "V4"),
         "apical": ("V4", "V5"), "lateral": ("I", "aVL", "V5", "V6"), "posterior": ("V1", "V2", "V3")}
BY_WALL = ()                                                    # a rule's leads: those of the wall that is named


@dataclass(frozen=True)
class Rule:
    """What one kind of abnormality marks."""
    key: str                # its name in reports
    title: str
    lines: tuple            # diagnoses as LUDB writes them, less the full stop; with BY_WALL what precedes ": septal"
    phases: tuple
    leads: tuple
    reason: str             # why these points, and who says so


# Surawicz 2009: AHA/ACCF/HRS recommendations, part III, J Am Coll Cardiol 53:976. Rautaharju 2009: part IV, 53:982.
# Hancock 2009: part V, 53:992. Wagner 2009: part VI, 53:1003. Thygesen 2018: fourth universal definition of myocardial
# infarction, J Am Coll Cardiol 72:2231. January 2014: AHA/ACC/HRS guideline on atrial fibrillation, 64:e1.
# Kusumoto 2019: ACC/AHA/HRS guideline on bradycardia and conduction delay, 74:e51.
RULES = (
    Rule("bundle_branch_block", "complete bundle branch block, ventricular pacing",
         ("Complete right bundle branch block", "Complete left bundle branch block", "UNIpolar ventricular pacing",
          "BIpolar ventricular pacing", "Biventricular pacing"), ("QRS", "ST", "T"), LEAD_NAMES,
         "The ventricles are excited in another order, QRS takes 120 ms or more (Surawicz 2009), and they recover in "
         "another order too: ST and T are abnormal secondarily (Rautaharju 2009)."),
    Rule("conduction_delay", "incomplete bundle branch block, hemiblock, conduction delay",
         ("Incomplete right bundle branch block", "Incomplete left bundle branch block", "Left anterior hemiblock",
          "Non-specific intravintricular conduction delay"), ("QRS",), LEAD_NAMES,
         "Defined by duration, axis and shape of QRS alone (Surawicz 2009)."),
    Rule("ventricular_hypertrophy", "ventricular hypertrophy",
         ("Left ventricular hypertrophy", "Right ventricular hypertrophy"), ("QRS",), LEAD_NAMES,
         "Its criteria are QRS voltages, axis and duration, in limb and chest leads (Hancock 2009)."),
    Rule("ventricular_overload", "left ventricular overload (strain)", ("Left ventricular overload",), ("ST", "T"),
         WALLS["lateral"], "ST depression and T inversion in the leads that look at the left ventricle: I, aVL, V5, V6 "
         "(Hancock 2009)."),
    Rule("atrial_enlargement", "atrial hypertrophy or overload",
         ("Left atrial hypertrophy", "Right atrial hypertrophy", "Left atrial overload", "Right atrial overload"),
         ("P",), LEAD_NAMES,
         "An atrial abnormality is a diagnosis of P: its duration, notching and amplitude (Hancock 2009)."),
    Rule("atrial_fibrillation", "atrial fibrillation or flutter",
         ("Rhythm: Atrial fibrillation", "Rhythm: Atrial flutter, typical"), ("TP", "P", "PQ"), LEAD_NAMES,
         "No P waves but fibrillation or flutter waves, seen from the end of T to the next QRS (January 2014)."),
    Rule("av_block", "first-degree AV block", ("I degree AV block",), ("P", "PQ"), LEAD_NAMES,
         "The time from the onset of P to the onset of QRS is more than 200 ms (Kusumoto 2019)."),
    Rule("ischemia", "ST elevation infarction, NSTEMI, ischemia", ("STEMI", "Ischemia",
         "Undefined ischemia/scar/supp.NSTEMI"), ("ST", "T"), BY_WALL, "Acute ischemia shows in ST and T of the leads "
         "that look at the wall (Wagner 2009), with or without ST elevation (Thygesen 2018)."),
    Rule("scar", "scar", ("Scar formation",), ("QRS",), BY_WALL,
         "A past infarction shows in QRS of the leads that look at the wall: Q or QS, or in V1 and V2 a tall R "
         "where it is the posterior one (Thygesen 2018)."),
    Rule("repolarization", "non-specific repolarization abnormality", ("Non-specific repolarization abnormalities",),
         ("T",), BY_WALL, "A flat, low or inverted T wave without the signs of a cause (Rautaharju 2009)."),
)
# Abnormalities that LUDB does not place: it does not say which beats, or what is wrong is a beat that is absent. What
# no rule marks in such a record may be abnormal, so it has no truth.
UNPLACED = ("Ventricular extrasystole", "Atrial extrasystole", "Aberrant conduction", "UNIpolar atrial pacing",
            "P-synchrony", "Wandering atrial pacemaker", "III degree AV-block", "Sinoatrial blockade")
# Nothing is marked for early repolarization, mostly a variant of the normal (Rautaharju 2009), for sinus rhythms of any
# rate, and for the axis, which is no abnormality of a wave.


def leads_of(rule: Rule, diagnosis: str) -> tuple:
    """The names of the leads in which a rule marks points for a diagnosis; none where it does not apply."""
    text = diagnosis.strip().rstrip(".")
    if rule.leads != BY_WALL:
        return rule.leads if text in rule.lines else ()
    name, _, wall = text.rpartition(": ")
    return WALLS.get(wall.removesuffix(" wall"), ()) if name in rule.lines else ()


def rules_of(diagnoses) -> list:
    """The rules that mark points for these diagnoses, in the order of RULES."""
    return [rule for rule in RULES if any(leads_of(rule, diagnosis) for diagnosis in diagnoses)]


def rule_marks(rule: Rule, phases: np.ndarray, diagnoses) -> np.ndarray:
    """Which points a rule marks: bool of the shape of phases, (samples, 12)."""
    leads = {lead for diagnosis in diagnoses for lead in leads_of(rule, diagnosis)}
    codes = [1 + PHASES.index(phase) for phase in rule.phases]
    return np.isin(phases, codes) & [lead in leads for lead in LEAD_NAMES]


def mark(phases: np.ndarray, diagnoses) -> np.ndarray:
    """The labels of a record: uint8 of the shape of phases, (samples, 12).

    1 where a rule marks the point, else EXCLUDED where it has no phase or a diagnosis is UNPLACED, else 0.
    """
    unplaced = any(diagnosis.startswith(UNPLACED) for diagnosis in diagnoses)
    labels = np.where((phases == 0) | unplaced, EXCLUDED, 0).astype(np.uint8)
    for rule in rules_of(diagnoses):
        labels[rule_marks(rule, phases, diagnoses)] = 1
    return labels


def join_diagnoses(diagnoses) -> str:
    """Diagnoses as benchmark_records.csv holds them."""
    return "; ".join(diagnoses)


def split_diagnoses(text: str) -> tuple:
    """The diagnoses of an entry of benchmark_records.csv."""
    return tuple(text.split("; ")) if text else ()


def delineate(samples, symbols, length: int = RECORD_LENGTH) -> np.ndarray:
    """The phase of each sample of a lead, uint8 (length,), from its annotations in the order of time.

    A wave is "(", one of WAVES, ")", onset and offset belonging to it; what is incomplete is no wave. A gap has a phase
    where GAPS has one for the waves around it and no annotation stands in it.
    """
    phases = np.zeros(length, dtype=np.uint8)
    before = None                                               # (index of its first annotation, name, offset)
    for first in range(len(symbols) - 2):
        opening, symbol, closing = symbols[first:first + 3]
        if opening != "(" or symbol not in WAVES or closing != ")":
            continue
        wave, onset, offset = WAVES[symbol], samples[first], samples[first + 2]
        phases[onset:offset + 1] = 1 + PHASES.index(wave)
        if before and before[0] + 3 == first and (before[1], wave) in GAPS:
            phases[before[2] + 1:onset] = 1 + PHASES.index(GAPS[before[1], wave])
        before = (first, wave, offset)
    return phases


def read_phases(path) -> np.ndarray:
    """The phase of every point of a record (path without extension), uint8 (5000, 12).

    Raises RecordError where the annotation of a lead cannot be read.
    """
    import wfdb
    leads = []
    for lead in LEAD_NAMES:
        try:
            annotation = wfdb.rdann(str(path), lead.lower())
            samples = np.asarray(annotation.sample)
            if len(samples) and (samples[0] < 0 or samples[-1] >= RECORD_LENGTH or (np.diff(samples) < 0).any()):
                raise ValueError("samples out of range or order")
        except Exception as error:      # wfdb raises whatever its parser trips over; each means an unreadable file
            raise RecordError(f"unreadable annotation of lead {lead} ({type(error).__name__})") from error
        leads.append(delineate(samples, annotation.symbol))
    return np.stack(leads, axis=1)


def read_comments(path) -> list:
    """The comments in a record's header (path without extension). Raises RecordError."""
    import wfdb
    try:
        return [comment.strip() for comment in wfdb.rdheader(str(path)).comments]
    except Exception as error:          # as above
        raise RecordError(f"its header is unreadable ({type(error).__name__})") from error


def diagnoses_in(comments: list) -> tuple:
    """The diagnoses among a header's comments. Raises RecordError."""
    if HEADING not in comments:
        raise RecordError("no diagnoses in its header")
    return tuple(filter(None, comments[comments.index(HEADING) + 1:]))


def person_in(comments: list) -> dict:
    """Age and sex among a header's comments, as load_table has them; "" where unknown. LUDB names no patients."""
    said = dict(comment.partition(": ")[::2] for comment in comments)
    age, sex = said.get("<age>", "").strip().lstrip(">"), said.get("<sex>", "").strip().upper()
    return {"age": min(int(age), OLDEST) if age.isdigit() else "", "sex": sex if sex in ("F", "M") else ""}


def source_of(paths: dict) -> dict:
    """What the manifest says of the data set, from what list_records found."""
    return {"data_set": "LUDB", "records_in_table": len(paths), "version": VERSIONS.get(len(paths), "unknown")}


def list_records(ludb_path: Path) -> dict:
    """LUDB's records, number to path without extension, in the order of RECORDS. Raises UserError."""
    try:
        names = (ludb_path / "RECORDS").read_text().split()
        paths = {int(Path(name).name): ludb_path / name for name in names}
    except FileNotFoundError:
        raise UserError(f"{ludb_path / 'RECORDS'} is missing; --ludb_path must name LUDB's folder as PhysioNet lays it "
                        "out") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{ludb_path / 'RECORDS'} does not list LUDB's records; download it again") from error
    if not names or len(paths) < len(names):
        raise UserError(f"{ludb_path / 'RECORDS'} lists no record, or a record twice; download it again")
    return paths


def present_records(paths: dict, ludb_path: Path, allow_missing: bool) -> dict:
    """Those of the records whose signals are there. Raises UserError for a partial download, unless it is allowed."""
    present = {number: path for number, path in paths.items()
               if all(path.with_name(path.name + end).is_file() for end in (".hea", ".dat"))}
    absent = [str(path.relative_to(ludb_path)) for number, path in paths.items() if number not in present]
    if absent and not (allow_missing and present):
        remedy = "complete the download" if allow_missing else "complete the download, or go on with --allow_missing"
        raise UserError(f"{len(absent)} of the {len(paths)} records that RECORDS names are not in {ludb_path} (first: "
                        f"{', '.join(absent[:3])}); {remedy}")
    return present


class Audit:
    """Counts what the labels of the records are made of. summary is what the manifest keeps."""

    def __init__(self, records: int, missing: int):
        by_phase = {phase: {"points": 0, "marked": 0} for phase in PHASES}
        self.summary = {"records": records, "missing": missing, "lost": 0, "no R peak": 0, "with marks": 0,
                        "points": 0, "annotated": 0, "scored": 0, "marked": 0, "phases": by_phase,
                        "rules": {rule.key: {"records": 0, "points": 0} for rule in RULES}, "unplaced": {}}
        self.unplaced = Counter()

    def add(self, phases: np.ndarray, diagnoses: tuple, labels: np.ndarray, r_peaks: np.ndarray):
        """Count a record in. phases and labels: (5000, 12), the labels by mark()."""
        marked = labels == 1
        counts = {"no R peak": not len(r_peaks), "with marks": marked.any(), "points": phases.size,
                  "annotated": np.count_nonzero(phases), "scored": np.count_nonzero(labels != EXCLUDED),
                  "marked": np.count_nonzero(marked)}
        for name, count in counts.items():
            self.summary[name] += int(count)
        for code, of_phase in enumerate(self.summary["phases"].values(), 1):
            of_phase["points"] += int(np.count_nonzero(phases == code))
            of_phase["marked"] += int(np.count_nonzero(marked & (phases == code)))
        for rule in rules_of(diagnoses):
            of_rule = self.summary["rules"][rule.key]
            of_rule["records"] += 1
            of_rule["points"] += int(np.count_nonzero(rule_marks(rule, phases, diagnoses)))
        self.unplaced.update(diagnosis for diagnosis in diagnoses if not rules_of([diagnosis]))
        self.summary["unplaced"] = dict(self.unplaced.most_common())


def print_audit(audit: dict, lost: list):
    """Print what the benchmark is made of: an Audit's summary, and the lost records by name."""
    written = audit["records"] - audit["missing"] - audit["lost"]
    annotated = max(audit["annotated"], 1)
    print(f"\nLUDB: {audit['records']} records, {audit['missing']} missing, {audit['lost']} lost; {written} in the "
          f"benchmark, {audit['with marks']} of them with marked points, {audit['no R peak']} without an R peak")
    print(f"points: {audit['annotated']:,} of {audit['points']:,} annotated, {audit['scored']:,} of these with a "
          f"truth, {audit['marked']:,} of these marked; the others are excluded")
    for phase, count in audit["phases"].items():
        print(f"  {phase:<58}{count['points']:>10,} points{count['marked'] / max(count['points'], 1):>8.1%} marked")
    titles = {rule.key: rule.title for rule in RULES}
    for key, count in audit["rules"].items():
        print(f"  {titles[key]:<58}{count['records']:>4} records{count['points'] / annotated:>8.1%} of the annotated")
    print("diagnoses that mark nothing: "
          + "; ".join(f"{diagnosis} {count}" for diagnosis, count in audit["unplaced"].items()))
    for loss in lost:
        print(f"lost: record {loss['ecg_id']} (benchmark): {loss['reason']}")
