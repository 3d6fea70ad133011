"""Maps that tell where, by lead and moment: of single beats, of the median beat without a network, and with one.

What a record's median beat shows at a place is compared with what normals show there, laid back on every beat; each
beat is compared with the median beat, and its time with the rhythm. A map's unit is its own: it ranks the points of one
record. Leads I ... V6 in mV, R peaks by the slope detector.
"""
import numpy as np
from scipy.ndimage import gaussian_filter1d

from dataloader import valid_beats
from ecg.arrays import Records
from ecg.leads import INDEPENDENT, TO_TWELVE
from ecg.signals import SAMPLING_RATE
from scoring.beat_frame import PLACE, SAMPLES, lay_back, typical_beats, usual_interval
from scoring.beat_models import BEAT_MODELS
from scoring.beat_restorer import HELD_BACK, BeatRestorer
from scoring.without_network import interpolate

MOST_NORMALS = 2000                 # that a beat model is fitted to
LEAST_SIZE = 0.005                  # mV added to the usual size of a residual: noise
USUAL_SHARE = 0.99                  # of the normals: larger residuals count as this quantile in the usual size
SMOOTHING = 3                       # places, 30 ms: sigma over a beat
LARGEST = 10                        # usual sizes; more is no more unusual
OTHER_LEADS = 0.3                   # weight of the mean over the leads beside each lead's own
ODDS, ODDS_AMONG_NORMALS = 0.3, 0.3         # weights of the network's log-odds as they are, and as z among normals
BEAT_WEIGHT = 2                     # of the beat-to-beat term beside the logarithm of the others
BEFORE, AFTER = 0.45, 0.62          # RR intervals around R that the median beat covers when beats are compared with it
USUAL_CHANGE = 0.05                 # mV, of a beat from the others
UNLIKE = 0.1                        # mV, root mean square over leads: from here to twice this, another beat
EARLY, EARLY_SIZE = 0.09, 0.04      # RR intervals: a beat that comes earlier is premature, and how much counts as one
EARLY_FROM, EARLY_TO = -0.22, 0.42  # s around R at 60 a minute: P to T
WITHOUT_NETWORK = (*BEAT_MODELS, "beat to beat", "without network")
WITH_NETWORK = ("network", "network and beat to beat")
CHOSEN = WITH_NETWORK[-1]           # on fold 9


def fit_maps(records: Records, r_peaks: list, rows, restorer: BeatRestorer | None = None) -> dict:
    """What make_maps() needs, as plain arrays, from training normals (rows of records). Raises UserError without mV.

    One row in HELD_BACK, which neither the models nor the restorer are fitted to, tells what is usual.
    """
    rows = np.asarray(rows)
    held_back = np.arange(len(rows)) % HELD_BACK == 0
    fitted_to = rows[~held_back]
    fitted_to = fitted_to[np.unique(np.linspace(0, len(fitted_to) - 1, MOST_NORMALS).astype(int))]
    beats = typical_beats(records, r_peaks, fitted_to)[0][..., INDEPENDENT].astype(np.float64)
    normals, rr = typical_beats(records, r_peaks, rows[held_back])
    fitted = {}
    for name, (fit, left_over) in BEAT_MODELS.items():
        model = fit(beats)
        fitted[name] = model | {"usual": usual_size(left_over(model, normals[..., INDEPENDENT]) @ TO_TWELVE.T)}
    if restorer is not None:
        restored, odds = restorer.restore(normals, rr)
        fitted["network"] = {"usual": usual_size(normals - restored), "odds_centre": odds.mean(axis=0),
                             "odds_deviation": odds.std(axis=0) + 0.1}
        fitted["network"]["normals"] = network_unusualness(fitted["network"], normals - restored, odds)
    return fitted


def usual_size(residuals: np.ndarray) -> np.ndarray:
    """The root mean square of normals' residuals (N, 103, 12), mV, by place and lead."""
    size = np.abs(residuals)
    return np.sqrt(np.mean(np.minimum(size, np.quantile(size, USUAL_SHARE, axis=0)) ** 2, axis=0)) + LEAST_SIZE


def unusualness(residuals: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Residuals (n, 103, 12) in squared usual sizes, smoothed over a wave, with a share of the other leads'."""
    squared = gaussian_filter1d(np.minimum(np.abs(residuals) / usual, LARGEST) ** 2, SMOOTHING, axis=1)
    return squared + OTHER_LEADS * squared.mean(axis=2, keepdims=True)


def network_unusualness(fitted: dict, residuals: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """How unusual places are by what the network does not restore of beats, mV, and its log-odds, (n, 103, 12) each."""
    among_normals = (odds - fitted["odds_centre"]) / fitted["odds_deviation"]
    return np.log1p(unusualness(residuals, fitted["usual"])) + ODDS * odds + ODDS_AMONG_NORMALS * among_normals


def make_maps(fitted: dict, records: Records, r_peaks: list, rows, restorer: BeatRestorer | None = None) -> dict:
    """The maps of rows by name, each (n, 4800, 12) float32: WITHOUT_NETWORK, and WITH_NETWORK if there is a restorer.

    fitted: of fit_maps() with the same restorer; r_peaks: of every record. All are in memory at once.
    """
    rows = np.asarray(rows)
    beats, rr = typical_beats(records, r_peaks, rows)
    of_beats = {name: unusualness(left_over(fitted[name], beats[..., INDEPENDENT]) @ TO_TWELVE.T, fitted[name]["usual"])
                for name, (_, left_over) in BEAT_MODELS.items()}
    if restorer is not None:
        restored, odds = restorer.restore(beats, rr)
        of_beats["network"] = network_unusualness(fitted["network"], beats - restored, odds)
    maps = {name: np.stack([lay_back(of_row, r_peaks[row]) for of_row, row in zip(values, rows)])
            for name, values in of_beats.items()}
    single = np.stack([beat_to_beat(record, r_peaks[row]) for record, row in zip(records.millivolts(rows), rows)])
    maps |= {"beat to beat": single, "without network": np.log1p(maps["robust"] + single)}
    if restorer is not None:
        maps[CHOSEN] = maps["network"] + BEAT_WEIGHT * np.log1p(single)
    return {name: np.repeat(values, PLACE, axis=1).astype(np.float32) for name, values in maps.items()}


def beat_to_beat(record: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """How unlike its neighbours each beat of a record (5000, leads), mV, is, and how early it comes: (960, leads)."""
    if len(r_peaks) < 3:
        return np.zeros((len(SAMPLES), record.shape[1]))
    change = change_of_beats(record, np.asarray(r_peaks, dtype=int))
    overall = gaussian_filter1d(np.sqrt(np.mean(change ** 2, axis=1)), 8)
    other_beat = np.clip(overall / UNLIKE - 1, 0, 1)[:, None]
    squared = gaussian_filter1d(np.minimum(np.abs(change) / USUAL_CHANGE, LARGEST) ** 2, 4, axis=0)
    return other_beat * squared + earliness(np.asarray(r_peaks))[:, None]


def change_of_beats(record: np.ndarray, r_peaks: np.ndarray) -> np.ndarray:
    """A record, (5000, leads), less its median beat, which lies at the R peak before or after: where it fits better.

    (960, leads) at SAMPLES.
    """
    rr = usual_interval(r_peaks) * SAMPLING_RATE
    offsets = np.arange(int(-BEFORE * rr), int(AFTER * rr) + 1, PLACE)
    beat = np.median(interpolate(record, valid_beats(r_peaks)[0][:, None] + offsets), axis=0)
    beats = np.concatenate([[r_peaks[0] - rr], r_peaks, [r_peaks[-1] + rr]])
    following = np.searchsorted(beats[1:-1], SAMPLES) + 1
    changes = [record[SAMPLES] - interpolate(beat, (SAMPLES - beats[which] - offsets[0]) / PLACE)
               for which in (following - 1, following)]
    first, second = (gaussian_filter1d(np.abs(change), 4, axis=0).mean(axis=1) for change in changes)
    return np.where((first < second)[:, None], *changes)


def earliness(r_peaks: np.ndarray) -> np.ndarray:
    """The square of how early the beat comes that a sample belongs to, 0 where it is in time: (960,) at SAMPLES."""
    rr, early = usual_interval(r_peaks), np.zeros(len(SAMPLES))
    for r, interval in zip(r_peaks[1:], np.diff(r_peaks) / SAMPLING_RATE):
        seconds = (SAMPLES - r) / SAMPLING_RATE / np.sqrt(rr)
        inside = (seconds > EARLY_FROM) & (seconds < EARLY_TO)
        early[inside] = np.maximum(early[inside], (max(1 - interval / rr - EARLY, 0) / EARLY_SIZE) ** 2)
    return early
