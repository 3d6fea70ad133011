"""Test the diagnosis: by group of statements, on fold 10 and on folds 9 and 10; or diagnose a recording of one's own.

    python -m diagnosis.test --load_path runs/ad.pt runs/random.pt --output_dir results/diagnosis
    python -m diagnosis.test --load_path ckpt/diagnosis.pt --record my.csv --record_rate 500 --record_unit mV

results.json: `groups` -> rare, uncommon, common, all -> fold10, folds9and10 -> auroc, average_precision, sensitivity,
specificity -> value, low, high, of the first checkpoint; `checkpoints` has all of them, `rivals` what names the
statements without a network (diagnosis/rival.py); `differences`: each pair of checkpoints, the later minus the earlier,
and each checkpoint minus each rival. Sensitivity and specificity are at the thresholds of fold 9 (Youden), so on folds
9 and 10 they are optimistic. Not for clinical use.
"""
import argparse
import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from dataloader import valid_beats
from diagnosis.arrays import GROUPS, Statements, folds_named, load_statements
from diagnosis.calibration import calibrate, probabilities
from diagnosis.features import Encoder, logits_of
from diagnosis.measures import ALL, MEASURES, by_group, measure_statement, subtract
from diagnosis.model import load_diagnoser
from diagnosis.rival import MEASUREMENTS, PEOPLE, diagnose_without_network
from ecg.arrays import VALIDATION_FOLD, Records
from ecg.recording_files import open_recording, windows_of
from ecg.signals import SAMPLING_RATE, RecordError
from evaluation.charts import SERIES
from evaluation.figures import PAGE_MM, new_figure, pack, styled
from evaluation.files import require_ours, write_report
from evaluation.metrics import Resamples
from evaluation.recordings import add_flags, prepare_window
from evaluation.report import percent
from utils import UserError, choose_device, git_commit, pack_csv, require_writable, run, sha256_of, versions

TABLE, FIGURE = "statements.csv", "long_tail"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data/", help="folder of the arrays (default %(default)s)")
    parser.add_argument("--load_path", nargs="+", default=["./ckpt/diagnosis.pt"], help="checkpoints of "
                        "diagnosis.train (default %(default)s)")
    parser.add_argument("--output_dir", default="./results/diagnosis/", help="of the report (default %(default)s)")
    parser.add_argument("--record", nargs="+", default=[], metavar="FILE", help="diagnose these recordings (WFDB or "
                        ".csv) instead, with the first checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add_flags(parser)
    return parser.parse_args()


def names_of(paths: list) -> list:
    """A short name of each checkpoint, for tables. Raises UserError where two are the same, or one is a rival's."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{Path(path).parent.name}/{Path(path).stem}" for path in paths]
    if len({*names, MEASUREMENTS, PEOPLE}) < len(names) + 2:
        raise UserError("two of --load_path have one name, or one has that of a rival; rename it, the report calls "
                        "checkpoints by their names")
    return names


def require_same_statements(path, facts: dict, statements: Statements):
    """Raise UserError where a checkpoint's statements or thresholds are not those of the arrays."""
    if "calibration" not in facts:
        raise UserError(f"{path} has no thresholds of fold 9, as its training has not ended; continue it with --resume")
    if [one["code"] for one in facts["statements"]] != statements.codes:
        raise UserError(f"{path} was trained on other statements than {statements.records.name} has; make the arrays "
                        "with python -m diagnosis.prepare, or train it again")


def measure_all(statements: Statements, logits: np.ndarray, rows: np.ndarray, thresholds: list) -> dict:
    """{folds: [measures of each statement]}. logits: (rows, classes); rows: of folds 9 and 10."""
    measured = {}
    for name, folds in folds_named().items():
        chosen = np.isin(statements.table["fold"][rows], folds)
        labels, scores = statements.labels[rows][chosen], logits[chosen]
        resamples = Resamples(statements.table["patient_id"][rows][chosen])
        measured[name] = [measure_statement(labels[:, column], scores[:, column].astype(np.float64), threshold,
                                            resamples)
                          for column, threshold in enumerate(tqdm(thresholds, desc=name, leave=False))]
    return measured


def count_named(labels: np.ndarray, logits: np.ndarray, thresholds: list) -> dict:
    """How --record does on these records: statements named of a record, and how many of the named ones are right.

    labels, logits: (N, classes); thresholds: None for a statement that is never named.
    """
    named = logits >= np.array([np.inf if threshold is None else threshold for threshold in thresholds])
    right = (named & (labels == 1)).sum()
    return {"named_a_record": float(named.sum(axis=1).mean()), "present_a_record": float(labels.sum(axis=1).mean()),
            "precision": float(right / max(named.sum(), 1)), "recall": float(right / max(labels.sum(), 1)),
            "records_without": float((~named.any(axis=1)).mean())}


def turned(by_folds: dict) -> dict:
    """{folds: {group: x}} -> {group: {folds: x}}, as results.json has it."""
    return {group: {folds: of[group] for folds, of in by_folds.items()} for group in (*GROUPS, ALL)}


@styled
def draw_long_tail(about: list, measured: dict, folds: str) -> Figure:
    """AUROC of every statement against its number of training positives, with intervals. measured: {name: list}."""
    figure = new_figure(PAGE_MM, 95, layout="constrained")
    axes = figure.subplots()
    for place, (name, statements) in enumerate(measured.items()):
        colour, _, marker = SERIES[place % len(SERIES)]
        shift = 1.03 ** (place - (len(measured) - 1) / 2)
        for fact, one in zip(about, statements):
            if one["auroc"] is None:
                continue
            x, low, high = max(fact["positives"], 0.7) * shift, one["auroc"]["low"], one["auroc"]["high"]
            if low is not None:
                axes.plot((x, x), (low, high), color=colour, linewidth=0.4, alpha=0.6)
            axes.plot(x, one["auroc"]["value"], marker, color=colour, markersize=2.5,
                      markerfacecolor="white" if low is None else colour)
        axes.plot([], [], marker, color=colour, linestyle="", label=name)
    for least in sorted(GROUPS.values())[1:]:
        axes.axvline(least, color="#777777", linewidth=0.7, linestyle="--")
    axes.axhline(0.5, color="#777777", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel="records of folds 1-8 that have the statement (dashed: 100 and 1,000)",
             ylabel=f"AUROC, {folds}", title="with 95 % interval; hollow: fewer than 5 patients, no interval")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def tabulate(about: list, measured: dict) -> bytes:
    """statements.csv: a row a checkpoint or rival, statement and choice of folds. measured: {name: {folds: list}}."""
    header = ["checkpoint", "folds", "code", "description", "group", "training_positives",
              *(f"{measure}{part}" for measure in MEASURES for part in ("", "_low", "_high"))]
    rows = [[name, folds, fact["code"], fact["description"], fact["group"], fact["positives"],
             *("" if (one[measure] or {}).get(part) is None else one[measure][part]
               for measure in MEASURES for part in ("value", "low", "high"))]
            for name, of in measured.items() for folds, statements in of.items()
            for fact, one in zip(about, statements)]
    return pack_csv(header, rows)


def show(title: str, groups: dict, sign: str = ""):
    """Print what results.json holds by group, in percent."""
    print(f"\n{title}")
    for group, of in groups.items():
        for folds, measures in of.items():
            print(f"  {group:<9}{folds:<14}" + "  ".join(f"{name} {percent(value, sign)}"
                                                         for name, value in measures.items()))


def diagnose_by_checkpoints(flags: argparse.Namespace, statements: Statements, rows: np.ndarray, device) -> dict:
    """{name: (logits (rows, classes), calibration, what results.json says of it)} of all checkpoints."""
    diagnosed = {}
    for name, path in zip(names_of(flags.load_path), flags.load_path):
        network, facts = load_diagnoser(path)
        require_same_statements(path, facts, statements)
        logits = logits_of(network.to(device), statements, rows, flags.data_path)
        diagnosed[name] = logits, facts["calibration"], {
            "sha256": sha256_of(path), "config": facts["config"], "epochs": len(facts["history"]),
            "training_records": facts["training_records"]}
    return diagnosed


def diagnose_by_rivals(flags: argparse.Namespace, statements: Statements, rows: np.ndarray) -> dict:
    """The same of the rivals, calibrated on fold 9 as a checkpoint is."""
    training, fold9 = statements.training_rows(), statements.table["fold"][rows] == VALIDATION_FOLD
    prevalence = statements.labels[training].mean(axis=0, dtype=np.float64)
    return {name: (logits, calibrate(statements.labels[rows][fold9], logits[fold9], prevalence),
                   {"training_records": len(training)})
            for name, logits in diagnose_without_network(statements, flags.data_path, rows).items()}


def compare(grouped: dict, pairs: list) -> dict:
    """{"one - other": paired differences by group and folds} of pairs of names. grouped: {name: {folds: by_group}}."""
    return {f"{one} - {other}": turned({folds: subtract(grouped[one][folds], grouped[other][folds])
                                        for folds in folds_named()}) for one, other in pairs}


def report(flags: argparse.Namespace, device):
    """Measure all checkpoints and the rivals, and write and print the report."""
    statements = load_statements(flags.data_path)
    require_ours(flags.output_dir, (TABLE, f"{FIGURE}.png", f"{FIGURE}.pdf"))
    rows, about = statements.rows_of(*folds_named()["folds9and10"]), statements.about["statements"]
    fold10 = np.isin(statements.table["fold"][rows], folds_named()["fold10"])
    group_of, measured, grouped, results = [one["group"] for one in about], {}, {}, {}
    checkpoints = diagnose_by_checkpoints(flags, statements, rows, device)
    rivals = diagnose_by_rivals(flags, statements, rows)
    for name, (logits, calibration, facts) in {**checkpoints, **rivals}.items():
        measured[name] = measure_all(statements, logits, rows, calibration["youden"])
        grouped[name] = {folds: by_group(of, group_of) for folds, of in measured[name].items()}
        naming = count_named(statements.labels[rows][fold10], logits[fold10], calibration["naming"])
        results[name] = facts | {"naming": naming, "groups": turned(grouped[name])}
        show(f"without a network: {name}" if name in rivals else name, results[name]["groups"])
        print("  statements named as by --record, fold 10: " + ", ".join(
            f"{key} {value:.2f}" for key, value in naming.items()))
    pairs = [(later, earlier) for earlier, later in itertools.combinations(checkpoints, 2)]
    differences = compare(grouped, [*pairs, *itertools.product(checkpoints, rivals)])
    for title, of in differences.items():
        show(title, of, sign="+")
    figure = pack(draw_long_tail(about, {name: of["folds9and10"] for name, of in measured.items()}, "folds 9 and 10"))
    contents = {TABLE: tabulate(about, measured), **{f"{FIGURE}.{kind}": data for kind, data in figure.items()}}
    write_report(flags.output_dir, contents, {
        "groups": next(iter(results.values()))["groups"], "differences": differences, "records": {
            name: int(np.isin(statements.table["fold"], folds).sum()) for name, folds in folds_named().items()},
        "statements": {group: group_of.count(group) for group in GROUPS}, "arrays": statements.about["fingerprint"],
        "checkpoints": {name: results[name] for name in checkpoints},
        "rivals": {name: results[name] for name in rivals},
        "versions": versions(), "git_commit": git_commit()})
    print(f"\nreport: {flags.output_dir}")


def diagnose(path: str, network, facts: dict, flags: argparse.Namespace):
    """Print the statements that a recording has, window by window."""
    encoder, calibration = Encoder(network.mcf), facts["calibration"]
    try:
        source = open_recording(path, flags.record_rate, flags.record_unit)
        for start, signal in windows_of(source):
            window = prepare_window(start, signal, {"slope"})
            one = Statements(Records(window.signal[None], path), {}, None, None,
                             [valid_beats(window.r_peaks["slope"])[0]], {})
            tokens = next(encoder.iterate(one, np.array([0]), path))
            logits = network.class_head(tokens).detach().cpu().numpy()[0]
            named = [(probability, place) for place, probability in enumerate(probabilities(logits, calibration))
                     if calibration["naming"][place] is not None and logits[place] >= calibration["naming"][place]]
            print(f"{path}, {start / SAMPLING_RATE:g} s: " + ("" if named else "none"))
            for probability, place in sorted(named, reverse=True):
                fact = facts["statements"][place]
                print(f"  {fact['code']:<6} {fact['description']}: probability {probability:.2f}, prevalence "
                      f"{calibration['prevalence'][place]:.4f}")
    except RecordError as error:
        raise UserError(f"{path}: {error}; {error.remedy}") from error


def main():
    git_commit()
    flags = parse_arguments()
    device = choose_device(flags.device)
    if not flags.record:
        require_writable(flags.output_dir)
        report(flags, device)
        return
    network, facts = load_diagnoser(flags.load_path[0])
    if "calibration" not in facts:
        raise UserError(f"{flags.load_path[0]} has no thresholds of fold 9; continue its training with --resume")
    silent = sum(threshold is None for threshold in facts["calibration"]["naming"])
    for path in flags.record:
        diagnose(path, network.to(device).eval(), facts, flags)
    print(f"\nNot for clinical use. {silent} of {len(facts['statements'])} statements are never named: on fold 9 "
          "they are too few, or would be wrong more often than right.")


if __name__ == "__main__":
    run(main)
