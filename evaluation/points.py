"""The ranking of the points of anomaly maps, for any part of them; intervals as in metrics.py, over patients."""
import numpy as np

from evaluation.metrics import MEASURES, Estimate, Resamples, auroc, average_precision, count_by_score, estimate

BINS = 2048                         # of equally many points, for parts and resamples; they move an AUROC by < 1e-4
BINNING_SAMPLE = 1_000_000          # points that the bins are drawn from


def bin_edges(scores: np.ndarray) -> np.ndarray:
    """The edges between BINS bins that hold equally many of these scores, ascending."""
    return np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:-1]))


def resample_auroc(positive: np.ndarray, negative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The resamples' AUROC (draws,) from histograms (records, bins), and how often a resample holds each record.

    weights: (draws, records) float64. An AUROC counts pairs of points; the pairs of every two records are counted once,
    and each resample weighs them.
    """
    some = positive.any(axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive[some] @ below.T                                    # (records with positive points, records)
    with np.errstate(invalid="ignore"):
        return ((weights[:, some] @ pairs * weights).sum(axis=1)
                / ((weights @ positive.sum(axis=1)) * (weights @ negative.sum(axis=1))))


def pool_counts(positive: np.ndarray, negative: np.ndarray, rows: np.ndarray, resamples: Resamples) -> Estimate | None:
    """AUROC over the points of a group of records together, by the bins alone.

    positive, negative: counts (records, bins); rows: (records,) bool.
    """
    counts = [count[rows].astype(np.float64) for count in (positive, negative)]
    patients = min(resamples.count(rows & count.any(axis=1)) for count in (positive, negative))
    resampled = resample_auroc(*counts, resamples.weights[:, rows].astype(np.float64))
    return estimate(auroc(*(count.sum(axis=0) for count in counts)), resampled, patients)


class PointRanking:
    """The ranking of the points of an anomaly map, for any part of them.

    labels: (records, samples, leads), 1 anomalous, 0 normal, anything else not scored; maps: the same shape;
    resamples: of the patients whose records these are.
    """

    def __init__(self, labels: np.ndarray, maps: np.ndarray, resamples: Resamples):
        self.labels, self.maps, self.resamples = labels, maps, resamples
        self.weights = resamples.weights.astype(np.float64)
        self.scored = labels <= 1
        sample = maps.reshape(-1)[np.random.default_rng(0).integers(0, maps.size, BINNING_SAMPLE)]
        edges = bin_edges(sample)
        self.bins = np.searchsorted(edges, maps.reshape(len(maps), -1), side="right").astype(np.uint16)
        self.number_of_bins = len(edges) + 1

    def _histograms(self, chosen: np.ndarray) -> np.ndarray:
        """Counts (records, bins) of the chosen points (records, samples, leads)."""
        chosen = np.broadcast_to(chosen, self.labels.shape).reshape(len(self.labels), -1)
        return np.stack([np.bincount(bins[mask], minlength=self.number_of_bins)
                         for bins, mask in zip(self.bins, chosen)]).astype(np.float64)

    def pool(self) -> dict:
        """{"auroc", "average_precision"} over all scored points of all records together."""
        counts = [self._histograms(self.labels == kind) for kind in (1, 0)]
        values = count_by_score(self.labels[self.scored] == 1, self.maps[self.scored])
        patients = min(self.resamples.count(count.any(axis=1)) for count in counts)
        resampled = {"auroc": resample_auroc(*counts, self.weights),
                     "average_precision": average_precision(*(self.weights @ count for count in counts))}
        return {name: estimate(measure(*values), resampled[name], patients) for name, measure in MEASURES.items()}

    def pool_part(self, chosen, positive: np.ndarray | None = None) -> Estimate | None:
        """AUROC over a part of the points of all records together, by the bins alone.

        chosen: mask that broadcasts to the maps; positive: which of them count as anomalous (default: as labelled).
        """
        chosen = self.scored & chosen
        positive = self.labels == 1 if positive is None else positive
        counts = [self._histograms(chosen & kind) for kind in (positive, ~positive)]
        return pool_counts(*counts, np.full(len(self.labels), True), self.resamples)
