"""Detection without a network, which every network has to beat: how unusual a record's median beat is among normals.

Three scores, each the logarithm of a squared distance from the training normals, are added as z among normals: shape
(the whole median beat, by principal components), measurements (what a reader would take off it, wave by wave and lead
by lead, by Mahalanobis distance), and a quarter of rhythm (rate, RR intervals, beat-to-beat change). Nothing is learned
from abnormal records, nor from age or sex. The measurements name what is unusual: unusual().
"""
import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from dataloader import valid_beats
from ecg.leads import INDEPENDENT
from ecg.signals import LEAD_NAMES, SAMPLING_RATE, compand, companding_scale

BEFORE, AFTER = 440, 960                    # ms around R of a median beat, at 250 Hz: what the slowest rhythm needs
SLOWEST, FASTEST = 2.5, 0.25                # s, RR intervals beyond which nothing stretches further
TIMES = np.arange(-30, 60) / 100            # s from R, of the shape, at 60 beats a minute
T_TIMES = np.arange(0.148, 0.456, 0.004)    # s from R, where the T wave peaks, at 60 beats a minute
RIGID = 0.05                                # s around R: QRS, which does not stretch with the RR interval
DIASTOLE, SYSTOLE = 0.25, 0.5               # powers of RR by which the time before and after QRS stretches (Bazett)
COMPANDING = 0.2                            # power of the voltage: at 1 squared distances see little else than QRS
COMPONENTS = 80                             # principal components; between 40 and 160 it hardly matters
PARTS = ("shape", "measurements", "rhythm")
WEIGHTS = np.array([1, 1, 0.25])            # of PARTS
CENTRAL = (0.025, 0.5, 0.975)               # quantiles: the usual range and its middle
CROSS_FITS = 5                              # parts of the normals, each scored by a fit to the others: the scale of z
# Of each lead: wave, unit, scales on which it counts. A number is the floor, mV, of a logarithm (negative: of minus the
# value), what is less being chance; "root" is a signed square root; R counts twice, for low and for high voltage.
WAVES = (("initial r", "mV", (0.02,)), ("R", "mV", (0.02, "as is")), ("late r", "mV", (0.03,)), ("S", "mV", (-0.02,)),
         ("ST", "mV", ("root",)), ("T", "mV", ("root",)), ("highest T", "mV", (0.01,)), ("P", "mV", (0.01,)),
         ("R time", "ms", ("as is",)), ("T time", "ms", ("as is",)))
UNTOLD = ("highest T", "R time")            # not to readers: the one doubles T, the other jumps between R and r'
RHYTHM = (("rate", "1/min"), ("RR deviation", "ms"), ("RR change", "ms"), ("longest RR", "ms"), ("shortest RR", "ms"),
          ("usual RR change", "ms"), ("change of P", "mV"), ("change of QRS", "mV"), ("change of T", "mV"))
NAMES = [(lead, wave, unit) for wave, unit, _ in WAVES for lead in LEAD_NAMES] + [("all", *row) for row in RHYTHM]
SPANS = ((-220, -72), (-80, -64), (-60, -8), (-60, 68), (16, 88), (68, 100), (148, 420))        # ms from R
P_WAVE, PR_LEVEL, INITIAL, QRS, LATE, ST, T_WAVE = (slice((first + BEFORE) // 4, (last + BEFORE) // 4 + 1)
                                                    for first, last in SPANS)                   # in a median beat
SHAPE, NAMED = slice(0, len(TIMES) * len(INDEPENDENT)), slice(len(TIMES) * len(INDEPENDENT), None)    # in the features


def describe(record_mv: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """The features of a filtered record, (5000, 12) in mV, with its R peaks, in samples: float32 (849,), never NaN.

    First SHAPE, mV, then what NAMES names. With fewer than three R peaks the rate is taken to be 60.
    """
    r_peaks = np.asarray(r_peaks, dtype=int)
    places = valid_beats(r_peaks)[0][:, None] + np.arange(-BEFORE, AFTER, 4) * SAMPLING_RATE // 1000
    beats = record_mv[np.clip(places, 0, len(record_mv) - 1)]                               # (beats, 350, 12)
    beat = np.median(beats, axis=0)
    intervals = np.diff(r_peaks) / SAMPLING_RATE if len(r_peaks) > 2 else np.ones(2)        # s
    rr, change = np.median(intervals), np.diff(intervals)
    extreme = np.abs(beat[T_WAVE]).argmax(axis=0)
    waves = (beat[INITIAL].max(axis=0), beat[QRS].max(axis=0), beat[LATE].max(axis=0), beat[QRS].min(axis=0),
             beat[ST].mean(axis=0) - beat[PR_LEVEL].mean(axis=0), beat[T_WAVE][extreme, np.arange(len(extreme))],
             beat[T_WAVE].max(axis=0), beat[P_WAVE].max(axis=0), 4 * beat[QRS].argmax(axis=0) - 60,
             1000 * T_TIMES[np.abs(stretched(beat, T_TIMES, rr)).argmax(axis=0)])
    in_ms = 1000 * np.array([intervals.std(), np.sqrt(np.mean(change ** 2)), intervals.max(), intervals.min(),
                             np.median(np.abs(change))])
    squares = (np.mean((beats[:, wave] - beat[wave]) ** 2, axis=1) for wave in (P_WAVE, QRS, T_WAVE))
    changes = [np.sqrt(np.median(of_wave, axis=0).mean()) for of_wave in squares]
    return np.concatenate([stretched(beat[:, INDEPENDENT], TIMES, rr).ravel(), *waves, [60 / rr], in_ms,
                           changes]).astype(np.float32)


def stretching(times: np.ndarray, rr: float) -> np.ndarray:
    """The factor by which RR interval rr, s, stretches the time beyond QRS, at times, s from R."""
    return np.clip(rr, FASTEST, SLOWEST) ** np.where(times < 0, DIASTOLE, SYSTOLE)


def stretch_times(times: np.ndarray, rr: float) -> np.ndarray:
    """Times, s from R, of a beat of 60 a minute -> those of the same places in a beat with RR interval rr, s."""
    return np.sign(times) * (np.minimum(np.abs(times), RIGID)
                             + np.maximum(np.abs(times) - RIGID, 0) * stretching(times, rr))


def unstretch_times(times: np.ndarray, rr: float) -> np.ndarray:
    """The way back of stretch_times: times, s from R, of a beat with RR interval rr, s -> those of 60 a minute."""
    return np.sign(times) * (np.minimum(np.abs(times), RIGID)
                             + np.maximum(np.abs(times) - RIGID, 0) / stretching(times, rr))


def interpolate(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values (n, leads) at fractional indices (...,), the ends going on: (..., leads)."""
    places = np.clip(places, 0, len(values) - 1.001)
    left = places.astype(int)
    return values[left] + (places - left)[..., None] * (values[left + 1] - values[left])


def stretched(beat: np.ndarray, times: np.ndarray, rr: float) -> np.ndarray:
    """A median beat (350, leads) with RR interval rr, s, at times, s, of a beat of 60 a minute: (times, leads)."""
    return interpolate(beat, (1000 * stretch_times(times, rr) + BEFORE) / 4)


def companded(features: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The shapes, (N, 720), small waves raised. largest: the voltage that a lead exceeds 1 % of the time, mV (8,)."""
    shape = features[:, SHAPE].reshape(len(features), len(TIMES), len(INDEPENDENT))
    return compand(shape, 2 * largest, COMPANDING).reshape(len(features), -1)


def scaled(features: np.ndarray) -> dict:
    """The measurements and the rhythm as the distances take them: (N, 12 a scale) and (N, 9), RR in parts of itself."""
    named = features[:, NAMED].astype(np.float64)
    rate, *in_ms, change_p, change_qrs, change_t = named[:, -len(RHYTHM):].T
    deviation, change, longest, shortest, usual_change = np.array(in_ms) * rate / 60_000
    logs = [rate, deviation + 0.005, change + 0.005, longest, shortest, usual_change + 0.003,
            *np.maximum((change_p, change_qrs, change_t), 3e-4)]
    waves = np.split(named[:, :-len(RHYTHM)], len(WAVES), axis=1)
    return {"waves": np.concatenate([on_scale(wave, way) for wave, row in zip(waves, WAVES) for way in row[2]], axis=1),
            "rhythm": np.log(logs).T}


def on_scale(values: np.ndarray, scale) -> np.ndarray:
    """values on one of the scales of WAVES. Higher stays higher."""
    if isinstance(scale, float):
        return np.sign(scale) * np.log(np.maximum(np.sign(scale) * values, abs(scale)))
    return values if scale == "as is" else np.sign(values) * np.sqrt(np.abs(values))


def fit_shape(features: np.ndarray) -> dict:
    """What project() needs, as plain arrays, from the features (N, 849)."""
    largest = np.maximum(companding_scale(features[:, SHAPE].reshape(-1, len(INDEPENDENT))) / 2, 1e-6)
    pca = PCA(min(COMPONENTS, len(features) // 4), svd_solver="covariance_eigh").fit(companded(features, largest))
    return {"largest": largest, "shape_mean": pca.mean_, "shape_components": pca.components_,
            "shape_variance": pca.explained_variance_,
            "shape_rest": pca.noise_variance_ * (SHAPE.stop - pca.n_components_)}


def project(fitted: dict, features: np.ndarray) -> tuple:
    """The shapes off their mean, (N, 720), and their principal components, (N, components)."""
    points = companded(features, fitted["largest"]) - fitted["shape_mean"]
    return points, points @ fitted["shape_components"].T


def fit(features: np.ndarray, calibrated: bool = True) -> dict:
    """What score() and unusual() need, or distances() alone, as plain arrays, from the features (N, 849) of normals."""
    fitted = fit_shape(features)
    for name, numbers in scaled(features).items():
        mean, deviation = numbers.mean(axis=0), np.maximum(numbers.std(axis=0), 1e-6)
        precision = LedoitWolf().fit((numbers - mean) / deviation).precision_ / np.outer(deviation, deviation)
        fitted |= {f"{name}_mean": mean, f"{name}_precision": precision}
    if not calibrated:
        return fitted
    part = np.arange(len(features)) % CROSS_FITS
    of_others = np.concatenate([distances(fit(features[part != k], False), features[part == k]) for k in set(part)])
    centre, scale = of_others.mean(axis=0), of_others.std(axis=0)
    return fitted | {"centre": centre, "scale": scale * np.std((of_others - centre) / scale @ WEIGHTS),
                     "usual": np.quantile(features[:, NAMED], CENTRAL, axis=0)}


def distances(fitted: dict, features: np.ndarray) -> np.ndarray:
    """Logarithms of the squared distances in PARTS, (N, 3)."""
    points, inside = project(fitted, features)
    rest = np.sum(points ** 2, axis=1) - np.sum(inside ** 2, axis=1)
    squared = [np.mean(inside ** 2 / fitted["shape_variance"], axis=1) + rest / fitted["shape_rest"]]
    for name, numbers in scaled(features).items():
        off = numbers - fitted[f"{name}_mean"]
        squared.append(np.sum(off @ fitted[f"{name}_precision"] * off, axis=1))
    return np.log(squared).T


def score_parts(fitted: dict, features: np.ndarray) -> np.ndarray:
    """How anomalous records are in each of PARTS, (N, 3) from features (N, 849)."""
    return (distances(fitted, features) - fitted["centre"]) / fitted["scale"]


def score(fitted: dict, features: np.ndarray) -> np.ndarray:
    """How anomalous records are, (N,) float64 from features (N, 849): about 0 +- 1 among normals not fitted to."""
    return score_parts(fitted, features) @ WEIGHTS


def unusual(fitted: dict, features: np.ndarray, count: int = 10) -> list:
    """The numbers of a record, features (849,), that are most unusual: tuples (lead, wave, value, unit, low, high, z).

    low to high is the central 95 % of the training normals; z, how far value is from their median, is 1.96 at low and
    high. The most unusual come first. Lead "all" stands for the rhythm.
    """
    value, (low, middle, high) = features[NAMED].astype(np.float64), fitted["usual"]
    z = 1.96 * (value - middle) / np.maximum(np.where(value < middle, middle - low, high - middle), 1e-3)
    readable = [index for index, name in enumerate(NAMES) if name[1] not in UNTOLD]
    order = sorted(readable, key=lambda index: -abs(z[index]))[:count]
    return [(*NAMES[i][:2], float(value[i]), NAMES[i][2], float(low[i]), float(high[i]), float(z[i])) for i in order]
