"""What normals' median beats explain of a median beat, without a network: three ways, the rivals of every map.

Each is fitted to beats of the eight independent leads at TIMES, (N, 103, 8) mV, as plain arrays, and gives what it
does not explain of others, (n, 103, 8) mV. Every other place is left out away from QRS: the signal holds nothing above
25 Hz.
"""
import numpy as np
from sklearn.decomposition import PCA

from ecg.signals import compand, companding_scale
from scoring.beat_frame import TIMES

PLACES = np.flatnonzero((np.abs(TIMES) < 0.105) | (np.arange(len(TIMES)) % 2 == 0))
COMPONENTS, POWER = 20, 0.5                 # of the plain residual, on companded beats
FACTORS = 40
OWN_LEAST = 0.003                           # of a point's variance, in no case explained by the factors
TAIL, ROUNDS = 3, 6                         # degrees of freedom of Student's t: what does not fit weighs less
EVIDENCE = 0.05                             # a point's weight: its neighbours say much the same
SHRINKAGE = 0.02                            # of the covariance, towards its diagonal


def fit_residual(beats: np.ndarray) -> dict:
    """Principal components of companded beats."""
    scale = companding_scale(beats)
    points = compand(beats, scale, POWER).reshape(len(beats), -1)
    of_points = PCA(COMPONENTS, svd_solver="covariance_eigh").fit(points)
    return {"scale": scale, "centre": of_points.mean_, "components": of_points.components_.T}


def residual(fitted: dict, beats: np.ndarray) -> np.ndarray:
    """Beats less the nearest combination of the components."""
    points = compand(beats, fitted["scale"], POWER).reshape(len(beats), -1) - fitted["centre"]
    near = (points @ fitted["components"] @ fitted["components"].T + fitted["centre"]).reshape(beats.shape)
    return beats - np.sign(near) * np.abs(near) ** (1 / POWER) * fitted["scale"]


def fit_points(beats: np.ndarray) -> dict:
    """Mean, deviation and correlation of the points of beats at PLACES."""
    points = beats[:, PLACES].reshape(len(beats), -1).astype(np.float64)
    centre, deviation = points.mean(axis=0), points.std(axis=0) + 1e-3
    points = (points - centre) / deviation
    return {"centre": centre, "deviation": deviation, "correlation": points.T @ points / len(points)}


def fit_conditional(beats: np.ndarray) -> dict:
    """The precision matrix of the points."""
    fitted = fit_points(beats)
    correlation = fitted.pop("correlation")
    return fitted | {"precision": np.linalg.inv((1 - SHRINKAGE) * correlation
                                                + SHRINKAGE * np.diag(np.diag(correlation)))}


def conditional(fitted: dict, beats: np.ndarray) -> np.ndarray:
    """Each point less what all others say of it."""
    points = (beats[:, PLACES].reshape(len(beats), -1) - fitted["centre"]) / fitted["deviation"]
    return at_all_times(points @ fitted["precision"] / np.diag(fitted["precision"]) * fitted["deviation"])


def fit_robust(beats: np.ndarray) -> dict:
    """Factors of the points, and each point's own variance."""
    fitted = fit_points(beats)
    correlation = fitted.pop("correlation")
    values, vectors = np.linalg.eigh(correlation)
    factors = vectors[:, -FACTORS:]
    own = np.maximum(np.diag(correlation) - factors ** 2 @ values[-FACTORS:], OWN_LEAST)
    return fitted | {"factors": factors, "variances": values[-FACTORS:], "own": own}


def robust(fitted: dict, beats: np.ndarray) -> np.ndarray:
    """Beats less their likeliest factors, where points that do not fit weigh less, again and again."""
    points = (beats[:, PLACES].reshape(len(beats), -1) - fitted["centre"]) / fitted["deviation"]    # (n, points)
    factors, number = fitted["factors"], fitted["factors"].shape[1]
    products = (factors[:, :, None] * factors[:, None]).reshape(len(factors), -1)
    left, weights = points, np.ones_like(points)
    for _ in range(ROUNDS):
        weighed = weights * EVIDENCE / fitted["own"]
        precision = (weighed @ products).reshape(-1, number, number) + np.diag(1 / fitted["variances"])
        left = points - np.linalg.solve(precision, ((weighed * points) @ factors)[..., None])[..., 0] @ factors.T
        weights = (TAIL + 1) / (TAIL + left ** 2 / fitted["own"])
    return at_all_times(left * fitted["deviation"])


def at_all_times(points: np.ndarray) -> np.ndarray:
    """Values at PLACES, (n, places * leads) -> linearly between them, (n, 103, leads)."""
    values = points.reshape(len(points), len(PLACES), -1)
    place = np.interp(np.arange(len(TIMES)), PLACES, np.arange(len(PLACES)))
    left = np.minimum(place.astype(int), len(PLACES) - 2)
    return values[:, left] + (place - left)[:, None] * (values[:, left + 1] - values[:, left])


BEAT_MODELS = {"residual": (fit_residual, residual), "conditional": (fit_conditional, conditional),
               "robust": (fit_robust, robust)}
