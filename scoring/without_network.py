"""Detection without a network, which every network has to beat: how unusual a record's median beat is among normals.

Three scores, each the logarithm of a squared distance from the training normals, are added as z among normals: shape
(the whole median beat, by principal components), measurements (what a reader would take off it, wave by wave and lead
by lead, by Mahalanobis distance), and rhythm (rate, RR intervals, beat-to-beat change), a quarter of it. Nothing is
learned from abnormal records, nor from age or sex. The measurements name what is unusual: unusual().
"""
import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from ecg.signals import LEAD_NAMES, SAMPLING_RATE

STEP = 2                                    # samples: the median beat is kept at 250 Hz, ten times the pass band
BEFORE, AFTER = 440, 960                    # ms around R that the median beat holds: what the slowest rhythm needs
FIRST_R, LAST_R = 200, 4400                 # samples: between them a beat is whole, as in the paper
INSTEAD = np.arange(300, LAST_R, 500)       # samples: the "beats" of a record that has none
RR_RANGE = (0.25, 2.5)                      # s
INDEPENDENT = [0, 1, 6, 7, 8, 9, 10, 11]    # I, II, V1-V6: the other leads are sums of I and II
TIMES = np.arange(-30, 60) / 100            # s from R, of the shape, at 60 beats a minute
T_TIMES = np.arange(0.148, 0.456, 0.004)    # s, where the T wave peaks, at 60 beats a minute
RIGID = 0.05                                # s around R: QRS, which does not stretch with the RR interval
DIASTOLE, SYSTOLE = 0.25, 0.5               # powers of RR by which the time before and after QRS stretches (Bazett)
COMPANDING = 0.2                            # power of the voltage: at 1 squared distances see little else than QRS
COMPONENTS = 80                             # principal components; from 40 to 160 it hardly matters
WEIGHTS = np.array([1, 1, 0.25])            # of shape, measurements, rhythm
CENTRAL = (0.025, 0.5, 0.975)               # quantiles: the usual range and its middle
CROSS_FITS = 3                              # parts of the normals, each scored by a fit to the others, give the z
# What is small by chance has a floor, mV, before its logarithm; what has either sign gets a signed square root.
SCALES = {"log .02": lambda x: np.log(np.maximum(x, 0.02)), "log .01": lambda x: np.log(np.maximum(x, 0.01)),
          "log .03": lambda x: np.log(np.maximum(x, 0.03)), "-log .02": lambda x: -np.log(np.maximum(-x, 0.02)),
          "root": lambda x: np.sign(x) * np.sqrt(np.abs(x)), "as is": lambda x: x}
# Of each lead: wave, unit, the scales on which it counts, whether unusual() tells it.
WAVES = (("initial r", "mV", ("log .02",), True),           # the highest up to 8 ms before R: lost by a Q wave
         ("R", "mV", ("log .02", "as is"), True),           # both: low voltage and high voltage are abnormal
         ("late r", "mV", ("log .03",), True),              # the highest from 16 ms after R: r' of a bundle branch block
         ("S", "mV", ("-log .02",), True), ("ST", "mV", ("root",), True), ("T", "mV", ("root",), True),
         ("highest T", "mV", ("log .01",), False), ("P", "mV", ("log .01",), True),
         ("R time", "ms", ("as is",), True), ("T time", "ms", ("as is",), True))
RHYTHM = (("rate", "1/min"), ("RR deviation", "ms"), ("RR change", "ms"), ("longest RR", "ms"), ("shortest RR", "ms"),
          ("usual RR change", "ms"), ("change of P", "mV"), ("change of QRS", "mV"), ("change of T", "mV"))
NAMES = [(lead, wave, unit) for wave, unit, _, _ in WAVES for lead in LEAD_NAMES] + [("all", *row) for row in RHYTHM]
TOLD = np.array([told for *_, told in WAVES for _ in LEAD_NAMES] + [True] * len(RHYTHM))
SHAPE = slice(0, len(TIMES) * len(INDEPENDENT))             # where they stand in the features of a record
LEADS = slice(SHAPE.stop, SHAPE.stop + len(WAVES) * len(LEAD_NAMES))
ALL_LEADS = slice(LEADS.stop, LEADS.stop + len(RHYTHM))
NAMED = slice(LEADS.start, ALL_LEADS.stop)


def between(first: int, last: int) -> slice:
    """Where ms first to last from R, multiples of 4, stand in a median beat."""
    return slice((first + BEFORE) // 4, (last + BEFORE) // 4 + 1)


P_WAVE, PR_LEVEL, QRS, ST, T_WAVE = (between(*span) for span in ((-220, -72), (-80, -64), (-60, 68), (68, 100),
                                                                 (148, 420)))


def describe(record_mv: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """The features of a filtered record, (5000, 12) in mV, with its R peaks in samples: float32, SHAPE in mV then NAMED
    in the units of NAMES. Never NaN: a record without a whole beat is cut at INSTEAD, one without RR has 60 a minute.
    """
    r_peaks = np.asarray(r_peaks, dtype=int)
    whole = r_peaks[(r_peaks > FIRST_R) & (r_peaks < LAST_R)]
    around = np.arange(-BEFORE * SAMPLING_RATE // 1000, AFTER * SAMPLING_RATE // 1000, STEP)
    places = (whole if len(whole) else INSTEAD)[:, None] + around
    beats = record_mv[np.clip(places, 0, len(record_mv) - 1)]                               # (beats, 350, 12)
    beat = np.median(beats, axis=0)
    intervals = np.diff(r_peaks) / SAMPLING_RATE if len(r_peaks) > 2 else np.ones(2)        # s
    rr = np.median(intervals)
    t_wave = np.abs(stretched(beat, T_TIMES, rr))
    waves = (beat[between(-60, -8)].max(axis=0), beat[QRS].max(axis=0), beat[between(16, 88)].max(axis=0),
             beat[QRS].min(axis=0), beat[ST].mean(axis=0) - beat[PR_LEVEL].mean(axis=0),
             np.take_along_axis(beat[T_WAVE], np.abs(beat[T_WAVE]).argmax(axis=0)[None], axis=0)[0],
             beat[T_WAVE].max(axis=0), beat[P_WAVE].max(axis=0),
             4 * beat[QRS].argmax(axis=0) - 60, 1000 * T_TIMES[t_wave.argmax(axis=0)])
    change = np.diff(intervals)
    deviations = [np.sqrt(np.median(np.mean((beats[:, wave] - beat[wave]) ** 2, axis=1), axis=0).mean())
                  for wave in (P_WAVE, QRS, T_WAVE)]
    rhythm = (60 / rr, 1000 * intervals.std(), 1000 * np.sqrt(np.mean(change ** 2)), 1000 * intervals.max(),
              1000 * intervals.min(), 1000 * np.median(np.abs(change)), *deviations)
    shape = stretched(beat[:, INDEPENDENT], TIMES, rr)
    return np.concatenate([shape.ravel(), *waves, rhythm]).astype(np.float32)


def stretched(beat: np.ndarray, times: np.ndarray, rr: float) -> np.ndarray:
    """A median beat (350, leads) at times, s, of a beat of 60 a minute: (times, leads). rr: its RR interval, s."""
    outside = np.maximum(np.abs(times) - RIGID, 0)
    power = np.where(times < 0, DIASTOLE, SYSTOLE)
    moments = np.sign(times) * (np.minimum(np.abs(times), RIGID) + outside * np.clip(rr, *RR_RANGE) ** power)
    place = np.clip((1000 * moments + BEFORE) / 4, 0, len(beat) - 1.001)
    left = place.astype(int)
    return beat[left] + (place - left)[:, None] * (beat[left + 1] - beat[left])


def companded(shape: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Shapes (N, 720), mV, with their small waves raised. largest: what 1 in 100 voltages of a lead exceeds, (8,)."""
    shape = shape.reshape(len(shape), len(TIMES), len(INDEPENDENT))
    return (np.sign(shape) * np.minimum(1, np.abs(shape) / (2 * largest)) ** COMPANDING).reshape(len(shape), -1)


def scaled_waves(features: np.ndarray) -> np.ndarray:
    """The measurements of each lead on their scales, (N, 12 a scale)."""
    waves = np.split(features[:, LEADS].astype(np.float64), len(WAVES), axis=1)
    return np.concatenate([SCALES[scale](wave) for wave, row in zip(waves, WAVES) for scale in row[2]], axis=1)


def scaled_rhythm(features: np.ndarray) -> np.ndarray:
    """The numbers of RHYTHM, RR intervals in parts of the usual one, as logarithms with a floor, (N, 9)."""
    rate, deviation, change, longest, shortest, usual_change, *of_beats = features[:, ALL_LEADS].astype(np.float64).T
    part = rate / 60_000
    return np.log([rate, deviation * part + 0.005, change * part + 0.005, longest * part, shortest * part,
                   usual_change * part + 0.003, *np.maximum(of_beats, 3e-4)]).T


def fit(features: np.ndarray) -> dict:
    """What score() and unusual() need, as plain arrays, from the features (N, 849) of normals, some hundreds or more."""
    fitted, part = fit_parts(features), np.arange(len(features)) % CROSS_FITS
    held_out = np.concatenate([distances(fit_parts(features[part != k]), features[part == k])
                               for k in range(CROSS_FITS)])
    fitted |= {"centre": held_out.mean(axis=0), "scale": np.maximum(held_out.std(axis=0), 1e-9)}
    total = (held_out - fitted["centre"]) / fitted["scale"] @ WEIGHTS
    return fitted | {"total_scale": total.std(), "usual": np.quantile(features[:, NAMED], CENTRAL, axis=0)}


def fit_parts(features: np.ndarray) -> dict:
    """The parameters of the three distances."""
    shape = features[:, SHAPE].reshape(-1, len(INDEPENDENT))
    fitted = {"largest": np.maximum(np.quantile(np.abs(shape), 0.99, axis=0), 1e-6)}
    points = companded(features[:, SHAPE], fitted["largest"])
    pca = PCA(COMPONENTS, svd_solver="covariance_eigh").fit(points)
    fitted |= {"shape_mean": pca.mean_, "shape_components": pca.components_, "shape_variance": pca.explained_variance_,
               "shape_rest": np.maximum(pca.noise_variance_ * (points.shape[1] - COMPONENTS), 1e-12)}
    for name, numbers in (("waves", scaled_waves(features)), ("rhythm", scaled_rhythm(features))):
        mean, deviation = numbers.mean(axis=0), np.maximum(numbers.std(axis=0), 1e-6)
        precision = LedoitWolf().fit((numbers - mean) / deviation).precision_
        fitted |= {f"{name}_mean": mean, f"{name}_precision": precision / np.outer(deviation, deviation)}
    return fitted


def distances(fitted: dict, features: np.ndarray) -> np.ndarray:
    """Logarithms of the squared distances in shape, measurements and rhythm, (N, 3)."""
    points = companded(features[:, SHAPE], fitted["largest"]) - fitted["shape_mean"]
    inside = points @ fitted["shape_components"].T
    rest = np.sum(points ** 2, axis=1) - np.sum(inside ** 2, axis=1)
    squared = [np.mean(inside ** 2 / fitted["shape_variance"], axis=1) + rest / fitted["shape_rest"]]
    for name, numbers in (("waves", scaled_waves(features)), ("rhythm", scaled_rhythm(features))):
        off = numbers - fitted[f"{name}_mean"]
        squared.append(np.sum(off @ fitted[f"{name}_precision"] * off, axis=1))
    return np.log(np.maximum(squared, 1e-12)).T


def score(fitted: dict, features: np.ndarray) -> np.ndarray:
    """How anomalous records are, (N,) float64 from features (N, 849): about 0 +- 1 among normals not fitted to."""
    return (distances(fitted, features) - fitted["centre"]) / fitted["scale"] @ WEIGHTS / fitted["total_scale"]


def unusual(fitted: dict, features: np.ndarray, count: int = 10) -> list:
    """The most unusual measurements of a record, its features (849,), the most unusual first.

    Tuples (lead, wave, value, unit, low, high, z): low to high is the central 95 % of the training normals; z is the
    distance from their median, 1.96 being that of low or high. Lead "all" stands for the rhythm.
    """
    value, (low, middle, high) = features[NAMED].astype(np.float64), fitted["usual"]
    side = np.where(value < middle, middle - low, high - middle)
    z = np.where(value == middle, 0.0, 1.96 * (value - middle) / np.maximum(side, 1e-3))
    order = sorted(np.flatnonzero(TOLD), key=lambda index: -abs(z[index]))[:count]
    return [(*NAMES[index][:2], value[index], NAMES[index][2], low[index], high[index], z[index]) for index in order]
