"""Which samples of which lead: the truth of the benchmark, every number of localization, and the records to draw."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dataloader import crop_global
from ecg import ludb
from ecg.arrays import load_details
from ecg.signals import LEAD_NAMES
from evaluation.metrics import Resamples
from evaluation.places import average_places, rank_places, thinned
from evaluation.points import PointRanking
from evaluation.splits import Split

EXAMPLE_DIAGNOSES = 4                   # whose records are drawn, the most frequent ones
ROWS_AT_ONCE = 64                       # of which maps are made together
RANKS = ("best", "median", "worst")     # of a diagnosis by the record's own AUROC: drawn are these


@dataclass
class Benchmark:
    """Truth of the localization benchmark, (records, 4800, leads): labels, and phases or None; diagnoses or None.

    names: of the records.
    """
    labels: np.ndarray
    phases: np.ndarray | None
    diagnoses: list | None
    names: list
    lead_names: tuple
    resamples: Resamples


def open_benchmark(data_path, split: Split) -> Benchmark:
    """The benchmark's truth, and what tells the phases of the beat and the diagnoses, where that is known."""
    details = load_details(data_path, split.name, split.records.signals)
    phases = details["phases"] if details else None
    known, leads, ids = split.table.get("diagnoses"), split.records.leads, split.table.get("ecg_id")
    return Benchmark(np.asarray(crop_global(split.labels)), None if phases is None else np.asarray(crop_global(phases)),
                     None if known is None else [ludb.split_diagnoses(text) for text in known],
                     [f"in row {row}" for row in range(len(split.labels))] if ids is None else ids.tolist(),
                     LEAD_NAMES if leads == len(LEAD_NAMES) else tuple(f"lead {place + 1}" for place in range(leads)),
                     Resamples(split.patients))


def evaluate_thinned(benchmark: Benchmark, split: Split, r_peaks: list, maps_of: Callable) -> dict:
    """{name: all of localization} of maps that are made some records at a time, ranked at every fifth sample.

    split: the benchmark's; maps_of: (records, r_peaks of all rows, rows) -> {name: (n, 4800, leads)}.
    """
    sparse = replace(benchmark, labels=thinned(benchmark.labels),
                     phases=None if benchmark.phases is None else thinned(benchmark.phases))
    blocks = []
    for start in range(0, len(benchmark.labels), ROWS_AT_ONCE):
        maps = maps_of(split.records, r_peaks, np.arange(start, min(start + ROWS_AT_ONCE, len(benchmark.labels))))
        blocks.append({name: thinned(one).copy() for name, one in maps.items()})
    return {name: evaluate_localization(sparse, np.concatenate([block[name] for block in blocks]))
            for name in blocks[0]}


def evaluate_localization(benchmark: Benchmark, maps: np.ndarray) -> dict:
    """All of localization for one map: pooled, per record, within a record, by lead and by diagnosis."""
    ranking = PointRanking(benchmark.labels, maps, benchmark.resamples)
    own = rank_places(benchmark.labels, benchmark.phases, maps)
    places = average_places(own, benchmark.resamples)
    per_record = {"auroc": places["per_record"], "records": int(np.isfinite(own[:, 0]).sum())}
    return {**places, "pooled": ranking.pool(), "per_record": per_record,
            "by_lead": {lead: ranking.pool_part(np.arange(maps.shape[2]) == place)
                        for place, lead in enumerate(benchmark.lead_names)},
            "by_diagnosis": rank_diagnoses(benchmark, ranking)}


def rank_diagnoses(benchmark: Benchmark, ranking: PointRanking) -> dict:
    """AUROC of what each rule marks in its records, against what no rule marks there: {key: {"auroc", ...}}."""
    ranked = {}
    for rule in ludb.RULES if benchmark.phases is not None and benchmark.diagnoses else ():
        members = np.array([rule in ludb.rules_of(diagnoses) for diagnoses in benchmark.diagnoses])
        if members.any():
            marked = np.stack([ludb.rule_marks(rule, phases, diagnoses)
                               for phases, diagnoses in zip(benchmark.phases, benchmark.diagnoses)])
            chosen = members[:, None, None] & (marked | (benchmark.labels == 0))
            ranked[rule.key] = {"auroc": ranking.pool_part(chosen, marked), "records": int(members.sum()),
                               "title": rule.title}
    return ranked


def example_names() -> list:
    """The name of every record that may be drawn, for files."""
    return [f"{key}_{rank}" for key in ("all", *(rule.key for rule in ludb.RULES)) for rank in RANKS]


def choose_examples(benchmark: Benchmark, maps: np.ndarray, protocol: str) -> list:
    """The records to draw: the best, the median and the worst of several diagnoses by their own AUROC.

    maps: (records, 4800, leads) of a protocol, which the titles name. Returns [(row, name for files, title)]. Without
    diagnoses all records with points of both kinds are one group.
    """
    own = rank_places(benchmark.labels, None, maps)[:, 0]
    groups = {"all": ("points of both kinds", np.isfinite(own))}
    if benchmark.diagnoses:
        rules = [ludb.rules_of(diagnoses) for diagnoses in benchmark.diagnoses]
        groups = {rule.key: (rule.title, np.isfinite(own) & [rule in marking for marking in rules])
                  for rule in ludb.RULES}
    chosen = []
    for key in sorted(groups, key=lambda key: -groups[key][1].sum())[:EXAMPLE_DIAGNOSES]:
        title, members = groups[key]
        rows = np.flatnonzero(members)
        rows = rows[np.argsort(-own[rows], kind="stable")]
        for rank, place in zip(RANKS, (0, len(rows) // 2, len(rows) - 1)) if len(rows) else ():
            row = int(rows[place])
            others = [rule.title for rule in rules[row] if rule.key != key] if benchmark.diagnoses else []
            chosen.append((row, f"{key}_{rank}", f"Record {benchmark.names[row]}, {rank} of {len(rows)} with {title}; "
                           f"{protocol} protocol, AUROC of all its marks {own[row]:.2f}"
                           + (f"\nAlso marked: {'; '.join(others)}." if others else "")))
    return chosen
