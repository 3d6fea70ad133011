"""What fold 9 says of a network's logits: thresholds, and probabilities that mean what they say. Kept in checkpoints.

The probability of a statement is sigmoid(slope * logit + offset), one slope for all and one offset each: a rare
statement has too few records for a slope of its own.
"""
import numpy as np
import torch
import torch.nn.functional as F

from evaluation.metrics import best_threshold, choose_thresholds

LEAST_POSITIVES = 5             # in fold 9, for a threshold at which a statement is named
LEAST_PRECISION = 0.5
OFFSET_PENALTY = 1.0            # on an offset's square, in records: a prior at the offset that all share


def naming_threshold(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """At which score a statement is named: the best F1 among the thresholds that are right half of the time.

    labels, scores: (N,). None where no threshold is, or below LEAST_POSITIVES.
    """
    return best_threshold(labels, scores, LEAST_PRECISION) if (labels == 1).sum() >= LEAST_POSITIVES else None


def calibrate(labels: np.ndarray, logits: np.ndarray, prevalence) -> dict:
    """For a checkpoint: slope, offsets and prevalence (classes,), and the thresholds of each statement, on the logit.

    labels, logits: (N, classes) of fold 9; prevalence: in the training records. "youden": None without a positive;
    "naming": of naming_threshold.
    """
    targets, values = torch.from_numpy(labels).double(), torch.from_numpy(logits).double()
    start = torch.logit(torch.as_tensor(prevalence, dtype=torch.double).clamp(1e-4, 1 - 1e-4)) - values.mean(dim=0)
    slope = torch.zeros((), dtype=torch.double, requires_grad=True)                 # of its logarithm
    offsets = torch.zeros(values.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, offsets], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        scores = slope.exp() * (values - values.mean(dim=0)) + values.mean(dim=0) + start + offsets
        value = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
        value = value + OFFSET_PENALTY * offsets.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    factor = float(slope.detach().exp())
    offset = (1 - factor) * values.mean(dim=0) + start + offsets.detach()
    columns = list(zip(labels.T, logits.T))
    return {"slope": factor, "offsets": offset.tolist(), "prevalence": [float(share) for share in prevalence],
            "youden": [choose_thresholds(one, scores)["youden"] if 0 < one.sum() < len(one) else None
                       for one, scores in columns],
            "naming": [naming_threshold(one, scores) for one, scores in columns]}


def probabilities(logits: np.ndarray, calibration: dict) -> np.ndarray:
    """(N, classes) logits -> calibrated probabilities."""
    return 1 / (1 + np.exp(-(calibration["slope"] * logits + np.array(calibration["offsets"]))))
