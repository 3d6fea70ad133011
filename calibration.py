"""The third protocol, "calibrated": how unusual a record's errors are, from what is usual among normal ECGs.

The network, its input and its masks are those of "clean"; what changes is how errors become a score. An error means
nothing until one knows what is usual for that lead and that place of the beat: QRS is always restored worst. fit()
learns that from normal records alone (reference.py calls it with the normals of fold 9); what it learned is a dict of
plain arrays, from which score_records() and unusual_maps() need no other data.

Three parts, each the log of a distance from the normals, in units of its spread among normals it was not fitted to:
    residual    mean |z| of the beat's restoration less the beat, where masked, mean over beats, by lead and place
    error       log error of the beat by lead and place: Mahalanobis distance, covariance as Ledoit & Wolf 2004
    amplitude   log maximum, -minimum and deviation of each lead in mV, which min-max hides: Mahalanobis distance
A record's score is their mean. A point's is how unusual the log error is there (z by lead and phase of the beat), plus
twice the sum of the record's own score and of the log error that is usual there. RESULTS.md says what else was tried.
"""
import numpy as np
from sklearn.covariance import LedoitWolf

from scoring import BINS
from utils import UserError

PARTS = ("residual", "error", "amplitude")
PLACES = 12                         # of the beat, for "error": its covariance has (12 * leads)^2 entries
CROSS_FITS = 5                      # parts of the normals, each scored by a fit to the others
RECORD_WEIGHT, USUAL_WEIGHT = 2.0, 2.0      # in a map, beside z: of the record's score and of the usual log error
LEAST_NORMALS = 20
LEAST_ERROR = 1e-5                  # added before a logarithm: where nothing is wrong it stays finite
LEAST_MILLIVOLTS = 1e-3             # the same for amplitudes: 1 uV
SPREAD_FLOOR = 1e-3                 # of a feature's deviation, relative to the mean one: no flat lead is divided by 0


def amplitude_features(signals: np.ndarray) -> np.ndarray:
    """(R, 5000, leads) in mV -> log maximum, -minimum and standard deviation of each lead, (R, 3 * leads)."""
    found = np.stack([signals.max(axis=1), -signals.min(axis=1), signals.std(axis=1)], axis=1)
    return np.log(np.maximum(found, 0) + LEAST_MILLIVOLTS).reshape(len(signals), -1)


def features(profiles: dict, signals_mv) -> dict:
    """What the parts see of records: {part: (R, features)} float64.

    profiles: of scoring.score_split; signals_mv: iterable of (5000, leads) in mV, or None where nobody knows their
    amplitude: the part is then left out.
    """
    error = profiles["local_error"]                                         # (R, BINS, leads)
    error = error.reshape(len(error), PLACES, -1, error.shape[2]).mean(axis=2)
    found = {"residual": profiles["local_residual"], "error": np.log(error + LEAST_ERROR)}
    if signals_mv is not None:
        found["amplitude"] = np.concatenate([amplitude_features(record[None]) for record in signals_mv])
    return {part: values.reshape(len(values), -1).astype(np.float64) for part, values in found.items()}


def fit_part(part: str, values: np.ndarray) -> dict:
    """What is usual of a part among normals (R, d): "mean", "deviation" (d,), and but for residual "precision"."""
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    deviation = np.maximum(deviation, max(SPREAD_FLOOR * deviation.mean(), 1e-12))
    usual = {"mean": mean, "deviation": deviation}
    if part != "residual":
        usual["precision"] = LedoitWolf(assume_centered=True).fit((values - mean) / deviation).precision_
    return usual


def distance(usual: dict, values: np.ndarray) -> np.ndarray:
    """Log distance of records (R, d) from what fit_part found: (R,)."""
    z = (values - usual["mean"]) / usual["deviation"]
    if "precision" in usual:
        return np.log(np.einsum("ri,ij,rj->r", z, usual["precision"], z) + LEAST_ERROR)
    return np.log(np.abs(z).mean(axis=1) + LEAST_ERROR)


class UsualErrors:
    """Mean and deviation of the log error of clean maps, by phase of the beat and lead."""

    def __init__(self, leads: int):
        self.count, self.total, self.squares = np.zeros((BINS, 1)), np.zeros((BINS, leads)), np.zeros((BINS, leads))

    def add(self, maps: np.ndarray, phases: np.ndarray):
        """maps: (R, 4800, leads) of normal records; phases: (R, 4800) of scoring.beat_phases."""
        for one, phase in zip(np.log(maps + LEAST_ERROR), phases):
            order = np.argsort(phase, kind="stable")
            count = np.bincount(phase, minlength=BINS)
            there = np.flatnonzero(count)
            starts = (np.cumsum(count) - count)[there]
            self.count[there, 0] += count[there]
            self.total[there] += np.add.reduceat(one[order], starts, axis=0, dtype=np.float64)
            self.squares[there] += np.add.reduceat(np.square(one[order]), starts, axis=0, dtype=np.float64)

    def summarise(self) -> dict:
        """{"map_mean", "map_deviation"}: (BINS, leads) each."""
        mean = self.total / np.maximum(self.count, 1)
        variance = self.squares / np.maximum(self.count, 1) - mean ** 2
        return {"map_mean": mean, "map_deviation": np.sqrt(np.maximum(variance, SPREAD_FLOOR ** 2))}


def fit(found: dict, usual_errors: UsualErrors) -> tuple:
    """(calibration, scores (R,) of the normals that it was fitted to, cross-fitted), from normal records alone.

    found: of features(). Raises UserError where the records are too few.
    """
    records = len(found["residual"])
    if records < LEAST_NORMALS:
        raise UserError(f"{records} normal records are too few to say what is usual, {LEAST_NORMALS} are needed; make "
                        "the arrays from more of fold 9")
    parts, scores = {}, []
    for part, values in found.items():
        held_out = np.zeros(records)
        for rows in np.array_split(np.arange(records), CROSS_FITS):
            held_out[rows] = distance(fit_part(part, np.delete(values, rows, axis=0)), values[rows])
        centre, spread = held_out.mean(), max(held_out.std(), SPREAD_FLOOR)
        parts[part] = fit_part(part, values) | {"centre": centre, "spread": spread}
        scores.append((held_out - centre) / spread)
    return {"parts": parts, **usual_errors.summarise()}, np.mean(scores, axis=0)


def score_records(calibration: dict, found: dict) -> np.ndarray:
    """The calibrated detection scores (R,) float64 of features(): 0 is usual among normals, more is more unusual.

    Raises UserError where one is not finite.
    """
    parts = calibration["parts"]
    scores = np.mean([(distance(parts[part], values) - parts[part]["centre"]) / parts[part]["spread"]
                      for part, values in found.items()], axis=0)
    if not np.isfinite(scores).all():
        raise UserError(f"record {np.flatnonzero(~np.isfinite(scores))[0]} gets no finite score under calibrated; make "
                        "the calibration again with reference.py")
    return scores


def unusual_maps(calibration: dict, maps: np.ndarray, phases: np.ndarray, scores: np.ndarray,
                 record_weight: float = RECORD_WEIGHT, usual_weight: float = USUAL_WEIGHT) -> np.ndarray:
    """The calibrated maps (R, 4800, leads) float32 of the clean ones.

    phases: (R, 4800) of scoring.beat_phases; scores: (R,) of score_records.
    """
    mean, deviation = (calibration[name].astype(np.float32) for name in ("map_mean", "map_deviation"))
    found = np.empty_like(maps)
    for row, (one, phase, score) in enumerate(zip(maps, phases, scores)):
        usual = mean[phase]
        found[row] = ((np.log(one + LEAST_ERROR) - usual) / deviation[phase] + record_weight * score
                      + usual_weight * usual)
    return found
