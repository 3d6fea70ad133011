"""Whether a map tells the place of what is abnormal in a record: which lead of a wave, and which moment of a lead.

Pure functions; a higher score is more anomalous, and a label is 1 anomalous, 0 normal, anything else not scored. Every
number is the chance that an anomalous point outranks a normal one, ties counted half, of the same record (per record),
of the same record and phase of the beat but another lead (within record and phase: which lead of this wave?), or of the
same record and lead (which moment of this lead?). The other lead is one that has no anomalous point in this phase, so
that the rim of a wave is not held against its middle; where all leads have one, the question cannot be asked. A map
that is constant in a record has 0.5 in all three, and one that tells the wave and not the lead 0.5 within the phase.
"""
import numpy as np

from evaluation.metrics import Estimate, Resamples, average, estimate

PLACES = ("per_record", "within_record_and_phase", "within_record_and_lead")
NO_PHASE = 0                        # its points are in no comparison within record and phase
THINNING = 5                        # every 5th sample, 100 a second, is enough: no signal holds anything above 25 Hz


def thinned(points: np.ndarray) -> np.ndarray:
    """Every THINNING-th sample of (n, 4800, ...): (n, 960, ...)."""
    return points[:, ::THINNING]


def share_of_order(anomalous: np.ndarray, normal: np.ndarray) -> float:
    """The AUROC of the scores of anomalous (n,) and normal (m,) points; NaN where either is empty."""
    if not len(anomalous) or not len(normal):
        return np.nan
    normal, anomalous = np.sort(normal), np.sort(anomalous)     # in order they are looked up many times as fast
    lower, not_higher = (np.searchsorted(normal, anomalous, side) for side in ("left", "right"))
    return (lower + not_higher).mean() / (2 * len(normal))


def within(groups) -> float:
    """The mean AUROC of groups, [(scores of anomalous points, of normal points)], weighted by the anomalous points.

    So an edge of a mark that reaches into another group counts as little as it holds. NaN where no group has both.
    """
    shares = np.array([share_of_order(*group) for group in groups], dtype=float)
    weights = np.array([len(anomalous) for anomalous, _ in groups]) * np.isfinite(shares)
    return float(np.nan_to_num(shares) @ weights / weights.sum()) if weights.any() else np.nan


def rank_places(labels: np.ndarray, phases: np.ndarray | None, maps: np.ndarray) -> np.ndarray:
    """PLACES of each record, (records, 3); NaN where a record has no points to compare.

    labels, maps: (records, samples, leads); phases: (records, samples, leads), or (records, samples, 1), or None.
    """
    own = np.full((len(labels), len(PLACES)), np.nan)
    for row, (label, scores) in enumerate(zip(labels, maps)):
        anomalous, normal = label == 1, label == 0
        if not anomalous.any() or not normal.any():
            continue
        own[row, 0] = share_of_order(scores[anomalous], scores[normal])
        own[row, 2] = within([(lead[hit], lead[miss]) for lead, hit, miss in zip(scores.T, anomalous.T, normal.T)])
        if phases is not None:
            codes, groups = np.broadcast_to(phases[row], label.shape), []
            for code in set(np.unique(codes[anomalous])) - {NO_PHASE}:
                of_phase = codes == code
                hits = anomalous & of_phase
                groups.append((scores[hits], scores[normal & of_phase & ~hits.any(axis=0)]))
            own[row, 1] = within(groups)
    return own


def average_places(own: np.ndarray, resamples: Resamples, kinds: dict | None = None) -> dict:
    """{name of PLACES: mean over records} of rank_places' numbers (records, 3).

    kinds: {kind: (records,) bool} or None. Where they are given the mean is that over the kinds, each the mean of its
    own records, and "by_kind" holds these.
    """
    if kinds is None:
        return {name: average_rows(column, resamples) for name, column in zip(PLACES, own.T)}
    return {place: with_kinds({name: average_rows(np.where(rows, column, np.nan), resamples)
                               for name, rows in kinds.items()}) for place, column in zip(PLACES, own.T)}


def with_kinds(by_kind: dict, over_all: Estimate | None = None) -> Estimate | None:
    """The mean of {kind: Estimate or None}, or over_all where it is given, that holds them as "by_kind"."""
    mean = over_all or average(list(by_kind.values()))
    if mean is None:
        return None
    value = Estimate(mean["value"], mean["low"], mean["high"], mean.draws)
    value["by_kind"] = by_kind
    return value


def average_rows(own: np.ndarray, resamples: Resamples) -> Estimate | None:
    """The mean of numbers of records (records,), those that are NaN left out."""
    known = np.isfinite(own)
    if not known.any():
        return None
    weights = resamples.weights[:, known].astype(np.float64)
    with np.errstate(invalid="ignore"):
        resampled = weights @ own[known] / weights.sum(axis=1)
    return estimate(own[known].mean(), resampled, resamples.count(known))
