"""Score a checkpoint: detection on the test set, localization on the benchmark, under every protocol.

    python test.py --data_path ./data/ --load_model 1 --load_path ./ckpt/mymodel.pt           # as published
    python test.py --load_path ./ckpt/mymodel.pt --save_maps 1 --output_dir results/mymodel
    python test.py --load_path ckpt/seed0/model.pt ckpt/seed1/model.pt ckpt/seed2/model.pt    # mean and deviation
    python test.py --protocol none                                             # the scores without a network alone
    python test.py --load_path ./ckpt/mymodel.pt --record one.hea two.csv      # recordings of one's own
    python test.py --load_path ./b/model.pt --beats between --dims 2           # MIT-BIH's beats

Prints the AUROCs with their intervals, and writes report.md, results.json, detection_scores.csv and the figures; with
--save_maps 1 the localization maps too. Where fold 9 is there it is scored too, and sets the operating points. Where
test_lesions.npy is there, clean localizes the lesions in it.
"""
import argparse
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ecg import beats
from ecg.signals import LEAD_NAMES
from evaluation import beats_report, drawing, figures, files, numbers, provenance, recordings, report, rival
from evaluation.lesions import Lesions, choose_lesions, rank_lesions
from evaluation.localization import choose_examples
from evaluation.numbers import Scored, Truth
from evaluation.places import THINNING
from evaluation.splits import load_splits
from model import MCF, load_checkpoint
from scoring.passes import Scorer
from scoring.protocols import CLEAN, PROTOCOLS, protocols_for
from utils import (PROCESSES, RANK, UserError, add_published_flags, check_published_flags, choose_device, git_commit,
                   require_writable, run, start_processes, stop_processes, versions)

CHOICES = {"all": tuple(PROTOCOLS), **{name: (name,) for name in PROTOCOLS}, "none": ()}    # of --protocol


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = add_published_flags(parser)
    published.description = "--epochs, --batch_size and --lr are of the training and change nothing here"
    published.add_argument("--load_model", type=int, choices=(0, 1), default=1, help="0: score an untrained network")
    published.add_argument("--load_path", nargs="+", default=["./ckpt/mymodel.pt"],
                           help="checkpoint, or several of them (default ./ckpt/mymodel.pt)")
    reporting = parser.add_argument_group("report")
    reporting.add_argument("--protocol", choices=CHOICES, default="all", help="which evaluation; none: the scores "
                           "without a network alone (default %(default)s)")
    reporting.add_argument("--output_dir", default="results/", help="folder of the report (default %(default)s)")
    reporting.add_argument("--save_maps", type=int, choices=(0, 1), default=0,
                           help="write localization_maps_<protocol>.npy, (records, 4800, leads) float32")
    reporting.add_argument("--figures", type=int, metavar="N", help="0: leave the figures out; with --record: how many "
                           "windows of each recording are drawn, the most anomalous ones (default 10)")
    reporting.add_argument("--fold9", type=int, choices=(0, 1), default=1, help="0: leave fold 9 out, and with it the "
                           "operating points and combined; saves half the time")
    reporting.add_argument("--beats", choices=beats.SPLITS, help="score MIT-BIH's beats in place of records, by a "
                           "network that train.py --beats trained on this split; set --dims 2")
    own = parser.add_argument_group("recordings of one's own")
    own.add_argument("--record", nargs="+", metavar="FILE", help="score these instead of the test set: WFDB records or "
                     ".csv files, as ecg/recording_files.py reads them")
    recordings.add_flags(own)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    running.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: convolutions in bfloat16, "
                         "faster and less exact (default off: float32)")
    arguments = parser.parse_args()
    check_published_flags(arguments)
    if arguments.record and (len(arguments.load_path) > 1 or not arguments.load_model or arguments.protocol == "none"):
        raise UserError("--record needs one trained network; name one checkpoint with --load_path, and leave out "
                        "--load_model 0 and --protocol none")
    if arguments.beats and (arguments.record or len(arguments.load_path) > 1 or arguments.save_maps or PROCESSES > 1
                            or arguments.protocol not in ("all", CLEAN.name)):
        raise UserError("--beats scores by one checkpoint under clean, in one process; leave out --record, --save_maps,"
                        " other protocols, further checkpoints, and torchrun")
    return arguments


def load_network(path, leads: int, hidden: int, seed: int) -> tuple:
    """(a network on the CPU, what the report says of it) of a checkpoint; path None: an untrained network.

    leads, hidden: as the flags say. Raises UserError where the checkpoint has others.
    """
    if path is None:
        print("--load_model 0: an untrained network is scored; its numbers only show that the pipeline runs.")
        torch.manual_seed(seed)
        return MCF(leads, hidden), provenance.UNKNOWN
    model, facts = load_checkpoint(path)
    for flag, own, asked in (("dims", model.leads, leads), ("hidden", model.hidden, hidden)):
        if own != asked:
            raise UserError(f"{path} was trained with --{flag} {own}, not {asked}; set --{flag} {own}, or name another "
                            "checkpoint")
    return model, provenance.describe_checkpoint(path, facts)


@dataclass
class Run:
    """A network under its protocols. checkpoint: what results.json says of it; the others by protocol."""
    checkpoint: dict
    scorers: dict
    scored: dict


def score_splits(scorer: Scorer, splits: dict, lesions: Lesions | None) -> Scored:
    """Score the records of every split, and localize in the benchmark and, where the protocol can afford it, lesions.

    Every beat by itself takes six times as long, and the lesions are many: a protocol that does so leaves them out.
    """
    detector, seconds, scores, maps = scorer.protocol.detector, {}, {}, None
    for name, split in splits.items():
        started = time.perf_counter()
        result = scorer.score(split.records, split.r_peaks[detector], with_maps=name == "benchmark")
        seconds[name] = time.perf_counter() - started
        if name == "benchmark":
            maps = result.maps
        else:
            scores[name] = result.scores
    of_lesions = None
    if lesions is not None and scorer.protocol.median_beat:
        started = time.perf_counter()
        of_lesions = rank_lesions(lesions, lambda *where: {"": scorer.score(*where, with_maps=True).maps})[""]
        seconds["lesions"] = time.perf_counter() - started
    return Scored(scores, maps, detector, seconds, of_lesions)


def pack_maps(scored: dict) -> dict:
    """{file: bytes} of the localization maps of {protocol: Scored}."""
    contents = {}
    for name, one in scored.items():
        if one.maps is not None:
            file = io.BytesIO()
            np.save(file, one.maps)
            contents[report.maps_file(name)] = file.getvalue()
    return contents


def draw_examples(run: Run, truth: Truth, rivals: rival.Rivals) -> tuple:
    """({name: Figure} of records of the benchmark by the last protocol, {file: bytes} of what is unusual in them)."""
    if truth.benchmark is None or not run.scored:
        return {}, {}
    protocol, split = list(run.scored)[-1], truth.splits["benchmark"]
    examples = choose_examples(truth.benchmark, run.scored[protocol].maps, protocol)
    rows = [row for row, *_ in examples]
    drawings = draw_rows(run.scorers[protocol], rivals.of_places, (split.records, split.r_peaks),
                      truth.benchmark.lead_names, {f"localization_{name}": (row, title)
                                                   for row, name, title in examples}, truth.benchmark.labels[rows])
    if not (rivals.fitted and rows):
        return drawings, {}
    return drawings, rival.pack_unusual(rivals.fitted, split, rows, truth.benchmark.names)


def draw_lesions(run: Run, truth: Truth, of_places: rival.PlaceMaps | None) -> dict:
    """{name: Figure} of a lesion of each kind, under the last protocol that localized them."""
    protocol = next((name for name in reversed(run.scored) if run.scored[name].lesions is not None), None)
    if protocol is None:
        return {}
    lesions, chosen = truth.lesions, choose_lesions(truth.lesions, run.scored[protocol].lesions, protocol)
    labels = np.repeat(lesions.labels[[row for row, *_ in chosen]], THINNING, axis=1)
    return draw_rows(run.scorers[protocol], of_places, (lesions.records, {rival.DETECTOR: lesions.r_peaks}),
                     LEAD_NAMES, {name: (row, title) for row, name, title in chosen}, labels)


def draw_rows(scorer: Scorer, of_places: rival.PlaceMaps | None, where: tuple, lead_names: tuple, chosen: dict,
              labels: np.ndarray) -> dict:
    """{name: Figure} of rows of records: what was expected there, and how rare it is what differs.

    Without of_places and its network, what the scorer's network restored, and its scores. where: (records, R peaks by
    detector); chosen: {name: (row, title)}; labels: (n, 4800, leads) of these rows.
    """
    (records, r_peaks), rows = where, np.array([row for row, _ in chosen.values()], dtype=int)
    if not len(rows):
        return {}
    shown = of_places.show(records, r_peaks[rival.DETECTOR], rows) if of_places else None
    if shown is None:
        peaks = r_peaks[scorer.protocol.detector]
        restorations = (*scorer.restore(records, peaks, rows), scorer.map_few(records, peaks, rows))
    titles = {name: title + ("\n" if "\n" not in title else " ") + "The AUROC is the protocol's; the drawing "
              "is by the restorer of beats." * (shown is not None) for name, (_, title) in chosen.items()}
    return drawing.draw_examples(titles, lead_names, "mV" if records.in_millivolts else "normalised", labels,
                                 shown or restorations, rare=shown is not None)


def report_run(folder: Path, run: Run, truth: Truth, rivals: rival.Rivals, about: dict, with_figures: bool,
               with_maps: bool) -> tuple:
    """Evaluate a run and write its report; returns (entries, facts) of results.json. about: facts of all runs."""
    entries, columns = rival.evaluate_all(truth, run.scored, rivals)
    about = {**about, "checkpoint": run.checkpoint}
    contents, drawings = pack_maps(run.scored) if with_maps else {}, {}
    if with_figures:
        series = {name: columns[name] for name in (*entries, report.TRIVIAL + rival.NAME) if name in columns}
        drawings, unusual = draw_examples(run, truth, rivals)
        drawings = {**drawing.draw_detection(truth.cohort, series, entries),
                    **drawing.draw_groups(entries, rivals.baselines),
                    **drawing.draw_training(run.checkpoint["history"]),
                    **draw_lesions(run, truth, rivals.of_places), **drawings}
        contents |= unusual | {f"{name}.{kind}": content for name, figure in drawings.items()
                               for kind, content in figures.pack(figure).items()}
    contents[report.SCORES_FILE] = report.pack_scores(truth.splits, columns)
    text = report.write_markdown(entries, rivals.baselines, rivals.maps, about, list(drawings))
    contents[report.REPORT_FILE] = text.encode()
    files.write_report(folder, contents, {**entries, "baselines": rivals.baselines, "maps": rivals.maps, **about})
    return entries, about


def report_average(folder: Path, names: list, runs: list, about: dict):
    """Print and write the mean and standard deviation over several checkpoints, whose reports stand in folder/names."""
    averaged = numbers.average_runs(runs)
    text = report.average_table(averaged, names)
    files.write_report(folder, {report.REPORT_FILE: text.encode()}, {"runs": names, "mean": averaged, **about})
    print(f"\n{text}")


def report_on_beats(arguments: argparse.Namespace, output: Path):
    """Score MIT-BIH's beats by the first checkpoint, under the protocol clean. Raises UserError."""
    require_writable(output)
    files.require_ours(output, [report.REPORT_FILE, beats_report.SCORES_FILE])
    of_mitbih = beats.open_beats(arguments.data_path, arguments.dims)
    of_mitbih.require_parts(arguments.beats)
    path = arguments.load_path[0] if arguments.load_model else None
    model, checkpoint = load_network(path, arguments.dims, arguments.hidden, arguments.seed)
    trained = (checkpoint["config"] or {"beats": arguments.beats}).get("beats")
    if trained != arguments.beats:
        raise UserError(f"{path} was trained on {f'--beats {trained}' if trained else 'records'}, not on --beats "
                        f"{arguments.beats}; name another checkpoint, or its own --beats")
    device = choose_device(arguments.device, arguments.amp)
    about = {"checkpoint": checkpoint, "mask_ratio": arguments.mask_ratio, "versions": versions(),
             "device": str(device), "amp": arguments.amp, "commit": git_commit()}
    scorer = Scorer(model.to(device).eval(), CLEAN, arguments.mask_ratio, arguments.amp)
    beats_report.report_beats(scorer, of_mitbih, arguments.beats, output, about)


def main():
    git_commit()
    arguments = parse_arguments()
    protocol_names, output = CHOICES[arguments.protocol], Path(arguments.output_dir)
    if arguments.record:
        recordings.score_recordings(arguments.record, arguments.load_path[0], output,
                                    recordings.settings_of(arguments, protocol_names))
        return
    if arguments.beats:
        report_on_beats(arguments, output)
        return
    with_figures = arguments.figures != 0
    paths = arguments.load_path if arguments.load_model else [None]
    networks = [load_network(path, arguments.dims, arguments.hidden, arguments.seed) for path in paths
                ] if protocol_names else [(None, provenance.UNKNOWN)]
    names = [f"{number}-{Path(path).stem}" for number, path in enumerate(paths, 1)] if networks[1:] else ["."]
    for folder in {output, *(output / name for name in names)}:
        require_writable(folder)
        files.require_ours(folder, report.file_names(protocol_names * arguments.save_maps, with_figures))
    device = choose_device(arguments.device, arguments.amp)
    start_processes(device)
    protocols = [protocols_for(model, protocol_names) if protocol_names else () for model, _ in networks]
    splits = load_splits(arguments.data_path, arguments.dims,
                         {rival.DETECTOR, *(protocol.detector for some in protocols for protocol in some)},
                         arguments.fold9)
    truth = numbers.open_truth(arguments.data_path, splits)
    rivals = rival.score_rivals(arguments.data_path, truth) if RANK == 0 else None
    about = {"mask_ratio": arguments.mask_ratio, **provenance.describe_data(arguments.data_path, list(splits.values())),
             "counts": numbers.count_records(truth, rival.DETECTOR), "versions": versions(), "device": str(device),
             "amp": arguments.amp, "processes": PROCESSES, "commit": git_commit()}
    reports = []
    for name, (model, checkpoint), some in zip(names, networks, protocols):
        scorers = {protocol.name: Scorer(model.to(device).eval(), protocol, arguments.mask_ratio, arguments.amp)
                   for protocol in some}
        one = Run(checkpoint, scorers, {name: score_splits(scorer, splits, truth.lesions)
                                        for name, scorer in scorers.items()})
        if RANK == 0:
            reports.append(report_run(output / name, one, truth, rivals, about, with_figures,
                                      arguments.save_maps))
    if reports[1:]:
        report_average(output, names, [entries for entries, _ in reports], about)
    elif reports:
        report.print_report(reports[0][0], rivals.baselines, rivals.maps, reports[0][1])
    others = "a folder of each checkpoint" if networks[1:] else report.SCORES_FILE + " and the figures" * with_figures
    print(f"written to {output}: {report.REPORT_FILE}, {files.RESULTS_FILE}, {others}")
    stop_processes()


if __name__ == "__main__":
    run(main, alone=False)
